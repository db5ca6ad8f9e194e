"""What a command costs: CPU seconds and memory of all its processes, read from /proc while it runs.

uv run python benchmarks/_measure.py COMMAND    # of any command
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
CPU_EVERY_S = 0.2
MEMORY_EVERY = 5  # times as seldom: adding up a process's pages holds it up


class Watch(threading.Thread):
    """Samples the tree of processes below `root` until it is stopped.

    Attributes:
        peaks: MiB of PSS (a page that k processes share counts 1/k in each): of all together under `all`, of `root`
            under `root`, and of the largest process of each title that Ray gives, such as `ray::DriverActor`. Those of
            single processes are without mapped files, such as torch's libraries: when other processes end, a larger
            share of these counts in those that remain.
    """

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.tree = root, Tree(root)
        self.over = threading.Event()
        self.spent: dict[tuple[int, int], float] = {}  # also of processes that have ended
        self.series: list[tuple[float, float, float]] = []  # time, CPU seconds of the tree, of the machine
        self.peaks: dict[str, float] = defaultdict(float)

    def run(self) -> None:
        while True:
            pids = self.tree.look()
            for pid in pids:
                if (stat := _stat(pid)) is not None:
                    self.spent[pid, int(stat[19])] = (int(stat[11]) + int(stat[12])) / TICKS
            self.series.append((time.time(), sum(self.spent.values()), _machine()))
            if len(self.series) % MEMORY_EVERY == 1:
                self._weigh(pids)
            if self.over.wait(CPU_EVERY_S):
                return

    def stop(self) -> None:
        self.over.set()
        self.join()

    def between(self, began: float, ended: float) -> tuple[float, float]:
        """CPU seconds of the tree, and of the whole machine, between two wall times."""
        (own, all_), (own_end, all_end) = self._at(began), self._at(ended)
        return own_end - own, all_end - all_

    def _at(self, when: float) -> tuple[float, float]:
        for (before, *low), (after, *high) in pairwise(self.series):
            if before <= when <= after:
                share = (when - before) / (after - before)
                return tuple(a + share * (b - a) for a, b in zip(low, high, strict=True))
        return self.series[-1][1:] if when > self.series[-1][0] else self.series[0][1:]

    def _weigh(self, pids: list[int]) -> None:
        now: dict[str, float] = defaultdict(float)
        for pid in pids:
            sizes, name = _pss(pid), "root" if pid == self.root else _title(pid)
            now["all"] += sizes.get("Pss", 0.0)
            now[name] = max(now[name], sizes.get("Pss", 0.0) - sizes.get("Pss_File", 0.0))
        for name, size in now.items():
            self.peaks[name] = max(self.peaks[name], size)


class Tree:
    """A process and all below it, also those whose parents have ended since they were first seen.

    Each process of the machine is asked for its parent only when it is first seen: a busy machine has hundreds.
    """

    def __init__(self, root: int) -> None:
        self.pids = [root]
        self._parents: dict[int, int] = {root: 0}  # of all processes of the machine, as first seen

    def look(self) -> list[int]:
        """Those that are there now, parents first."""
        here = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}
        parents = {pid: parent for pid, parent in self._parents.items() if pid in here}
        parents |= {pid: int(stat[1]) for pid in here - parents.keys() if (stat := _stat(pid)) is not None}
        children = defaultdict(list)
        for pid, parent in parents.items():
            children[parent].append(pid)
        found = set(self.pids)
        for pid in self.pids:  # grows meanwhile
            new = [child for child in children[pid] if child not in found]
            self.pids += new
            found.update(new)
        self.pids = [pid for pid in self.pids if pid in here]
        # One whose parent has ended before it was seen is asked again: by then it has another parent.
        self._parents = {pid: up for pid, up in parents.items() if up in parents or pid in found}
        return self.pids


def watched(command: list[str], log: Path, timeout_s: float, env: dict[str, str], cwd: Path) -> dict:
    """Runs a command that prints `RESULT {"ends": [...], ...}`, and says what it cost.

    Returns:
        The fields of its result, and:
        cpu_s, others: CPU seconds of the tree from the first of `ends` to the last, and the share of the machine
            that anybody else used meanwhile; only where there are two ends or more.
        first_s: wall seconds from the start of the command to the first of `ends`.
        peaks: MiB, as in `Watch`.
        error: why there is no result, in place of all this; `log` holds the command's output.
    """
    began = time.time()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd)
        watch = Watch(process.pid)
        watch.start()
        try:
            process.wait(timeout_s)
        except BaseException as error:  # an interrupt too must not leave actors behind
            watch.stop()
            _end(process, watch.tree)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"error": f"not done after {timeout_s:g} s, see {log.name}"}
        finally:
            watch.stop()
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("RESULT ")
    ]
    if process.returncode or not lines:
        return {"error": f"failed with exit code {process.returncode}, see {log.name}"}
    result = json.loads(lines[-1].removeprefix("RESULT "))
    ends = result["ends"]
    if len(ends) > 1:
        own, machine = watch.between(ends[0], ends[-1])
        result |= {"cpu_s": own, "others": (machine - own) / (ends[-1] - ends[0]) / os.cpu_count()}
    return result | {"first_s": ends[0] - began, "wall_s": time.time() - began, "peaks": dict(watch.peaks)}


def median_and_range(values: Iterable[float]) -> tuple[float, float, float]:
    values = list(values)
    return statistics.median(values), min(values), max(values)


def _end(process: subprocess.Popen, tree: Tree) -> None:
    for pid in reversed(tree.look()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from `state` on; None where the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None


def _pss(pid: int) -> dict[str, float]:
    """MiB of `Pss`, `Pss_File` and so on; empty where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {line.partition(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss")}


def _title(pid: int) -> str:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "ended"
    named = re.match(r"ray::\w+", title)  # `ray::DriverActor.run`, then zeros
    return named[0] if named else "other"


def _machine() -> float:
    """CPU seconds that the machine has worked since it started."""
    times = [int(field) for field in Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0].split()[1:9]]
    return (sum(times) - times[3] - times[4]) / TICKS


def main() -> None:
    """Runs the command of the command line, and prints what it cost."""
    process = subprocess.Popen(sys.argv[1:])
    watch = Watch(process.pid)
    watch.start()
    process.wait()
    watch.stop()
    print(f"CPU seconds: {watch.series[-1][1]:.1f}")
    for name, size in sorted(watch.peaks.items()):
        print(f"peak MiB, {name}: {size:.0f}")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
