"""Modules without the code of their package, and the package afterwards."""

import importlib
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib import util

import pytest

from export.host.imports import without_packages

FILES = {
    "outer/__init__.py": "",
    "outer/large/__init__.py": "from .user import Name, used; loaded = True",
    "outer/large/part.py": "class Name: pass",
    "outer/large/user.py": "from outer.large.part import Name; used = Name",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Name of a package whose own code imports another of its modules, which imports the one that is wanted."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "outer.large"
    for name in [name for name in sys.modules if name.partition(".")[0] == "outer"]:
        del sys.modules[name]


def wanted(package):
    with without_packages(package):
        return importlib.import_module(f"{package}.part")


@pytest.mark.parametrize("first", ["outer.large", "outer.large.user"])
def test_the_package_is_whole_once_it_is_imported(package, first):
    finders = list(sys.meta_path)
    part = wanted(package)
    assert "outer.large" not in sys.modules
    assert "outer.large.user" not in sys.modules
    importlib.import_module(first)
    large = sys.modules["outer.large"]
    assert large.loaded
    assert large.used is large.Name is part.Name
    assert large.part is part
    assert sys.modules["outer"].large is large
    assert large.__spec__.origin.endswith("__init__.py")
    assert sys.meta_path == finders


def test_one_that_is_there_stays_as_it_is(package):
    large = importlib.import_module(package)
    assert wanted(package) is large.part
    assert sys.modules[package] is large


def test_asking_where_a_package_is_changes_nothing(package):
    part = wanted(package)
    assert util.find_spec(package)
    assert importlib.import_module(package).part is part


def test_one_that_is_missing_leaves_the_others_as_they_were(package):
    with pytest.raises(ModuleNotFoundError), without_packages(package, "outer.missing"):
        pass
    assert importlib.import_module(package).loaded


def test_another_thread_waits_for_the_whole_package(package, tmp_path):
    (tmp_path / "outer/large/__init__.py").write_text("import time; time.sleep(0.5); loaded = True")
    wanted(package)
    with ThreadPoolExecutor(2) as pool:
        assert all(module.loaded for module in pool.map(importlib.import_module, [package] * 2))


def test_one_that_is_not_there_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"'export\.nowhere'"), without_packages("export.nowhere"):
        pass


def test_reading_a_pte_loads_no_compiler(tiny):
    code = """
        import sys
        from pathlib import Path
        from export.formats.pte import read
        from export.formats.pte.file import open_pte, quantized_linears
        model = Path(sys.argv[1])
        assert not list(read.structure(model))
        assert len(list(quantized_linears(open_pte(model)))) > 10
        assert not {"executorch.exir", "torch._inductor", "torchao"} & sys.modules.keys(), sorted(sys.modules)
        import export.formats.pte.program
        assert "torch._inductor" in sys.modules
        assert len(list(quantized_linears(open_pte(model)))) > 10
    """
    model = tiny("executorch-xnnpack") / "model.pte"
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(model)], check=True)
