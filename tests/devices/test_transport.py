"""What every transport promises, over the local shell, a real arm64 adbd and a real arm64 sshd."""

import os
import shutil
import struct
import subprocess
import sys

import pytest

from devices import DeadlineError, DeviceBusyError, DeviceError
from devices.transports import lock, transfer
from devices.transports.shell import Shell
from tests.support.processes import left_running

DEVICES = ("host", "emulated-android", "emulated-pi5")
ABI = {"emulated-android": "arm64-v8a", "emulated-pi5": "aarch64", "host": os.uname().machine}
QUICK_S = 30


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def opened(device, attach):
    return attach(device)


@pytest.fixture
def transport(opened):
    """One connection for all tests."""
    return opened[0]


@pytest.fixture
def there(opened):
    """The device's working folder as seen from here, emptied for each test."""
    for path in opened[1].iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return opened[1]


def shell(transport, script, timeout_s=QUICK_S):
    return transport.run(["sh", "-c", script], timeout_s=timeout_s)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_words_arrive_as_they_were_sent(transport):
    words = ["a b", "$HOME", "`id`", "it's", '"', "*", "", "ü", "two\nlines", "-n", "\\"]
    ended = transport.run(["printf", "%s|", *words], timeout_s=QUICK_S)
    assert ended.stdout.decode() == "".join(f"{word}|" for word in words)


# 1 and 255: adb and ssh end with these themselves, too
@pytest.mark.parametrize("code", [0, 1, 3, 42, 127, 255])
def test_the_exit_status_is_the_programs_own(transport, code):
    assert shell(transport, f"exit {code}").returncode == code


def test_death_by_a_signal_is_128_and_its_number(transport):
    assert shell(transport, "kill -SEGV $$").returncode == 139


def test_a_program_that_is_not_there_ends_with_127(transport):
    assert transport.run(["no-such-program"], timeout_s=QUICK_S).returncode == 127


def test_a_programs_output_decides_nothing(transport):
    ended = shell(transport, "echo 'error: device offline'; echo 'Permission denied' >&2")
    assert (ended.returncode, ended.stdout) == (0, b"error: device offline\n")
    assert b"Permission denied" in ended.stderr


def test_output_is_bytes_and_whole(transport):
    assert shell(transport, "head -c 3000000 /dev/zero; printf '\\r\\n'").stdout == bytes(3_000_000) + b"\r\n"


def test_stdin_is_empty(transport):
    assert transport.run(["cat"], timeout_s=QUICK_S).stdout == b""


def test_at_the_deadline_the_program_and_its_children_end(transport):
    with pytest.raises(DeadlineError, match="did not end within 1 s"):
        shell(transport, "sleep 7651.25 & sleep 7651.5", timeout_s=1)
    assert left_running("7651.") == []


def test_children_do_not_outlive_their_program(transport):
    assert shell(transport, "sleep 7652.25 & exit 5").returncode == 5
    assert left_running("7652.") == []


def test_abi(transport, device):
    assert transport.abi() == ABI[device]


def test_a_pushed_file_is_there_whole_and_only_once(transport, there, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))
    transport.push(source, "copy", timeout_s=QUICK_S)
    assert (there / "copy").read_bytes() == source.read_bytes()
    first = (there / "copy").stat()
    transport.push(source, "copy", timeout_s=QUICK_S)
    assert (there / "copy").stat().st_ino == first.st_ino, "an unchanged file was sent again"
    source.write_bytes(b"changed")
    transport.push(source, "copy", timeout_s=QUICK_S)
    assert (there / "copy").read_bytes() == b"changed"
    assert names(there) == ["copy"]


