"""What of an emulated device lies on the host's side: an adb server or ssh keys of its own, nothing of the user's."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .roots import LabError

SERVER_LIMIT_S = 20


@dataclass(frozen=True)
class Side:
    """The host's part."""

    secrets: dict[str, str]
    """Files the device gets: name → text."""
    companion: list[str]
    """A program that runs beside the device; may be empty."""
    environment: Callable[[int], dict[str, str]]
    """From the port where the device answers to what its YAML and its clients read."""


def adb(scratch: Path) -> Side:
    """An adb server at a socket in the scratch folder, with its keys there: the user's server and keys stay alone."""
    path = scratch / "adb"
    socket = f"localfilesystem:{path}"
    companion = ["env", f"HOME={scratch}", "adb", "-L", socket, "nodaemon", "server"]

    def environment(port: int) -> dict[str, str]:
        deadline = time.monotonic() + SERVER_LIMIT_S
        while not path.is_socket():  # without it the first client would start a server of its own
            if time.monotonic() > deadline:
                raise LabError("the adb server did not start")
            time.sleep(0.02)
        return {"ADB_SERVER_SOCKET": socket, "EMULATED_ANDROID_SERIAL": f"127.0.0.1:{port}"}

    return Side({}, companion, environment)


def ssh(scratch: Path) -> Side:
    """Fresh keys for both ends and an ssh configuration that leads to the device."""
    for key in ("host_key", "user_key"):
        generate = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(scratch / key)]
        subprocess.run(generate, check=True, stdout=subprocess.DEVNULL)
    public = " ".join((scratch / "host_key.pub").read_text().split()[:2])
    secrets = {
        "host_key": (scratch / "host_key").read_text(),
        "authorized_keys": (scratch / "user_key.pub").read_text(),
    }

    def environment(port: int) -> dict[str, str]:
        (scratch / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
        settings = {
            "HostName": "127.0.0.1",
            "Port": port,
            "User": "root",
            "IdentityFile": scratch / "user_key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": scratch / "known_hosts",
            "GlobalKnownHostsFile": "none",
        }
        lines = ["Host emulated-pi5", *(f"  {key} {value}" for key, value in settings.items())]
        (scratch / "config").write_text("\n".join(lines) + "\n")
        return {"EMULATED_PI5_SSH_CONFIG": str(scratch / "config")}

    return Side(secrets, [], environment)


SIDES = {"emulated-android": adb, "emulated-pi5": ssh}
