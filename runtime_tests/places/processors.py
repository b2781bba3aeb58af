"""A processor, from what its system tells: a name that unlike ones do not share, its cores, a session's threads."""

import re
from collections.abc import Iterable, Mapping, Sequence

Told = Mapping[str, Sequence[str]]
"""Key → values, as `facts.SCRIPT` prints them."""
NOT_TOLD = "not told"
_MOST = 2**12
"""Processors; a list of more is nonsense."""
_FAST = 0.5
"""Of the largest capacity that Linux tells of a core: slower ones would hold up the others, which wait for the last."""
_VENDORS = {
    "0x41": "Arm", "0x42": "Broadcom", "0x43": "Cavium", "0x46": "Fujitsu", "0x48": "HiSilicon", "0x4e": "NVIDIA",
    "0x51": "Qualcomm", "0x53": "Samsung", "0x61": "Apple", "0x6d": "Microsoft", "0x70": "Phytium", "0xc0": "Ampere",
}  # fmt: skip
_ARM = {
    "0xd03": "Cortex-A53", "0xd04": "Cortex-A35", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73", "0xd0a": "Cortex-A75", "0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd0d": "Cortex-A77",
    "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78", "0xd42": "Cortex-A78AE", "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510", "0xd47": "Cortex-A710", "0xd48": "Cortex-X2", "0xd49": "Neoverse-N2",
    "0xd4d": "Cortex-A715", "0xd4e": "Cortex-X3", "0xd4f": "Neoverse-V2", "0xd80": "Cortex-A520",
    "0xd81": "Cortex-A720", "0xd82": "Cortex-X4", "0xd84": "Neoverse-V3", "0xd85": "Cortex-X925",
    "0xd87": "Cortex-A725", "0xd8e": "Neoverse-N3",
}  # fmt: skip
"""Parts of Arm's own, from lscpu of util-linux; others are named by their vendor and number."""


def name(told: Told) -> str:
    """Model of the machine and name of its processor, as far as they are told; else `not told`, with its family.

    Linux on Arm has no name of a processor: there the parts that it is made of stand for it, and where no device tree
    has the machine's model, what its firmware calls it (`Amazon EC2 c7g.xlarge`).
    """
    first = {key: entries[0] for key, entries in told.items()}
    parts = [] if "cpu" in first else _parts(told.get("id", ()))
    model = first.get("model") or (first.get("product") if parts else None)
    found = [text for text in (model, first.get("cpu"), " + ".join(parts)) if text]
    return ", ".join(dict.fromkeys(found)) or " ".join([NOT_TOLD, *([first["machine"]] if "machine" in first else [])])


def is_named(cpu: str) -> bool:
    """Whether a name tells one processor from another: emulators and some virtual machines hide theirs."""
    return not re.search(rf"{NOT_TOLD}|(Virtual|QEMU.*) CPU|\b0x000\b", cpu)


def _parts(lines: Iterable[str]) -> list[str]:
    """`CPU implementer 0x41`, `CPU part 0xd85`, … of each processor in turn → names of the different ones."""
    names, vendor = [], ""
    for line in lines:
        what, _, number = line.rpartition(" ")
        if what == "CPU implementer":
            vendor = number
        elif what == "CPU part":
            unnamed = f"{_VENDORS.get(vendor, vendor)} {number}"
            names.append(_ARM.get(number, unnamed) if vendor == "0x41" else unnamed)
    return list(dict.fromkeys(names))


def cores(told: Told) -> int:
    """Physical cores that a process may use, at least one."""
    return _distinct(told, _allowed(told)) or _count(told, "cores")


def threads(told: Told) -> int:
    """What a session takes: one for each physical core, without those made to save energy."""
    if "fast_cores" in told:
        return _count(told, "fast_cores")
    allowed = _allowed(told)
    return _distinct(told, _fast(told, allowed)) or cores(told)


def _fast(told: Told, allowed: set[int]) -> set[int]:
    if "fast" in told:
        return allowed & _listed(told["fast"][0])
    capacity = {cpu: int(text) for cpu, text in _each(told, "capacity") if cpu in allowed and text.isdecimal()}
    return {cpu for cpu, value in capacity.items() if value >= _FAST * max(capacity.values())}


def _distinct(told: Told, cpus: set[int]) -> int:
    """How many physical cores these processors are: those of one core name the same siblings."""
    return len({siblings for cpu, siblings in _each(told, "siblings") if cpu in cpus})


def _allowed(told: Told) -> set[int]:
    every = {cpu for cpu, _ in _each(told, "siblings")}
    return every & _listed(told["affinity"][0]) if "affinity" in told else every


def _each(told: Told, key: str) -> list[tuple[int, str]]:
    """Values of `NUMBER:VALUE` entries by processor."""
    found = [re.fullmatch(r"([0-9]{1,4}):(\S+)", entry, re.ASCII) for entry in told.get(key, ())]
    return [(int(match[1]), match[2]) for match in found if match]


def _listed(text: str) -> set[int]:
    """`0-3,8` as Linux writes a set of processors."""
    numbers = set[int]()
    for part in re.findall(r"[0-9]+(?:-[0-9]+)?", text[:_MOST], re.ASCII):
        begin, _, end = part.partition("-")
        numbers.update(range(int(begin[:4]), min(int((end or begin)[:5]), _MOST) + 1))
    return numbers


def _count(told: Told, key: str) -> int:
    text = next(iter(told.get(key, ())), "")
    return min(max(1, int(text)), _MOST) if re.fullmatch("[0-9]{1,9}", text, re.ASCII) else 1
