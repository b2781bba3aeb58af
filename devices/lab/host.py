"""The process that holds one emulated device: `python -m devices.lab.host SPEC`, ended by the end of its stdin.

It forks into namespaces of its own, where the device's init mounts the root, starts the daemon and relays a port of
the host to it. Prints one JSON line when the daemon answers. Nothing it mounts or registers exists outside.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from . import namespaces
from .machines import MACHINES, Machine

_FAILED = 70
_ANSWER_S = 60
_BINFMT = (
    r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:{qemu}:F"
)
_DEVICE_FILES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True)
class Spec:
    """What to start."""

    name: str
    root: str
    qemu: str
    data_mb: int
    scratch: str
    """A folder of this device's own, removed with it even when the process that started it could not."""
    secrets: dict[str, str]
    """Name → text of the files in /run/lab."""
    companion: list[str]
    """A program on the host that serves this device and ends with it; may be empty."""

    @property
    def machine(self) -> Machine:
        return MACHINES[self.name]

    def dump(self) -> str:
        """As a command-line argument."""
        return json.dumps(asdict(self))


def main(spec: Spec) -> int:
    """Start the device, say where, wait for the end of stdin."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        holder = _fork(lambda: _hold(spec, listener, theirs))
        theirs.close()
        companion = _fork(lambda: _replace_by(spec.companion)) if spec.companion else None
        init = b""
        try:
            ours.recv(1)
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{holder}/{kind}").write_text("0 0 65536")
            ours.send(b"mapped")
            init = ours.recv(16)
            if not (init and ours.recv(1)):
                return _FAILED
            print(json.dumps({"port": listener.getsockname()[1], "init": int(init)}), flush=True)
            sys.stdin.buffer.read()
            # Before the adb server ends: a client that misses it starts another, which must find no place to listen.
            shutil.rmtree(spec.scratch)
        finally:
            # All processes of the device end with process 1, and so does the holder, which waits for it.
            os.kill(int(init) if init else holder, signal.SIGKILL)
            os.waitpid(holder, 0)
            if companion:
                os.kill(companion, signal.SIGKILL)
                os.waitpid(companion, 0)
    return 0


def _fork(job: Callable[[], None]) -> int:
    """Run `job` in a child that is killed when this process ends; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        namespaces.die_with_parent()
        job()
    except BaseException as error:  # a forked child must never return into the parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(_FAILED)
    os._exit(0)


def _replace_by(command: list[str]) -> NoReturn:
    os.execvp(command[0], command)  # noqa: S606 - a list, no shell


def _hold(spec: Spec, listener: socket.socket, host: socket.socket) -> None:
    """Leave the host's namespaces; the next child is process 1 of the new ones."""
    namespaces.unshare(namespaces.CLONE_NEWUSER)
    host.send(b"x")
    host.recv(16)
    os.setgroups([])
    os.setgid(0)
    os.setuid(0)
    namespaces.die_with_parent()  # again: the kernel forgets it when the user changes
    namespaces.unshare(namespaces.ALL_BUT_USER)
    init = _fork(lambda: _boot(spec, listener, host))
    host.send(str(init).encode())
    host.close()
    os.waitpid(init, 0)


def _boot(spec: Spec, listener: socket.socket, host: socket.socket) -> NoReturn:
    """Process 1 of the device."""
    root = Path(spec.root)
    _mount_all(root, spec)
    namespaces.switch_loopback(up=True)
    signal.signal(signal.SIGUSR1, lambda *_: namespaces.switch_loopback(up=False))
    signal.signal(signal.SIGUSR2, lambda *_: namespaces.switch_loopback(up=True))
    daemon = _start_daemon(spec)
    threading.Thread(target=_relay, args=(listener, spec.machine.port), daemon=True).start()
    host.send(b"x")
    while True:  # process 1 inherits every orphan, and restarts a daemon that died
        pid, _ = os.wait()
        if pid == daemon.pid:
            daemon = _start_daemon(spec)


def _start_daemon(spec: Spec) -> subprocess.Popen[bytes]:
    """Start the daemon inside the root and wait until it answers."""
    environment = {"PATH": "/system/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "QEMU_CPU": spec.machine.cpu}
    # Its output goes to the log that the lab made of the holder's stderr.
    command = [shutil.which("chroot") or "/usr/sbin/chroot", spec.root, *spec.machine.daemon]
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
    _await_answer(spec.machine.port, daemon)
    return daemon


def _mount_all(root: Path, spec: Spec) -> None:
    """The device's file systems: the cached root read-only, the rest in memory; arm64 programs run through qemu."""
    namespaces.mount("", Path("/"), flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
    namespaces.bind(root, root)
    namespaces.protect(root)
    memory = {"dev": 1, "run": 4, "tmp": 64, spec.machine.data: spec.data_mb}
    for folder, size_mb in memory.items():
        namespaces.mount("tmpfs", root / folder, "tmpfs", options=f"size={size_mb}m,mode=755")
    for name in _DEVICE_FILES:
        (root / "dev" / name).touch()
        namespaces.bind(Path("/dev") / name, root / "dev" / name)
    for name in ("pts", "shm"):
        (root / "dev" / name).mkdir()
    namespaces.mount("devpts", root / "dev/pts", "devpts", options="newinstance,ptmxmode=0666")
    namespaces.mount("tmpfs", root / "dev/shm", "tmpfs", options="size=64m")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    namespaces.mount("proc", root / "proc", "proc")
    namespaces.bind(Path("/sys"), root / "sys")
    for name, text in spec.secrets.items():
        (root / "run/lab").mkdir(exist_ok=True)
        (root / "run/lab" / name).write_text(text)
        (root / "run/lab" / name).chmod(0o600)
    (root / "run/sshd").mkdir(mode=0o755)
    # Since Linux 6.7 a user namespace has a binfmt_misc of its own: the host's is neither read nor changed. The flag F
    # opens qemu at once, so that the root needs no copy of it.
    formats = root / "proc/sys/fs/binfmt_misc"
    namespaces.mount("binfmt_misc", formats, "binfmt_misc")
    (formats / "register").write_text(_BINFMT.format(qemu=spec.qemu))


def _await_answer(port: int, daemon: subprocess.Popen[bytes]) -> None:
    """Wait until the daemon accepts connections."""
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline and daemon.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"{daemon.args!r} does not listen on {port}, exit {daemon.poll()}")


def _relay(listener: socket.socket, port: int) -> None:
    """Forward every connection to that port of this network namespace.

    A socket belongs to the network namespace it was made in: a listener made outside is served from inside.
    """
    while True:
        outer, _ = listener.accept()
        threading.Thread(target=_forward, args=(outer, port), daemon=True).start()


def _forward(outer: socket.socket, port: int) -> None:
    """Copy both ways until both sides have ended; where the inner one cannot be reached, end the outer one."""
    with outer:
        try:
            inner = socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:  # no listener, or the link is down: the client sees its connection end
            return
        inner.settimeout(None)
        with inner:
            back = threading.Thread(target=_copy, args=(inner, outer), daemon=True)
            back.start()
            _copy(outer, inner)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until the end, and pass on the end."""
    with contextlib.suppress(OSError):  # reset by either side: the same as an end
        while data := source.recv(2**16):
            target.sendall(data)
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)


if __name__ == "__main__":
    sys.exit(main(Spec(**json.loads(sys.argv[1]))))
