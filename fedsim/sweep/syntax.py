"""The texts of `--search`: what may be named, and how ranges are written (`1e-5:1e-2:log`, `16,32,64`)."""

from typing import Any, Literal, get_args, get_origin

from fedsim.config import EXECUTION, Config
from fedsim.errors import InputError, listing
from fedsim.registry import available, find
from fedsim.search_space import Choice, Span

# Fields of Config that cannot be searched, by the reason.
SEEDS = ("seed", "partition_seed")
EVALUATION = ("eval_clients", "eval_every", "neighbors", "tune_epochs", "tasks")
SAME_RESULT = (*EXECUTION, "chunk", "engine", "threads_per_actor")
BACKBONE = ("backbone", "pretrained", "precision")
DATA = ("dataset", "data_dir", "skip_unreadable", *BACKBONE, "prompt", "held_out", "augment")


def check_searchable(field: str) -> None:
    """Raises InputError for anything but a field of Config that changes the result and may differ between trials."""
    if field in SEEDS:
        raise InputError(f"{field} cannot be searched: --tuning-seeds are a sweep's seeds, and its partition is fixed")
    if field in SAME_RESULT:
        raise InputError(f"{field} cannot be searched: it does not change the result")
    if field in EVALUATION:
        raise InputError(f"{field} cannot be searched: it changes how trials are evaluated, and the luckiest would win")
    if field in DATA:
        raise InputError(f"{field} cannot be searched: all trials of a sweep use the same data")
    if field not in Config.model_fields:
        fixed = SEEDS + SAME_RESULT + EVALUATION + DATA
        names = [name for name in Config.model_fields if name not in fixed]
        raise InputError(f"no field {field!r} to search; available: {listing(names, 40)}")


def parse_candidates(text: str) -> tuple[str, tuple[str, ...]]:
    """`method=fedclip,probe` as a kind and the names of its candidates."""
    kind, equals, values = (part.strip() for part in text.partition("="))
    names = tuple(name.strip().replace("-", "_") for name in values.split(","))
    try:
        if not equals:
            raise InputError(
                f"{kind} needs names to choose from, {kind}=A,B; available: {listing(available(kind), 40)}"
            )
        for name in names:
            find(kind, name)
        Choice(names)
    except InputError as error:
        raise InputError(f"--search {text}: {error}") from None
    return kind, names


def parse_range(annotation: Any, declared: Span | Choice | None, text: str) -> Span | Choice:
    """The range that `text` describes; not yet checked against the field's limits.

    Args:
        annotation: type of the field; only numbers have LOW:HIGH.
        declared: the field's own range, whose scale is the default.
    """
    if ":" not in text or not {int, float} & set(get_args(annotation) or (annotation,)):
        values = tuple(value.strip() for value in text.split(","))
        return Choice(tuple(None if value.lower() in ("none", "null") else value for value in values))
    low, high, *scale = text.split(":")
    if len(scale) > 1 or scale not in ([], ["log"], ["linear"]):
        raise InputError(f"a range is LOW:HIGH, LOW:HIGH:log or LOW:HIGH:linear, got {text}")
    try:
        ends = float(low), float(high)
    except ValueError:
        raise InputError(f"the ends of a range must be numbers, got {text}") from None
    return Span(*ends, log=scale == ["log"] if scale else isinstance(declared, Span) and declared.log)


def all_values(annotation: Any) -> Choice | None:
    """Every value of a field that has between two and a few, such as a bool."""
    values = (False, True) if annotation is bool else get_args(annotation) if get_origin(annotation) is Literal else ()
    return Choice(values) if len(values) > 1 else None


def with_values(range: Span | Choice, values: tuple[Any, ...]) -> Span | Choice:
    """The same range with these values as its ends or choices."""
    return Span(*values, log=range.log) if isinstance(range, Span) else Choice(values)
