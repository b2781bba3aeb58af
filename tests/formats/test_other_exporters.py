"""`inspect` and `diff` of files that ExecuTorch's and coremltools' own converters write."""

import subprocess
import sys

import pytest

from export.errors import ExportError
from export.toolbox import difference, inspection
from tests.support.processes import FAKES


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with a program and a package."""
    folder = tmp_path_factory.mktemp("stock")
    subprocess.run([sys.executable, FAKES / "other_exporters.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def pte(stock):
    return stock / "stock.pte"


@pytest.fixture
def package(stock):
    return stock / "stock.mlpackage"


def test_a_program_with_infinite_bounds(pte):
    contents = inspection.inspect(pte).contents
    assert contents.delegated_ops == {"FullyConnected": 2}
    assert sum(tensor.bytes for tensor in contents.tensors) == 4 * (64 * 32 + 32 + 32 * 8 + 8)
    assert [(spec.dtype, tuple(spec.shape)) for spec in contents.entries[0].inputs] == [("float32", (1, 64))]


def test_a_package_with_a_state_and_int4_blocks(package):
    report = inspection.inspect(package)
    assert [(spec.name, tuple(spec.shape)) for spec in report.contents.cache] == [("total", (1, 8))]
    assert report.contents.ops["constexpr_blockwise_shift_scale"] == 1
    assert [layer.scheme for layer in report.layers] == ["int4 g4"]


def test_files_of_two_exporters_can_be_compared(pte, package):
    schemes = difference.compare(pte, package, []).schemes
    assert [(scheme.a, scheme.b) for scheme in schemes] == [(None, "int4 g4")]


def test_core_mls_older_files_are_not_taken_for_onnx(tmp_path):
    path = tmp_path / "old.mlmodel"
    path.write_bytes(b"\x08\x04\x12\x00")
    with pytest.raises(ExportError, match="neither an artifact folder nor a file of a known format"):
        inspection.inspect(path)
