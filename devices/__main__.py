"""python -m devices: every known device, how it is reached and what it runs."""

import sys

from . import DeviceError, load, names


def main() -> int:
    """One line per device."""
    try:
        known = [load(name) for name in names()]
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    width = max(len(device.name) for device in known)
    for device in known:
        print(f"{device.name:{width}}  {device.transport:6}  {', '.join(device.targets):44}  {device.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
