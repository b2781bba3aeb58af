"""From our model to the bytes of a `.pte`: export, lower to XNNPACK, emit. Knows nothing about recipes."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import executorch.exir.passes._quant_patterns_and_replacements
import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (registers llama::update_cache and custom_sdpa)
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.canonical_partitioners.config_partitioner import DSJ
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch.export import Dim, ExportedProgram

from ...contract import IOContract
from ...quantize import QuantizedModel
from .. import Build
from .fast import fast_lowering, replaced
from .functionalize import functionalize, no_decompositions
from .model import PteLlama
from .share_table import share_tied_table

Facts = dict[str, int | float | str]


def write(model: QuantizedModel, build: Build, contract: IOContract) -> Facts:
    """Write the artifact and count what XNNPACK took."""
    with model.reader() as read:  # a mapping for each weight would be 150 GB of address space for 1B
        module = PteLlama(read, model.architecture, contract.kv.context_length).eval()
    with quiet():
        program = functionalize(trace(module, contract.max_prefill))
    with quiet(), ordered_groups(), fast_lowering(), no_decompositions():
        edge = lower(program, metadata(model, build, contract))
        facts = count(edge)
        emitted = edge.to_executorch(backend_config())
    path = build.folder / build.plan.target.artifact
    with path.open("wb") as file:
        emitted.write_to_file(file)
    return {**facts, "tied_table_bytes_saved": share_tied_table(path)}


def trace(module: PteLlama, max_prefill: int) -> ExportedProgram:
    """torch.export with 1…max_prefill tokens."""
    example = (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([5]))
    sequence = Dim("sequence", min=1, max=max_prefill)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=({1: sequence}, None), strict=False)


def lower(program: ExportedProgram, constant_methods: dict[str, Any]) -> EdgeProgramManager:
    """Edge dialect with everything XNNPACK can run as delegates."""
    return to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=constant_methods,
    )


def backend_config() -> ExecutorchBackendConfig:
    """Inputs are the caller's memory; everything else is planned at the largest shape."""
    return ExecutorchBackendConfig(
        extract_delegate_segments=True,
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
    )


def metadata(model: QuantizedModel, build: Build, contract: IOContract) -> dict[str, Any]:
    """Constant methods ExecuTorch's runners ask for (extension/llm/runner/constants.h)."""
    return {
        "get_bos_id": build.tokenizer.bos_id if build.tokenizer.bos_id is not None else build.tokenizer.eos_ids[0],
        "get_eos_ids": list(build.tokenizer.eos_ids),
        "get_vocab_size": model.architecture.vocab_size,
        "get_n_layers": model.architecture.num_hidden_layers,
        "get_max_seq_len": contract.max_prefill,
        "get_max_context_len": contract.kv.context_length,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def count(edge: EdgeProgramManager) -> Facts:
    """Delegates, and the ops left outside them."""
    names = Counter(
        node.target.__name__ if hasattr(node.target, "__name__") else str(node.target)
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function"
    )
    delegates = names.pop("executorch_call_delegate", 0)
    names.pop("getitem", 0)
    ours = sum(n for name, n in names.items() if "custom_sdpa" in name or "auto_functionalized" in name)
    return {"delegates": delegates, "attention_and_cache_ops": ours, "other_ops": names.total() - ours}


@contextmanager
def ordered_groups() -> Iterator[None]:
    """Partition groups in graph order. The library keeps them in sets of nodes, whose order changes from run to run."""

    def gen_groups(self: Any) -> list[list[torch.fx.Node]]:
        groups: dict[Any, list[torch.fx.Node]] = {}
        for node in self.parent:
            groups.setdefault(self.find(node), []).append(node)
        return list(groups.values())

    with replaced(DSJ, "gen_groups", gen_groups):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries warn about things we do on purpose; errors still come through."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
