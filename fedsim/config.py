"""The experiment as a value: checked where it is made, in Python, in YAML and on the command line alike.

pydantic checks types and ranges, of the components' hyperparameters too, so that there is one sentence for one
mistake wherever it is made.
"""

import os
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    InstanceOf,
    PlainSerializer,
    ValidationError,
)

from fedsim.datasets import Dataset
from fedsim.errors import InputError, listing
from fedsim.fleets import Fleet
from fedsim.methods import Method
from fedsim.partitions import Dealing
from fedsim.registry import KINDS, changed, name_of, parse, sentence
from fedsim.search import Field, Log
from fedsim.servers import Server

EXPERIMENTS = Path(__file__).parent / "experiments"
# What may differ between two runs of one experiment: where, and with how many hands.
DEFAULTS = {"dataset": "glyphs", "partition": "by_domain", "method": "fedclip", "server": "fedavg", "fleet": "ideal"}
EXECUTION = ("out", "actors", "gpus_per_actor", "gpu_gb_per_actor", "call_timeout_s", "address", "cache_dir")


def fields_of(thing: Any) -> dict[str, Any]:
    """A component as it is written in YAML."""
    return {"name": name_of(thing)} | {name: getattr(thing, name) for name in thing.__pydantic_fields__}


def _cache() -> Path:
    named = os.environ.get("FEDSIM_CACHE_DIR")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedsim"


def _component(kind: str, base: type) -> Any:
    read = partial(parse, kind, default=DEFAULTS[kind])
    return Annotated[InstanceOf[base], BeforeValidator(read), PlainSerializer(fields_of)]


def _prompt(value: str) -> str:
    try:
        filled = value.format("name")
    except (LookupError, ValueError):
        filled = value
    if filled == value:
        raise InputError(f"prompt wants {{}} where the class name goes, and no other braces, not {value!r}")
    return value


def _absolute(value: Path | None) -> Path | None:
    return value and value.expanduser().absolute()


def _names(value: Any) -> Any:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


