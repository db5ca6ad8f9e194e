"""SIGTERM (SLURM, Docker, `timeout`) and SIGHUP (a terminal that closes) end a command as Ctrl-C does."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

from fedsim.errors import Interrupted

ENDS = signal.SIGTERM, signal.SIGHUP
_received: list[int] = []  # signals that Interrupted was raised for


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raises Interrupted for a signal of ENDS within the context, unless it is ignored or already handled."""
    before = _handlers() if current_thread() is main_thread() else {}
    defaults = [number for number in ENDS if before.get(number) is signal.SIG_DFL]
    for number in defaults:
        signal.signal(number, _raise)
        _received.clear()
    try:
        yield
    except KeyboardInterrupt as error:  # `ray.get` and `ray.wait` turn what a handler raises into this
        raise Interrupted(_received[-1]) if _received else error from None
    finally:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Restores at the end the handlers that `ray.init` replaces: Ray's print a C++ stack and abort."""
    before = _handlers() if current_thread() is main_thread() else {}
    try:
        yield
    except SystemExit as error:  # raised by the handler that Ray sets first
        _received.append(signal.SIGTERM)
        raise Interrupted(signal.SIGTERM) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDS)}
    return {number: handler for number, handler in handlers.items() if handler is not None}  # None: set by C code


def _raise(number: int, frame: object) -> None:
    for end in ENDS:  # `timeout` sends two of them, and the second would interrupt the cleaning up
        signal.signal(end, signal.SIG_IGN)
    _received.append(number)
    raise Interrupted(number)
