"""How our commands end: a user's mistake, a full disk and Ctrl-C are one line and an exit code, never a traceback."""

import logging
import os
import sys
import warnings

import typer

from . import interrupt
from .errors import ExportError
from .progress import console

INTERRUPTED = 130
NOISY = ("torchao", "torch.utils._pytree", "coremltools", "transformers", "executorch", "datasets")


def run(app: typer.Typer) -> int:
    """Run a typer app and give the exit code: 0 done, 1 error, 2 wrong usage, 130 interrupted."""
    quiet_libraries()
    interrupt.listen()
    try:
        code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except (ExportError, OSError) as error:
        return fail(describe(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            return fail(error.format_message(), 2)
        raise
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        return fail("interrupted; nothing half-written is left", INTERRUPTED)
    return code if isinstance(code, int) else 0


def fail(message: str, code: int) -> int:
    """One line on stderr."""
    console.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    return code


def describe(error: Exception) -> str:
    """One line for an error; a system error names its file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return " ".join(str(error).split())


def quiet_libraries() -> None:
    """Keep libraries' notices about optional parts out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    warnings.filterwarnings("ignore")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
