"""How commands end: a user's mistake, a full disk and Ctrl-C are one line and an exit code, never a traceback."""

import errno
import inspect
import io
import logging
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from export import formats
from export.errors import ExportError, told
from export.host import disk, interrupt
from export.host.console import LogLines, console, show_timings

_INTERRUPTED = 130
_NOISY = ("torchao", "torch.utils._pytree", "transformers", "datasets")
"""Loggers of libraries that every command may import; a format adds its own."""
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that only writing has."""
_LONGEST = 2000
"""Characters of an error."""


def _telling(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.call_on_close(show_timings)
    return wanted


Timings = Annotated[bool, typer.Option("--timings", callback=_telling, help="say at the end where the time went")]
"""An option that does by itself what it says."""


def with_default(name: str) -> type[TyperGroup]:
    """A group of sub-commands in which the command `name` runs when the arguments begin with no sub-command."""

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            named = args[:1] == ["--help"] or (args and args[0] in self.commands)
            parsed: list[str] = super().parse_args(ctx, args if named else [name, *args])
            return parsed

    return Group


def run(app: typer.Typer) -> int:
    r"""Run a typer app and give the exit code: 0 done, 1 error, 2 wrong usage, 130 interrupted.

    A closed standard input is an empty one; what goes to a closed output goes nowhere, and what its encoding has no
    character for is written as `\u2192`.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    quiet_libraries()
    interrupt.listen()
    _tell_of_scripts(app)
    return _flushed(_end_of(app))


def _tell_of_scripts(app: typer.Typer) -> None:
    """Let the help name the commands as this user has them."""
    if isinstance(app.info.help, str):
        app.info.help = told(app.info.help)
    for command in app.registered_commands:
        assert command.callback
        command.help = told(inspect.getdoc(command.callback) or "")
    for group in app.registered_groups:
        assert group.typer_instance
        _tell_of_scripts(group.typer_instance)


def _open_closed_streams() -> None:
    """Python has None for these, and the next file to be opened would get the number that libraries print to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 – to the end


def _flushed(code: int) -> int:
    """The exit code once all output is written: Python itself would say so with a traceback, after the end."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError as error:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 – drops the unwritten rest
            if not (code or name == "stderr" or isinstance(error, BrokenPipeError)):  # said before, or nobody reads
                fail(f"standard output: {error.strerror}", 1)
            code = code or 1
    return code


def _end_of(app: typer.Typer) -> int:
    try:
        for argument in sys.argv[1:]:
            disk.require_utf8(argument)
        code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except (ExportError, OSError) as error:
        return fail(describe(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            return fail(" ".join(error.format_message().split()), 2)
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust libraries; it is no Exception
            raise
        return fail(f"a library gave up: {describe(error)}", 1)
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code without a message
        return fail("interrupted; nothing half-written is left", _INTERRUPTED)
    return code if isinstance(code, int) else 0


def fail(message: str, code: int) -> int:
    """Print one line on stderr, if it can be written, after all that was printed before, and give the exit code."""
    with suppress(OSError):
        sys.stdout.flush()  # a verdict is the last line, where both outputs go to one place too
    with suppress(OSError):
        console.print(f"error: {_shortened(message)}", style="red", soft_wrap=True)
    return code


def _shortened(message: str) -> str:
    """A name of a megabyte must not push away what was printed before."""
    begin, end = message[: _LONGEST * 3 // 4], message[-_LONGEST // 4 :]
    return message if len(message) <= _LONGEST else f"{begin} … ({len(message):,} characters) … {end}"


def describe(error: BaseException) -> str:
    """One line for an error; a system error names its file, or says that something could not be written."""
    if not isinstance(error, OSError) or not error.strerror:
        return " ".join(str(error).split())
    if error.filename:
        return f"{error.filename}: {error.strerror}"
    if error.errno in _WRITING:
        return f"writing: {error.strerror}"
    return f"{error.strerror} (the system names no file: {errno.errorcode.get(error.errno or 0, 'error')})"


def quiet_libraries() -> None:
    """Keep libraries' notices about optional parts out of our output, and their telemetry off, in children too."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    warnings.filterwarnings("ignore")
    if logging.lastResort:
        logging.lastResort.setFormatter(LogLines())
    for name in (*_NOISY, *formats.loggers()):
        logging.getLogger(name).setLevel(logging.ERROR)
