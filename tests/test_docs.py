"""README and docs name files, make targets, modules, functions and headings that exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support import shape

ROOT = shape.ROOT
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("export", "runtime_tests", "devices", "tests")
FOLDERS = (*PACKAGES, "configs", "docs", r"\.github", r"\.ci")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w./~-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
FILE_NAME = re.compile(r"[\w-]+\.(?:py|cpp|h|j2|cmake)")
MAKE = re.compile(r"(?:^|[(;&] ?|\$ )make((?: [^\s`]+)+)", re.MULTILINE)
MODULE = re.compile(r"python3? -m ([\w.]+)")
FUNCTION = re.compile(r"(?<![\w./`-])`?([a-z_]+)\.([a-z_]+)(?![\w./])")
SUFFIXES = (
    "py", "md", "json", "jsonl", "yaml", "yml", "model", "data", "pte", "onnx", "mlpackage", "sig", "svg",
    "safetensors", "jinja")  # fmt: skip
PLACEHOLDER = re.compile(r"\b[A-Z]+\b|…")
"""Words in capitals stand for what a reader puts there."""


def code(text):
    """Everything in backticks: whole blocks, and each span outside of them."""
    return [*FENCE.findall(text), *SPAN.findall(FENCE.sub("", text))]


def headings(text):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def make_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = {name for line in re.findall(r"^([a-z][a-z -]*):(?!=)", makefile, re.MULTILINE) for name in line.split()}
    return names | {path.stem for path in (ROOT / "devices").glob("*.yaml")}


def missing_links(page, text):
    for link in LINK.findall(SPAN.sub("", FENCE.sub("", text))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in headings(target.read_text(encoding="utf-8"))):
            yield link


def missing_paths(piece):
    """Paths from the root of the repository, patterns too; and single file names of code."""
    for path in PATH.findall(piece):
        if not PLACEHOLDER.search(path) and not list(ROOT.glob(path.rstrip("./"))):
            yield path
    if FILE_NAME.fullmatch(piece) and piece not in {path.name for path in shape.tracked(*PACKAGES)}:
        yield piece


def missing_targets(piece):
    for words in MAKE.findall(piece):
        for word in words.split():
            if re.fullmatch(r"[a-z][\w-]*", word) and word not in make_targets():
                yield f"make {word}"


def missing_modules(piece):
    for name in MODULE.findall(piece):
        path = ROOT / name.replace(".", "/")
        is_ours = name.partition(".")[0] in PACKAGES
        if is_ours and not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            yield f"python -m {name}"


def missing_functions(piece):
    """`module.name` where the module is one of ours and the name is nowhere in it."""
    for module, name in FUNCTION.findall(MODULE.sub("", piece)):
        homes = {dotted: path for dotted, path in shape.modules().items() if dotted.rpartition(".")[2] == module}
        known = (
            f"{dotted}.{name}" in shape.modules() or re.search(rf"\b{name}\b", (ROOT / path).read_text("utf-8"))
            for dotted, path in homes.items()
        )
        if homes and name not in SUFFIXES and not any(known):
            yield f"{module}.{name}"


def missing(page, text):
    """What a page names that is not there."""
    pieces = code(re.sub(r"^```python.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    checks = (missing_paths, missing_targets, missing_modules, missing_functions)
    return [*missing_links(page, text), *(name for check in checks for piece in pieces for name in check(piece))]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    assert missing(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("see `export/backends/pte.py`", "export/backends/pte.py"),
        ("limits in `configs/recipes/*.yaml`", "configs/recipes/*.yaml"),
        ("the sum (`sensitivities.py`)", "sensitivities.py"),
        ("[decisions](docs/choices.md)", "docs/choices.md"),
        ("[why](docs/decisions.md#no-such-heading)", "docs/decisions.md#no-such-heading"),
        ("run `make int4-mixed`", "make int4-mixed"),
        ("```\nMODEL=tiny make artefacts\nmake bench-fast       timings\n```", "make bench-fast"),
        ("```\nquantization.quantise    → QuantizedModel\n```", "quantization.quantise"),
        ("```\n.venv/bin/python -m runtime_tests.baseline host\n```", "python -m runtime_tests.baseline"),
    ],
)
def test_a_wrong_name_is_found(text, name):
    assert missing(ROOT / "README.md", text) == [name]


def unheld(text):
    """Rows of the security page that name no test, and tests that do not exist."""
    for row in (line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| line |")):
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        if not tests:
            yield row
        for path, name in tests:
            if name and f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8"):
                yield f"{path}::{name}"


def test_every_line_of_the_security_page_has_its_test():
    assert list(unheld((ROOT / "docs/security.md").read_text(encoding="utf-8"))) == []
    wrong = "| a line | `tests/test_docs.py::test_that_is_none` |\n| a line | by nobody |"
    assert list(unheld(wrong)) == ["tests/test_docs.py::test_that_is_none", "| a line | by nobody |"]


def test_readme_is_short_and_narrow():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- results.*end of results -->", "", text, flags=re.DOTALL)
    assert len(text.split()) < 1600
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_no_code_is_broken_over_lines(page):
    """Half a name would not be checked."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert [line for line in prose.splitlines() if line.count("`") % 2] == []


def test_pages_are_reached_by_links():
    linked = {Path(link.partition("#")[0]).name for page in DOCS for link in LINK.findall(page.read_text("utf-8"))}
    assert {page.name for page in DOCS[1:]} <= linked


@pytest.mark.parametrize(
    ("words", "programs"),
    [
        (["test", "ROOM=checkpoints"], ["-m pytest tests/checkpoints"]),
        (["unit", "ROOM=jobs places"], ["-m pytest tests/jobs tests/places"]),
        (["unit"], ["-m pytest"]),
    ],
)
def test_the_tests_of_a_room_run_alone(words, programs):
    command = ["make", "--dry-run", "--no-print-directory", "--old-file=.venv/.ready", *words]
    around = {"ROOM", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}  # `make test` may be what runs this test
    environment = {name: value for name, value in os.environ.items() if name not in around}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith(".venv/bin/python ")]
    started = [[word for word in shlex.split(line)[1:] if word[:2] != "--"] for line in lines]
    assert [" ".join(given) for given in started] == programs
