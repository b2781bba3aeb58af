"""A catalogue of malformed checkpoints: name → the form it spoils, how, and the words its one line must hold.

`write(name, pristine, place)` makes one; `pristine` holds a whole checkpoint of every form.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Mistake:
    """One malformed checkpoint."""

    form: str
    spoil: Callable[[Path], object]
    """Given the folder of a whole checkpoint."""
    words: str
    """A regular expression: file, field or tensor, and what is wrong."""


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


def write(name, pristine, place):
    """One malformed checkpoint; what the command is given for it."""
    mistake = CATALOGUE[name]
    folder = shutil.copytree(pristine / mistake.form, place)
    mistake.spoil(folder)
    return arguments(mistake.form, folder)


# ── ways to spoil ───────────────────────────────────────────────────────────────────────────────────────────────────


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


QMAP, ABSMAX = f"{UP}.weight.quant_map", f"{UP}.weight.absmax"
LORA_A, LORA_B = lora("mlp.up_proj", "A"), lora("mlp.up_proj", "B")
DAMAGED = r"model\.safetensors: damaged safetensors"

SAFETENSORS = {
    "empty file": (put(FILE, b""), DAMAGED),
    "seven bytes": (put(FILE, bytes(7)), DAMAGED),
    "header of 2^63 bytes": (raw({}, length=2**63), DAMAGED),
    "header of -1 bytes": (raw({}, length=2**64 - 1), DAMAGED),
    "header of 90 MB in a small file": (raw({}, length=90_000_000), DAMAGED),
    "header of 0 bytes": (raw(b""), DAMAGED),
    "header not UTF-8": (raw(b'{"\xff\xfe": 1}'), DAMAGED),
    "header not JSON": (raw(b"{not json}"), DAMAGED),
    "header a list": (raw([1]), DAMAGED),
    "header nested 100000 deep": (raw(b'{"a":' * 100_000), DAMAGED),
    "header with a name twice": (header(twice), r"model\.safetensors: .*twice"),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), DAMAGED),
    "hole": (raw({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)), DAMAGED),
    "offsets beyond the data": (raw({"a": entry([4], 0, 16)}, bytes(8)), DAMAGED),
    "offsets negative": (raw({"a": entry([2], -8, 0)}, bytes(8)), DAMAGED),
    "offsets backwards": (raw({"a": entry([2], 8, 0)}, bytes(8)), DAMAGED),
    "offsets in words": (raw({"a": entry([2], "0", "8")}, bytes(8)), DAMAGED),
    "unknown dtype": (raw({"a": entry([2], 0, 8, "F33")}, bytes(8)), DAMAGED),
    "shape and bytes differ": (raw({"a": entry([3], 0, 8)}, bytes(8)), DAMAGED),
    "shape of 2^80": (raw({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)), DAMAGED),
    "shape negative": (raw({"a": entry([-2], 0, 8)}, bytes(8)), DAMAGED),
    "bytes behind the last tensor": (edit(FILE, lambda data: data + b"x"), DAMAGED),
    "cut in the data": (cut(FILE, 0.9), DAMAGED),
    "metadata that is no text": (raw({"__metadata__": {"a": [1]}}), DAMAGED),
    "a pickle under its name": (put(FILE, pickle.dumps(Execute())), DAMAGED),
    "a pickle instead": (
        lambda folder: (folder / FILE).rename(folder / "pytorch_model.bin"), "pickled weights are never loaded",
    ),
    "integers as weights": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(64).int()})), "norm.weight is torch.int32",
    ),
    "a tensor missing": (tensors(lambda t: t.pop("model.norm.weight")), "tensors are missing: model.norm.weight"),
    "a tensor too many": (tensors(rename("model.norm.weight", "model.x")), "tensors are missing"),
    "NaN": (tensors(fill("model.norm.weight", float("nan"))), "model.norm.weight holds NaN"),
    "infinity": (tensors(fill(f"{UP}.weight", float("inf"))), "up_proj.weight holds NaN or infinity"),
    "config.json nested": (put("config.json", b'{"a": ' * 100_000), r"config\.json: not valid JSON"),
    "config.json with a key twice": (
        edit("config.json", lambda data: b'{"hidden_size": 128,' + data[1:]), r"config\.json: .*hidden_size.*twice",
    ),
    "config.json of a billion layers": (fields("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "config.json of 2^40 tokens": (fields("config.json", vocab_size=2**40), "vocab_size|embed_tokens|memory"),
    "config.json with NaN": (fields("config.json", rms_norm_eps=float("nan")), "rms_norm_eps"),
    "tokenizer.json cut": (cut("tokenizer.json", 0.5), "tokenizer files do not load"),
    "tokenizer.json gone": (remove("tokenizer.json"), r"tokenizer\.json: missing"),
}  # fmt: skip
SHARDS = {
    "shard missing": (remove("model-1.safetensors"), r"model-1\.safetensors: missing"),
    "shard cut": (cut("model-1.safetensors", 0.5), r"model-1\.safetensors: damaged"),
    "shard linked to itself": (link("model-1.safetensors", "model-1.safetensors"), r"model-1\.safetensors: missing"),
    "shard linked out, no weights": (link("model-1.safetensors", __file__), r"model-1\.safetensors: damaged"),
    "shard linked to endless zeros": (link("model-1.safetensors", "/dev/zero"), r"model-1\.safetensors: missing"),
    "index names a file above": (points_at("../model-0.safetensors"), "not at a .safetensors file beside it"),
    "index names an absolute path": (points_at("/etc/passwd"), "not at a .safetensors file beside it"),
    "index names itself": (points_at(INDEX), "not at a .safetensors file beside it"),
    "index names no text": (points_at(["model-0.safetensors"]), "not at a .safetensors file beside it"),
    "index names a NUL byte": (points_at("a\0.safetensors"), "model-0|a.*safetensors"),
    "index names one shard for all": (
        index(lambda names: names.update(dict.fromkeys(names, "model-0.safetensors"))), "tensors differ from",
    ),
    "index names a tensor that is nowhere": (
        index(lambda names: names.update({"model.x": "model-0.safetensors"})), "tensors differ from .*model.x",
    ),
    "index with a tensor twice": (repeated_key, r"index\.json: .*model\.norm\.weight.*twice"),
    "index without a map": (put(INDEX, b"{}"), "no `weight_map`"),
    "index cut": (cut(INDEX, 0.5), r"index\.json: not valid JSON"),
}  # fmt: skip
BAD_GGUF = r"model\.gguf: damaged GGUF"
GGUF_FILES = {
    "cut to three bytes": (put(GGUF, b"GGU"), BAD_GGUF),
    "cut behind the counts": (edit(GGUF, lambda data: data[:24]), BAD_GGUF),
    "cut in the keys": (edit(GGUF, lambda data: data[:200]), BAD_GGUF),
    "cut in the tensor list": (
        edit(GGUF, lambda data: data[: data.index(b"blk.0.ffn_up.weight") + 30]), BAD_GGUF,
    ),
    "cut in the data": (cut(GGUF, 0.7), r"model\.gguf: "),
    "magic flipped": (flip(GGUF, 0, 3), BAD_GGUF),
    "version flipped": (flip(GGUF, 4, 3), BAD_GGUF),
    "tensor count flipped high": (flip(GGUF, 15, 6), BAD_GGUF),
    "tensor count flipped low": (flip(GGUF, 8, 0), r"model\.gguf: "),
    "key count flipped high": (flip(GGUF, 23, 6), BAD_GGUF),
    "key count flipped low": (flip(GGUF, 16, 0), r"model\.gguf: "),
    "value type flipped": (
        edit(GGUF, lambda data: data.replace(b"llama.block_count\x04", b"llama.block_count\x84")), BAD_GGUF,
    ),
    "string of 2^63 bytes": (gguf(0, 1, key(8, struct.pack("<Q", 2**63))), BAD_GGUF),
    "key name of 2^62 bytes": (gguf(0, 1, struct.pack("<Q", 2**62)), BAD_GGUF),
    "array of 2^60 numbers": (gguf(0, 1, key(9, struct.pack("<IQ", 4, 2**60))), BAD_GGUF),
    "array of 2^60 strings": (gguf(0, 1, key(9, struct.pack("<IQ", 8, 2**60)) + bytes(64)), BAD_GGUF),
    "arrays in arrays": (gguf(0, 1, key(9, struct.pack("<IQ", 9, 1) * 10_000)), BAD_GGUF),
    "2^32 dimensions": (gguf_info(b"blk.0.ffn_up.weight", 0, "<I", 2**32 - 1), BAD_GGUF),
    "dimensions of 2^63": (gguf_info(b"blk.0.ffn_up.weight", 4, "<Q", 2**63), r"model\.gguf: "),
    "dimensions of 0": (gguf_info(b"blk.0.ffn_up.weight", 4, "<Q", 0), "tensor blk.0.ffn_down.weight begins at"),
    "unknown element type": (gguf_info(b"blk.0.ffn_up.weight", 20, "<I", 999), BAD_GGUF),
    "element type that is no weight": (gguf_info(b"blk.0.ffn_up.weight", 20, "<I", 26), "ffn_up.weight|damaged"),
    "tensor beyond the file": (gguf_info(b"blk.0.ffn_up.weight", 24, "<Q", 2**40), r"model\.gguf: "),
    "tensor at 2^64 - 1": (gguf_info(b"blk.0.ffn_up.weight", 24, "<Q", 2**64 - 1), r"model\.gguf: "),
    "two tensors in one place": (gguf_info(b"blk.0.ffn_up.weight", 24, "<Q", 0), r"ffn_up\.weight .*begins at"),
    "alignment 0": (gguf_key("general.alignment", is_=0), BAD_GGUF),
    "alignment 3": (gguf_key("general.alignment", is_=3), BAD_GGUF),
    "alignment in words": (gguf_key("general.alignment", is_="32"), BAD_GGUF),
    "alignment other than written": (gguf_key("general.alignment", is_=4096), r"model\.gguf: "),
    "a tensor's name twice": (
        edit(GGUF, lambda data: data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")), BAD_GGUF,
    ),
    "a tensor's name not UTF-8": (
        edit(GGUF, lambda data: data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_\xff.weight")), BAD_GGUF,
    ),
    "a key twice": (
        edit(GGUF, lambda data: data.replace(b"llama.embedding_length", b"llama.context_length\0\0", 1)),
        r"model\.gguf: ",
    ),
    "NaN": (edit(GGUF, lambda data: data[:-4] + struct.pack("<f", float("nan"))), "holds NaN or infinity"),
}  # fmt: skip
JQ4 = {
    "scales missing": (header(lambda h: h.update({f"{UP}.bias": h.pop(f"{UP}.weight.qb")})), "up_proj.weight.*qb"),
    "scales of another shape": (
        header(lambda h: h[f"{UP}.weight.qb"].update(shape=[64, 4])), "up_proj.weight.qb is F32 of shape",
    ),
    "scales of nothing": (
        header(lambda h: h.update({"model.x.qb": h.pop(f"{UP}.weight.qb")})), "scales of no quantized tensor|missing",
    ),
    "scales as integers": (header(lambda h: h[f"{UP}.weight.qb"].update(dtype="I8")), DAMAGED),
    "NaN scales": (
        edit(FILE, lambda data: nan_at(data, f"{UP}.weight.qb")), "up_proj.weight holds NaN",
    ),
    "codes of another shape": (header(lambda h: h[f"{UP}.weight"].update(shape=[64, 128])), "up_proj.weight.qb is F32"),
    "rows of no whole block": (header(lambda h: h[f"{UP}.weight"].update(shape=[512, 16])), "no rows of blocks of 32"),
    "unknown dtype Q5": (header(lambda h: h[f"{UP}.weight"].update(dtype="Q5")), DAMAGED),
    "a name twice": (header(twice), r"model\.safetensors: .*twice"),
    "cut": (cut(FILE, 0.8), DAMAGED),
    "bytes behind": (edit(FILE, lambda data: data + bytes(32)), DAMAGED),
    "overlapping": (header(lambda h: h[f"{UP}.weight"].update(data_offsets=[0, 4096])), DAMAGED),
    "header nested": (raw(b'{"a.qb":' * 10_000), DAMAGED),
    "header of 2^63 bytes": (raw(b'"a.qb"', length=2**63), DAMAGED),
}  # fmt: skip
BITSANDBYTES = {
    "state cut": (state(lambda told: json.dumps(told).encode()[:-20]), "quant_state.* is not valid JSON"),
    "state no JSON": (state(lambda told: b"\x80\x04K\x01."), "quant_state.* is not valid JSON"),
    "state with a key twice": (
        state(lambda told: b'{"blocksize": 128,' + json.dumps(told).encode()[1:]),
        "quant_state.*'blocksize' is there twice",
    ),
    "state nested": (state(lambda told: b"[" * 4000), "quant_state.* is not valid JSON"),
    "state missing": (
        tensors(lambda t: t.pop(f"{UP}.weight.quant_state.bitsandbytes__nf4")),
        "quant_state.* is missing",
    ),
    "wrong blocksize": (state(lambda told: told.update(blocksize=128)), "up_proj.weight.absmax has"),
    "blocksize 0": (state(lambda told: told.update(blocksize=0)), "blocksize"),
    "shape of 2^124": (state(lambda told: told.update(shape=[2**62, 2**62])), "up_proj.weight.absmax has"),
    "nested state missing": (tensors(lambda t: t.pop(f"{UP}.weight.nested_absmax")), "nested_absmax is missing"),
    "nested settings missing": (state(lambda told: told.pop("nested_offset") and None), "nested_offset"),
    "codes cut": (tensors(lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:-1]})), "up_proj.weight has"),
    "absmax cut": (tensors(lambda t: t.update({ABSMAX: t[ABSMAX][:-1]})), "absmax has"),
    "map of 15": (tensors(lambda t: t.update({QMAP: t[QMAP][:-1]})), "quant_map has 15"),
    "NaN in the map": (tensors(fill(QMAP, float("nan"))), "up_proj.weight holds NaN"),
}
META = {
    "a pickle that runs a command": (saved({"norm.weight": Execute()}), r"consolidated\.00\.pth: .*asks for posix"),
    "the same before zip": (put(PTH, pickle.dumps(Execute())), r"consolidated\.00\.pth: not a checkpoint"),
    "a pickle cut": (
        archive(lambda name, data: data[:-40] if name.endswith("data.pkl") else data), "not a checkpoint",
    ),
    "zip cut": (cut(PTH, 0.6), r"consolidated\.00\.pth: .*zip archive"),
    "a zip bomb": (
        archive(lambda name, data: bytes(2**27) if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "a pickle of megabytes": (
        archive(lambda name, data: b"\x80\x02" + b"N0" * 1_250_000 + b"}." if name.endswith("data.pkl") else data),
        "data.pkl of at most",
    ),
    "a record lost": (archive(lambda name, data: None if name.endswith("/data/3") else data), "not a checkpoint"),
    "empty file": (put(PTH, b""), r"consolidated\.00\.pth: not a checkpoint"),
    "no weights": (remove(PTH), r"consolidated\.00\.pth: missing"),
    "params.json missing": (remove("params.json"), r"config\.json: missing"),
    "params.json lies about width": (fields("params.json", dim=128), "the architecture needs|tensors"),
    "params.json lies about layers": (fields("params.json", n_layers=2), "tensors are missing"),
    "params.json with 0 heads": (fields("params.json", n_heads=0), "params.json: n_heads"),
    "params.json of 10^400": (fields("params.json", dim=10**400), "params.json: "),
    "params.json nested": (put("params.json", b'{"dim": ' * 50_000), "params.json: not valid JSON"),
    "tokenizer.model missing": (remove("tokenizer.model"), r"tokenizer\.model: missing"),
    "NaN": (meta_tensors(fill("norm.weight", float("nan"))), "model.norm.weight holds NaN"),
}  # fmt: skip
LORA = {
    "wrong shape of A": (tensors(resize(LORA_A, 4, 65), ADAPTER_FILE), "lora_A.weight has shape"),
    "wrong shape of B": (tensors(resize(LORA_B, 4, 128), ADAPTER_FILE), "lora_B.weight has shape"),
    "an unknown module": (
        tensors(rename(LORA_A, LORA_A.replace("up_proj", "x_proj")), ADAPTER_FILE), "x_proj.* changes nothing",
    ),
    "a layer beyond the last": (
        tensors(rename(LORA_A, LORA_A.replace("layers.0", "layers.9")), ADAPTER_FILE), "layers.9.* changes nothing",
    ),
    "B missing": (tensors(lambda t: t.pop(LORA_B), ADAPTER_FILE), "lora_B.weight"),
    "r 0": (fields(ADAPTER_CONFIG, r=0), r"adapter_config\.json: r: "),
    "r of 10^30": (fields(ADAPTER_CONFIG, r=10**30), r"adapter_config\.json: r: "),
    "r other than the matrices": (fields(ADAPTER_CONFIG, r=8), "rank 8 need"),
    "alpha infinite": (fields(ADAPTER_CONFIG, lora_alpha=float("inf")), r"adapter_config\.json: lora_alpha"),
    "NaN": (tensors(fill(LORA_A, float("nan")), ADAPTER_FILE), "up_proj.weight holds NaN"),
    "an endless pattern": (
        fields(ADAPTER_CONFIG, rank_pattern={"(a+)+$": 4}), "is no plain name of modules",
    ),
    "config missing": (remove(ADAPTER_CONFIG), r"adapter_config\.json: missing"),
    "config cut": (cut(ADAPTER_CONFIG, 0.5), r"adapter_config\.json: not valid JSON"),
    "weights cut": (cut(ADAPTER_FILE, 0.5), r"adapter_model\.safetensors: damaged"),
    "weights a pickle": (
        lambda folder: (folder / ADAPTER_FILE).rename(folder / ADAPTER / "adapter_model.bin"), "never loaded",
    ),
    "no tensors": (tensors(dict.clear, ADAPTER_FILE), "holds no tensors"),
}  # fmt: skip
GPTQ = {
    "zero points missing": (tensors(lambda t: t.pop(f"{UP}.qzeros")), "up_proj.qzeros is missing"),
    "scales NaN": (tensors(fill(f"{UP}.scales", float("nan"))), "up_proj.scales holds NaN"),
    "a group that is not there": (tensors(fill(f"{UP}.g_idx", 99)), "up_proj.g_idx names a group outside"),
    "a negative group": (tensors(fill(f"{UP}.g_idx", -1)), "up_proj.g_idx names a group outside"),
    "codes cut": (tensors(resize(f"{UP}.qweight", 7, 128)), "up_proj.* expected"),
    "3 bits": (lambda folder: set_quantization(folder, bits=3), r"config\.json: GPTQ settings: bits"),
    "groups of 0": (lambda folder: set_quantization(folder, group_size=0), r"config\.json: GPTQ settings: group_size"),
}
TORCHAO_FILES = {
    "metadata no JSON": (metadata("{"), "metadata of .*up_proj.weight is not valid JSON"),
    "metadata nested": (metadata("[" * 100_000), "metadata of .*up_proj.weight is not valid JSON"),
    "metadata of another class": (metadata(json.dumps(TORCHAO | {"_type": "os.system"})), "torchao's type 'os.system'"),
    "scale missing": (tensors(lambda t: t.pop(f"{UP}._weight_scale")), "_weight_scale is missing"),
    "numbers outside int4": (tensors(fill(f"{UP}._weight_qdata", 8)), "_weight_qdata holds numbers outside int4"),
    "scale infinite": (tensors(fill(f"{UP}._weight_scale", float("inf"))), "_weight_scale holds NaN or infinity"),
}


def set_quantization(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    set_config(folder, quantization_config=fields | changes)


def nan_at(data, name):
    """A NaN at the beginning of a tensor's data."""
    length = int.from_bytes(data[:8], "little")
    at = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    return data[:at] + struct.pack("<f", float("nan")) + data[at + 4 :]


CATALOGUE = {
    f"{form}: {name}": Mistake(form, spoil, words)
    for form, mistakes in (
        ("safetensors", SAFETENSORS), ("shards", SHARDS), ("gguf", GGUF_FILES), ("jq4", JQ4),
        ("bitsandbytes", BITSANDBYTES), ("meta", META), ("lora", LORA), ("gptq", GPTQ), ("torchao", TORCHAO_FILES),
    )
    for name, (spoil, words) in mistakes.items()
}  # fmt: skip
HUGE = tuple(name for name in CATALOGUE if any(claim in name for claim in (
    "2^", "10^", "90 MB", "billion", "nested", "flipped high", "bomb", "endless", "-1 bytes", "deep",
)))  # fmt: skip
"""What claims to be large, or to have no end."""
