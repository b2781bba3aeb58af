"""Core ML for the runner of a Mac: packages are executed by our evaluator, and every call is written down.

`FAKE_COREML_CALLS` names the file. What is not here comes from the real coremltools.
"""

import json
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

HERE = Path(__file__).parents[1]
__path__ += PathFinder.find_spec(
    __name__, [entry for entry in sys.path if Path(entry) != HERE]
).submodule_search_locations
__version__ = "9.0 (fake)"

from runtime_tests.coreml.evaluator import Evaluator  # noqa: E402 – needs the rest of coremltools

ComputeUnit = SimpleNamespace(CPU_ONLY="CPU", CPU_AND_GPU="CPU and GPU", CPU_AND_NE="CPU and NE", ALL="all")


def compile_model(package, compiled):
    if reason := os.environ.get("FAKE_COREML_REFUSES"):
        raise RuntimeError(f"Error compiling model: {reason}")
    assert compiled.endswith(".mlmodelc")  # Core ML looks at the name
    with Path(os.environ["FAKE_COREML_CALLS"]).open("a") as file:
        file.write(json.dumps({"compiled": str(package)}) + "\n")
    Path(compiled).symlink_to(Path(package).absolute())
    return compiled


class State:
    """As Core ML's, it gives and takes copies."""

    def __init__(self, number, tensors):
        self.number, self.tensors = number, tensors

    def read_state(self, name):
        return self.tensors[name].numpy().copy()

    def write_state(self, name, value):
        assert value.flags.c_contiguous
        assert value.shape == self.tensors[name].shape
        self.tensors[name].numpy()[:] = value


class CompiledMLModel:
    def __init__(self, path, compute_units):
        if compute_units not in vars(ComputeUnit).values():
            raise ValueError(compute_units)
        with Path(os.environ["FAKE_COREML_CALLS"]).open("a") as file:
            file.write(json.dumps({"loaded": compute_units}) + "\n")
        self.evaluator = Evaluator(Path(path).resolve(strict=True))
        self.made = 0

    def make_state(self):
        self.made += 1
        self.evaluator.reset()
        return State(self.made, self.evaluator.states)

    def predict(self, inputs, state):
        self.evaluator.states = state.tensors
        write_down(inputs, state.number)
        dtypes = self.evaluator.program.inputs
        result = self.evaluator.predict(
            {name: torch.from_numpy(value).to(dtypes[name]) for name, value in inputs.items()}
        )
        return {name: value.numpy() for name, value in result.items()}


def write_down(inputs, state):
    ids, mask = inputs["inputIds"], inputs["causalMask"]
    call = {
        "inputs": sorted(inputs),
        "ids": [str(ids.dtype), list(ids.shape)],
        "mask": [str(mask.dtype), list(mask.shape)],
        "values": sorted(set(np.unique(mask).tolist())),
        "visible": (mask == 0).sum(axis=-1).ravel().tolist(),
        "state": state,
    }
    with Path(os.environ["FAKE_COREML_CALLS"]).open("a") as file:
        file.write(json.dumps(call) + "\n")


models = SimpleNamespace(CompiledMLModel=CompiledMLModel, utils=SimpleNamespace(compile_model=compile_model))
