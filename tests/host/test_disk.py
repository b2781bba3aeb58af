"""One writer for each path, with and without locks; what is written replaces a link and does not follow it."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import tempfile

import pytest

from export.errors import ExportError
from export.host import disk
from export.manifest import ROOT
from tests.support.reliability import LOCATION


def refused(path, words):
    with pytest.raises(ExportError, match=words), disk.locked(path):
        pass


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def no_locks(request, monkeypatch):
    """A file system without locks: NFS without its daemon, Lustre, some of FUSE."""

    def flock(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    return os.strerror(request.param)


@LOCATION
def test_without_locks_a_folder_is_refused_by_its_file_and_the_cache_goes_on(no_locks, tmp_path, capsys):
    line = rf"/\.out\.lock: cannot be locked \({no_locks}\), and two writers would damage .*/out; name a folder on a "
    refused(tmp_path / "out", line + r"local disk \(--out\), or work in a checkout on one$")
    with disk.turn(tmp_path / "stored"):
        pass
    assert f"/.stored.lock: not locked ({no_locks})" in capsys.readouterr().err.replace("\n", "")
    record = tmp_path / "records.jsonl"
    with record.open("ab") as file:
        disk.wait_for_lock(file)
    assert disk.is_locked(record)  # what cannot be known is not removed


@pytest.mark.parametrize(
    ("platform", "end"),
    [
        ("linux", ""),
        ("darwin", " (what Finder shows as free may be held by local snapshots: `tmutil deletelocalsnapshots /`)"),
    ],
)
def test_a_mac_is_told_why_finder_shows_more_room(monkeypatch, tmp_path, platform, end):
    """statvfs leaves out of what is free there what the system would give up: snapshots, files that iCloud has."""
    monkeypatch.setattr(disk.sys, "platform", platform)
    monkeypatch.setattr(disk, "free_bytes", lambda _: 3 * 10**9)
    line = f"{tmp_path}: needs 5,000.0 MB on the disk, has 3,000.0 MB; free 2,000.0 MB{end}"
    with pytest.raises(ExportError, match=f"^{re.escape(line)}$"):
        disk.require_room(tmp_path, 5 * 10**9)


def test_a_share_without_locks_is_one_on_macos_too(tmp_path):
    """<sys/errno.h> there: ENOTSUP is 45, which SMB answers, and EOPNOTSUPP is 102."""
    code = (
        "import errno, fcntl, sys; from pathlib import Path\n"
        "errno.ENOTSUP, errno.EOPNOTSUPP = 45, 102\n"
        "def flock(file, operation): raise OSError(45, 'Operation not supported')\n"
        "fcntl.flock = flock\n"
        "from export.host import disk\n"
        "with open(sys.argv[1], 'wb') as file: disk.wait_for_lock(file)\n"
        "print(disk.is_locked(Path(sys.argv[1])))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "records"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "True\n"


def test_a_lock_is_gone_in_the_end_and_one_that_was_removed_locks_nothing(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(file, operation):
        if not removed:  # the writer before removes its lock between our opening and locking it
            (tmp_path / ".out.lock").unlink()
            removed.append(file)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with disk.locked(tmp_path / "out"):
        assert removed
        refused(tmp_path / "out", f"process {os.getpid()} is writing it")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.hostile("local user", "links planted where we write", "replaced or refused, never followed")
def test_a_link_in_place_of_a_lock_is_refused_and_what_it_names_stays(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".out.lock").symlink_to("precious")
    refused(tmp_path / "out", r"/\.out\.lock: a link, which no build of ours makes; remove it")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.hostile("local user", "links planted where we write", "replaced or refused, never followed")
def test_a_text_is_written_beside_and_replaces_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "README.md").symlink_to("precious")
    disk.write_text(tmp_path / "README.md", "card")
    assert ((tmp_path / "README.md").read_text(), (tmp_path / "precious").read_text()) == ("card", "mine")
    assert not (tmp_path / "README.md").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "precious"]


def test_what_a_library_noted_of_its_temporary_files_goes_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ANOTHERS_CACHE", str(tmp_path / "scratch-other"))
    with disk.scratch(tmp_path / "scratch"):
        monkeypatch.setenv("A_LIBRARYS_CACHE", tempfile.mkdtemp())
    assert "A_LIBRARYS_CACHE" not in os.environ
    assert os.environ["ANOTHERS_CACHE"] == str(tmp_path / "scratch-other")
    assert not [*tmp_path.iterdir()]
