"""The experiment as a value, checked where it is made: in Python, in YAML and on the command line alike.

pydantic checks types and ranges, also those of the components' hyperparameters, so a mistake gets the same sentence
wherever it is made.
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

from fedsim.attacks import Attack
from fedsim.clip.precision import Precision
from fedsim.clip.texts import Prompt, checked_prompt
from fedsim.codecs import Codec
from fedsim.datasets import Dataset
from fedsim.errors import InputError, listing
from fedsim.fields import LOGGERS, AbsolutePath, Loggers, Names, absolute, expanded
from fedsim.fleets import Fleet
from fedsim.folder import safe_name
from fedsim.methods import Method
from fedsim.partitions import Partition
from fedsim.privacy import Privacy
from fedsim.registry import CHECKED, KINDS, first_error, name_of, parse, reject_booleans_for_numbers, replaced
from fedsim.search_space import Field, Log
from fedsim.servers import Server
from fedsim.yaml_files import read_mapping

EXPERIMENTS = Path(__file__).parent / "experiments"
DEFAULTS = {"dataset": "glyphs", "partition": "by_domain", "method": "fedclip", "server": "fedavg"}
DEFAULTS |= {"codec": "plain", "privacy": "none", "attack": "honest", "fleet": "ideal"}
# Fields that do not change the result: where an experiment runs, and with how many actors.
EXECUTION = (
    "out",
    "actors",
    "gpus_per_actor",
    "gpu_gb_per_actor",
    "call_timeout_s",
    "address",
    "cache_dir",
    "loggers",
    "page",
)


def fields_of(component: Any) -> dict[str, Any]:
    """A component as it is written in YAML."""
    return {"name": name_of(component)} | {name: getattr(component, name) for name in component.__pydantic_fields__}


def cache_dir() -> Path:
    if named := os.environ.get("FEDSIM_CACHE_DIR"):
        return Path(named)
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the XDG specification says that relative paths are ignored
        return shared / "fedsim"
    try:
        return Path.home() / ".cache" / "fedsim"
    except RuntimeError:  # a container's user id without a line in /etc/passwd
        raise InputError("this user has no home folder for encoded features; give --cache-dir DIR") from None


def _read(kind: str) -> BeforeValidator:
    return BeforeValidator(partial(parse, kind, default=DEFAULTS[kind]))


_Fields = PlainSerializer(fields_of)


def _not_empty(value: Any) -> Any:
    if value == "":  # pathlib takes it for the current folder; in a script it is a variable that is not set
        raise InputError("--out is empty; it expects a folder")
    return value


Out = Annotated[Path | None, BeforeValidator(_not_empty), AfterValidator(expanded)]


class Config(BaseModel):
    """One experiment. Each component is given as an object, as its name, or as `{"name": ..., field: value}`."""

    model_config = ConfigDict(CHECKED, frozen=True, validate_default=True)
    reject_booleans_for_numbers = reject_booleans_for_numbers

    dataset: Annotated[InstanceOf[Dataset], _read("dataset"), _Fields] = Field(
        DEFAULTS["dataset"], description="images or features"
    )
    data_dir: AbsolutePath = Field(None, description="folder of the data set; glyphs needs none")
    skip_unreadable: bool = Field(False, description="leave out corrupt images and count them")
    backbone: str | None = Field(None, description="open_clip name, hf-hub:ID, local-dir:DIR (default: tiny)")
    pretrained: str | None = Field(None, description="open_clip tag, or path of a checkpoint file")
    # bf16 and fp16 are torch.autocast's. What is trained, its gradients, its optimizer and the loss stay float32.
    precision: Precision = Field("fp32", description="of both CLIP towers")
    prompt: Annotated[Prompt, BeforeValidator(checked_prompt)] = Field(
        None, description="text of class {}, or openai80 (default: data set's own)"
    )
    held_out: Names = Field((), description="domains not trained on, comma-separated")
    partition: Annotated[InstanceOf[Partition], _read("partition"), _Fields] = Field(
        DEFAULTS["partition"], description="how rows go to clients"
    )
    clients: int | None = Field(None, ge=1, le=10**8, description="number of clients; by_domain: one per domain")
    partition_seed: int = Field(0, ge=0, description="seed of the partition and the splits")
    # In each round, a train row is read as one of its augmented views, drawn at random.
    augment: int = Field(0, ge=0, description="augmented views cached per image")
    # The rest is halved into validation and test rows.
    train_share: float = Field(0.6, gt=0, le=1, description="share of train rows; the rest is halved")
    shots: int | None = Field(None, ge=1, description="train rows per client and class (default: all)")
    # Besides their own rows; with server fedprox, FedRDS.
    common: float = Field(0.0, ge=0, lt=1, description="share of train rows that all clients have")
    # The last classes by label (clients.new_of); 0.5 gives the base-to-new protocol.
    new_classes: float = Field(0.0, ge=0, lt=1, description="fraction of classes not trained on")
    # In each round, clients train on the rows of one task's classes (class_tasks.py).
    tasks: int = Field(1, ge=1, description="class tasks, one by one over the rounds")
    method: Annotated[InstanceOf[Method], _read("method"), _Fields] = Field(
        DEFAULTS["method"], description="what is trained"
    )
    server: Annotated[InstanceOf[Server], _read("server"), _Fields] = Field(
        DEFAULTS["server"], description="how updates are combined"
    )
    codec: Annotated[InstanceOf[Codec], _read("codec"), _Fields] = Field(
        DEFAULTS["codec"], description="how updates are encoded"
    )
    privacy: Annotated[InstanceOf[Privacy], _read("privacy"), _Fields] = Field(
        DEFAULTS["privacy"], description="what is clipped and noised"
    )
    attack: Annotated[InstanceOf[Attack], _read("attack"), _Fields] = Field(
        DEFAULTS["attack"], description="what malicious clients do"
    )
    cohort: int | None = Field(None, ge=1, search=Log(2, 100), description="clients per round (default: all)")
    fleet: Annotated[InstanceOf[Fleet], _read("fleet"), _Fields] = Field(
        DEFAULTS["fleet"], description="clients' devices, in simulated time"
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="simulated seconds per round; late updates do not count",
    )
    # A round ends once `cohort` clients have responded.
    over_selection: float = Field(0.0, ge=0, description="fraction of extra clients asked")
    rounds: int = Field(200, ge=0, le=10**9, description="rounds of aggregation")  # 200: FedCLIP's README
    seed: int = Field(0, ge=0, description="seed of everything but the partition")
    eval_every: int = Field(1, ge=1, description="evaluate every N rounds, and the last")
    eval_clients: int | None = Field(None, ge=1, description="clients evaluated, drawn once (default: all)")
    # The number of clients - 1 is DP-FPL's.
    neighbors: int = Field(0, ge=0, description="N others on whose test rows to evaluate, too")
    # Nothing is sent. It decides no other result, so a finished run without it continues with it.
    tune_epochs: int = Field(0, ge=0, description="epochs of each client after the last round")
    engine: Literal["stacked", "reference"] = Field(
        "stacked",
        description="clients trained together or one by one; equal up to rounding",
    )
    chunk: int | None = Field(None, ge=1, description="clients per call (default: cohort / 16, at most 64)")
    dtype: Literal["float32", "float64"] = Field("float32", description="of trained tensors")
    threads_per_actor: int = Field(1, ge=1, description="PyTorch threads; not 1: other rounding")

    out: Out = Field(None, description="folder of the run (default: a new one in runs/)")
    actors: int | None = Field(None, ge=0, description="Ray actors; 0: this process (default: as many as fit)")
    gpus_per_actor: float | None = Field(
        None, ge=0, le=1, description="fraction of a GPU per actor (default: by its memory)"
    )
    gpu_gb_per_actor: float | None = Field(
        None, gt=0, description="GPU memory per actor, GB (default: two actors per GPU)"
    )
    call_timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds until a call is repeated (default: 20 x longest)",
    )
    address: str | None = Field(None, description="Ray cluster, host:port or auto (default: a private one)")
    cache_dir: Annotated[Path, AfterValidator(absolute)] = Field(
        default_factory=cache_dir, description="encoded features; or set $FEDSIM_CACHE_DIR"
    )
    loggers: Loggers = Field((), description=f"{','.join(LOGGERS)} (default: none)")
    page: bool = Field(True, description="write report.html; false skips it")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(first_error(error, "", type(self).model_fields)) from None

    @property
    def fixed_rounds(self) -> bool:
        """Whether each round depends on `rounds`, so that a run cannot be continued with more."""
        by_part = self.method.fixed_rounds, self.server.fixed_rounds, self.privacy.solves, self.tasks > 1
        return any(by_part)

    def experiment(self) -> dict[str, Any]:
        """The fields that determine the result, as plain values."""
        return {name: value for name, value in self.plain().items() if name not in EXECUTION}

    def plain(self) -> dict[str, Any]:
        """All fields as plain values, as in YAML."""
        return self.model_dump(mode="json")

    def folder(self) -> Path:
        """`out`, or a folder that no other experiment has."""
        if self.out is not None:
            return self.out
        digest = blake2b(yaml.safe_dump(self.experiment()).encode(), digest_size=4).hexdigest()
        parts = name_of(self.dataset), "-".join(self.held_out), name_of(self.method), name_of(self.server)
        return Path("runs") / safe_name(parts, digest)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The fields in a YAML file, or in the embedded experiment of that name.

    Raises:
        InputError: there is no such file, or it is not a YAML mapping.
    """
    path = Path(file)
    if not path.is_file():
        bundled = {path.stem: path for path in sorted(EXPERIMENTS.glob("*.yaml"))}
        if str(file) not in bundled:
            raise InputError(f"no config file {str(file)!r}; embedded configs: {listing(bundled)}")
        path = bundled[str(file)]
    fields = read_mapping(path, "fields to values")
    for mapping in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        if odd := [key for key in mapping if not isinstance(key, str)]:
            raise InputError(f"{path}: the name of a field must be text, got {odd[0]!r}")
    return fields


def merged(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of `fields` overridden by those of `overrides`; a component of another name loses its earlier fields."""
    result = dict(fields)
    for name, value in overrides.items():
        if name in KINDS:
            component, new = result.get(name, {}), _as_fields(value)
            if not isinstance(component, str | dict) and not hasattr(component, "__pydantic_fields__"):
                raise InputError(f"{name} must be a name or a mapping of its fields, got {component!r}")
            old = _as_fields(component)
            if new.get("name") not in (None, old.get("name", DEFAULTS[name])):
                value = new
            elif isinstance(component, str | dict):
                value = old | new
            else:  # an object, whose class may have no name in the registry
                value = replaced(name, component, {field: each for field, each in new.items() if field != "name"})
        result[name] = value
    return result


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """`{"method": {"name": "fedclip", "lr": 1}}` as `{"method": "fedclip", "method.lr": 1}`."""
    result: dict[str, Any] = {}
    for name, value in fields.items():
        inner = value if isinstance(value, dict) else {"name": value}
        result |= {name if field == "name" else f"{name}.{field}": each for field, each in inner.items()}
    return result


def _as_fields(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"name": value}
    return dict(value) if isinstance(value, dict) else fields_of(value)
