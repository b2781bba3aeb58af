"""The project under one name where it is installed: its console scripts, and its door for Python (docs/python.md).

`pip install -e CHECKOUT` puts this module and nothing else where Python finds it. Once something of the door is used,
Python finds the rooms beside it too: `export`, `runtime_tests`, `devices`. As a script it runs one of our modules
whatever the current folder is: `python -P llama_on_device.py runtime_tests.jobs.worker`.
"""

import runpy
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export import build
    from export.errors import ExportError
    from runtime_tests import open_artifact, prove

__all__ = ["ExportError", "build", "open_artifact", "prove"]
_DOOR = {
    "ExportError": "export.errors",
    "build": "export",
    "open_artifact": "runtime_tests",
    "prove": "runtime_tests",
}
_ROOMS = ("devices", "export", "runtime_tests")
_CHECKOUT = Path(__file__).parent


class _Rooms:
    """Finds the rooms of the checkout by their names, and nothing else that lies beside them."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_CHECKOUT)]) if name in _ROOMS else None


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _open()
    return getattr(import_module(_DOOR[name]), name)


def _open() -> None:
    """Let Python find the rooms. Raises ImportError: they are not there, or one of their names is another's here."""
    if _Rooms in sys.meta_path:
        return
    if not (_CHECKOUT / "configs" / "quant").is_dir():
        raise ImportError(f"{_CHECKOUT}: no checkout of llama-on-device; install it with `pip install -e CHECKOUT`")
    for room in _ROOMS:
        ours = _CHECKOUT / room / "__init__.py"
        if (other := _found(room)) and Path(other).resolve() != ours.resolve():
            raise ImportError(
                f"{other}: llama-on-device has a module {room} of its own, and Python can have one of that name: "
                "rename yours, or keep the two in different folders or environments"
            )
    sys.meta_path.insert(0, _Rooms)


def _found(name: str) -> str | None:
    """The file of the module that Python has or would find; None: there is none, or just a folder of that name."""
    if (module := sys.modules.get(name)) is not None:
        return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), name)
    spec = find_spec(name)
    return spec.origin if spec else None


def _run(module: str, named_so: bool = False) -> None:
    """What `python -m MODULE` does, under the name of the script or, `named_so`, as its own help has it."""
    try:
        _open()
    except ImportError as error:
        sys.exit(f"error: {error}")
    runpy.run_module(module, run_name="__main__", alter_sys=named_so)


def export_script() -> None:
    """`llama-export`."""
    _run("export")


def validate_script() -> None:
    """`llama-validate`."""
    _run("runtime_tests")


def devices_script() -> None:
    """`llama-devices`."""
    _run("devices")


if __name__ == "__main__":
    del sys.argv[0]
    _run(sys.argv[0], named_so=True)
