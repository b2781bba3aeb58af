"""Patches that make executorch's lowering of a decoder take seconds instead of minutes, with the same bytes as result.

Lowering replays the graph through some thirty passes and spends almost all of its time on recomputing values that did
not change. All patches are here; each is undone when its context ends, and they are refused on versions of the
libraries that they were not written for. A test compares the `.pte` with and without them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from executorch.backends.xnnpack import _passes as xnnpack_passes
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import lowered_backend_module
from executorch.exir.backend import backend_api
from executorch.exir.backend.canonical_partitioners.config_partitioner import ConfigerationBasedPartitioner
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.pass_base import _ExportPassBase
from torch import fx
from torch._export.pass_base import _ExportPassBaseDeprecatedDoNotUse
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx.traceback import NodeSource

from export.errors import ExportError

_TABLES = ("inputs_to_parameters", "inputs_to_buffers", "inputs_to_lifted_tensor_constants", "buffers_to_mutate")
WRITTEN_FOR = {"executorch": "1.5.1", "torch": "2.13.0"}


@contextmanager
def fast_lowering() -> Iterator[None]:
    """All patches. Raises ExportError on versions of the libraries that they were not written for."""
    for package, known in WRITTEN_FOR.items():
        if (installed := version(package).split("+")[0]) != known:
            raise ExportError(f"{package} {installed} is installed, lowering needs {known}: run `make setup`")
    with ExitStack() as stack:
        for patch in (
            _reuse_values,
            _share_sources,
            _lazy_code,
            _needed_passes,
            _sort_once,
            _share_tensors,
            _tables_once,
        ):
            stack.enter_context(patch())
        yield


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Set an attribute until the context ends."""
    inherited, old = name not in vars(owner), vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


@contextmanager
def _reuse_values() -> Iterator[None]:
    """A pass re-runs every op on fake tensors; an op with the same inputs as before reuses its recorded value."""
    with ExitStack() as stack:
        for base in (_ExportPassBase, _ExportPassBaseDeprecatedDoNotUse):
            stack.enter_context(replaced(base.ExportInterpreter, "run_node", _remembering(base.ExportInterpreter)))
            stack.enter_context(replaced(base, "_fx", _reusing(base._fx)))
        yield


def _remembering(interpreter: Any) -> Callable[..., Any]:
    """`run_node` that records on the pass which node is being replayed."""
    original = interpreter.run_node

    def run_node(self: Any, node: fx.Node) -> Any:
        self.callback._replayed = node
        return original(self, node)

    return run_node


