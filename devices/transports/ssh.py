"""Linux boards and Macs through the `ssh` program and its configuration."""

import os
import secrets
import select
import shutil
import signal
import socket
import string
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from . import Completed, DeviceError, last_line, packages
from .address import Address, lookup, variable
from .processes import Deadline

# Never a question on the terminal, never an unknown host, and an end when the other side is gone. A configuration for
# sitting at the board would run another command than ours, print into our words, hold a port twice, or hide the reason
# of a failure (LogLevel QUIET).
_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "LogLevel": "ERROR",
}
_BOUNDED = ("sh", "-c", 'ulimit -f 2048; exec "$@"', "sh")
"""Of what the other side says as long as the connection lives, a file of ours takes 1 MiB."""
_CLOSE_S = 2
_SSH_FAILED = 255
"""Exit status of ssh's own errors."""
_SUFFIX = 16
"""ssh makes its socket under a name that is so much and a dot longer, then renames it."""
_PLAIN = frozenset(string.ascii_letters + string.digits + string.punctuation + " ") - frozenset("'\"\\!$`")
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
    """Name or address, or `${VARIABLE}` of the environment."""
    port: PositiveInt | None
    """null: what ssh takes."""
    user: str | None
    """The name to log in with; null: what ssh takes."""
    identity: str | None
    """File of the private key."""
    config: str | None
    """ssh configuration file; null: the user's own."""

    def connect(self, device: str, deadline: Deadline, /) -> "_SshLink":
        address = self._resolved(device)
        if shutil.which("ssh") is None:
            raise DeviceError(f"ssh is not installed: {packages.hint('ssh')}")
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
    """Over ssh, to Linux."""


class Apple(_Host):
    """A Mac, or an iPhone attached to one."""

    kind: Literal["apple"]
    """Over ssh, to a Mac."""
    phone: str | None
    """Identifier of the iPhone, as `xcrun devicectl list devices` shows it; null: the Mac itself."""

    @property
    def bridged(self) -> bool:
        return self.phone is not None


class _SshLink:
    """The shell of one machine. Its clients share one connection, which ends when this process does."""

    def __init__(self, name: str, address: _Host) -> None:
        self.name = name
        self._address = address
        # ssh makes it, for this user only, and removes it when the connection ends.
        self._socket = _place_of_socket()
        self._master: subprocess.Popen[bytes] | None = None

    def open(self, deadline: Deadline) -> None:
        """Connect. Raises DeviceError."""
        with tempfile.TemporaryFile() as errors:
            # It ends with its stdin, which this process holds: no connection outlives us.
            self._master = subprocess.Popen(
                [*_BOUNDED, *self._ssh("yes", "echo; exec cat >/dev/null")],
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
                status = self._master.wait()
                errors.seek(0)
                ended = Completed(status, b"", errors.read())
                raise DeviceError(f"{self.name}: {self._address.host}: {self.explain(ended)}")

    def client(self, script: str) -> list[str]:
        return self._ssh("no", one_line(script))

    def explain(self, ended: Completed, /) -> str:
        if ended.returncode == -signal.SIGXFSZ:
            return "its shell said more than 1 MiB and was ended; check what its login prints"
        text = ended.stderr.decode(errors="replace")
        if ended.returncode == _SSH_FAILED:
            for words, advice in _ADVICE.items():
                if words in text:
                    return advice.format(host=self._address.host)
            return last_line(text, "the connection ended")
        words = last_line(text, "") or last_line(ended.stdout.decode(errors="replace"), "")
        return (
            f"its login shell ended with {ended.returncode}{f' ({words})' if words else ''} before our script did: "
            f"this must work: ssh {self._address.host} sh -c true"
        )

    def close(self) -> None:
        if self._master:
            for stream in (self._master.stdin, self._master.stdout):
                stream.close()  # type: ignore[union-attr]
            try:
                self._master.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:  # the other side is gone and cannot agree
                self._master.kill()
                self._master.wait()
        if self._socket:
            self._socket.unlink(missing_ok=True)

    def _ssh(self, master: str, command: str) -> list[str]:
        # ssh reads quotes and replaces %h and the like
        path = '"{}"'.format(str(self._socket).replace("%", "%%")) if self._socket else "none"
        mux = ["-T", "-o", f"ControlMaster={master}", "-o", f"ControlPath={path}", "-o", "ControlPersist=no"]
        return ["ssh", *mux, *self._address.options(), "--", self._address.host, command]


def _place_of_socket() -> Path | None:
    """Where clients of one connection can meet; None: nowhere, and each makes a connection of its own.

    A path may be too long for a socket, or lie where none can be made; quotes and the like would need ssh's own rules.
    """
    for folder in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 – the name is secret
        path = Path(folder) / f"ssh-{secrets.token_hex(8)}"
        trial = Path(f"{path}.{'x' * _SUFFIX}")
        with suppress(OSError), socket.socket(socket.AF_UNIX) as end:
            end.bind(str(trial))
            trial.unlink()
            if not set(folder) & set("\"'\\$\n"):
                return path
    return None


def one_line(script: str) -> str:
    """A command that runs a POSIX shell script from any login shell.

    csh, fish and POSIX shells agree on what is one word in single quotes only without newlines, quotes, `!` and the
    like: these go as octal numbers.
    """
    text = "".join(chr(byte) if chr(byte) in _PLAIN else f"\\0{byte:03o}" for byte in os.fsencode(script))
    return f'exec sh -c \'eval "$(printf %b "{text}")"\''
