"""What the fake format's safetensors file holds."""

from safetensors import safe_open

from export.formats import Contents, Entry, StoredTensor, StoredWeight
from export.manifest import TensorSpec

FORMAT = "test weights"


def recognizes(path):
    return path.suffix == ".safetensors" and (path.parent / "model.fault").is_file()


def contents(path, architecture):
    tokens = TensorSpec(name="tokens", dtype="int64", shape=(1, "sequence"))
    logits = TensorSpec(name="logits", dtype="float32", shape=(1, "vocabulary"))
    return Contents(
        format=FORMAT,
        facts={},
        entries=(Entry(name="main", inputs=(tokens,), outputs=(logits,), value=None),),
        cache=(TensorSpec(name="cache", dtype="float32", shape=_cache(architecture)),),
        ops={},
        delegate_calls={},
        delegated_ops={},
        tensors=tuple(stored(path)),
        bytes=path.stat().st_size,
    )


def _cache(a):
    return (2, a.num_hidden_layers, a.num_key_value_heads, "context", a.head_dim) if a else ("context",)


def stored(path):
    with safe_open(path, framework="np") as file:
        bits = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118
            tensor, name = file.get_tensor(key), key.removesuffix(".qdata").removesuffix(".scale")
            dtype = f"int{bits.get(name, 8)}" if key.endswith(".qdata") else str(tensor.dtype)
            kind = "scales" if key.endswith(".scale") else "weight"
            yield StoredTensor(name=name, kind=kind, dtype=dtype, shape=tensor.shape, bytes=tensor.nbytes)


def structure(path):
    yield from ()


def read_weights(path, architecture):
    with safe_open(path, framework="np") as file:
        for name in (key.removesuffix(".qdata") for key in file.keys() if key.endswith(".qdata")):  # noqa: SIM118
            qdata, scale = file.get_tensor(f"{name}.qdata"), file.get_tensor(f"{name}.scale")
            yield StoredWeight(name=name, qdata=qdata, scale=scale)


def product_bytes(artifact):
    return None
