"""fedsim: federated adaptation of CLIP, simulated on Ray, right to the bit. Everything for sale is here."""

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
