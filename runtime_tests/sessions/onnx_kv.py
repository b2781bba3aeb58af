"""An onnx_kv artifact in onnxruntime, by the very code that goes to a board. Knows token ids, never text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.manifest import Manifest

from ..runner.board.onnx_main import Session
from ..session import feed_one_by_one


class OnnxSession:
    """The board's session with the limits of a session: there, the runner around it keeps them."""

    measures_speed = True

    def __init__(self, model: Path, threads: int) -> None:
        self.session = Session(model, threads)

    def reset(self) -> None:
        self.session.reset()

    def rewind(self, length: int) -> None:
        self.session.length = length

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        if not tokens:
            raise ValueError("no tokens to feed")
        if self.session.length + len(tokens) > self.session.context_length:
            raise ValueError(
                f"{self.session.length} tokens in the cache and {len(tokens)} new ones are more than the context "
                f"length {self.session.context_length}"
            )
        return self.session.feed(tokens)

    def feed_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return feed_one_by_one(self, tokens)

    def close(self) -> None:
        del self.session


def open_session(folder: Path, manifest: Manifest, *, threads: int) -> OnnxSession:
    """Load the artifact of a folder; a damaged file is onnxruntime's error."""
    return OnnxSession(folder / manifest.plan.target.artifact, threads)
