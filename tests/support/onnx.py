"""Tiny ONNX artifacts, their weights and their logits, for tests of the format."""

import shutil
from pathlib import Path

import numpy as np
import onnx

from export import checkpoints, manifest, plan
from export.formats.onnx_kv.weights import read_weights
from export.pipeline import CACHE
from export.quantization import quantize
from export.quantization.store import QuantizedModel
from runtime_tests.sessions import open_session
from tests.support.metrics import eager_logits, forced_logits, mean_kl, sqnr_db

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
    return quantize(checkpoints.load(p.model, None), p.quant, CACHE)


def session_of(folder: Path):
    return open_session(folder, manifest.read(folder), threads=1)


def readback(folder: Path):
    return {w.name: w for w in read_weights(folder / "model.onnx", manifest.read(folder).architecture)}


def assert_same_integers(folder: Path) -> None:
    model, stored = quantized(folder), readback(folder)
    assert list(stored) == model.schemes.names
    for name, weight in stored.items():
        expected = model.read(name)
        np.testing.assert_array_equal(weight.qdata, expected.qdata.numpy(), err_msg=name)
        np.testing.assert_array_equal(weight.scale, expected.scale.numpy(), err_msg=name)


def compare(folder: Path, ids: list[int]) -> tuple[float, float, float]:
    """Mean KL(eager ‖ artifact), top-1 agreement and SQNR in dB over prefill, then one token at a time."""
    reference = eager_logits(quantized(folder), ids)[PREFILL - 1 :]
    logits = forced_logits(session_of(folder), ids, PREFILL)
    top1 = (reference.argmax(-1) == logits.argmax(-1)).double().mean()
    return mean_kl(reference, logits), float(top1), sqnr_db(reference, logits)


def copy_with(folder: Path, to: Path, tensor: str, change) -> Path:
    """A copy of an artifact with one stored tensor changed in model.onnx.data."""
    shutil.copytree(folder, to)
    initializers = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    proto = next(initializer for initializer in initializers if initializer.name == tensor)
    external = onnx.external_data_helper.ExternalDataInfo(proto)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    stored = np.memmap(to / external.location, dtype, "r+", external.offset, tuple(proto.dims))
    change(stored)
    stored.flush()
    return to


def genai_greedy(folder, prompt: list[int], longest: int) -> list[int]:
    """What onnxruntime-genai adds to a prompt, up to its end or `longest` tokens in all."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=longest)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0)[len(prompt) :].tolist())


def greedy(session, prompt: list[int], count: int) -> list[int]:
    out, logits = [], session.feed(prompt)
    for _ in range(count):
        out.append(int(logits.argmax()))
        logits = session.feed(out[-1:])
    return out
