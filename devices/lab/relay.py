"""TCP from a listening socket to a port of this network namespace. Knows nothing of what passes.

A socket belongs to the network namespace it was made in: a listener made outside is served from inside.
"""

import contextlib
import socket
import threading


def serve(listener: socket.socket, port: int) -> None:
    """Forward every connection, for ever."""
    while True:
        outer, _ = listener.accept()
        threading.Thread(target=forward, args=(outer, port), daemon=True).start()


def forward(outer: socket.socket, port: int) -> None:
    """Copy both ways until both sides ended; a side that cannot be reached ends the other."""
    with outer:
        try:
            inner = socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:  # nobody listens or the link is down: the client sees its connection end
            return
        inner.settimeout(None)
        with inner:
            back = threading.Thread(target=copy, args=(inner, outer), daemon=True)
            back.start()
            copy(outer, inner)
            back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Bytes until the end, which is passed on too."""
    with contextlib.suppress(OSError):  # reset by either side: the same as an end
        while data := source.recv(2**16):
            target.sendall(data)
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)
