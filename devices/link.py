"""What a way to a device must provide; everything else is `attached.py`, once for all of them."""

from typing import Protocol


class Link(Protocol):
    """A way to the shell of one device."""

    name: str
    """The device as errors call it."""
    unsure: frozenset[int]
    """Exit statuses of the client program that may be its own rather than the script's."""

    def client(self, script: str) -> list[str]:
        """The command on this host that runs a POSIX shell script there; stdin, stdout, stderr, exit status are its."""

    def explain(self, stderr: bytes, /) -> str:
        """Why the client failed and what to do, in one line; `stderr` may choose the words."""

    def close(self) -> None:
        """End the connection."""
