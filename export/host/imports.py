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
    bare = [_put(package) for package in packages if package not in sys.modules]
    try:
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
        sys.meta_path.remove(self)
        return util.spec_from_loader(fullname, self, origin=self.spec.origin, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        del spec
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__, module.__loader__ = self.spec, self.loader
        self.loader.exec_module(module)
