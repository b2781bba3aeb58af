"""Apple's protobuf messages as coremltools brings them, without coremltools itself: seven seconds, in every process."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["FeatureTypes_pb2", "MIL_pb2", "Model_pb2"]
_PROTO = f"{__name__}.proto"


def _message(name: str) -> Any:
    """A module of `coremltools.proto`. Raises ModuleNotFoundError: coremltools is not installed."""
    if _PROTO not in sys.modules:
        spec = find_spec("coremltools")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("no module named 'coremltools'; its protobuf messages are read with it")
        package = ModuleType(_PROTO)
        package.__path__ = [f"{folder}/proto" for folder in spec.submodule_search_locations]
        sys.modules[_PROTO] = package
    return importlib.import_module(f"{_PROTO}.{name}")


FeatureTypes_pb2, MIL_pb2, Model_pb2 = map(_message, ("FeatureTypes_pb2", "MIL_pb2", "Model_pb2"))
