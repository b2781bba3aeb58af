"""Text of others in our output: every place where it comes out shows it, and none obeys it."""

import ast
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from onnx import helper
from pydantic import BaseModel

from devices import DeviceError
from devices import __main__ as devices_command
from devices import command as devices_frame
from devices.transports import visible as device_words
from export import card, manifest
from export.__main__ import app
from export.build import command as frame
from export.host import console
from export.host.console import Plain
from export.host.text import CONVERSATION, Markdown, code, markdown, visible
from export.toolbox import inspection, tables
from runtime_tests.chat import terminal
from runtime_tests.evidence import baseline
from runtime_tests.reports import ci, html, overview, publication, readme, summary
from tests.support import checkpoints, harms, shape
from tests.support.artifacts import edit_manifest
from tests.support.records import sample_record

FORGED = "build/tiny: as its manifest says"
NASTY = (
    "x[/nope]y [red]\x1b[2J\x1b[H\x1b]0;title\x07\x9b8m\x90\x00\x7f\u202e\u2066\u200b\u2028\x85\r\n"
    f"{FORGED}\n# heading\n<img src=x onerror=a()> &lt; |`c`| [l](http://evil) https://evil **b** \udc9b\U000e0041"
)
NAME = NASTY.replace("/", ":").replace("\x00", "")
"""The same as the name of a file."""
MARKS = (
    "# h", "- x", "+ x", "1. x", "2) x", "---", "===", "> q", "```", "~~~", "    x", "<b>x</b>", "<!-- x", "&#60;b>",
    "![i](u)", "[l](u)", "[l]: u", "<http://e>", "**b**", "_b_", "~~b~~", "`c`", "``", r"\|<b>|", r"a\|b", "|", "\\",
    "$x$", "https://e.x", "www.e.x",
)  # fmt: skip


def assert_shown(*texts):
    """Nothing in our output is obeyed, hidden, or begins a line of its own."""
    for text in texts:
        lines = text.split("\n")
        assert [visible(line) for line in lines] == lines
        assert not any(line.lstrip().startswith((FORGED, "# heading")) for line in lines)
        assert "Traceback" not in text


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.hostile(
    "text",
    "escapes, markup, bidirectional and zero-width characters, names of a megabyte",
    "shown, never obeyed; a verdict is the last line",
)
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\r\n\t\x00", r"\x1b[2J\r\n\t\x00"),
        ("\x7f\x85\x9b\xad", r"\x7f\x85\x9b\xad"),
        ("\u202ea\u2069\u200b\u2028\ufeff", r"\u202ea\u2069\u200b\u2028\ufeff"),
        ("\u3164\u115f\u034f\U000e0041\U000e0100", r"\u3164\u115f\u034f\U000e0041\U000e0100"),
        ("\udcff\uffff", r"\udcff\uffff"),
        ("[red]:tada:\\", "[red]:tada:\\"),
        ("–·é\xa0日本\N{THUMBS UP SIGN}\ufe0f\U0001f3fd नमस्ते", "–·é\xa0日本\N{THUMBS UP SIGN}\ufe0f\U0001f3fd नमस्ते"),
    ],
)
def test_what_a_terminal_obeys_or_hides_is_shown(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


def test_a_conversation_keeps_lines_and_joiners():
    assert visible("क्\u200dष\n\ta\x1b", CONVERSATION) == "क्\u200dष\n\ta\\x1b"


def words_of(page):
    """The text of rendered Markdown, and the kinds of marks in it."""
    tokens = MarkdownIt("js-default", {"html": True}).parse(page)
    inline = [child for token in tokens for child in token.children or ()]
    return tokens, inline


def read_back(inline):
    return "".join("\n" if token.type == "softbreak" else token.content for token in inline)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*MARKS, " ", "a", "\n"]) | st.text(max_size=4), max_size=6).map("".join))
def test_markdown_shows_exactly_the_text(value):
    for page, make in (("{}", markdown), ("a {} b", markdown), ("# {}", markdown), ("- {}", markdown)):
        tokens, inline = words_of(page.format(make(value)))
        assert {token.type for token in inline} <= {"text"}
        assert not {token.type for token in tokens} & {
            "html_block",
            "fence",
            "hr",
            "blockquote_open",
            "ordered_list_open",
        }
        assert page.startswith("#") or not any(token.type == "heading_open" for token in tokens)


