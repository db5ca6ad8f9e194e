"""Standard output and error that may be closed, or on a full disk: a failed print does not end a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any, TextIO


class SafeStream:
    """A text stream that records its first error and drops all text after it.

    Attributes:
        fault: the first error; None if there was none.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or StringIO()  # None: the shell has closed it, by `>&-`
        self.fault: OSError | None = None

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _try(self, action: Any, *args: str) -> None:
        try:
            action(*args)
        except OSError as error:
            self.fault = self.fault or error
            # The rest of the buffer goes there too, or Python would fail again when it exits.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


@contextmanager
def safe_streams() -> Iterator[tuple[SafeStream, SafeStream]]:
    """Replaces standard output and error by `SafeStream`s within the context."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = made = SafeStream(sys.stdout), SafeStream(sys.stderr)
    try:
        yield made
    finally:
        for stream in made:
            stream.flush()
        sys.stdout, sys.stderr = before
