"""An artifact folder is whole or not there, whatever ends the build: a signal, a full disk, a second build."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import export
from export import manifest, pipeline
from export.build import folder as artifact
from export.checkpoints.origin import Seed, parse_origin
from export.errors import ExportError
from export.formats import admission
from export.plan import load_plan
from tests.support.artifacts import COMPANIONS, add_companions
from tests.support.processes import arguments, one_error, results
from tests.support.reliability import LOCATION, MOVED_ARTIFACT

TARGETS = ("onnx-cpu", "executorch-xnnpack", "coreml")
MIDDLE = {
    "onnx-cpu": "export.formats.onnx_kv.weights:DataFile.add_codes",
    "executorch-xnnpack": "export.formats.pte.program:trace",
    "coreml": "export.formats.mlpackage:convert",
}
"""A function of each lowering, after which part of the work is done."""
SAVED = "export.quantization.store:save_file"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A finished artifact, to be rebuilt in vain."""
    out = tmp_path_factory.mktemp("old") / "out"
    described = pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, out)
    other_code = described.source.model_copy(update={"sha256": "0" * 64})  # or it would be up to date
    manifest.write(out, described.model_copy(update={"source": other_code}))
    return out


def order(out, cache, target="onnx-cpu", **accident):
    """One build for `fakes/command.py`."""
    accident = accident if {"at", "after"} & accident.keys() else {"at": "nowhere", **accident}
    return {"target": target, "out": str(out), "cache": str(cache), "look": [], **accident}


def without_locks(found):
    """Locks stay: a lock that is removed can be held twice."""
    return [name for name in found if not name.endswith(".lock")]


def names(folder):
    return without_locks(sorted(path.name for path in folder.iterdir()))


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ── signals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.reliability("Ctrl-C and SIGTERM at every stage of a build", "one line, nothing left")
def test_a_signal_at_any_moment_is_one_line_and_leaves_nothing(old, tmp_path, record_property):
    """Every stage, the middle of every lowering, and the moment the integers are on disk but not yet in their place."""
    cache, place = tmp_path / "cache", tmp_path / "place"
    cache.mkdir()
    place.mkdir()
    look = {"look": [str(cache), str(place), str(old.parent)]}
    first = [
        order(old, cache, at=stage, accident=name, **look)
        for stage in ("checkpoint", "quantize")
        for name in ("SIGINT", "SIGTERM")
    ]
    first.append(order(old, cache, after=SAVED, accident="SIGINT", **look))
    then = [order(old, cache, at="describe", accident=name, **look) for name in ("SIGINT", "SIGTERM")]
    then += [order(place / "out", cache, t, after=MIDDLE[t], accident="SIGINT", **look) for t in TARGETS]
    before = bytes_of(old)
    ended = results(*first, *then)
    for i, result in enumerate(ended):
        assert result["code"] == 130, result
        assert "interrupted" in one_error(result["stderr"])
        in_cache, in_place, beside_old = map(without_locks, result["left"].values())
        assert (in_place, beside_old) == ([], ["out"])
        assert len(in_cache) == (0 if i < len(first) else 1)
        assert not any("part" in name for name in in_cache)
    assert bytes_of(old) == before
    record_property("cases", len(ended))


@pytest.mark.reliability("a signal that a library swallows", "one line, nothing left")
def test_a_signal_that_a_library_swallows_still_ends_the_build(cache, tmp_path):
    """coremltools does, now and then."""
    given = {"accident": "swallowed", "look": [str(tmp_path)]}
    for result in results(*(order(tmp_path / "out", cache, at=stage, **given) for stage in ("lower", "describe"))):
        assert "interrupted" in one_error(result["stderr"])
        assert (result["code"], without_locks(result["left"][str(tmp_path)])) == (130, [])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_from_outside_ends_the_real_command(tmp_path, name):
    with subprocess.Popen(
        [sys.executable, "-m", "export", "tiny", "int4-g32", "executorch-xnnpack", "--out", tmp_path / "out"],
        cwd=manifest.ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    ) as child:  # fmt: skip
        for line in child.stderr:
            if line.strip().startswith("quantize"):  # now it lowers, for seconds
                break
        time.sleep(0.3)
        child.send_signal(signal.Signals[name])
        rest = child.communicate(timeout=120)[1]
    assert child.returncode == 130
    assert "interrupted" in one_error(rest)
    assert names(tmp_path) == []


# ── killed, and at the same time ────────────────────────────────────────────────────────────────────────────────────


