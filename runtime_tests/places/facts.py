"""Facts about a device: one script for any POSIX shell, Android's too, and its output as values.

Everything is read from /proc, /sys and what Android and macOS have instead. An unknown value is null, never guessed.
"""

import re
from collections import Counter

from devices import last_line
from runtime_tests.evidence.record import DeviceState, Environment

from . import processors

SCRIPT = r"""
LC_ALL=C; export LC_ALL
say() { [ -n "$2" ] && printf '%s=%s\n' "$1" "$2"; }
first() { [ -r "$1" ] && head -n 1 "$1" 2>/dev/null; }
if command -v getprop >/dev/null 2>&1; then
    say os "Android $(getprop ro.build.version.release), $(getprop ro.build.fingerprint)"
    say cpu "$(getprop ro.soc.model)"
    say model "$(getprop ro.product.model)"
    say low_power "$(settings get global low_power 2>/dev/null)"
elif command -v sw_vers >/dev/null 2>&1; then
    say os "macOS $(sw_vers -productVersion) ($(sw_vers -buildVersion))"
    say model "$(sysctl -n hw.model)"
    say cpu "$(sysctl -n machdep.cpu.brand_string)"
    say cores "$(sysctl -n hw.physicalcpu)"
    say fast_cores "$(sysctl -n hw.perflevel0.physicalcpu 2>/dev/null)"
    say memory_kb "$(($(sysctl -n hw.memsize) / 1024))"
    say load "$(sysctl -n vm.loadavg | cut -d ' ' -f 2)"
    pmset -g batt 2>/dev/null | sed 's/^/pmset=/'
    say low_power "$(pmset -g 2>/dev/null | sed -n 's/^ *lowpowermode *//p')"
else
    say os "$(. /etc/os-release 2>/dev/null && printf %s "$PRETTY_NAME")"
    say low_power "$(first /sys/firmware/acpi/platform_profile)"
fi
say kernel "$(uname -sr)"
say machine "$(uname -m)"
say model "$(cat /proc/device-tree/model 2>/dev/null | tr -d '\000')"
say product "$(first /sys/class/dmi/id/sys_vendor) $(first /sys/class/dmi/id/product_name)"
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
    if [ "$(first $supply/type)" = Battery ] && [ "$(first $supply/scope)" != Device ]; then
        say battery "$(first $supply/capacity)"
        say charging "$(first $supply/status)"
    fi
done
say fast "$(first /sys/devices/cpu_core/cpus)"
each() { grep -s . /dev/null /sys/devices/system/cpu/cpu[0-9]*/$1 | sed "s|.*/cpu\([0-9]*\)/$1:|$2=\1:|"; }
each topology/thread_siblings_list siblings
each cpu_capacity capacity
sed -n 's/^\(CPU implementer\|CPU part\)[[:space:]]*: */id=\1 /p' /proc/cpuinfo 2>/dev/null
exit 0
"""
_MOST_CHARACTERS = 2**16
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


def environment(text: str, tools: dict[str, str], python: str = "") -> Environment:
    """The device and the software, from the script's output."""
    told = values(text)
    first = {key: entries[0] for key, entries in told.items()}
    system = [first[key] for key in ("os", "kernel") if key in first]
    return Environment(
        os=", ".join(system) or processors.NOT_TOLD,
        cpu=processors.name(told),
        cores=processors.cores(told),
        memory_bytes=max(0, int(number(first.get("memory_kb")) or 0)) * 1024,
        load_average_1min=number(first.get("load")),
        python=python,
        tools=tools,
    )


def threads(text: str) -> int:
    """Of a session on the device, from the script's output."""
    return processors.threads(values(text))


def state(text: str) -> DeviceState:
    """Temperatures, battery, clocks and load, from the script's output."""
    told = values(text)
    first = {key: entries[0] for key, entries in told.items()}
    percent, charging = _battery(told)
    return DeviceState(
        temperatures_c=_temperatures(told.get("zone", [])),
        battery_percent=percent,
        charging=charging,
        low_power=_low_power(first.get("low_power")),
        governor=first.get("governor"),
        online_cores=first.get("online"),
        affinity=first.get("affinity"),
        load_average_1min=number(first.get("load")),
        uptime_s=number(first.get("uptime")),
    )


def _battery(told: dict[str, list[str]]) -> tuple[float | None, bool | None]:
    """How full the first battery is, and whether none of them drives the device; null: not told, or there is none."""
    if "pmset" in told:  # Now drawing from 'AC Power', -InternalBattery-0 (id=…) 80%; AC attached; not charging …
        text = " ".join(told["pmset"])
        percent = re.search(r"([0-9]{1,3})%", text)
        if not percent:
            return None, None
        return float(percent[1]), None if "'" not in text else "'Battery Power'" not in text
    states = {status.lower() for status in told.get("charging", [])} - {"unknown"}
    return number(next(iter(told.get("battery", [])), None)), "discharging" not in states if states else None


def _low_power(text: str | None) -> bool | None:
    """Whether the user has the device save energy: a switch, or Linux's name of a profile."""
    return None if text in (None, "null") else text in {"1", "low-power", "quiet"}


def _temperatures(zones: list[str]) -> dict[str, float]:
    """`type:value` entries → °C by zone; zones of one type are numbered."""
    temperatures, seen = dict[str, float](), Counter[str]()
    for zone in zones:
        kind, _, text = zone.rpartition(":")
        degrees = number(text)
        if not kind or degrees is None:
            continue
        degrees = degrees / 1000 if abs(degrees) > _HOTTEST else degrees
        if _COLDEST < degrees < _HOTTEST:
            seen[kind] += 1
            temperatures[kind if seen[kind] == 1 else f"{kind}#{seen[kind]}"] = degrees
    return temperatures


def number(text: str | None) -> float | None:
    """A decimal number of a size that machines have, or null."""
    return float(text) if text and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", text) else None


UNKNOWN = state("")
