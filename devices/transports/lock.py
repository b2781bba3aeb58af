"""One run at a time on a device: a folder there, made atomically, that names its holder."""

import logging
import os
import shlex
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

import psutil
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from . import Completed, DeviceBusyError, DeviceError, identity, visible

_LOG = logging.getLogger(__name__)
_FOLDER = ".lock"
_OWNER = f"{_FOLDER}/owner"
_LONGEST = 2000
"""Characters of an owner file of ours, at most."""
HELD = 3
"""Exit status: another run has the folder."""
_Ask = Callable[[str], Completed]
"""Runs a script in the device's working folder."""


class Owner(BaseModel):
    """A process, described well enough for another one to tell whether it is alive."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    host: str
    """For people."""
    machine: str
    boot: str
    """Changes with every start of the host."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: FiniteFloat
    """When the process began, seconds since 1970: a process id is used again."""
    since: str

    @classmethod
    def this_process(cls) -> "Owner":
        """The caller."""
        started = psutil.Process().create_time()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(
            host=socket.gethostname(),
            machine=identity.machine(),
            boot=identity.boot(),
            pid=os.getpid(),
            started=started,
            since=since,
        )

    @classmethod
    def parse(cls, text: str) -> "Owner | None":
        """The content of an owner file; None when it is not readable as such, with the types that we write."""
        try:
            owner = cls.model_validate_json(text) if len(text) <= _LONGEST else None
        except ValidationError:
            return None
        plain = owner is not None and f"{owner.host}{owner.machine}{owner.boot}{owner.since}".isprintable()
        return owner if plain else None

    def is_dead(self) -> bool:
        """Whether it was a process of this machine that no longer runs; False for others, which cannot be asked."""
        if self.machine != identity.machine():
            return False
        if self.boot != identity.boot():
            return True
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True


def take(ask: _Ask, device: str, folder: str) -> str:
    """Take the lock and return what frees it. Raises DeviceBusyError that names the holder and the way out.

    Raises DeviceError where the folder cannot be written.
    """
    mine = Owner.this_process().model_dump_json()
    script = (
        f"mkdir {_FOLDER} || {{ [ -d {_FOLDER} ] && exit {HELD}; exit 1; }}\n"
        f"printf %s {shlex.quote(mine)} >{_OWNER} || {{ rm -r {_FOLDER}; exit 1; }}"
    )

    def taken() -> bool:
        ended = ask(script)
        if ended.returncode not in {0, HELD}:
            raise DeviceError(f"{device}: nothing can be written in {folder}: {ended.reason}; make it writable")
        return ended.returncode == 0

    if not taken():
        text = ask(f"cat {_OWNER}").stdout.decode(errors="replace")
        owner = Owner.parse(text)
        if owner is None or not owner.is_dead():
            raise DeviceBusyError(_busy(owner, device, folder))
        holder = f"process {owner.pid}, since {visible(owner.since)}"
        _LOG.warning("%s: the run that held it (%s) is dead; its lock is broken", device, holder)
        # Moved away only while it is still that dead run's: another run may be breaking it at the same time.
        aside = f"{_FOLDER}.{os.getpid()}"
        ask(f'[ "$(cat {_OWNER})" = {shlex.quote(text)} ] && mv {_FOLDER} {aside} && rm -r {aside}')
        if not taken():
            raise DeviceBusyError(_busy(None, device, folder))
    return f'[ "$(cat {_OWNER})" = {shlex.quote(mine)} ] && rm -r {_FOLDER}'


def _busy(owner: Owner | None, device: str, folder: str) -> str:
    by = visible(f"process {owner.pid} on {owner.host} since {owner.since}") if owner else "another run"
    return f"{device}: in use by {by}; wait for it, or if it is gone remove {folder}/{_FOLDER} on the device"
