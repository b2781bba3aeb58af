"""Importing modules of a large package without all that the package itself imports."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


@contextmanager
def without_packages(*packages: str) -> Iterator[None]:
    """Modules imported inside come without the own code of these packages, which runs when one is imported later.

    A package that is imported already stays as it is.
    """
    bare: list[ModuleType] = []
    try:
        bare.extend(_put(package) for package in packages if package not in sys.modules)
        yield
    finally:
        for module in bare:
            del sys.modules[module.__name__]
            parent, _, name = module.__name__.rpartition(".")
            delattr(sys.modules[parent], name)
            sys.meta_path.insert(0, _Rest(module))


def _put(package: str) -> ModuleType:
    spec = util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    module = util.module_from_spec(spec)
    parent, _, name = package.rpartition(".")
    sys.modules[package] = module
    setattr(sys.modules[parent], name, module)
    return module


class _Rest(MetaPathFinder, Loader):
    """Imports a package as the module that has those modules already which were imported without it."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__spec__
        assert module.__spec__.loader
        self.module, self.spec, self.loader = module, module.__spec__, module.__spec__.loader

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        del path, target
        if fullname != self.spec.name:
            return None
        spec = util.spec_from_loader(fullname, self, origin=self.spec.origin, is_package=True)
        assert spec
        spec.submodule_search_locations = self.spec.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        del spec
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        module.__spec__ = self.spec
