"""Talking to an artifact as shipped, in a terminal or through a pipe: docs/chat.md."""
