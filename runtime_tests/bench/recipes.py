"""How each stock artifact is made: a command of a tool other than ours, and what decides its result. Runs nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a child process makes one folder. `{…}` in arguments: `out`, `context`, or the folder of an input."""

    name: str
    module: str
    """Run as `python -m`."""
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    """Names of the recipes it needs first."""
    tools: tuple[str, ...]
    """Packages whose versions decide the result; the first one is the exporter."""


EXPORT_LLM = (
    "base.model_class=llama3_2",
    "base.checkpoint={meta}/consolidated.00.pth",
    "base.params={meta}/params.json",
    'base.metadata=\'{{"get_bos_id": {bos}, "get_eos_ids": [{eos}]}}\'',
    "model.dtype_override=fp32",
    "model.enable_dynamic_shape=True",
    "model.use_kv_cache=True",
    "model.use_sdpa_with_kv_cache=True",
    "export.max_seq_length={context}",
    "export.max_context_length={context}",
    "export.output_name={out}/model.pte",
    "quantization.qmode=8da4w",
    "quantization.group_size={group}",
    "quantization.embedding_quantize='8,0'",
    "backend.xnnpack.enabled=True",
    "backend.xnnpack.extended_ops=True",
    "hydra.run.dir={out}/hydra",
)
GENAI = ("-i", "{huggingface}", "-o", "{out}", "-p", "int4", "-e", "cpu", "-c", "{out}/cache", "--extra_options")
GENAI_INT4 = ("int4_block_size={group}", "int4_accuracy_level=4")
GENAI_HEAD8 = ("matmul_mixed_precision=last_matmul:int8", "shared_embeddings=false")
"""The one way to an int8 head that works in 0.18: `rtn_last` and `k_quant_last` leave a tied head at int4, and a shared
int8 table refers to a tensor that is not in the file."""
FORM = "runtime_tests.bench.checkpoints"
GENAI_TOOLS = ("onnxruntime-genai", "onnxruntime", "onnx-ir", "transformers", "torch")


def llama_cpp(kind: str) -> Recipe:
    """llama.cpp's quantizer with one of its own mixtures, from our weights as a GGUF."""
    arguments = ("{gguf}/model.gguf", "{out}/model.gguf", kind)
    return Recipe(f"llamacpp-{kind}", "runtime_tests.bench.llama_quantize", arguments, ("gguf",), ("llama-cpp-python",))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("huggingface", FORM, ("huggingface", "{out}", "{manifest}", "{source}"), (), ("torch", "safetensors")),
        Recipe("meta", FORM, ("meta", "{out}", "{manifest}", "{source}"), (), ("torch",)),
        Recipe(
            "export_llm",
            "executorch.extension.llm.export.export_llm",
            EXPORT_LLM,
            ("meta",),
            ("executorch", "torchao", "torch"),
        ),
        Recipe("gguf", FORM, ("gguf", "{out}", "{manifest}", "{source}"), (), ("gguf", "torch")),
        Recipe("genai", "onnxruntime_genai.models.builder", (*GENAI, *GENAI_INT4), ("huggingface",), GENAI_TOOLS),
        Recipe(
            "genai-head8",
            "onnxruntime_genai.models.builder",
            (*GENAI, *GENAI_INT4, *GENAI_HEAD8),
            ("huggingface",),
            GENAI_TOOLS,
        ),
        llama_cpp("q4_0"),
        llama_cpp("q4_k_m"),
        llama_cpp("q8_0"),
    )
}
