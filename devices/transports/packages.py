"""How a program that is missing on this machine is installed, in the words of its system."""

import re
import sys
from pathlib import Path

_PACKAGES = {  # program: Debian's, Fedora's and Homebrew's package; None: it has none
    "adb": ("adb", "android-tools", "android-platform-tools"),
    "adb rules": ("android-sdk-platform-tools-common", "android-tools", None),
    "ssh": ("openssh-client", "openssh-clients", "openssh"),
    "cmake": ("cmake", "cmake", "cmake"),
    "make": ("make", "make", "make"),
    "g++": ("g++", "gcc-c++", None),
    "aarch64-linux-gnu-g++": ("g++-aarch64-linux-gnu", "gcc-c++-aarch64-linux-gnu", None),
}
_EVERYWHERE = {"zig": ".venv/bin/pip install ziglang"}
_MANAGERS = (("apt install", r"debian|ubuntu"), ("dnf install", r"fedora|rhel|centos|amzn"))
_OTHERWISE = {"g++": "xcode-select --install"}
"""Of a Mac, for what Homebrew does not have."""
_RELEASE = Path("/etc/os-release")


def hint(program: str, system: str = sys.platform, release: str | None = None) -> str:
    """`brew install android-platform-tools`; of a system that is not known, the Debian package's name."""
    if program in _EVERYWHERE:
        return _EVERYWHERE[program]
    debian, fedora, brew = _PACKAGES[program]
    if system == "darwin":
        return f"brew install {brew}" if brew else _OTHERWISE.get(program, f"on Linux: apt install {debian}")
    kind = " ".join(re.findall(r"^ID(?:_LIKE)?=(.*)$", _os_release() if release is None else release, re.MULTILINE))
    for (command, names), package in zip(_MANAGERS, (debian, fedora), strict=True):
        if re.search(names, kind):
            return f"{command} {package}"
    return f"install what Debian calls {debian}"


def _os_release() -> str:
    try:
        return _RELEASE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
