"""Waiting until a device is cool enough to be timed. Knows nothing about what is timed."""

import time
from collections.abc import Callable

from devices import CoolDown

from .record import DeviceState

EVERY_S = 5.0


def wait(state: Callable[[], DeviceState], rule: CoolDown, sleep: Callable[[float], None] = time.sleep) -> str:
    """Wait for the hottest zone to fall to the limit, as long as the rule allows; empty, or why that was in vain."""
    waited = 0.0
    while True:
        zones = state().temperatures_c
        if not zones:
            return ""  # nothing to wait for: the device has no sensor it shows
        hottest = max(zones, key=lambda zone: zones[zone])
        if zones[hottest] <= rule.max_c:
            return ""
        if waited >= rule.limit_s:
            return f"{hottest} still at {zones[hottest]:.0f} °C after {waited:.0f} s, timed above {rule.max_c:.0f} °C"
        sleep(EVERY_S)
        waited += EVERY_S
