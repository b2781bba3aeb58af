"""Makes executorch's lowering of a decoder take seconds instead of minutes, without changing a byte of the result.

Every patch is here, each undone when the context ends, and refused on library versions it was not read against.
Lowering replays the graph through some thirty passes; almost all of that time goes into recomputing what did not
change. A test compares the `.pte` with and without these patches.
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
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.pass_base import _ExportPassBase
from torch import fx
from torch._export.pass_base import _ExportPassBaseDeprecatedDoNotUse
from torch.export import ExportedProgram
from torch.fx.traceback import NodeSource

from ...errors import ExportError

WRITTEN_FOR = {"executorch": "1.5.1", "torch": "2.13.0"}


@contextmanager
def fast_lowering() -> Iterator[None]:
    """All patches together. Raises ExportError on other versions of the libraries."""
    for package, known in WRITTEN_FOR.items():
        if (installed := version(package).split("+")[0]) != known:
            raise ExportError(f"{package} {installed} is installed, lowering needs {known}: run `make setup`")
    with ExitStack() as stack:
        for patch in (reuse_values, share_sources, lazy_code, needed_passes, sort_once, share_tensors):
            stack.enter_context(patch())
        yield


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Set an attribute for the time of the context."""
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
def reuse_values() -> Iterator[None]:
    """A pass re-runs every op on fake tensors. Same op and same inputs as before: take the value it had before."""
    with ExitStack() as stack:
        for base in (_ExportPassBase, _ExportPassBaseDeprecatedDoNotUse):
            stack.enter_context(replaced(base.ExportInterpreter, "run_node", remembering(base.ExportInterpreter)))
            stack.enter_context(replaced(base, "_fx", reusing(base._fx)))
        yield


def remembering(interpreter: Any) -> Callable[..., Any]:
    """`run_node` that tells the pass which node is being replayed."""
    original = interpreter.run_node

    def run_node(self: Any, node: fx.Node) -> Any:
        self.callback._replayed = node
        return original(self, node)

    return run_node


def reusing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_fx` that skips the fake execution when nothing changed, and keeps old metadata that came out equal."""

    def _fx(self: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        node = getattr(self, "_replayed", None)
        if kind != "call_function" or node is None or node.op != kind:
            return original(self, kind, target, args, kwargs, meta)
        if unchanged(node, target, args, kwargs):
            interpreter, self.interpreter = self.interpreter, Constant(node.meta["val"])
            try:
                return original(self, kind, target, args, kwargs, meta)
            finally:
                self.interpreter = interpreter
        result = original(self, kind, target, args, kwargs, meta)
        if same_metadata(result.data, node.meta.get("val")):
            # equal but recomputed: adopt the old object, so that the nodes after this one are found unchanged
            result.node.meta["val"] = node.meta["val"]
            return type(result)(node.meta["val"], result.proxy_or_node)
        return result

    return _fx


class Constant:
    """Stands in for the interpreter: every call gives the value already known."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: self.value


def unchanged(node: fx.Node, target: Any, args: Any, kwargs: Any) -> bool:
    """Whether a replayed call is the node's own op (or its edge twin) on the node's own input values."""
    if "val" not in node.meta or (node.meta["val"] is None and "_assert" not in str(target)):
        return False
    same_op = node.target is target or (isinstance(target, EdgeOpOverload) and target._op is node.target)
    if not same_op or list(kwargs) != list(node.kwargs):
        return False
    first = 1 if type(target).__name__ == "ExecutorchCallDelegate" else 0  # the lowered module is not a value
    new = [list(args[first:]), list(kwargs.values())]
    old = [list(node.args[first:]), list(node.kwargs.values())]
    return identical(mapped(new, proxy_value), mapped(old, node_value))


def proxy_value(x: Any) -> Any:
    """The value behind a pass's proxy."""
    return x.data if hasattr(x, "proxy_or_node") else x


def node_value(x: Any) -> Any:
    """The recorded value of a node; a node without one equals nothing."""
    return x.meta.get("val", object()) if isinstance(x, fx.Node) else x


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested lists, tuples and dicts."""
    if isinstance(x, list | tuple):
        return [mapped(y, function) for y in x]
    if isinstance(x, dict):
        return {key: mapped(y, function) for key, y in x.items()}
    return function(x)


def identical(a: Any, b: Any) -> bool:
    """Same objects; equal only where equality is cheap and says everything."""
    if a is b or (isinstance(a, torch.Tensor) and getattr(b, "constant", None) is a):
        return True
    if isinstance(a, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and bool(a == b)


def same_metadata(a: Any, b: Any) -> bool:
    """Equal dtype, shape, strides and offset: differing in any of them would change what is delegated."""
    if type(a) is not type(b) or not isinstance(a, torch.Tensor):
        return False
    if a.dtype != b.dtype or a.dim() != b.dim() or getattr(a, "constant", None) is not None:
        return False
    pairs = [*zip(a.shape, b.shape, strict=True), *zip(a.stride(), b.stride(), strict=True)]
    return all(same_size(x, y) for x, y in [*pairs, (a.storage_offset(), b.storage_offset())])


def same_size(x: Any, y: Any) -> bool:
    """Equal numbers or the same symbolic expression."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    return isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt) and bool(x.node.expr == y.node.expr)


@contextmanager
def share_sources() -> Iterator[None]:
    """Nodes carry the chain of nodes they came from. It is never changed, so it need not be copied per pass."""
    with replaced(NodeSource, "__deepcopy__", lambda self, _memo: self):
        yield


@contextmanager
def lazy_code() -> Iterator[None]:
    """`recompile` prints a graph as Python and compiles it; do that when the code is used, which it never is."""
    real = fx.GraphModule.recompile

    def recompile(self: Any) -> None:
        cls = type(self)

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            real(module)
            return module.forward(*args, **kwargs)

        cls.forward = forward
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
def needed_passes() -> Iterator[None]:
    """Of XNNPACK's seventeen passes only these can match in a decoder; the others look for images and batch norms."""
    needed = [xnnpack_passes.ConvertToLinearPass, xnnpack_passes.ConstPropPass, xnnpack_passes.RemoveRedundantCopyPass]
    original = xnnpack_passes.XNNPACKPassManager.__init__

    def init(self: Any, program: ExportedProgram, passes: Any = None) -> None:
        original(self, program, passes or needed)

    with replaced(xnnpack_passes.XNNPACKPassManager, "__init__", init):
        yield


@contextmanager
def sort_once() -> Iterator[None]:
    """Partitions are cut out of the graph one by one, with a topological sort after each: sort after the last."""
    cut, make = backend_api.create_submodule_from_nodes, backend_api._create_partitions_in_graph_module

    def unsorted(module: Any, nodes: Any, tag: str) -> Any:
        return cut(module, nodes, tag, True)

    def partitions(module: fx.GraphModule, result: Any, owner: Any, is_submodule: bool) -> Any:
        with replaced(backend_api, "create_submodule_from_nodes", unsorted):
            found = make(module, result, owner, is_submodule)
        lowered_backend_module.legalize_graph(module)
        names = {backend: {node.target for node in nodes} for backend, nodes in found.items()}
        calls = [node for node in module.graph.nodes if node.op == "call_module"]
        return {backend: [node for node in calls if node.target in wanted] for backend, wanted in names.items()}

    with replaced(backend_api, "_create_partitions_in_graph_module", partitions):
        yield


@contextmanager
def share_tensors() -> Iterator[None]:
    """Each partition is copied before it is serialized: copy the graph, share tensors and metadata."""

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
