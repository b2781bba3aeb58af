"""The process that holds one emulated device: `python -m devices.lab.host SPEC`, ended by the end of its stdin.

It forks into namespaces of its own, where the device's init mounts the root, starts the daemon and relays a port of
the host to it. Prints one JSON line when the daemon answers. Nothing it mounts or registers exists outside.
"""

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

from . import namespaces, relay

FAILED = 70
ANSWER_S = 60
BINFMT = (
    r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:{qemu}:F"
)
DEVICE_FILES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True)
class Spec:
    """What to start."""

    root: str
    qemu: str
    daemon: list[str]
    port: int
    cpu: str
    data: str
    data_mb: int
    secrets: dict[str, str]
    """Name → text of the files in /run/lab."""
    scratch: str
    """A folder of this device's own, removed with it even when whoever started it could not."""
    companion: list[str]
    """A program on the host that serves this device and ends with it; may be empty."""

    def dump(self) -> str:
        """As a command-line argument."""
        return json.dumps(asdict(self))


def main(spec: Spec) -> int:
    """Start the device, say where, wait for the end of stdin."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        holder = fork(lambda: hold(spec, listener, theirs))
        theirs.close()
        companion = fork(lambda: replace_by(spec.companion)) if spec.companion else None
        init = b""
        try:
            ours.recv(1)
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{holder}/{kind}").write_text("0 0 65536")
            ours.send(b"mapped")
            init = ours.recv(16)
            if not (init and ours.recv(1)):
                return FAILED
            print(json.dumps({"port": listener.getsockname()[1], "init": int(init)}), flush=True)
            sys.stdin.buffer.read()
        finally:
            # With process 1 everything on the device ends, and the holder, which waits for it.
            os.kill(int(init) if init else holder, signal.SIGKILL)
            os.waitpid(holder, 0)
            if companion:
                os.kill(companion, signal.SIGKILL)
                os.waitpid(companion, 0)
        shutil.rmtree(spec.scratch)
    return 0


def fork(job: Callable[[], None]) -> int:
    """Run `job` in a child that dies with this process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        namespaces.die_with_parent()
        job()
    except BaseException as error:  # a forked child must never return into the parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(FAILED)
    os._exit(0)


def replace_by(command: list[str]) -> NoReturn:
    """Become another program."""
    os.execvp(command[0], command)  # noqa: S606 - a list, no shell


def hold(spec: Spec, listener: socket.socket, host: socket.socket) -> None:
    """Leave the host's namespaces; the next child is process 1 of the new ones."""
    namespaces.unshare(namespaces.CLONE_NEWUSER)
    host.send(b"x")
    host.recv(16)
    os.setgroups([])
    os.setgid(0)
    os.setuid(0)
    namespaces.die_with_parent()  # forgotten by the kernel when the user changes
    namespaces.unshare(namespaces.ALL_BUT_USER)
    init = fork(lambda: boot(spec, listener, host))
    host.send(str(init).encode())
    host.close()
    os.waitpid(init, 0)


def boot(spec: Spec, listener: socket.socket, host: socket.socket) -> NoReturn:
    """Process 1 of the device."""
    root = Path(spec.root)
    mount_all(root, spec)
    namespaces.switch_loopback(up=True)
    signal.signal(signal.SIGUSR1, lambda *_: namespaces.switch_loopback(up=False))
    signal.signal(signal.SIGUSR2, lambda *_: namespaces.switch_loopback(up=True))
    daemon = start_daemon(spec)
    threading.Thread(target=relay.serve, args=(listener, spec.port), daemon=True).start()
    host.send(b"x")
    while True:  # process 1 inherits every orphan, and starts a daemon that died again
        pid, _ = os.wait()
        if pid == daemon.pid:
            daemon = start_daemon(spec)


def start_daemon(spec: Spec) -> subprocess.Popen[bytes]:
    """Run the daemon inside the root until it answers."""
    environment = {"PATH": "/system/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "QEMU_CPU": spec.cpu}
    # Its output goes to the holder's stderr, a file of the lab's.
    command = [shutil.which("chroot") or "/usr/sbin/chroot", spec.root, *spec.daemon]
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment)
    await_answer(spec.port, daemon)
    return daemon


def mount_all(root: Path, spec: Spec) -> None:
    """The device's file systems: the cached root read-only, the rest in memory; arm64 programs run through qemu."""
    namespaces.mount("", Path("/"), flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
    namespaces.bind(root, root)
    namespaces.protect(root)
    memory = {"dev": 1, "run": 4, "tmp": 64, spec.data: spec.data_mb}
    for folder, size_mb in memory.items():
        namespaces.mount("tmpfs", root / folder, "tmpfs", options=f"size={size_mb}m,mode=755")
    for name in DEVICE_FILES:
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
    # opens qemu now, so that the root needs no copy.
    formats = root / "proc/sys/fs/binfmt_misc"
    namespaces.mount("binfmt_misc", formats, "binfmt_misc")
    (formats / "register").write_text(BINFMT.format(qemu=spec.qemu))


def await_answer(port: int, daemon: subprocess.Popen[bytes]) -> None:
    """Wait until the daemon accepts connections."""
    deadline = time.monotonic() + ANSWER_S
    while time.monotonic() < deadline and daemon.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"{daemon.args!r} does not listen on {port}, exit {daemon.poll()}")


if __name__ == "__main__":
    sys.exit(main(Spec(**json.loads(sys.argv[1]))))
