"""An attached device's greedy tokens against this machine's. Knows no format.

Two processors round differently in the last bit, and int8 activations make that bit grow (docs/decisions.md, "Rounding
is chaotic"). So answers may part, but only at a choice so close that noise of that size decides it: the gap between
the two tokens' logits on this machine is at most three standard deviations of what noise does to such a gap.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.progress import stage

from . import gates, jobs
from .case import Case, ask, ask_artifact
from .evaluation import Windows
from .generate import common_prefix

DEVIATIONS = 3


def check(case: Case, windows: Windows, files: dict[str, Path]) -> None:
    """Generate here and there, where the target asks for it and artifacts run elsewhere."""
    count, place = case.limits.compared_tokens, case.setting.place
    if count is None or not place.attached:
        return
    prompt = tuple(windows.tokens[0, : windows.prefill].tolist())
    with stage("tokens", f"{count}, here and there"):
        job = jobs.GenerateJob(folder=case.folder_text, threads=case.setting.threads, prompt=prompt, count=count)
        wanted = ask(case, job, "tokens here")["tokens"]
        found = ask_artifact(case, job.model_copy(update={"threads": place.threads}), "tokens there")["tokens"]
        same = common_prefix(wanted, found)
        gap = 0.0
        if same < count:
            logits = logits_here(case, [*prompt, *wanted[:same]])
            gap = float(logits[wanted[same]] - logits[found[same]])
        noise = DEVIATIONS * gap_noise(files) if "noise" in files else 0.0
    case.gates.append(gates.same_tokens(same, count, gap, noise))


def logits_here(case: Case, tokens: list[int]) -> NDArray[np.float32]:
    """Logits [V] of the artifact on this machine after these tokens."""
    given, out = case.setting.scratch / "parting.npy", case.setting.scratch / "parting-logits.npy"
    np.save(given, np.array([[*tokens, 0]], np.int64))  # the last one is not fed
    task = jobs.Task(tokens=str(given), prefill=len(tokens), out=str(out))
    ask(case, jobs.LogitsJob(folder=case.folder_text, threads=case.setting.threads, tasks=(task,)), "parting")
    logits: NDArray[np.float32] = np.load(out)[0, 0]
    return logits


def gap_noise(files: dict[str, Path]) -> float:
    """Standard deviation of what noise of one ulp does to the difference of two logits."""
    quiet, noisy = (np.load(files[name], mmap_mode="r") for name in ("quantized", "noise"))
    return float(np.sqrt(2 * np.mean([np.var(a - b, axis=-1).mean() for a, b in zip(quiet, noisy, strict=True)])))
