"""fedsim: federated adaptation of CLIP, simulated on Ray, right to the bit. Everything for sale is here."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsim.config import Config
    from fedsim.datasets import Dataset, Features, Images
    from fedsim.errors import InputError
    from fedsim.fleets import Fleet
    from fedsim.many import run_all
    from fedsim.methods import Backbone, Method
    from fedsim.partitions import Partition
    from fedsim.registry import available, component
    from fedsim.report import Report
    from fedsim.servers import Server
    from fedsim.simulate import run

__all__ = [
    "Backbone",
    "Config",
    "Dataset",
    "Features",
    "Fleet",
    "Images",
    "InputError",
    "Method",
    "Partition",
    "Report",
    "Server",
    "available",
    "component",
    "run",
    "run_all",
]

# Imported when they are first used: torch takes seconds, which `fedsim --help`, `watch` and `stop` can do without.
_MODULES = {
    "config": ("Config",),
    "datasets": ("Dataset", "Features", "Images"),
    "errors": ("InputError",),
    "fleets": ("Fleet",),
    "many": ("run_all",),
    "methods": ("Backbone", "Method"),
    "partitions": ("Partition",),
    "registry": ("available", "component"),
    "report": ("Report",),
    "servers": ("Server",),
    "simulate": ("run",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
