"""Text of others in our output: on a terminal and in Markdown it is shown, never obeyed.

Names, messages and facts come from checkpoints, artifacts, records and devices, so every text counts as foreign there.
"""

import re

_OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: colours, cursor, line ends, 8-bit escapes
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"  # without width, or of direction
    "\ud800-\udfff\ufffe\uffff]"  # no characters: bytes of a file name that are not UTF-8, what XML does not have
)
"""What a terminal obeys or hides: Unicode's Cc, Default_Ignorable_Code_Point, line separators and surrogates."""
CONVERSATION = "\n\t\u200c\u200d"
"""What an answer in many lines and languages needs of them: joiners make Hindi's letters and emoji."""

_MARKUP = re.compile(
    r"[\\`*\[\]<>~$]"  # emphasis, code, links, HTML, formulas
    r"|&(?=[#\w])|(?<!\w)_|_(?!\w)"  # entities; an underscore inside a word is text
    r"|(?<=:)/(?=/)|(?<=\bwww)\.|@"  # addresses that become links without brackets
    r"|^ *(?:[#=+-](?!\d)|\d+[.)](?=\s|$))"  # at the start of a line: headings, lists, rules
)


def visible(text: str, keep: str = "") -> str:
    r"""One line in which every character is seen: those that a terminal obeys are escapes such as `\x1b`.

    `keep` names characters that stay as they are.
    """
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Markdown(str):
    """Text that is Markdown already; any other text is foreign to it."""

    __slots__ = ()


def markdown(value: object) -> Markdown:
    """A value as the one line of Markdown, in a table too, that shows exactly it: no HTML, heading or link begins."""
    if isinstance(value, Markdown):
        return value
    escaped = _MARKUP.sub(lambda found: found[0][:-1] + f"&#{ord(found[0][-1])};", visible(str(value)))
    return Markdown(escaped.replace("|", r"\|"))


def code(value: object) -> Markdown:
    """A value as a code span, in a table too. Nothing can be escaped between backticks, so some need HTML's."""
    shown = visible(str(value))
    spoils = not shown or "`" in shown or "|" in shown
    return Markdown(f"<code>{markdown(shown)}</code>" if spoils else f"`{shown}`")
