"""`python -m export verify`: every way an artifact can be wrong is one line; a whole one has none."""

import shutil
import sys

import numpy as np
import pytest

from export import formats, manifest
from export.formats import StoredWeight
from export.manifest import LayerInfo
from export.toolbox import model_checks, verification
from tests.support.artifacts import edit_manifest, found, only, reseal

PACKAGE = "model.mlpackage"
MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture
def command(export_command):
    """Exit code, lines of stdout, stderr."""

    def run(*arguments):
        code, out, err = export_command("verify", *arguments)
        return code, out.splitlines(), err

    return run


def test_a_whole_artifact_passes(folder, here):
    assert found(folder) == []


def test_the_model_is_read_in_a_process_of_its_own(command, copy):
    folder = copy("executorch-xnnpack")
    code, out, _ = command(folder)
    assert code == 0, out
    assert out == [f"{folder}: as its manifest says"]


def test_wrong_usage_is_another_exit_code(command, folder):
    assert command(folder / "tokenizer.json")[0] == 2
    assert command(folder, "--limit", "0")[0] == 2
    assert command()[0] == 2


def test_each_changed_or_cut_file_is_named(folder, no_child, command):
    for name in manifest.read(folder).files:
        path, data = folder / name, (folder / name).read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        only(found(folder), f"{name}: differs from manifest.json (sha256)")
        path.write_bytes(data[:-1])
        only(found(folder), f"{name}: {len(data) - 1} bytes, manifest.json says {len(data)}")
        path.unlink()
        code, out, _ = command(folder)
        assert (code, out) == (1, [f"{path}: missing; build the artifact again"])
        path.write_bytes(data)
    assert found(folder) == []


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
PULL = "is a Git LFS pointer, not the file; run `git lfs pull` in the clone that it is from"


def test_pointers_are_told_by_everything_that_opens_an_artifact(folder, no_child, export_command):
    for name in ("tokenizer.json", manifest.FILE):
        (folder / name).write_bytes(POINTER)
        assert found(folder) == [f"{folder / name}: {PULL}"]
        for command in (["inspect", folder], ["diff", folder, folder]):
            assert export_command(*command) == (1, "", f"error: {folder / name}: {PULL}\n"), command


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_other_line_ends_are_told(folder, no_child, name):
    path = folder / name
    assert b"\n" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    only(found(folder), f"{name}: its line ends were changed, as git's core.autocrlf does; clone or copy it without")


def test_a_file_beside_them_is_named(copy, no_child):
    folder = copy("coreml")
    (folder / PACKAGE / "Data" / "more").write_bytes(b"x")
    only(found(folder), "more: not listed in manifest.json")


@pytest.mark.reliability("finished model files cut short and sealed again", "found by structure")
@pytest.mark.parametrize("size", [0, 1, 100, 5_000, -2])
def test_a_cut_model_that_was_sealed_again_is_still_found(folder, here, size):
    """Structure, without the help of hashes."""
    artifact = folder / manifest.read(folder).plan.target.artifact
    for path in sorted(artifact.rglob("*")) or [artifact, *folder.glob("*.data")]:
        if path.is_file() and len(whole := path.read_bytes()) > size:
            path.write_bytes(whole[:size])
            reseal(folder)
            assert found(folder), path
            path.write_bytes(whole)


@pytest.mark.reliability("manifest.json that is none", "one line")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"a": ' * 100_000])
def test_a_manifest_that_is_none(copy, content):
    folder = copy("onnx-cpu")
    (folder / manifest.FILE).write_bytes(content)
    only(found(folder), "manifest.json: damaged or of another version")


def layer(fields, index, **changes):
    fields["quantization"]["layers"][index].update(changes)


@pytest.mark.reliability("manifest.json: contradictions and names that lead outside", "named")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update(id="another"), "id is 'another', its plan is 'tiny_int4-g32_onnx-cpu'"),
        (lambda f: f["contract"]["kv"].update(layers=3), "contract.kv.layers is 3, expected 2"),
        (lambda f: f["contract"]["kv"].update(context_length=512), "contract.kv.context_length is 512"),
        (lambda f: f["plan"]["target"].update(artifact="tokenizer.model"), "plan.target.artifact is 'tokenizer.model'"),
        (lambda f: layer(f, 1, bits=8), "q_proj.weight: int8 in groups of 32 is not a scheme of the recipe"),
        (lambda f: layer(f, 2, group_size=64), "k_proj.weight: int4 in groups of 64 is not a scheme of the recipe"),
        (lambda f: f["quantization"]["layers"].pop(3), "v_proj.weight: missing"),
        (lambda f: layer(f, 0, name="model.norm.weight"), "model.norm.weight: not quantized by the recipe"),
        (lambda f: f.update(mood="good"), "mood: unknown key"),
        (lambda f: f["files"].update({"../x": f["files"]["model.onnx"]}), "'../x' climbs out with `..`"),
        (lambda f: f["files"].update({"/etc/passwd": f["files"]["model.onnx"]}), "'/etc/passwd' is absolute"),
        (lambda f: f["files"].update({"a\\..\\..\\x": f["files"]["model.onnx"]}), "climbs out"),
        (lambda f: f["files"].update({"C:\\x": f["files"]["model.onnx"]}), "is absolute"),
        (lambda f: f["files"].update({"more.so": f["files"]["model.onnx"]}), "file 'more.so': no part of an artifact"),
    ],
)
def test_a_manifest_that_contradicts_itself_or_leads_outside(copy, no_child, change, words):
    folder = copy("onnx-cpu")
    edit_manifest(folder, change)
    assert [finding for finding in found(folder) if words in finding], found(folder)


