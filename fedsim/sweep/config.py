"""A sweep as a value: what is searched, how, and on which seeds; checked where it is made."""

from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf, ValidationError

from fedsim.config import Config, Out, read_yaml
from fedsim.errors import InputError, listing
from fedsim.fields import LOGGERS, Loggers, each_in, split
from fedsim.registry import CHECKED, first_error, reject_booleans_for_numbers
from fedsim.sweep.space import Space
from fedsim.sweep.study import OBJECTIVES, PRUNERS, SAMPLERS, Pruner, Rules, Sampler

PRUNED_BY = ("validation",), ("worst_tenth",)  # a cost only grows, so no trial can fall behind in it
MAY_CHANGE = ("trials", "report_seeds")  # between two commands of one sweep: they do not affect what is proposed


def _check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0:
        raise InputError(f"seeds must be distinct integers >= 0, got {listing(seeds)}")
    return seeds


def _check_objectives(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or len(set(names)) < len(names):
        given = listing(names) or "none"
        raise InputError(f"objective expects one or more of {listing(OBJECTIVES)}, each once, got {given}")
    return names


Seeds = Annotated[tuple[int, ...], BeforeValidator(split), AfterValidator(_check_seeds)]
Objectives = Annotated[
    tuple[str, ...], BeforeValidator(split), each_in("objective", OBJECTIVES), AfterValidator(_check_objectives)
]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Sweep(BaseModel):
    """A search over hyperparameters around a base config."""

    model_config = ConfigDict(CHECKED, frozen=True, validate_default=True)
    reject_booleans_for_numbers = reject_booleans_for_numbers

    config: InstanceOf[Config] = Field(description="base config of all trials; its seed is not used")
    search: Texts = Field((), description="parameters to search, such as method.lr or method.lr=1e-5:1e-2; see below")
    trials: int = Field(60, ge=1, description="number of trials")
    objective: Objectives = Field(("validation",), description=f"{listing(OBJECTIVES)}; several give a Pareto front")
    sampler: Sampler = Field(
        "tpe", description=f"Optuna's sampler: {listing(SAMPLERS)} (nsga2 is for several objectives)"
    )
    pruner: Pruner | None = Field(
        None,
        description=f"stops trials that fall behind: {listing(PRUNERS)} (default: asha; none with several objectives "
        "or a cost)",
    )
    grace: int = Field(5, ge=1, description="rounds before a trial may be stopped")
    reduction: int = Field(3, ge=2, description="asha continues one trial in this many at each rung")
    tuning_seeds: Seeds = Field((1000,), description="every trial is evaluated on all of these seeds")
    report_seeds: Seeds = Field((0, 1, 2), description="seeds of the final runs of the best and the base config")
    sweep_seed: int = Field(0, ge=0, description="seed of the sampler")
    at_once: int | None = Field(None, ge=1, description="concurrent trials (default: as many as fit)")
    retries: int = Field(2, ge=0, description="how often a trial is restarted after its process has died")
    loggers: Loggers = Field(("tensorboard",), description=",".join(LOGGERS))
    out: Annotated[Out, AfterValidator(lambda value: value and value.absolute())] = Field(
        None, description="folder of the sweep (default: sweeps/ and a name made from its settings)"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(first_error(error, "", type(self).model_fields)) from None

    @property
    def rules(self) -> Rules:
        pruner = self.pruner or ("asha" if self.objective in PRUNED_BY else "none")
        return Rules(self.objective, self.sampler, pruner, self.grace, self.reduction, self.sweep_seed)

    def plain(self) -> dict[str, Any]:
        """Everything that defines this sweep, as plain values; `read_sweep` takes them."""
        space = Space.parse(self.search, self.config)
        return {
            "config": {name: value for name, value in self.config.experiment().items() if name != "seed"},
            "search": space.plain(),
            "objective": list(self.objective),
            "sampler": self.sampler,
            "pruner": self.rules.pruner,
            "grace": self.grace,
            "reduction": self.reduction,
            "tuning_seeds": list(self.tuning_seeds),
            "sweep_seed": self.sweep_seed,
            "trials": self.trials,
            "report_seeds": list(self.report_seeds),
        }

    def folder(self) -> Path:
        """`out`, or a folder named after everything that affects what is proposed, so not the number of trials."""
        if self.out is not None:
            return self.out
        settings = {name: value for name, value in self.plain().items() if name not in MAY_CHANGE}
        digest = blake2b(yaml.safe_dump(settings).encode(), digest_size=4).hexdigest()
        # The folder name of a run of the base config, with the sweep's digest in place of the run's.
        name = self.config.model_copy(update={"out": None}).folder().name.rpartition("-")[0]
        return Path("sweeps") / f"{name}-{digest}"


# `out` is a field of both: in a file of a run's config it is the run's.
SWEEP_FIELDS = [name for name in Sweep.model_fields if name not in ("config", "out")]


def read_sweep(file: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads a YAML file of a sweep, such as those in `tune/` and the sweep.yaml of every sweep, or of a run's config.

    Returns:
        The fields of Sweep but `config`, and those of the base config; None where the file has none.

    Raises:
        InputError: the file is missing, is not YAML, or has fields that neither has.
    """
    fields = read_yaml(file)
    if not fields.keys() & {"config", *SWEEP_FIELDS}:
        return {}, fields
    if unknown := sorted(fields.keys() - {"config", "out", *SWEEP_FIELDS}):
        raise InputError(
            f"{file} describes a sweep, which has no field {unknown[0]!r}; available: config, "
            f"{listing(SWEEP_FIELDS, 20)}, out; fields of a run go below config"
        )
    config = fields.pop("config", None)
    if not isinstance(config, dict | None):
        raise InputError(f"{file}: config expects a mapping of fields to values, got {config!r}")
    return fields, config