def _reusing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_fx` that skips the fake execution if nothing changed, and reuses old metadata that was recomputed equal."""

    def _fx(self: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        node = getattr(self, "_replayed", None)
        if kind != "call_function" or node is None or node.op != kind:
            return original(self, kind, target, args, kwargs, meta)
        if _is_replay(node, target, args, kwargs):
            # the original still creates node and proxy; only its fake execution is answered from the record
            interpreter, self.interpreter = self.interpreter, _Recorded(node.meta["val"])
            try:
                return original(self, kind, target, args, kwargs, meta)
            finally:
                self.interpreter = interpreter
        result = original(self, kind, target, args, kwargs, meta)
        if _same_metadata(result.data, node.meta.get("val")):
            # equal but recomputed: take the old object, since the nodes after this one compare inputs by identity
            result.node.meta["val"] = node.meta["val"]
            return type(result)(node.meta["val"], result.proxy_or_node)
        return result

    return _fx


class _Recorded:
    """In the place of the interpreter: every call returns the recorded value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: self.value


def _is_replay(node: fx.Node, target: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is the node's own op (or its edge counterpart) on the node's own input values."""
    if "val" not in node.meta or (node.meta["val"] is None and "_assert" not in str(target)):
        return False
    same_op = node.target is target or (isinstance(target, EdgeOpOverload) and target._op is node.target)
    if not same_op or list(kwargs) != list(node.kwargs):
        return False
    first = 1 if type(target).__name__ == "ExecutorchCallDelegate" else 0  # the lowered module is not a value
    return _identical([args[first:], list(kwargs.values())], [node.args[first:], list(node.kwargs.values())])


def _identical(new: Any, old: Any) -> bool:
    """Whether a new argument and a node's hold the same objects: of a proxy its value, of a node its recorded one.

    Equality counts only for types where it is cheap and complete, which excludes tensors and symbols.
    """
    a = new.data if hasattr(new, "proxy_or_node") else new
    b = old.meta.get("val", object()) if isinstance(old, fx.Node) else old
    if a is b or (isinstance(a, torch.Tensor) and getattr(b, "constant", None) is a):
        return True
    if isinstance(a, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_identical, a, b))
    return type(a) is type(b) and bool(a == b)


def _same_metadata(a: Any, b: Any) -> bool:
    """Equal dtype, shape, strides and offset, all of which decide whether a node is delegated."""
    if type(a) is not type(b) or not isinstance(a, torch.Tensor):
        return False
    if a.dtype != b.dtype or a.dim() != b.dim() or getattr(a, "constant", None) is not None:
        return False
    pairs = [*zip(a.shape, b.shape, strict=True), *zip(a.stride(), b.stride(), strict=True)]
    return all(_same_size(x, y) for x, y in [*pairs, (a.storage_offset(), b.storage_offset())])


def _same_size(x: Any, y: Any) -> bool:
    """Equal numbers or the same symbolic expression."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    return isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt) and bool(x.node.expr == y.node.expr)


@contextmanager
def _share_sources() -> Iterator[None]:
    """Nodes carry the chain of nodes they came from; it never changes, so passes share it instead of copying it."""
    with replaced(NodeSource, "__deepcopy__", lambda self, _memo: self):
        yield


@contextmanager
def _lazy_code() -> Iterator[None]:
    """`recompile` prints a graph as Python and compiles it; defer that until the code is used, which never happens."""
    real = fx.GraphModule.recompile

    def recompile(self: Any) -> None:
        cls = type(self)

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            real(module)
            return module.forward(*args, **kwargs)

        cls.forward = forward
        # what the original sets besides the code: the specs of arguments and results
        codegen = self._graph._codegen
        if hasattr(codegen, "pytree_info"):
            self._in_spec, self._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        self.__dict__.pop("_code", None)

    def code(self: Any) -> str:
        if "_code" not in self.__dict__:
            real(self)
        text: str = self.__dict__["_code"]
        return text

    with (
        replaced(fx.GraphModule, "recompile", recompile),
        replaced(fx.GraphModule, "code", property(code)),
        replaced(fx.GraphModule, "__str__", lambda _self: "GraphModule"),  # debug messages print whole graphs
    ):
        yield


@contextmanager
def _needed_passes() -> Iterator[None]:
    """Of XNNPACK's seventeen passes only three can match in a decoder; the rest look for images and batch norms."""
    needed = [xnnpack_passes.ConvertToLinearPass, xnnpack_passes.ConstPropPass, xnnpack_passes.RemoveRedundantCopyPass]
    original = xnnpack_passes.XNNPACKPassManager.__init__

    def init(self: Any, program: ExportedProgram, passes: Any = None) -> None:
        original(self, program, passes or needed)

    with replaced(xnnpack_passes.XNNPACKPassManager, "__init__", init):
        yield


@contextmanager
def _sort_once() -> Iterator[None]:
    """Partitions are cut out of the graph one by one, with a topological sort after each; sort after the last only."""
    cut, make = backend_api.create_submodule_from_nodes, backend_api._create_partitions_in_graph_module

    def unsorted(module: Any, nodes: Any, tag: str) -> Any:
        return cut(module, nodes, tag, True)

    def partitions(module: fx.GraphModule, result: Any, owner: Any, is_submodule: bool) -> Any:
        with replaced(backend_api, "create_submodule_from_nodes", unsorted):
            unsorted_calls = make(module, result, owner, is_submodule)
        # sorting copies all nodes into a new graph: the calls of the partitions are found there again by name
        lowered_backend_module.legalize_graph(module)
        names = {backend: {node.target for node in nodes} for backend, nodes in unsorted_calls.items()}
        calls = [node for node in module.graph.nodes if node.op == "call_module"]
        return {backend: [node for node in calls if node.target in targets] for backend, targets in names.items()}

    with replaced(backend_api, "_create_partitions_in_graph_module", partitions):
        yield


@contextmanager
def _tables_once() -> Iterator[None]:
    """Partitioning asks of each node which weight it is, and a table of all is made each time; it changes none."""
    real = ConfigerationBasedPartitioner.partition

    def partition(self: Any, program: ExportedProgram) -> Any:
        with ExitStack() as stack:
            for name in _TABLES:
                stack.enter_context(replaced(ExportGraphSignature, name, _made_once(name, program.graph_signature)))
            return real(self, program)

    with replaced(ConfigerationBasedPartitioner, "partition", partition):
        yield


def _made_once(name: str, signature: ExportGraphSignature) -> property:
    """The property of that name, which answers for this signature what it does now."""
    table: Any = vars(ExportGraphSignature)[name]
    now = table.fget(signature)
    return property(lambda asked: now if asked is signature else table.fget(asked))


@contextmanager
def _share_tensors() -> Iterator[None]:
    """Each partition is copied before it is serialized; copy its graph only, and share tensors and metadata."""

    def copied(_cls: type, program: ExportedProgram, *_: Any) -> ExportedProgram:
        graph = fx.Graph()
        twins: dict[fx.Node, fx.Node] = {}
        output = graph.output(graph.graph_copy(program.graph, twins))
        output.meta = copy.copy(program.graph.output_node().meta)
        for old, new in twins.items():
            new.meta, new.name = copy.copy(old.meta), old.name
        graph._codegen = program.graph._codegen
        module = fx.GraphModule(program.graph_module, graph)
        module.meta.update(program.graph_module.meta)
        return ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=copy.deepcopy(program.graph_signature),
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=None,
            constants=program.constants,
            verifiers=[program.verifier],
        )

    with replaced(XnnpackBackend, "copy_exported_program_for_preprocess", classmethod(copied)):
        yield
