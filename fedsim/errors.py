"""What a user handed over cannot be used: one sentence, exit code 2, never a traceback."""


class InputError(ValueError):
    """Says what was wanted, what came, and what there is."""


def listing(names, limit: int = 12) -> str:
    """`a, b, c` of any names, cut where a sentence would stop being one."""
    names = [str(name) for name in names]
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