def scales_in(folder, name):
    """The stored scales of one weight, writable, whatever the format: found by their bytes."""
    described = manifest.read(folder)
    reader = formats.reader(described.plan.target.backend)
    file = folder / described.plan.target.artifact
    stored = next(weight for weight in reader.read_weights(file, described.architecture) if weight.name == name)
    brain = (np.ascontiguousarray(stored.scale).view(np.uint32) >> 16).astype(np.uint16)
    half = stored.scale.astype(np.float16).view(np.uint16)
    for path in (file, folder / "model.onnx.data", folder / WEIGHTS):
        data = np.memmap(path, np.uint8, "r+") if path.is_file() else np.zeros(0, np.uint8)
        for wanted in (brain, half):
            at = bytes(data).find(wanted.tobytes())
            if at >= 0:
                return data[at : at + wanted.nbytes].view(np.uint16)
    raise AssertionError(f"{name}: not found")


@pytest.mark.parametrize(("bits", "words"), [(0x8000, "positive"), (0x7F80, "positive")])
def test_a_wrong_scale_is_found_even_when_sealed_again(folder, here, bits, words):
    """Negative; infinite or not a number."""
    name = "model.layers.1.mlp.down_proj.weight"
    stored = scales_in(folder, name)
    stored[3] |= bits
    del stored
    reseal(folder)
    only(found(folder), f"{name}: 1 scales that are not {words} numbers")


def test_swapped_scales_are_found_by_the_hash(folder, no_child):
    stored = scales_in(folder, "model.layers.1.mlp.down_proj.weight")
    other = int(np.flatnonzero(stored != stored[0])[0])
    stored[[0, other]] = stored[[other, 0]]
    del stored
    only(found(folder), "(sha256)")


def weight(change=None):
    q, scale = np.full((4, 64), 7, np.int8), np.full((4, 2), 0.5, np.float32)
    if change:
        change(q, scale)
    return StoredWeight("w", q, scale)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, None),
        (lambda q, s: q.__setitem__((0, 0), 8), "1 integers outside -8…7"),
        (lambda q, s: q.__setitem__((slice(None), 0), -9), "4 integers outside -8…7"),
        (lambda q, s: s.__setitem__((0, 0), 0), "1 scales that are not positive numbers"),
        (lambda q, s: s.__setitem__((0, 1), np.nan), "1 scales that are not positive numbers"),
        (lambda q, s: s.__setitem__((0, 1), 0.1), "1 scales that are no bfloat16"),
    ],
)
def test_numbers_that_the_scheme_does_not_have(change, words):
    one = LayerInfo(name="w", bits=4, group_size=32, sqnr_db=1, max_abs_error=1, kept=False, not_kept=None)
    got = model_checks.wrong_numbers(weight(change), one, (4, 64), common=True)
    assert got == words


def test_shapes_that_the_manifest_does_not_have():
    one = LayerInfo(name="w", bits=4, group_size=64, sqnr_db=1, max_abs_error=1, kept=False, not_kept=None)
    assert "scales of shape (4, 2), expected (4, 1)" in model_checks.wrong_numbers(weight(), one, (4, 64), common=True)
    assert "integers of shape (4, 64)" in model_checks.wrong_numbers(weight(), one, (8, 64), common=True)


def test_another_models_file_under_this_manifest(tiny, copy, here):
    """Whole, sealed, and not what the manifest describes."""
    folder = copy("onnx-cpu")
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(tiny("onnx-cpu", "int4-g64") / name, folder / name)
    reseal(folder)
    findings = found(folder)
    assert "model.layers.0.self_attn.q_proj.weight: int4 g64 in the file, int4 g32 in the manifest" in findings
    assert [finding for finding in findings if "scales of shape" in finding]


def test_another_interface_under_this_manifest(folder, here):
    described = manifest.read(folder)
    contract = described.contract
    first = contract.inputs[0].model_copy(update={"dtype": "float64"})
    manifest.write(folder, described.model_copy(
        update={"contract": contract.model_copy(update={"inputs": (first, *contract.inputs[1:])})}))  # fmt: skip
    only(found(folder), f"input {first.name}: {contract.inputs[0].dtype} in the file")
    manifest.write(folder, described.model_copy(
        update={"contract": contract.model_copy(update={"inputs": contract.inputs[1:]})}))  # fmt: skip
    only(found(folder), f"inputs: the file has {len(contract.inputs)}")


def test_a_program_with_a_flipped_structure_never_ends_verify(copy, command):
    """Native code reads it in the child; whatever happens there, the answer is lines."""
    folder = copy("executorch-xnnpack")
    data = bytearray((folder / "model.pte").read_bytes())
    data[1000:1400] = b"\xff" * 400  # the flatbuffer stands first
    (folder / "model.pte").write_bytes(data)
    reseal(folder)
    code, out, _ = command(folder)
    assert code == 1
    assert out


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import time; time.sleep(60)", "not be read within 1 s"),
        ("raise SystemExit(3)", "exit 3: no message"),
        ("print('hello')", "exit 0"),
        ("import sys; sys.exit('out of luck')", "exit 1: out of luck"),
    ],
)
def test_how_a_child_can_end(copy, monkeypatch, program, words):
    monkeypatch.setattr(verification, "WORKER", (sys.executable, "-c", program))
    only(verification.verify(copy("onnx-cpu"), 1.0 if "sleep" in program else 60.0), words)