def started(order):
    """A build that says when it is there, and stays."""
    child = subprocess.Popen(arguments(order), cwd=manifest.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout.readline() == b"there\n"
    return child


@pytest.mark.reliability(
    "SIGKILL at every stage of a build, then the same build again", "whole, as if nothing had been"
)
def test_a_killed_build_is_made_again(old, tmp_path, record_property):
    """Every stage and the middle of every lowering, each into a folder of its own: what is whole is not built again."""
    look, expected = {"look": [str(tmp_path)], "alone": True}, manifest.read(old).files
    steps = [{"at": stage} for stage in ("checkpoint", "quantize", "lower", "describe")]
    steps.append({"after": "export.card:write"})
    killed = [(tmp_path / f"cache{i}", "onnx-cpu", step) for i, step in enumerate(steps)]
    killed += [(tmp_path / "cache", target, {"after": MIDDLE[target]}) for target in TARGETS]
    orders = []
    outs = [tmp_path / f"out{i}" for i in range(len(killed))]
    for out, (cache, target, step) in zip(outs, killed, strict=True):
        cache.mkdir(exist_ok=True)
        orders += [order(out, cache, target, accident="SIGKILL", **step, **look), order(out, cache, target, **look)]
    ended = results(*orders)
    for first, (_, target, step), then in zip(ended[::2], killed, ended[1::2], strict=True):
        assert first["code"] == -signal.SIGKILL, (target, step)
        assert then["code"] == 0, (target, step, then["stderr"])
        hidden = [name for name in then["left"][str(tmp_path)] if name.startswith(".") and not name.endswith(".lock")]
        assert hidden == [], (target, step)
    for out in outs:
        described = manifest.read(out)
        admission.require(out, described)
        assert described.plan.target.name != "onnx-cpu" or described.files == expected
    record_property("cases", len(killed))


@pytest.mark.reliability("two builds of one folder at once", "the second refused in one line")
def test_what_a_killed_build_left_is_removed_and_a_running_one_is_respected(cache, old, tmp_path):
    out = tmp_path / "out"
    with started(order(out, cache, after=MIDDLE["onnx-cpu"], accident="say and wait")) as first:
        try:
            with pytest.raises(ExportError, match=f"process {first.pid} is writing it; wait for it to end"):
                pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, out)
        finally:
            first.kill()
    (left,) = names(tmp_path)
    assert left.startswith(".out.build-")
    assert (tmp_path / left).stat().st_mode & 0o777 == 0o700
    pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, out)
    assert names(tmp_path) == ["out"]
    assert manifest.read(out).files == manifest.read(old).files


def until_it_waits(child, patience_s=100.0):
    """For a lock that another process holds: the kernel lists it with an arrow."""
    deadline = time.monotonic() + patience_s
    while not any("->" in line and f" {child.pid} " in line for line in Path("/proc/locks").read_text().splitlines()):
        assert child.poll() is None, "it did not wait"
        assert time.monotonic() < deadline, "it never came to wait"
        time.sleep(0.1)


@pytest.mark.linux
@pytest.mark.reliability("two builds of one recipe at once, the first killed", "the second waits and finishes")
def test_two_builds_of_one_recipe_quantize_once(tmp_path):
    cache = tmp_path / "cache"
    with started(order(tmp_path / "a", cache, after=SAVED, accident="say and wait")) as first:
        try:
            command = arguments(order(tmp_path / "b", cache))
            with subprocess.Popen(command, cwd=manifest.ROOT, stdout=subprocess.PIPE, text=True) as second:
                until_it_waits(second)
                first.kill()  # the lock goes with it, and what it wrote does not count
                ended = json.loads(second.communicate(timeout=120)[0].splitlines()[-1])[0]
        finally:
            first.kill()
    assert ended["code"] == 0
    assert f"process {first.pid} is writing it" in ended["stderr"]
    assert [re.sub("-.*", "", name) for name in names(tmp_path)] == [".a.build", "b", "cache"]
    assert [name for name in names(cache) if name.endswith(".part")] == []


def test_a_build_killed_between_the_two_renames_gives_the_old_one_back(old, tmp_path):
    plan_id = manifest.read(old).id
    there = tmp_path / ".out.build-abcd1234" / "old"
    there.mkdir(parents=True)
    (there / manifest.FILE).write_bytes((old / manifest.FILE).read_bytes())
    with pytest.raises(RuntimeError), artifact.building(tmp_path / "out", plan_id, Seed("20")):
        raise RuntimeError
    assert names(tmp_path) == ["out"]


# ── --out ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(out, words):
    with pytest.raises(ExportError, match=words) as caught:
        pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, out)
    assert "\n" not in str(caught.value)


