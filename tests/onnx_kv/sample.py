"""Tiny ONNX artifacts and what is read and computed from them; shared by the tests of this folder."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import torch

from export import checkpoint, manifest, plan
from export.backends import onnx_kv
from export.pipeline import CACHE
from export.quantize import QuantizedModel, eager, quantize
from runtime_tests.session import open_session

PREFILL, DECODE = 40, 80
PER_CHANNEL_8 = plan.WeightScheme(bits=8, group_size=None)
GROUPS_4 = plan.WeightScheme(bits=4, group_size=32)


def tiny(quant="int4-g32", linear=None, table=None, tied=True, logits="last") -> plan.Plan:
    """The tiny plan with another recipe, linear scheme, embedding/head scheme, an untied head, or all logits."""
    p = plan.load_plan("tiny", quant, "onnx-cpu")
    recipe = p.quant.model_copy(
        update={
            "linear": linear or p.quant.linear,
            "embedding": table or p.quant.embedding,
            "head": table or p.quant.head,
        }
    )
    model = p.model.model_copy(
        update={"architecture": p.model.architecture.model_copy(update={"tie_word_embeddings": tied})}
    )
    target = p.target.model_copy(update={"logits": logits})
    return p.model_copy(update={"quant": recipe, "model": model, "target": target})


def quantized(folder: Path) -> QuantizedModel:
    p = manifest.read(folder).plan
    return quantize(checkpoint.load(p.model, None), p.quant, CACHE)


def session_of(folder: Path):
    return open_session(folder, manifest.read(folder), threads=1)


def readback(folder: Path):
    return {w.name: w for w in onnx_kv.read_weights(folder / "model.onnx", manifest.read(folder).architecture)}


def assert_same_integers(folder: Path) -> None:
    model, found = quantized(folder), readback(folder)
    assert list(found) == model.schemes.names
    for name, weight in found.items():
        want = model.read(name)
        np.testing.assert_array_equal(weight.qdata, want.qdata.numpy(), err_msg=name)
        np.testing.assert_array_equal(weight.scale, want.scale.numpy(), err_msg=name)


def tokens(count: int, vocab: int = 512) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def compare(folder: Path, ids: list[int]) -> tuple[float, float, float]:
    """Mean KL(eager ‖ artifact), top-1 agreement and SQNR in dB over prefill, then one token at a time."""
    session, model = session_of(folder), quantized(folder)
    got = [session.feed(ids[:PREFILL])] + [session.feed([token]) for token in ids[PREFILL:]]
    with torch.no_grad():
        logits, _ = eager(model.read, model.architecture, "none")(torch.tensor([ids]))
    want, artifact = logits[0, PREFILL - 1 :].double(), torch.tensor(np.array(got)).double()
    p, q = want.log_softmax(-1), artifact.log_softmax(-1)
    sqnr = 10 * torch.log10(want.square().sum() / (want - artifact).square().sum())
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean()), float(sqnr)


def copy_with(folder: Path, to: Path, tensor: str, change) -> Path:
    """A copy of an artifact with one stored tensor changed in model.onnx.data."""
    shutil.copytree(folder, to)
    initializers = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    found = next(t for t in initializers if t.name == tensor)
    where = onnx.external_data_helper.ExternalDataInfo(found)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(found.data_type)
    stored = np.memmap(to / where.location, dtype, "r+", where.offset, tuple(found.dims))
    change(stored)
    stored.flush()
    return to


def greedy(session, prompt: list[int], count: int) -> list[int]:
    out, logits = [], session.feed(prompt)
    for _ in range(count):
        out.append(int(logits.argmax()))
        logits = session.feed(out[-1:])
    return out
