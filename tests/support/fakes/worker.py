"""The worker with the fake format and session plugged in, as a real one would be: by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import export.formats
import runtime_tests.sessions
from runtime_tests.jobs import worker

HERE = Path(__file__).parent
export.formats.__path__.append(str(HERE / "backends"))
runtime_tests.sessions.__path__.append(str(HERE / "sessions"))

if __name__ == "__main__":
    sys.exit(worker.main())
