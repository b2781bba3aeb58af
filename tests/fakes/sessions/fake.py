"""The eager model posing as a runtime, with one fault on request: what a broken lowering would do."""

import ctypes
import time

import numpy as np
import torch
from safetensors import safe_open

from export.quantize import eager
from export.rounding import as_torchao
from export.schemes import scheme_of


def open_session(folder, manifest, *, threads):
    torch.set_num_threads(threads)
    fault = (folder / "model.fault").read_text()
    if fault == "does not load":
        raise RuntimeError("the file is of a newer version")
    return FakeSession(folder, manifest, fault)


class FakeSession:
    def __init__(self, folder, manifest, fault):
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
        self.reset()

    def _reader(self, folder):
        stored = safe_open(folder / "model.safetensors", framework="pt")

        def read(name):
            scheme = scheme_of(self.manifest.plan.quant, name)
            if scheme is None:
                return stored.get_tensor(name)
            scale = stored.get_tensor(f"{name}.scale").clone()
            if self.fault == "flipped scale" and name == "model.layers.1.mlp.down_proj.weight":
                scale[: len(scale) // 2] *= -1
            return as_torchao(stored.get_tensor(f"{name}.qdata"), scale, scheme.bits)

        return read

    def reset(self):
        self.cache, self.fed, self.dirty = None, 0, getattr(self, "dirty", False) or getattr(self, "fed", 0) > 0

    def rewind(self, length):
        if self.fault != "rewinds nothing":
            self.cache = tuple((k[:, :, :length], v[:, :, :length]) for k, v in self.cache)
            self.fed = length

    def feed_each(self, tokens):
        return np.stack([self.feed([token]) for token in tokens])

    def feed(self, tokens):
        tokens = list(tokens)
        limit = self.manifest.contract.kv.context_length
        if self.fed + len(tokens) > limit and self.fault != "accepts too much":
            raise ValueError(f"{self.fed + len(tokens)} tokens, the context is {limit}")
        self._misbehave(len(tokens))
        with torch.inference_mode():
            logits, self.cache = self.model(torch.tensor([tokens]), self.cache)
        if self.fault == "stale cache slot" and len(tokens) == 1:
            self.cache = tuple((torch.cat([k[:, :, :-1], k[:, :, :1]], 2), v) for k, v in self.cache)
        self.fed += len(tokens)
        return self._answer(logits[0, -1].numpy().copy())

    def _misbehave(self, count):
        if self.fault == "segfault":
            ctypes.string_at(0)
        if self.fault == "hangs":
            time.sleep(600)
        if self.fault == "raises" and count == 1 and self.fed > 80:
            raise RuntimeError("kernel not implemented")

    def _answer(self, logits):
        if self.fault == "nan" and self.fed == 100:
            logits[7] = np.nan
        if self.fault == "constant token":
            logits[:] = 0
            logits[5] = 9
        if self.fault == "remembers" and self.dirty:
            logits[0] += 3 * np.abs(logits).max() if self.fed == 16 else 0
        return logits

    def close(self):
        pass
