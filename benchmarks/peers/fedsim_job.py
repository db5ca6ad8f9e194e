"""fedsim on the common job: the only file here that knows fedsim. `config` says how the job is asked for.

With --export it writes the job for the other engines: the very rows, first weights and orders that fedsim trains with.
With --processes it trains fedsim's own chunks on plain processes, to see what Ray costs.
"""

import pickle
import tempfile
import time
from argparse import ArgumentParser, Namespace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from job import finish

from fedsim import Config, run
from fedsim.checkpoint import load_checkpoint
from fedsim.cluster.workers import Pool
from fedsim.datasets.synthetic import Synthetic
from fedsim.events import Event
from fedsim.federation import Federation
from fedsim.memory import collect_seldom, keep_freed_memory
from fedsim.params import Params, flatten
from fedsim.prepare import Experiment, prepare
from fedsim.rng import torch_rng
from fedsim.state import ServerState
from fedsim.training.round_zero import initial_params
from fedsim.training.task import Task, backbone_of
from fedsim.training.worker import ClientWorker

ROWS, ALL_ROWS, WIDTH = 64, 80, 512  # train rows of a client, two local steps; and with those that it is judged on
CHUNK = 50  # clients of a call: the same at all sizes, so that what is compared is the number of clients alone


def config(args: Namespace, out: str) -> Config:
    """The job through fedsim's own door; defaults are FedCLIP's. One client is judged, after the last round."""
    if args.made:
        data = {"dataset": {"name": "synthetic", "rows": ALL_ROWS}, "partition": "natural"}
    else:
        data = {"dataset": "features", "data_dir": _rows(args.folder.parent, args.clients), "partition": "iid"}
    return Config(
        **data,
        clients=args.clients,
        chunk=CHUNK,
        train_share=ROWS / ALL_ROWS,
        rounds=args.rounds,
        actors=args.actors,
        eval_every=args.rounds,
        eval_clients=1,
        cache_dir=args.folder.parent / "cache",
        out=out,
    )


def simulated(args: Namespace, out: str) -> tuple[list[float], list[float], Params]:
    """A run: when each round ended, how long it took, and the last weights.

    The last round's end is left out, because evaluation may precede its event.
    """
    ends: list[float] = []

    def tell(event: Event) -> None:
        if event.stage == "training":
            ends.append(time.time())

    asked = config(args, out)
    report = run(asked, tell)
    state = load_checkpoint(Path(out), asked.experiment())[0]
    return ends[:-1] or ends, report.tables().rounds.seconds.tolist(), state.params


def on_processes(args: Namespace, out: str) -> tuple[list[float], list[float], Params]:
    """The same rounds, chunks and sums without Ray."""
    experiment = prepare(config(args, out))
    task, state = _begin(experiment)
    ends, seconds = [], []
    with _Processes(args.processes, Path(out)) as pool:
        workers = pool.workers(ClientWorker, experiment.data.source, experiment.clients, None)
        federation = Federation(experiment, task, workers, state.params)
        for planned in federation.schedule(0):
            began = time.perf_counter()
            state, _ = federation.train(state, planned)
            seconds.append(time.perf_counter() - began)
            ends.append(time.time())
    return ends, seconds, state.params


def export(args: Namespace, out: str) -> None:
    """Writes the folder that `job.Job` reads, whole or not at all."""
    experiment = prepare(config(args, out))
    task, state = _begin(experiment)
    part = args.folder.with_name(f"part-{args.folder.name}")
    part.mkdir(parents=True, exist_ok=True)
    x, y = _train_rows(experiment)
    np.save(part / "x.npy", x)
    np.save(part / "y.npy", y)
    np.save(
        part / "text.npy", experiment.data.source.class_embeddings.vectors.astype(np.float32)
    )  # as a run in float32 rounds them
    np.save(part / "start.npy", flatten(state.params))
    draws = [
        torch.randperm(ROWS, generator=torch_rng(task.seed, "batches", round, client))
        for round in range(1, args.rounds + 1)
        for client in range(args.clients)
    ]
    np.save(part / "order.npy", torch.stack(draws).reshape(args.rounds, args.clients, ROWS).numpy().astype(np.uint8))
    part.rename(args.folder)


def _train_rows(experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """(C, n, D) float32 and (C, n), as fedsim's trainers see them."""
    rows = [experiment.clients[k].train for k in range(experiment.clients.trainers)]
    if {len(mine) for mine in rows} != {ROWS}:
        raise SystemExit(f"the common job needs {ROWS} train rows for each client")
    x, y = experiment.data.source.representations.features, experiment.data.source.y
    return np.stack([x[mine] for mine in rows]).astype(np.float32), np.stack([y[mine] for mine in rows])


def _begin(experiment: Experiment) -> tuple[Task, ServerState]:
    asked = experiment.config
    task = Task(asked.method, asked.server, asked.seed, asked.dtype, asked.rounds)
    return task, ServerState(0, initial_params(task, backbone_of(experiment.data.source)))


def _rows(scratch: Path, clients: int) -> Path:
    """A folder with the rows of that many clients, as `--dataset features` reads them."""
    folder = scratch / f"rows-{clients}"
    if folder.exists():
        return folder
    made = Synthetic(rows=ALL_ROWS).load(None)
    rows = np.arange(clients * ALL_ROWS)
    part = scratch / f"part-{folder.name}"
    part.mkdir(parents=True, exist_ok=True)
    feature = pa.FixedSizeListArray.from_arrays(pa.array(made.x[rows].reshape(-1)), WIDTH)
    label, domain = (
        [names[k] for k in index[rows]] for names, index in ((made.classes, made.y), (made.domains, made.domain))
    )
    pq.write_table(pa.table({"feature": feature, "label": label, "domain": domain}), part / "features.parquet")
    classes = {"class": list(made.classes), "prototype": made.class_embeddings.tolist()}
    pq.write_table(pa.table(classes), part / "classes.parquet")
    part.rename(folder)
    return folder


class _Processes(Pool):
    """Workers on plain processes, behind the interface of fedsim's pools of actors."""

    def __init__(self, count: int, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.count, self.scratch, self.maps = count, scratch, 0
        self.processes, self.loaded = None, 0

    def check_shared_folder(self, folder):
        pass  # all are on this machine

    def map(self, workers, method, items, *shared):
        if workers.number != self.loaded:
            self.close()
            self.processes, self.loaded = get_context("spawn").Pool(self.count, _start, workers.spec), workers.number
        self.maps += 1
        file = self.scratch / f"{self.maps}.pickle"  # once for all calls
        file.write_bytes(pickle.dumps(shared))
        yield from self.processes.imap(_call, [(file, method, item) for item in items])

    def close(self):
        if self.processes:
            self.processes.terminate()

    def _ship(self, part):
        return part


def _start(factory, *args) -> None:
    global worker
    torch.set_num_threads(1)
    keep_freed_memory()  # both as in fedsim's actors
    collect_seldom()
    worker = factory(*args, "cpu")


def _call(call: tuple):
    file, name, item = call
    return getattr(worker, name)(*_read(file), item)


@lru_cache(maxsize=1)
def _read(file: Path) -> tuple:
    return pickle.loads(file.read_bytes())


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="the common job")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--actors", type=int, default=0)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--made", action="store_true", help="rows made on demand, for more clients than memory holds")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--weights", type=Path, help="write the last round's (P,) here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        if args.export:
            export(args, f"{out}/run")
        else:
            ends, seconds, params = (on_processes if args.processes else simulated)(args, f"{out}/run")
            finish(args, ends, flatten(params), seconds)
