"""The machine that a build runs on: disk, memory, child processes, console, text, digests. No models, no formats."""
