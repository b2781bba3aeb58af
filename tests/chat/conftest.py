"""Conversations with the tiny model, which answers in letters here."""

import numpy as np
import pytest

from export import manifest
from export.checkpoints import tokenizer
from runtime_tests.chat.conversation import Conversation, PrefixCache, Sampler
from tests.support.artifacts import reseal
from tests.support.conversations import SHORT, Counting, opened


@pytest.fixture
def words(built):
    return tokenizer.load(built)


@pytest.fixture(autouse=True)
def letters_only(monkeypatch, words):
    """The tiny model answers in letters: most of its tokens are no text by themselves, or none at all."""
    letters = words.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    others = np.setdiff1d(np.arange(512), letters)
    choose = Sampler.__call__

    def call(self, logits):
        if len(logits) == 512:
            logits[others] = logits.min() - 1000
        return choose(self, logits)

    monkeypatch.setattr(Sampler, "__call__", call)


@pytest.fixture
def short(artifact):
    """An artifact with a context of 64 tokens whose answers do not end."""
    described = manifest.read(artifact)
    contract, plan = described.contract, described.plan
    kv = contract.kv.model_copy(update={"context_length": SHORT})
    model = plan.model.model_copy(update={"context_length": SHORT})
    reseal(artifact, contract=contract.model_copy(update={"kv": kv}), plan=plan.model_copy(update={"model": model}))
    return artifact


@pytest.fixture
def talk(built, words):
    """A conversation with the tiny model; without a cache of its own it gets a fresh session."""

    def begin(session=None, max_new_tokens=12, folder=built, choose=None):
        session = Counting(session or opened(folder))
        described = manifest.read(folder)
        choose = choose or Sampler(0, 1, None)
        return Conversation(
            PrefixCache(session, manifest.digest(folder)), words, described.tokenizer, choose, max_new_tokens
        )

    return begin
