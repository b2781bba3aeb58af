"""Running a build: what it needs, whether it may be skipped, targets side by side, a folder written whole or not."""