def test_a_place_that_must_not_be_overwritten(tmp_path, old, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / manifest.FILE).write_text("{")
    before = names(tmp_path)
    refused(tmp_path / "mine", "is not an artifact folder; give another --out")
    refused(tmp_path / "file", "is not an artifact folder; give another --out")
    refused(tmp_path / "damaged", "holds a damaged artifact; give another --out or remove it")
    refused(tmp_path / "file" / "out", "cannot be made")
    refused(Path("/"), "is not an artifact folder")
    monkeypatch.chdir(tmp_path)
    refused(Path(), "is not an artifact folder")
    assert names(tmp_path) == before
    with pytest.raises(ExportError, match=r"holds another artifact \(tiny_int4-g32_onnx-cpu\)"):
        pipeline.export(load_plan("tiny", "fp32", "onnx-cpu"), None, old)


def test_an_artifact_of_another_schema_can_be_built_again(old, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / manifest.FILE).write_text(json.dumps({"schema_version": 99, "id": manifest.read(old).id}))
    pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, tmp_path / "out")
    assert manifest.read(tmp_path / "out").files == manifest.read(old).files


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / manifest.FILE).is_file()
    assert names(tmp_path) == ["link", "real"]


def test_libraries_keep_their_temporary_files_beside_the_artifact(tmp_path):
    import tempfile

    before = tempfile.gettempdir()
    with artifact.building(tmp_path / "out", "id", Seed("20")):
        made = Path(tempfile.mkdtemp()).parent
        assert (made.name, made.parent.parent) == ("tmp", tmp_path)
    assert tempfile.gettempdir() == before
    assert names(tmp_path) == ["out"]


@pytest.mark.hostile("local user", "files in and beside a build's folder, any umask", "kept; modes as ever")
@MOVED_ARTIFACT
def test_what_others_put_into_the_folder_is_never_deleted(old, tmp_path):
    out = shutil.copytree(old, tmp_path / "out")
    add_companions(out)
    for name in ("notes.txt", "results/r.csv", "model.onnx.bak", "tokenizer_config.json.orig"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        refused(out, f"out/{name}: not part of the artifact that is built again; move it away, or give another --out")
        (out / name).rename(tmp_path / "moved")
    pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, out)
    assert manifest.read(out).source.sha256 != "0" * 64
    assert all((out / name).read_text() == "x" for name in COMPANIONS if "/" not in name or name.startswith("."))


@pytest.mark.hostile("local user", "files in and beside a build's folder, any umask", "kept; modes as ever")
def test_neighbours_that_no_build_made_stay(old, tmp_path):
    """Names that a build might take, taken before it: by the user, or by another who waits for it to follow a link."""
    out = shutil.copytree(old, tmp_path / "out")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "new").mkdir()
    for name in (".out.part", ".out.tmp", ".out.old", ".out.build-abcd1234", ".out.build-notes", ".out.build-12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / ".out.build-87654321").symlink_to("precious")
    (tmp_path / ".out.build-22222222").write_text("mine")
    (tmp_path / ".out.build-33333333").mkdir()
    (tmp_path / ".out.build-33333333" / "new").symlink_to("../precious")
    before = [name for name in names(tmp_path) if name != ".out.build-33333333"]
    pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, out)
    assert set(before) <= set(names(tmp_path))
    assert (tmp_path / "precious" / "new").is_dir()
    assert len(list(tmp_path.glob(".out.*/mine.txt"))) == 6


@pytest.mark.hostile("local user", "files in and beside a build's folder, any umask", "kept; modes as ever")
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_an_artifact_has_the_same_modes_whatever_the_umask(umask, tmp_path, monkeypatch):
    before = os.umask(umask)
    try:
        for target in ("onnx-cpu", "coreml"):
            pipeline.export(load_plan("tiny", "int4-g32", target), None, tmp_path / target)
    finally:
        os.umask(before)
    modes = {
        (path.is_dir(), path.stat().st_mode & 0o777) for target in tmp_path.iterdir() for path in target.rglob("*")
    }
    assert modes == {(True, 0o755), (False, 0o644)}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_dir()} == {0o755}


# ── a checkout that cannot be written ───────────────────────────────────────────────────────────────────────────────


