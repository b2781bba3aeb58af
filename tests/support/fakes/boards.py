"""A board without hardware: a program `ssh` that runs commands here, with what other people's machines add to them."""

import os
import shlex

import devices

SHELL = """#!/bin/bash
for last; do :; done
cd {home}
{before}
{login} "$last"
code=$?
{after}
exit $code
"""


def ssh(folder, monkeypatch, *, before="", after="", login="sh -c"):
    """Put such an `ssh` first on the PATH; gives the Raspberry Pi 5 of this machine's ABI and its home folder."""
    home = folder / "home"
    for path in (home, folder / "bin"):
        path.mkdir(exist_ok=True)
    program = folder / "bin/ssh"
    program.write_text(SHELL.format(home=shlex.quote(str(home)), before=before, after=after, login=login))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RASPBERRY_PI_5_HOST", "board")
    device = devices.load("raspberry-pi-5").model_copy(update={"abi": os.uname().machine, "cool_down": None})
    return device, home
