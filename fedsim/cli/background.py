"""Runs that outlive their terminal: how far one has come stands in a file beside it, for whoever wants to look.

A process of its own session does the work; nothing of it hangs on the terminal, or on Ray, which may be a cluster that
is joined or a private one. `status.json` is written whole or not at all; a lock that the process holds until its end
tells whether it is alive.
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

from fedsim.errors import RESUMES, InputError, Stopped, code_of, sentence_of
from fedsim.events import Event, Progress
from fedsim.files import reason, write_text
from fedsim.folder import RUNNING as LOCK
from fedsim.folder import Kind, claim

STATUS, LOG = "status.json", "run.log"
PATIENCE_S = 0.3  # between two looks
STOP_S = 60  # for an interrupted run to end


class Ended(BaseModel):
    """The exit code of a command, and what it said at its end."""

    code: int
    said: str


class Status(BaseModel):
    """What `status.json` holds.

    Attributes:
        pid: of the process that does the work; 0, 1 and negative ones would name groups of processes, or init.
        started: seconds from the start of the machine to that of the process: a later one may have the same pid.
        events: the last one of each stage.
        ended: None while it runs, and for ever if it was killed.
    """

    pid: int = Field(ge=2)
    started: float
    host: str
    began: float
    events: list[Event]
    ended: Ended | None


class Telling:
    """Writes what comes of a run to its folder, from the first event on; used as a context.

    Before that nothing is written, since a run may still be refused; nor while another process has the folder.

    Attributes:
        said: what the run has said at its end, for those who come later.
    """

    def __init__(self, folder: Path, show: Progress, kind: Kind = "run") -> None:
        self.folder, self.show, self.said, self.kind = folder, show, "", kind
        self.lock: FileLock | None = None
        self.events: dict[str, Event] = {}
        process = psutil.Process()
        self.about = {"pid": process.pid, "started": _started(process), "host": socket.gethostname()}
        self.about["began"] = time.time()

    def progress(self, event: Event) -> None:
        self.show(event)
        self.events[event.stage] = event
        self._write(None)

    def __enter__(self) -> "Telling":
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a script's shell has it for what ends in &
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what `stop` sends
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        code, said = (0, self.said) if error is None else (code_of(error), sentence_of(error))
        if self.lock or error is None:  # a run that is refused leaves what an earlier one has said
            self._write(Ended(code=code, said=said))
        if self.lock:
            self.lock.release()

    def _write(self, ended: Ended | None) -> None:
        with suppress(OSError):  # on a full disk the run itself ends, and says so
            if self.folder.is_dir() and (self.lock or self._take()):
                status = Status(**self.about, events=list(self.events.values()), ended=ended)
                write_text(self.folder / STATUS, status.model_dump_json(), lasting=False)  # at each event

    def _take(self) -> bool:
        claim(self.folder, self.kind)
        self.lock = _held(self.folder, PATIENCE_S)
        return self.lock is not None


def detach(folder: Path, argv: Sequence[str], kind: Kind = "run") -> None:
    """Starts `fedsim ARGV` in a process that needs no terminal, and returns once it is under way or has ended.

    Raises:
        InputError, Stopped: it has ended, with what it said; or the folder cannot be claimed.
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
        raise Stopped(f"{reason(error)}; once that is mended, the same command starts") from None
    while not (folder / STATUS).exists() and child.poll() is None:
        time.sleep(PATIENCE_S)
    if child.poll():
        last = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or [
            f"it ended with code {child.returncode}"
        ]
        raise (InputError if child.returncode == 2 else Stopped)(last[0].removeprefix("fedsim: "))


def watch(folder: Path, show: Progress) -> Ended:
    """Shows the events of the run in a folder until it ends; returns how it ended.

    Raises:
        InputError: there is no such run.
        Stopped: it has died without a word.
    """
    shown: dict[str, Event] = {}
    while True:
        alive = _alive(folder)  # before the look at what it wrote: it may end in between
        status = read_status(folder)
        for event in status.events:
            if shown.get(event.stage) != event:
                shown[event.stage] = event
                show(event)
        if status.ended:
            return status.ended
        if not alive and status.host == socket.gethostname():
            raise Stopped(f"the process that ran in {folder} is gone; {RESUMES}")
        time.sleep(PATIENCE_S)


def stop(folder: Path) -> None:
    """Interrupts the run in a folder, as Ctrl-C would, and waits for its end.

    Raises:
        InputError: nobody runs there, or on another machine.
        Stopped: it does not end, or belongs to another user.
    """
    host = read_status(folder).host
    if host != socket.gethostname():
        raise InputError(f"{folder} is run by a process on {host}; stop it there")
    alive, status = _alive(folder), read_status(folder)
    if status.ended or not alive:
        raise InputError(f"nobody runs in {folder}")
    try:
        process = psutil.Process(status.pid)
        if abs(_started(process) - status.started) > 1:
            raise InputError(f"process {status.pid} is not the one that wrote {folder / STATUS}; it is left alone")
        process.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        raise InputError(f"{folder / STATUS} names process {status.pid}, which does not exist") from None
    except psutil.AccessDenied:
        raise Stopped(f"process {status.pid} belongs to another user") from None
    late = time.monotonic() + STOP_S
    while _alive(folder):
        if time.monotonic() > late:
            raise Stopped(f"process {status.pid} does not end; its checkpoints are whole, and `kill -9` may be used")
        time.sleep(PATIENCE_S)


def read_status(folder: Path) -> Status:
    """What `Telling` wrote last.

    Raises:
        InputError: nothing is there; the message lists the runs that are below the folder. Or it is something else.
    """
    try:
        return Status.model_validate_json((folder / STATUS).read_bytes(), strict=True)
    except OSError:
        below = sorted(str(file.parent) for file in folder.glob(f"*/{STATUS}"))
        more = f"; below it are {', '.join(below[:12])}" if below else ""
        raise InputError(f"no command of fedsim has run in {folder}{more}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{folder / STATUS} is no status of a run ({field and field + ': '}{first['msg']})") from None


def _started(process: psutil.Process) -> float:
    # A difference, since both change with the clock of the machine.
    return process.create_time() - psutil.boot_time()


def _alive(folder: Path) -> bool:
    if not (folder / LOCK).exists():
        return False
    lock = _held(folder, PATIENCE_S)
    if lock:
        lock.release()
    return lock is None


def _held(folder: Path, patience_s: float) -> FileLock | None:
    """The lock of a process that runs in a folder; None where another one has it, or it is somebody else's folder.

    Args:
        patience_s: somebody who only looks has it for no time.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=patience_s)
    except (Timeout, PermissionError):
        return None
    return lock