@pytest.mark.hostile("text", "Markdown and HTML in cards, CI pages and reports", "shown as text")
@pytest.mark.parametrize("make", [markdown, code])
@pytest.mark.parametrize("value", [*MARKS, NASTY])
def test_a_cell_shows_exactly_the_text(value, make):
    tokens, inline = words_of(tables.markdown([("a", "b"), (make(value), value)]))
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    for cell in cells[2:]:
        text = re.sub("</?code>", "", read_back(cell.children))
        assert text.strip() == visible(value).strip()
    kinds = {token.type for token in inline}
    assert kinds <= {"text", "code_inline", "html_inline"}
    assert {token.content for token in inline if token.type == "html_inline"} <= {"<code>", "</code>"}


def test_markdown_of_our_own_stays():
    assert markdown(Markdown("**a**")) == "**a**"
    honest = "int4 symmetric, group 32 (smollm2_135m): -2.5 dB, 1e-03 ± 4.50 & 3 → x.y"
    assert markdown(honest) == honest
    assert code("a_b [v2] <x>") == "`a_b [v2] <x>`"


# ── one way out ─────────────────────────────────────────────────────────────────────────────────────────────────────

WAYS_OUT = {
    "export.host.console": {"print"},
    "devices.command": {"print"},  # escapes by the rule of its own package
    "devices.__main__": {"print", "Console", "Text"},  # likewise
    "runtime_tests.chat.terminal": {"print", "write"},  # a bare line end; answers, raw for programs that read them
    "export.host.processes": {"print"},  # JSON of a child; lines that our own commands have said
    "runtime_tests.reports.summary": {"Text"},  # the name of an outcome
}
VERSIONS = ("torch", "executorch", "coremltools", "onnxruntime")
JSON_FOR_PARENTS = {
    "export.toolbox.model_checks", "runtime_tests.jobs.worker", "runtime_tests.jobs", "runtime_tests.sessions.board",
    "devices.lab.host", "devices.lab.__main__",
}  # fmt: skip


def test_nothing_is_printed_past_the_rule():
    found = {}
    for name, path in shape.modules().items():
        for node in ast.walk(shape.tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {"print", "Console", "Text"} or re.match(r"sys\.(__)?std(out|err)(__)?\.write", called):
                    found.setdefault(name, set()).add(called.rpartition(".")[2])
    found.pop("export.host.console")
    assert {name: calls for name, calls in found.items() if not calls <= WAYS_OUT.get(name, set())}.keys() <= (
        JSON_FOR_PARENTS
    )


# ── where it comes out ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.hostile(
    "text",
    "escapes, markup, bidirectional and zero-width characters, names of a megabyte",
    "shown, never obeyed; a verdict is the last line",
)
def test_errors_stages_results_and_logs_are_lines(capsys):
    frame.fail(NASTY, 1)
    devices_frame.fail(NASTY)
    console.say(NASTY)
    console.console.print(NASTY, style="bold", soft_wrap=True)
    with console.stage(NASTY, NASTY):
        pass
    terminal.say(NASTY)
    record = logging.LogRecord("devices", logging.WARNING, "", 0, "%s", (NASTY,), None)
    print(console.LogLines().format(record), file=sys.stderr)
    out, err = capsys.readouterr()
    assert_shown(out, err)
    assert (out.count("\n"), err.count("\n")) == (1, 6)
    assert err.count("x[/nope]y [red]\\x1b[2J") == 7


@pytest.mark.hostile(
    "text",
    "escapes, markup, bidirectional and zero-width characters, names of a megabyte",
    "shown, never obeyed; a verdict is the last line",
)
def test_a_name_of_a_megabyte_pushes_nothing_away(capsys):
    frame.fail("begin " + "x" * 10**6 + " end", 1)
    err = capsys.readouterr().err
    assert len(err) < 3000
    assert err.startswith("error: begin x")
    assert err.endswith("x end\n")


