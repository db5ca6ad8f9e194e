"""fedsim's engine against its peers, a plain loop, the arithmetic alone, and itself at other sizes: one job, one table.

    uv run python benchmarks/engine.py                     # about 40 minutes on 2 otherwise idle cores
    uv run python benchmarks/engine.py --only cpu,floor    # some rows; those of an earlier run in --out are kept
    uv run python benchmarks/engine.py --quick             # 2 minutes, tiny sizes: does it all run?
    uv run python benchmarks/engine.py --table runs/engine/rows.jsonl   # no runs

Every run is a fresh process; runs alternate (A B C, A B C, ...), so that a slow minute hits all. The table gives ratios
of medians, which another machine can repeat; seconds it could not. `peers/README.md` says how peers are installed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import median

import numpy as np
from _measure import median_and_range, watched

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
HOME = Path(os.environ.get("FEDSIM_PEERS_HOME", Path.home() / ".cache" / "fedsim-peers")).expanduser()
APART = 1e-4  # of the way that the weights went: what float32 sums in another order may make of them
TIMEOUT_S = 1800
ABSENT = "not installed"


@dataclass(frozen=True)
class Job:
    """One command of the common job: who runs it, and at what size.

    Attributes:
        rounds: the first is never compared, for processes start and modules load in it, unless there is only one.
        most: repeats at most, where a run takes minutes.
    """

    engine: str
    clients: int
    rounds: int
    most: int = 1000

    def command(self, folder: Path) -> list[str]:
        script, *options = ENGINES[self.engine]
        start = {
            "flower": [str(HOME / "flower/bin/python")],
            "pfl": [str(HOME / "pfl/bin/torchrun"), "--standalone", "--nnodes=1", "--nproc_per_node=2"],
        }.get(self.engine, [sys.executable])
        sizes = ["--clients", str(self.clients), "--rounds", str(self.rounds)]
        return [*start, str(PEERS / script), *options, "--folder", str(folder), *sizes]


ENGINES = {
    "floor": ["floor.py"],
    "loop": ["loop.py"],
    "loop, fused Adam": ["loop.py", "--fused"],
    "fedsim, in process": ["fedsim_job.py", "--actors", "0"],
    "fedsim, 1 actor": ["fedsim_job.py", "--actors", "1"],
    "fedsim, 2 actors": ["fedsim_job.py", "--actors", "2"],
    "fedsim, 2 actors, rows made": ["fedsim_job.py", "--actors", "2", "--made"],
    "fedsim, 2 processes": ["fedsim_job.py", "--processes", "2"],
    "flower": ["flower_job.py", "--workers", "2"],
    "pfl": ["pfl_job.py"],
}
OF_OTHERS = ("floor", "fedsim, 2 actors, rows made")  # no weights, or those of other rows
SMALL = 20, 3  # clients and rounds: of the runs that must agree, and of all with --quick
READS_JOB = ("loop", "loop, fused Adam", "flower", "pfl")


def jobs(quick: bool) -> dict[str, Job]:
    few, many = 500, 1000
    smallest, large, largest = 100, 10_000, 100_000
    made = {f"agree: {engine}": Job(engine, *SMALL, most=1) for engine in ENGINES if engine not in OF_OTHERS}
    made |= {
        "floor": Job("floor", few, 4),
        "loop": Job("loop", few, 4),
        "fused": Job("loop, fused Adam", few, 4),
        "alone": Job("fedsim, in process", few, 8),
        "fedsim": Job("fedsim, 2 actors", many, 8),
        "one actor": Job("fedsim, 1 actor", many, 5),
        "processes": Job("fedsim, 2 processes", many, 8),
        "pfl": Job("pfl", many, 4),
        "flower": Job("flower", many, 2, most=3),
        "smallest": Job("fedsim, 2 actors, rows made", smallest, 40),
        "middle": Job("fedsim, 2 actors, rows made", many, 5),
        "large": Job("fedsim, 2 actors, rows made", large, 2, most=3),
        "largest": Job("fedsim, 2 actors, rows made", largest, 1, most=1),
    }
    # All of one size, so that one run of an engine serves all its jobs.
    return {name: Job(job.engine, *SMALL, most=1) for name, job in made.items()} if quick else made


def cpu(run: dict) -> float:
    """CPU seconds of a client update, by all processes of the engine together."""
    return run["cpu_s"] / (run["clients"] * (len(run["ends"]) - 1))


def pace(run: dict) -> float:
    """Wall seconds from the end of a round to that of the next: with whatever the engine does in between."""
    return (run["ends"][-1] - run["ends"][0]) / (len(run["ends"]) - 1)


def round_time(run: dict) -> float:
    """Wall seconds of training and averaging."""
    return median(run["seconds"][1:] or run["seconds"])


def update_time(run: dict) -> float:
    return round_time(run) / run["clients"]


def first(run: dict) -> float:
    return run["first_s"]


def driver_memory(run: dict) -> float:
    return run["peaks"]["ray::DriverActor"]


def command_memory(run: dict) -> float:
    return run["peaks"]["root"]


@dataclass(frozen=True)
class Row:
    """A line of the table: the median of `value` over runs of `top`, divided by that of `bottom`."""

    name: str
    says: str
    value: Callable[[dict], float]
    top: str
    bottom: str
    sign: str
    goal: float

    def met(self, ratio: float) -> bool:
        low = {"<=": 0, ">=": self.goal, "within": 1 / self.goal}[self.sign]
        high = inf if self.sign == ">=" else self.goal
        return low <= ratio <= high


def rows(made: dict[str, Job]) -> list[Row]:
    n = {name: f"{job.clients:,}" for name, job in made.items()}
    many = n["fedsim"]
    ours = "CPU seconds of a client update: fedsim in one process"
    all_of_it = "CPU seconds of a client update: fedsim on 2 actors, Ray's own included"
    took, peak = "time of a client update, clients:", "peak memory of the"
    grown = f"{n['largest']} / {many} clients"
    return [
        Row("cpu", f"{ours} / plain loop", cpu, "alone", "loop", "<=", 1 / 3),
        Row("cpu", f"{ours} / loop with torch's fused Adam", cpu, "alone", "fused", "<=", 1 / 2),
        Row("cpu", f"{all_of_it} / plain loop", cpu, "fedsim", "loop", "<=", 1 / 3),
        Row("cpu", f"{all_of_it} / loop with torch's fused Adam", cpu, "fedsim", "fused", "<=", 1 / 2),
        Row("floor", f"{ours} / the arithmetic alone", cpu, "alone", "floor", "<=", 1.5),
        Row("flower", f"round of {many}: Flower / fedsim, 2 workers each", pace, "flower", "fedsim", ">=", 30),
        Row("pfl", f"round of {many}: pfl-research / fedsim, 2 workers each", pace, "pfl", "fedsim", ">=", 4),
        Row("start", f"start to end of round 1 of {many}: Flower / fedsim", first, "flower", "fedsim", ">=", 4),
        Row("scale", f"{took} {n['smallest']} / {many}", update_time, "smallest", "middle", "within", 1.15),
        Row("scale", f"{took} {n['large']} / {many}", update_time, "large", "middle", "within", 1.15),
        Row("scale", f"{took} {n['largest']} / {many}", update_time, "largest", "middle", "within", 1.15),
        Row("scale", f"{peak} driver actor: {grown}", driver_memory, "largest", "middle", "<=", 1.1),
        Row("scale", f"{peak} command: {grown}", command_memory, "largest", "middle", "<=", 1.1),
        Row("actors", f"round of {many}: 1 actor / 2 actors", round_time, "one actor", "fedsim", ">=", 1.8),
        Row("ray", f"round of {many}: 2 actors / 2 plain processes", round_time, "fedsim", "processes", "<=", 1.1),
    ]


def wanted(only: list[str], made: dict[str, Job]) -> dict[str, Job]:
    """The jobs behind rows."""
    needed = {name for name in made if name.startswith("agree: ")} if "agree" in only else set()
    needed |= {name for row in rows(made) if row.name in only for name in (row.top, row.bottom)}
    return {name: job for name, job in made.items() if name in needed}


def measure(chosen: dict[str, Job], repeats: int, out: Path) -> None:
    """Runs what `rows.jsonl` does not hold yet, and adds it there run by run."""
    file = out / "rows.jsonl"
    done = {(run["job"], run["repeat"]) for run in read(file, chosen) if "error" not in run}
    todo = [
        (repeat, name, job)
        for repeat in range(repeats)
        for name, job in chosen.items()
        if repeat < job.most and (name, repeat) not in done
    ]
    absent = {name for name in ("flower", "pfl") if not (HOME / name / "bin/python").exists()}
    for engine in sorted(absent & {job.engine for _, _, job in todo}):
        print(f"{engine} is not installed in {HOME}: peers/README.md says how; its rows stay empty", file=sys.stderr)
    results: dict[tuple[int, Job], dict] = {}
    for repeat, name, job in todo:
        if job.engine in absent:
            run = {"error": ABSENT}
        else:
            run = results[repeat, job] = results.get((repeat, job)) or once(name, job, chosen, out)
        record = asdict(job) | {"job": name, "repeat": repeat} | run
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        print(f"{repeat + 1}/{min(repeats, job.most)} {name}: {run.get('error') or brief(record)}", file=sys.stderr)
        if "apart" in run and not run["apart"] <= APART:
            raise SystemExit(f"{job.engine} ends {run['apart']:.1e} of the way from the plain loop's weights")


def once(name: str, job: Job, chosen: dict[str, Job], out: Path) -> dict:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    # Ray would start the actors of an environment that `uv run` is above with fedsim's own environment.
    env |= {"OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    agree = name.startswith("agree: ")
    log = out / f"{name.replace(': ', '-').replace(' ', '_').replace(',', '')}.log"
    rounds = max(other.rounds for other in chosen.values() if other.clients == job.clients)
    folder = out / f"job-{job.clients}-{rounds}"
    if (agree or job.engine in READS_JOB) and not folder.exists():
        export = [*Job("fedsim, in process", job.clients, rounds).command(folder), "--export"]
        subprocess.run(export, env=env, cwd=ROOT, check=True)
    if job.engine in ("flower", "pfl"):
        env.pop("PYTHONPATH", None)  # whatever it names is not of their environment
    weights = out / f"{log.stem}.npy"
    run = watched([*job.command(folder), *(["--weights", str(weights)] if agree else [])], log, TIMEOUT_S, env, ROOT)
    if agree and "error" not in run:
        loop = out / "agree-loop.npy"
        if not loop.exists():
            return {"error": "nothing to agree with: the plain loop has failed"}
        run["apart"] = apart(np.load(weights), np.load(loop), np.load(folder / "start.npy"))
    return run


def apart(weights: np.ndarray, loop: np.ndarray, start: np.ndarray) -> float:
    """The distance of two engines' weights, as a share of the way that the loop's went."""
    weights, loop, start = (vector.astype(np.float64) for vector in (weights, loop, start))
    return float(np.linalg.norm(weights - loop) / np.linalg.norm(loop - start))


def brief(run: dict) -> str:
    parts = [f"{run['wall_s']:.0f} s"]
    if "cpu_s" in run:
        parts += [f"{1000 * cpu(run):.2f} ms CPU an update", f"others {100 * run['others']:.0f} %"]
    if "apart" in run:
        parts += [f"{run['apart']:.1e} apart"]
    return ", ".join([*parts, f"{round_time(run):.3f} s a round" if run["seconds"][-1] else ""]).rstrip(", ")


def read(file: Path, made: dict[str, Job]) -> list[dict]:
    """Runs of these jobs at these sizes, the last of each; one that failed may have been done again."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    runs = [
        run for run in map(json.loads, lines) if (job := made.get(run["job"])) and asdict(job).items() <= run.items()
    ]
    return list({(run["job"], run["repeat"]): run for run in runs}.values())


