"""Why a runner does not begin on a device: the device's own words, and what to do about them."""

import re

from devices import last_line

_NO_EXEC = "its file system may allow no programs (noexec): set workdir in devices/*.yaml to one that does"
_REMEDIES = {
    r"GLIBC(XX)?_[\d.]+": "its C library is older than the runner needs: install a newer system there",
    r"wrong ELF class|[Ee]xec format error|cannot execute binary": (
        "its programs are not of the kind that it reports (32-bit?): install its 64-bit system"
    ),
    r"Error (loading shared library|relocating)|ld-musl|ld-linux.*[Nn]o such file": (
        "its C library is not GNU's (musl?), for which the runner is built: use a system with glibc"
    ),
    r"failed to map segment|Operation not permitted": _NO_EXEC,
    r"cannot open shared object file|Library not loaded": "install that library there",
    r"SyntaxError": "its Python is too old: install Python 3.11 or later there",
    r"No module named": "its Python lacks a part: install the whole of Python there",
    r"No space left on device": "free some space on the device",
    r"[Ii]llegal instruction": "its processor is older than the runner needs",
}
_BY_STATUS = {
    126: _NO_EXEC,
    127: "it is not there, or the loader that it names is not (another C library, 32-bit programs): install it",
}


def of(stderr: str, returncode: int) -> str:
    """The line of a program's stderr that says why it ended without an answer, and what to do where that is known."""
    lines = stderr.splitlines()
    for pattern, remedy in _REMEDIES.items():
        for line in lines:
            if re.search(pattern, line):
                return f"{last_line(line)}; {remedy}"
    known = _BY_STATUS.get(returncode)
    return last_line(stderr) + (f"; {known}" if known else "")
