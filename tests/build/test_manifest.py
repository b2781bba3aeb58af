"""Which code made an artifact: what git does not answer is unknown, never a clean answer."""

import shutil
import subprocess

import pytest

from export import manifest
from tests.support.reliability import IDENTITY

pytestmark = IDENTITY


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit that takes the place of this checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("x")
    git(folder, "init", "-q")
    git(folder, "add", "code.py")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(manifest, "ROOT", folder)
    return folder


def test_commit_and_local_changes(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert (manifest.source_info().commit, manifest.source_info().dirty) == (commit, False)
    assert manifest.source_info().revision == commit[:12]
    (checkout / "code.py").write_text("y")
    assert manifest.source_info().revision == f"{commit[:12]} with local changes"


def test_a_checkout_of_another_owner_answers(checkout, monkeypatch):
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert (manifest.source_info().commit, manifest.source_info().dirty) == (commit, False)


def unknown(info):
    return (info.commit, info.dirty, info.revision) == ("unknown", None, "unknown")


def test_code_inside_of_another_repository_does_not_take_its_commit(checkout, monkeypatch):
    (checkout / "vendored").mkdir()
    monkeypatch.setattr(manifest, "ROOT", checkout / "vendored")
    assert unknown(manifest.source_info())


def test_no_repository_no_commit_and_no_git_are_unknown(checkout, tmp_path, monkeypatch):
    shutil.rmtree(checkout / ".git")
    assert unknown(manifest.source_info())
    git(checkout, "init", "-q")
    assert manifest.source_info().commit == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unknown(manifest.source_info())
