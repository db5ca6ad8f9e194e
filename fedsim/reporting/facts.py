"""What a run was made of: versions of packages, and plain values as YAML."""

import json
import platform
from functools import cache
from importlib.metadata import version
from typing import Any

import yaml

from fedsim import __version__

PACKAGES = (
    "ray",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "numpy",
    "pyarrow",
    "pandas",
    "matplotlib",
)


def environment() -> dict[str, str]:
    """Versions of what the bits of a run depend on."""
    ours = {"python": platform.python_version(), "machine": platform.machine(), "fedsim": __version__}
    return ours | _versions()


@cache  # otherwise a tenth of the time of each short run
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def to_yaml(fields: dict[str, Any]) -> str:
    """Plain values as YAML, in their order; a tuple becomes a list."""
    return yaml.safe_dump(json.loads(json.dumps(fields)), sort_keys=False)
