"""Which processor a program was built for, read from its file. Knows nothing of devices."""

from pathlib import Path

MAGIC = b"\x7fELF"
MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
FAMILIES = {
    "arm64": "aarch64",
    "arm64-v8a": "aarch64",
    "armeabi-v7a": "arm",
    "armv7l": "arm",
    "amd64": "x86_64",
    "i686": "x86",
}
"""An ABI as a system names it → as ELF files are named here; others are named alike."""


def machine(path: Path) -> str | None:
    """The processor family of a program or library; None for any other file."""
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or header[:4] != MAGIC:
        return None
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return MACHINES.get(number, f"ELF machine {number}")


def runs(path: Path, abi: str) -> bool:
    """Whether a device of this ABI can load the file; anything but a program can be put there."""
    found = machine(path)
    return found is None or found == FAMILIES.get(abi, abi)
