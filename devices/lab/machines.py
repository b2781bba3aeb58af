"""The emulated devices: what is in each one's file system and which daemon answers. Knows nothing of namespaces."""

from dataclasses import dataclass


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
    """Where the daemon listens, inside the device's own network."""
    data: str
    """The folder that a memory file system of a chosen size is mounted on."""


# What Android's userland is: toybox and mksh. `[` is in the shell.
TOYBOX = """
basename cat chmod cmp cp cut date dd df dirname du echo env expr false find getconf grep head id kill ln ls
md5sum mkdir mkfifo mktemp mv nproc printf ps pwd readlink realpath rm rmdir sed seq setsid sha256sum sleep sort
stat sync tail tee timeout touch tr true truncate uname uniq uptime wc which xargs yes
"""

GETPROP = """#!/bin/sh
# Android's property reader, over a text file
while IFS='=' read -r key value; do
  [ "$key" = "$1" ] && echo "$value" && exit
done < /system/build.prop
echo
"""
BUILD_PROP = """ro.product.cpu.abi=arm64-v8a
ro.product.model=emulated
ro.product.manufacturer=llama-on-device
ro.build.version.release=none
ro.build.version.sdk=none
"""

SSHD_CONFIG = """Port 22
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
USERS = "root:x:0:0:root:/root:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
GROUPS = "root:x:0:\nnogroup:x:65534:\n"

# By the name of the device's YAML.
MACHINES = {
    "emulated-android": Machine(
        packages=("adbd", "toybox", "mksh", "libstdc++6", "libgomp1"),
        backports=True,
        cpu="neoverse-n1",
        files={
            "system/bin/getprop": GETPROP,
            "system/build.prop": BUILD_PROP,
            "etc/passwd": USERS,
            "etc/group": GROUPS,
        },
        links={"bin/sh": "mksh", **{f"system/bin/{name}": "/bin/toybox" for name in TOYBOX.split()}},
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
        files={"etc/ssh/sshd_config": SSHD_CONFIG, "etc/passwd": USERS, "etc/group": GROUPS},
        links={},
        daemon=("/usr/sbin/sshd", "-D", "-e"),
        port=22,
        data="root",
    ),
}
