"""Where the actors of a pool run, and which share of a machine each of them has."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from fedsim.errors import InputError

ACTOR_GB = 0.5  # memory of an actor before it loads any data; measured: 0.33 to 0.47
PER_GPU = 2  # actors on a GPU of unknown memory: one computes while the other prepares its batch
MOST_PER_GPU = 8  # each has a CUDA context of its own, and they take turns
MOST_PER_CPU = 16  # more would only take memory and turns; some tests and benchmarks have several on each


@dataclass(frozen=True)
class Sizing:
    """What each pool of a run may use; None is chosen from what the cluster offers.

    Attributes:
        actors: 0 is one worker in this process.
        gpus_per_actor: a share of one GPU, in [0, 1].
        gpu_gb_per_actor: GPU memory that an actor needs, which decides how many share a GPU.
        threads_per_actor: threads of torch, and CPUs of an actor. Another number may round sums differently.
        call_timeout_s: seconds that a call may run before it is given to another actor as well.
        grouped: the pool takes the bundles, after the first, of the placement group that this process is in.
    """

    actors: int | None = None
    gpus_per_actor: float | None = None
    gpu_gb_per_actor: float | None = None
    threads_per_actor: int = 1
    call_timeout_s: float | None = None
    grouped: bool = False


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster has; `gpu_gb` is the memory of its smallest GPU, None where it is not known."""

    id: str
    cpus: float
    gpus: int = 0
    memory_gb: float = inf
    gpu_gb: float | None = None


@dataclass(frozen=True)
class Placement:
    """Where an actor runs: the id of a node, or the index of a bundle of this process's group; and its share of it."""

    node: str | int
    num_cpus: float
    num_gpus: float

    def strategy(self) -> Any:
        """Ray's scheduling strategy. When a node is lost, its actors restart on others that have room."""
        if isinstance(self.node, str):
            return node_affinity(self.node)
        from ray.util import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = get_current_placement_group()
        assert group, "only a process in a placement group plans with bundles"
        return PlacementGroupSchedulingStrategy(group, self.node)


def plan(sizing: Sizing, jobs: int, nodes: Sequence[Node]) -> list[Placement]:
    """One placement for every actor of a pool, node by node.

    Where there is a GPU, all actors have a share of one: a CPU next to it would round sums differently.

    Args:
        jobs: calls at a time; further actors would only wait.

    Raises:
        InputError: the cluster does not have room for the sizing.
    """
    use_gpus = sizing.gpus_per_actor != 0 and any(node.gpus for node in nodes)
    room = [_room(sizing, node, use_gpus) for node in nodes]
    _check_room(sizing, nodes, room, use_gpus)
    placements = []
    for node, count in zip(nodes, _spread(sizing.actors or max(1, min(sum(room), jobs)), room), strict=True):
        if count:
            # Only whole divisors of a GPU pack without stranding a part of one.
            gpu = sizing.gpus_per_actor or 1 / ceil(count / node.gpus) if use_gpus else 0.0
            cpu = min(float(sizing.threads_per_actor), node.cpus / count)
            placements += [Placement(node.id, _floor(cpu), _floor(gpu))] * count
    return placements


def _check_room(sizing: Sizing, nodes: Sequence[Node], room: Sequence[int], use_gpus: bool) -> None:
    actors, total = sizing.actors or 0, sum(room)
    if sizing.gpus_per_actor and not use_gpus:
        raise InputError(f"--gpus-per-actor {sizing.gpus_per_actor:g} on a cluster without a GPU")
    if not total:
        raise InputError("no node of the cluster has room for an actor; try `ray status`")
    if use_gpus and sizing.gpus_per_actor and actors > total:
        share = f"{sizing.gpus_per_actor:g} GPU"
        raise InputError(f"--actors {actors} of {share} each, but the cluster's GPUs have room for {total}")
    most = MOST_PER_CPU * sum(ceil(node.cpus) for node in nodes)
    if not use_gpus and actors > most:
        raise InputError(f"--actors {actors}, but {most // MOST_PER_CPU} CPUs are enough for {most} at most")


def _spread(actors: int, room: Sequence[int]) -> list[int]:
    """How many actors go to each node, so that all nodes are filled in proportion to their room."""
    counts = [0] * len(room)
    for _ in range(actors):
        counts[min((k for k in range(len(room)) if room[k]), key=lambda k: (counts[k] + 1) / room[k])] += 1
    return counts


def bundles(ray: Any) -> list[Placement]:
    """One placement for every bundle of this process's placement group but the first, which this process takes."""
    specs = ray.util.get_current_placement_group().bundle_specs
    return [Placement(k, spec.get("CPU", 0.0), spec.get("GPU", 0.0)) for k, spec in enumerate(specs) if k]


def _room(sizing: Sizing, node: Node, use_gpus: bool) -> int:
    """How many actors a node has room for."""
    if not use_gpus:
        most = max(int(node.cpus / sizing.threads_per_actor), node.cpus > 0)
    elif sizing.gpus_per_actor:
        most = node.gpus * int(1 / sizing.gpus_per_actor)
    elif sizing.gpu_gb_per_actor and node.gpu_gb:
        # A tenth stays free: users' estimates leave the CUDA context out.
        most = node.gpus * min(MOST_PER_GPU, int(0.9 * node.gpu_gb / sizing.gpu_gb_per_actor))
    else:
        most = node.gpus * PER_GPU
    return most if sizing.actors else int(min(most, max(1.0, node.memory_gb / ACTOR_GB)))


def _floor(share: float) -> float:
    return int(share * 10_000) / 10_000  # the finest share that Ray knows


def sizes_of(placements: list[Placement], threads: int) -> str:
    """Such as `2 actors of 1 CPU on 1 node`."""
    unit = "GPU" if placements[0].num_gpus else "CPU"
    shares = sorted({place.num_gpus or place.num_cpus for place in placements})
    share = f"{shares[0]:g}" if len(shares) == 1 else f"{shares[0]:g} to {shares[-1]:g}"
    actors, nodes = len(placements), len({place.node for place in placements})
    each = f", {threads} threads each" if threads > 1 else ""
    where = f"on {nodes} node{'s' * (nodes > 1)}" if isinstance(placements[0].node, str) else "in a placement group"
    return f"{actors} actor{'s' * (actors > 1)} of {share} {unit} {where}{each}"


def node_affinity(node: str, soft: bool = True) -> Any:
    """Ray's strategy that puts a task or an actor on a node; a soft one gives way when the node is lost."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft)
