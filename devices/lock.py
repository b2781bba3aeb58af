"""One run at a time on a device: a folder there, made atomically, that names its holder. Knows no connection."""

import json
import logging
import os
import shlex
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from .transport import DeviceBusyError

LOG = logging.getLogger(__name__)
FOLDER = ".lock"
OWNER = f"{FOLDER}/owner"
Ask = Callable[[str], bytes | None]
"""Runs a script in the device's working folder: its output, or None when it ended with a failure."""


@dataclass(frozen=True)
class Owner:
    """A process, so described that another one can see whether it still lives."""

    host: str
    boot: str
    """Changes with every start of the host."""
    pid: int
    started: float
    """When the process began, seconds since 1970: a process id is used again."""
    since: str

    @classmethod
    def this_process(cls) -> "Owner":
        """Who asks now."""
        started = psutil.Process().create_time()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), boot_id(), os.getpid(), started, since)

    @classmethod
    def parse(cls, text: str) -> "Owner | None":
        """What an owner file says; None when it says nothing readable."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def is_dead(self) -> bool:
        """Whether it was a process of this host that no longer runs. Of another host's we know nothing."""
        if self.host != socket.gethostname():
            return False
        if self.boot != boot_id():
            return True
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True


def boot_id() -> str:
    """Names the time since this host started; the second it began where the system has no better name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


def take(ask: Ask, device: str, folder: str) -> str:
    """Take the lock and return what frees it. Raises DeviceBusyError that names the holder and the way out."""
    mine = json.dumps(asdict(Owner.this_process()))
    script = f"mkdir {FOLDER} && printf %s {shlex.quote(mine)} >{OWNER}"
    if ask(script) is None:
        text = (ask(f"cat {OWNER}") or b"").decode(errors="replace")
        owner = Owner.parse(text)
        if owner is None or not owner.is_dead():
            raise DeviceBusyError(busy(owner, device, folder))
        LOG.warning("%s: the run that held it (process %s, since %s) is dead; its lock is broken", device, *who(owner))
        # Moved away only while it is still that dead run's: somebody else may be breaking it too.
        aside = f"{FOLDER}.{os.getpid()}"
        ask(f'[ "$(cat {OWNER})" = {shlex.quote(text)} ] && mv {FOLDER} {aside} && rm -r {aside}')
        if ask(script) is None:
            raise DeviceBusyError(busy(None, device, folder))
    return f'[ "$(cat {OWNER})" = {shlex.quote(mine)} ] && rm -r {FOLDER}'


def who(owner: Owner) -> tuple[int, str]:
    """For messages."""
    return owner.pid, owner.since


def busy(owner: Owner | None, device: str, folder: str) -> str:
    """One line: who holds it and what to do."""
    by = f"process {owner.pid} on {owner.host} since {owner.since}" if owner else "another run"
    return f"{device}: in use by {by}; wait for it, or if it is gone remove {folder}/{FOLDER} on the device"
