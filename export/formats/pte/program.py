"""Writes the `.pte`: traced, brought into functional form, delegated to XNNPACK, emitted."""

import logging
import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.canonical_partitioners.config_partitioner import DSJ
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import fx
from torch._export.verifier import Verifier
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, OutputSpec, TensorArgument
from torch.fx.traceback import NodeSource, NodeSourceAction

from export.errors import ExportError
from export.formats import Build
from export.manifest import IOContract
from export.quantization.store import QuantizedModel

from . import methods
from .file import share_tied_table
from .graph import PteLlama
from .lowering import fast_lowering, replaced

_Facts = dict[str, int | float | str]
_aten = torch.ops.aten
_UPDATES = (torch.ops.llama.update_cache.default, torch.ops.llama.update_cache_with_indices.default)


def write(model: QuantizedModel, build: Build, contract: IOContract) -> _Facts:
    """Write the artifact. Returns counts of delegates and of the ops left outside them."""
    with model.reader() as read:  # one mapping; one for each weight would be 150 GB of address space for 1B
        module = PteLlama(read, model.architecture, contract.kv).eval()
    with _quiet():
        program = functionalize(trace(module, contract.max_prefill))
    with _quiet(), _ordered_groups(), fast_lowering(), no_decompositions():
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=methods(model.architecture, contract, build.tokenizer),
        )
        facts = _count(edge)
        emitted = edge.to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True,
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),  # memory is planned for the largest shape
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),  # inputs stay in the caller's
                emit_mutable_buffer_names=True,  # of the cache, by which a session reads and writes it
            )
        )
    path = build.folder / build.plan.target.artifact
    with path.open("wb") as file:
        emitted.write_to_file(file)
    return {**facts, "tied_table_bytes_saved": share_tied_table(path)}


def trace(module: PteLlama, max_prefill: int) -> ExportedProgram:
    """The graph for 1…max_prefill tokens at any position."""
    example = (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([5]))
    sequence = Dim("sequence", min=1, max=max_prefill)
    with torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=({1: sequence}, None), strict=False)


def _count(edge: EdgeProgramManager) -> _Facts:
    names = Counter(
        node.target.__name__ if hasattr(node.target, "__name__") else str(node.target)
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function"
    )
    delegates = names.pop("executorch_call_delegate", 0)
    names.pop("getitem", 0)
    ours = sum(n for name, n in names.items() if "_sdpa" in name or "auto_functionalized" in name)
    return {"delegates": delegates, "attention_and_cache_ops": ours, "other_ops": names.total() - ours}


@contextmanager
def _ordered_groups() -> Iterator[None]:
    """Partition groups in graph order: the library holds them in sets of nodes, whose order changes from run to run."""

    def gen_groups(self: Any) -> list[list[torch.fx.Node]]:
        groups: dict[Any, list[torch.fx.Node]] = {}
        for node in self.parent:
            groups.setdefault(self.find(node), []).append(node)
        return list(groups.values())

    with replaced(DSJ, "gen_groups", gen_groups):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of the libraries, which concern what is done here on purpose; errors are still raised."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)


# ── the functional form ─────────────────────────────────────────────────────────────────────────────────────────────
# What torch's `run_decompositions` would yield, written directly. The graph consists of core ATen ops already and
# mutates only the caches. torch would trace it three more times to find that out; rewriting the cache updates takes a
# tenth of a second.


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """Rewrite cache updates as `auto_functionalized_v2` with buffer-mutation outputs; `item` and `narrow` as core ATen.

    Edge dialect takes graphs without side effects: an update becomes a value, later readers of the cache read that
    value, and the program returns it as the buffer's new contents.
    """
    graph, buffers = program.graph, program.graph_signature.inputs_to_buffers
    mutated: list[tuple[fx.Node, str]] = []
    ends: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _UPDATES:
            buffer = buffers[node.args[1].name]
            mutated.append((_functional_update(graph, node), buffer))
        elif node.op == "call_function" and node.target is _aten.item.default:
            node.target = _aten._local_scalar_dense.default
        elif node.op == "call_function" and node.target is _aten.narrow.default:
            _narrow_to_slice(graph, node, ends)
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            node.meta.setdefault("from_node", _created_from(node))
    output = graph.output_node()
    output.args = (tuple(node for node, _ in mutated) + tuple(output.args[0]),)
    graph.eliminate_dead_code()
    graph.lint()
    return _rebuilt(program, mutated)


def _functional_update(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """update_cache(value, cache, start, …) → the new cache as a value, which replaces the cache in later nodes."""
    value, cache, start, *indices = node.args
    arguments = {"value": value, "start_pos": start, **dict(zip(["indices"], indices, strict=False))}
    arguments |= {"_cache_base_index": 0, "_all_bases": [cache]}
    update: Any = node.target
    with graph.inserting_before(node):
        call = graph.call_function(auto_functionalized_v2, (update,), arguments)
        new = graph.call_function(operator.getitem, (call, 1))
    assert isinstance(cache, fx.Node)
    _copy_meta(node, call, (node.meta["val"], cache.meta["val"]))
    _copy_meta(node, new, cache.meta["val"])
    cache.replace_all_uses_with(new, delete_user_cb=lambda user: user is not call and user is not node)
    graph.erase_node(node)
    return new


def _narrow_to_slice(graph: fx.Graph, node: fx.Node, ends: dict[Any, fx.Node]) -> None:
    """narrow(x, dim, start, length) → slice(x, dim, start, start + length); one addition per pair of operands."""
    x, dim, start, length = node.args
    if (start, length) not in ends:
        with graph.inserting_before(node):
            ends[start, length] = graph.call_function(operator.add, (start, length))
        value: Any = length.meta["val"] if isinstance(length, fx.Node) else length
        assert isinstance(start, fx.Node)
        _copy_meta(node, ends[start, length], start.meta["val"] + value)
    node.target, node.args = _aten.slice.Tensor, (x, dim, start, ends[start, length])


def _copy_meta(source: fx.Node, new: fx.Node, value: Any) -> None:
    """Give a node the metadata of the node it replaces."""
    inherited = {key: item for key, item in source.meta.items() if key != "eager_input_vals"}
    new.meta.update({**inherited, "val": value, "from_node": _created_from(source)})


def _created_from(node: fx.Node) -> list[NodeSource]:
    """Provenance, which nodes of later dialects must have."""
    return [NodeSource(node, "functionalize", [NodeSourceAction.CREATE])]


def _rebuilt(program: ExportedProgram, mutated: list[tuple[fx.Node, str]]) -> ExportedProgram:
    """The program with its changed graph, the caches declared as mutated buffers."""
    mutations = [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(node.name), name) for node, name in mutated]
    signature = program.graph_signature
    program.graph_module.recompile()
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=ExportGraphSignature(signature.input_specs, mutations + list(signature.output_specs)),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=[entry for entry in program.module_call_graph if entry.fqn == ""],
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=[Verifier],
    )


@contextmanager
def no_decompositions() -> Iterator[None]:
    """Replace torch's `run_decompositions` by a check. Raises ExportError if an op of the graph needs decomposition."""

    def check(self: ExportedProgram, table: Any = None, **_: Any) -> ExportedProgram:
        targets = {node.target for node in self.graph.nodes if node.op == "call_function"}
        if composite := sorted(str(target) for target in targets & set(table or ()) if "sym_" not in str(target)):
            raise ExportError(f"the model form uses ops that need decomposition: {', '.join(composite)}")
        return self

    with replaced(ExportedProgram, "run_decompositions", check):
        yield
