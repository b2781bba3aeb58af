"""Runs a saved Core ML package op by op on any host: a reference for correctness, never for speed.

It executes what the file says, constants and states included, and rounds every result to the dtype the program
declares, as Core ML does on CPU and GPU. It does not know the Neural Engine's arithmetic, nor who wrote the package.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export import first_calls

from .mil_ops import OPS, Inputs, slice_assign
from .mil_package import Literal, Operation, PackageError, Program, load

STATE_OPS = ("read_state", "write_state")


@dataclass(frozen=True)
class Step:
    """One operation that runs on every call."""

    operation: Operation
    in_place: bool
    """A slice_update that may write into the state it read."""
    finished: tuple[str, ...]
    """Variables nobody needs after this step."""


class Evaluator:
    """One loaded package with one set of states."""

    def __init__(self, package: Path) -> None:
        first_calls.settle()
        self.program = load(package)
        self.constants = fold(self.program)
        self.steps = list(schedule(self.program, self.constants))
        self.states: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Zero the states, as `make_state` does."""
        self.states = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in self.program.states.items()}

    @torch.inference_mode()
    def predict(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once; states carry over to the next call. Inputs must be those the package declares."""
        if {name: value.dtype for name, value in inputs.items()} != dict(self.program.inputs):
            raise PackageError(f"inputs must be {dict(self.program.inputs)}")
        values: dict[str, Any] = dict(inputs)
        for step in self.steps:
            self.run(step, values)
            for name in step.finished:
                values.pop(name, None)
        return {name: values[name] for name in self.program.outputs}

    def run(self, step: Step, values: dict[str, Any]) -> None:
        """One operation: its results, rounded as declared, go into `values` or a state."""
        op = step.operation
        arguments = self.resolve(op, values)
        if op.kind == "write_state":
            self.states[state_of(op)] = arguments["data"]
            return
        if op.kind == "read_state":
            values[op.outputs[0][0]] = self.states[state_of(op)]
            return
        compute = slice_assign if step.in_place else OPS[op.kind]
        try:
            results = compute(arguments)
        except (IndexError, RuntimeError, ValueError) as error:
            raise PackageError(f"operation {op.name} ({op.kind}): {error}") from error
        for (name, dtype), result in zip(
            op.outputs, results if isinstance(results, tuple) else (results,), strict=True
        ):
            values[name] = result if dtype is None else result.to(dtype)

    def resolve(self, op: Operation, values: Mapping[str, Any]) -> Inputs:
        """Arguments of an operation; a list parameter stays a list."""
        return {
            parameter: [self.value(part, values) for part in parts]
            if parameter == "values"
            else self.value(parts[0], values)
            for parameter, parts in op.inputs.items()
        }

    def value(self, part: str | Literal, values: Mapping[str, Any]) -> Any:
        """A variable, a folded constant, or a constant in place; None for a state."""
        if isinstance(part, Literal):
            return part.value
        return values[part] if part in values else self.constants.get(part)


def state_of(op: Operation) -> str:
    """The state an operation reads or writes."""
    name = op.inputs["input"][0]
    assert isinstance(name, str)
    return name


def matmul_dtype() -> torch.dtype:
    """fp16 where the CPU multiplies it with fp32 sums, else fp32, which holds fp16 exactly; both round the sum once."""
    native: bool = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.float16 if native else torch.float32


def fold(program: Program) -> dict[str, Any]:
    """Every constant by name, quantized weights dequantized once to the dtype the program declares.

    A linear finds its weight under `kernel_name`, in the dtype of the matrix product, beside what other ops see.
    """
    constants: dict[str, Any] = {}
    kernels = {op.inputs["weight"][0] for op in program.operations if op.kind == "linear"}
    others = {name for op in program.operations if op.kind != "linear" for name in variables(op)}
    for op in filter(folded, program.operations):
        refuse_unknown(op)
        arguments = {
            parameter: part.value if isinstance(part, Literal) else constants[part]
            for parameter, (part,) in op.inputs.items()
        }
        value: Any = arguments["val"] if op.kind == "const" else OPS[op.kind](arguments)
        name, dtype = op.outputs[0]
        value = value.to(dtype) if isinstance(value, Tensor) else value
        half = isinstance(value, Tensor) and value.dtype == torch.float16
        if name in kernels and half:
            constants[kernel_name(name)] = value.to(matmul_dtype())
        if name in others or name not in kernels or not half:
            constants[name] = value
    return constants


def kernel_name(name: str) -> str:
    """A weight as linears see it; no MIL name holds a space."""
    return f"{name} for linear"


def refuse_unknown(op: Operation) -> None:
    """An op outside the table is an error that names it."""
    if op.kind not in OPS and op.kind not in (*STATE_OPS, "const"):
        raise PackageError(f"operation {op.name}: this evaluator does not know {op.kind!r}; add it to mil_ops.py")


def schedule(program: Program, constants: Mapping[str, Any]) -> Iterator[Step]:
    """The operations that run on a call, in order, each with what it frees."""
    operations = [with_kernel(op, constants) for op in program.operations if not folded(op)]
    last = last_uses(operations)
    in_place = set(in_place_updates(operations, last))
    for i, op in enumerate(operations):
        refuse_unknown(op)
        names = {*variables(op), *(name for name, _ in op.outputs)}
        done = tuple(name for name in names if last.get(name, i) <= i and name not in program.outputs)
        yield Step(op, i in in_place, done)


def folded(op: Operation) -> bool:
    """Computed once, at load."""
    return op.kind == "const" or op.kind.startswith("constexpr_")


def with_kernel(op: Operation, constants: Mapping[str, Any]) -> Operation:
    """A linear reads the copy of its weight made for matrix products."""
    weight = op.inputs["weight"][0] if op.kind == "linear" else None
    if not isinstance(weight, str) or kernel_name(weight) not in constants:
        return op
    return Operation(op.kind, op.name, {**op.inputs, "weight": (kernel_name(weight),)}, op.outputs)


def variables(op: Operation) -> list[str]:
    """Names an operation reads."""
    return [part for parts in op.inputs.values() for part in parts if isinstance(part, str)]


def last_uses(operations: list[Operation]) -> dict[str, int]:
    """Variable → index of the last operation that reads it."""
    return {name: i for i, op in enumerate(operations) for name in variables(op)}


def in_place_updates(operations: list[Operation], last: Mapping[str, int]) -> Iterator[int]:
    """slice_updates of a state that may skip the copy, since nobody can see the difference.

    The state's earlier readings are all dead by then, were only ever sliced (which copies) or updated, and the
    result goes straight back into the same state. Copying a whole cache per layer would cost more than the model.
    """
    readings = {op.outputs[0][0]: state_of(op) for op in operations if op.kind == "read_state"}
    born = {name: i for i, op in enumerate(operations) for name, _ in op.outputs}
    kinds: dict[str, set[str]] = {state: set() for state in readings.values()}
    uses = Counter(name for op in operations for name in variables(op))
    for op in operations:
        for name in variables(op):
            if name in readings:
                kinds[readings[name]].add(op.kind)
    for i, op in enumerate(operations[:-1]):
        state = readings.get(str(op.inputs["x"][0])) if op.kind == "slice_update" else None
        following = operations[i + 1]
        if state is None or following.kind != "write_state" or state_of(following) != state:
            continue
        result = op.outputs[0][0]
        only_written = following.inputs["data"] == (result,) and uses[result] == 1
        before = (name for name, owner in readings.items() if owner == state and born[name] < i)
        dead = all(last.get(name, 0) <= i for name in before)
        if only_written and dead and kinds[state] <= {"slice_by_index", "slice_update"}:
            yield i
