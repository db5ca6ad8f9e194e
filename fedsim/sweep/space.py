"""The search space: parsed from `--search`, and checked before anything starts.

    method.lr                 over the range that the chosen method declares for it (`fedsim help NAME` shows it)
    method.*                  all ranges that it declares; a parameter that is also named itself is searched as named
    method.lr=1e-5:1e-2       over a custom range; log-uniform if the declared range is, or with :log or :linear
    method.batch_size=16,32,64     over custom values
    method.objective          over all values of a field that has only a few
    method=fedclip,probe      over components; method.lr then stands for fedclip.lr and probe.lr
    fedclip.lr=1e-5:1e-3      a parameter of one of them
    cohort=10:100             a field of Config itself

A parameter that has an effect only with certain values of another, such as sgd's momentum, is searched only with those.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from fedsim.config import Config
from fedsim.errors import InputError, listing
from fedsim.registry import KINDS, find, name_of, parse, replaced
from fedsim.search_space import Choice, Plain, Span, search_of
from fedsim.sweep.syntax import all_values, check_searchable, parse_candidates, parse_range, with_values

# What changes the problem (partition, clients, cohort) is searched only when it is named.
DEFAULT = ("method.*", "server.*")


@dataclass(frozen=True)
class Dimension:
    """One parameter of the space.

    Attributes:
        name: its name in Optuna: "method", "fedclip.lr", "cohort".
        path: where its value goes in the fields of a config: ("method", "name"), ("method", "lr"), ("cohort",).
        conditions: names of other parameters, with the values for which this one is searched.
    """

    name: str
    path: tuple[str, ...]
    range: Span | Choice
    conditions: tuple[tuple[str, tuple[Plain, ...]], ...] = ()

    def is_active(self, params: Mapping[str, Plain]) -> bool:
        """Whether it is searched, given the values of the parameters before it."""
        return all(name in params and params[name] in values for name, values in self.conditions)

    def suggest(self, trial: optuna.trial.BaseTrial) -> Plain:
        if isinstance(self.range, Choice):
            return trial.suggest_categorical(self.name, self.range.values)
        draw: Any = trial.suggest_int if isinstance(self.range.low, int) else trial.suggest_float
        return draw(self.name, self.range.low, self.range.high, log=self.range.log)


@dataclass(frozen=True)
class Space:
    """All parameters of a search, each after those that it depends on; does not depend on the order of writing."""

    dimensions: tuple[Dimension, ...]

    @classmethod
    def parse(cls, texts: Sequence[str], config: Config) -> "Space":
        """The space that the texts of `--search` describe around a base config; `DEFAULT` when there are none.

        Raises:
            InputError: a component or field does not exist; a range is empty or leaves the field's limits; a parameter
                is named twice, or never has an effect; a candidate of `server` cannot be used with one of `method`; a
                cohort would be larger than the number of clients; there is nothing to search.
        """
        texts = tuple(texts) or DEFAULT
        candidates = [parse_candidates(text) for text in texts if text.partition("=")[0].strip() in KINDS]
        base = _Base.of(config, candidates)
        parameters: dict[str, _Parameter] = {}
        for text in texts:
            try:
                for parameter in base.parameters(text):
                    earlier = parameters.get(parameter.name)
                    if earlier and not (parameter.wildcard or earlier.wildcard):
                        raise InputError(f"{parameter.name} is given twice")
                    if earlier is None or earlier.wildcard:
                        parameters[parameter.name] = parameter
            except InputError as error:
                raise InputError(f"--search {text}: {error}") from None
        space = cls(tuple(sorted(base.dimensions(parameters), key=lambda each: (len(each.conditions), each.name))))
        if not space.dimensions:
            raise InputError(f"--search {' '.join(texts)}: nothing to search; {base.declared(base.all_owners())}")
        base.check(space)
        return space

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Draws the active parameters of a trial; returns them as fields to merge into the base config."""
        params: dict[str, Plain] = {}
        fields: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.is_active(params):
                params[dimension.name] = dimension.suggest(trial)
                head, *field = dimension.path
                if field:
                    fields.setdefault(head, {})[field[0]] = params[dimension.name]
                else:
                    fields[head] = params[dimension.name]
        return fields

    def range_of(self, *path: str) -> Span | Choice | None:
        """The range of the parameter with this path, None when it is not searched."""
        return next((dimension.range for dimension in self.dimensions if dimension.path == path), None)

    def plain(self) -> list[str]:
        """The space as texts that `parse` takes; equal for equal spaces."""
        return [f"{dimension.name}={dimension.range}" for dimension in self.dimensions]

    def changes(self, before: Sequence[str]) -> list[str]:
        """One sentence for each parameter that another space, given as its `plain`, searches differently."""
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
        """The base config as parameters of Optuna; None when one of its values is outside the space."""
        params: dict[str, Plain] = {}
        for dimension in self.dimensions:
            if dimension.is_active(params):
                head, *field = dimension.path
                value = getattr(config, head)
                if field:
                    value = name_of(value) if field == ["name"] else getattr(value, field[0])
                if value not in dimension.range:
                    return None
                params[dimension.name] = value
        return params


