"""Every contender by name: whose file, which runtime, compared with whom. Builds and times nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

PTE, ONNX = "executorch-xnnpack", "onnx-cpu"


class Runtime(NamedTuple):
    """A module in runners."""

    label: str
    file: str = ""
    """What it opens inside an artifact's folder; empty: the folder."""
    kv_dtype: str = "float32"
    """Keys and values of stock artifacts there."""


RUNTIMES = {
    "pte": Runtime("ExecuTorch Python runtime, stepped", "model.pte"),
    "llm_runner": Runtime("ExecuTorch TextLLMRunner", "model.pte"),
    "device_runner": Runtime("our C++ runner", "model.pte"),
    "genai": Runtime("onnxruntime-genai"),
    "session": Runtime("our session, onnxruntime with IO binding"),
    "evaluator": Runtime("our evaluator of the saved package"),
    "llamacpp": Runtime("llama.cpp", "model.gguf", "float16"),
}


@dataclass(frozen=True)
class Role:
    """A contender before anything is built."""

    name: str
    label: str
    runner: str
    """Module in runners."""
    target: str | None
    """Our target it belongs to; None: any."""
    recipe: str | None
    """Recipe of the stock artifact; None: ours."""
    against: tuple[str, ...] = ()
    quant: str | None = None
    """Recipe of ours; None: the one the benchmark is about."""


def llama_cpp(kind: str) -> Role:
    """llama.cpp with one of its own mixtures; another kind needs a recipe of the same name."""
    return Role(f"llamacpp-{kind}", f"llama.cpp {kind.upper()}", "llamacpp", None, f"llamacpp-{kind}")


LLAMA_CPP = ("llamacpp-q4_0", "llamacpp-q4_k_m")
ROLES = (
    Role("pte", "our .pte", "pte", PTE, None, ("pte-stock",)),
    Role("pte-stock", "export_llm .pte", "pte", PTE, "export_llm"),
    Role("runner", "our .pte", "llm_runner", PTE, None, ("runner-stock",)),
    Role("runner-stock", "export_llm .pte", "llm_runner", PTE, "export_llm"),
    Role("device-runner", "our .pte", "device_runner", PTE, None, ("runner-stock", "pte-stock", *LLAMA_CPP)),
    Role("genai", "our ONNX", "genai", ONNX, None, ("genai-stock", "genai-stock-head8", *LLAMA_CPP)),
    Role("genai-stock", "genai builder, default (int4 head)", "genai", ONNX, "genai"),
    Role("genai-stock-head8", "genai builder, int8 head, float embedding", "genai", ONNX, "genai-head8"),
    Role("session", "our ONNX", "session", ONNX, None, ("genai-stock", "genai-stock-head8", *LLAMA_CPP)),
    llama_cpp("q4_0"),
    llama_cpp("q4_k_m"),
)
VARIED = ("device-runner", "genai", "session")
"""Ours that are measured with other recipes too, where asked."""


def roles(names: Sequence[str], also: Sequence[str]) -> list[Role]:
    """The named contenders; those of VARIED again for each further recipe of ours, named `NAME@RECIPE`."""
    chosen = [role for role in ROLES if role.name in names]
    varied = [role for role in chosen if role.name in VARIED]
    others = [
        replace(role, name=f"{role.name}@{quant}", label=f"{role.label}, {quant}", quant=quant)
        for quant in also
        for role in varied
    ]
    return chosen + others


class Form(NamedTuple):
    """How an artifact of ours is judged."""

    label: str
    runner: str


OUR_FORMS = {
    ONNX: Form("our ONNX", "session"),
    PTE: Form("our .pte", "pte"),
    "coreml": Form("our .mlpackage", "evaluator"),
}
LLAMA_CPP_KINDS = ("q4_0", "q4_k_m", "q8_0")
