"""SIGTERM (SLURM, Docker, `timeout`) and SIGHUP (a terminal that closes) end a command as Ctrl-C does."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread

from fedsim.errors import Interrupted

ENDS = signal.SIGTERM, signal.SIGHUP
_received: list[int] = []  # those that have been raised for


@contextmanager
def heard() -> Iterator[None]:
    """Raises Interrupted for ENDS for as long as it lasts, except for those that are ignored or already handled."""
    before = _handlers() if current_thread() is main_thread() else {}
    defaults = [number for number in before if before[number] is signal.SIG_DFL and number in ENDS]
    for number in defaults:
        signal.signal(number, _raise)
        _received.clear()
    try:
        yield
    except KeyboardInterrupt as error:  # `ray.get` and `ray.wait` make this of whatever a handler raises
        raise Interrupted(_received[-1]) if _received else error from None
    finally:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def kept() -> Iterator[None]:
    """Restores at its end the handlers that `ray.init` replaces: Ray's print a C++ stack and abort."""
    before = _handlers() if current_thread() is main_thread() else {}
    try:
        yield
    except SystemExit as error:  # raised by the handler that Ray sets first
        _received.append(signal.SIGTERM)
        raise Interrupted(signal.SIGTERM) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handlers() -> dict[int, object]:
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDS)}
    return {number: handler for number, handler in found.items() if handler is not None}  # None: set by C code


def _raise(number: int, frame: object) -> None:
    for end in ENDS:  # `timeout` sends two of them, and the second would interrupt the cleaning up
        signal.signal(end, signal.SIG_IGN)
    _received.append(number)
    raise Interrupted(number)
