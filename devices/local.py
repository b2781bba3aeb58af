"""The machine that runs the command, as a device. Knows nothing of what runs on it."""


class LocalLink:
    """A shell here."""

    unsure: frozenset[int] = frozenset()

    def __init__(self, name: str) -> None:
        self.name = name

    def client(self, script: str) -> list[str]:
        return ["sh", "-c", script]

    def explain(self, stderr: bytes, /) -> str:
        return stderr.decode(errors="replace").strip() or "no reason given"

    def close(self) -> None:
        pass
