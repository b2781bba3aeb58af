"""The eager model posing as a runtime, with one fault on request: what a broken lowering would do."""

import ctypes
import time

import numpy as np
import torch
from safetensors import safe_open

from export.checkpoints.integers import Integers
from export.quantization.eager import eager
from export.quantization.schemes import of_recipe
from runtime_tests.sessions.base import Session

RUNTIME = "the eager model"


def runtime_calls():
    return []


def open_session(folder, manifest, *, threads):
    torch.set_num_threads(threads)
    fault = (folder / "model.fault").read_text()
    if fault == "does not load":
        raise RuntimeError("the file is of a newer version")
    return FakeSession(folder, manifest, fault)


class FakeSession(Session):
    def __init__(self, folder, manifest, fault):
        contract = manifest.contract
        limit = contract.kv.context_length * (2 if fault == "accepts too much" else 1)
        super().__init__(limit, contract.max_prefill, contract.logits, manifest.architecture.vocab_size)
        self.fault, self.manifest = fault, manifest
        self.measures_speed = fault != "reference evaluator"
        self.model = eager(self._reader(folder), manifest.architecture, manifest.plan.target.activations)
        if fault == "swapped heads":
            q = self.model.get_submodule("model.layers.0.self_attn.q_proj")
            size = manifest.architecture.head_dim
            order = torch.cat([torch.arange(size, 2 * size), torch.arange(size)])
            weight = q.weight.dequantize()
            weight[: 2 * size] = weight[order]
            q.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.cache, self.dirty = None, False

    def _reader(self, folder):
        stored = safe_open(folder / "model.safetensors", framework="pt")

        def read(name):
            scheme = of_recipe(self.manifest.plan.quant, self.manifest.architecture).of(name)
            if scheme is None:
                return stored.get_tensor(name)
            scale = stored.get_tensor(f"{name}.scale").clone()
            if self.fault == "flipped scale" and name == "model.layers.1.mlp.down_proj.weight":
                scale[: len(scale) // 2] *= -1
            return Integers(stored.get_tensor(f"{name}.qdata"), scale, scheme.bits)

        return read

    def reset(self):
        self.cache, self.dirty = None, self.dirty or self.position > 0
        super().reset()

    def rewind(self, length):
        if self.fault != "rewinds nothing":
            super().rewind(length)

    def step(self, tokens, position):
        self._misbehave(len(tokens), position)
        past = tuple((k[:, :, :position], v[:, :, :position]) for k, v in self.cache or ()) or None
        with torch.inference_mode():
            logits, self.cache = self.model(torch.tensor([tokens]), past)
        if self.fault == "stale cache slot" and len(tokens) == 1:
            self.cache = tuple((torch.cat([k[:, :, :-1], k[:, :, :1]], 2), v) for k, v in self.cache)
        if self.fault == "end token overflows" and self.manifest.tokenizer.eos_ids[0] in tokens:
            self.cache = tuple((k * np.nan, v) for k, v in self.cache)
            logits = logits * np.nan
        return self._answer(logits[0, -1].numpy().copy(), position + len(tokens))[None]

    def _misbehave(self, count, position):
        if self.fault == "segfault":
            ctypes.string_at(0)
        if self.fault == "hangs":
            time.sleep(600)
        if self.fault == "raises" and count == 1 and position > 80:
            raise RuntimeError("kernel not implemented")

    def _answer(self, logits, fed):
        if self.fault == "nan" and fed == 100:
            logits[7] = np.nan
        if self.fault == "constant token":
            logits[:] = 0
            logits[5] = 9
        if self.fault == "remembers" and self.dirty:
            logits[0] += 3 * np.abs(logits).max() if fed == 16 else 0
        return logits
