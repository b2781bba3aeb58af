"""python -m runtime_tests.coreml.compute_plan FOLDER… [--out DIR]: where Core ML would run each operation. On a Mac.

The plan is Core ML's own (MLComputePlan, macOS 14.4 or later), for the compute units that the session uses.
"""

import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from export.build.command import run
from export.errors import ExportError
from export.formats import admission
from export.host.console import say
from export.host.text import code
from export.toolbox.tables import markdown
from runtime_tests.reports import ci

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@contextmanager
def _plan(package: Path) -> Iterator[Any]:
    """Core ML's plan of a package. Raises ExportError: this is no Mac."""
    if platform.system() != "Darwin":
        raise ExportError(f"{package}: Core ML plans its work on a Mac only; this is {platform.system()}")
    import coremltools as ct
    from coremltools.models.compute_plan import MLComputePlan

    units = ct.ComputeUnit.CPU_AND_GPU
    with tempfile.TemporaryDirectory() as folder:  # an MLModel's own compiled copy goes when the object does
        compiled = ct.models.utils.compile_model(str(package), f"{folder}/{package.stem}.mlmodelc")
        yield MLComputePlan.load_from_path(compiled, compute_units=units)


def _operations(blocks: list[Any]) -> Iterator[Any]:
    """Every operation except constants, including those of loops and branches."""
    for block in blocks:
        for operation in block.operations:
            if operation.operator_name != "const":
                yield operation
            yield from _operations(operation.blocks)


def counts(plan: Any) -> Counter[tuple[str, str]]:
    """(device that Core ML prefers, operator) → number of operations."""
    program = plan.model_structure.program
    if program is None:
        raise ExportError("Core ML found no ML Program in the package")
    operations = _operations([function.block for function in program.functions.values()])
    usage = plan.get_compute_device_usage_for_mlprogram_operation
    return Counter((_device_name(usage(operation)), operation.operator_name) for operation in operations)


def _device_name(usage: Any) -> str:
    """`CPU`, `GPU` or `NeuralEngine`; Core ML does not report it for every operation."""
    if usage is None:
        return "not told"
    return type(usage.preferred_compute_device).__name__.removeprefix("ML").removesuffix("ComputeDevice")


def render(name: str, placements: Counter[tuple[str, str]]) -> str:
    """A line of sums by device, and a table of operators, in Markdown."""
    devices = Counter[str]()
    for (device, _), number in placements.items():
        devices[device] += number
    sums = ", ".join(f"{number} on {device}" for device, number in devices.most_common())
    rows = [(device, operator, str(number)) for (device, operator), number in placements.most_common()]
    lines = [f"### Core ML's plan of {code(name)}", "", f"{placements.total()} operations: {sums}", ""]
    return "\n".join([*lines, markdown([("device", "operator", "count"), *rows]), ""])


@app.command()
def main(
    folders: Annotated[list[Path], typer.Argument(help="artifact folders of Core ML")],
    out: Annotated[Path, typer.Option(help="folder of compute-plan.md")] = Path("build/ci"),
) -> None:
    """Write and print where each operation runs."""
    pages = []
    for folder in folders:
        described = admission.admit(folder)
        package = folder / described.plan.target.artifact
        if package.suffix != ".mlpackage":
            raise ExportError(f"{package}: not a Core ML package; give the folder of one")
        with _plan(package) as plan:
            pages.append(render(described.id, counts(plan)))
    text = "\n".join(pages)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compute-plan.md").write_text(text, encoding="utf-8")
    ci.append(text)
    say(*text.split("\n"))


if __name__ == "__main__":
    sys.exit(run(app))
