"""Checkpoint to artifact: plan, quantize once, lower. Never imports runtime_tests or devices."""
