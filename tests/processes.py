"""What still runs, on this machine and on the emulated devices, whose processes are seen from here too."""

import time

import psutil


def left_running(marker, patience_s=5.0):
    """Command lines that hold the marker when the patience is over; empty as soon as there are none."""
    deadline = time.monotonic() + patience_s
    while (found := matching(marker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def sleeps(marker, patience_s=20.0):
    """Wait for `sleep MARKER` on a device."""
    deadline = time.monotonic() + patience_s
    while not any(words.endswith(f"sleep {marker}") for words in matching(marker)):
        assert time.monotonic() < deadline, f"{marker} did not start"
        time.sleep(0.05)


def matching(marker):
    return [words for process in psutil.process_iter() if marker in (words := command_line(process))]


def command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