class Config(BaseModel):
    """One experiment. Every component is an object, its name, or `{"name": ..., field: value}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    dataset: _component("dataset", Dataset) = Field(
        DEFAULTS["dataset"], description="where images or features come from"
    )
    data_dir: Annotated[Path | None, AfterValidator(_absolute)] = Field(
        None, description="the data set's folder; glyphs needs none"
    )
    skip_unreadable: bool = Field(False, description="leave corrupt images out, and count them")
    backbone: str | None = Field(None, description="any open_clip model name; none given: tiny, the embedded one")
    pretrained: str | None = Field(None, description="tag of open_clip, or a checkpoint file")
    prompt: Annotated[str, AfterValidator(_prompt)] = Field(
        "a picture of a {}", description="text of a class; {} is its name"
    )
    held_out: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="domains that nobody trains on, separated by commas"
    )
    partition: _component("partition", Dealing) = Field(DEFAULTS["partition"], description="how rows go to clients")
    clients: int | None = Field(None, ge=1, description="number of clients; by_domain has one per domain")
    partition_seed: int = Field(0, ge=0, description="draws the partition and each client's splits")
    augment: int = Field(
        0, ge=0, description="augmented views kept of each image, of which a train row shows another each round"
    )
    train_share: float = Field(0.6, gt=0, lt=1, description="of a client's rows; half of the rest validates")
    shots: int | None = Field(None, ge=1, description="train rows of each class that a client keeps; none given: all")
    new_classes: float = Field(
        0.0, ge=0, lt=1, description="share of the classes, the last by name, that nobody trains on; 0.5 is base-to-new"
    )
    method: _component("method", Method) = Field(DEFAULTS["method"], description="what is trained")
    server: _component("server", Server) = Field(DEFAULTS["server"], description="how updates are combined")
    cohort: int | None = Field(
        None, ge=1, search=Log(2, 100), description="clients that train in a round; none given: all"
    )
    fleet: _component("fleet", Fleet) = Field(DEFAULTS["fleet"], description="devices of clients, in simulated time")
    deadline_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="simulated seconds that a client has to answer; who is late does not count",
    )
    over_selection: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="share of the cohort that is asked on top; a round closes when as many as the cohort have answered",
    )
    rounds: int = Field(200, ge=0, description="rounds of aggregation; FedCLIP's README runs 200")
    seed: int = Field(0, ge=0, description="draws everything but the partition")
    evaluate_every: int = Field(1, ge=1, description="rounds between evaluations; the last round is always judged")
    eval_clients: int | None = Field(
        None, ge=1, description="clients whose own rows are judged, drawn once; none given: all"
    )
    chunk: int | None = Field(
        None, ge=1, description="clients of one call; 1: one by one, unstacked; none given: a 16th of the cohort, or 64"
    )
    dtype: Literal["float32", "float64"] = Field("float32", description="of parameters and training")
    threads_per_actor: int = Field(1, ge=1, description="torch's; more than one round sums in another way")

    out: Annotated[Path | None, AfterValidator(lambda value: value and value.expanduser())] = Field(
        None, description="folder of the run; none given: runs/ and a name of its own"
    )
    actors: int | None = Field(None, ge=0, description="client actors; 0: in this process; none given: by the cluster")
    gpus_per_actor: float | None = Field(None, ge=0, le=1, description="share of a GPU; none given: by the cluster")
    gpu_gb_per_actor: float | None = Field(
        None, gt=0, description="memory of a GPU that an actor needs, to tell how many fit on one; none given: two do"
    )
    call_timeout_s: float | None = Field(
        None, gt=0, description="after which a chunk is given to another actor as well; none given: 20 of the longest"
    )
    address: str | None = Field(
        None, description="join this Ray cluster (host:port or auto); none given: a private one"
    )
    cache_dir: Path = Field(default_factory=_cache, description="folder of encoded features; or $FEDSIM_CACHE_DIR")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(sentence(error, "", type(self).model_fields)) from None

    def experiment(self) -> dict[str, Any]:
        """What decides the result, as plain values."""
        return {name: value for name, value in self.plain().items() if name not in EXECUTION}

    def plain(self) -> dict[str, Any]:
        """All fields as plain values, as in YAML."""
        return self.model_dump(mode="json")

    def folder(self) -> Path:
        """`out`, or a folder that this experiment has to itself."""
        if self.out is not None:
            return self.out
        digest = blake2b(yaml.safe_dump(self.experiment()).encode(), digest_size=4).hexdigest()
        parts = (
            name_of(self.dataset),
            "-".join(self.held_out),
            name_of(self.method),
            name_of(self.server),
            digest,
        )
        return Path("runs") / "-".join(filter(None, parts))


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The fields in a YAML file, or in one of the experiments that come with fedsim, by its name.

    Raises:
        InputError: there is no such file, or it is no YAML mapping.
    """
    path = Path(file)
    if not path.is_file():
        bundled = {path.stem: path for path in sorted(EXPERIMENTS.glob("*.yaml"))}
        if str(file) not in bundled:
            raise InputError(f"no config file {str(file)!r}; there are the embedded ones: {listing(bundled)}")
        path = bundled[str(file)]
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} wants a mapping of fields to values, not {type(fields).__name__}")
    return fields


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Fields of `below` overridden by those of `above`; a component that changes its name starts afresh."""
    result = dict(below)
    for name, value in above.items():
        if name in KINDS:
            there, new = result.get(name, {}), _as_fields(value)
            old = _as_fields(there)
            if new.get("name") not in (None, old.get("name", DEFAULTS[name])):
                value = new
            elif isinstance(there, str | dict):
                value = old | new
            else:  # an object, which need not be one that can be made from a name
                value = changed(name, there, {field: each for field, each in new.items() if field != "name"})
        result[name] = value
    return result


def _as_fields(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    return dict(value) if isinstance(value, dict) else fields_of(value)
