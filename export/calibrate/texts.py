"""The texts that a recipe calibrates with, in `configs/calibration`. Knows nothing about models."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError
from ..plan import CONFIGS, Mixture
from ..windows import cut

TEXT = CONFIGS / "calibration"
HUB = re.compile(r"([\w.-]+/[\w.-]+)@([\w.-]+)/([\w./-]+\.(?:txt|jsonl))")


def windows(mixture: Mixture, tokenizer: Any) -> torch.Tensor:
    """Token ids int64 [W, L] of all texts."""
    rows: list[list[int]] = []
    for text in mixture.texts:
        rows += cut(read(text.file), f"calibration text {text.file}", text.windows, mixture.length, tokenizer)
    return torch.tensor(rows)


def read(name: str) -> str:
    """One text."""
    if name.startswith("hub:"):
        return read_hub(name.removeprefix("hub:"))
    path: Path = TEXT / name
    if not path.is_file():
        raise ExportError(f"{path}: missing; a mixture in configs/mixtures names it")
    return path.read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line for line in read(name).splitlines() if line.strip()]


def read_hub(name: str) -> str:
    """`OWNER/NAME@REVISION/PATH` of a hub data set, through huggingface_hub's cache."""
    from httpx2 import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    match = HUB.fullmatch(name)
    if match is None:
        raise ExportError(f"calibration text hub:{name}: expected hub:OWNER/NAME@REVISION/PATH, a .txt or .jsonl file")
    repo, revision, file = match.groups()
    try:
        path = Path(hf_hub_download(repo, file, repo_type="dataset", revision=revision))
        content = path.read_text(encoding="utf-8")
        return (
            content if file.endswith(".txt") else "\n\n".join(json.loads(line)["text"] for line in content.splitlines())
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise ExportError(f"calibration text hub:{name} cannot be downloaded ({first_line(error)})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"calibration text hub:{name}: not lines of JSON with a field `text` ({error})") from None


def first_line(error: Exception) -> str:
    """What it says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sha256(mixture: Mixture | None) -> dict[str, str]:
    """File → digest of every text: what was read decides the integers."""
    if mixture is None:
        return {}
    names = [text.file for text in mixture.texts] + ([mixture.generated.prompts] if mixture.generated else [])
    return {name: hashlib.sha256(read(name).encode()).hexdigest() for name in names}
