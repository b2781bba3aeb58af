"""The emulated devices: the file system and the daemon of each, and what its clients on the host need."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devices.transports import DeviceError


class LabError(DeviceError):
    """The lab cannot be built or started here, in one line that says what to do."""


@dataclass(frozen=True)
class Machine:
    """One emulated device. Its processor is qemu's, its kernel the host's, everything else arm64 Debian."""

    packages: tuple[str, ...]
    """Debian packages of its root file system."""
    backports: bool
    """Whether they come from the release's backports first."""
    cpu: str
    """qemu's name of the processor; it decides which kernels a runtime picks."""
    files: dict[str, str]
    """Written into the root: path without the leading slash → text; `#!` makes it executable."""
    links: dict[str, str]
    """Symbolic links in the root: path → target."""
    daemon: tuple[str, ...]
    port: int
    """The daemon's, inside the device's own network."""
    data: str
    """The folder where a memory file system of a chosen size is mounted."""


# Android's userland is toybox and mksh. `[` is in the shell.
_TOYBOX = """
basename cat chmod cmp cp cut date dd df dirname du echo env expr false find getconf grep head id kill ln ls
md5sum mkdir mkfifo mktemp mv nproc printf ps pwd readlink realpath rm rmdir sed seq setsid sha256sum sleep sort
stat sync tail tar tee timeout touch tr true truncate uname uniq uptime wc which xargs yes
"""

_GETPROP = """#!/bin/sh
# Android's property reader, over a text file
while IFS='=' read -r key value; do
  [ "$key" = "$1" ] && echo "$value" && exit
done < /system/build.prop
echo
"""
_BUILD_PROP = """ro.product.cpu.abi=arm64-v8a
ro.product.model=emulated
ro.product.manufacturer=llama-on-device
ro.build.version.release=none
ro.build.version.sdk=none
"""

_SSHD_CONFIG = """Port 22
ListenAddress 127.0.0.1
HostKey /run/lab/host_key
AuthorizedKeysFile /run/lab/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
SetEnv QEMU_CPU=cortex-a76
"""
_USERS = "root:x:0:0:root:/root:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
_GROUPS = "root:x:0:\nnogroup:x:65534:\n"

# By the name of the device's YAML.
MACHINES = {
    "emulated-android": Machine(
        packages=("adbd", "toybox", "mksh", "libstdc++6", "libgomp1"),
        backports=True,
        cpu="neoverse-n1",
        files={
            "system/bin/getprop": _GETPROP,
            "system/build.prop": _BUILD_PROP,
            "etc/passwd": _USERS,
            "etc/group": _GROUPS,
        },
        links={"bin/sh": "mksh", **{f"system/bin/{name}": "/bin/toybox" for name in _TOYBOX.split()}},
        daemon=("/usr/lib/android-sdk/platform-tools/adbd",),
        port=5555,
        data="data/local/tmp",
    ),
    "emulated-pi5": Machine(
        packages=(
            *("dash", "coreutils", "findutils", "grep", "sed", "util-linux", "procps", "openssh-server", "rsync"),
            *("python3", "libstdc++6", "libgomp1"),
        ),
        backports=False,
        cpu="cortex-a76",
        files={"etc/ssh/sshd_config": _SSHD_CONFIG, "etc/passwd": _USERS, "etc/group": _GROUPS},
        links={},
        daemon=("/usr/sbin/sshd", "-D", "-e"),
        port=22,
        data="root",
    ),
}


_SERVER_LIMIT_S = 20


@dataclass(frozen=True)
class _Side:
    secrets: dict[str, str]
    """Files for the device: name → text."""
    companion: list[str]
    """A program that runs beside the device; may be empty."""
    environment: Callable[[int], dict[str, str]]
    """Port where the device answers → the variables that its YAML and its clients read."""


def _adb(scratch: Path) -> _Side:
    """An adb server at a socket in the scratch folder, with its keys there: the user's own are not touched."""
    path = scratch / "adb"
    socket = f"localfilesystem:{path}"
    companion = ["env", f"HOME={scratch}", "adb", "-L", socket, "nodaemon", "server"]

    def environment(port: int) -> dict[str, str]:
        deadline = time.monotonic() + _SERVER_LIMIT_S
        while not path.is_socket():  # without it the first client would start a server of its own
            if time.monotonic() > deadline:
                raise LabError("the adb server did not start")
            time.sleep(0.02)
        return {"ADB_SERVER_SOCKET": socket, "EMULATED_ANDROID_SERIAL": f"127.0.0.1:{port}"}

    return _Side({}, companion, environment)


def _ssh(scratch: Path) -> _Side:
    """New keys for both ends and an ssh configuration that leads to the device."""
    for key in ("host_key", "user_key"):
        generate = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(scratch / key)]
        subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
    public = " ".join((scratch / "host_key.pub").read_text().split()[:2])
    secrets = {
        "host_key": (scratch / "host_key").read_text(),
        "authorized_keys": (scratch / "user_key.pub").read_text(),
    }

    def environment(port: int) -> dict[str, str]:
        (scratch / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
        settings = {
            "HostName": "127.0.0.1",
            "Port": port,
            "User": "root",
            "IdentityFile": scratch / "user_key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": scratch / "known_hosts",
            "GlobalKnownHostsFile": "none",
        }
        lines = ["Host emulated-pi5", *(f"  {key} {value}" for key, value in settings.items())]
        (scratch / "config").write_text("\n".join(lines) + "\n")
        return {"EMULATED_PI5_SSH_CONFIG": str(scratch / "config")}

    return _Side(secrets, [], environment)


SIDES = {"emulated-android": _adb, "emulated-pi5": _ssh}
