"""The fake format has no operators."""


def foreign(folder, described):
    yield from ()
