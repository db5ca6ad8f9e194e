"""What a sweep searches: read from how it is written, and checked before anything starts.

    method.lr                 the range that the chosen method declares for it (`fedsim run --help` shows them)
    method.*                  all that it declares; what is also named by itself is searched as it is named
    method.lr=1e-5:1e-2       a range of one's own; by logarithm if the declared one is, or as :log and :linear say
    method.batch=16,32,64     values of one's own
    method.objective          all values of a field that has only a few
    method=fedclip,probe      components to choose from; method.lr is then fedclip.lr or probe.lr, as is chosen
    fedclip.lr=1e-5:1e-3      of one of these alone
    cohort=10:100             a field of Config itself

What counts only beside another value of its component, as sgd's momentum does, is searched only beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import optuna

from fedsim.config import EXECUTION, Config
from fedsim.errors import InputError, listing
from fedsim.registry import KINDS, available, changed, find, name_of, parse
from fedsim.search import Choice, Plain, Span, search_of

# What changes the problem (partition, clients, cohort) is searched only when it is named.
DEFAULT = ("method.*", "server.*")
SEEDS = ("seed", "partition_seed")
JUDGING = ("eval_clients", "evaluate_every")
SAME = ("chunk", "threads_per_actor")
DATA = ("dataset", "data_dir", "skip_unreadable", "backbone", "pretrained", "prompt", "held_out", "augment")


@dataclass(frozen=True)
class Dimension:
    """One parameter of the search.

    Attributes:
        name: what Optuna calls it: "method", "fedclip.lr", "cohort".
        path: where its value goes in the fields of a config: ("method", "name"), ("method", "lr"), ("cohort",).
        only: names of other parameters, and the values of each beside which this one counts.
    """

    name: str
    path: tuple[str, ...]
    over: Span | Choice
    only: tuple[tuple[str, tuple[Plain, ...]], ...] = ()

    def counts(self, params: Mapping[str, Plain]) -> bool:
        """Whether it is searched beside these values of parameters that stand before it."""
        return all(name in params and params[name] in values for name, values in self.only)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Plain:
        if isinstance(self.over, Choice):
            return trial.suggest_categorical(self.name, self.over.values)
        draw = trial.suggest_int if isinstance(self.over.low, int) else trial.suggest_float
        return draw(self.name, self.over.low, self.over.high, log=self.over.log)


@dataclass(frozen=True)
class Space:
    """All parameters of a search, each behind those that it depends on; the same whatever the order of writing."""

    dimensions: tuple[Dimension, ...]

    @classmethod
    def parse(cls, texts: Sequence[str], config: Config) -> "Space":
        """The space that is written so, around a base config; of no texts, `DEFAULT`.

        Raises:
            InputError: there is no such component or field; a range is empty or leaves the field's limits; a parameter
                is named twice, or counts nowhere; a candidate of `server` cannot be used with one of `method`; a
                cohort would be larger than the number of clients; nothing is left to search.
        """
        texts = tuple(texts) or DEFAULT
        chosen = [_chosen(text) for text in texts if text.partition("=")[0].strip() in KINDS]
        base = _Base.of(config, chosen)
        found: dict[str, _Found] = {}
        for text in texts:
            try:
                for one in base.read(text):
                    there = found.get(one.name)
                    if there and not (one.star or there.star):
                        raise InputError(f"{one.name} is said twice")
                    if there is None or there.star:
                        found[one.name] = one
            except InputError as error:
                raise InputError(f"--search {text}: {error}") from None
        space = cls(tuple(sorted(base.counting(found), key=lambda one: (len(one.only), one.name))))
        if not space.dimensions:
            raise InputError(f"--search {' '.join(texts)}: nothing to search; {base.declared(_owners(base))}")
        base.check(space.dimensions)
        return space

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """What a trial lays over the base config, as fields for `fedsim.config.merged`; asks for what counts alone."""
        params: dict[str, Plain] = {}
        fields: dict[str, Any] = {}
        for one in self.dimensions:
            if one.counts(params):
                params[one.name] = one.suggest(trial)
                head, *field = one.path
                if field:
                    fields.setdefault(head, {})[field[0]] = params[one.name]
                else:
                    fields[head] = params[one.name]
        return fields

    def plain(self) -> list[str]:
        """The space as texts that `parse` reads; equal for equal spaces."""
        return [f"{one.name}={one.over}" for one in self.dimensions]

    def changes(self, before: Sequence[str]) -> list[str]:
        """A sentence for each parameter that is not searched as in another space, given as that one's `plain`."""
        old, now = (dict(text.split("=", 1) for text in texts) for texts in (before, self.plain()))
        return [
            f"{name} was searched over {old[name]}, and now is not"
            if name not in now
            else f"{name} was not searched, and now is, over {now[name]}"
            if name not in old
            else f"{name} was searched over {old[name]}, and now is over {now[name]}"
            for name in sorted(old | now)
            if old.get(name) != now.get(name)
        ]

    def defaults(self, config: Config) -> dict[str, Plain] | None:
        """The base config as Optuna's parameters, or None where one of its values lies outside the space."""
        params: dict[str, Plain] = {}
        for one in self.dimensions:
            if one.counts(params):
                head, *field = one.path
                value = getattr(config, head)
                if field:
                    value = name_of(value) if field == ["name"] else getattr(value, field[0])
                if value not in one.over:
                    return None
                params[one.name] = value
        return params