def test_a_pushed_program_can_be_run(transport, there, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho ran\n")
    program.chmod(0o755)
    transport.push(program, "program", timeout_s=QUICK_S)
    assert transport.run(["./program"], timeout_s=QUICK_S).stdout == b"ran\n"


def test_a_pushed_folder_becomes_what_the_local_one_is(transport, there, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep er").mkdir(parents=True)
    contents = {"same": "1", "changes": "2", "goes": "3", "deep er/$(touch x)": "4", "-f ü'": "5", "n" * 150: "6"}
    contents["large"] = "7" * (transfer.SMALL_BYTES + 1)
    for name, text in contents.items():
        (folder / name).write_text(text)
    transport.push(folder, "copy", timeout_s=QUICK_S)
    assert names(there) == sorted(f"copy/{name}" for name in contents)
    (folder / "goes").unlink()
    (folder / "changes").write_text("new")
    transport.push(folder, "copy", timeout_s=QUICK_S)
    assert names(there) == sorted(f"copy/{name}" for name in set(contents) - {"goes"})
    assert (there / "copy/same").read_text() == "1"
    assert (there / "copy/changes").read_text() == "new"


def test_small_files_are_sent_together(transport, tmp_path, monkeypatch):
    asked, ask = [], Shell.ask
    monkeypatch.setattr(Shell, "ask", lambda *given, **options: asked.append(given[1]) or ask(*given, **options))
    for number in range(20):
        (tmp_path / str(number)).write_text("x" * number)
    transport.push(tmp_path, "many", timeout_s=QUICK_S)
    assert len(asked) == 4  # what is there, its folders, the files, their hashes and names


def test_an_interrupted_push_goes_on_where_it_was(transport, there, tmp_path):
    for folder, cut in ((tmp_path / "folder", "whole too"), (there / "copy.part", "who")):
        folder.mkdir()
        (folder / "arrived").write_text("whole")
        (folder / "cut").write_text(cut)
    arrived = (there / "copy.part/arrived").stat().st_ino
    transport.push(tmp_path / "folder", "copy", timeout_s=QUICK_S)
    assert (there / "copy/cut").read_text() == "whole too"
    assert (there / "copy/arrived").stat().st_ino == arrived


def test_what_is_not_there_is_not_pushed(transport, tmp_path):
    with pytest.raises(DeviceError, match="no such file or folder"):
        transport.push(tmp_path / "absent", "absent", timeout_s=QUICK_S)


def test_a_program_for_another_processor_is_refused_before_it_is_sent(transport, there, tmp_path):
    program = tmp_path / "libforeign.so"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 22) + bytes(44))
    with pytest.raises(DeviceError, match=r"libforeign.so is built for ELF machine 22, the device is"):
        transport.push(program, "libforeign.so", timeout_s=QUICK_S)
    assert names(there) == []


def test_a_pulled_file_is_what_was_there(transport, there, tmp_path):
    (there / "made").write_bytes(os.urandom(70_000))
    transport.pull("made", tmp_path / "here", timeout_s=QUICK_S)
    assert (tmp_path / "here").read_bytes() == (there / "made").read_bytes()
    with pytest.raises(DeviceError, match="no file absent"):
        transport.pull("absent", tmp_path / "absent", timeout_s=QUICK_S)
    assert names(tmp_path) == ["here"]


def test_one_run_at_a_time(transport, there):
    with transport.lock():
        with pytest.raises(DeviceBusyError, match=rf"process {os.getpid()} on .*\.lock on the device"):
            transport.lock().__enter__()
        assert names(there) == [".lock/owner"]
    assert names(there) == []


def test_an_error_frees_the_device(transport, there):
    with pytest.raises(ZeroDivisionError), transport.lock():
        raise ZeroDivisionError
    assert names(there) == []


def test_the_lock_of_a_dead_process_is_broken_with_a_note(transport, there, notes):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    put_lock(there, lock.Owner.this_process().model_copy(update={"pid": int(ended.stdout)}))
    with transport.lock():
        assert "is dead; its lock is broken" in notes[0]
        assert names(there) == [".lock/owner"]


def test_a_lock_from_before_the_last_start_of_this_host_is_broken(transport, there):
    put_lock(there, lock.Owner.this_process().model_copy(update={"boot": "earlier"}))
    with transport.lock():
        pass


def test_the_lock_of_another_host_is_left_alone(transport, there):
    put_lock(there, lock.Owner.this_process().model_copy(update={"host": "other", "machine": "other", "pid": 1}))
    with pytest.raises(DeviceBusyError, match="process 1 on other"):
        transport.lock().__enter__()


def test_an_unreadable_lock_is_left_alone(transport, there):
    (there / ".lock").mkdir()
    with pytest.raises(DeviceBusyError, match="another run"):
        transport.lock().__enter__()


def put_lock(folder, owner):
    (folder / ".lock").mkdir()
    (folder / ".lock/owner").write_text(owner.model_dump_json())
