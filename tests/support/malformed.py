"""A catalogue of malformed checkpoints: name → the form, how it is spoiled, and the words its one line must hold.

`write(name, pristine, place)` makes one; `pristine` holds a whole checkpoint of every form.
"""

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.checkpoints import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    FILE,
    GGUF,
    INDEX,
    PTH,
    TORCHAO,
    UP,
    arguments,
    lora,
)
from tests.support.harms import (
    Execute,
    archive,
    claim,
    cut,
    edit,
    entry,
    fields,
    fill,
    flip,
    gguf_info,
    gguf_key,
    header,
    index,
    key,
    link,
    meta_tensors,
    metadata,
    nan_at,
    points_at,
    put,
    raw,
    remove,
    rename,
    repeated_key,
    resize,
    saved,
    set_quantization,
    state,
    tensors,
    twice,
)


@dataclass(frozen=True)
class Mistake:
    """One malformed checkpoint."""

    form: str
    spoil: Callable[[Path], object]
    """Given the folder of a whole checkpoint."""
    words: str
    """A regular expression: file, field or tensor, and what is wrong."""


def write(name, pristine, place):
    """One malformed checkpoint; the command's options for it."""
    mistake = CATALOGUE[name]
    folder = shutil.copytree(pristine / mistake.form, place)
    mistake.spoil(folder)
    return arguments(mistake.form, folder)


QMAP, ABSMAX = f"{UP}.weight.quant_map", f"{UP}.weight.absmax"
LORA_A, LORA_B = lora("mlp.up_proj", "A"), lora("mlp.up_proj", "B")
DAMAGED = r"model\.safetensors: damaged safetensors"

SAFETENSORS = {
    "empty file": (put(FILE, b""), r"model\.safetensors: is empty"),
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
    "tokenizer.json cut": (cut("tokenizer.json", 0.5), r"tokenizer\.json: not a tokenizer that is read"),
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
        index(lambda names: names.update(dict.fromkeys(names, "model-0.safetensors"))), "tensors are missing: ",
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
    "version flipped": (flip(GGUF, 4, 3), r"model\.gguf: version 11, a newer form"),
    "tensor count flipped high": (flip(GGUF, 15, 6), BAD_GGUF),
    "tensor count flipped low": (flip(GGUF, 8, 0), r"model\.gguf: "),
    "key count flipped high": (flip(GGUF, 23, 6), BAD_GGUF),
    "key count flipped low": (flip(GGUF, 16, 0), r"model\.gguf: "),
    "value type flipped": (
        edit(GGUF, lambda data: data.replace(b"llama.block_count\x04", b"llama.block_count\x84")), BAD_GGUF,
    ),
    "string of 2^63 bytes": (claim(0, 1, key(8, struct.pack("<Q", 2**63))), BAD_GGUF),
    "key name of 2^62 bytes": (claim(0, 1, struct.pack("<Q", 2**62)), BAD_GGUF),
    "array of 2^60 numbers": (claim(0, 1, key(9, struct.pack("<IQ", 4, 2**60))), BAD_GGUF),
    "array of 2^60 strings": (claim(0, 1, key(9, struct.pack("<IQ", 8, 2**60)) + bytes(64)), BAD_GGUF),
    "arrays in arrays": (claim(0, 1, key(9, struct.pack("<IQ", 9, 1) * 10_000)), BAD_GGUF),
    "2^32 dimensions": (gguf_info(b"blk.0.ffn_up.weight", 0, "<I", 2**32 - 1), BAD_GGUF),
    "dimensions of 2^63": (gguf_info(b"blk.0.ffn_up.weight", 4, "<Q", 2**63), r"model\.gguf: "),
    "dimensions of 0": (gguf_info(b"blk.0.ffn_up.weight", 4, "<Q", 0), "tensor blk.0.ffn_down.weight begins at"),
    "unknown element type": (gguf_info(b"blk.0.ffn_up.weight", 20, "<I", 999), "type 999, which is none of"),
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
    "state cut": (state(lambda s: json.dumps(s).encode()[:-20]), "quant_state.* is not valid JSON"),
    "state no JSON": (state(lambda s: b"\x80\x04K\x01."), "quant_state.* is not valid JSON"),
    "state with a key twice": (
        state(lambda s: b'{"blocksize": 128,' + json.dumps(s).encode()[1:]),
        "quant_state.*'blocksize' is there twice",
    ),
    "state nested": (state(lambda s: b"[" * 4000), "quant_state.* is not valid JSON"),
    "state missing": (
        tensors(lambda t: t.pop(f"{UP}.weight.quant_state.bitsandbytes__nf4")),
        "quant_state.* is missing",
    ),
    "wrong blocksize": (state(lambda s: s.update(blocksize=128)), "up_proj.weight.absmax has"),
    "blocksize 0": (state(lambda s: s.update(blocksize=0)), "blocksize"),
    "shape of 2^124": (state(lambda s: s.update(shape=[2**62, 2**62])), "up_proj.weight.absmax has"),
    "nested state missing": (tensors(lambda t: t.pop(f"{UP}.weight.nested_absmax")), "nested_absmax is missing"),
    "nested settings missing": (state(lambda s: s.pop("nested_offset") and None), "nested_offset"),
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
    "empty file": (put(PTH, b""), r"consolidated\.00\.pth: is empty"),
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
"""Files that claim to be large or endless."""
