"""Whether an artifact folder is what its manifest says: one line for each finding.

Not detected here: a manifest that was rewritten together with the files, unless the folder is signed and the key given,
and integers that another quantizer chose (validation compares them with ours).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from export import manifest
from export.build.command import describe
from export.errors import ExportError
from export.formats import admission
from export.host import processes
from export.manifest import Manifest
from export.quantization import schemes

from . import provenance, signature

WORKER = processes.python("export.toolbox.model_checks")


def verify(folder: Path, limit_s: float, public_key: Path | None = None) -> list[str]:
    """Everything that is wrong. Files outside the folder are never opened.

    The model is read in a child process, once the rest is as it should.

    With a key the signature is checked first, and a folder that fails is not read further; then its provenance.
    """
    if strays := list(manifest.strays(folder)):
        return strays
    if public_key and (differences := list(signature.differences(folder, public_key))):
        return differences
    try:
        described = manifest.read(folder)
    except (ExportError, OSError) as error:
        return [describe(error)]
    try:
        findings = [*admission.files(folder, described), *_wrong_layers(described)]
        if public_key:
            findings += provenance.differences(folder, described, public_key)
    except OSError as error:
        return [describe(error)]
    return findings or in_child(folder, limit_s)


def about_signature(folder: Path, public_key: Path | None) -> str:
    """The end of the line that reports a whole artifact: whether its signature was checked."""
    there = [name for name in (manifest.SIGNATURE, manifest.PROVENANCE) if (folder / name).exists()]
    if public_key:
        without = "" if manifest.PROVENANCE in there else ", without a provenance"
        return f", and as signed with {public_key}{without}"
    return f"; {there[0]} was not checked (give --key)" if there else ""


def _wrong_layers(described: Manifest) -> Iterator[str]:
    """Quantized layers that the recipe does not quantize, or not in that scheme.

    With a recipe that keeps a checkpoint's integers, the checkpoint decides which weights stay float.
    """
    a, recipe = described.architecture, described.plan.quant
    expected = schemes.of_recipe(recipe, a)
    layers = {layer.name: layer for layer in described.quantization.layers}
    missing = set() if recipe.method == "kept" else set(expected.names) - layers.keys()
    for name in sorted(missing | (layers.keys() - set(expected.names))):
        reason = "missing" if name in missing else "not quantized by the recipe"
        yield f"{manifest.FILE}: quantization.layers: {name}: {reason}"
    for name, layer in layers.items():
        options = [expected.of(name)]
        if recipe.promotion and name in a.linear_shapes():
            options.append(recipe.promotion.scheme)
        columns = a.tensor_shapes().get(name, (0,))[-1]
        allowed = [(scheme.bits, scheme.group_size or columns) for scheme in options if scheme]
        if allowed and (layer.bits, layer.group_size) not in allowed:
            stored = f"int{layer.bits} in groups of {layer.group_size}"
            yield f"{manifest.FILE}: {name}: {stored} is not a scheme of the recipe"


def in_child(folder: Path, limit_s: float) -> list[str]:
    """Findings of `model_checks`, a JSON list in its last line; a crash of a library or a timeout is a finding too."""
    try:
        child = processes.run([*WORKER, str(folder.resolve())], cwd=manifest.ROOT, limit_s=limit_s)
    except TimeoutError:
        return [f"{folder}: the model could not be read within {limit_s:g} s"]
    code = child.returncode
    if code < 0:
        return [f"{folder}: reading the model ended by {processes.signal_name(-code)}"]
    try:
        findings = json.loads(processes.last_line(child.out))
    except (ValueError, RecursionError):
        findings = None
    if code or not isinstance(findings, list):
        return [f"{folder}: the model could not be read: exit {code}: {child.last_words or 'no message'}"]
    return [str(finding) for finding in findings]
