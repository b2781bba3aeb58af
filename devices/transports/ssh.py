"""Linux boards and Macs through the `ssh` program and its configuration."""

import os
import secrets
import select
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from . import DeviceError, last_line
from .address import Address, lookup, variable
from .processes import Deadline

# Never a question on the terminal, never an unknown host, and an end when the other side is gone.
_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
}
_CLOSE_S = 2
# Words of ssh's message → what to do. They choose the wording of our message, nothing else.
_ADVICE = {
    "IDENTIFICATION HAS CHANGED": "its host key changed; if you know why, forget the old one: ssh-keygen -R {host}",
    "Host key verification failed": "its host key is not known: connect once by hand and check it: ssh {host}",
    "Permission denied": "it refuses this user's keys: ssh-copy-id {host}",
    "Connection refused": "nothing answers there: is it on, and does sshd run?",
    "Could not resolve": "no machine of that name: check the name",
    "timed out": "it does not answer: is it on, and on this network?",
    "No route to host": "it cannot be reached: is it on, and on this network?",
}


class _Host(Address):
    """A machine with sshd. What is null is as the ssh configuration says."""

    host: str
    port: PositiveInt | None
    user: str | None
    identity: str | None
    """File of the private key."""
    config: str | None
    """ssh configuration file; null: the user's own."""

    def connect(self, device: str, deadline: Deadline, /) -> "_SshLink":
        address = self._resolved(device)
        if shutil.which("ssh") is None:
            raise DeviceError("ssh is not installed: install Debian's package openssh-client")
        link = _SshLink(device, address)
        try:
            link.open(deadline)
        except BaseException:
            link.close()
            raise
        return link

    def options(self) -> list[str]:
        """As ssh's arguments; what is null is left to the ssh configuration."""
        given = {"-F": self.config, "-p": self.port, "-l": self.user, "-i": self.identity}
        chosen = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
        return chosen + [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]

    def _resolved(self, device: str) -> "_Host":
        """Every variable replaced by its value. Raises DeviceError that names the one not set."""
        values = {}
        for field in ("host", "user", "identity", "config"):
            if (text := getattr(self, field)) is not None:
                values[field] = lookup(text)
                if values[field] is None:
                    raise DeviceError(
                        f"{device}: set {variable(text)}; devices/{device}.yaml takes its {field} from there"
                    )
        return self.model_copy(update=values)


class Ssh(_Host):
    """A Linux board."""

    kind: Literal["ssh"]


class Apple(_Host):
    """A Mac, or an iPhone attached to one."""

    kind: Literal["apple"]
    phone: str | None
    """Identifier of the iPhone, as `xcrun devicectl list devices` shows it; null: the Mac itself."""

    @property
    def bridged(self) -> bool:
        return self.phone is not None


class _SshLink:
    """The shell of one machine. Its clients share one connection, which ends when this process does."""

    unsure = frozenset({255})

    def __init__(self, name: str, address: _Host) -> None:
        self.name = name
        self._address = address
        # ssh makes it, for this user only, and removes it when the connection ends. At most 104 characters long.
        self._socket = Path(tempfile.gettempdir()) / f"ssh-{secrets.token_hex(8)}"
        self._master: subprocess.Popen[bytes] | None = None

    def open(self, deadline: Deadline) -> None:
        """Connect. Raises DeviceError."""
        with tempfile.TemporaryFile() as errors:
            # It ends with its stdin, which this process holds: no connection outlives us.
            self._master = subprocess.Popen(
                self._ssh("yes", "echo; exec cat >/dev/null"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            assert self._master.stdout
            ready, _, _ = select.select([self._master.stdout], [], [], deadline.left_s())
            if not ready:
                raise DeviceError(f"{self.name}: {self._address.host} does not answer within {deadline.limit_s:g} s")
            if not os.read(self._master.stdout.fileno(), 1):
                self._master.wait()
                errors.seek(0)
                raise DeviceError(f"{self.name}: {self._address.host}: {self.explain(errors.read())}")

    def client(self, script: str) -> list[str]:
        return self._ssh("no", f"exec sh -c {shlex.quote(script)}")

    def explain(self, stderr: bytes, /) -> str:
        text = stderr.decode(errors="replace")
        for words, advice in _ADVICE.items():
            if words in text:
                return advice.format(host=self._address.host)
        return last_line(text, "the connection ended")

    def close(self) -> None:
        if self._master:
            for stream in (self._master.stdin, self._master.stdout):
                stream.close()  # type: ignore[union-attr]
            try:
                self._master.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:  # the other side is gone and cannot agree
                self._master.kill()
                self._master.wait()
        self._socket.unlink(missing_ok=True)

    def _ssh(self, master: str, command: str) -> list[str]:
        mux = ["-T", "-o", f"ControlMaster={master}", "-o", f"ControlPath={self._socket}", "-o", "ControlPersist=no"]
        return ["ssh", *mux, *self._address.options(), "--", self._address.host, command]
