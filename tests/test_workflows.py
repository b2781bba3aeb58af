"""The workflows are valid and least-privileged, and every step is a make target that runs at a desk too."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from export.manifest import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github/actions").glob("*/action.yml"))
EXCEPTIONS = (r'echo "::notice::', r"gh run download ")
"""Beginnings of steps that are no make targets: a notice, or the download of an earlier build."""
USED = re.compile(r"actions/[\w-]+@[0-9a-f]{40}|\./\.github/actions/\w+")
TOKEN = re.compile(r"\$\{\{\s*(secrets\.\w+|github\.token)\s*\}\}")
EXPRESSION = re.compile(r"\$\{\{\s*matrix\.([\w-]+)\s*\}\}")


def load(path):
    """A workflow; YAML 1.1 reads the key `on` as true."""
    return yaml.safe_load(path.read_text())


def jobs(workflow):
    return workflow["jobs"].items()


def steps_of(beginning):
    """The steps of all workflows that use actions whose names begin so."""
    for path in WORKFLOWS:
        for _, job in jobs(load(path)):
            yield from (step for step in job["steps"] if step.get("uses", "").startswith(beginning))


def commands(workflow):
    """Every `run:` of a workflow, once for each combination of its job's matrix."""
    for _, job in jobs(workflow):
        matrix = job.get("strategy", {}).get("matrix", {})
        for values in itertools.product(*matrix.values()):
            chosen = dict(zip(matrix, values, strict=True))
            for step in job["steps"]:
                if "run" in step:
                    yield EXPRESSION.sub(lambda match, chosen=chosen: str(chosen[match[1]]), step["run"])


def schema_errors(paths, schema="vendor.github-workflows"):
    """Errors of check-jsonschema with its own schema; empty: none."""
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, paths)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if ended.returncode == 0 else ended.stdout + ended.stderr


def wrong(command):
    """Why a command must not be in a workflow; empty: it may."""
    if any(re.match(known, command) for known in EXCEPTIONS):
        return ""
    if not command.startswith("make "):
        return f"not a make target: {command}"
    words = ["make", "--dry-run", "--old-file=.venv/.ready", *command.split()[1:]]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    output = ended.stdout + ended.stderr
    idle = "Nothing to be done" in output or "is up to date" in output
    return output if ended.returncode or idle else ""


def unsafe(workflow):
    """Rights, times and versions that a workflow leaves open."""
    if not isinstance(workflow.get("permissions"), dict):
        yield "no permissions"
    for name, job in jobs(workflow):
        granted = {**workflow.get("permissions", {}), **job.get("permissions", {})}
        yield from (f"{name} may {right} {scope}" for scope, right in granted.items() if right not in ("read", "none"))
        if "timeout-minutes" not in job:
            yield f"{name} has no timeout"
        if not ({"concurrency"} & {*job, *workflow}):
            yield f"{name} has no concurrency group"
        for step in job["steps"]:
            if not USED.fullmatch(step.get("uses", "./.github/actions/x")):
                yield f"{name} uses {step['uses']}"
        for place in (workflow, job):
            for key, value in place.get("env", {}).items():
                if TOKEN.search(str(value)):
                    yield f"{name}: every step sees {key}"


def test_there_are_workflows():
    assert [path.stem for path in WORKFLOWS] == ["artifacts", "audit", "ci", "devices", "nightly"]


def test_workflows_and_actions_are_valid():
    assert schema_errors(WORKFLOWS) == ""
    assert schema_errors(ACTIONS, "vendor.github-actions") == ""


@pytest.mark.parametrize(
    "change", [("runs-on", "run-on"), ("timeout-minutes: 30", "timeout-minutes: soon"), ("steps:", "step:")]
)
def test_a_broken_workflow_is_found(tmp_path, change):
    broken = tmp_path / "ci.yml"
    broken.write_text(next(path for path in WORKFLOWS if path.stem == "ci").read_text().replace(*change))
    assert "ci.yml" in schema_errors([broken])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_is_a_make_target_that_exists(path):
    steps = list(commands(load(path)))
    assert steps
    assert [problem for command in steps if (problem := wrong(command))] == []


@pytest.mark.parametrize("command", ["make ci-artefacts", "make docs", "pip install x", "make ci-diff MODEL=tiny"])
def test_a_step_that_nobody_could_run_here_is_found(command):
    assert wrong(command)


def test_what_make_starts_keeps_its_bytecode():
    words = ["make", "--no-print-directory", "-o", ".venv/.ready", "--eval=shown:;@env", "shown"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "ELSE": "1"}
    shown = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "ELSE=1\n" in shown
    assert "PYTHONDONTWRITEBYTECODE" not in shown


