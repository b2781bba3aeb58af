"""Runs a saved Core ML package op by op on any host: a reference for correctness, never for speed.

It executes the program in the file, with its constants and states, and rounds every result to the dtype the program
declares, as Core ML does on CPU and GPU. The Neural Engine's arithmetic is different and not modelled.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.host import mkl

from .operations import OPS, Inputs, linear_each, settled, slice_assign
from .package import Literal, Operation, PackageError, Program, load

_STATE_OPS = ("read_state", "write_state")
_Part = str | Literal
"""A variable's name, or a constant written in place."""


@dataclass(frozen=True)
class _Step:
    """One operation that runs on every call."""

    operation: Operation
    in_place: bool
    """A slice_update that may write into the state it was read from."""
    finished: tuple[str, ...]
    """Variables that no later step reads."""
    fixed: Inputs
    """Parameters whose values are the same in every call."""
    variable: tuple[tuple[str, _Part | tuple[_Part, ...]], ...]
    """The others, with the names of their variables; only the parameter `values` is a list."""


class Evaluator:
    """One loaded package with one set of states."""

    def __init__(self, package: Path, also: tuple[str, ...] = ()) -> None:
        """`also`: variables that are outputs of every call too."""
        mkl.settle()
        program = load(package)
        self.program = replace(program, outputs=(*program.outputs, *also))
        self.constants = _fold(self.program)
        self.steps = list(_schedule(self.program, self.constants))
        self.states: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Zero the states, as `make_state` does."""
        self.states = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in self.program.states.items()}

    def predict(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once; states carry over to the next call. Raises PackageError: other inputs than the package declares."""
        (outputs,) = self.predict_each([inputs], [self.states])
        return outputs

    @torch.inference_mode()
    def predict_each(
        self, inputs: Sequence[Mapping[str, Tensor]], states: Sequence[dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Several runs, each with its states, every operation for all of them before the next. Errors as of `predict`.

        Each computes what it would alone, to the bit; but a weight is brought from memory once, not for every run.
        """
        if any({name: value.dtype for name, value in given.items()} != dict(self.program.inputs) for given in inputs):
            raise PackageError(f"inputs must be {dict(self.program.inputs)}")
        runs: list[dict[str, Any]] = [dict(given) for given in inputs]
        for step in self.steps:
            self._run(step, runs, states)
            for values in runs:
                for name in step.finished:
                    values.pop(name, None)
        return [{name: values[name] for name in self.program.outputs} for values in runs]

    def _run(self, step: _Step, runs: Sequence[dict[str, Any]], states: Sequence[dict[str, Tensor]]) -> None:
        """Run one operation; its results, rounded as declared, go into the values or a state of each run."""
        op = step.operation
        if op.kind == "read_state":
            for values, state in zip(runs, states, strict=True):
                values[op.outputs[0][0]] = state[_state_of(op)]
            return
        arguments = [self._arguments(step, values) for values in runs]
        if op.kind == "write_state":
            for given, state in zip(arguments, states, strict=True):
                state[_state_of(op)] = given["data"]
            return
        try:
            results = _compute(step, arguments)
        except (IndexError, RuntimeError, ValueError) as error:
            raise PackageError(f"operation {op.name} ({op.kind}): {error}") from error
        for values, result in zip(runs, results, strict=True):
            parts = result if isinstance(result, tuple) else (result,)
            for (name, dtype), part in zip(op.outputs, parts, strict=True):
                values[name] = part.to(dtype)

    def _arguments(self, step: _Step, values: Mapping[str, Any]) -> Inputs:
        arguments = dict(step.fixed)
        for parameter, part in step.variable:
            arguments[parameter] = (
                [_value(one, values, self.constants) for one in part]
                if isinstance(part, tuple)
                else _value(part, values, self.constants)
            )
        return arguments


def _compute(step: _Step, arguments: Sequence[Inputs]) -> Sequence[Tensor | tuple[Tensor, ...]]:
    """The results of one operation in each run."""
    if step.operation.kind == "linear":
        return linear_each(arguments)
    compute = slice_assign if step.in_place else OPS[step.operation.kind]
    return [compute(given) for given in arguments]


def _value(part: _Part, values: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """A variable, a folded constant, or a constant written in place; None for a state."""
    if isinstance(part, Literal):
        return part.value
    return values[part] if part in values else constants.get(part)


def _state_of(op: Operation) -> str:
    """The state that an operation reads or writes."""
    name = op.inputs["input"][0]
    assert isinstance(name, str)
    return name


def matmul_dtype() -> torch.dtype:
    """fp16 if the CPU multiplies it with fp32 sums, else fp32, which holds fp16 exactly; both round the sum once."""
    native: bool = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.float16 if native else torch.float32


def _fold(program: Program) -> dict[str, Any]:
    """Every constant by name, quantized weights dequantized once to the dtype the program declares.

    The weight of a linear is stored under `_kernel_name`, in the dtype of the matrix product, apart from the value for
    other ops.
    """
    constants: dict[str, Any] = {}
    kernels = {op.inputs["weight"][0] for op in program.operations if op.kind == "linear"}
    others = {name for op in program.operations if op.kind != "linear" for name in _variables(op)}
    for op in filter(_is_constant, program.operations):
        _refuse_unknown(op)
        arguments = {
            parameter: part.value if isinstance(part, Literal) else constants[part]
            for parameter, (part,) in op.inputs.items()
        }
        value: Any = arguments["val"] if op.kind == "const" else OPS[op.kind](arguments)
        name, dtype = op.outputs[0]
        value = value.to(dtype) if isinstance(value, Tensor) else value
        half = isinstance(value, Tensor) and value.dtype == torch.float16
        if name in kernels and half:
            constants[_kernel_name(name)] = value.to(matmul_dtype())
        if name in others or name not in kernels or not half:
            constants[name] = value
    return constants


def _kernel_name(name: str) -> str:
    """Name of a weight's copy for linears; no MIL name contains a space."""
    return f"{name} for linear"


def _refuse_unknown(op: Operation) -> None:
    if op.kind not in OPS and op.kind not in (*_STATE_OPS, "const"):
        raise PackageError(f"operation {op.name}: this evaluator does not know {op.kind!r}; add it to operations.py")


def _schedule(program: Program, constants: Mapping[str, Any]) -> Iterator[_Step]:
    """The operations that run on a call, in order, each with the variables it frees."""
    operations = [_with_kernel(op, constants) for op in program.operations if not _is_constant(op)]
    last = _last_uses(operations)
    in_place = set(_in_place_updates(operations, last))
    computed = {*program.inputs, *(name for op in operations for name, _ in op.outputs)}
    for i, op in enumerate(operations):
        _refuse_unknown(op)
        names = {*_variables(op), *(name for name, _ in op.outputs)}
        done = tuple(name for name in names if last.get(name, i) <= i and name not in program.outputs)
        variable: dict[str, _Part | tuple[_Part, ...]] = {
            parameter: parts if parameter == "values" else parts[0]
            for parameter, parts in op.inputs.items()
            if not computed.isdisjoint(parts)
        }
        fixed = {
            parameter: settled(parameter, [_value(part, {}, constants) for part in parts])
            for parameter, parts in op.inputs.items()
            if parameter not in variable
        }
        yield _Step(op, i in in_place, done, fixed, tuple(variable.items()))


def _is_constant(op: Operation) -> bool:
    """Whether an operation is computed once, at load."""
    return op.kind == "const" or op.kind.startswith("constexpr_")


def _with_kernel(op: Operation, constants: Mapping[str, Any]) -> Operation:
    """A linear with the copy of its weight for matrix products; any other operation unchanged."""
    weight = op.inputs["weight"][0] if op.kind == "linear" else None
    if not isinstance(weight, str) or _kernel_name(weight) not in constants:
        return op
    return Operation(op.kind, op.name, {**op.inputs, "weight": (_kernel_name(weight),)}, op.outputs)


def _variables(op: Operation) -> list[str]:
    """Names that an operation reads."""
    return [part for parts in op.inputs.values() for part in parts if isinstance(part, str)]


def _last_uses(operations: list[Operation]) -> dict[str, int]:
    """Variable → index of the last operation that reads it."""
    return {name: i for i, op in enumerate(operations) for name in _variables(op)}


def _in_place_updates(operations: list[Operation], last: Mapping[str, int]) -> Iterator[int]:
    """Indices of slice_updates that may write into the state itself, since no result can differ.

    By then all earlier readings of the state are unused, they were only sliced (which copies) or updated, and the
    result goes straight back into the same state. Copying a whole cache per layer would cost more than the model.
    """
    readings = {op.outputs[0][0]: _state_of(op) for op in operations if op.kind == "read_state"}
    born = {name: i for i, op in enumerate(operations) for name, _ in op.outputs}
    kinds: dict[str, set[str]] = {state: set() for state in readings.values()}
    uses = Counter(name for op in operations for name in _variables(op))
    for op in operations:
        for name in _variables(op):
            if name in readings:
                kinds[readings[name]].add(op.kind)
    for i, op in enumerate(operations[:-1]):
        state = readings.get(str(op.inputs["x"][0])) if op.kind == "slice_update" else None
        following = operations[i + 1]
        if state is None or following.kind != "write_state" or _state_of(following) != state:
            continue
        result = op.outputs[0][0]
        only_written = following.inputs["data"] == (result,) and uses[result] == 1
        before = (name for name, owner in readings.items() if owner == state and born[name] < i)
        dead = all(last.get(name, 0) <= i for name in before)
        if only_written and dead and kinds[state] <= {"slice_by_index", "slice_update"}:
            yield i
