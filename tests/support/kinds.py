"""Kinds of what people's own files and machines do: marks of tests, and rows of docs/reliability.md."""

import pytest

IDENTITY = pytest.mark.kind(
    "what belongs to a checkpoint: weights, settings, tokenizer, templates, adapter, code, commit",
    "a change is seen and named; what cannot be known is `unknown`",
)
DISAGREEMENT = pytest.mark.kind(
    "where two places say one thing", "joined as transformers does and said, or refused by name"
)
RUNTIME_TOKENIZER = pytest.mark.kind(
    "the tokenizer that runtimes will use", "the ids of tokenizer.json, one BOS, every end; else a note on the card"
)
SMALL_DIFFERENCE = pytest.mark.kind(
    "small differences: short contexts, numbers of float32, one token more",
    "accepted and said, or refused with the remedy",
)
LOCATION = pytest.mark.kind(
    "where it lies: links, blobs, any characters in a path, no locks, nothing writable", "works, or one line"
)
MOVED_ARTIFACT = pytest.mark.kind(
    "artifacts that went through hubs, git and file managers", "whole; links refused alike by every command"
)
CONVERSATION = pytest.mark.kind(
    "a conversation goes on: broken text, refused messages, closed streams", "one line, and the rest is answered"
)
FOREIGN_WORDS = pytest.mark.kind(
    "what devices, shells and loaders of others print and lack",
    "not taken for an answer; told in their words with a remedy",
)
NOT_DAMAGED = pytest.mark.kind(
    "what is not damaged: pointers, other forms, types and settings", "named as what it is, with a remedy that works"
)
NUMBERS = pytest.mark.kind("numbers out of range, ids out of the vocabulary, batches", "red, or refused")
TELEMETRY = pytest.mark.kind("onnxruntime's telemetry", "nothing is written at home")