@dataclass(frozen=True)
class _Found:
    """A parameter as some text asks for it, and whether that text asks for all (`*`)."""

    text: str
    star: bool
    kind: str  # "" for Config itself
    component: str
    field: str
    over: Span | Choice

    @property
    def name(self) -> str:
        if self.field == "name":
            return self.kind
        return f"{self.component}.{self.field}" if self.kind else self.field


@dataclass(frozen=True)
class _Base:
    """What is searched around, and the components that there are to choose from, by kind."""

    config: Config
    candidates: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, config: Config, chosen: list[tuple[str, tuple[str, ...]]]) -> "_Base":
        return cls(config, {kind: (name_of(getattr(config, kind)),) for kind in KINDS} | dict(chosen))

    def read(self, text: str) -> Iterator[_Found]:
        """The parameters that one text asks for."""
        name, equals, said = (part.strip() for part in text.partition("="))
        head, _, field = name.replace("-", "_").partition(".")
        if head in KINDS and not field:
            yield _Found(text, False, head, "", "name", Choice(self.candidates[head]))
            return
        owners = self.owners(head, field)
        if field == "*":
            if equals:
                raise InputError("* stands for declared ranges, and takes none")
            for kind, component in owners:
                for each in self.cls(kind, component).__pydantic_fields__:
                    if search_of(self.cls(kind, component), each):
                        yield self.found(text, True, kind, component, each, None)
            return
        field = field or head
        having = [owner for owner in owners if field in self.cls(*owner).__pydantic_fields__]
        if not having:
            raise InputError(f"no field {field!r} in {listing(c for _, c in owners)}; {self.declared(owners)}")
        there = [self.found(text, False, *owner, field, said if equals else None) for owner in having]
        if not any(there):
            whose = listing(component for _, component in having if component)
            raise InputError(
                f"{field}{whose and ' of '}{whose} declares no range; say {name}=LOW:HIGH, or values separated by "
                f"commas; {self.declared(owners)}"
            )
        yield from filter(None, there)

    def owners(self, head: str, field: str) -> list[tuple[str, str]]:
        """Kind and name of the components, or of Config, that a name begins with."""
        if field and head in KINDS:
            return [(head, component) for component in self.candidates[head]]
        if field:
            owners = [(kind, head) for kind in KINDS if head in self.candidates[kind]]
            if not owners:
                there = ", ".join(f"{kind} ({listing(self.candidates[kind])})" for kind in KINDS)
                raise InputError(f"{head!r} is neither a kind of component nor one of those here: {there}")
            return owners
        if head in SEEDS:
            raise InputError(f"a sweep has tuning and reporting seeds of its own, and one partition; {head} is no knob")
        if head in (*EXECUTION, *SAME):
            raise InputError(f"{head} changes nothing of what comes out, so there is nothing to search")
        if head in JUDGING:
            raise InputError(f"{head} says how a trial is judged: the best would be the one that was judged with luck")
        if head in DATA:
            raise InputError(f"all trials of a sweep are on the same data, so {head} is no knob")
        if head not in Config.model_fields:
            none = SEEDS + EXECUTION + SAME + JUDGING + DATA
            there = [name for name in Config.model_fields if name not in none]
            raise InputError(f"no field {head!r} to search; there are: {listing(there, 40)}")
        return [("", "")]

    def found(self, text: str, star: bool, kind: str, component: str, field: str, said: str | None) -> _Found | None:
        """The range that is said, or else the declared one, or else all values, with the types of the field."""
        about = self.cls(kind, component).__pydantic_fields__[field]
        declared = search_of(self.cls(kind, component), field)
        over = (declared or _every(about.annotation)) if said is None else _own(about.annotation, declared, said)
        if over is None:
            return None
        try:
            values = tuple(self.value(kind, component, field, value) for value in over.extremes)
            if odd := [value for value in values if not isinstance(value, Plain)]:
                raise InputError(f"a value like {odd[0]!r} is neither a number nor a word, and cannot be searched")
            over = _like(over, values)
        except InputError as error:
            several = component and len(self.candidates[kind]) > 1
            raise InputError(f"{component}: {error}" if several else str(error)) from None
        return _Found(text, star, kind, component, field, over)

    def value(self, kind: str, component: str, field: str, value: Any) -> Any:
        """A value of a field as its class holds it."""
        if not kind:
            fields = {name: getattr(self.config, name) for name in Config.model_fields}
            return getattr(Config(**fields | {field: value}), field)
        return getattr(self.made(kind, component, {field: value}), field)

    def made(self, kind: str, component: str, fields: dict[str, Any]) -> Any:
        """A component with some fields; the others are the base config's where it has that component."""
        there = getattr(self.config, kind)
        if name_of(there) == component:
            return changed(kind, there, fields)
        return parse(kind, {"name": component} | fields)

    def cls(self, kind: str, component: str) -> type:
        if not kind:
            return Config
        there = getattr(self.config, kind)
        return type(there) if name_of(there) == component else find(kind, component)

    def counting(self, found: dict[str, _Found]) -> Iterator[Dimension]:
        """The parameters that count beside the base config, or beside some value of what else is searched.

        Raises:
            InputError: what is named counts nowhere.
        """
        idle: dict[str, str] = {}  # by text, why what it names does not count
        busy = set()
        for one in found.values():
            declared = search_of(self.cls(one.kind, one.component), one.field) if one.field != "name" else None
            only = [(one.kind, (one.component,))] if one.kind in found and one.field != "name" else []
            if declared and declared.when:
                other, *values = declared.when
                governing = found.get(f"{one.component}.{other}")
                value = getattr(self.made(one.kind, one.component, {}), other)
                beside = tuple(v for v in (governing.over.values if governing else (value,)) if v in values)
                if not beside:
                    wanted = " or ".join(repr(v) for v in values)
                    idle.setdefault(
                        one.text, f"{one.name} counts only where {one.component}.{other} is {wanted}, not {value!r}"
                    )
                    continue
                only += [(governing.name, beside)] if governing else []
            busy.add(one.text)
            path = (one.kind, one.field) if one.kind else (one.field,)
            yield Dimension(one.name, path, one.over, tuple(only))
        for text, why in idle.items():
            if text not in busy and not text.partition("=")[0].strip().endswith("*"):
                raise InputError(f"--search {text}: {why}")

    def check(self, dimensions: tuple[Dimension, ...]) -> None:
        """Refuses what could not be run together.

        Raises:
            InputError: a server rule refuses a method; a cohort is larger than the number of clients.
        """
        for rule in self.candidates["server"]:
            for method in self.candidates["method"]:
                for name, server, trained in self.ends(dimensions, rule, method):
                    try:
                        server.fit(trained)
                    except InputError as error:
                        hint = f"--search: name the others, and leave {name} out: " if name else ""
                        raise InputError(f"{hint}{error}") from None
        most, fewest = self.end(dimensions, "cohort", max), self.end(dimensions, "clients", min)
        searched = {one.name for one in dimensions} & {"cohort", "clients"}
        if searched and most and fewest and most > fewest:
            raise InputError(f"--search {listing(sorted(searched))}: a cohort of {most} from {fewest} clients")

    def ends(self, dimensions: tuple[Dimension, ...], rule: str, method: str) -> Iterator[tuple[str, Any, Any]]:
        """A rule and a method as in the base config, and then with each of their parameters at its ends."""
        server, trained = self.made("server", rule, {}), self.made("method", method, {})
        yield "", server, trained
        for one in dimensions:
            kind, component = one.path[0], one.name.partition(".")[0]
            for value in one.over.extremes if (kind, component) in (("server", rule), ("method", method)) else ():
                changed = self.made(kind, component, {one.path[1]: value})
                yield one.name, *((changed, trained) if kind == "server" else (server, changed))

    def end(self, dimensions: tuple[Dimension, ...], field: str, pick) -> int | None:
        over = next((one.over.extremes for one in dimensions if one.path == (field,)), (getattr(self.config, field),))
        return pick((value for value in over if value is not None), default=None)

    def declared(self, owners: list[tuple[str, str]]) -> str:
        """Which fields of some components declare a range, as the end of a sentence."""
        there = [
            f"{component}.{field}" if kind else field
            for kind, component in owners
            for field in self.cls(kind, component).__pydantic_fields__
            if search_of(self.cls(kind, component), field)
        ]
        return f"ranges are declared by: {listing(there, 40) or 'none'}"


