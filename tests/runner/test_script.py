"""What is written for a runner is what it reads."""

import pytest

from runtime_tests.runner import Feed, Generate, Logits, Reset, Top, parse_script, script_text


def test_scripts_survive_writing_and_reading():
    commands = [Reset(), Feed((1, 2, 3)), Generate(4), Logits(), Top(5), Reset(), Feed((0, 10**9))]
    assert parse_script(script_text(commands)) == commands
    for wrong in ([Feed(())], [Feed((-1,))], [Feed((1,)), Generate(0)], [Logits()]):
        with pytest.raises(ValueError, match="script line"):
            script_text(wrong)
