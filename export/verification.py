"""Whether an artifact folder is what its manifest says: findings, one line each, an empty list where nothing is wrong.

Not found here: a manifest that was rewritten together with the files, unless the folder is signed and the key given,
and integers that were chosen otherwise (validation compares them with the quantizer's).
"""

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from . import manifest, readers, schemes, signing
from .cli import describe
from .errors import ExportError
from .manifest import LayerInfo, Manifest

WORKER = (sys.executable, "-m", "export.model_checks")


def verify(folder: Path, limit_s: float, public_key: Path | None = None) -> list[str]:
    """Everything that is wrong. Files outside the folder are never opened; the model is read in a child process.

    With a key the signature is judged first, and what it does not cover is not read at all.
    """
    if found := list(strays(folder)):
        return found
    if public_key and (found := list(signing.differences(folder, public_key))):
        return found
    try:
        described = manifest.read(folder)
    except (ExportError, OSError) as error:
        return [describe(error)]
    if found := list(escapes(folder, described)):
        return found
    try:
        found = [*differing_files(folder, described), *contradictions(described)]
    except OSError as error:
        return [describe(error)]
    return found + in_child(folder, limit_s)


def require_whole(folder: Path) -> None:
    """Refuse a folder whose files are not those of its manifest; the model itself is not read."""
    if found := list(strays(folder)):
        raise ExportError(found[0])
    if found := list(differing_files(folder, manifest.read(folder))):
        raise ExportError(f"{found[0]}; build the artifact again")


def about_signature(folder: Path, public_key: Path | None) -> str:
    """The end of the line that says that all is well; without a key nobody is asked."""
    if public_key:
        return f", and as signed with {public_key}"
    return f"; {manifest.SIGNATURE} was not checked (give --key)" if (folder / manifest.SIGNATURE).exists() else ""


def strays(folder: Path) -> Iterator[str]:
    """Links, pipes and devices: an artifact holds files and folders only."""
    for place, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                yield f"{path}: a link; an artifact holds files only"
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                yield f"{path}: neither a file nor a folder"


def escapes(folder: Path, described: Manifest) -> Iterator[str]:
    """File names of the manifest that lead elsewhere."""
    for name in described.files:
        if why := readers.outside(folder, name):
            yield f"{manifest.FILE}: file {name!r} {why}"


def differing_files(folder: Path, described: Manifest) -> Iterator[str]:
    """Files missing, changed, or beside those listed."""
    found = manifest.hash_files(folder)
    for name, info in described.files.items():
        if name not in found:
            yield f"{folder / name}: missing"
        elif found[name].bytes != info.bytes:
            yield f"{folder / name}: {found[name].bytes} bytes, {manifest.FILE} says {info.bytes}"
        elif found[name] != info:
            yield f"{folder / name}: differs from {manifest.FILE} (sha256)"
    for name in sorted(found.keys() - described.files.keys()):
        yield f"{folder / name}: not listed in {manifest.FILE}"


def contradictions(described: Manifest) -> Iterator[str]:
    """Parts of a manifest that cannot be true together."""
    a, kv, plan = described.architecture, described.contract.kv, described.plan
    pairs = (
        ("id", described.id, plan.id),
        ("contract.kv.layers", kv.layers, a.num_hidden_layers),
        ("contract.kv.kv_heads", kv.kv_heads, a.num_key_value_heads),
        ("contract.kv.head_dim", kv.head_dim, a.head_dim),
        ("contract.kv.context_length", kv.context_length, plan.model.context_length),
        ("contract.logits", described.contract.logits, plan.target.logits),
    )
    yield from (f"{manifest.FILE}: {name} is {said!r}, expected {due!r}" for name, said, due in pairs if said != due)
    artifact = plan.target.artifact
    if not any(name == artifact or name.startswith(f"{artifact}/") for name in described.files):
        yield f"{manifest.FILE}: files do not hold {artifact!r}, the artifact of the target"
    yield from wrong_layers(described)


def wrong_layers(described: Manifest) -> Iterator[str]:
    """Quantized layers that the recipe does not give, or not in that scheme."""
    a, recipe = described.architecture, described.plan.quant
    due = schemes.of_recipe(recipe, a)
    layers = {layer.name: layer for layer in described.quantization.layers}
    for name in sorted(layers.keys() ^ set(due.names)):
        missing = "missing" if name in due.names else "not quantized by the recipe"
        yield f"{manifest.FILE}: quantization.layers: {name}: {missing}"
    for name, layer in layers.items():
        options = [due.of(name)]
        if recipe.promotion and name in a.linear_shapes():
            options.append(recipe.promotion.scheme)
        columns = a.tensor_shapes().get(name, (0,))[-1]
        allowed = [(one.bits, one.group_size or columns) for one in options if one]
        if allowed and (layer.bits, layer.group_size) not in allowed:
            yield f"{manifest.FILE}: {name}: {in_words(layer)} is not a scheme of the recipe"


def in_words(layer: LayerInfo) -> str:
    """`int4 in groups of 32`."""
    return f"int{layer.bits} in groups of {layer.group_size}"


def in_child(folder: Path, limit_s: float) -> list[str]:
    """What `model_checks` finds; a crash of a library or no end is a finding too."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [*WORKER, str(folder.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=manifest.ROOT,
            start_new_session=True,  # what it starts can be ended with it
        )
        try:
            child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return [f"{folder}: the model could not be read within {limit_s:g} s"]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return answer(folder, child.returncode, last_line(out), last_line(err))


def answer(folder: Path, code: int, out: str, err: str) -> list[str]:
    """The child's findings, a JSON list in its last line, or how it ended instead."""
    if code < 0:
        return [f"{folder}: reading the model ended by {signal.Signals(-code).name}"]
    try:
        found = json.loads(out)
    except json.JSONDecodeError:
        found = None
    if code or not isinstance(found, list):
        return [f"{folder}: the model could not be read: exit {code}: {err or 'no message'}"]
    return [str(one) for one in found]


def last_line(file: IO[bytes]) -> str:
    """Of what a child has written."""
    file.seek(0)
    lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
