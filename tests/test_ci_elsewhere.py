"""The examples for CI of other repositories, run with a pipeline that only writes down what it is asked."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from export import plan
from export.manifest import ROOT
from tests.test_docs import make_targets

EXAMPLES = ROOT / "docs/ci"
SCRIPT = EXAMPLES / "on-device.sh"
GITLAB = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())["on-device"]
NAMES = ("MODEL", "RECIPES", "TARGETS", "SOURCE", "ADAPTER", "NAME")
MAKEFILE = f"""\
locked:
\t@echo locked >> calls
ci-artifacts:
\t@printf '%s\\n' {" ".join(f"'{name}=$({name})'" for name in NAMES)} >> calls
\t@exit $${{RED:-0}}
gate:
\t@echo 'gate=$(AGAINST)' >> calls
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A user's repository with an adapter; PIPELINE is one whose Makefile writes down what it is asked."""
    for name in (*NAMES, "MAKEFLAGS", "MAKELEVEL", "RED"):
        monkeypatch.delenv(name, raising=False)
    pipeline, own = tmp_path / "pipeline", tmp_path / "our app"
    (own / "adapter").mkdir(parents=True)
    pipeline.mkdir()
    (pipeline / "Makefile").write_text(MAKEFILE)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(pipeline)]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    shutil.copy(SCRIPT, own)
    monkeypatch.setenv("PIPELINE", str(pipeline))
    monkeypatch.setenv("VERSION", "main")
    return own


def end_of(repository, lines, **variables):
    """Exit code, stderr, and what the pipeline was asked."""
    calls = repository / "on-device/calls"
    calls.unlink(missing_ok=True)
    environment = {**os.environ, **variables}
    done = subprocess.run(
        ["sh", "-e"],
        input="\n".join(lines),
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    asked = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, done.stderr, asked[:1], dict(line.split("=", 1) for line in asked[1:])


def test_gitlab_builds_the_adapter_of_its_repository_again_and_again(repository):
    given = GITLAB["variables"]
    variables = {name: given[name] for name in NAMES}
    (repository / "on-device/build/cache").mkdir(parents=True)  # restored before the script runs
    for _ in range(2):
        ended = end_of(repository, GITLAB["script"], **variables)
        assert ended == (0, "", ["locked"], {**variables, "ADAPTER": str(repository / "adapter")})
    assert end_of(repository, GITLAB["script"], **variables, RED="1")[0] != 0
    assert GITLAB["cache"]["paths"] == ["on-device/build/cache/"]
    assert GITLAB["artifacts"]["reports"]["junit"] == "on-device/build/ci/junit.xml"
    assert f"on-device/build/{given['NAME']}_*/" in GITLAB["artifacts"]["paths"]


def test_a_base_beside_the_adapter(repository):
    (repository / "base").mkdir()
    variables = {"ADAPTER": "adapter", "NAME": "mine", "SOURCE": "base"}
    code, err, _, asked = end_of(repository, ["sh on-device.sh"], **variables)
    assert (code, err) == (0, "")
    assert asked["SOURCE"] == str(repository / "base")
    hub = end_of(repository, ["sh on-device.sh"], **variables | {"SOURCE": "meta-llama/Llama-3.2-1B-Instruct"})
    assert hub[3]["SOURCE"] == "meta-llama/Llama-3.2-1B-Instruct"


def test_the_release_before_is_compared_with_where_there_is_one(repository, tmp_path):
    (repository / "last release").mkdir()
    variables = {"ADAPTER": "adapter", "NAME": "mine", "AGAINST": "last release"}
    code, err, _, asked = end_of(repository, ["sh on-device.sh"], **variables)
    assert (code, err, asked["gate"]) == (0, "", str(repository / "last release"))
    assert "gate" not in end_of(repository, ["sh on-device.sh"], **variables, RED="1")[3]
    (tmp_path / "bin").mkdir()
    curl = tmp_path / "bin/curl"
    curl.write_text(
        '#!/bin/sh\nfor word; do case $word in *?job=*) echo "$word" > url;; esac; done\n'
        "mkdir -p before/on-device/build && touch before.zip\n"
    )
    curl.chmod(0o755)
    (tmp_path / "bin/python").symlink_to("/bin/true")  # the archive is there already
    gitlab = {
        "RELEASE": "v1",
        "CI_API_V4_URL": "https://x",
        "CI_PROJECT_ID": "7",
        "CI_JOB_NAME": "on-device",
        "AGAINST": "",
    }
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    code, _, _, asked = end_of(repository, GITLAB["script"], **variables | gitlab, PATH=path, CI_JOB_TOKEN="t")
    assert (code, asked["gate"]) == (0, str(repository / "before/on-device/build"))
    assert (repository / "url").read_text() == "https://x/projects/7/jobs/artifacts/v1/download?job=on-device\n"
    curl.write_text("#!/bin/sh\nexit 22\n")
    assert end_of(repository, GITLAB["script"], **variables | gitlab, PATH=path, CI_JOB_TOKEN="t")[0]


def test_what_is_not_set_is_named_before_anything_is_fetched(repository):
    code, err, *_ = end_of(repository, ["sh on-device.sh"], ADAPTER="adapter")
    assert code
    assert "NAME: of the artifacts" in err
    assert not (repository / "on-device").exists()


def test_the_examples_ask_for_what_there_is():
    text = SCRIPT.read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"make --no-print-directory -C on-device ([a-z-]+)", text)) <= make_targets()
    variables = set(re.findall(r"^([A-Z]+) +[?:]?= ?", makefile, re.MULTILINE))
    assert set(NAMES) <= variables
    assert set(re.findall(r" ([A-Z]+)=\"\$", text)) == {*NAMES, "AGAINST"}
    defaults = dict(re.findall(r"\{([A-Z]+):=([^}]+)\}", text))
    for kind, names in (("models", "MODEL"), ("quant", "RECIPES"), ("targets", "TARGETS")):
        for given in (defaults, GITLAB["variables"]):
            assert set(given[names].split()) <= set(plan.names(kind))
