"""A format for tests: every weight in one safetensors file, and a file that says which fault its session has."""

from safetensors.torch import save_file

from export.formats import Lowered, Needs
from export.manifest import IOContract, KVLayout, TensorSpec

FILES = ("model.safetensors", "model.fault")
TOOLS = ("safetensors",)
CACHES = ("float32",)
NO_CACHES = {}
NO_POLICIES = {}
LOGGERS = ("fake.runtime",)
FAULT = "model.fault"


def check(plan, architecture):
    pass


def needs(plan, architecture):
    return Needs(memory_bytes=10_000_000, disk_bytes=3_000_000)


def tokenizer_notes(folder):
    return ()


def process_bytes(described):
    return None


def lower(model, build):
    tensors = {}
    for name in model.architecture.tensor_shapes():
        weight = model.read(name)
        if hasattr(weight, "qdata"):
            tensors |= {f"{name}.qdata": weight.qdata, f"{name}.scale": weight.scale}
        else:
            tensors[name] = weight
    bits = {name: str(scheme.bits) for name, scheme in model.schemes.by_name.items()}
    save_file(tensors, build.folder / "model.safetensors", metadata=bits)
    (build.folder / FAULT).write_text("")
    return Lowered(contract_of(build.plan, model.architecture), {"linears": len(model.architecture.linear_shapes())})


def contract_of(plan, a):
    kv = KVLayout(
        kind="state", dtype="float32", layers=a.num_hidden_layers, kv_heads=a.num_key_value_heads,
        head_dim=a.head_dim, context_length=plan.model.context_length,
    )  # fmt: skip
    tokens = TensorSpec(name="tokens", dtype="int64", shape=(1, "sequence"))
    logits = TensorSpec(name="logits", dtype="float32", shape=(1, a.vocab_size))
    return IOContract(inputs=(tokens,), outputs=(logits,), states=(), kv=kv, max_prefill=64, logits="last")
