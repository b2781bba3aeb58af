"""The machine that runs the command."""

from typing import Literal

from . import last_line
from .address import Address
from .processes import Deadline


class Local(Address):
    """The machine that runs the command."""

    kind: Literal["local"]

    def connect(self, device: str, _deadline: Deadline, /) -> "_LocalLink":
        return _LocalLink(device)


class _LocalLink:
    unsure: frozenset[int] = frozenset()

    def __init__(self, name: str) -> None:
        self.name = name

    def client(self, script: str) -> list[str]:
        return ["sh", "-c", script]

    def explain(self, stderr: bytes, /) -> str:
        return last_line(stderr.decode(errors="replace"))

    def close(self) -> None:
        pass