@dataclass(frozen=True)
class _Parameter:
    """A parameter as one text of `--search` names it, or includes it by `*` (`wildcard`)."""

    text: str
    wildcard: bool
    kind: str  # "" for Config itself
    component: str
    field: str
    range: Span | Choice

    @property
    def name(self) -> str:
        if self.field == "name":
            return self.kind
        return f"{self.component}.{self.field}" if self.kind else self.field


@dataclass(frozen=True)
class _Base:
    """The base config, and the candidate components by kind."""

    config: Config
    candidates: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, config: Config, candidates: list[tuple[str, tuple[str, ...]]]) -> "_Base":
        return cls(config, {kind: (name_of(getattr(config, kind)),) for kind in KINDS} | dict(candidates))

    def parameters(self, text: str) -> Iterator[_Parameter]:
        """The parameters that one text asks for."""
        name, equals, values = (part.strip() for part in text.partition("="))
        head, _, field = name.replace("-", "_").partition(".")
        if head in KINDS and not field:
            yield _Parameter(text, False, head, "", "name", Choice(self.candidates[head]))
            return
        owners = self.owners(head, field)
        if field == "*":
            if equals:
                raise InputError("* stands for declared ranges and takes no range")
            for kind, component in owners:
                cls = self.class_of(kind, component)
                for each in [each for each in cls.__pydantic_fields__ if search_of(cls, each)]:
                    if declared := self.range(kind, component, each, None):
                        yield _Parameter(text, True, kind, component, each, declared)
            return
        field = field or head
        having = [owner for owner in owners if field in self.class_of(*owner).__pydantic_fields__]
        if not having:
            names = listing(component for _, component in owners)
            raise InputError(f"no field {field!r} in {names}; {self.declared(owners)}")
        ranges = {owner: self.range(*owner, field, values if equals else None) for owner in having}
        if not any(ranges.values()):
            names = listing(component for _, component in having if component)
            raise InputError(
                f"{field}{names and ' of '}{names} declares no range; give {name}=LOW:HIGH, or values separated by "
                f"commas; {self.declared(owners)}"
            )
        for (kind, component), each in ranges.items():
            if each:
                yield _Parameter(text, False, kind, component, field, each)

    def owners(self, head: str, field: str) -> list[tuple[str, str]]:
        """Kind and name of the components, or ("", "") for Config, that the first part of a name stands for."""
        if field and head in KINDS:
            return [(head, component) for component in self.candidates[head]]
        if field:
            owners = [(kind, head) for kind in KINDS if head in self.candidates[kind]]
            if not owners:
                names = ", ".join(f"{kind} ({listing(self.candidates[kind])})" for kind in KINDS)
                raise InputError(f"{head!r} is neither a kind of component nor one of the chosen components: {names}")
            return owners
        check_searchable(head)
        return [("", "")]

    def all_owners(self) -> list[tuple[str, str]]:
        return [(kind, component) for kind in KINDS for component in self.candidates[kind]] + [("", "")]

    def range(self, kind: str, component: str, field: str, text: str | None) -> Span | Choice | None:
        """The range in `text`, or else the declared one, or else all values; with the types of the field."""
        annotation = self.class_of(kind, component).__pydantic_fields__[field].annotation
        declared = search_of(self.class_of(kind, component), field)
        range = (declared or all_values(annotation)) if text is None else parse_range(annotation, declared, text)
        if range is None:
            return None
        try:
            values = tuple(self.value(kind, component, field, value) for value in range.extremes)
            if odd := [value for value in values if not isinstance(value, Plain)]:
                raise InputError(f"only numbers and words can be searched, not {odd[0]!r}")
            return with_values(range, values)
        except InputError as error:
            several = component and len(self.candidates[kind]) > 1
            raise InputError(f"{component}: {error}" if several else str(error)) from None

    def value(self, kind: str, component: str, field: str, value: Any) -> Any:
        """A value of a field as its class stores it."""
        if not kind:
            fields = {name: getattr(self.config, name) for name in Config.model_fields}
            return getattr(Config(**fields | {field: value}), field)
        return getattr(self.make(kind, component, {field: value}), field)

    def make(self, kind: str, component: str, fields: dict[str, Any]) -> Any:
        """A component with some fields; the others are the base config's when it has that component."""
        current = getattr(self.config, kind)
        if name_of(current) == component:
            return replaced(kind, current, fields)
        return parse(kind, {"name": component} | fields)

    def class_of(self, kind: str, component: str) -> type:
        if not kind:
            return Config
        current = getattr(self.config, kind)
        return type(current) if name_of(current) == component else find(kind, component)

    def dimensions(self, parameters: dict[str, _Parameter]) -> Iterator[Dimension]:
        """The parameters that have an effect, with the conditions under which they have it.

        Raises:
            InputError: a parameter that is named, not included by `*`, has no effect.
        """
        without_effect: dict[str, str] = {}  # by text
        effective = set()
        epochs_of_devices = all(self.make("fleet", name, {}).epochs for name in self.candidates["fleet"])
        for parameter in parameters.values():
            kind, component, field = parameter.kind, parameter.component, parameter.field
            if (kind, field) == ("method", "local_epochs") and epochs_of_devices:
                sentence = f"{parameter.name} has no effect with fleet.epochs, which gives each device its local epochs"
                without_effect.setdefault(parameter.text, sentence)
                continue
            declared = search_of(self.class_of(kind, component), field) if field != "name" else None
            conditions = [(kind, (component,))] if kind in parameters and field != "name" else []
            if declared and declared.when:
                other, *values = declared.when
                governing = parameters.get(f"{component}.{other}")
                value = getattr(self.make(kind, component, {}), str(other))
                possible = governing.range.extremes if governing else (value,)
                matching = tuple(each for each in possible if each in values)
                if not matching:
                    expected = " or ".join(map(repr, values))
                    sentence = (
                        f"{parameter.name} has an effect only when {component}.{other} is {expected}, not {value!r}"
                    )
                    without_effect.setdefault(parameter.text, sentence)
                    continue
                conditions += [(governing.name, matching)] if governing else []
            effective.add(parameter.text)
            path = (kind, field) if kind else (field,)
            yield Dimension(parameter.name, path, parameter.range, tuple(conditions))
        for text, sentence in without_effect.items():
            if text not in effective and not text.partition("=")[0].strip().endswith("*"):
                raise InputError(f"--search {text}: {sentence}")

    def check(self, space: Space) -> None:
        """Refuses combinations that cannot run.

        Raises:
            InputError: a server rule refuses a method; a cohort is larger than the number of clients.
        """
        for rule in self.candidates["server"]:
            for method in self.candidates["method"]:
                for name, server, trained in self.extreme_pairs(space, rule, method):
                    try:
                        server.adapt(trained)
                    except InputError as error:
                        hint = f"--search: name the others, and leave {name} out: " if name else ""
                        raise InputError(f"{hint}{error}") from None
        largest, fewest = self.extreme(space, "cohort", max), self.extreme(space, "clients", min)
        searched = {dimension.name for dimension in space.dimensions} & {"cohort", "clients"}
        if searched and largest and fewest and largest > fewest:
            raise InputError(f"--search {listing(sorted(searched))}: a cohort of {largest} from {fewest} clients")

    def extreme_pairs(self, space: Space, rule: str, method: str) -> Iterator[tuple[str, Any, Any]]:
        """A rule and a method as in the base config, then with each of their parameters at the ends of its range."""
        server, trained = self.make("server", rule, {}), self.make("method", method, {})
        yield "", server, trained
        for dimension in space.dimensions:
            kind, component = dimension.path[0], dimension.name.partition(".")[0]
            if (kind, component) in (("server", rule), ("method", method)):
                for value in dimension.range.extremes:
                    extreme = self.make(kind, component, {dimension.path[1]: value})
                    yield dimension.name, *((extreme, trained) if kind == "server" else (server, extreme))

    def extreme(self, space: Space, field: str, pick) -> int | None:
        searched = space.range_of(field)
        values = searched.extremes if searched else (getattr(self.config, field),)
        return pick((value for value in values if value is not None), default=None)

    def declared(self, owners: list[tuple[str, str]]) -> str:
        """Which fields of some components declare a range, as the end of a sentence."""
        names = [
            f"{component}.{field}" if kind else field
            for kind, component in owners
            for field in self.class_of(kind, component).__pydantic_fields__
            if search_of(self.class_of(kind, component), field)
        ]
        return f"fields with a declared range: {listing(names, 40) or 'none'}"
