"""python -m runtime_tests.coreml.compute_plan FOLDER… [--out DIR]: where Core ML would run each operation. On a Mac.

The plan is Core ML's own (MLComputePlan, macOS 14.4 or later), for the compute units of devices/host.yaml and the
smallest inputs: one token on an empty cache.
"""

import platform
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import devices
from export.build.command import run
from export.errors import ExportError
from export.formats import admission
from export.host.console import say
from export.host.text import code
from export.toolbox.tables import markdown
from runtime_tests.reports import ci
from runtime_tests.sessions import mlpackage

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def placements(package: Path, compute_units: str) -> Counter[tuple[str, str]]:
    """`counts` of Core ML's plan of a package on these units. Raises ExportError: this is no Mac."""
    if platform.system() != "Darwin":
        raise ExportError(f"{package}: Core ML plans its work on a Mac only; this is {platform.system()}")
    from coremltools.models.compute_plan import MLComputePlan

    compiled = mlpackage.compiled(package, mlpackage.cache_here())
    return counts(MLComputePlan.load_from_path(str(compiled), compute_units=mlpackage.unit(compute_units)))


def _operations(blocks: list[Any]) -> Iterator[Any]:
    """Every operation except constants, including those of loops and branches."""
    for block in blocks:
        for operation in block.operations:
            if _operator(operation) != "const":
                yield operation
            yield from _operations(operation.blocks)


def counts(plan: Any) -> Counter[tuple[str, str]]:
    """(device that Core ML prefers, operator) → number of operations."""
    program = plan.model_structure.program
    if program is None:
        raise ExportError("Core ML found no ML Program in the package")
    operations = _operations([function.block for function in program.functions.values()])
    usage = plan.get_compute_device_usage_for_mlprogram_operation
    return Counter((_device_name(usage(operation)), _operator(operation)) for operation in operations)


def _operator(operation: Any) -> str:
    """`linear`, which Core ML calls `ios18.linear`."""
    name: str = operation.operator_name
    return name.rpartition(".")[2]


def _device_name(usage: Any) -> str:
    """`CPU`, `GPU` or `NeuralEngine`; Core ML does not report it for every operation."""
    if usage is None:
        return "not told"
    return type(usage.preferred_compute_device).__name__.removeprefix("ML").removesuffix("ComputeDevice")


def render(name: str, units: str, placed: Counter[tuple[str, str]]) -> str:
    """A line of sums by device, and a table of operators, in Markdown."""
    devices = Counter[str]()
    for (device, _), number in placed.items():
        devices[device] += number
    sums = ", ".join(f"{number} on {device}" for device, number in devices.most_common())
    rows = [(device, operator, str(number)) for (device, operator), number in placed.most_common()]
    lines = [f"### Core ML's plan of {code(name)} on {units}", "", f"{placed.total()} operations: {sums}", ""]
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
        units = devices.load("host").compute_units
        pages.append(render(described.id, units, placements(package, units)))
    text = "\n".join(pages)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compute-plan.md").write_text(text, encoding="utf-8")
    ci.append(text)
    say(*text.split("\n"))


if __name__ == "__main__":
    sys.exit(run(app))
