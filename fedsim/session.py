"""Ray's session: a cluster that is joined, or a private one that others cannot touch and that leaves nothing behind."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from stat import S_IMODE, S_ISDIR
from threading import Timer
from typing import Any

import psutil
from filelock import FileLock, Timeout

from fedsim.errors import RESUMES, InputError, Stopped, listing
from fedsim.events import Event, Progress
from fedsim.signals import heard, kept

QUIET = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "fedsim"}
PREFIX, LOCK = "fedsim-", ".ray-of-fedsim"  # of a folder's name; the file in it that its owner has locked
# The longest path of a socket below TMPDIR, and of any socket.
BELOW = "/fedsim-12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
PATH_BYTES = 107 if sys.platform == "linux" else 103
START_S = 120  # for a private cluster to start, which takes 5 to 30; it may hang for ever
JOIN_S = 90  # for a cluster to take a new driver; Ray itself tries for minutes
LOOK_S, LOST_S = 2, 20  # between two looks at the head of a cluster; without an answer (Ray ends this process after 60)
END_S = 10  # for Ray's processes to end


@contextmanager
def session(address: str | None, progress: Progress = lambda event: None) -> Iterator[Any]:
    """Joins the cluster at an address, or starts a private one, for as long as it lasts; gives Ray.

    Where this process has joined a cluster already, that is used, and is still joined at the end.

    Raises:
        InputError: there is no such cluster, or this process has joined another one.
        Stopped: Ray does not start.
    """
    if joined():
        _check_joined(address)
        yield sys.modules["ray"]
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run`, Ray would have uv install all of this again, in a copy of the working folder, for its actors;
    # with --no-sync they would never start, and nobody would be told. Read, too, when Ray is imported.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with heard(), _private(progress) if address is None else _shared(address) as ray:
        yield ray


def joined() -> bool:
    """Whether this process has joined a cluster, by `ray.init` or by a session."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def check_reachable(address: str | None) -> None:
    """Knocks at a cluster's door, since Ray itself would try for minutes.

    Raises:
        InputError: nobody answers at host:port.
    """
    if address is None or address == "auto" or joined():
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--address wants host:port or auto, not {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no cluster answers at {address} ({error}); is it up? try `ray status`") from None


def pulse(ray) -> Callable[[], None]:
    """A function to be called again and again: raises Stopped once the cluster's head has not answered for LOST_S.

    Ray notices too, but then ends this process with words of its own.
    """
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    answered = looked = time.monotonic()

    def look() -> None:
        nonlocal answered, looked
        if time.monotonic() < looked + LOOK_S:
            return
        looked = time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_S).close()
            answered = time.monotonic()
        except OSError as error:
            if time.monotonic() > answered + LOST_S:
                raise Stopped(f"Ray's head at {host}:{port} has ended ({error}); {RESUMES}") from None

    return look


def _check_joined(address: str | None) -> None:
    """Raises InputError where this process has joined another cluster than that at an address."""
    there = sys.modules["ray"].get_runtime_context().gcs_address
    if address not in (None, "auto", there):
        raise InputError(f"this process has joined the cluster at {there} already, not {address}; try ray.shutdown()")


