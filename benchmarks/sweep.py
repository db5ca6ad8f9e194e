"""What a sweep costs on top of its trials: the same trials by `fedsim sweep` and in a bare loop, one at a time.

    uv run python benchmarks/sweep.py
    uv run python benchmarks/sweep.py --quick       # three trials of one round: does it all run?

Both train in one process on the same features, so what differs is Optuna's storage, Ray Tune and the measures that are
reported after each round. The first trial, for which a process is started, is given apart.
"""

import shutil
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from _runs import add_data, data_of, parsed, parser_of

from fedsim import Config
from fedsim.cluster.pool import open_pool
from fedsim.prepare import encode_experiment, sizing_of
from fedsim.simulate import rounds
from fedsim.sweep.config import Sweep
from fedsim.sweep.prepare import prepare_sweep
from fedsim.sweep.results import SweepResult
from fedsim.sweep.search import run_sweep
from fedsim.sweep.trial import experiments_of


def by_sweep(sweep: Sweep) -> tuple[SweepResult, float, float]:
    """What it found; seconds from the start to the end of the first trial, and, by median, of a later one."""
    ends = [time.perf_counter()]

    def on_event(event) -> None:
        if event.stage == "trials" and event.done == len(ends):
            ends.append(time.perf_counter())

    found = run_sweep(sweep, on_event)
    first, *later = (after - before for before, after in pairwise(ends))
    return found, first, statistics.median(later)


def by_loop(sweep: Sweep, found: SweepResult, folder: Path) -> float:
    """Median seconds of a trial, without progress events."""
    prepared = prepare_sweep(sweep.model_copy(update={"out": folder}))
    base = encode_experiment(prepared.base, sizing_of(sweep.config), lambda event: None)
    seconds = []
    with open_pool(sizing_of(sweep.config), 1) as pool:
        for number, lr in enumerate(found.trials["fedclip.lr"]):
            began = time.perf_counter()
            (experiment,) = experiments_of(base, {"method": {"lr": lr}}, sweep.tuning_seeds, folder, number)
            experiment.folder.mkdir(parents=True)
            for _ in rounds(experiment, pool):
                pass
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = parser_of(__doc__)
    add_data(parser)
    parser.add_argument("--held-out", default="ink")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--cohort", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parsed(parser, clients=4, cohort=2, rounds=1, trials=3, repeats=1)
    sizes = {"clients": args.clients, "cohort": args.cohort, "rounds": args.rounds}
    config = Config(**data_of(args), **sizes, partition="bootstrap", held_out=args.held_out, actors=0)
    scratch = Path(tempfile.mkdtemp())
    rows = []
    try:
        for repeat in range(args.repeats):
            sweep = Sweep(
                config=config,
                search=("method.lr",),
                trials=args.trials,
                sampler="random",
                pruner="none",
                report_seeds=(),
                at_once=1,
                out=scratch / f"sweep-{repeat}",
            )
            found, first, later = by_sweep(sweep)
            bare = by_loop(sweep, found, scratch / f"loop-{repeat}")
            rows.append((first, later, bare))
            print(
                f"repeat {repeat}: first {first:.2f} s, later {1e3 * later:.0f} ms, bare {1e3 * bare:.0f} ms",
                flush=True,
            )
    finally:
        shutil.rmtree(scratch)
    first, later, bare = map(statistics.median, zip(*rows, strict=True))
    print(f"\n| {args.trials} trials of {args.clients} clients, {args.rounds} rounds; medians of {args.repeats} | |")
    print("| --- | --- |")
    print(f"| a trial, in a bare loop | {1e3 * bare:.0f} ms |")
    print(f"| a trial, in a sweep | {1e3 * later:.0f} ms |")
    print(f"| a sweep's overhead on a trial | {1e3 * (later - bare):.0f} ms, {later / bare - 1:.0%} |")
    print(f"| until the first trial has ended: cluster, process, features | {first:.1f} s |")


if __name__ == "__main__":
    main()
