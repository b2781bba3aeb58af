"""The card's own snippets, run as they stand: BOS once where the tokenizer adds one, and the text of our session."""

import json
import re
import subprocess
import sys

import pytest

from export import manifest
from export.checkpoints.origin import parse_origin
from export.checkpoints.tokenizer import load
from export.pipeline import export
from export.plan import load_plan
from runtime_tests.sessions import greedy, open_session
from tests.support.reliability import RUNTIME_TOKENIZER
from tests.support.tokenizers import ADDS_BOS, write_family

pytestmark = RUNTIME_TOKENIZER

PROMPT = "The capital of France is"
STEPS = 4


@pytest.fixture(scope="module", params=["smollm2", "fallback", "llama3"])
def family(request, tmp_path_factory):
    if request.param == "llama3":
        pytest.importorskip("llama_models", reason="llama-models (Meta's own tokenizer) is not installed")
    return request.param, write_family(tmp_path_factory.mktemp(request.param) / "checkpoint", request.param)


def run(folder, code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def snippet(folder):
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def continued(folder, ids):
    return greedy(open_session(folder, manifest.read(folder), threads=2), ids, STEPS)


def test_onnxruntime_genai_feeds_what_transformers_would(family, tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    kind, checkpoint = family
    out = tmp_path / "out"
    described = export(load_plan("llama", "int4-g32", "onnx-cpu"), parse_origin(str(checkpoint)), out)
    assert described.tokenizer.adds_bos == ADDS_BOS[kind]
    code = snippet(out).partition("stream = ")[0] + (
        f"fed = len(generator.get_sequence(0))\nfor _ in range({STEPS}):\n    generator.generate_next_token()\n"
        "print(fed, *generator.get_sequence(0))\n"
    )
    fed, *ids = map(int, run(out, code).split())
    expected = load(out).encode(PROMPT)
    assert ids[:fed] == expected
    assert ids.count(described.tokenizer.bos_id) == ADDS_BOS[kind]
    assert ids[fed:] == continued(out, expected)
    config = json.loads((out / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == list(described.tokenizer.eos_ids)
    assert config["search"]["chunk_size"] == 128


@pytest.mark.parametrize("adds", [True, False])
def test_executorchs_runner_feeds_one_bos_where_transformers_does(tmp_path, adds):
    pytest.importorskip("executorch", reason="executorch is not installed")
    checkpoint, out = write_family(tmp_path / "checkpoint", "fallback"), tmp_path / "out"
    if not adds:
        path = checkpoint / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    export(load_plan("llama", "int4-g32", "executorch-xnnpack"), parse_origin(str(checkpoint)), out)
    # a random model's bytes are no text, which Python's runner raises for: the prompt is counted before that
    done = subprocess.run([sys.executable, "-c", snippet(out)], check=False, cwd=out, capture_output=True, timeout=300)
    fed = re.search(rb"num_prompt_tokens (\d+)", done.stderr)[1]
    expected = load(out).encode(PROMPT)
    assert (expected[0] == 1) == adds
    assert int(fed) == len(expected)
    card = (out / "README.md").read_text()  # llama_main, LlmModuleConfig.kt, ExecuTorchLLMConfig.h
    assert [text in card for text in (" --num_bos=1", ".numBos(1)", "$0.bosCount = 1")] == [adds] * 3


def test_core_mls_ids_are_transformers_own(family, tmp_path):
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    kind, checkpoint = family
    out = tmp_path / "out"
    export(load_plan("llama", "int4-g32", "coreml"), parse_origin(str(checkpoint)), out)
    code = snippet(out)
    lines = [
        line for line in code.splitlines() if line.startswith(("import numpy", "from transformers", "tokenizer ="))
    ]
    lines += [line for line in code.splitlines() if line.startswith(("ids =", "tokens ="))]
    ids = run(out, "\n".join([*lines, "print(*tokens[0])"])).split()
    assert list(map(int, ids)) == load(out).encode(PROMPT)
    assert ("begins with BOS" in code) == ADDS_BOS[kind]
