"""The machine that runs the command."""

from typing import Literal

from . import Completed
from .address import Address
from .processes import Deadline


class Local(Address):
    """The machine that runs the command."""

    kind: Literal["local"]
    """No way at all: it runs here."""

    def connect(self, device: str, _deadline: Deadline, /) -> "_LocalLink":
        return _LocalLink(device)


class _LocalLink:
    def __init__(self, name: str) -> None:
        self.name = name

    def client(self, script: str) -> list[str]:
        return ["sh", "-c", script]

    def explain(self, ended: Completed, /) -> str:
        return ended.reason

    def close(self) -> None:
        pass
