"""What our commands share: one-line errors, exit codes, clean interrupts, quiet libraries."""

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

import typer

from .errors import ExportError
from .progress import console


def run(app: typer.Typer, interrupted: str) -> int:
    """Run the command; a user's mistake, a full disk and Ctrl-C end in one line and an exit code."""
    quiet_libraries()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = app(standalone_mode=False)  # typer hands the code of an Exit back instead of raising it
    except (ExportError, OSError) as error:
        console.print(f"error: {describe(error)}", style="red", markup=False, soft_wrap=True)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        console.print(f"interrupted: {interrupted}", style="red")
        return 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            console.print(f"error: {error.format_message()}", style="red", markup=False)  # type: ignore[attr-defined]
            return 2
        if shutil.disk_usage(Path.cwd()).free < 2**20:
            console.print("error: the disk is full; free some space and run it again", style="red")
            return 1
        raise
    return code if isinstance(code, int) else 0


def describe(error: Exception) -> str:
    """One line for an error; a system error names its file."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def interrupt(_signum: int, _frame: FrameType | None) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Keep libraries' notices about optional parts out of our output."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch", "torch.utils._pytree", "coremltools", "transformers", "executorch", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
