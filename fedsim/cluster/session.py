"""Ray's session: a cluster that is joined, or a private one that others cannot touch and that leaves nothing behind."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedsim.cluster.private_cluster import QUIET, private_cluster
from fedsim.cluster.signals import handlers_restored, signals_as_interrupts
from fedsim.errors import RESUMES, InputError, Stopped
from fedsim.events import Progress

JOIN_S = 90  # for a cluster to take a new driver; Ray itself tries for minutes
LOOK_S, LOST_S = 2, 20  # between two looks at the head of a cluster; without an answer (Ray ends this process after 60)


@contextmanager
def session(address: str | None, progress: Progress = lambda event: None) -> Iterator[Any]:
    """Joins the cluster at an address, or starts a private one, and leaves or ends it at the end; yields Ray.

    A cluster that this process has joined already is used, and still joined at the end.

    Raises:
        InputError: there is no such cluster, or this process has joined another one.
        Stopped: Ray does not start.
    """
    if joined():
        _check_joined(address)
        yield sys.modules["ray"]
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run`, Ray would have uv install everything again for its actors, in a copy of the working folder; with
    # --no-sync they would never start, without a message. Ray reads this, too, when it is imported.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    with signals_as_interrupts(), private_cluster(progress) if address is None else _shared(address) as ray:
        yield ray


def joined() -> bool:
    """Whether this process has joined a cluster, by `ray.init` or by a session."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def check_reachable(address: str | None) -> None:
    """Connects to the head of a cluster once, since Ray itself would try for minutes.

    Raises:
        InputError: nothing answers at host:port, or this is not an address.
    """
    if address is None or address == "auto" or joined():
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--address needs host:port or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no cluster answers at {address} ({error}); is it up? try `ray status`") from None


class HeadMonitor:
    """Watches the head of a cluster. Ray does too, but then ends this process with a message of its own."""

    def __init__(self, ray: Any, private: bool) -> None:
        self.private = private
        self.host, _, self.port = ray.get_runtime_context().gcs_address.rpartition(":")
        self.answered = self.checked = time.monotonic()

    def check(self) -> None:
        """Raises Stopped once the head has not answered for LOST_S. To be called often; looks every LOOK_S.

        A private head that refuses a connection has ended, and is not started again.
        """
        if time.monotonic() < self.checked + LOOK_S:
            return
        self.checked = time.monotonic()
        try:
            socket.create_connection((self.host.strip("[]"), int(self.port)), timeout=LOOK_S).close()
            self.answered = time.monotonic()
        except OSError as error:
            ended = self.private and isinstance(error, ConnectionRefusedError)
            if ended or time.monotonic() > self.answered + LOST_S:
                raise Stopped(f"Ray's head at {self.host}:{self.port} has ended ({error}); {RESUMES}") from None


def _check_joined(address: str | None) -> None:
    """Raises InputError where this process has joined a cluster at another address."""
    current = sys.modules["ray"].get_runtime_context().gcs_address
    if address not in (None, "auto", current):
        raise InputError(f"this process has joined the cluster at {current} already, not {address}; try ray.shutdown()")


@contextmanager
def _shared(address: str) -> Iterator[Any]:
    _try_to_join(address)
    import ray

    try:
        with handlers_restored():
            ray.init(address=address, **QUIET)
    except Exception as error:  # Ray raises a bare Exception, too
        raise _cannot_join(address, str(error)) from error
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
        raise _cannot_join(address, f"no answer in {JOIN_S} s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"ended with code {error.returncode}"]
        raise _cannot_join(address, error.stderr if "Python: " in error.stderr else lines[-1]) from None


def _cannot_join(address: str, reason: str) -> InputError:
    if versions := re.findall(r"Ray: (\S+)\s+Python: (\S+)", reason):
        cluster, here = (f"Ray {ray} on Python {python}" for ray, python in versions)
        return InputError(f"the cluster at {address} runs {cluster}, this process {here}; Ray needs the same on both")
    hint = "if it asks for a token, set RAY_AUTH_MODE=token and copy its ~/.ray/auth_token to this machine"
    return InputError(f"cannot join a cluster at {address}: {reason}; {hint}")
