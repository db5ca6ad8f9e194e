"""The common job as any engine sees it: rows, first weights and the order of rows, read from one folder.

`fedsim_job.py --export` writes the folder. This file needs torch and numpy only, for it is read inside the
environments of other simulators. C clients, n = 64 rows each, D = 512 wide, 7 classes, R rounds, P = 525,312.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

BATCH = 32
SCALE = 100.0


class Adapter(nn.Sequential):
    """FedCLIP's: softmax attention over the dimensions of a feature."""

    def __init__(self, width: int = 512) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Softmax(dim=-1))


class Job:
    """The folder, memory-mapped: each process maps it for itself."""

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        self.x = np.load(folder / "x.npy", mmap_mode="r")  # (C, n, D) float32
        self.y = np.load(folder / "y.npy", mmap_mode="r")  # (C, n) int64
        self.order = np.load(folder / "order.npy", mmap_mode="r")  # (R, C, n): of round r + 1
        self.text = torch.from_numpy(np.load(folder / "text.npy"))  # (7, D), unit rows
        self.start = np.load(folder / "start.npy")  # (P,)

    def adapter(self) -> Adapter:
        """The adapter of round 0."""
        adapter = Adapter(self.text.shape[1])
        with torch.no_grad():
            pieces = torch.from_numpy(self.start.copy()).split([p.numel() for _, p in named(adapter)])
            for (_, param), piece in zip(named(adapter), pieces, strict=True):
                param.copy_(piece.view_as(param))
        return adapter

    def rows(self, client: int, round: int) -> tuple[Tensor, Tensor]:
        """A client's rows in the order in which it sees them in this round (1 is the first)."""
        order = self.order[round - 1, client].astype(np.int64)
        return torch.from_numpy(self.x[client][order]), torch.from_numpy(self.y[client][order])

    def batches(self, client: int, round: int) -> DataLoader:
        return DataLoader(TensorDataset(*self.rows(client, round)), BATCH)


def loss_of(adapter: nn.Module, x: Tensor, y: Tensor, text: Tensor) -> Tensor:
    """CLIP's contrastive loss of a batch against the texts of its own labels."""
    logits = SCALE * normalize(adapter(x) * x, dim=-1) @ text[y].T
    own = torch.arange(len(y), device=y.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def adam(params, lr: float = 5e-5, fused: bool | None = None) -> torch.optim.Optimizer:
    """As in FedCLIP's code; a new one for each client and round."""
    return torch.optim.Adam(params, lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=fused)


def local_epoch(adapter: nn.Module, batches: DataLoader, text: Tensor, fused: bool | None = None) -> float:
    """Trains in place, as anybody would write it; the mean loss over local steps, in nats."""
    optimizer = adam(adapter.parameters(), fused=fused)
    losses = []
    for x, y in batches:
        loss = loss_of(adapter, x, y, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def named(adapter: nn.Module) -> list[tuple[str, Tensor]]:
    return sorted(adapter.named_parameters())


def flat(adapter: nn.Module) -> np.ndarray:
    """(P,) the parameters in the order of their names."""
    return torch.cat([param.detach().flatten() for _, param in named(adapter)]).numpy()


def arguments() -> Namespace:
    """What engine.py asks of every engine. One thread a process: more only slow this adapter down."""
    parser = ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="the common job")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fused", action="store_true", default=None, help="torch's fused Adam")
    parser.add_argument("--weights", type=Path, help="write the last round's (P,) here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    return args


def finish(args: Namespace, ends: list[float], weights: np.ndarray, seconds: list[float] | None = None) -> None:
    """Prints the line that engine.py waits for.

    Args:
        ends: wall time (of time.time) at the end of each round, as far as those of the job's kind were seen.
        seconds: of each round, where the engine tells; otherwise the time from end to end.
    """
    if args.weights:
        np.save(args.weights, weights)
    seconds = seconds or [None, *np.diff(ends).tolist()]
    print("RESULT " + json.dumps({"ends": ends, "seconds": seconds, "torch": torch.__version__}), flush=True)
