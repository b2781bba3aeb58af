"""The one implementation of Transport, over any link."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import Completed, DeviceError, lock, transfer
from .processes import MOST_BYTES, Deadline
from .shell import ANSWER_S, Shell

_LOG = logging.getLogger(__name__)


class Attached:
    """One attached device."""

    def __init__(self, shell: Shell, abi: str) -> None:
        self._shell = shell
        self._abi = abi

    def abi(self) -> str:
        return self._abi

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        return self._shell.run(argv, Deadline.after(timeout_s))

    def push(self, local: Path, remote: str, *, timeout_s: float, only: Collection[str] | None = None) -> None:
        files = transfer.listing(local, only)
        for path in files.values():
            if not transfer.runs(path, self._abi):
                raise DeviceError(
                    f"{self._shell.link.name}: {path} is built for {transfer.machine(path)}, the device is "
                    f"{self._abi}; build it for the device"
                )
        transfer.push(self._shell, files, remote, Deadline.after(timeout_s))

    def pull(self, remote: str, local: Path, *, timeout_s: float, most_bytes: int = MOST_BYTES) -> None:
        transfer.pull(self._shell, remote, local, Deadline.after(timeout_s), most_bytes)

    @contextmanager
    def lock(self) -> Iterator[None]:
        release = lock.take(self._ask, self._shell.link.name, self._shell.folder)
        try:
            yield
        finally:
            try:
                self._ask(release)
            except DeviceError as error:  # must not hide the result or the error of the run
                _LOG.warning("%s; its lock stays there until the next run", error)

    def close(self) -> None:
        self._shell.link.close()

    def _ask(self, script: str) -> Completed:
        return self._shell.ask(script, Deadline.after(ANSWER_S), step="locking")
