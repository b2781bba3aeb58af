"""python -m export MODEL QUANT TARGET [--source DIR_OR_HF_ID] [--out DIR]"""

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from .errors import ExportError
from .progress import console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    quant: Annotated[str, typer.Argument(help="a name in configs/quant")],
    target: Annotated[str, typer.Argument(help="a name in configs/targets")],
    source: Annotated[str | None, typer.Option(help="folder, .gguf file or hub id the weights come from")] = None,
    out: Annotated[Path | None, typer.Option(help="the finished folder; default build/MODEL_QUANT_TARGET")] = None,
) -> None:
    """Build one artifact folder: quantize once, lower, describe."""
    from .plan import load_plan

    plan = load_plan(model, quant, target)
    from .pipeline import export

    folder = out or Path("build") / plan.id
    console.print(f"[bold]{plan.id}[/bold]")
    built = export(plan, source, folder)
    print(
        f"{folder}: {plan.target.artifact} {built.artifact_bytes / 1e6:.1f} MB, "
        f"{built.quantization.bits_per_weight:.2f} bits per weight"
    )


def run() -> int:
    """Run the command; a user's mistake, a full disk and Ctrl-C end in one line and an exit code."""
    quiet_libraries()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        app(standalone_mode=False)
    except typer.Exit as done:
        return done.exit_code
    except (ExportError, OSError) as error:
        console.print(f"error: {describe(error)}", style="red", markup=False, soft_wrap=True)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        console.print("interrupted: nothing was written", style="red")
        return 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            console.print(f"error: {error.format_message()}", style="red", markup=False)  # type: ignore[attr-defined]
            return 2
        if shutil.disk_usage(Path.cwd()).free < 2**20:
            console.print("error: the disk is full; free some space and build again", style="red")
            return 1
        raise
    return 0


def describe(error: Exception) -> str:
    """One line for an error; a system error names its file."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Keep libraries' notices about optional parts out of our output."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    warnings.filterwarnings("ignore")
    for name in ("torchao", "torch", "coremltools", "transformers", "executorch", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(run())
