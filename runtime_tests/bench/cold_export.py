"""`python -m export` with a quantization cache of its own, so that nothing comes from an earlier build.

python -m runtime_tests.bench.cold_export MODEL QUANT TARGET --out FOLDER
"""

import sys
import tempfile
from pathlib import Path

from export import pipeline
from export.__main__ import app
from export.cli import run

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        pipeline.CACHE = Path(cache)
        sys.exit(run(app))
