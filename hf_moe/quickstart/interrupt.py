"""A Ctrl-C that cannot get lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


__all__ = ["Interrupts", "noticing_interrupts"]


class Interrupts:
    """Whether Ctrl-C was pressed.

    Python raises `KeyboardInterrupt` wherever the program happens to be. In a finaliser, which a long garbage
    collection makes likely, the exception is only printed and the program goes on. Long work therefore asks `check`
    now and then.
    """

    def __init__(self):
        self.pending = False

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if Ctrl-C was pressed and yet the program still runs."""
        if self.pending:
            raise KeyboardInterrupt


@contextmanager
def noticing_interrupts() -> Iterator[Interrupts]:
    """While open, Ctrl-C is remembered besides being raised as usual. In other than the main thread nothing changes.

    Yields:
        [`Interrupts`]

    Example:
        ```python
        with noticing_interrupts() as interrupts:
            for batch in batches:
                train(batch)
                interrupts.check()
        ```
    """
    interrupts = Interrupts()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield interrupts
        return

    def remember(signum, frame):
        interrupts.pending = True
        previous(signum, frame)

    signal.signal(signal.SIGINT, remember)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)
