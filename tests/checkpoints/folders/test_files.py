"""What lies in place of a checkpoint's file is told as what it is, whichever file it is."""

import pytest

from export.checkpoints.origin import adapted, parse_origin
from tests.support.checkpoints import ADAPTER, FORMS, LLAMA, refusal, write_folder
from tests.support.reliability import NOT_DAMAGED

pytestmark = NOT_DAMAGED

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 123456\n"
POINTER = "is a Git LFS pointer, not the file; run `git lfs pull` in the clone that it is from"
FILES = (
    ("safetensors", "config.json"),
    ("safetensors", "model.safetensors"),
    ("safetensors", "tokenizer.json"),
    ("safetensors", "tokenizer_config.json"),
    ("shards", "model-1.safetensors"),
    ("shards", "model.safetensors.index.json"),
    ("gguf", "model.gguf"),
    ("jq4", "model.safetensors"),
    ("bitsandbytes", "model.safetensors"),
    ("meta", "params.json"),
    ("meta", "consolidated.00.pth"),
    ("meta", "tokenizer.model"),
    ("lora", "adapter/adapter_config.json"),
    ("lora", "adapter/adapter_model.safetensors"),
)


def refused(form, folder):
    base = parse_origin(str(folder / "model.gguf" if form.startswith("gguf") else folder))
    return refusal(LLAMA, adapted(base, folder / ADAPTER) if form == "lora" else base)


@pytest.mark.parametrize(("form", "name"), FILES)
def test_a_git_lfs_pointer_is_named_with_its_remedy(tmp_path, form, name):
    FORMS[form](tmp_path / "c")
    (tmp_path / "c" / name).write_bytes(LFS)
    assert refused(form, tmp_path / "c") == f"{tmp_path / 'c' / name}: {POINTER}"


OTHERS = {
    "an older pointer": (LFS.replace(b"git-lfs", b"hawser"), POINTER),
    "Xet": (
        b"# xet version 0\nfilesize = 5\nhash = 'ab'\n",
        "is a Xet pointer, not the file; download the file itself",
    ),
    "git-annex": (b"/annex/objects/SHA256E-s5--ab", "is a git-annex pointer, not the file; run `git annex get`"),
    "a web page": (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>", "is a web page, not the file; download the file itself"),
    "an error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is a web page, not the file"),
    "a hub's refusal": (b"Invalid username or password.", "is a server's answer 'Invalid username or password.'"),
    "an answer in JSON": (b'{"error":"Repository not found"}', "is a server's answer '{\"error\":"),
    "nothing": (b"", "is empty; download it again"),
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_a_download_left_in_its_place_is_named(tmp_path, kind, name):
    data, words = OTHERS[kind]
    (write_folder(tmp_path / "c") / name).write_bytes(data)
    assert f"{tmp_path / 'c' / name}: {words}" in refusal(LLAMA, tmp_path / "c")


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".crdownload"])
def test_a_download_that_has_not_ended_is_named(tmp_path, suffix):
    file = write_folder(tmp_path / "c") / "model.safetensors"
    file.rename(file.with_name(file.name + suffix))
    line = f"model.safetensors: missing, only model.safetensors{suffix} is there; finish the download"
    assert line in refusal(LLAMA, tmp_path / "c")


def test_a_hub_download_into_the_folder_that_has_not_ended_is_named(tmp_path):
    folder = write_folder(tmp_path / "c")
    (folder / "model.safetensors").unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/x.0f3a.incomplete").touch()
    line = f"missing, and a download into {folder} has not ended; run `hf download` again"
    assert line in refusal(LLAMA, folder)


def test_a_pointer_without_a_suffix_is_named(tmp_path):
    (tmp_path / "sha256-0f3a").write_bytes(LFS)
    assert refusal(LLAMA, tmp_path / "sha256-0f3a") == f"{tmp_path / 'sha256-0f3a'}: {POINTER}"


def test_a_file_that_is_still_being_downloaded_is_not_read(tmp_path):
    """aria2 gives a file its whole size at once."""
    (write_folder(tmp_path / "c") / "model.safetensors.aria2").write_bytes(b"x")
    assert "its download has not ended, as model.safetensors.aria2 beside it says" in refusal(LLAMA, tmp_path / "c")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_nothing_is_named(tmp_path, name):
    file = write_folder(tmp_path / "c") / name
    file.unlink()
    file.symlink_to("../blobs/abc")
    assert f"{name}: missing: it is a link to ../blobs/abc, where no file is" in refusal(LLAMA, tmp_path / "c")
