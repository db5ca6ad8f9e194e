"""Errors that are shown to users as one sentence, without a traceback."""

import signal

RESUMES = "the same command resumes after the last completed round"


class InputError(ValueError):
    """Invalid input; the message says what was expected, what was given, and what exists. Exit code 2."""


class Stopped(RuntimeError):
    """A run ended for an external reason; its checkpoint is intact, and the same command resumes it. Exit code 1."""


class Diverged(RuntimeError):
    """Training gave NaN or infinite numbers: a failure of the run, not of its input. Exit code 1."""

    @classmethod
    def in_round(cls, round: int, what: str, remedy: str = "a smaller --method.lr") -> "Diverged":
        return cls(f"training diverged: in round {round} {what} is not finite; try {remedy}")


EXPECTED = InputError, Stopped, Diverged  # errors whose message is the one sentence that a user needs


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C's that asks the process to end; handlers of Ctrl-C handle it too."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


def code_of(error: BaseException) -> int:
    """The exit code of a command that raised this: 2 for bad input, 128 + the number of a signal, 1 otherwise."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
    return 2 if isinstance(error, InputError) else 1


def first_line(error: Exception) -> str:
    """The first line of a library's message, which may have many, or the name of the error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def sentence_of(error: BaseException, after_interrupt: str = RESUMES) -> str:
    """The message for a user; `after_interrupt` says what state Ctrl-C leaves."""
    if isinstance(error, EXPECTED):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return f"{str(error) or 'interrupted'}; {after_interrupt}"
    return f"{type(error).__name__}: {error}"


# What fields were called in earlier versions.
RENAMED = {"evaluate_every": "eval_every", "batch": "batch_size", "keep_moments": "persist_optimizer"}


def listing(names, limit: int = 12) -> str:
    """`a, b, c` of any names; the first `limit` of them, to keep a sentence readable."""
    names = [str(name) for name in names]
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shortened(text: str, limit: int = 120) -> str:
    """A text of at most about `limit` characters; a longer one loses its middle."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
