"""What a kind of transport provides: an address, read from a device's YAML, that connects to a link.

What differs from desk to desk comes from the environment.
"""

import os
import re
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from . import Completed
from .processes import Deadline

_VARIABLE = re.compile(r"\$\{(\w+)\}")


class Link(Protocol):
    """A way to the shell of one device; everything else is in `device.py`, once for all links."""

    name: str
    """The device's name in error messages."""

    def client(self, script: str) -> list[str]:
        """The command on this host that runs a POSIX shell script on the device, with its streams."""

    def explain(self, ended: Completed, /) -> str:
        """Why a client did not bring a script to its end and what to do, in one line; its outputs give the words."""

    def close(self) -> None:
        """End the connection."""


class Address(BaseModel, ABC):
    """The `transport` key of a device's YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bionic: ClassVar[bool] = False
    """Whether the device has Android's C library, which does not start programs built for GNU's."""

    @property
    def bridged(self) -> bool:
        """Whether the machine that answers is not the device itself but what the device is attached to."""
        return False

    @abstractmethod
    def connect(self, device: str, deadline: Deadline, /) -> Link:
        """The link to the device of that name. Raises DeviceError."""

    def mismatch(self, model: str | None) -> str | None:
        """Why a device of that Android model (None: not Android) is not the one meant; None when it is."""

    def is_set(self) -> bool:
        """Whether the environment has every variable that the YAML refers to."""
        return all(lookup(text) for text in self.model_dump().values() if isinstance(text, str))


def variable(text: str) -> str | None:
    """The name in `${NAME}`; None for any other text."""
    match = _VARIABLE.fullmatch(text)
    return match[1] if match else None


def lookup(text: str) -> str | None:
    """The text itself, or the value of the variable it refers to; None where that variable is not set."""
    name = variable(text)
    return (os.environ.get(name) or None) if name else text
