"""Writes DIR/stock.pte and DIR/stock.mlpackage with ExecuTorch's and coremltools' own converters, nothing of ours."""

import sys
from pathlib import Path

import coremltools as ct
import coremltools.optimize.coreml as optimize
import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import nn


class Bounded(nn.Module):
    """XNNPACK takes a ReLU into the linear as bounds, the upper one infinite."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Summed(nn.Module):
    """One linear of a state that every call adds to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        self.total.add_(x)
        return self.out(self.total * 1.0)


def write_pte(path):
    program = torch.export.export(Bounded().eval(), (torch.zeros(1, 64),))
    path.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def write_package(path):
    shape = ct.TensorType(shape=(1, 8), dtype=np.float16)
    converted = ct.convert(
        torch.jit.trace(Summed().half().eval(), torch.zeros(1, 8, dtype=torch.float16)),
        inputs=[ct.TensorType(name="x", shape=(1, 8), dtype=np.float16)],
        states=[ct.StateType(wrapped_type=shape, name="total")],
        outputs=[ct.TensorType(dtype=np.float16)],
        minimum_deployment_target=ct.target.iOS18,
    )
    int4 = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=4, weight_threshold=10
    )
    optimize.linear_quantize_weights(converted, optimize.OptimizationConfig(global_config=int4)).save(str(path))


if __name__ == "__main__":
    write_pte(Path(sys.argv[1]) / "stock.pte")
    write_package(Path(sys.argv[1]) / "stock.mlpackage")
