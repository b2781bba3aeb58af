"""The known devices.

python -m devices                  each one, whether it answers now, and what it runs
python -m devices targets DEVICE   the targets it runs, for scripts
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import Device, DeviceError, load, names, open_transport
from .command import run
from .transports import visible

_ANSWER_S = 8.0
_USAGE = 2
_WIDTH = 160
"""Characters in a line of a table that goes to a file or a pipe."""


def main(arguments: list[str]) -> int:
    """Exit status: 2 for wrong usage. Raises DeviceError."""
    match arguments:
        case []:
            return _show()
        case ["targets", name]:
            print(*load(name).targets)
            return 0
    print(_usage(), file=sys.stderr)
    return _USAGE


def _usage() -> str:
    script = Path(sys.argv[0]).name
    return __doc__.replace("python -m devices", script) if script == "llama-devices" else __doc__


def _show() -> int:
    """Print one line per device. All are asked at once."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    with ThreadPoolExecutor(max_workers=len(names())) as pool:
        rows = list(pool.map(_row, names()))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("device", "by", "runs", "state"):
        table.add_column(column, no_wrap=column in {"device", "by"})
    for cells, style in rows:
        table.add_row(*(Text(visible(cell)) for cell in cells), style=style)
    console.print(table)
    return 0


def _row(name: str) -> tuple[tuple[str, ...], str]:
    """Name, transport, targets and state of a device, and their style; a YAML with a mistake hides no other device."""
    try:
        device = load(name)
    except DeviceError as error:
        return (name, "", "", str(error)), "red"
    attached, text = _state(device)
    return (name, device.transport.kind, ", ".join(device.targets), text), "green" if attached else "dim"


def _state(device: Device) -> tuple[bool, str]:
    """Whether it answers, and its ABI or the reason."""
    try:
        transport = open_transport(device, timeout_s=_ANSWER_S)
    except (DeviceError, OSError) as error:  # one device that cannot be asked hides no other
        return False, str(error).removeprefix(f"{device.name}: ")
    try:
        return True, f"attached, {transport.abi()}"
    finally:
        transport.close()


if __name__ == "__main__":
    sys.exit(run(main))
