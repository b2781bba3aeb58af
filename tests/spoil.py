"""Whole checkpoints of every form, and ways to spoil one: small functions that change a file in its folder."""

import io
import json
import os
import struct
import zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .checkpoints import (
    SMALL,
    set_config,
    weights,
    write_bnb,
    write_folder,
    write_gguf,
    write_gptq,
    write_jlama,
    write_meta,
    write_raw,
)

LAYER = "model.layers.0."
UP = f"{LAYER}mlp.up_proj"
FILE, INDEX, GGUF, PTH = "model.safetensors", "model.safetensors.index.json", "model.gguf", "consolidated.00.pth"
ADAPTER, ADAPTER_FILE, ADAPTER_CONFIG = "adapter", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
MARKER = "was-executed"
"""What a hostile pickle leaves in the current folder when it is executed."""


# ── whole checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────


def write_lora(folder):
    """A folder with an adapter, by hand, of rank 4 for two linears in a folder of its own."""
    write_folder(folder)
    (folder / ADAPTER).mkdir()
    shapes, tensors = SMALL.linear_shapes(), {}
    for module in ("self_attn.q_proj", "mlp.up_proj"):
        rows, columns = shapes[f"{LAYER}{module}.weight"]
        generator = torch.Generator().manual_seed(1)
        tensors[lora(module, "A")] = torch.randn(4, columns, generator=generator)
        tensors[lora(module, "B")] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, folder / ADAPTER_FILE)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields))
    return folder


def lora(module, which):
    return f"base_model.model.{LAYER}{module}.lora_{which}.weight"


def write_gptq_folder(folder):
    """Every linear in GPTQ's format, symmetric."""
    linears = {}
    for name, (rows, columns) in SMALL.linear_shapes().items():
        generator = torch.Generator().manual_seed(len(name))
        codes = torch.randint(0, 16, (rows, columns), generator=generator)
        zeros, scales = torch.full((rows, columns // 32), 8), torch.full((rows, columns // 32), 0.01).half()
        linears[name] = (codes, zeros, scales, torch.arange(columns) // 32)
    return write_gptq(folder, linears)


def write_torchao(folder):
    """One linear as torchao's integers, by hand."""
    write_folder(folder)
    tensors = {name: weight.bfloat16() for name, weight in weights().items() if name != f"{UP}.weight"}
    rows, columns = SMALL.linear_shapes()[f"{UP}.weight"]
    tensors |= {
        f"{UP}._weight_qdata": torch.ones(rows, columns, dtype=torch.int8),
        f"{UP}._weight_scale": torch.full((rows, columns // 32), 0.01),
        f"{UP}._weight_zero_point": torch.zeros(rows, columns // 32, dtype=torch.int8),
    }
    save_file(tensors, folder / FILE, {f"{UP}.weight": json.dumps(TORCHAO)})
    set_config(folder, quantization_config={"quant_method": "torchao"})
    return folder


TORCHAO = {
    "_type": "IntxUnpackedToInt8Tensor",
    "_data": {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": [1, 32]},
    "_tensor_data_names": ["qdata", "scale", "zero_point"],
}


def in_folder(write):
    """A form that is one file."""

    def run(folder):
        folder.mkdir(parents=True)
        write(folder)

    return run


FORMS = {
    "safetensors": write_folder,
    "shards": lambda folder: write_folder(folder, shards=2),
    "gguf": in_folder(lambda folder: write_gguf(folder / GGUF)),
    "gguf q8": in_folder(lambda folder: write_gguf(folder / GGUF, kind="Q8_0")),
    "jq4": write_jlama,
    "bitsandbytes": write_bnb,
    "gptq": write_gptq_folder,
    "torchao": write_torchao,
    "meta": in_folder(write_meta),
    "lora": write_lora,
}


def arguments(form, folder):
    """What the command is given for a checkpoint of a form."""
    place = folder / GGUF if form.startswith("gguf") else folder
    return ["--source", str(place), *(["--adapter", str(folder / ADAPTER)] if form == "lora" else [])]


# ── ways to spoil one ───────────────────────────────────────────────────────────────────────────────────────────────


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
    """A safetensors header, changed: an object, or the bytes to write instead."""

    def run(folder):
        data = (folder / name).read_bytes()
        length = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + length])
        write_raw(folder / name, change(value) or value, data[8 + length :])

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
        found = load_file(folder / name)
        change(found)
        save_file({key: value.contiguous().clone() for key, value in found.items()}, folder / name, notes)

    return run


def metadata(text):
    """What torchao's metadata says of its one weight."""

    def run(folder):
        save_file(load_file(folder / FILE), folder / FILE, {f"{UP}.weight": text})

    return run


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


def gguf(tensors, keys, body=b""):
    return put(GGUF, b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)


def key(kind, body, name=b"k"):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + body


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

    def run(found):
        told = json.loads(bytes(found[name].tolist()))
        text = change(told)
        text = json.dumps(told).encode() if text is None else text
        found[name] = torch.tensor(list(text), dtype=torch.uint8)

    return tensors(run)


class Execute:
    """A pickle that runs a shell command when it is opened."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def saved(value):
    return lambda folder: torch.save(value, folder / PTH)


def archive(change, compression=zipfile.ZIP_STORED):
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
        found = torch.load(folder / PTH, weights_only=True)
        change(found)
        torch.save(found, folder / PTH)

    return run


def fill(name, value):
    return lambda found: found[name].fill_(value)


def resize(name, *shape):
    return lambda found: found.update({name: torch.ones(shape, dtype=found[name].dtype)})


def rename(old, new):
    return lambda found: found.update({new: found.pop(old)})


def set_quantization(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    set_config(folder, quantization_config=fields | changes)


def nan_at(data, name):
    """A NaN at the beginning of a tensor's data."""
    length = int.from_bytes(data[:8], "little")
    at = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    return data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :]
