"""A format for tests: every weight in one safetensors file, and a file that says which fault its session has."""

from safetensors import safe_open
from safetensors.torch import save_file

from export.backends import Lowered, Needs, StoredWeight
from export.contract import IOContract, KVLayout, TensorSpec

FAULT = "model.fault"


def check(plan, architecture):
    pass


def needs(plan, architecture):
    return Needs(memory_bytes=10_000_000, disk_bytes=3_000_000)


def lower(model, build):
    tensors = {}
    for name in model.architecture.tensor_shapes():
        weight = model.read(name)
        if hasattr(weight, "qdata"):
            tensors |= {f"{name}.qdata": weight.qdata, f"{name}.scale": weight.scale}
        else:
            tensors[name] = weight
    save_file(tensors, build.folder / "model.safetensors")
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


def read_weights(artifact, architecture):
    with safe_open(artifact, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith(".qdata"):
                name = key.removesuffix(".qdata")
                qdata, scale = file.get_tensor(key), file.get_tensor(f"{name}.scale")
                yield StoredWeight(name=name, qdata=qdata.numpy(), scale=scale.numpy())
