"""What a run finds on this machine, and what to do where something is missing."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.filesize import decimal as size

from fedsim.cache import check_writable
from fedsim.clip.published import downloaded
from fedsim.cluster.session import check_reachable, session
from fedsim.errors import InputError, Stopped, counted, listing
from fedsim.reporting.facts import environment

SCARCE_SHM = 1 << 30  # below which Ray writes objects to disk
SCARCE_DISK = 5 << 30


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what there is.

    Attributes:
        remedy: what to do; empty if all is well.
    """

    name: str
    text: str
    remedy: str = ""


def examine(cache: Path, address: str | None) -> Iterator[Finding]:
    """Looks at one thing after the other; Ray, which takes seconds to start, comes last.

    Args:
        cache: the folder of encoded features.
        address: of a cluster, as `--address`; None: a private one is started and ended.
    """
    versions = environment()
    yield Finding("fedsim", f"{versions.pop('fedsim')}, Python {versions.pop('python')}, {versions.pop('machine')}")
    yield Finding("packages", listing(f"{name} {version}" for name, version in versions.items()))
    memory = psutil.virtual_memory()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("machine", f"{counted(cpus or 1, 'CPU')}, {size(memory.total)} memory, {size(memory.available)} free")
    yield _gpus()
    yield _shared_memory()
    yield _cache(cache)
    yield _space("temporary files", Path(tempfile.gettempdir()))
    yield Finding("weights", listing([*downloaded(), "tiny embedded"], 20))
    yield _ray(address)


def report(console: Console, findings: Iterator[Finding]) -> int:
    """Prints each finding as it is made; returns the number of those with a remedy."""
    problems = 0
    for finding in findings:
        console.print(f"{'!' if finding.remedy else ' '} {finding.name:<16} {finding.text}", soft_wrap=True)
        if finding.remedy:
            problems += 1
            console.print(f"  {'':<16} -> {finding.remedy}", soft_wrap=True)
    return problems


def _gpus() -> Finding:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Finding("GPUs", listing(f"{card.name}, {size(card.total_memory)}" for card in cards))
    if not shutil.which("nvidia-smi"):
        return Finding("GPUs", "none; everything runs on the CPUs")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    remedy = "compare its CUDA version with the driver's, which nvidia-smi prints; install another torch or driver"
    return Finding("GPUs", f"there is nvidia-smi, but torch, {built}, finds no GPU", remedy)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "no /dev/shm; Ray uses temporary files")
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= SCARCE_SHM else "objects of Ray go to disk; for Docker, `docker run --shm-size=4g`"
    return Finding("shared memory", f"{size(free)} free in /dev/shm", remedy)


def _cache(folder: Path) -> Finding:
    try:
        check_writable(folder)
    except InputError as error:
        return Finding("cache", str(error), "give another folder")
    return _space("cache", folder)


def _space(name: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= SCARCE_DISK else "make room there; `fedsim cache prune` removes features that no run uses"
    return Finding(name, f"{folder}, {size(free)} free", remedy)


def _ray(address: str | None) -> Finding:
    where, began = address or "a private cluster", time.perf_counter()
    try:
        check_reachable(address)
        with session(address) as ray:
            resources = ray.cluster_resources()
            took = time.perf_counter() - began
            found = [counted(len(ray.nodes()), "machine"), f"{resources.get('CPU', 0):g} CPUs"]
            found.append(f"{resources.get('GPU', 0):g} GPUs")
            return Finding("Ray", f"{where} answers after {took:.1f} s: {listing(found)}")
    except (InputError, Stopped) as error:
        return Finding("Ray", str(error), "`--actors 0` runs everything in one process, without Ray")
