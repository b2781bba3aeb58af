"""How commands and files reach a device.

A kind of transport is one module with an `Address` and a `Link` (`address.py`) and its name in `connection.py`.
"""

import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST = 300
"""Characters of another program's words in a message of ours."""


class DeviceError(Exception):
    """A device that is unknown, described wrongly, absent or not usable, in one line that says what to do."""


class DeviceLostError(DeviceError):
    """The connection ended or the device stopped answering in the middle of something."""


class DeviceBusyError(DeviceError):
    """Another run holds the device's lock."""


class NoSpaceError(DeviceError):
    """Too little room on the device."""


class TransferError(DeviceError):
    """A file did not arrive as it was sent."""


class FloodError(DeviceError):
    """A program wrote without an end."""


class DeadlineError(DeviceError):
    """A command did not end in time; what it left running was ended."""


@dataclass(frozen=True)
class Completed:
    """A command that ended. The exit status alone says whether it went well; 128 + n is death by signal n."""

    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def reason(self) -> str:
        """The last line of its stderr."""
        return last_line(self.stderr.decode(errors="replace"))


def last_line(text: str, otherwise: str = "no reason given") -> str:
    """Where programs say why they failed, without colours and as a terminal may show it."""
    words = _COLOURS.sub(" ", (text.strip().splitlines() or [otherwise])[-1])
    return visible(words.strip())[:_LONGEST] or otherwise


def visible(text: str) -> str:
    """A device's words in one line: what Python does not call printable, colours and line ends too, is an escape.

    `export.host.text` has the finer rule for text of models; the two packages import nothing of each other.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class Transport(Protocol):
    """One attached device. Every call has a deadline; paths on the device are relative to its working folder."""

    def abi(self) -> str:
        """What programs it runs, as the device names it: x86_64, aarch64, arm64-v8a, arm64 or another."""

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a program in the working folder; stdin is empty.

        Nothing of it goes on after the call, nor after the death of this process. Raises DeadlineError,
        DeviceLostError, FloodError.
        """

    def push(self, local: Path, remote: str, *, timeout_s: float, only: Collection[str] | None = None) -> None:
        """Copy a file or a folder whole or not at all: to NAME.part, sha256 checked on the device, then renamed.

        `only`: names of the folder's files; None: all of them. What is already there with the same sha256 is left.
        Raises NoSpaceError before copying, TransferError, and DeviceError for a program built for another processor.
        """

    def pull(self, remote: str, local: Path, *, timeout_s: float, most_bytes: int = 2**26) -> None:
        """Copy a file of up to so many bytes from the device, sha256 checked, written whole or not at all."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold the device alone. Raises DeviceBusyError that names the holder."""

    def close(self) -> None:
        """End what this transport started."""
