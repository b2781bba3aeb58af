"""Messages for the tiny model, and a session that records what it is fed."""

from export import manifest
from runtime_tests.sessions import open_session

CONTEXT, SHORT = 256, 64
MESSAGES = ("hello", "and then?", "why")


def opened(folder):
    """On one thread: two would wait for each other on a busy machine."""
    return open_session(folder, manifest.read(folder), threads=1)


class Counting:
    """A session that records its calls."""

    def __init__(self, session):
        self.session, self.fed, self.rewinds = session, [], []
        self.context_length = session.context_length

    def __getattr__(self, name):
        return getattr(self.session, name)

    @property
    def tokens(self):
        return self.session.tokens

    @tokens.setter
    def tokens(self, tokens):
        self.session.tokens = tokens

    def reset(self):
        self.session.reset()
        self.rewinds.append(0)

    def rewind(self, length):
        self.session.rewind(length)
        self.rewinds.append(length)

    def feed(self, tokens):
        self.fed.append(list(tokens))
        return self.session.feed(tokens)


def ask(conversation, message, stopped=lambda: False):
    shown = []
    answer = conversation.ask(message, shown.append, stopped)
    assert "".join(shown) == answer.text
    return answer
