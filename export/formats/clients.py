"""Stock clients read tokenizer.json by code of their own: what they make of it is compared with the file.

Their code is native and the file a stranger's, so it is read in a child process.
"""

import importlib.util
import json
from pathlib import Path

from export.checkpoints import tokenizer
from export.host.processes import LimitedWorker, LimitError, Limits

_LIMITS = Limits(memory_bytes=2**31, cpu_s=60, wall_s=240.0)
_SHOWN = 40
"""Characters of a sample."""


def difference(package: str, folder: Path, script: Path) -> str | None:
    """What a client reads otherwise than tokenizer.json; None: nothing, or the package is not installed.

    `script` is one of a `LimitedWorker`: it answers a folder and texts with their ids, without BOS, as JSON.
    """
    if importlib.util.find_spec(package) is None:
        return None
    expected = tokenizer.sample_ids(folder)
    worker = LimitedWorker(script)
    try:
        found = json.loads(worker.ask({"folder": str(folder), "texts": list(expected)}, _LIMITS))
    except LimitError as error:
        return f"does not load tokenizer.json ({error})"
    finally:
        worker.close()
    wrong = [text for text, ids in zip(expected, found, strict=True) if ids != expected[text]]
    if not wrong:
        return None
    shown = wrong[0] if len(wrong[0]) < _SHOWN else f"{wrong[0][:_SHOWN]}…"
    return f"encodes {len(wrong)} of {len(expected)} samples otherwise than tokenizer.json, {shown!r} among them"
