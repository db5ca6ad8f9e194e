"""A private Ray cluster on this machine, started and ended."""

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

import psutil

from fedsim.cluster.private_folder import END_S, private_folder
from fedsim.cluster.signals import handlers_restored
from fedsim.errors import Stopped, listing
from fedsim.events import Note, Progress

QUIET = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "fedsim"}
START_S = 120  # for a private cluster to start, which takes 5 to 30; it may hang for ever


@contextmanager
def private_cluster(progress: Progress) -> Iterator[Any]:
    """Starts a cluster that only this user can use, and ends it; yields Ray."""
    if elsewhere := os.environ.get("RAY_ADDRESS"):
        progress(Note("Ray", f"a private cluster; RAY_ADDRESS={elsewhere} is used only with --address auto"))
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # No other user can use this cluster (except for its figures for Prometheus, which Ray shows to all), and no
        # token is left in the home folder. Ray reads this once, when it is imported; later it would have no effect.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    with private_folder(progress) as folder:
        try:
            _start(ray, folder, progress)
            yield ray
        finally:
            _end(ray, folder)


def _start(ray: Any, folder: Path, progress: Progress) -> None:
    """Starts Ray in a folder; tries a second time if the first fails.

    Raises:
        Stopped: both failed. The message names what is scarce on this machine.
    """
    for again in (True, False):
        # Ray waits for ever for a raylet that has no memory left to start a process.
        hung = Timer(START_S, lambda: _kill(_processes_of(folder)))
        hung.daemon = True
        hung.start()
        try:
            with handlers_restored():
                # Explicitly local: without an address, Ray joins any cluster it finds on the machine.
                ray.init(address="local", include_dashboard=False, _temp_dir=str(folder / "r"), **QUIET)
            return
        except Exception as error:  # no failure here comes from the user's config; Ray raises a bare Exception
            reason = str(error).strip().splitlines()[0].rstrip(".")
            if not again:
                raise Stopped(f"Ray did not start, twice ({reason}); {_scarce()}") from error
            progress(Note("Ray", f"did not start ({reason}); trying once more"))
            _kill(_processes_of(folder))
            ray.shutdown()
        finally:
            hung.cancel()


def _scarce() -> str:
    """Which resources of this machine may be too small for Ray, in words."""
    import resource  # not on Windows

    cpus, load, free = os.cpu_count() or 1, os.getloadavg()[0], psutil.virtual_memory().available
    limits = {
        "-n": (resource.RLIMIT_NOFILE, 1, 1024),
        "-u": (resource.RLIMIT_NPROC, 1, 2048),
        "-v": (resource.RLIMIT_AS, 1024, 32 << 20),
    }
    shortages = [f"a load of {load:.0f} on {cpus} CPUs"] if load > 2 * cpus else []
    shortages += [f"{free / 2**30:.1f} GB of free memory"] if free < 2 << 30 else []
    for flag, (limit, unit, enough) in limits.items():
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and soft / unit < enough:
            shortages.append(f"`ulimit {flag}` of {soft // unit}")
    return f"perhaps too little for it: {listing(shortages)}" if shortages else "--actors 0 does without it"


def _end(ray: Any, folder: Path) -> None:
    """Ends Ray, and the processes that it leaves behind: without a head, some live on for 20 s."""
    processes = _processes_of(folder)
    if not any(map(_is_head, processes)):  # it has died; the others would wait for it, and Ray for them
        _kill(processes)
    try:
        ray.shutdown()
    finally:
        deadline = time.monotonic() + END_S
        while not all(map(_gone, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        _kill(processes)


def _processes_of(folder: Path) -> list[psutil.Process]:
    """The processes of a private cluster: those that name its folder, and their descendants."""
    processes = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if str(folder) in " ".join(child.cmdline()):
                processes += [*child.children(recursive=True), child]
    return processes


def _is_head(process: psutil.Process) -> bool:
    try:
        return process.name() == "gcs_server" and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
