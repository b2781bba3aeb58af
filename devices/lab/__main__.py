"""The emulated devices from the command line.

python -m devices.lab build                      install what the lab needs, make the root file systems
python -m devices.lab run DEVICE -- COMMAND …    COMMAND with that device running; a real device needs nothing
"""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

from devices import load
from devices.command import run

from . import MACHINES, PACKAGES, TOOLS, LabError, missing, roots, start

_USAGE = 2


def main(arguments: list[str]) -> int:
    """Exit status: the command's own, 2 for wrong usage. Raises DeviceError."""
    match arguments:
        case ["build"]:
            return _build()
        case ["run", name, "--", *command] if command:
            return _run(name, command)
    print(__doc__, file=sys.stderr)
    return _USAGE


def _build() -> int:
    """Everything that needs the network, once."""
    _install(missing(PACKAGES | TOOLS))
    for name, machine in MACHINES.items():
        print(f"{name}: {roots.root_of(machine)}")
    print(f"qemu: {roots.qemu().parent}")
    return 0


def _install(packages: list[str]) -> None:
    """Debian packages, on this machine."""
    if not packages:
        return
    if os.geteuid() != 0:
        raise LabError(f"the lab needs Debian's {', '.join(packages)}: sudo apt-get install {' '.join(packages)}")
    if not shutil.which("apt-get"):
        raise LabError(f"the lab is made of Debian's packages ({', '.join(packages)}), and apt-get is not here")
    for step in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        status = subprocess.run(["apt-get", "-qq", *step], stdout=subprocess.DEVNULL, check=False).returncode
        if status:
            raise LabError(f"apt-get {' '.join(step)} ended with {status}")


def _run(name: str, command: list[str]) -> int:
    """Run a command that reaches the device through what its YAML says."""
    if not load(name).emulated:
        return _shell_status(subprocess.run(command, check=False).returncode)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with start(name) as device:
        # Without its device the command has nothing to do: it ends with this process, however that ends.
        tied = ["setpriv", "--pdeathsig", "KILL", *command]
        child = subprocess.Popen(tied, env={**os.environ, **device.environment})
        try:
            return _shell_status(child.wait())
        except KeyboardInterrupt:  # the command got the signal, too
            return _shell_status(child.wait())
        finally:
            with suppress(ProcessLookupError):
                child.terminate()
            child.wait()


def _shell_status(returncode: int) -> int:
    """The exit status as a shell reports it: death by signal n is 128 + n."""
    return 128 - returncode if returncode < 0 else returncode


if __name__ == "__main__":
    sys.exit(run(main))
