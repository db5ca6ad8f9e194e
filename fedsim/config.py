"""The experiment as a value: checked where it is made, in Python, in YAML and on the command line alike.

pydantic checks types and ranges, of the components' hyperparameters too, so that there is one sentence for one
mistake wherever it is made.
"""

import os
import re
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

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
from fedsim.folder import safe_name
from fedsim.methods import Method
from fedsim.partitions import Dealing
from fedsim.registry import CHECKED, KINDS, changed, name_of, numbers_are_not_truths, parse, sentence
from fedsim.search_space import Field, Log
from fedsim.servers import Server

EXPERIMENTS = Path(__file__).parent / "experiments"
# What may differ between two runs of one experiment: where, and with how many hands.
DEFAULTS = {"dataset": "glyphs", "partition": "by_domain", "method": "fedclip", "server": "fedavg", "fleet": "ideal"}
EXECUTION = ("out", "actors", "gpus_per_actor", "gpu_gb_per_actor", "call_timeout_s", "address", "cache_dir")


def fields_of(thing: Any) -> dict[str, Any]:
    """A component as it is written in YAML."""
    return {"name": name_of(thing)} | {name: getattr(thing, name) for name in thing.__pydantic_fields__}


def _cache() -> Path:
    if named := os.environ.get("FEDSIM_CACHE_DIR"):
        return Path(named)
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the XDG specification: a relative path is to be ignored
        return shared / "fedsim"
    try:
        return Path.home() / ".cache" / "fedsim"
    except RuntimeError:  # a container's user id without a line in /etc/passwd
        raise InputError("this user has no home folder for encoded features; give --cache-dir DIR") from None


def _read(kind: str) -> BeforeValidator:
    return BeforeValidator(partial(parse, kind, default=DEFAULTS[kind]))


_Fields = PlainSerializer(fields_of)


def _prompt(value: str) -> str:
    # Not by trying `format`: {:.3} would cut names, {!r} quote them, and {{}} is no place for one.
    if value.count("{}") != 1 or set("{}") & set(value.replace("{}", "")):
        raise InputError(f"prompt needs {{}} once, where the class name goes, and no other braces, not {value!r}")
    if not value.isprintable():
        raise InputError(f"prompt needs to be one line of text, not {value!r}")
    return value


def _expanded(value: Path | None) -> Path | None:
    try:
        return value and value.expanduser()
    except RuntimeError:
        raise InputError(f"{value}: there is no such user, or no home folder") from None


def _absolute(value: Path | None) -> Path | None:
    # Workers run in folders of their own, so a relative path would be another one there.
    return (path := _expanded(value)) and path.absolute()


def _not_empty(value: Any) -> Any:
    if value == "":  # to pathlib, the current folder; to a script, a variable that is not set
        raise InputError("--out is empty; it expects a folder")
    return value


