"""A child that ends when its parent is gone, however it went: nobody waits for what it computes."""

import os
import threading
import time

LOOK_EVERY_S = 0.5


def end_with_parent() -> None:
    """From now on, look; runtimes let other threads run while they compute."""
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def watch(parent: int) -> None:
    """End this process at once when it has another parent."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os._exit(1)
