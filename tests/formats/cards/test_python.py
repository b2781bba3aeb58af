"""The card's own Python, run as it stands: what Transformers would feed, BOS once, then the tokens of our session."""

import json
import re

import pytest

from export import manifest
from export.checkpoints import chat_template
from export.checkpoints.origin import parse_origin
from export.checkpoints.tokenizer import load
from export.pipeline import export
from export.plan import load_plan
from runtime_tests.sessions import greedy, open_session
from tests.formats.cards import snippets
from tests.support.reliability import RUNTIME_TOKENIZER
from tests.support.tokenizers import ADDS_BOS, write_family

pytestmark = RUNTIME_TOKENIZER

BEGINNING = "The capital of France is"
LOOP = "fed, ids = past - len(answer) + (answer[-1:] == [token]), answer"
"""The last token of an answer is fed only if another one comes."""
CLIENTS = {
    "onnxruntime-genai": ("onnx-cpu", 0, "fed, ids = len(ids), generator.get_sequence(0)[len(ids) :]"),
    "onnxruntime": ("onnx-cpu", 1, LOOP),
    "coremltools": ("coreml", 0, LOOP),
}
"""Target, which block of Python on its card, and how to tell what it fed and chose."""


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    if request.param == "llama3":
        pytest.importorskip("llama_models", reason="llama-models (Meta's own tokenizer) is not installed")
    return request.param, write_family(tmp_path_factory.mktemp(request.param) / "checkpoint", request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model without a chat template, whose tokenizer adds a BOS."""
    return "fallback", write_family(tmp_path_factory.mktemp("base") / "checkpoint", "fallback", chat_template=None)


def built(checkpoint, target, out):
    described = export(load_plan("llama", "int4-g32", target), parse_origin(str(checkpoint)), out)
    return described, (out / manifest.CARD).read_text(encoding="utf-8")


def prompt_ids(folder, described):
    """What Transformers feeds: the conversation of the chat template, or the beginning of a text."""
    tokenizer = load(folder)
    if described.tokenizer.has_chat_template:
        return chat_template.token_ids(tokenizer, chat_template.QUESTION, "test")
    return tokenizer.encode(BEGINNING)


def require_same(client, kind, checkpoint, tmp_path):
    pytest.importorskip(client.replace("-", "_"), reason=f"{client} is not installed")
    target, number, told = CLIENTS[client]
    out = tmp_path / "out"
    described, card = built(checkpoint, target, out)
    command, code = snippets.python(card)[number]
    versions = described.tools
    assert command.startswith(f"pip install {client}=={versions[client]} ")
    for package in ("transformers", "jinja2"):
        needed = "transformers" in code and (package != "jinja2" or "apply_chat_template" in code)
        assert (f" {package}=={versions[package]}" in command) == needed
    assert all("==" in package for package in command.split()[2:])
    assert "+cpu" not in command
    stand_in = snippets.EVALUATED if client == "coremltools" else ""
    done = snippets.run(out, f"{stand_in}{code}\n{told}\nprint()\nprint(fed, *ids)\n", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    fed, *answer = map(int, done.stdout.splitlines()[-1].split())
    expected = prompt_ids(out, described)
    assert fed == len(expected)
    written = (described.tokenizer.chat_example or "").count("<|im_start|>")  # of SmolLM2, whose BOS it is
    assert expected.count(described.tokenizer.bos_id) == (ADDS_BOS[kind] or written)
    assert answer[:8] == greedy(open_session(out, described, threads=2), expected, 8)[: len(answer)]
    return described, code


@pytest.mark.parametrize(
    ("family", "client"),
    [*((kind, "onnxruntime-genai") for kind in ADDS_BOS), ("smollm2", "onnxruntime"), ("fallback", "coremltools")],
    indirect=["family"],
)
def test_a_conversation_is_fed_as_the_chat_template_writes_it(family, client, tmp_path):
    described, code = require_same(client, *family, tmp_path)
    assert described.tokenizer.has_chat_template
    assert chat_template.QUESTION[0]["content"] in code


@pytest.mark.parametrize("client", CLIENTS)
def test_a_base_model_continues_a_text(base, client, tmp_path):
    described, code = require_same(client, *base, tmp_path)
    assert not described.tokenizer.has_chat_template
    assert "apply_chat_template" not in code


@pytest.mark.parametrize("kind", ["conversation", "text", "text without BOS"])
def test_executorchs_runner_feeds_what_transformers_would(tmp_path, kind):
    pytest.importorskip("executorch", reason="executorch is not installed")
    checkpoint, out = write_family(tmp_path / "checkpoint", "fallback"), tmp_path / "out"
    if kind != "conversation":
        write_family(checkpoint, "fallback", chat_template=None)
    if kind == "text without BOS":
        path = checkpoint / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    described, card = built(checkpoint, "executorch-xnnpack", out)
    ((command, code),) = snippets.python(card)
    versions = {**described.tools, "torch": described.tools["torch"].partition("+")[0]}
    packages = ["executorch", "torch", *["transformers", "jinja2"] * (kind == "conversation")]
    assert command == " ".join(["pip install", *(f"{package}=={versions[package]}" for package in packages)])
    # a random model's bytes are no text, which Python's runner raises for: the prompt is counted before that
    fed = re.search(r"num_prompt_tokens (\d+)", snippets.run(out, code, tmp_path).stderr)[1]
    assert int(fed) == len(prompt_ids(out, described))
    counts = re.findall(r"--num_bos=(\d)|\.numBos\((\d)\)|\$0\.bosCount = (\d)", card)
    assert [int("".join(found)) for found in counts] == [int(kind == "text")] * 3
