"""The card's Kotlin, Swift and shell, checked by their compilers where there are any, against the APIs in `stubs`."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from export import card, manifest
from export.formats import usage
from tests.formats.cards import snippets

STUBS = Path(__file__).parent / "stubs"
QUOTED = "a \"b\" $c \\d\n\t'e' ${f} 🙂é"
"""What ends strings, or is more than it seems in them."""
OPTIONS = {
    "model_path", "tokenizer_path", "prompt", "prompt_file", "temperature", "max_new_tokens", "num_bos", "num_eos",
    "cpu_threads", "seq_len", "warmup", "ignore_eos",
}  # fmt: skip
"""Of ExecuTorch's llama_main, 1.4.1 to 1.5."""


def compiler(name, where):
    return shutil.which(name) or pytest.skip(f"no {name} on PATH: {where}")


def compiled(command, folder):
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(params=["conversation", "text"])
def render(request, built):
    """Renders a card of an instruct or base model for a backend."""
    described = manifest.read(built)
    hostile = f"<|user|>{QUOTED}<|end|>" if request.param == "conversation" else None
    ids = {"chat_example": hostile, "ends": (QUOTED, "</s>"), "eos_ids": (2, 3), "adds_bos": True}
    tokenizer = described.tokenizer.model_copy(update=ids)

    def render(backend):
        target = described.plan.target.model_copy(update={"backend": backend})
        plan = described.plan.model_copy(update={"target": target})
        tools = {"executorch": "1.5.1", "torch": "2.13.0+cpu"}
        return card.render(described.model_copy(update={"plan": plan, "tokenizer": tokenizer, "tools": tools}), [])

    return render


def test_kotlin_compiles_against_executorchs_android_library(render, tmp_path):
    kotlinc = compiler("kotlinc", "Debian's package kotlin has one, npm's kotlin-compiler a newer one")
    gradle, app = snippets.blocks(render("pte"), "kotlin")
    assert 'implementation("org.pytorch:executorch-android:1.5.1")' in gradle
    (tmp_path / "Answer.kt").write_text(app, encoding="utf-8")
    compiled([kotlinc, "Answer.kt", str(STUBS / "ExecuTorch.kt"), "-d", "classes"], tmp_path)


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    """Type-checks Swift with the stubs of the modules that cards import."""
    swiftc = compiler("swiftc", "Debian 13's package swiftlang has one")
    folder = tmp_path_factory.mktemp("modules")
    for stub in STUBS.glob("*.swift"):
        module = ["-module-name", stub.stem, "-emit-module-path", str(folder / f"{stub.stem}.swiftmodule")]
        compiled([swiftc, "-emit-module", "-parse-as-library", *module, str(stub)], folder)
    info = subprocess.run([swiftc, "-print-target-info"], check=True, capture_output=True, text=True).stdout
    manifests = Path(json.loads(info)["paths"]["runtimeResourcePath"], "pm", "ManifestAPI")

    def check(code, *options):
        path = folder / "snippet.swift"
        path.write_text(code, encoding="utf-8")
        compiled([swiftc, "-typecheck", "-I", str(folder), "-I", str(manifests), *options, str(path)], folder)

    return check


def test_swift_type_checks_against_executorchs_package(render, swift):
    package, app = snippets.blocks(render("pte"), "swift")
    assert 'branch: "swiftpm-1.5.1"' in package
    swift(package, "-package-description-version", "5.9")
    swift(app)


def test_swift_type_checks_against_core_ml(render, swift):
    (app,) = snippets.blocks(render("mlpackage"), "swift")
    swift(app)


def test_a_wrong_call_would_be_seen(render, swift):
    (app,) = snippets.blocks(render("mlpackage"), "swift")
    with pytest.raises(AssertionError, match="makeStates"):
        swift(app.replace("makeState()", "makeStates()"))


@pytest.mark.parametrize("backend", ["pte", "onnx_kv", "mlpackage"])
def test_shell_is_shell(render, backend):
    for code in snippets.blocks(render(backend), "sh"):
        compiled(["bash", "-n", "-c", code], ".")


def test_llama_main_is_of_the_same_release_and_has_the_options(render):
    code = snippets.blocks(render("pte"), "sh")[1]
    assert "git clone --branch v1.5.1 " in code
    command = code[code.index("llama_main ") :]
    assert {"model_path", "tokenizer_path", "prompt"} <= set(re.findall(r" --(\w+)=", command)) <= OPTIONS


def test_strings_of_others_stay_strings_in_every_language():
    done = subprocess.run(
        ["bash", "-c", f"printf %s {usage.shell(QUOTED)}"], check=True, capture_output=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert done.stdout.decode() == QUOTED
    assert usage.kotlin(QUOTED) == r'''"a \"b\" \$c \\d\n\t'e' \${f} \ud83d\ude42\u00e9"'''
    assert usage.swift(QUOTED) == r'''"a \"b\" $c \\d\n\t'e' ${f} \u{1f642}\u{e9}"'''
    assert usage.swift("```\x1b`") == r'"```\u{1b}`"'


@pytest.mark.parametrize(
    ("found", "command"),
    [
        ("2.13.0+cpu", "pip install torch==2.13.0"),
        ("1.5.0.dev20260801", "pip install torch==1.5.0.dev20260801"),
        ("not installed", "pip install torch"),
        ("; rm -rf ~", "pip install torch"),
    ],
)
def test_a_card_pins_what_it_was_made_with(found, command):
    assert usage.install({"torch": found}, "torch") == command
