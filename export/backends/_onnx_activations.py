"""Which linears onnxruntime computes with float activations. Knows layers and kinds, no weights and no recipes' names.

With `accuracy_level` 4, MatMulNBits rounds activations to int8, one scale per block of the weight. What that costs was
measured linear by linear on SmolLM2-135M (int4 groups of 32; English, German, Hindi, Python; KL to the quantized model
0.0090 in all, and the contributions add up to it): q/k/v of layers 0 to 7 cause 0.0021, those of the other 22 layers
0.0011, down_proj of the first layer 0.0005, of the last 0.0003, of a typical one 0.00004. Errors in early queries and
keys pass through every later softmax. In float these ten take a third of the error away for about 2 % of a decode
step. The rest is spread evenly: all linears in float would take the error away and decode 1.35 times slower.
"""

from ..plan import WeightScheme

FLOAT_ACTIVATIONS, INT8_ACTIVATIONS = 1, 4
"""MatMulNBits accuracy_level: its fast kernels of 4-bit weights."""


def accuracy_level(stored: str, scheme: WeightScheme, layers: int) -> int:
    """The level of the weight stored under this name; 8-bit weights have no float kernel (40 times slower)."""
    return FLOAT_ACTIVATIONS if scheme.bits == 4 and stored in sensitive(layers) else INT8_ACTIVATIONS


def sensitive(layers: int) -> frozenset[str]:
    """q/k/v, stacked or not, of the first quarter of the layers; down_proj of the first and the last layer."""
    early = range(-(-layers // 4))
    qkv = {f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in early for kind in ("qkv", "q", "k", "v")}
    return frozenset(qkv | {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, layers - 1)})
