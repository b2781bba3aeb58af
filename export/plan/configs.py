"""The YAMLs of configs/, the user's own among them."""

from pathlib import Path

from export.errors import CHECKOUT, ExportError, Record, found, load_record, stems, suggestion

CONFIGS = CHECKOUT / "configs"


def names(kind: str) -> list[str]:
    """Every known model, recipe or target (`kind`: models, quant, targets), the user's own among them."""
    return stems(CONFIGS / kind)


def file_of(kind: str, name: str) -> Path:
    """The YAML of a name, the user's own before ours."""
    return found(CONFIGS / kind, f"{name}.yaml")


def load_named(cls: type[Record], kind: str, name: str) -> Record:
    """Load `configs/KIND/NAME.yaml`; an unknown name is answered by the nearest ones."""
    if name not in names(kind):
        raise ExportError(f"unknown name {name!r} in configs/{kind}; {suggestion(name, names(kind))}")
    return load_record(cls, file_of(kind, name))
