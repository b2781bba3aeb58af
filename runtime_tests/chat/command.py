"""python -m runtime_tests chat PATH [--system TEXT] …: chat with a built artifact through its own session."""

import os
from pathlib import Path
from typing import Annotated

import typer

from export import manifest
from export.checkpoints import tokenizer
from export.errors import ExportError
from export.formats import admission
from export.host.console import native_held, stage
from runtime_tests.places import environment


def chat(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="an artifact folder")],
    system: Annotated[str | None, typer.Option(help="system message; default: the chat template's own")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: greedy")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="draw from the likeliest tokens only")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="the same draws every time")] = None,
) -> None:
    """Chat with an artifact: on a terminal, or one message per line through a pipe."""
    if temperature == 0 and (top_p is not None or seed is not None):
        raise typer.BadParameter("--top-p and --seed draw tokens; give a --temperature above 0")
    described = manifest.read(folder)
    if not described.tokenizer.has_chat_template:
        raise ExportError(f"{folder}: its tokenizer has no chat template; build it from an instruct model")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with stage("load", described.id), native_held():  # ExecuTorch tells how it looks at the processor
        admission.require(folder, described)
        from runtime_tests.jobs.worker import LoadError, opened

        from .conversation import Conversation, PrefixCache, Sampler
        from .terminal import Terminal, say

        tokenizer.try_out(folder / "tokenizer.json")
        loaded_tokenizer = tokenizer.load(folder)
        try:
            session = opened(str(folder), environment.threads())
        except LoadError as error:
            raise ExportError(f"{folder}: does not load: {error}") from None
    if not session.measures_speed:
        say("its runtime is not on this machine; the reference evaluator computes the same, much slower")
    conversation = Conversation(
        cache=PrefixCache(session, manifest.digest(folder)),
        tokenizer=loaded_tokenizer,
        ids=described.tokenizer,
        choose=Sampler(temperature, 1.0 if top_p is None else top_p, seed),
        max_new_tokens=max_new_tokens,
    )
    conversation.instruct(system)
    answered = Terminal(conversation, session.measures_speed).run()
    session.close()
    if not answered:
        raise typer.Exit(1)
