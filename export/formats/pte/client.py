"""The script of a `processes.LimitedWorker`: ExecuTorch's own tokenizer, the one that its runners use."""

import json
from typing import Any

from pytorch_tokenizers import CppHFTokenizer


def answer(request: dict[str, Any]) -> str:
    """Ids of each text, without BOS."""
    tokenizer = CppHFTokenizer()
    tokenizer.load(f"{request['folder']}/tokenizer.json")
    return json.dumps([list(tokenizer.encode(text, 0, 0)) for text in request["texts"]])
