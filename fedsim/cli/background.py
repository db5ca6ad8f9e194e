"""Runs that outlive their terminal: the process writes its progress to status.json in its folder, for others to watch.

A detached run has its own session, so it depends neither on the terminal nor on whether Ray is private or joined.
`status.json` is written whole or not at all; a lock that the process holds until its end shows that it is alive.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, Field, ValidationError

from fedsim.errors import RESUMES, InputError, Stopped, code_of, listing, sentence_of
from fedsim.events import Event, Note, Progress, Step
from fedsim.files import reason, write_text
from fedsim.folder import RUNNING as LOCK
from fedsim.folder import Kind, claim

STATUS, LOG = "status.json", "run.log"
POLL_S = 0.3  # between two reads of a status
STOP_S = 60  # for an interrupted run to end


class Ended(BaseModel):
    """The exit code of a command, and what it printed at its end."""

    code: int
    message: str


class Status(BaseModel):
    """The content of `status.json`.

    Attributes:
        pid: of the process that runs the command; smaller numbers would be init or groups of processes.
        started: seconds from the boot of the machine to the start of the process: pids are reused.
        began: start of the command, in seconds since the epoch.
        steps: the last one of each stage.
        notes: all of them, in order.
        ended: None while the command runs, and after it was killed.
    """

    pid: int = Field(ge=2)
    started: float
    host: str
    began: float
    steps: list[Step]
    notes: list[Note]
    ended: Ended | None


class StatusFile:
    """Writes the progress of a run to its folder; a context manager.

    Nothing is written before the first event, since the run may still be refused, or while another process has the
    folder.

    Attributes:
        message: what the run printed at its end, for `watch`.
    """

    def __init__(self, folder: Path, show: Progress, kind: Kind = "run") -> None:
        self.folder, self.show, self.message = folder, show, ""
        self.kind: Kind = kind
        self.lock: FileLock | None = None
        self.steps: dict[str, Step] = {}
        self.notes: list[Note] = []
        process = psutil.Process()
        self.process = {"pid": process.pid, "started": _started(process), "host": socket.gethostname()}
        self.began = time.time()

    def progress(self, event: Event) -> None:
        self.show(event)
        if isinstance(event, Step):
            self.steps[event.stage] = event
        elif isinstance(event, Note):
            self.notes.append(event)
        self._write(None)

    def __enter__(self) -> "StatusFile":
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell sets it for background commands of a script
            signal.signal(signal.SIGINT, signal.default_int_handler)  # `fedsim stop` sends it
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        code, message = (0, self.message) if error is None else (code_of(error), sentence_of(error))
        if self.lock or error is None:  # a refused run leaves the status of an earlier one
            self._write(Ended(code=code, message=message))
        if self.lock:
            self.lock.release()

    def _write(self, ended: Ended | None) -> None:
        with suppress(OSError):  # such as a full disk, on which the run itself fails with a message
            if self.folder.is_dir() and (self.lock or self._acquire()):
                events = {"steps": list(self.steps.values()), "notes": self.notes}
                status = Status(**self.process, **events, began=self.began, ended=ended)
                write_text(self.folder / STATUS, status.model_dump_json(), durable=False)  # at each event

    def _acquire(self) -> bool:
        claim(self.folder, self.kind)
        self.lock = _lock(self.folder)
        return self.lock is not None


def detach(folder: Path, argv: Sequence[str], kind: Kind = "run") -> None:
    """Starts `fedsim ARGV` in a process without a terminal, and returns once it has started its work or ended.

    Raises:
        InputError, Stopped: it has failed, with its message; or the folder cannot be claimed.
    """
    if _alive(folder):
        raise InputError(f"another process is running in {folder}; fedsim watch {folder} shows it")
    try:
        claim(folder, kind)
        (folder / STATUS).unlink(missing_ok=True)
        with (folder / LOG).open("w", encoding="utf-8") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "fedsim", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise Stopped(f"{reason(error)}; fix this and rerun the same command") from None
    while not (folder / STATUS).exists() and child.poll() is None:
        time.sleep(POLL_S)
    if child.poll():
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        message = lines[-1].removeprefix("fedsim: ") if lines else f"the process ended with code {child.returncode}"
        raise (InputError if child.returncode == 2 else Stopped)(message)


def watch(folder: Path, show: Progress) -> Ended:
    """Shows the events of the run in a folder until it ends; returns how it ended.

    Raises:
        InputError: no command has run in the folder.
        Stopped: its process has died without writing how.
    """
    shown: set[Event] = set()
    while True:
        alive = _alive(folder)  # checked before reading the status: the run may end in between
        status = read_status(folder)
        for event in [*status.notes, *status.steps]:
            if event not in shown:
                show(event)
        shown = {*status.notes, *status.steps}
        if status.ended:
            return status.ended
        if not alive and status.host == socket.gethostname():
            raise Stopped(f"the process that ran in {folder} has died; {RESUMES}")
        time.sleep(POLL_S)


def stop(folder: Path) -> None:
    """Interrupts the run in a folder, as Ctrl-C would, and waits for its end.

    Raises:
        InputError: no run is active in the folder, or it runs on another machine.
        Stopped: its process does not end, or belongs to another user.
    """
    host = read_status(folder).host
    if host != socket.gethostname():
        raise InputError(f"the run in {folder} is on {host}; stop it there")
    alive, status = _alive(folder), read_status(folder)
    if status.ended or not alive:
        raise InputError(f"no run is active in {folder}")
    try:
        process = psutil.Process(status.pid)
        if abs(_started(process) - status.started) > 1:
            raise InputError(f"process {status.pid} did not write {folder / STATUS}; it is left alone")
        process.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        raise InputError(f"{folder / STATUS} names process {status.pid}, which does not exist") from None
    except psutil.AccessDenied:
        raise Stopped(f"process {status.pid} belongs to another user") from None
    deadline = time.monotonic() + STOP_S
    while _alive(folder):
        if time.monotonic() > deadline:
            raise Stopped(f"process {status.pid} does not end; `kill -9 {status.pid}` is safe, checkpoints are intact")
        time.sleep(POLL_S)


def read_status(folder: Path) -> Status:
    """The last content that `StatusFile` has written.

    Raises:
        InputError: the file is missing, and the message lists runs in subfolders; or it is not a status.
    """
    try:
        return Status.model_validate_json((folder / STATUS).read_bytes(), strict=True)
    except OSError:
        runs = sorted(str(file.parent) for file in folder.glob(f"*/{STATUS}"))
        hint = f"; its subfolders with runs: {listing(runs)}" if runs else ""
        raise InputError(f"no command of fedsim has run in {folder}{hint}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{folder / STATUS} is not the status of a run ({field and field + ': '}{first['msg']})"
        ) from None


def _started(process: psutil.Process) -> float:
    # Relative to boot: both times shift when the machine's clock is set.
    return process.create_time() - psutil.boot_time()


def _alive(folder: Path) -> bool:
    if not (folder / LOCK).exists():
        return False
    lock = _lock(folder)
    if lock:
        lock.release()
    return lock is None


def _lock(folder: Path) -> FileLock | None:
    """The lock of a folder; None when another process or another user has it.

    Waits a moment: a process that only checks holds the lock briefly.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=POLL_S)
    except (Timeout, PermissionError):
        return None
    return lock
