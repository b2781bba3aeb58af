"""The one exception a user's mistake raises."""


class ExportError(Exception):
    """A plan, file or machine that cannot give the artifact.

    The message is one line: which file, field or layer; what is wrong; what to do.
    """