@pytest.mark.hostile(
    "text",
    "escapes, markup, bidirectional and zero-width characters, names of a megabyte",
    "shown, never obeyed; a verdict is the last line",
)
def test_a_terminal_draws_no_markup(capsys):
    drawn = io.StringIO()
    screen = Plain(file=drawn, force_terminal=True, color_system=None, width=300)
    section = inspection.Section(NASTY, ("bytes", NASTY), [(NASTY, NASTY)])
    inspection.print_sections([section], screen)
    screen.print(summary.table([sample_record().model_copy(update={"artifact": NASTY})]))
    with screen.status(screen.render_str(NASTY)):
        pass
    cursor = re.sub(r"\x1b\[(\?25[lh]|2K|1A)|\r", "", drawn.getvalue())  # of the spinner
    assert_shown(cursor)
    assert "[/nope]y [red]\\x1b[2J" in cursor


def poisoned(value, kept=("backend", "session", "method", "activations", "artifact", "levels", "activation")):
    """A record with every text in it hostile, but those that choose code."""
    if isinstance(value, BaseModel):
        chosen = {name for name, field in type(value).model_fields.items() if "Literal" in str(field.annotation)}
        fields = {name: getattr(value, name) for name in type(value).model_fields if name not in {*kept, *chosen}}
        return value.model_copy(update={name: poisoned(field) for name, field in fields.items()})
    if isinstance(value, str) and type(value) is str:
        return NASTY
    if isinstance(value, dict):
        return {f"{NASTY}{key}": poisoned(inner) for key, inner in value.items()}
    return tuple(map(poisoned, value)) if isinstance(value, tuple) else value


def kinds(page):
    """What a page is made of, block by block, and the marks inside."""
    tokens, inline = words_of(re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL))
    assert {token.content for token in inline if token.type == "html_inline"} <= {"<code>", "</code>"}
    return [token.type for token in tokens], {token.type for token in inline} - {
        "html_inline",
        "code_inline",
        "softbreak",
    }


@pytest.mark.hostile("text", "Markdown and HTML in cards, CI pages and reports", "shown as text")
def test_a_card_holds_no_mark_of_others(built):
    described, record = manifest.read(built), sample_record()
    honest = kinds(card.render(described, publication.measured_rows(record)))
    page = card.render(poisoned(described), publication.measured_rows(poisoned(record)))
    assert_shown(page)
    assert kinds(page) == honest
    front = card.ModelCard(page).data
    assert front.base_model in (None, visible(NASTY))
    text = re.sub(r"^```.*?^```$", "", page.partition("\n---\n\n")[2], flags=re.DOTALL | re.MULTILINE)  # shown as it is
    assert "onerror" not in re.sub(r"&#60;img src=x onerror", "", text.replace("`", ""))


@pytest.fixture
def hostile_onnx(tmp_path):
    """A bare model whose names are hostile."""
    tensors = [
        helper.make_tensor_value_info(NASTY.replace("\udc9b", ""), onnx.TensorProto.FLOAT, [1]) for _ in range(2)
    ]
    node = helper.make_node("Identity", [tensors[0].name], ["out"], name=tensors[0].name)
    out = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], tensors[0].name, tensors[:1], [out]))
    path = tmp_path / f"{NAME}.onnx".replace("\udc9b", "")  # arguments are UTF-8
    path.write_bytes(model.SerializeToString())
    return path


def test_inspect_and_diff_show_the_names_of_a_file(hostile_onnx, export_command, tmp_path):
    code, out, err = export_command("inspect", hostile_onnx, "--svg", tmp_path / "drawn.svg")
    assert (code, err) == (0, "")
    assert_shown(out)
    ElementTree.parse(tmp_path / "drawn.svg")
    assert_shown(export_command("diff", hostile_onnx, hostile_onnx)[1])
    compared = export_command("diff", hostile_onnx, hostile_onnx, "--markdown")[1]
    assert_shown(compared)
    assert "html_block" in kinds(compared)[0]  # our own <details>
    assert not re.search(r"<img|^#|\]\(", compared, re.MULTILINE)
    shown = export_command("inspect", hostile_onnx, "--json")[1]
    assert shown.isascii()
    assert json.loads(shown)["path"] == str(hostile_onnx)


