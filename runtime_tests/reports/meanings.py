"""What each gate means to somebody who reads the report: what was measured, and whom it suspects."""

from runtime_tests.evidence.regression import AGAINST

_MEANINGS = {
    "files intact: problems": "Every file is the one that the build wrote, by sha256. Suspect: a copy or download.",
    "evaluation text read in calibration": "The recipe calibrated on none of the text that judges it.",
    "tokenizer: differences": "Text becomes the ids that the checkpoint's own tokenizer and chat template give.",
    "weights: differing numbers": "Integers and scales read back from the file are those quantized, bit for bit. "
    "Suspect: the writing of the file.",
    "rewriting: max error": "Our fp32 model against Transformers, largest difference over the largest logit. "
    "Suspect: our model, or how the checkpoint was read.",
    "quantization: mean KL": "How far probabilities move when weights become integers, nats. Suspect: the recipe.",
    "quantization: top-1": "Positions where the quantized model's likeliest token is still the same. "
    "Suspect: the recipe.",
    "lowering: mean KL": "How far the file in its runtime is from the quantized model, nats. "
    "Suspect: the converter or the runtime.",
    "lowering: top-1": "Positions where the file's likeliest token is the quantized model's. "
    "Suspect: the converter or the runtime.",
    "lowering: SQNR": "The quantized model's logits over the file's difference from them, dB: more is closer. "
    "Suspect: the converter or the runtime.",
    "lowering: best probe SQNR": "The same for single tokens, the best of them: rounding has not grown there, so what "
    "is left is a wrong conversion.",
    "logits finite: problems": "No logit is NaN or infinite. Suspect: an overflow in the runtime.",
    "template tokens finite: problems": "The same after the special tokens of the chat template.",
    "cache: mean KL": "How far the file with its kind of cache is from the quantized model with a float32 one, of the "
    "same policy, nats, where it is farthest: near the start, further on, or at the end of the context. Suspects: the "
    "cache's scales, its policy.",
    "cache: top-1": "Positions there where the likeliest token is still the same. Suspects as before.",
    "cache in the file: differences": "The buffers of the KV cache are those that the manifest describes.",
    "cache: broken promises": "The KV cache where a prompt is cut, at its last position, past it, after a reset, a "
    "rewind and a refusal.",
    "golden tokens": "Greedy answers equal to the stored ones of this model, token by token.",
    "tokens as on this machine: gap in logits": "The device's greedy answer is this machine's, up to a choice so close "
    "that rounding decides it.",
    "decode tokens/s": "Fast enough for the device's budget, one token after another.",
    "time to first token, s": "Soon enough for the device's budget, after the shortest prompt.",
}
_BASELINE = "Not worse than what this device reached before, beyond the noise of both runs."


def of(gate: str) -> str:
    """The meaning of a gate by its name; empty: a gate of another version."""
    return _BASELINE if AGAINST in gate else _MEANINGS.get(gate, "")
