"""The machine that a build runs on: disk, memory, child processes, console, digests. No models and no formats."""
