"""Core ML without a Mac: an evaluator that runs a saved package op by op, for correctness and never for speed.

On a Mac, `compute_plan` lists where Core ML would run each operation, and `check` compares it with the evaluator.
"""

from runtime_tests.sessions.mlpackage import UNITS, in_core_ml

__all__ = ["UNITS", "in_core_ml"]
