"""What other people's machines print and lack: greetings, words at the end, other shells, missing tools, two of one."""

import json
import os
import shutil
import subprocess
from contextlib import closing

import pytest

import devices
from devices import Completed, DeviceBusyError, DeviceError, DeviceLostError
from devices import __main__ as listing
from devices.transports import lock, marks, processes, ssh
from tests.support.fakes import boards
from tests.support.reliability import FOREIGN_WORDS

pytestmark = FOREIGN_WORDS

QUICK_S = 30
NOISE = {
    "nothing": {},
    "a greeting": {"before": "echo Welcome to board"},
    "no newline": {"before": "printf noise"},
    "CRLF": {"before": r"printf 'a\r\nb\r\n'"},
    "on stderr": {"before": "echo noise >&2", "after": "echo Permission denied, Connection refused >&2"},
    "not UTF-8": {"before": r"printf '\377\376\n' | tee /dev/stderr"},
    "colours": {"before": r"printf '\033[31m\033]0;title\007red\033[0m\n'"},
    "much": {"before": "seq 30000"},
    "at the end": {"after": "echo bye; code=0"},
    "no newline at the end": {"after": r"printf '\377bye'; code=255"},
    "the script itself": {"before": 'set -v; echo "$last"; printf \'%s\\n\' "$last" >&2'},
}


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Open a board with these habits: its transport and its working folder."""
    opened = []

    def attach(**habits):
        device, home = boards.ssh(tmp_path, monkeypatch, **habits)
        opened.append(devices.open_transport(device))
        return opened[-1], home / device.workdir

    yield attach
    for transport in opened:
        transport.close()


@pytest.mark.hostile(
    "device",
    "output around our words, without an end, larger than expected",
    "not taken for an answer; ended in one line",
)
@pytest.mark.parametrize("noise", NOISE)
def test_what_a_board_prints_around_our_words_changes_nothing(board, tmp_path, noise):
    transport, there = board(**NOISE[noise])
    assert transport.abi() == os.uname().machine
    ended = transport.run(["sh", "-c", r"printf 'a\r\n\377'; echo why >&2; exit 7"], timeout_s=QUICK_S)
    assert (ended.returncode, ended.stdout, ended.reason) == (7, b"a\r\n\xff", "why")
    (tmp_path / "sent").write_bytes(os.urandom(3000))
    transport.push(tmp_path / "sent", "sent", timeout_s=QUICK_S)
    first = (there / "sent").stat()
    transport.push(tmp_path / "sent", "sent", timeout_s=QUICK_S)
    assert (there / "sent").stat().st_ino == first.st_ino, "an unchanged file was sent again"
    transport.pull("sent", tmp_path / "back", timeout_s=QUICK_S)
    assert (tmp_path / "back").read_bytes() == (tmp_path / "sent").read_bytes()
    with transport.lock(), pytest.raises(DeviceBusyError, match=f"in use by process {os.getpid()} on"):
        transport.lock().__enter__()
    assert sorted(path.name for path in there.iterdir()) == ["sent"]


@pytest.mark.parametrize("shell", ["sh -c", "bash -c", "dash -c", "tcsh -c", "fish -c", "zsh -c", "ksh -c"])
def test_any_login_shell_runs_our_scripts(board, tmp_path, shell):
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell.split()[0]} is not installed")
    transport, _ = board(login=shell)
    words = ["a b", "it's", '"', "!x", "$HOME", "`id`", "two\nlines", "\\", "%d", "~", "ü"]
    ended = transport.run(["printf", "%s|", *words], timeout_s=QUICK_S)
    assert ended.stdout.decode() == "".join(f"{word}|" for word in words)


def test_a_command_for_a_login_shell_is_one_line_of_one_quoted_word():
    command = ssh.one_line("printf '%s\n' \"it's\" !$`")
    assert command == (
        r"""exec sh -c 'eval "$(printf %b "printf \0047%s\0012\0047 \0042it\0047s\0042 \0041\0044\0140")"'"""
    )


@pytest.mark.parametrize(
    ("habits", "line"),
    [
        (
            {"login": "echo 'This account is currently not available.'; exit 1 #"},
            r"^raspberry-pi-5: its login shell ended with 1 \(This account is currently not available\.\) before our "
            r"script did: this must work: ssh board sh -c true$",
        ),
        (
            {"login": "export PATH=; exit 1 #", "before": r"printf '\033[31mIllegal variable name.\n' >&2"},
            r"^raspberry-pi-5: board: its login shell ended with 1 \(Illegal variable name\.\) before our script did: ",
        ),
        ({"before": "echo 'ssh: Connection refused' >&2; exit 255"}, r"board: nothing answers there: is it on"),
        ({"before": "mkdir() { :; }; cd /proc; export -f mkdir"}, r"set workdir in devices/raspberry-pi-5.yaml to a "),
        ({"login": "f() { sh -c \"$1\" | sed 's/$/\\r/'; }; f"}, "a terminal lies between and would change files"),
    ],
)
def test_a_board_that_does_not_run_our_script_is_one_line(board, habits, line):
    with pytest.raises(DeviceError, match=line) as refused:
        board(**habits)
    assert str(refused.value).isprintable()


def put(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_32_bit_programs_over_a_64_bit_kernel_are_named(board, tmp_path):
    put(tmp_path / "tools", "getconf", "echo 32")
    put(tmp_path / "tools", "uname", "echo aarch64")
    with pytest.raises(
        DeviceError, match=r"64-bit kernel \(aarch64\), 32-bit programs \(getconf LONG_BIT is 32\): ins"
    ):
        board(before="PATH=$PWD/../tools:$PATH")


def bare(folder, *without):
    """A folder with the programs that our scripts use, but these."""
    folder.mkdir()
    programs = "sh mkdir pwd uname cat df find rm ln mv sleep sha256sum tar"
    for name in {*programs.split()} - {*without}:
        (folder / name).symlink_to(shutil.which(name))


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("sha256sum", "neither sha256sum nor shasum is there: install coreutils"),
        ("df", "df: not found"),
        ("find", "find: not found"),
        ("mv", "mv: not found"),
        ("tar", "tar: not found"),
    ],
)
def test_a_missing_tool_is_named_by_the_device(board, tmp_path, tool, words):
    bare(tmp_path / "tools", tool)
    transport, there = board(before="PATH=$PWD/../tools")
    (there / "folder").mkdir()
    (there / "folder/old").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/new").touch()
    with pytest.raises(DeviceError, match=words):
        transport.push(tmp_path / "folder", "folder", timeout_s=QUICK_S)
    assert (there / "folder/old").exists()


def test_a_board_without_setsid_and_getconf_still_works(board, tmp_path):
    bare(tmp_path / "tools")
    transport, _ = board(before="PATH=$PWD/../tools")
    assert transport.run(["sh", "-c", "exit 5"], timeout_s=QUICK_S).returncode == 5


def test_a_folder_that_cannot_be_written_is_not_taken_for_a_lock(board, tmp_path):
    put(tmp_path / "tools", "mkdir", '[ "$1" = -p ] || { echo "mkdir: .lock: Read-only file system" >&2; exit 1; }')
    device = tmp_path / "home/llama-on-device"
    device.mkdir(parents=True)
    transport, _ = board(before="PATH=$PWD/../tools:$PATH")
    with pytest.raises(DeviceError, match=r"nothing can be written in .*: mkdir: .lock: Read-only file system; make"):
        transport.lock().__enter__()


@pytest.mark.linux
def test_a_lock_that_cannot_be_signed_is_not_left_behind(board, tmp_path):
    put(tmp_path / "tools", "mkdir", '/bin/mkdir "$@"; [ "$1" = -p ] || ln -s /dev/full .lock/owner')
    transport, there = board(before="PATH=$PWD/../tools:$PATH")
    with pytest.raises(DeviceError, match="nothing can be written in"):
        transport.lock().__enter__()
    assert list(there.iterdir()) == []


def test_a_shell_that_ends_in_the_middle_is_a_lost_device(board, tmp_path):
    transport, _ = board()
    put(tmp_path / "bin", "ssh", 'for last; do :; done; sh -c "$last" | head -n 1; exit 137')
    with pytest.raises(DeviceLostError, match="its login shell ended with 137 before our script did"):
        transport.run(["true"], timeout_s=QUICK_S)


def test_a_script_cut_anywhere_gave_no_answer():
    mark = marks.new()
    done = subprocess.run(["sh", "-c", marks.enclosed("echo 1; exit 139", mark)], capture_output=True, check=True)
    whole = done.stdout
    assert marks.answer(Completed(0, whole, done.stderr), mark) == Completed(139, b"1\n", b"")
    assert not any(marks.answer(Completed(0, whole[:cut], b""), mark) for cut in range(len(whole)))


# --- devices of strangers ---


@pytest.mark.hostile(
    "device",
    "output around our words, without an end, larger than expected",
    "not taken for an answer; ended in one line",
)
@pytest.mark.parametrize("stream", ["", ">&2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_board_that_prints_without_an_end_is_one_line(board, tmp_path, when, stream):
    with pytest.raises(
        DeviceError, match=r"raspberry-pi-5: .*(wrote more than 64|said more than 1) MiB and was ended"
    ) as refused:
        board(**{when: f"yes AAAAAAAAAAAAAAAAAAAAAAAAAAA {stream}"})
    assert str(refused.value).isprintable()


@pytest.mark.hostile(
    "device",
    "output around our words, without an end, larger than expected",
    "not taken for an answer; ended in one line",
)
@pytest.mark.parametrize("script", ["yes", "yes >&2", "head -c 70000000 /dev/zero"])
def test_a_program_that_prints_without_an_end_is_ended(board, script):
    transport, _ = board()
    with pytest.raises(DeviceError, match=r"raspberry-pi-5: sh wrote more than 64 MiB and was ended$"):
        transport.run(["sh", "-c", script], timeout_s=QUICK_S)


def test_what_is_said_after_the_deadline_is_not_kept(board, monkeypatch):
    """It has a moment to clean up; what it prints meanwhile takes no memory."""
    monkeypatch.setattr(processes, "HANG_UP_S", 0.2)
    deadline = processes.Deadline.after(0.2)
    with pytest.raises(TimeoutError):
        processes.call_held(["sh", "-c", "sleep 0.3; exec yes"], deadline)


@pytest.mark.hostile(
    "device",
    "output around our words, without an end, larger than expected",
    "not taken for an answer; ended in one line",
)
def test_a_file_larger_than_expected_is_not_fetched(board, tmp_path):
    transport, there = board()
    (there / "logits").write_bytes(bytes(3_000_000))
    with pytest.raises(DeviceError, match="fetching logits wrote more than 2 MiB and was ended"):
        transport.pull("logits", tmp_path / "here", timeout_s=QUICK_S, most_bytes=2**20)
    assert not (tmp_path / "here").exists()


ODD_ABIS = {
    "not UTF-8": r"'\377\376\n'", "markup": r"'[/nope]arm64\n'", "a path": r"'../../../x\n'",
    "escapes": r"'\033[2J\033]0;RAN\007\n'", "much": r"'%060d\n' 1", "a command": r"'x; touch y\n'",
    "a flag": r"-- '--x\n'",
}  # fmt: skip


@pytest.mark.hostile(
    "device", "folders, processors, locks and answers of odd words", "reach no path, command or markup; one line"
)
@pytest.mark.parametrize("kind", ODD_ABIS)
def test_a_board_that_reports_no_abi_is_one_line(board, tmp_path, kind):
    put(tmp_path / "tools", "uname", f"printf {ODD_ABIS[kind]}")
    with pytest.raises(DeviceError, match=r"^raspberry-pi-5: reports '.*' as its folder, '.*' as its proc") as refused:
        board(before="PATH=$PWD/../tools:$PATH")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600


@pytest.mark.hostile("device", "links beside an artifact", "not sent")
def test_only_the_named_files_of_a_folder_are_sent(board, tmp_path):
    """What hides beside them may be a link to any file of this user."""
    transport, there = board()
    (tmp_path / "secret").write_text("key")
    (tmp_path / "folder/.git").mkdir(parents=True)
    (tmp_path / "folder/model").write_text("1")
    (tmp_path / "folder/.git/x").symlink_to(tmp_path / "secret")
    (tmp_path / "folder/.x").symlink_to(tmp_path / "secret")
    transport.push(tmp_path / "folder", "copy", timeout_s=QUICK_S, only={"model", "absent"})
    assert [path.name for path in (there / "copy").rglob("*")] == ["model"]


OWNER = lock.Owner.this_process().model_dump()


@pytest.mark.hostile(
    "device", "folders, processors, locks and answers of odd words", "reach no path, command or markup; one line"
)
@pytest.mark.parametrize(
    "owner",
    [
        *({**OWNER, "pid": pid} for pid in ("x", -1, 0, 2**40, 1.5, True, None, [1])),
        *({**OWNER, key: value} for key in ("host", "machine", "boot", "since") for value in (1, None, {}, "\x1b[2J")),
        *({**OWNER, "started": value} for value in ("x", None)),
        *({**OWNER, "more": 1}, {}, [], None, 7, {**OWNER, "since": "x" * 3000}),
    ],
)
def test_a_lock_of_odd_words_is_another_runs(owner):
    assert lock.Owner.parse(json.dumps(owner)) is None


@pytest.mark.parametrize("text", ["", "{", "[" * 1000, "\udcff", "1" * 2000])
def test_a_lock_that_is_no_json_is_another_runs(text):
    assert lock.Owner.parse(text) is None
    assert lock.Owner.parse(json.dumps(OWNER)) == lock.Owner(**OWNER)


@pytest.mark.hostile(
    "device", "folders, processors, locks and answers of odd words", "reach no path, command or markup; one line"
)
def test_words_of_a_device_are_no_markup_in_the_list(monkeypatch, capsys):
    monkeypatch.setattr(listing, "_state", lambda device: (False, "[/nope] [red]x"))
    assert listing.main([]) == 0
    assert "[/nope] [red]x" in capsys.readouterr().out


# --- two of one ---


@pytest.fixture
def adb(tmp_path, monkeypatch):
    """An `adb` that lists these devices and runs nothing."""

    def listing(*lines):
        text = "".join(f"{line}\\n" for line in lines)
        script = f"case $1 in devices) printf 'List of devices attached\\n{text}' ;; *) touch {tmp_path}/ran ;; esac"
        put(tmp_path, "adb", script)
        monkeypatch.setenv("ADB", str(tmp_path / "adb"))

    return listing


@pytest.mark.parametrize("serial", ["0123456789ABCDEF", ""])
@pytest.mark.parametrize("states", [("device", "device"), ("offline", "device"), ("device", "unauthorized")])
def test_two_phones_with_one_serial_are_counted_before_anything_runs(adb, monkeypatch, tmp_path, serial, states):
    adb(*(rf"0123456789ABCDEF\t{state}" for state in states))
    monkeypatch.setenv("PIXEL_8_SERIAL", serial)
    line = r"^pixel-8: 2 devices have the serial 0123456789ABCDEF; unplug one$"
    with pytest.raises(DeviceError, match=line):
        devices.open_transport(devices.load("pixel-8"))
    assert not (tmp_path / "ran").exists()


def test_two_of_one_serial_beside_another(adb, monkeypatch):
    adb(r"S\tdevice", r"S\tdevice", r"T\tdevice", r"S\toffline")
    monkeypatch.delenv("PIXEL_8_SERIAL", raising=False)
    with pytest.raises(DeviceError, match=r"4 devices are attached \(S, S, T, S\): set PIXEL_8_SERIAL"):
        devices.open_transport(devices.load("pixel-8"))
    monkeypatch.setenv("PIXEL_8_SERIAL", "S")
    with pytest.raises(DeviceError, match=r"3 devices have the serial S; unplug all but one"):
        devices.open_transport(devices.load("pixel-8"))


@pytest.mark.parametrize(
    ("begin", "words"),
    [(b"\x7fELF of another processor", "Exec format error"), (b"#!/no/such/shell\n", "No such file or directory")],
)
def test_an_adb_that_cannot_be_started(monkeypatch, tmp_path, begin, words):
    program = tmp_path / "adb"
    program.write_bytes(begin)
    program.chmod(0o755)
    monkeypatch.setenv("ADB", str(program))
    with pytest.raises(DeviceError, match=rf"^{program}: cannot be started \({words}\); install it again$"):
        devices.open_transport(devices.load("pixel-8"))


# --- the user's ssh configuration ---


def test_a_configuration_for_sitting_at_the_board_is_not_ours(tmp_path, monkeypatch):
    (tmp_path / "config").write_text(
        "Host *\n RemoteCommand tmux attach\n RequestTTY force\n PermitLocalCommand yes\n LocalCommand echo hello\n"
        " LogLevel QUIET\n LocalForward 8080 localhost:80\n Port 2222\n"
    )
    monkeypatch.setenv("RASPBERRY_PI_5_HOST", "127.0.0.1")
    device = devices.load("raspberry-pi-5")
    address = device.transport._resolved(device.name).model_copy(update={"config": str(tmp_path / "config")})
    command = ssh._SshLink(device.name, address)._ssh("yes", "true")
    shown = subprocess.run([command[0], "-G", *command[1:]], capture_output=True, text=True, check=True).stdout
    settings = dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)
    assert settings.get("remotecommand", "none") == "none"
    assert (settings["permitlocalcommand"], settings["requesttty"], settings["loglevel"]) == ("no", "false", "ERROR")
    assert (settings["clearallforwardings"], settings["port"]) == ("yes", "2222")


# --- where ssh's socket lies ---


@pytest.mark.parametrize("name", ["x" * 100, "a b", "p%h", "50%", 'q"uote', "$HOME", "ü"])
def test_ssh_accepts_where_its_socket_lies(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(ssh.tempfile, "gettempdir", lambda: str(tmp_path / name))
    monkeypatch.setenv("RASPBERRY_PI_5_HOST", "127.0.0.1")
    device = devices.load("raspberry-pi-5")
    link = ssh._SshLink(device.name, device.transport._resolved(device.name))
    command = link._ssh("yes", "true")
    shown = subprocess.run([command[0], "-G", *command[1:]], capture_output=True, text=True, check=True).stdout
    (path,) = [line.partition(" ")[2] for line in shown.splitlines() if line.startswith("controlpath ")]
    assert path == str(link._socket)
    assert len(os.fsencode(path)) + 17 < 108
    assert list((tmp_path / name).iterdir()) == []


def test_where_no_socket_can_be_each_client_connects_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(ssh.socket, "socket", lambda *_: (_ for _ in ()).throw(OSError("no sockets here")))
    device, _ = boards.ssh(tmp_path, monkeypatch, before='echo "$*" >>said')
    with closing(devices.open_transport(device)) as transport:
        assert transport.run(["true"], timeout_s=QUICK_S).returncode == 0
    assert "ControlPath=none" in (tmp_path / "home/said").read_text()