def _owners(base: _Base) -> list[tuple[str, str]]:
    return [(kind, component) for kind in KINDS for component in base.candidates[kind]] + [("", "")]


def _chosen(text: str) -> tuple[str, tuple[str, ...]]:
    """`method=fedclip,probe` as a kind and names of its components."""
    kind, equals, said = (part.strip() for part in text.partition("="))
    names = tuple(name.strip().replace("-", "_") for name in said.split(","))
    try:
        if not equals:
            raise InputError(f"{kind} wants names to choose from, after a =; there are: {listing(available(kind), 40)}")
        for name in names:
            find(kind, name)
        Choice(names)
    except InputError as error:
        raise InputError(f"--search {text}: {error}") from None
    return kind, names


def _every(annotation: Any) -> Choice | None:
    """All values of a field that has only a few, and more than one."""
    values = (False, True) if annotation is bool else get_args(annotation) if get_origin(annotation) is Literal else ()
    return Choice(values) if len(values) > 1 else None


def _own(annotation: Any, declared: Span | Choice | None, said: str) -> Span | Choice:
    """A range or values as they are said of a field, whose limits they are not checked by yet."""
    if ":" not in said or not {int, float} & set(get_args(annotation) or (annotation,)):
        values = tuple(value.strip() for value in said.split(","))
        return Choice(tuple(None if value.lower() in ("none", "null") else value for value in values))
    low, high, *scale = said.split(":")
    if len(scale) > 1 or scale not in ([], ["log"], ["linear"]):
        raise InputError(f"a range wants LOW:HIGH, LOW:HIGH:log or LOW:HIGH:linear, not {said}")
    try:
        ends = float(low), float(high)
    except ValueError:
        raise InputError(f"a range wants numbers, not {said}") from None
    return Span(*ends, log=scale == ["log"] if scale else isinstance(declared, Span) and declared.log)


def _like(over: Span | Choice, values: tuple[Plain, ...]) -> Span | Choice:
    """The same range of these values."""
    return Span(*values, log=over.log) if isinstance(over, Span) else Choice(values)
