"""A Core ML package folder through its session: op by op off a Mac, Core ML itself on one."""

from .session import open_runner

__all__ = ["open_runner"]