def _names(value: Any) -> Any:
    """Names separated by commas, or a sequence of names; each is kept once."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    elif not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    # In YAML a name such as 7 or true is no text.
    names = [str(name).lower() if isinstance(name, int) else name for name in value]
    return tuple(dict.fromkeys(name for name in names if name != ""))


Out = Annotated[Path | None, BeforeValidator(_not_empty), AfterValidator(_expanded)]


class Config(BaseModel):
    """One experiment. Every component is an object, its name, or `{"name": ..., field: value}`."""

    model_config = ConfigDict(CHECKED, frozen=True, validate_default=True)
    numbers_are_not_truths = numbers_are_not_truths

    dataset: Annotated[InstanceOf[Dataset], _read("dataset"), _Fields] = Field(
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
    partition: Annotated[InstanceOf[Dealing], _read("partition"), _Fields] = Field(
        DEFAULTS["partition"], description="how rows go to clients"
    )
    clients: int | None = Field(None, ge=1, le=10**8, description="number of clients; by_domain has one per domain")
    partition_seed: int = Field(0, ge=0, description="draws the partition and each client's splits")
    augment: int = Field(
        0, ge=0, description="augmented views kept of each image, of which a train row shows another each round"
    )
    train_share: float = Field(0.6, gt=0, lt=1, description="of a client's rows; half of the rest validates")
    shots: int | None = Field(None, ge=1, description="train rows of each class that a client keeps; none given: all")
    new_classes: float = Field(
        0.0, ge=0, lt=1, description="share of the classes, the last by name, that nobody trains on; 0.5 is base-to-new"
    )
    method: Annotated[InstanceOf[Method], _read("method"), _Fields] = Field(
        DEFAULTS["method"], description="what is trained"
    )
    server: Annotated[InstanceOf[Server], _read("server"), _Fields] = Field(
        DEFAULTS["server"], description="how updates are combined"
    )
    cohort: int | None = Field(
        None, ge=1, search=Log(2, 100), description="clients that train in a round; none given: all"
    )
    fleet: Annotated[InstanceOf[Fleet], _read("fleet"), _Fields] = Field(
        DEFAULTS["fleet"], description="devices of clients, in simulated time"
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="simulated seconds that a client has to answer; who is late does not count",
    )
    over_selection: float = Field(
        0.0,
        ge=0,
        description="share of the cohort that is asked on top; a round closes when as many as the cohort have answered",
    )
    rounds: int = Field(200, ge=0, le=10**9, description="rounds of aggregation; FedCLIP's README runs 200")
    seed: int = Field(0, ge=0, description="draws everything but the partition")
    eval_every: int = Field(1, ge=1, description="rounds between evaluations; the last round is always judged")
    eval_clients: int | None = Field(
        None, ge=1, description="clients whose own rows are judged, drawn once; none given: all"
    )
    engine: Literal["stacked", "reference"] = Field(
        "stacked",
        description="train clients in stacks, or one by one on the readable path (the same results, to rounding)",
    )
    chunk: int | None = Field(
        None, ge=1, description="clients of one call; 1: one by one, unstacked; none given: a 16th of the cohort, or 64"
    )
    dtype: Literal["float32", "float64"] = Field("float32", description="of parameters and training")
    threads_per_actor: int = Field(1, ge=1, description="torch's; more than one round sums in another way")

    out: Out = Field(None, description="folder of the run; none given: runs/ and a name of its own")
    actors: int | None = Field(None, ge=0, description="client actors; 0: in this process; none given: by the cluster")
    gpus_per_actor: float | None = Field(None, ge=0, le=1, description="share of a GPU; none given: by the cluster")
    gpu_gb_per_actor: float | None = Field(
        None, gt=0, description="memory of a GPU that an actor needs, to tell how many fit on one; none given: two do"
    )
    call_timeout_s: float | None = Field(
        None, gt=0, description="after which a chunk is given to another actor as well; none given: 20 of the longest"
    )
    address: str | None = Field(
        None,
        description="join this Ray cluster (host:port, or auto: $RAY_ADDRESS counts); none given: a private one",
    )
    cache_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        default_factory=_cache, description="folder of encoded features; or $FEDSIM_CACHE_DIR"
    )

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
        parts = name_of(self.dataset), "-".join(self.held_out), name_of(self.method), name_of(self.server)
        return Path("runs") / safe_name(parts, digest)


class _Loader(yaml.SafeLoader):
    """YAML whose values mean what they mean on the command line.

    YAML 1.1 reads `no` as false, 010 as eight and 1:30 as ninety. Here only true, false, null, and numbers in plain
    decimal notation have a type; anything else is text, which the field then reads as if it came from a flag. A key
    that is given twice is refused.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


for _type, _form, _first in (
    ("bool", "true|false", "tf"),
    ("null", "null|~|", ["n", "~", ""]),
    ("int", "0|-?[1-9][0-9]*", "-0123456789"),
    ("float", r"-?(0|[1-9][0-9]*)\.[0-9]*([eE][-+][0-9]+)?|-?\.inf|\.nan", "-.0123456789"),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_form})$"), _first)


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
        fields = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}, line {line}, is not YAML: {error.problem}") from None
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
