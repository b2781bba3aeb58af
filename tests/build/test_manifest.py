"""A manifest's names are checked where it is read; which code made it is unknown where git does not answer."""

import shutil
import subprocess

import pytest
from pydantic import TypeAdapter, ValidationError

from export import manifest
from export.errors import ExportError
from export.plan import FileName, Name
from runtime_tests import sessions
from tests.support.artifacts import edit_manifest, renamed
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
    (checkout / "adapter.bin").write_text("a user's")
    assert manifest.source_info().dirty is False
    (checkout / "code.py").write_text("y")
    assert manifest.source_info().revision == f"{commit[:12]} with local changes"


@pytest.mark.parametrize("by_link", [False, True])
def test_a_checkout_of_another_owner_answers(checkout, tmp_path, monkeypatch, by_link):
    commit = git(checkout, "rev-parse", "HEAD")
    (tmp_path / "link").symlink_to(checkout)
    monkeypatch.setattr(manifest, "ROOT", tmp_path / "link" if by_link else checkout)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert (manifest.source_info().commit, manifest.source_info().dirty) == (commit, False)
    assert manifest.git_is_silent(manifest.source_info()) == ""


def unknown(info):
    return (info.commit, info.dirty, info.revision) == ("unknown", None, "unknown")


def test_code_inside_of_another_repository_does_not_take_its_commit(checkout, monkeypatch):
    (checkout / "vendored").mkdir()
    monkeypatch.setattr(manifest, "ROOT", checkout / "vendored")
    assert unknown(manifest.source_info())


