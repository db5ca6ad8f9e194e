"""fedsim simulates federated adaptation of CLIP on Ray, reproducibly to the bit. This module is the public API."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str

    from fedsim.attacks import Attack, Poisoning
    from fedsim.codecs import Codec, Lossy
    from fedsim.config import Config
    from fedsim.datasets import Dataset, Features, FixedDataset, Images
    from fedsim.errors import Diverged, InputError, Stopped
    from fedsim.events import Note, Started, Step
    from fedsim.fleets import Fleet
    from fedsim.methods import Backbone, Batch, ClientContext, Method
    from fedsim.parallel_runs import run_all
    from fedsim.params import unflatten
    from fedsim.partitions import FixedPartition, Partition
    from fedsim.privacy import Noised, Privacy
    from fedsim.registry import available, component
    from fedsim.reporting.report import Report
    from fedsim.search_space import Choice, Field, Linear, Log
    from fedsim.servers import Averaging, ClientUpdate, Reply, Server
    from fedsim.simulate import run
    from fedsim.updates import RoundSum, apply_update, blocks, mean_delta, stepped

__all__ = [
    "Attack",
    "Averaging",
    "Backbone",
    "Batch",
    "Choice",
    "ClientContext",
    "ClientUpdate",
    "Codec",
    "Config",
    "Dataset",
    "Diverged",
    "Features",
    "Field",
    "FixedDataset",
    "FixedPartition",
    "Fleet",
    "Images",
    "InputError",
    "Linear",
    "Log",
    "Lossy",
    "Method",
    "Noised",
    "Note",
    "Partition",
    "Poisoning",
    "Privacy",
    "Reply",
    "Report",
    "RoundSum",
    "Server",
    "Started",
    "Step",
    "Stopped",
    "apply_update",
    "available",
    "blocks",
    "component",
    "mean_delta",
    "run",
    "run_all",
    "stepped",
    "unflatten",
]

# Imported when they are first used: torch takes seconds, which `fedsim --help`, `watch` and `stop` can do without.
_MODULES = {
    "attacks": ("Attack", "Poisoning"),
    "codecs": ("Codec", "Lossy"),
    "config": ("Config",),
    "datasets": ("Dataset", "Features", "FixedDataset", "Images"),
    "errors": ("Diverged", "InputError", "Stopped"),
    "events": ("Note", "Started", "Step"),
    "fleets": ("Fleet",),
    "parallel_runs": ("run_all",),
    "methods": ("Backbone", "Batch", "ClientContext", "Method"),
    "params": ("unflatten",),
    "partitions": ("FixedPartition", "Partition"),
    "privacy": ("Noised", "Privacy"),
    "registry": ("available", "component"),
    "reporting.report": ("Report",),
    "search_space": ("Choice", "Field", "Linear", "Log"),
    "servers": ("Averaging", "ClientUpdate", "Reply", "Server"),
    "simulate": ("run",),
    "updates": ("RoundSum", "apply_update", "blocks", "mean_delta", "stepped"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("fedsim")  # the distribution's name, as in pyproject.toml
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
