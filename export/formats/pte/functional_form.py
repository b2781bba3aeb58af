"""The functional form of the exported graph, which torch's `run_decompositions` would yield, written directly.

The graph consists of core ATen ops already and mutates only the caches. torch would trace it three more times to find
that out; rewriting the cache updates takes a tenth of a second.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._export.verifier import Verifier
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, OutputSpec, TensorArgument
from torch.fx.traceback import NodeSource, NodeSourceAction

from export.errors import ExportError

from .lowering import replaced

_aten = torch.ops.aten


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """Rewrite cache updates as `auto_functionalized_v2` with buffer-mutation outputs; `item` and `narrow` as core ATen.

    Edge dialect takes graphs without side effects: an update becomes a value, later readers of the cache read that
    value, and the program returns it as the buffer's new contents.
    """
    graph, buffers = program.graph, program.graph_signature.inputs_to_buffers
    mutated: list[tuple[fx.Node, str]] = []
    ends: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.llama.update_cache.default:
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
    """update_cache(value, cache, start) → the new cache as a value, which replaces the cache in later nodes."""
    value, cache, start = node.args
    arguments = {"value": value, "start_pos": start, "_cache_base_index": 0, "_all_bases": [cache]}
    with graph.inserting_before(node):
        call = graph.call_function(auto_functionalized_v2, (torch.ops.llama.update_cache.default,), arguments)
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
