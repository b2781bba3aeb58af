"""What stock clients make of the tokenizer in an artifact: tokenizer.json's ids, or a note on the card."""

import importlib.util

import pytest

from export import formats
from tests.support.reliability import RUNTIME_TOKENIZER
from tests.support.tokenizers import SHAPES, write_fallback, write_tokenizer

pytestmark = RUNTIME_TOKENIZER

PACKAGES = {"onnx_kv": "onnxruntime_genai", "pte": "pytorch_tokenizers"}
FAMILIES = (*SHAPES, "metaspace")
FEED = "; feed it ids where text has such parts"
NOTES = {
    ("smollm2", "onnx_kv"): "onnxruntime-genai encodes 1 of 11 samples otherwise than tokenizer.json, "
    r"'a\n\n12345\r\n\n\n x   y\t\t 2024-01-31' among them" + FEED,
    ("metaspace", "onnx_kv"): "onnxruntime-genai encodes 1 of 11 samples otherwise than tokenizer.json, "
    r"'  two leading spaces,\ttab,\nnewline, trai…' among them" + FEED,
    ("metaspace", "pte"): "ExecuTorch's tokenizer does not load tokenizer.json (RuntimeError: Failed to load HF "
    "tokenizer); give its runner ids instead of text",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "metaspace":
        write_fallback(folder, metaspace=True)
    else:
        write_tokenizer(folder, request.param)
    return request.param, folder


@pytest.mark.parametrize("name", ["mlpackage", "onnx_kv", "pte"])
def test_stock_clients_read_the_file_as_it_is_or_a_note_says_so(family, name):
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    kind, folder = family
    expected = NOTES.get((kind, name))
    assert formats.load(name).tokenizer_notes(folder) == (() if expected is None else (expected,))
