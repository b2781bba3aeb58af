"""Machines by what their systems tell: texts as Macs, ARM and x86 Linux print them, read by the script itself.

Where they are from: `/proc/cpuinfo` as a Graviton 3 prints it (linux-perf-users, September 2022), with part numbers of
util-linux's lscpu for the others; `pmset -g batt` as public projects have recorded it; keys of sysctl and names of
sysfs as their manuals have them. None of these machines has run the script for us.
"""

import platform
import subprocess

import pytest

import devices
from export.host import memory, processor
from runtime_tests.evidence import baseline
from runtime_tests.places import environment, facts
from tests.support.records import sample_record

CPU = "/sys/devices/system/cpu"


def arm(*parts, vendor="0x41"):
    """/proc/cpuinfo of one processor for each part."""
    return "\n".join(
        f"processor\t: {number}\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd\nCPU implementer\t: {vendor}\n"
        f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {part}\nCPU revision\t: 1\n"
        for number, part in enumerate(parts)
    )


def siblings(*groups):
    """Every processor with all that share its core."""
    return {f"{CPU}/cpu{cpu}/topology/thread_siblings_list": group for group in groups for cpu in of(group)}


def of(group):
    begin, _, end = group.partition("-")
    return range(int(begin), int(end or begin) + 1) if "," not in group else map(int, group.split(","))


def dmi(vendor, product):
    return {"/sys/class/dmi/id/sys_vendor": vendor, "/sys/class/dmi/id/product_name": product}


def capacities(*values):
    return {f"{CPU}/cpu{cpu}/cpu_capacity": str(value) for cpu, value in enumerate(values)}


GRAVITON3 = {"/proc/cpuinfo": arm(*["0xd40"] * 4), **dmi("Amazon EC2", "c7g.xlarge"), **siblings(*"0123")}
GRAVITON4 = {"/proc/cpuinfo": arm(*["0xd4f"] * 4), **dmi("Amazon EC2", "c8g.xlarge"), **siblings(*"0123")}
ALTRA = {"/proc/cpuinfo": arm(*["0xd0c"] * 4), **dmi("QEMU", "KVM Virtual Machine")}
SPARK = {"/proc/cpuinfo": arm(*["0xd85"] * 10, *["0xd87"] * 10), **dmi("NVIDIA", "NVIDIA_DGX_Spark")}
PI5 = {
    "/proc/cpuinfo": arm(*["0xd0b"] * 4) + "\nRevision\t: c04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n",
    "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    **siblings(*"0123"),
    **capacities(1024, 1024, 1024, 1024),
}
RK3588 = {
    "/proc/cpuinfo": arm(*["0xd05"] * 4, *["0xd0b"] * 4),
    "/proc/device-tree/model": "Orange Pi 5\0",
    **siblings(*"01234567"),
    **capacities(*[414] * 4, *[1024] * 4),
}
CONTAINER_ON_A_MAC = {"/proc/cpuinfo": arm("0x000", "0x000", vendor="0x61")}
ALDER_LAKE = {
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: 12th Gen Intel(R) Core(TM) i7-12700H\n",
    **siblings("0-1", "2-3", "4-5", "6-7", "8-9", "10-11", *map(str, range(12, 20))),
    "/sys/devices/cpu_core/cpus": "0-11",
    **dmi("LENOVO", "21AH"),
}
EPYC = {
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC 9B14\n",
    **siblings("0,4", "1,5", "2,6", "3,7"),
    "/proc/self/status": "Name:\tsh\nCpus_allowed_list:\t0-1,4-5\n",
}
LOADED = {"hw.memsize": "17179869184", "vm.loadavg": "{ 2.31 2.05 1.98 }"}
M1 = {
    **LOADED, "hw.model": "MacBookAir10,1", "machdep.cpu.brand_string": "Apple M1", "hw.physicalcpu": "8",
    "hw.perflevel0.physicalcpu": "4",
}  # fmt: skip
M5 = {
    **LOADED, "hw.model": "Mac17,2", "machdep.cpu.brand_string": "Apple M5", "hw.physicalcpu": "10",
    "hw.perflevel0.physicalcpu": "4",
}  # fmt: skip
MACS = {"M1": M1, "M5": M5}
LINUX = {
    "Graviton 3": (GRAVITON3, "Amazon EC2 c7g.xlarge, Neoverse-V1", 4, 4),
    "Graviton 4": (GRAVITON4, "Amazon EC2 c8g.xlarge, Neoverse-V2", 4, 4),
    "Ampere Altra": (ALTRA, "QEMU KVM Virtual Machine, Neoverse-N1", 4, 4),
    "DGX Spark": (SPARK, "NVIDIA NVIDIA_DGX_Spark, Cortex-X925 + Cortex-A725", 20, 20),
    "Raspberry Pi 5": (PI5, "Raspberry Pi 5 Model B Rev 1.0, Cortex-A76", 4, 4),
    "Orange Pi 5": (RK3588, "Orange Pi 5, Cortex-A55 + Cortex-A76", 8, 4),
    "container on a Mac": (CONTAINER_ON_A_MAC, "Apple 0x000", 2, 2),
    "Alder Lake": (ALDER_LAKE, "12th Gen Intel(R) Core(TM) i7-12700H", 14, 6),
    "EPYC, taskset": (EPYC, "AMD EPYC 9B14", 2, 2),
    "nothing told": ({}, f"not told {platform.machine()}", 1, 1),
}