def test_no_repository_no_commit_and_no_git_are_unknown(checkout, tmp_path, monkeypatch):
    shutil.rmtree(checkout / ".git")
    assert unknown(manifest.source_info())
    assert manifest.git_is_silent(manifest.source_info()) == ""  # a copy without its history
    git(checkout, "init", "-q")
    assert manifest.source_info().commit == "unknown"
    assert manifest.git_is_silent(manifest.source_info()) == (
        f"git tells no commit of {checkout}, so the manifest says `unknown`; `git -C {checkout} log` says why"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unknown(manifest.source_info())


NO_NAMES = (
    *("", ".", "..", "../x", "a/b", "/a", "a..b", "-x", ".ssh", "a b", "a\n", "a\nb", "a;b", "$HOME", "`id`", "*"),
    *("a\\b", "\x1b[2J", "[/x]", "a\u202eb", "a\u200db", "x" * 81),
)
NO_FILES = ("", ".", "..", "/a", "../a", "a/../b", "a//b", "a/", "./a", "a\\b", "C:\\a", "a\nb", "\x1b[2J", "x" * 256)


NO_COMMITS = (
    *("", "HEAD", "main", "Unknown", "-q", "c" * 39, "c" * 41, "C" * 40, "g" * 40, "c" * 63 + "\n"),
    *(
        f"{'c' * 40}\n",
        f"{'c' * 40};id",
        f"{'c' * 40} && id",
        f" {'c' * 40}",
        f"$(id){'c' * 34}",
        f"unknown\n{'c' * 40}",
    ),
)
"""A commit becomes a word of a command that people copy, a digest of what they compare."""


@pytest.mark.parametrize("text", NO_COMMITS)
def test_what_is_no_commit_or_digest(text):
    for form in (manifest.Commit, manifest.Sha256):
        with pytest.raises(ValidationError, match="String should match pattern"):
            TypeAdapter(form).validate_python(text)
    for commit in ("c" * 40, "c" * 64, "unknown"):
        assert TypeAdapter(manifest.Commit).validate_python(commit) == commit


WRONG_DIGESTS = {
    "source.commit": lambda fields: fields["source"].update(commit="HEAD; id"),
    "source.sha256": lambda fields: fields["source"].update(sha256="id"),
    "checkpoint.sha256.model.safetensors": lambda f: f["checkpoint"].update(sha256={"model.safetensors": "$(id)"}),
    "quantization.calibration.texts.a.txt": lambda fields: fields["quantization"].update(
        calibration={"texts": {"a.txt": "x"}, "day": None, "tokens": 1, "held_out_kl": None, "candidates": []}
    ),
}


@pytest.mark.parametrize("field", WRONG_DIGESTS)
def test_commits_and_digests_are_checked_where_a_manifest_is_read(artifact, field):
    edit_manifest(artifact, WRONG_DIGESTS[field])
    with pytest.raises(ExportError, match=f"manifest.json: damaged or of another version: {field}: String should"):
        manifest.read(artifact)


@pytest.mark.parametrize("text", NO_NAMES)
def test_what_is_no_name(text):
    with pytest.raises(ValidationError, match="is no name: at most 80 letters, digits, _, - and single dots"):
        TypeAdapter(Name).validate_python(text)


@pytest.mark.parametrize("text", NO_FILES)
def test_what_is_no_file_of_a_folder(text):
    with pytest.raises(ValidationError, match=r"is absolute|climbs out|is no file name"):
        TypeAdapter(FileName).validate_python(text)


def test_names_that_people_give():
    for text in ("smollm2-135m", "int4-g32", "Llama-3.2_1B", "größe", "7b", "_x", "model.onnx.data"):
        assert TypeAdapter(Name).validate_python(text) == text
    for text in ("Data/com.apple.CoreML/model.mlmodel", "a b (1).gguf", "llama3.2:1b.gguf", "x~", ".hidden", "数.txt"):
        assert TypeAdapter(FileName).validate_python(text) == text


@pytest.mark.hostile("artifact", "names, ids and paths that lead elsewhere", "refused where the manifest is read")
@pytest.mark.parametrize(
    ("key", "word"),
    [
        *(("plan/model/name", word) for word in ("../../.ssh", "..", "a/b", "x\ntouch y\n", "\x1b[2J", "a b")),
        *((f"plan/{kind}/name", "../x") for kind in ("quant", "target")),
        *((f"plan/target/{key}", word) for key in ("backend", "session", "artifact") for word in ("../x", "os.path/x")),
        ("plan/target/session", "base..board"),
    ],
)
def test_a_plans_names_are_checked_where_a_manifest_is_read(artifact, key, word):
    """With an id that fits, as whoever publishes a folder can write it."""

    def change(fields):
        *path, last = key.split("/")
        at = fields
        for part in path:
            at = at[part]
        at[last] = word
        fields["id"] = "_".join(fields["plan"][kind]["name"] for kind in ("model", "quant", "target"))

    edit_manifest(artifact, change)
    with pytest.raises(ExportError, match=f"{key.replace('/', '.')}: .* is no name") as refused:
        manifest.read(artifact)
    assert str(refused.value).isprintable()


@pytest.mark.hostile("artifact", "names, ids and paths that lead elsewhere", "refused where the manifest is read")
@pytest.mark.parametrize("identity", ["../../.ssh", "tiny_int4-g32_onnx-cpu", "", "x\n"])
def test_an_id_is_its_plans(artifact, identity):
    edit_manifest(artifact, lambda fields: fields.update(id=identity))
    with pytest.raises(ExportError, match=r"id is .*, its plan is 'tiny_int4-g32_fake'; build the artifact again"):
        manifest.read(artifact)


@pytest.mark.hostile("artifact", "names, ids and paths that lead elsewhere", "refused where the manifest is read")
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\nb", "a//b", "\x1b[2Jx"])
@pytest.mark.parametrize("place", ["files", "checkpoint"])
def test_file_names_are_checked_where_a_manifest_is_read(artifact, place, name):
    def change(fields):
        files = fields["files"] if place == "files" else fields["checkpoint"]["sha256"]
        files[name] = fields["files"]["tokenizer.json"] if place == "files" else "0" * 64

    edit_manifest(artifact, change)
    with pytest.raises(ExportError, match=r"is absolute|climbs out|is no file name") as refused:
        manifest.read(artifact)
    assert str(refused.value).isprintable()


@pytest.mark.hostile("artifact", "names, ids and paths that lead elsewhere", "refused where the manifest is read")
def test_a_manifest_without_an_end_is_not_read(artifact):
    with (artifact / manifest.FILE).open("r+b") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ExportError, match="more than 16 MiB, which no manifest is"):
        manifest.read(artifact)


@pytest.mark.hostile(
    "artifact", "code, packages and downloads that a manifest names", "never imported, nothing sent or downloaded"
)
@pytest.mark.parametrize("name", ["base", "board", "timing", "site", "pte.x", "__init__"])
def test_only_a_session_of_ours_is_imported(artifact, name):
    edit_manifest(artifact, lambda fields: fields["plan"]["target"].update(session=name))
    with pytest.raises(
        ExportError, match=rf"unknown session '{name}' in the artifact's target; (known: fake, mlpackage|did you mean )"
    ):
        sessions.session_module(manifest.read(artifact))


def test_a_renamed_artifact_is_read(artifact):
    renamed(artifact, "größe.2")
    assert manifest.read(artifact).id == "größe.2_int4-g32_fake"


@pytest.mark.hostile("artifact", "texts of terabytes, in holes", "refused before they are read")
@pytest.mark.parametrize("name", ["README.md", "model.sig", "provenance.intoto.jsonl", "manifest.json"])
def test_a_text_beside_the_model_that_no_build_writes_is_refused_unread(artifact, name):
    with (artifact / name).open("ab") as file:
        file.truncate(2**42)
    assert list(manifest.strays(artifact)) == [
        f"{artifact / name}: larger than 67108864 bytes, which no such file is; remove it"
    ]
    (artifact / name).unlink()
    assert list(manifest.strays(artifact)) == []
