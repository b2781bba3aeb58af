"""Devices before anything is attached: descriptions, variables, missing programs, one YAML per device."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import devices
from devices import DeviceError
from devices.transports import adb, packages, transfer
from export.errors import ExportError
from runtime_tests.device_runner import mlpackage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def desk(tmp_path):
    """A copy of the files that adding a device may touch."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("devices", "export"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def described(monkeypatch, tmp_path):
    """Write and load a device's YAML: that of the Pixel 8 with changed keys; `...` leaves a key out."""

    def describe(**changed):
        fields = yaml.safe_load((devices.FOLDER / "pixel-8.yaml").read_text()) | changed
        fields = {key: value for key, value in fields.items() if value is not ...}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(fields))
        monkeypatch.setattr(devices, "FOLDER", tmp_path)
        return devices.load("mine")

    return describe


@pytest.mark.parametrize("name", devices.names())
def test_every_device_is_described_whole(name):
    device = devices.load(name)
    assert device.name == name
    assert device.emulated == name.startswith("emulated-")
    assert device.attached == (name != "host")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nokia-3310", r"known: emulated-android, .*, raspberry-pi-5"),
        ("pixel8", r"did you mean pixel-8\?"),
        ("rasberry-pi5", r"did you mean raspberry-pi-5\?"),
    ],
)
def test_an_unknown_device_is_answered_by_the_nearest(name, near):
    with pytest.raises(DeviceError, match=f"^unknown device '{name}'; {near}$"):
        devices.load(name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"thread": 4}, r"thread: unknown key \(did you mean threads\?\)$"),
        ({"memory_gb": 8}, r"memory_gb: unknown key \(known: abi, budgets, "),
        ({"abi": ...}, "abi: missing$"),
        ({"name": "pixel"}, "remove the key `name`"),
        ({"threads": 0}, "threads: Input should be greater than 0"),
        ({"transport": {"kind": "telepathy"}}, r"kind: 'telepathy' is unknown \(known: adb, apple, local, ssh\)$"),
        ({"transport": {"kind": "shh"}}, r"kind: 'shh' is unknown \(did you mean ssh\?\)$"),
        ({"transport": {"serial": "x"}}, "transport: kind: missing$"),
        (
            {"transport": {"kind": "adb", "serial": "x", "model": None, "modl": 5}},
            r"transport\.adb\.modl: unknown key \(did you mean model\?\)$",
        ),
        (
            {"transport": {"kind": "local", "host": "x"}},  # a key of other transports
            r"transport\.local\.host: unknown key \(known: kind\)$",
        ),
        ({"transport": {"kind": "ssh", "host": "x"}}, r"transport\.ssh\.port: missing"),
        ({"budgets": {"min_decode_tps": 1.0, "max_ttft": 1}}, r"max_ttft: unknown key \(did you mean max_ttft_s\?\)"),
    ],
)
def test_a_wrong_description_is_one_line_that_names_the_key(described, changed, message):
    with pytest.raises(DeviceError, match=message) as refused:
        described(**changed)
    assert "\n" not in str(refused.value)


def test_a_phone_behind_a_mac_is_refused_unless_a_runner_is_named(monkeypatch):
    monkeypatch.setattr(devices, "FOLDER", ROOT / "tests/support/fakes/devices")
    phone = devices.load("iphone-15-pro")
    assert phone.transport.bridged
    with pytest.raises(ExportError, match="without their state, so a filled KV cache can be neither checked nor timed"):
        mlpackage.require(phone, "", None)
    bridged = phone.model_copy(update={"runner": Path("nowhere/bridge")})
    with pytest.raises(ExportError, match=r"runner: no file .*nowhere/bridge"):
        mlpackage.install(None, bridged, timeout_s=1)


