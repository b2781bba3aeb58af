"""What one child process measured of one contender, as strict JSON. Knows nothing about how it was measured."""

from statistics import median

from export.plan import Strict

Passes = tuple[tuple[int, int], ...]
"""(tokens, nanoseconds) of each pass."""


class Timing(Strict):
    """What one child process measured."""

    load_ns: int
    first_ns: int
    """The first prompt after loading, when runtimes pack weights."""
    prompts: dict[int, Passes]
    """By prompt length."""
    decode: Passes
    far: Passes
    """Generation after a long prompt; empty when it was not asked for."""
    peak_rss_bytes: int
    """Before the long prompt."""
    far_peak_rss_bytes: int
    """After it."""

    @property
    def ttft_s(self) -> float:
        """Seconds from the shortest prompt's tokens to its logits, warm."""
        return median(ns for _, ns in self.prompts[min(self.prompts)]) / 1e9

    def prefill_tps(self, length: int) -> float:
        """Prompt tokens per second."""
        return rate(self.prompts[length])

    @property
    def decode_tps(self) -> float:
        """Generated tokens per second."""
        return rate(self.decode)

    @property
    def far_decode_tps(self) -> float:
        """Generated tokens per second after the long prompt."""
        return rate(self.far)


def rate(passes: Passes) -> float:
    """Tokens per second, the median of the passes."""
    return median(tokens * 1e9 / ns for tokens, ns in passes)
