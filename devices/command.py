"""How the commands of this package end: one line and an exit code, never a traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .transports import DeviceError, visible

_INTERRUPTED = 130


def run(main: Callable[[list[str]], int]) -> int:
    """Run a command with this process's arguments and give its exit code; 1 for one line of error, 130 interrupted.

    A closed standard input is an empty one; what goes to a closed output goes nowhere.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # and the next file to be opened would get its number
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 – to the end
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()  # here, where an error can still be told
    except BrokenPipeError:  # nobody reads on
        code = 1
    except OSError as error:
        code = fail(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except (DeviceError, subprocess.SubprocessError) as error:
        code = fail(str(error))
    except KeyboardInterrupt:
        code = fail("interrupted", _INTERRUPTED)
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            # Python would write the rest once more, at its end: a traceback, from 3.12 on an exit code of its own
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 – to the end
            code = code or 1
    return code


def fail(message: str, code: int = 1) -> int:
    """Print one line on stderr, if it can be written, and give the exit code."""
    with suppress(OSError):
        print(visible(f"error: {message}"), file=sys.stderr, flush=True)
    return code