def test_a_file_that_is_no_mapping(monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("[")
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    with pytest.raises(DeviceError, match="not readable as YAML"):
        devices.load("mine")


def test_an_unset_variable_is_named(monkeypatch):
    monkeypatch.delenv("RASPBERRY_PI_5_HOST", raising=False)
    with pytest.raises(DeviceError, match=r"set RASPBERRY_PI_5_HOST; devices/raspberry-pi-5\.yaml takes its host"):
        devices.open_transport(devices.load("raspberry-pi-5"))


@pytest.mark.parametrize("name", ["emulated-android", "emulated-pi5"])
def test_no_other_device_stands_in_for_an_emulated_one(monkeypatch, name):
    for variable in ("EMULATED_ANDROID_SERIAL", "EMULATED_PI5_SSH_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DeviceError, match=f"not running; python -m devices.lab run {name} -- COMMAND"):
        devices.open_transport(devices.load(name))


@pytest.fixture
def bare_path(monkeypatch, tmp_path):
    """No programs but the shell."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("ADB", raising=False)
    monkeypatch.setattr(packages, "hint", "brew install {}".format)


def test_without_adb_the_package_is_named(monkeypatch, bare_path):
    monkeypatch.setattr(adb.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="adb is not installed: brew install adb, or set ADB to that of Android"):
        devices.open_transport(devices.load("pixel-8"))


def test_adb_is_found_in_adbutils(monkeypatch, bare_path, tmp_path):
    program = tmp_path / "adbutils/binaries/adb"
    program.parent.mkdir(parents=True)
    program.touch()
    (tmp_path / "adbutils/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert adb.find() == str(program)


def test_an_adb_that_is_not_there(monkeypatch):
    monkeypatch.setenv("ADB", "/no/such/adb")
    with pytest.raises(DeviceError, match="ADB=/no/such/adb: no such program"):
        adb.find()


def test_without_ssh_the_package_is_named(monkeypatch, bare_path):
    monkeypatch.setenv("RASPBERRY_PI_5_HOST", "board")
    with pytest.raises(DeviceError, match="ssh is not installed: brew install ssh"):
        devices.open_transport(devices.load("raspberry-pi-5"))


def test_a_device_is_one_yaml(desk):
    shutil.copy(desk / "devices/pixel-8.yaml", desk / "devices/my-phone.yaml")
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    make = subprocess.run(
        ["make", "-n", "my-phone"], cwd=desk, env=environment, capture_output=True, text=True, check=True
    )
    assert "--device my-phone" in make.stdout
    assert "my-phone" in list_devices(desk)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("bad", "emulatd: false", r"emulatd: unknown key \(did you mean emulated\?\)"),
        ("bad", "[", "not readable as YAML"),
        ("bad", "", "found NoneType"),
        ("a:b", "emulatd: false", "emulatd: unknown key"),
        ("a b", "emulatd: false", "emulatd: unknown key"),
        ("build", "emulatd: false", "emulatd: unknown key"),  # the name of a command
    ],
)
def test_a_bad_yaml_harms_only_itself(desk, name, text, says):
    (desk / f"devices/{name}.yaml").write_text(text)
    listed = list_devices(desk)
    assert re.search(says, " ".join(listed.split()))
    assert "attached" in next(line for line in listed.splitlines() if line.startswith("host"))
    for target, shown in (("host", "--device host"), ("build", "-m export 'smollm2-135m'")):
        command = ["make", "-n", "--old-file=.venv/.ready", target]
        path = {"PATH": os.environ["PATH"]}
        made = subprocess.run(command, cwd=desk, env=path, capture_output=True, text=True, check=True)
        assert made.stderr == ""
        assert shown in made.stdout


def list_devices(folder):
    """Without adb, which would start a server that stays."""
    environment = {"PATH": "/usr/bin:/bin", "ADB": "false"}
    command = [sys.executable, "-m", "devices"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_list_says_of_each_device_whether_it_answers():
    lines = {line.split()[0]: line for line in list_devices(ROOT).splitlines()}
    assert set(devices.names()) <= set(lines)
    assert f"attached, {os.uname().machine}" in lines["host"]
    assert "not running" in lines["emulated-android"]


def test_the_processor_of_a_program_is_read_from_its_file(tmp_path):
    real = Path(sys.executable).resolve()
    assert transfer.runs(real, os.uname().machine)
    assert not transfer.runs(real, "armeabi-v7a")
    (tmp_path / "weights").write_bytes(b"\x7fELF")
    assert transfer.machine(tmp_path / "weights") is None
