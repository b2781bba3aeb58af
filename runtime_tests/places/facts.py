"""Facts about a device: one script for any POSIX shell, Android's too, and its output as values.

Everything is read from /proc, /sys and what Android and macOS have instead. An unknown value is null, never guessed.
"""

import re

from devices import last_line
from runtime_tests.evidence.record import DeviceState, Environment

SCRIPT = r"""
say() { [ -n "$2" ] && printf '%s=%s\n' "$1" "$2"; }
first() { [ -r "$1" ] && head -n 1 "$1" 2>/dev/null; }
if command -v getprop >/dev/null 2>&1; then
    say os "Android $(getprop ro.build.version.release), $(getprop ro.build.fingerprint)"
    say cpu "$(getprop ro.soc.model)"
    say model "$(getprop ro.product.model)"
elif command -v sw_vers >/dev/null 2>&1; then
    say os "macOS $(sw_vers -productVersion) ($(sw_vers -buildVersion))"
    say model "$(sysctl -n hw.model)"
    say cpu "$(sysctl -n machdep.cpu.brand_string)"
    say cores "$(sysctl -n hw.physicalcpu)"
    say memory_kb "$(($(sysctl -n hw.memsize) / 1024))"
    say load "$(sysctl -n vm.loadavg | cut -d ' ' -f 2)"
    say battery "$(pmset -g batt | sed -n 's/.*[^0-9]\([0-9]*\)%.*/\1/p')"
    say charging "$(pmset -g batt | sed -n 's/.*%; \([a-z]*\);.*/\1/p')"
else
    say os "$(. /etc/os-release 2>/dev/null && printf %s "$PRETTY_NAME")"
fi
say kernel "$(uname -sr)"
say machine "$(uname -m)"
say model "$(cat /proc/device-tree/model 2>/dev/null | tr -d '\000')"
say cpu "$(sed -n 's/^\(model name\|Hardware\)[[:space:]]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)"
say cores "$(grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo 2>/dev/null)"
say load "$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null)"
say uptime "$(cut -d ' ' -f 1 /proc/uptime 2>/dev/null)"
say governor "$(first /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor)"
say online "$(first /sys/devices/system/cpu/online)"
say affinity "$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status 2>/dev/null)"
for zone in /sys/class/thermal/thermal_zone*; do
    say zone "$(first $zone/type):$(first $zone/temp)"
done
for supply in /sys/class/power_supply/*; do
    if [ "$(first $supply/type)" = Battery ]; then
        say battery "$(first $supply/capacity)"
        say charging "$(first $supply/status)"
    fi
done
exit 0
"""
_MOST_CHARACTERS = 2**16
_MOST_CORES = 2**12
_HOTTEST, _COLDEST = 150.0, -50.0
"""Degrees Celsius that no working sensor reports; some zones count milli-degrees, some report nonsense."""


def values(text: str) -> dict[str, list[str]]:
    """`key=value` lines, of which a device has some dozens; a key may occur several times."""
    entries: dict[str, list[str]] = {}
    for line in text[:_MOST_CHARACTERS].splitlines():
        key, equals, value = line.partition("=")
        if equals and (value := last_line(value, "")):
            entries.setdefault(key, []).append(value)
    return entries


def environment(text: str, tools: dict[str, str]) -> Environment:
    """The device and the software, from the script's output."""
    first = {key: entries[0] for key, entries in values(text).items()}
    system = [first[key] for key in ("os", "kernel") if key in first]
    name = [first[key] for key in ("model", "cpu") if key in first]
    return Environment(
        os=", ".join(system) or "not told",
        cpu=", ".join(dict.fromkeys(name)) or first.get("machine", "not told"),
        cores=min(max(1, int(number(first.get("cores")) or 1)), _MOST_CORES),
        memory_bytes=max(0, int(number(first.get("memory_kb")) or 0)) * 1024,
        load_average_1min=number(first.get("load")),
        python="",
        tools=tools,
    )


def state(text: str) -> DeviceState:
    """Temperatures, battery, clocks and load, from the script's output."""
    all_entries = values(text)
    first = {key: entries[0] for key, entries in all_entries.items()}
    charging = first.get("charging")
    return DeviceState(
        temperatures_c=_temperatures(all_entries.get("zone", [])),
        battery_percent=number(first.get("battery")),
        charging=None if charging is None else charging.lower() in {"charging", "full", "charged"},
        governor=first.get("governor"),
        online_cores=first.get("online"),
        affinity=first.get("affinity"),
        load_average_1min=number(first.get("load")),
        uptime_s=number(first.get("uptime")),
    )


def _temperatures(zones: list[str]) -> dict[str, float]:
    """`type:value` entries → °C by zone; zones of one type are numbered."""
    temperatures: dict[str, float] = {}
    for zone in zones:
        kind, _, text = zone.rpartition(":")
        degrees = number(text)
        if not kind or degrees is None:
            continue
        degrees = degrees / 1000 if abs(degrees) > _HOTTEST else degrees
        if _COLDEST < degrees < _HOTTEST:
            same = sum(re.sub(r"#\d+$", "", name) == kind for name in temperatures)
            temperatures[kind if not same else f"{kind}#{same + 1}"] = degrees
    return temperatures


def number(text: str | None) -> float | None:
    """A decimal number of a size that machines have, or null."""
    return float(text) if text and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", text) else None


UNKNOWN = state("")
