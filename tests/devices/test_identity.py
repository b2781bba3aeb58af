"""Whose a lock is, and how a program that is missing is installed: in the words of each platform."""

import ctypes
import uuid

import pytest

from devices.transports import identity, lock, packages

UUID = uuid.UUID("0f3c0c5e-6f0e-5b1c-9d4a-3d6f0a1b2c3d")


class Mac:
    """The two calls of macOS's C library: <unistd.h> and `sysctl kern.bootsessionuuid`."""

    def __init__(self, failed=0):
        self.failed = failed

    def gethostuuid(self, found, wait):
        found.raw = UUID.bytes
        return self.failed

    def sysctlbyname(self, name, found, size, new, length):
        assert name == b"kern.bootsessionuuid"
        found.value = b"A1B2C3D4-0000-4000-8000-00000000000A"
        return self.failed


def test_a_mac_is_itself_whatever_its_network_and_clock_say(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Mac())
    monkeypatch.setattr(identity.psutil, "boot_time", lambda: pytest.fail("moves with the clock"))
    monkeypatch.setattr(identity.socket, "gethostname", lambda: pytest.fail("moves with the network"))
    assert identity.machine("darwin") == str(UUID)
    assert identity.boot("darwin") == "A1B2C3D4-0000-4000-8000-00000000000A"


def test_where_nothing_is_told_names_and_seconds_stand_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Mac(failed=-1))
    monkeypatch.setattr(identity, "_PROC", tmp_path)
    monkeypatch.setattr(identity.psutil, "boot_time", lambda: 1700000000.25)
    monkeypatch.setattr(identity.socket, "gethostname", lambda: "desk")
    assert (identity.machine("darwin"), identity.boot("darwin")) == ("desk", "1700000000")


def test_containers_that_share_a_name_do_not_judge_each_others_processes(monkeypatch, tmp_path):
    """As with `docker run --network=host`: one name, one kernel, two tables of process ids."""
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[4026532201]")
    mine = lock.Owner.this_process().model_copy(update={"pid": 2**31 - 1})
    assert mine.is_dead()
    monkeypatch.setattr(identity, "_PROC", tmp_path)
    assert identity.machine("linux").endswith(" pid:[4026532201]")
    assert not mine.is_dead()


FEDORA, AMAZON = "NAME=Fedora\nID=fedora\nVERSION_ID=42\n", 'ID="amzn"\nID_LIKE="fedora"\n'
UBUNTU, ARCH = "PRETTY_NAME=x\nID=ubuntu\nID_LIKE=debian\n", "ID=arch\n"


@pytest.mark.parametrize(
    ("program", "system", "release", "words"),
    [
        ("adb", "darwin", "", "brew install android-platform-tools"),
        ("adb", "linux", UBUNTU, "apt install adb"),
        ("adb", "linux", FEDORA, "dnf install android-tools"),
        ("adb", "linux", ARCH, "install what Debian calls adb"),
        ("g++", "darwin", "", "xcode-select --install"),
        ("ssh", "linux", AMAZON, "dnf install openssh-clients"),
        ("aarch64-linux-gnu-g++", "linux", FEDORA, "dnf install gcc-c++-aarch64-linux-gnu"),
        ("aarch64-linux-gnu-g++", "darwin", "", "on Linux: apt install g++-aarch64-linux-gnu"),
        ("ssh", "linux", "", "install what Debian calls openssh-client"),
    ],
)
def test_what_is_missing_is_installed_as_its_system_does(program, system, release, words):
    assert packages.hint(program, system, release) == words