@contextmanager
def _shared(address: str) -> Iterator[Any]:
    _try_to_join(address)
    import ray

    try:
        with kept():
            ray.init(address=address, **QUIET)
    except Exception as error:  # Ray raises a bare one, too
        raise _refused(address, str(error)) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _try_to_join(address: str) -> None:
    """Joins in a process of its own, which can be ended: where no Ray answers, `ray.init` cannot be interrupted."""
    program = f"import sys, ray; ray.init(address=sys.argv[1], **{QUIET!r})"
    try:
        subprocess.run(
            [sys.executable, "-c", program, address], capture_output=True, text=True, timeout=JOIN_S, check=True
        )
    except subprocess.TimeoutExpired:
        raise _refused(address, f"no answer in {JOIN_S} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"ended with code {error.returncode}"]
        raise _refused(address, error.stderr if "Python: " in error.stderr else lines[-1]) from None


def _refused(address: str, reason: str) -> InputError:
    if versions := re.findall(r"Ray: (\S+)\s+Python: (\S+)", reason):
        theirs, ours = (f"Ray {ray} on Python {python}" for ray, python in versions)
        return InputError(f"the cluster at {address} runs {theirs}, this process {ours}; Ray wants the same on both")
    hint = "if it asks for a token, RAY_AUTH_MODE=token and its ~/.ray/auth_token are wanted here"
    return InputError(f"cannot join a cluster at {address}: {reason}; {hint}")


@contextmanager
def _private(progress: Progress) -> Iterator[Any]:
    if elsewhere := os.environ.get("RAY_ADDRESS"):
        progress(Event("Ray", 0, 0, f"a private cluster; RAY_ADDRESS={elsewhere} counts with --address auto alone"))
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # A cluster which nobody else can use (its figures for Prometheus excepted, which Ray shows to all) and which
        # leaves no token in the home folder. Ray reads this once, when it is imported; where that has happened, its
        # own choice stands.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    with _private_folder(progress) as folder:
        try:
            _start(ray, folder, progress)
            yield ray
        finally:
            _end(ray, folder)


def _start(ray, folder: Path, progress: Progress) -> None:
    """Starts Ray in a folder, at the second try where the first one fails.

    Raises:
        Stopped: it fails as well. The message names what is scarce on this machine.
    """
    for again in (True, False):
        # Ray waits for ever for a raylet that has no memory left to start a process.
        hung = Timer(START_S, lambda: _kill(_family(folder)))
        hung.daemon = True
        hung.start()
        try:
            with kept():
                # Said in so many words: without an address, Ray joins whatever cluster it finds on the machine.
                ray.init(address="local", include_dashboard=False, _temp_dir=str(folder / "r"), **QUIET)
            return
        except Exception as error:  # whatever fails here is not of the user's config; Ray raises a bare Exception too
            reason = str(error).strip().splitlines()[0].rstrip(".")
            if not again:
                raise Stopped(f"Ray did not start, twice ({reason}); {_scarce()}") from error
            progress(Event("Ray", 0, 0, f"did not start ({reason}); it is tried once more"))
            _kill(_family(folder))
            ray.shutdown()
        finally:
            hung.cancel()


def _scarce() -> str:
    """What of this machine may be too little for Ray, in words."""
    import resource  # not on Windows

    cpus, load, free = os.cpu_count() or 1, os.getloadavg()[0], psutil.virtual_memory().available
    limits = {
        "-n": (resource.RLIMIT_NOFILE, 1, 1024),
        "-u": (resource.RLIMIT_NPROC, 1, 2048),
        "-v": (resource.RLIMIT_AS, 1024, 32 << 20),
    }
    found = [f"a load of {load:.0f} on {cpus} CPUs"] if load > 2 * cpus else []
    found += [f"{free / 2**30:.1f} GB of free memory"] if free < 2 << 30 else []
    for flag, (limit, unit, enough) in limits.items():
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and soft / unit < enough:
            found.append(f"`ulimit {flag}` of {soft // unit}")
    return f"perhaps too little for it: {listing(found)}" if found else "--actors 0 does without it"


def _end(ray, folder: Path) -> None:
    """Ends Ray, and the processes that it leaves behind: some live on for 20 s where its head has died."""
    family = _family(folder)
    try:
        ray.shutdown()
    finally:
        late = time.monotonic() + END_S
        while not all(map(_gone, family)) and time.monotonic() < late:
            time.sleep(0.05)
        _kill(family)


def _family(folder: Path) -> list[psutil.Process]:
    """The processes of a private cluster: those that name its folder, and what they have started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if str(folder) in " ".join(child.cmdline()):
                found += [*child.children(recursive=True), child]
    return found


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill(family: list[psutil.Process]) -> None:
    for process in family:
        with suppress(psutil.Error):
            process.kill()


@contextmanager
def _private_folder(progress: Progress) -> Iterator[Path]:
    """A new folder of this user's alone, removed at the end.

    Ray lets everyone write to the folder it is given, where it reads from a file which port the token is sent to; so
    that folder has to be below this one.
    """
    folder, lock = _locked_folder(progress)
    try:
        yield folder
    finally:
        for _ in range(END_S * 10):  # a process that is ending may still write to it
            rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)
        lock.release()


def _locked_folder(progress: Progress) -> tuple[Path, FileLock]:
    """The folder, and the lock in it that says that its owner is alive."""
    problems: list[str] = []
    named = [(name, os.environ[name]) for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    for name, root in [*named, ("", "/tmp")]:
        try:
            if problem := _unfit(root):
                raise OSError(None, problem)
            _sweep(Path(root))
            # Under another name until it is locked, or a sweep might take it for one whose owner has died.
            fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
            lock = FileLock(fresh / LOCK)
            lock.acquire()
            folder = fresh.rename(fresh.with_name(fresh.name[1:]))
        except (OSError, NotImplementedError) as error:
            problems.append(f"{name} {root} ".lstrip() + str(getattr(error, "strerror", error)))
        else:
            if problems:
                progress(Event("Ray", 0, 0, f"its files are below {root}, since {'; '.join(problems)}"))
            return folder, lock
    raise InputError(f"Ray needs a folder for its files: {'; '.join(problems)}; TMPDIR may name a short, writable one")


def _unfit(root: str) -> str:
    """Why Ray cannot have its sockets below a folder; empty where it can."""
    if not root.isascii() or re.search(r"\s", root):
        return "has blanks or letters that are not ASCII"
    most = PATH_BYTES - len(BELOW)
    return f"is longer than the {most} bytes that the paths of its sockets leave" if len(root) > most else ""


def _sweep(root: Path) -> None:
    """Removes what killed processes of this user have left: folders that are locked by nobody."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout, NotImplementedError):
            about = folder.lstat()
            mine = S_ISDIR(about.st_mode) and S_IMODE(about.st_mode) == 0o700 and about.st_uid == os.geteuid()
            if mine and (folder / LOCK).is_file():
                with FileLock(folder / LOCK, timeout=0):
                    rmtree(folder, ignore_errors=True)
