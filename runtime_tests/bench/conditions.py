"""What stands below every generated table: the command that makes it again, the machine, the commit, the tools."""

from collections.abc import Mapping

from ..record import Environment

TEXT = """

    {command}

{cpu}, {cores} cores; commit {commit}; {tools}.
"""


def conditions(command: str, environment: Environment, commit: str, tools: Mapping[str, str]) -> str:
    """As markdown."""
    return TEXT.format(
        command=command,
        cpu=environment.cpu,
        cores=environment.cores,
        commit=commit[:12],
        tools=", ".join(f"{tool} {version}" for tool, version in tools.items()),
    )
