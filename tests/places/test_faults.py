"""Faults between a desk and a device, caused on a real arm64 adbd and a real arm64 sshd.

Each fault ends in the right error, in time, with nothing partial under a final name and nothing left running.
"""

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import devices
from devices import DeviceBusyError, DeviceError, DeviceLostError, NoSpaceError, TransferError
from devices.transports import processes, shell, transfer
from tests.support.processes import emulated, left_running, sleeps

EMULATED = ("emulated-android", "emulated-pi5")
QUICK_S = 30
GRACE_S = 1
"""For a device to end a program, and again to answer a ping: shorter than for real devices."""
MARGIN_S = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def impatient():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "HANG_UP_S", GRACE_S)
        patch.setattr(shell, "PING_S", GRACE_S)
        yield


@pytest.fixture(scope="module", params=EMULATED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def machine(request, name):
    """The shared device of that name."""
    return request.getfixturevalue(name.replace("-", "_"))


@pytest.fixture(scope="module")
def opened(attach, name, machine):
    return attach(name, machine)


@pytest.fixture
def transport(opened):
    """One connection, with an empty working folder for each test."""
    for path in opened[1].iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return opened[0]


@pytest.fixture
def blob(tmp_path):
    """A file that takes a while to send."""
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(30_000_000))
    return path


@contextmanager
def within(limit_s):
    """Fails beyond the deadline and the time to clean up."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < limit_s + 2 * GRACE_S + MARGIN_S


@contextmanager
def when_partly_there(machine, act):
    """Act as soon as a part of a file has arrived."""

    def wait():
        for _ in range(2000):
            if any(path.stat().st_size for path in machine.data.rglob("*.part")):
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def files(machine):
    return sorted(path.name for path in machine.data.rglob("*") if path.is_file() and path.name != "authorized_keys")


def test_the_device_dies_while_a_file_is_sent(transport, machine, blob):
    with within(QUICK_S), when_partly_there(machine, machine.crash), pytest.raises(DeviceLostError):
        transport.push(blob, "blob", timeout_s=QUICK_S)
    assert "blob" not in files(machine)


def test_after_that_the_next_run_works(attach, name, machine, blob):
    again, _ = attach(name, machine)
    again.push(blob, "blob", timeout_s=QUICK_S)
    assert "blob.part" not in files(machine)
    assert (next(machine.data.rglob("blob"))).read_bytes() == blob.read_bytes()


@pytest.fixture
def frozen(transport, machine):
    yield
    machine.thaw()


def test_a_frozen_device_is_lost_at_the_deadline(transport, machine, frozen):
    machine.freeze()
    with within(1), pytest.raises(DeviceLostError, match="stopped answering during sleep"):
        transport.run(["sleep", "7701.5"], timeout_s=1)
    machine.thaw()
    assert left_running("7701.5") == []


def test_frozen_while_a_file_is_sent(transport, machine, blob, frozen):
    with within(3), when_partly_there(machine, machine.freeze), pytest.raises(DeviceLostError):
        transport.push(blob, "blob", timeout_s=3)
    machine.thaw()
    assert "blob" not in files(machine)


def test_the_link_goes_down_in_the_middle(transport, machine):
    down = threading.Timer(0.7, machine.unplug)
    down.start()
    try:
        with within(2), pytest.raises(DeviceLostError):
            transport.run(["sleep", "7702.5"], timeout_s=2)
    finally:
        down.join()
        machine.plug()
    assert left_running("7702.5", patience_s=30) == []
    assert transport.run(["true"], timeout_s=QUICK_S).returncode == 0


@pytest.fixture(scope="module")
def small(name, attach):
    """A device with 8 MB of room."""
    with emulated(name, data_mb=8) as machine:
        yield attach(name, machine)[0], machine


def test_too_little_room_is_seen_before_sending(small, tmp_path):
    transport, machine = small
    (tmp_path / "large").write_bytes(bytes(9_000_000))
    with pytest.raises(NoSpaceError, match=r"9\.0 MB to send, 8\.\d MB free in .*; free some space"):
        transport.push(tmp_path / "large", "large", timeout_s=QUICK_S)
    assert "large.part" not in files(machine)


def test_the_disk_fills_up_while_a_file_is_sent(small, tmp_path, monkeypatch):
    transport, machine = small
    (tmp_path / "large").write_bytes(bytes(9_000_000))
    monkeypatch.setattr(transfer, "check_room", lambda *_: None)
    # the copy that fails is removed, so that the rest of the room must be taken for the disk to stay full
    transport.run(["sh", "-c", "head -c 7500000 /dev/zero >other"], timeout_s=QUICK_S)
    with pytest.raises(NoSpaceError, match="is full"):
        transport.push(tmp_path / "large", "large", timeout_s=QUICK_S)
    assert "large" not in files(machine)
    assert "large.part" not in files(machine)


@pytest.fixture
def cutting_client(name, tmp_path, monkeypatch):
    """The client program, which silently cuts the end of what it sends."""
    program = {"emulated-android": "adb", "emulated-pi5": "ssh"}[name]
    real = shutil.which(program)
    wrapper = tmp_path / program
    wrapper.write_text(f"""#!/bin/sh