@LOCATION
def test_the_cache_moves_to_the_user_where_the_checkout_cannot_be_written(old, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkout").write_text("a file: nothing can be made below it, by root neither")
    monkeypatch.setattr(pipeline, "CACHE", tmp_path / "checkout" / "build" / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    pipeline.export(load_plan("tiny", "int4-g32", "onnx-cpu"), None, tmp_path / "out")
    assert manifest.read(tmp_path / "out").files == manifest.read(old).files
    assert [path.suffix for path in (tmp_path / "mine/llama-on-device").glob("q*")] == [".safetensors"]
    assert f"cannot be written; the cache is {tmp_path}/mine/llama-on-device" in capsys.readouterr().err.replace(
        "\n", ""
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "checkout"))
    refused(tmp_path / "again", "nor can .*; name a folder for the cache in XDG_CACHE_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # an unknown user
    refused(tmp_path / "again", "nor can ~/.cache/llama-on-device; name a folder for the cache in XDG_CACHE_HOME")


def test_a_tilde_is_the_home_and_never_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    export.build("tiny", "int4-g32", "onnx-cpu", out="~/out")
    assert manifest.read(tmp_path / "home" / "out").id == "tiny_int4-g32_onnx-cpu"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # an unknown user
    with pytest.raises(ExportError, match=r"^~/out: no home folder of that name is known; give the whole path$"):
        export.build("tiny", "int4-g32", "onnx-cpu", out="~/out")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_paths_that_are_not_utf8_are_refused_before_a_library_meets_them(tmp_path, monkeypatch):
    place = tmp_path / "p\udcff"
    place.mkdir()
    refused(place / "out", r"p\\udcff/out': not in the encoding utf-8; give it in UTF-8, a path renamed")
    (tmp_path / "link").symlink_to(place)
    for text in (place, tmp_path / "link", "."):
        monkeypatch.chdir(place)
        with pytest.raises(ExportError, match="not in the encoding utf-8"):
            parse_origin(str(text))
    assert names(place) == []


# ── full disk ───────────────────────────────────────────────────────────────────────────────────────────────────────


FULL = [
    # where, what of it is named, bytes that are left
    ({"after": "export.host.disk:require_room"}, "onnx-cpu", 4096),
    ({"after": "export.checkpoints.tokenizer:write"}, "onnx-cpu", 4096),
    *(({"at": "lower"}, target, 200_000) for target in TARGETS),
    ({"at": "describe"}, "onnx-cpu", 0),
]


@pytest.mark.reliability("a disk that fills up during a build", "one line, nothing left")
def test_a_disk_that_fills_up_at_any_moment_is_named_and_nothing_is_left(small_disk, cache, tmp_path, record_property):
    place = tmp_path / "disk"
    common = {"accident": "fill", "disk": str(place), "look": [str(place)]}
    orders = [order(place / "out", cache, target, **when, **common, leave=leave) for when, target, leave in FULL]
    orders.append(
        order(tmp_path / "out", place, after="export.quantization.store:_layer_info", leave=200_000, **common)
    )
    for wanted, result in zip(orders, small_disk(place, orders), strict=True):
        assert f"error: {place}: the disk is full (" in one_error(result["stderr"]), wanted
        assert (result["code"], without_locks(result["left"][str(place)])) == (1, []), wanted
    assert names(tmp_path) == ["disk"]
    record_property("cases", len(orders))


@pytest.mark.reliability("a disk too small for a build", "refused before the work")
def test_too_little_room_is_refused_before_the_work(small_disk, cache, tmp_path):
    place = tmp_path / "disk"
    common = {"accident": "fill", "disk": str(place), "look": [str(place)], "leave": 400_000}
    orders = [
        order(place / "out", cache, after="export.formats:load", **common),
        order(tmp_path / "out", place, at="quantize", **common),
    ]
    for result in small_disk(place, orders):
        error = one_error(result["stderr"])
        assert f"error: {place}: needs " in error
        assert "MB on the disk, has 0.4 MB; free " in error
        assert (result["code"], without_locks(result["left"][str(place)])) == (1, [])


@pytest.mark.reliability("a disk that takes no writing", "one line")
def test_a_disk_that_takes_no_writing(small_disk, cache, tmp_path):
    place = tmp_path / "disk"
    (result,) = small_disk(place, [order(place / "out", cache)], "ro")
    assert result["code"] == 1
    assert "Read-only file system" in one_error(result["stderr"])


@pytest.mark.reliability("a limit on file sizes", "one line, nothing left")
def test_a_limit_on_file_sizes_is_one_line(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    look = {"at": "nowhere", "look": [str(tmp_path)]}
    orders = [order(tmp_path / "out", tmp_path, quant=quant, **look) for quant in ("int4-g32", "fp32")]
    for result in results(*orders, preexec_fn=limit):
        assert "files are limited to 0.4 MB here (ulimit -f)" in one_error(result["stderr"])
        assert (result["code"], without_locks(result["left"][str(tmp_path)])) == (1, [])
