"""What a script of ours prints, told from what else a device's shells print: greetings, banners, words at the end.

The script says a mark before its first word and again, with its exit status, after its last: on both outputs. Only what
lies in between is its own, and only a status that arrived so is one; a client program's exit status decides nothing.
"""

import re
import secrets

from . import Completed

_HALF = 16
# Printed from two halves, so that a shell that shows the script itself does not show the mark.
_SAY = """say() {{ printf '%s%s%s\\n' {first} {second} "$1"; printf '%s%s%s\\n' {first} {second} "$1" >&2; }}
say ''
"""


def new() -> str:
    """A mark that nothing else prints."""
    return secrets.token_hex(_HALF)


def opened(script: str, mark: str) -> str:
    """A script that says the first mark; `script` itself says the last one: `say STATUS`."""
    return f"{_SAY.format(first=mark[:_HALF], second=mark[_HALF:])}{script}"


def enclosed(script: str, mark: str) -> str:
    """A script between both marks, in a shell of its own, which it may leave by `exit`."""
    return opened(f"(\n{script}\n)\nsay $?", mark)


def answer(ended: Completed, mark: str) -> Completed | None:
    """The script's own status and outputs; None where it did not come to its end."""
    out, status = _between(ended.stdout, mark.encode())
    return None if status is None else Completed(status, out, _between(ended.stderr, mark.encode())[0])


def erased(ended: Completed, mark: str) -> Completed:
    """The outputs of a client whose script did not come to its end, for messages."""
    out, err = (data.replace(mark.encode(), b"") for data in (ended.stdout, ended.stderr))
    return Completed(ended.returncode, out, err)


def through_terminal(ended: Completed, mark: str) -> bool:
    """Whether a terminal on the way changed the ends of lines, and so would change bytes of files."""
    return f"{mark}\r\n".encode() in ended.stdout


def _between(data: bytes, mark: bytes) -> tuple[bytes, int | None]:
    begin, end = data.find(mark + b"\n"), data.rfind(mark)
    status = re.match(rb"(\d+)\n", data[end + len(mark) : end + len(mark) + 8])
    if begin < 0 or not status:
        return b"", None
    return data[begin + len(mark) + 1 : end], int(status[1])
