"""What a user is told in one sentence, never in a traceback."""

import signal

RESUMES = "the same command goes on from the last round"


class InputError(ValueError):
    """What was handed over cannot be used: says what was wanted, what came, and what there is. Exit code 2."""


class Stopped(RuntimeError):
    """The run ended for a reason outside of it; its checkpoint is whole, and the same command goes on. Exit code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C's that asks the process to end; what cleans up after Ctrl-C then cleans up here."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


def code_of(error: BaseException) -> int:
    """The exit code of a command that ended so: 2 for bad input, 128 + the number of a signal, 1 for anything else."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
    return 2 if isinstance(error, InputError) else 1


def sentence_of(error: BaseException, after_interrupt: str = RESUMES) -> str:
    """The message for a user; `after_interrupt` says how things stand after Ctrl-C."""
    if isinstance(error, InputError | Stopped):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return f"{str(error) or 'interrupted'}; {after_interrupt}"
    return f"{type(error).__name__}: {error}"


# What fields were called in earlier versions.
RENAMED = {"evaluate_every": "eval_every", "batch": "batch_size", "keep_moments": "persist_optimizer"}


def listing(names, limit: int = 12) -> str:
    """`a, b, c` of any names, cut where a sentence would stop being one."""
    names = [str(name) for name in names]
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shortened(text: str, limit: int = 120) -> str:
    """A text without its middle, where a sentence would stop being one."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
