"""Tokenizer files of an artifact, and the token ids its runtimes must know."""

from pathlib import Path
from typing import Any

from . import chat_template
from .contract import TokenizerIds
from .errors import ExportError
from .sources import Source


def write(source: Source, folder: Path, vocab_size: int) -> TokenizerIds:
    """Write the checkpoint's tokenizer into the artifact folder and read the ids back from what was written."""
    source.write_tokenizer(folder)
    tokenizer = load(folder)
    chat_template.check(tokenizer, "the checkpoint's tokenizer")
    ids = read_generation_ids(folder)
    eos, bos = ids.get("eos_token_id"), ids.get("bos_token_id")
    eos, bos = tokenizer.eos_token_id if eos is None else eos, tokenizer.bos_token_id if bos is None else bos
    if eos is None or eos == []:
        raise ExportError(
            "the checkpoint's tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if len(tokenizer) > vocab_size:
        raise ExportError(f"tokenizer has {len(tokenizer)} tokens, the model's vocab_size is {vocab_size}: not a pair")
    for token in (*eos_ids, *([] if bos is None else [bos])):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ExportError(
                f"generation_config.json: bos or eos id {token!r} is not one of {vocab_size} tokens; correct it"
            )
    return TokenizerIds(bos_id=bos, eos_ids=eos_ids, has_chat_template=bool(tokenizer.chat_template))


def read_generation_ids(folder: Path) -> dict[str, Any]:
    """bos and eos ids of generation_config.json, when there is one."""
    from .sources.safetensors_files import read_json

    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def load(folder: Path) -> Any:
    """The transformers tokenizer of an artifact or model folder, offline."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ExportError(f"{folder}: tokenizer files do not load ({' '.join(str(error).split())})") from None
