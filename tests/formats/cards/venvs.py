"""python -m tests.formats.cards.venvs FOLDER …: run the Python on cards in clean environments.

Each block gets a new one with what its card's `pip install` brings, and nothing else. Blocks that need a Mac are left
out elsewhere. The exit status is 1 where one failed or answered without "Paris", which SmolLM2 knows.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.formats.cards import snippets


def main(folders):
    failed = False
    for folder in map(Path, folders):
        for command, code in snippets.python((folder / "README.md").read_text(encoding="utf-8")):
            if "coremltools" in command and sys.platform != "darwin":
                print(f"left out  {folder.name}: {command} needs a Mac")
                continue
            with tempfile.TemporaryDirectory() as place:
                started = time.monotonic()
                subprocess.run([sys.executable, "-m", "venv", f"{place}/venv"], check=True)
                arguments = shlex.split(command)[1:]
                subprocess.run([f"{place}/venv/bin/pip", "-qq", "--disable-pip-version-check", *arguments], check=True)
                done = snippets.run(folder.resolve(), code, place, f"{place}/venv/bin/python")
                seconds = time.monotonic() - started
            good = done.returncode == 0 and "Paris" in done.stdout
            failed |= not good
            print(f"{'ran' if good else 'FAILED'}  {folder.name}: {command} ({seconds:.0f} s)", flush=True)
            print(
                *(done.stdout if good else done.stdout + done.stderr).strip().splitlines()[-20:], sep="\n", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
