"""The C++ runner built for this machine by each compiler that is here, and the tiny model that it runs."""

import subprocess

import pytest

from runtime_tests.device_runner import Answer, build, compilers, parse_answer, read_logits, sdk, write_script


def built(abi, compiler):
    """A bundle, or a skip that names the missing tool."""
    try:
        return build.build(abi, compiler=compiler)
    except sdk.UnavailableError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session", params=compilers.NAMES)
def compiler(request):
    return request.param


@pytest.fixture(scope="session")
def bundle(compiler):
    return built(compilers.host_abi(), compiler)


@pytest.fixture(scope="session")
def artifacts(tiny):
    """The tiny model quantized, and in float32, where the same arithmetic gives the same numbers, with each cache."""
    built = {quant: tiny("executorch-xnnpack", quant) for quant in ("int4-g32", "fp32")}
    return built | {f"{kind} cache": tiny("executorch-xnnpack", "fp32", kind) for kind in ("bfloat16", "int8")}


@pytest.fixture
def run(bundle, artifacts, tmp_path):
    """Run commands, or the text of a script, on a model; gives the answer and its logits."""

    def call(commands, model="fp32", *, threads=2, prefix=(), start=None, folder=None):
        script, out = tmp_path / "script", tmp_path / "logits"
        if isinstance(commands, str):
            script.write_text(commands)
        else:
            write_script(commands, script)
        path = artifacts[model] / "model.pte" if model in artifacts else model
        folder = folder or bundle.path
        words = [*prefix, *(start or [folder / bundle.start[0]]), path, script, "--threads", str(threads)]
        answer = execute([*words, "--logits", out], folder if start else tmp_path)
        return answer, read_logits(out, answer) if isinstance(answer, Answer) else None

    return call


def execute(words, folder):
    """Nothing of our environment reaches the runner: it must find its libraries by itself."""
    done = subprocess.run(words, cwd=folder, capture_output=True, timeout=120, env={"PATH": "/usr/bin"}, check=False)
    return parse_answer(done.stdout, done.returncode)


def started(bundle, *words):
    return execute([bundle.path / "bin" / "runner", *words], bundle.path)