case "$*" in
  *'cat >'*.part*) head -c 1000 | {real} "$@" ;;
  *) exec {real} "$@" ;;
esac
""")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_a_file_cut_on_the_way_never_gets_its_name(cutting_client, attach, name, machine, tmp_path):
    (tmp_path / "whole").write_bytes(os.urandom(2000))
    with pytest.raises(TransferError, match="whole did not arrive as sent; run again"):
        attach(name, machine)[0].push(tmp_path / "whole", "whole", timeout_s=QUICK_S)
    assert "whole" not in files(machine)
    assert "whole.part" not in files(machine)


HOLDER = """
import sys
import devices
from contextlib import closing
with closing(devices.open_transport(devices.load(sys.argv[1]))) as transport, transport.lock():
    transport.run(["sleep", sys.argv[2]], timeout_s=300)
"""


@contextmanager
def another_run(name, marker):
    """A process that locks the device and runs a program there."""
    child = subprocess.Popen([sys.executable, "-c", HOLDER, name, marker], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        sleeps(marker)
        yield child
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def test_a_second_run_at_once_is_told_who_is_first(transport, name):
    with another_run(name, "7703.5") as first, pytest.raises(DeviceBusyError, match=f"process {first.pid} on"):
        transport.lock().__enter__()


def test_a_killed_run_leaves_nothing_and_the_next_one_works(transport, name, notes):
    with another_run(name, "7704.5") as first:
        first.kill()
        first.wait()
        assert left_running("7704.5", patience_s=20) == []
    with transport.lock():
        assert "its lock is broken" in notes[0]
        assert transport.run(["true"], timeout_s=QUICK_S).returncode == 0


def test_ctrl_c_ends_the_program_and_frees_the_device(transport, name, machine):
    before = files(machine)
    with another_run(name, "7705.5") as first:
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=QUICK_S)
        assert err.decode().strip().endswith("KeyboardInterrupt")
        assert left_running("7705.5") == []
    assert files(machine) == before


def test_a_device_of_another_abi_is_refused_before_anything_runs(machine, name, monkeypatch):
    set_all(monkeypatch, machine.environment)
    device = devices.load(name).model_copy(update={"abi": "armeabi-v7a"})
    with pytest.raises(DeviceError, match="says armeabi-v7a"):
        devices.open_transport(device)


def set_all(monkeypatch, environment):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)


# --- adb ---


@pytest.fixture
def android(emulated_android, monkeypatch):
    set_all(monkeypatch, emulated_android.environment)
    return emulated_android


def open_android(timeout_s=QUICK_S):
    devices.open_transport(devices.load("emulated-android"), timeout_s=timeout_s)


def test_a_serial_that_is_not_attached(android, monkeypatch):
    monkeypatch.setenv("EMULATED_ANDROID_SERIAL", "ABSENT")
    with pytest.raises(DeviceError, match="ABSENT is not attached: connect it"):
        open_android()


def test_a_network_device_that_is_not_there(android, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("EMULATED_ANDROID_SERIAL", f"127.0.0.1:{free}")
    with pytest.raises(DeviceError, match=f"{free} is not attached"):
        open_android()


def test_an_adb_server_that_ended_is_not_replaced(android, monkeypatch, tmp_path):
    monkeypatch.setenv("ADB_SERVER_SOCKET", f"localfilesystem:{tmp_path}/adb")
    with pytest.raises(DeviceLostError, match=r"the adb server at .* ended"):
        open_android()
    assert list(tmp_path.iterdir()) == []


@contextmanager
def distrustful_device():
    """An adbd whose owner has not yet allowed this computer: it only asks for a signature."""

    def header(command, first, data):
        number = int.from_bytes(command, "little")
        return struct.pack("<6I", number, first, 0, len(data), sum(data), number ^ 0xFFFFFFFF) + data

    def answer():
        connection, _ = server.accept()
        with connection:
            while received := connection.recv(24):
                length = struct.unpack("<6I", received)[3]
                while length:
                    length -= len(connection.recv(length))
                connection.sendall(header(b"AUTH", 1, bytes(range(20))))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_device_that_does_not_trust_this_computer(android, monkeypatch):
    with distrustful_device() as serial:
        monkeypatch.setenv("EMULATED_ANDROID_SERIAL", serial)
        with pytest.raises(DeviceError, match="is unauthorized: unlock its screen and allow USB debugging"):
            open_android()
        subprocess.run(["adb", "disconnect", serial], check=True, capture_output=True)


def test_a_device_that_never_answers(android, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        serial = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("EMULATED_ANDROID_SERIAL", serial)
        with within(3), pytest.raises(DeviceError, match="adb connect: no answer within 3 s"):
            open_android(timeout_s=3)
        subprocess.run(["adb", "disconnect", serial], check=True, capture_output=True)


def test_without_a_serial_the_only_device_is_taken_and_of_several_none(android, monkeypatch):
    phone = devices.load("pixel-8")
    anyone = phone.model_copy(update={"transport": phone.transport.model_copy(update={"model": None})})
    monkeypatch.delenv("PIXEL_8_SERIAL", raising=False)
    subprocess.run(["adb", "connect", android.environment["EMULATED_ANDROID_SERIAL"]], check=True, capture_output=True)
    devices.open_transport(anyone).close()
    with pytest.raises(DeviceError, match="the attached device is emulated, not Pixel 8"):
        devices.open_transport(phone)
    with distrustful_device() as second:
        subprocess.run(["adb", "connect", second], check=True, capture_output=True)
        with pytest.raises(DeviceError, match=rf"2 devices are attached \(.*{second}.*\): set PIXEL_8_SERIAL"):
            devices.open_transport(phone)
        subprocess.run(["adb", "disconnect", second], check=True, capture_output=True)


# --- ssh ---


@pytest.fixture
def configured(emulated_pi5, monkeypatch, tmp_path):
    """Open the board with some settings of its ssh configuration replaced."""

    def configure(**changed):
        lines = Path(emulated_pi5.environment["EMULATED_PI5_SSH_CONFIG"]).read_text().splitlines()
        unchanged = [line for line in lines if line.split()[0] not in changed]
        (tmp_path / "config").write_text(
            "\n".join([*unchanged, *(f"  {key} {value}" for key, value in changed.items())])
        )
        monkeypatch.setenv("EMULATED_PI5_SSH_CONFIG", str(tmp_path / "config"))
        with within(QUICK_S):
            devices.open_transport(devices.load("emulated-pi5"), timeout_s=QUICK_S)

    return configure


@pytest.fixture
def another_key(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    return tmp_path / "key"


def test_keys_that_are_refused(configured, another_key):
    with pytest.raises(DeviceError, match="refuses this user's keys: ssh-copy-id emulated-pi5"):
        configured(IdentityFile=another_key)


def test_a_host_key_that_changed(configured, another_key, emulated_pi5, tmp_path):
    public = another_key.with_suffix(".pub").read_text()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{emulated_pi5.port} {public}")
    with pytest.raises(DeviceError, match="host key changed; if you know why, forget the old one: ssh-keygen -R"):
        configured(UserKnownHostsFile=tmp_path / "known")


def test_a_host_that_was_never_seen(configured, tmp_path):
    with pytest.raises(DeviceError, match="host key is not known: connect once by hand and check it: ssh"):
        configured(UserKnownHostsFile=tmp_path / "nothing")


def test_nothing_listens(configured):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(DeviceError, match="nothing answers there: is it on, and does sshd run"):
        configured(Port=free)


def test_a_name_that_is_no_machine(configured):
    with pytest.raises(DeviceError, match="no machine of that name"):
        configured(HostName="no-such-machine.invalid")
