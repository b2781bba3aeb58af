"""How a device's YAML says where the device is; what differs from desk to desk comes from the environment."""

import os
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from .transport import DeviceError

VARIABLE = re.compile(r"\$\{(\w+)\}")


class Local(BaseModel):
    """The machine that runs the command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local"]


class Adb(BaseModel):
    """An Android device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["adb"]
    serial: str
    """As `adb devices` lists it; an unset variable means the only device attached."""
    model: str | None
    """Regular expression of its `ro.product.model`, so that another phone is not taken for it; null: any."""


class Host(BaseModel):
    """A machine with sshd. What is null is as the ssh configuration says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    port: PositiveInt | None
    user: str | None
    identity: str | None
    """File of the private key."""
    config: str | None
    """ssh configuration file; null: the user's own."""


class Ssh(Host):
    """A Linux board."""

    kind: Literal["ssh"]


class Apple(Host):
    """A Mac, or an iPhone attached to one."""

    kind: Literal["apple"]
    phone: str | None
    """Identifier of the iPhone, as `xcrun devicectl list devices` shows it; null: the Mac itself."""


Address = Annotated[Local | Adb | Ssh | Apple, Field(discriminator="kind")]


def variable(text: str) -> str | None:
    """The variable a value is taken from, if it is."""
    found = VARIABLE.fullmatch(text)
    return found[1] if found else None


def lookup(text: str) -> str | None:
    """The value, taken from the environment if it says so; None where that variable is not set."""
    name = variable(text)
    return (os.environ.get(name) or None) if name else text


def resolved(where: Host, device: str) -> Host:
    """Every variable filled in. Raises DeviceError that names the one not set."""
    values = {}
    for field in ("host", "user", "identity", "config"):
        if (text := getattr(where, field)) is not None:
            values[field] = lookup(text)
            if values[field] is None:
                raise DeviceError(f"{device}: set {variable(text)}; devices/{device}.yaml takes its {field} from there")
    return where.model_copy(update=values)
