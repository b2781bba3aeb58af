"""What releases and boards install is what was seen working together, byte for byte."""

import re

import pytest

from export.manifest import ROOT
from runtime_tests.device_runner import sdk

PEERS = {"llama_cpp_python", "diskcache"}
"""Compiled for benchmarks only."""


def pins(name):
    return set(re.findall(r"^([\w.-]+==[^\s;]+)", (ROOT / name).read_text(), re.MULTILINE))


def plain(pin):
    """Indexes take all of these for one name."""
    return re.sub(r"[-_.]+", "-", pin.lower())


def test_the_lock_holds_every_constraint_with_hashes():
    constraints = {plain(pin) for pin in pins("constraints.txt") if pin.split("==")[0] not in PEERS}
    assert {plain(pin) for pin in pins("locks/release.txt")} == constraints
    for name in ("locks/release.txt", "locks/build.txt"):
        for block in re.split(r"\n(?=[\w.-]+==)", (ROOT / name).read_text())[1:]:
            assert "--hash=sha256:" in block, block.splitlines()[0]


@pytest.mark.parametrize("name", ["executorch", "onnxruntime", "numpy"])
def test_a_board_gets_wheels_whose_digests_are_known(name):
    (pin,) = (pin for pin in pins("constraints.txt") if pin.startswith(f"{name}=="))
    first, *hashes = sdk.locked(pin).splitlines()
    assert first == f"{pin} \\"
    assert hashes
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes)
    with pytest.raises(sdk.UnavailableError, match=r"no hashes of .*==0; run `make setup`"):
        sdk.locked(f"{name}==0")
