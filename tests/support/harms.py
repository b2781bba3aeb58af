"""Ways to spoil a file: changes of a checkpoint in its folder, and cuts and flipped bits, the same in every run."""

import io
import json
import os
import random
import struct
import zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import FILE, GGUF, INDEX, PTH, UP, set_config, write_gguf, write_raw

MARKER = "was-executed"
"""A file that a hostile pickle leaves in the working folder when it is executed."""


# ── one change ──────────────────────────────────────────────────────────────────────────────────────────────────────


def put(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def edit(name, change):
    """A file's bytes, changed."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def cut(name, part):
    return edit(name, lambda data: data[: int(len(data) * part)])


def remove(name):
    return lambda folder: (folder / name).unlink()


def link(name, target):
    """The file is a link instead."""

    def run(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return run


def fields(name, **changes):
    """Keys of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def raw(header, data=b"", length=None, name=FILE):
    """A safetensors file by hand."""
    return lambda folder: write_raw(folder / name, header, data, length)


def header(change, name=FILE):
    """A safetensors header, changed in place, or written as the bytes that `change` gives; the data stays."""

    def run(folder):
        data = (folder / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + length])
        changed = change(value)
        write_raw(folder / name, changed if isinstance(changed, bytes) else value, data[8 + length :])

    return run


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def twice(value):
    """The header's last name, written a second time."""
    name, fields = next(reversed(value.items()))
    return json.dumps(value).encode()[:-1] + f", {json.dumps(name)}: {json.dumps(fields)}}}".encode()


def tensors(change, name=FILE):
    """A safetensors file's tensors."""

    def run(folder):
        with safe_open(folder / name, framework="pt") as file:
            notes = file.metadata()
        stored = load_file(folder / name)
        change(stored)
        save_file({key: value.contiguous().clone() for key, value in stored.items()}, folder / name, notes)

    return run


def metadata(text):
    """torchao's metadata about its one weight."""
    return lambda folder: save_file(load_file(folder / FILE), folder / FILE, {f"{UP}.weight": text})


def index(change):
    """The shards' weight map."""

    def run(folder):
        value = json.loads((folder / INDEX).read_text())
        change(value["weight_map"])
        (folder / INDEX).write_text(json.dumps(value))

    return run


def points_at(file):
    return index(lambda names: names.update({"model.norm.weight": file}))


def repeated_key(folder):
    text = (folder / INDEX).read_text().rstrip("}")
    (folder / INDEX).write_text(text + ', "model.norm.weight": "model-0.safetensors"}}')


def claim(tensors, keys, body=b""):
    """A GGUF by hand that says how many tensors and keys it has."""
    return put(GGUF, b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)


def key(kind, body):
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + body


def gguf_key(name, **values):
    """Written by the library with another value."""
    return lambda folder: write_gguf(folder / GGUF, extra={name.replace("__", "."): values["is_"]})


def gguf_info(name, at, kind, value):
    """A number behind a tensor's name; a matrix has dimensions, two sizes, type, offset."""

    def change(data):
        data = bytearray(data)
        start = data.index(name) + len(name)
        struct.pack_into(kind, data, start + at, value)
        return bytes(data)

    return edit(GGUF, change)


def flip(name, at, bit):
    return edit(name, lambda data: data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])


def state(change):
    """The quant state of one bitsandbytes weight: its fields, or its bytes."""
    name = f"{UP}.weight.quant_state.bitsandbytes__nf4"

    def run(stored):
        quant_state = json.loads(bytes(stored[name].tolist()))
        text = change(quant_state)
        text = json.dumps(quant_state).encode() if text is None else text
        stored[name] = torch.tensor(list(text), dtype=torch.uint8)

    return tensors(run)


class Execute:
    """A pickle that runs a shell command when it is opened."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def saved(value, **options):
    return lambda folder: torch.save(value, folder / PTH, **options)


def archive(change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The records of a file of torch.save."""

    def run(folder):
        with zipfile.ZipFile(folder / PTH) as file:
            records = {name: file.read(name) for name in file.namelist()}
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", compression) as file:
            for name, data in records.items():
                if (changed := change(name, data)) is not None:
                    file.writestr(name, changed)
        (folder / PTH).write_bytes(made.getvalue())

    return run


def meta_tensors(change):
    def run(folder):
        stored = torch.load(folder / PTH, weights_only=True)
        change(stored)
        torch.save(stored, folder / PTH)

    return run


def fill(name, value):
    return lambda stored: stored[name].fill_(value)


def resize(name, *shape):
    return lambda stored: stored.update({name: torch.ones(shape, dtype=stored[name].dtype)})


def rename(old, new):
    return lambda stored: stored.update({new: stored.pop(old)})


def set_quantization(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    set_config(folder, quantization_config=fields | changes)


def nan_at(data, name):
    """A NaN at the beginning of a tensor's data."""
    length = int.from_bytes(data[:8], "little")
    at = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    return data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :]


# ── cuts and bits ───────────────────────────────────────────────────────────────────────────────────────────────────


def model_files(folder, described):
    """Graph and weight files of an artifact."""
    artifact = described.plan.target.artifact
    return [folder / name for name in sorted(described.files) if name.startswith(artifact)]


def cuts(data, count):
    """Beginnings of a file: none of it, a byte less, and evenly spread lengths between."""
    yield from (data[: len(data) * i // (count - 1)] for i in range(count - 1))
    yield data[:-1]


def bit_flips(data, count, choose):
    """Copies with one bit flipped; half of those in the first kilobytes, where most of the structure is."""
    for i in range(count):
        at = choose.randrange(min(len(data), 3000) if i % 2 else len(data))
        yield data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]


def damaged_files(paths, cut, flipped):
    """Yields `cut` or `flipped`, the file and its damaged bytes; the numbers are shared out evenly over the files."""
    choose = random.Random(7)
    for path in paths:
        whole = path.read_bytes()
        yield from (("cut", path, data) for data in cuts(whole, -(-cut // len(paths))))
        yield from (("flipped", path, data) for data in bit_flips(whole, -(-flipped // len(paths)), choose))