@pytest.mark.hostile(
    "text",
    "escapes, markup, bidirectional and zero-width characters, names of a megabyte",
    "shown, never obeyed; a verdict is the last line",
)
def test_the_verdict_of_verify_is_the_last_line(artifact, export_command):
    (artifact / NAME).write_text("")
    edit_manifest(artifact, lambda fields: fields.update(id=NASTY.replace("\udc9b", "")))
    code, out, err = export_command("verify", artifact)
    assert code == 1
    assert_shown(out, err)
    assert re.fullmatch(rf"error: {re.escape(str(artifact))}: \d found wrong\n", err)


def test_what_was_printed_before_an_error_stands_before_it(tmp_path):
    text = "import sys; from export.build.command import fail; print('finding'); sys.exit(fail('verdict', 1))"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=manifest.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.stdout.decode().splitlines() == ["finding", "error: verdict"]


def test_a_run_is_shown(capsys, tmp_path):
    record = poisoned(sample_record(outcome="crash"))
    summary.show([record], tmp_path / NAME)
    out, err = capsys.readouterr()
    assert_shown(out, err)


@pytest.mark.hostile("text", "Markdown and HTML in cards, CI pages and reports", "shown as text")
def test_ci_holds_no_mark_of_others(tmp_path, capsys):
    bad = poisoned(sample_record(outcome="crash"))
    judged = baseline.Judged(NASTY, bad, "", (), NASTY)
    unread = baseline.Judged(NASTY, None, NASTY, (), "")
    page = ci.render([judged, unread])
    assert_shown(page)
    assert kinds(page)[0].count("heading_open") == 2
    assert not kinds(page)[1] - {"text", "strong_open", "strong_close"}
    ci.write([judged, unread], tmp_path / "junit.xml")
    suites = list(ElementTree.parse(tmp_path / "junit.xml").getroot())
    assert {suite.get("name") for suite in suites} == {visible(NASTY)}
    machine = bad.environment.model_copy(update={"tools": dict.fromkeys(VERSIONS, NASTY)})
    block = readme.block([bad.model_copy(update={"environment": machine})])
    assert_shown(block)
    assert not kinds(block)[1] - {"text"}


@pytest.mark.hostile("text", "Markdown and HTML in cards, CI pages and reports", "shown as text")
def test_a_report_holds_no_mark_of_others(built, tmp_path):
    bad = poisoned(sample_record(folder="a", notes=("a",)))
    entry = overview.Entry(**sample_record().model_dump()).model_copy(update=dict(bad))
    runs = [overview.Run(NAME, [entry], has_page) for has_page in (True, False)]
    pages = html.render([bad], [poisoned(manifest.read(built))], runs), overview.render(tmp_path, [entry], runs)
    assert_shown(*pages)
    assert not any("<img" in page for page in pages)


def test_devices_say_what_others_say_in_a_line(monkeypatch, capsys):
    def refuse(device, timeout_s):
        raise DeviceError(f"{device.name}: {NASTY}")

    monkeypatch.setattr(devices_command, "open_transport", refuse)
    assert devices_command.main([]) == 0
    out, err = capsys.readouterr()
    assert_shown(out, err)
    assert "[/nope]y" in out
    assert device_words("\x1b[2J\u202eé") == r"\x1b[2J\u202eé"


def test_a_tensor_name_a_shard_and_a_template_say_their_words_in_a_line(tmp_path, monkeypatch, capsys):
    """A build that is refused: what a stranger wrote stands in one line of ours."""
    name = NASTY.replace("\udc9b", "")
    for spoil in (
        harms.header(lambda value: value.update({name: value.pop("model.norm.weight")})),
        lambda folder: ((folder / checkpoints.FILE).unlink(), checkpoints.write_index(folder, {name: name})),
        harms.put("chat_template.jinja", ("{{ raise_exception(" + json.dumps(name) + ") }}").encode()),
    ):
        folder = checkpoints.write_folder(tmp_path / "checkpoint")
        spoil(folder)
        monkeypatch.setattr(sys, "argv", ["export", "llama", "int4-g32", "onnx-cpu", "--source", str(folder)])
        monkeypatch.chdir(tmp_path)
        assert frame.run(app) == 1
        out, err = capsys.readouterr()
        assert_shown(out, err)
        assert err.count("error: ") == 1
        shutil.rmtree(folder)