@pytest.fixture
def told(tmp_path):
    """What the script prints where these files are, and on a Mac these answers of its programs."""
    roots = []

    def run(files, programs=()):
        roots.append(root := tmp_path / f"root{len(roots)}")
        (root / "bin").mkdir(parents=True)
        for path, text in files.items():
            (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (root / path[1:]).write_text(text if text.endswith("\0") else text.rstrip("\n") + "\n")
        for name, body in dict(programs).items():
            (root / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (root / "bin" / name).chmod(0o755)
        script = facts.SCRIPT
        for top in ("/proc/", "/sys/", "/etc/"):
            script = script.replace(top, f"{root}{top}")
        around = {"PATH": f"{root}/bin:/usr/bin:/bin"}
        ended = subprocess.run(["sh", "-c", script], env=around, capture_output=True, text=True, check=True)
        assert ended.stderr == ""
        return ended.stdout

    return run


def mac(numbers, battery="", settings=""):
    answers = "".join(f"{name}) echo '{value}';;\n" for name, value in numbers.items())
    return {
        "sw_vers": "case $1 in *build*) echo 24B83;; *) echo 15.1;; esac",
        "sysctl": f"case $2 in {answers} *) echo \"sysctl: unknown oid '$2'\" >&2; exit 1; esac",
        "pmset": f"case $2 in batt) cat <<'END'\n{battery}\nEND\n;; *) cat <<'END'\n{settings}\nEND\n;; esac",
    }


@pytest.mark.parametrize("name", LINUX)
def test_a_linux_machine_has_a_name_cores_and_threads(told, name):
    files, cpu, cores, threads = LINUX[name]
    machine = facts.environment(text := told(files), {})
    assert (machine.cpu, machine.cores, facts.threads(text)) == (cpu, cores, threads)


@pytest.mark.parametrize(("name", "cores"), [("M1", 8), ("M5", 10)])
def test_a_mac_has_a_name_cores_and_threads(told, name, cores):
    text = told({}, mac(MACS[name]))
    machine = facts.environment(text, {})
    assert machine.os.startswith("macOS 15.1 (24B83), ")
    assert machine.cpu == f"{MACS[name]['hw.model']}, Apple {name}"
    assert (machine.cores, facts.threads(text)) == (cores, 4)
    assert (machine.memory_bytes, machine.load_average_1min) == (2**34, 2.31)


def test_an_intel_mac_has_no_levels_of_performance(told):
    numbers = {name: value for name, value in M1.items() if "perflevel" not in name}
    assert facts.threads(told({}, mac(numbers))) == 8


def test_unlike_machines_share_no_baseline(told):
    """All of them with as many cores and as much memory."""
    texts = [told(files) for files, *_ in LINUX.values()] + [told({}, mac(numbers)) for numbers in MACS.values()]
    alike = {"cores": 4, "memory_bytes": 2**34}
    files = {baseline.place("host", facts.environment(text, {}).model_copy(update=alike)) for text in texts}
    assert len(files) == len(texts)


@pytest.mark.parametrize(
    ("cpu", "why"),
    [
        ("not told aarch64", "its processor (not told aarch64) may be any"),
        ("Apple 0x000", "its processor (Apple 0x000) may be any"),
        ("QEMU Virtual CPU version 2.5+", "its processor (QEMU Virtual CPU version 2.5+) may be any"),
        ("Apple M5", ""),
        ("Amazon EC2 c7g.xlarge, Neoverse-V1", ""),
        ("QEMU KVM Virtual Machine, Neoverse-N1", ""),
    ],
)
def test_speeds_of_a_processor_without_a_name_are_not_stored(monkeypatch, tmp_path, cpu, why):
    monkeypatch.setattr(baseline, "FOLDER", tmp_path)
    run = sample_record()
    run = run.model_copy(update={"environment": run.environment.model_copy(update={"cpu": cpu})})
    ((path, _),) = baseline.keep([run], "host")
    (reached,) = baseline.read(path).artifacts.values()
    assert len(reached.speeds) == (not why)
    assert baseline.left_out(run) == why


def test_speeds_of_a_device_that_saves_energy_are_not_stored():
    run = sample_record(state_before=facts.state("low_power=1"))
    assert baseline.left_out(run) == "it saved energy"


PMSET = "Now drawing from '{} Power'\n -InternalBattery-0 (id=28442723)\t{}"


@pytest.mark.parametrize(
    ("battery", "percent", "on_mains"),
    [
        (PMSET.format("Battery", "64%; discharging; 3:12 remaining present: true"), 64, False),
        (PMSET.format("Battery", "64%; discharging; (no estimate) present: true"), 64, False),
        (PMSET.format("AC", "7%; AC attached; not charging present: true"), 7, True),
        (PMSET.format("AC", "98%; finishing charge; 0:05 remaining present: true"), 98, True),
        (PMSET.format("AC", "100%; charged; 0:00 remaining present: true"), 100, True),
        (PMSET.format("AC", "85%; charging; 1:23 remaining present: true"), 85, True),
        ("Now drawing from 'AC Power'", None, None),  # a Mac mini
    ],
)
def test_a_mac_tells_what_drives_it(told, battery, percent, on_mains):
    state = facts.state(told({}, mac(M1, battery)))
    assert (state.battery_percent, state.charging) == (percent, on_mains)


def supply(name, **entries):
    return {f"/sys/class/power_supply/{name}/{key}": value for key, value in entries.items()}


@pytest.mark.parametrize(
    ("files", "percent", "on_mains"),
    [
        (supply("BAT0", type="Battery", capacity="80", status="Not charging"), 80, True),
        (supply("BAT0", type="Battery", capacity="80", status="Discharging"), 80, False),
        (supply("BAT0", type="Battery", capacity="80", status="Unknown"), 80, None),
        (
            supply("BAT0", type="Battery", capacity="80", status="Not charging")
            | supply("BAT1", type="Battery", capacity="30", status="Discharging"),
            80,
            False,
        ),
        (supply("hidpp_0", type="Battery", scope="Device", capacity="55", status="Discharging"), None, None),  # a mouse
        (supply("AC", type="Mains", online="1"), None, None),
    ],
)
def test_linux_tells_what_drives_it(told, files, percent, on_mains):
    state = facts.state(told(files))
    assert (state.battery_percent, state.charging) == (percent, on_mains)


PROFILE = "/sys/firmware/acpi/platform_profile"


@pytest.mark.parametrize(
    ("files", "programs", "saves"),
    [
        ({}, mac(M1, settings=" lowpowermode         1\n womp 0"), True),
        ({}, mac(M1, settings="Currently in use:\n lowpowermode         0"), False),
        ({}, mac(M1, settings=" sleep 1"), None),
        ({PROFILE: "low-power"}, {}, True),
        ({PROFILE: "balanced"}, {}, False),
        ({}, {}, None),
        ({}, {"getprop": "echo", "settings": "echo 1"}, True),
        ({}, {"getprop": "echo", "settings": "echo null"}, None),
    ],
)
def test_a_device_tells_whether_it_saves_energy(told, files, programs, saves):
    assert facts.state(told(files, programs)).low_power is saves


def test_a_share_of_the_processors_is_all_that_this_machine_has(monkeypatch):
    monkeypatch.setattr(processor, "usable", lambda: 3)
    monkeypatch.setattr(memory, "total_bytes", lambda: 2**33)
    monkeypatch.setattr(environment, "_told", lambda: "cores=64\nmemory_kb=99999999\ncpu=AMD EPYC 9B14")
    machine = environment.current()
    assert (machine.cpu, machine.cores, machine.memory_bytes) == ("AMD EPYC 9B14", 3, 2**33)
    assert environment.threads() == 3
    assert environment.threads(devices.load("pixel-8")) == 4