def table(runs: list[dict], quick: bool) -> str:
    lines = ["| row | what | ratio | lowest to highest | goal | | runs |", "| --- " * 7 + "|"]
    for row in rows(jobs(quick)):
        goal = f"{row.sign} {row.goal:.3g}" if row.sign != "within" else f"within {100 * (row.goal - 1):.0f} %"
        top, bottom = ([run for run in runs if run["job"] == name] for name in (row.top, row.bottom))
        failed = next((run["error"] for run in top + bottom if "error" in run), None)
        if failed or not top or not bottom:
            lines.append(f"| {row.name} | {row.says} | {failed or 'not run'} | | {goal} | | |")
            continue
        (a, a_low, a_high), (b, b_low, b_high) = (median_and_range(map(row.value, some)) for some in (top, bottom))
        verdict = "too small to judge" if quick else "met" if row.met(a / b) else "missed"
        span = f"{a_low / b_high:.3g} to {a_high / b_low:.3g}"
        runs_of = f"{len(top)} / {len(bottom)}"
        lines.append(f"| {row.name} | {row.says} | {a / b:.3g} | {span} | {goal} | {verdict} | {runs_of} |")
    if apart := {run["engine"]: run["apart"] for run in runs if "apart" in run}:
        worst = max(apart, key=apart.get)
        far = f"the farthest, {worst}, within {apart[worst]:.0e} of the way that the weights went"
        clients, rounds = SMALL
        lines += [
            "",
            f"After {rounds} rounds of {clients} clients {len(apart)} engines end on the same weights: {far}.",
        ]
    if others := [run["others"] for run in runs if "others" in run]:
        used = f"{100 * median(others):.0f} % of the machine in the median run, {100 * max(others):.0f} % in the worst"
        lines += ["", f"Other processes used {used}."]
    return "\n".join(lines)


def main() -> None:
    names = ["agree", *dict.fromkeys(row.name for row in rows(jobs(False)))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(names), help=f"rows, separated by commas: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--repeats", type=int, help="of each run, fewer of the slowest; 5, or 1 with --quick")
    parser.add_argument("--out", type=Path, help="folder of runs and logs; what it holds is not run again")
    parser.add_argument("--table", type=Path, help="print the table of this rows.jsonl, and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.table, jobs(args.quick)), args.quick))
        return
    only = args.only.split(",")
    if unknown := set(only) - set(names):
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    out = (args.out or Path("runs/engine-quick" if args.quick else "runs/engine")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    chosen = wanted(only, jobs(args.quick))
    measure(chosen, args.repeats or (1 if args.quick else 5), out)
    runs = read(out / "rows.jsonl", jobs(args.quick))
    print(table(runs, args.quick))
    if failed := [run["job"] for run in runs if run.get("error", ABSENT) != ABSENT]:
        raise SystemExit(f"failed: {', '.join(failed)}; their logs are in {out}")


if __name__ == "__main__":
    main()
