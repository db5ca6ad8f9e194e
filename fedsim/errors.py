"""What a user is told in one sentence, never in a traceback."""


class InputError(ValueError):
    """What was handed over cannot be used: says what was wanted, what came, and what there is. Exit code 2."""


class Stopped(RuntimeError):
    """The run ended for a reason outside of it; its checkpoint is whole, and the same command goes on. Exit code 1."""


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
