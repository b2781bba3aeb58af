"""Tables hold the cells as they are given, whatever is in them."""

from export.host.text import Markdown
from export.toolbox import tables

ROWS = [("artifact", "MB", ""), ("a–b", "1.50", "1e5"), ("pass|fail", "–", "")]


def test_plain_columns_are_as_wide_as_their_widest_cell_and_numbers_stay_text():
    assert tables.plain(ROWS) == ["artifact   MB", "a–b        1.50  1e5", "pass|fail  –"]


def test_bars_and_line_ends_do_not_end_a_markdown_cell():
    header, rule, *rows = tables.markdown([*ROWS, ("two\nlines", Markdown("**x**"), "<b>")]).splitlines()
    assert header == "| artifact | MB |  |"
    assert rule == "| --- | --- | --- |"
    assert rule.count("|") == len(ROWS[0]) + 1
    assert rows == ["| a–b | 1.50 | 1e5 |", r"| pass\|fail | – |  |", "| two&#92;nlines | **x** | &#60;b&#62; |"]
