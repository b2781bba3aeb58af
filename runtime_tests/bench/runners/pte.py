"""Any decoder .pte with inputs (tokens [1, S], input_pos [1]), ours or `export_llm`'s, by the same session."""

from pathlib import Path

from runtime_tests.jobs import Opening
from runtime_tests.sessions.pte import PteSession, load_program

from .session import SessionRunner


def open_runner(opening: Opening) -> SessionRunner:
    """Load a .pte; the longest call is read from the file itself."""
    program = load_program(Path(opening.path), opening.threads)
    longest = int(program.load_method("get_max_seq_len")([])[0])
    session = PteSession(program, opening.context, min(longest, opening.context))
    inputs = session.method.method_meta().num_inputs()
    if inputs != 2:
        raise ValueError(f"{opening.path}: forward takes {inputs} inputs; expected tokens and input_pos")
    return SessionRunner(session)