def test_setup_is_a_make_target():
    (action,) = map(load, ACTIONS)
    assert [step["run"] for step in action["runs"]["steps"] if "run" in step] == ["make ${{ inputs.target }}"]
    used = {step.get("with", {}).get("target", action["inputs"]["target"]["default"]) for step in steps_of("./.github")}
    assert used == {"locked", "setup"}
    for target in used:  # as where it was made from other files than now
        words = ["make", "--dry-run", target, "PINS=README.md"]
        planned = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert ".ci/venv" in planned


def test_unit_tests_run_with_every_python_and_system_that_is_promised():
    (action,), ci = map(load, ACTIONS), dict(jobs(load(ROOT / ".github/workflows/ci.yml")))
    matrix = ci["desks"]["strategy"]["matrix"]
    pythons = {action["inputs"]["python"]["default"], *matrix["python"]}
    promised = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    assert pythons == {f"3.{minor}" for minor in range(30) if promised.contains(f"3.{minor}")}
    assert {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"} == set(matrix["system"])
    assert ci["desks"]["steps"][-1] == ci["unit"]["steps"][-1] == {"run": "make unit"}


def test_no_action_needs_a_node_that_runners_have_no_more():
    """The first releases on Node 24."""
    first = {"checkout": 5, "setup-python": 6, "cache": 5, "upload-artifact": 6}
    used = re.findall(
        r"uses: actions/([\w-]+)@\w+ # v(\d+)", "".join(path.read_text() for path in (*WORKFLOWS, *ACTIONS))
    )
    assert {name for name, _ in used} == set(first)
    assert [(name, major) for name, major in used if int(major) < first[name]] == []


def test_what_was_never_seen_green_holds_nobody_up():
    assert dict(jobs(load(ROOT / ".github/workflows/artifacts.yml")))["macos"]["continue-on-error"] is True


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_workflow_leaves_rights_time_or_versions_open(path):
    assert list(unsafe(load(path))) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("contents: read", "contents: write"), "may write contents"),
        (("actions/checkout@d234", "actions/checkout@v4 # "), "uses actions/checkout@v4"),
        (("jobs:", "  HF_TOKEN: ${{ secrets.HF_TOKEN }}\njobs:"), "lint: every step sees HF_TOKEN"),
        (("    timeout-minutes: 30\n", ""), "lint has no timeout"),
        (("permissions:\n  contents: read\n", ""), "no permissions"),
    ],
)
def test_what_is_left_open_is_found(change, problem):
    text = next(path for path in WORKFLOWS if path.stem == "ci").read_text()
    assert change[0] in text
    assert any(problem in line for line in unsafe(yaml.safe_load(text.replace(*change))))


def test_a_pull_request_reaches_devices_only_with_a_label_and_from_here():
    (job,) = load(Path(ROOT / ".github/workflows/devices.yml"))["jobs"].values()
    assert "github.event.label.name == 'devices'" in job["if"]
    assert load(Path(ROOT / ".github/workflows/devices.yml"))[True]["pull_request"] == {"types": ["labeled"]}
    assert job["steps"][0]["with"]["ref"].startswith("${{ github.event.pull_request.head.sha ")  # what was read
    assert "head.repo.full_name == github.repository" in job["if"]
    for path in WORKFLOWS:
        for name, other in jobs(load(path)):
            assert "self-hosted" not in other["runs-on"] or path.stem == "devices", name


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda path: path.stem)
def test_every_action_is_a_commit_with_its_version_beside_it(path):
    lines = [line for line in path.read_text().splitlines() if "uses: actions/" in line]
    assert [line for line in lines if not re.search(r"uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)] == []


def test_a_token_is_in_no_step_after_the_code_of_a_change_ran():
    for path in WORKFLOWS:
        for name, job in jobs(load(path)):
            ran = False
            for step in job["steps"]:
                if any("github.token" in str(value) for value in step.get("env", {}).values()):
                    assert not ran, (path.stem, name)
                ran |= step.get("run", "").startswith("make") or step.get("uses", "").startswith("./")


def test_matrices_name_what_exists():
    for path in WORKFLOWS:
        for name, job in jobs(load(path)):
            for axis, values in job.get("strategy", {}).get("matrix", {}).items():
                folder = {"model": "configs/models", "recipe": "configs/quant", "target": "configs/targets"}
                for value in () if axis in ("system", "python") else values:
                    assert (ROOT / folder.get(axis, "devices") / f"{value}.yaml").is_file(), (path.name, name, value)
