"""What each trial gets of a cluster, and how many trials fit at once."""

from dataclasses import dataclass, replace

from fedsim.cluster.nodes import nodes_of
from fedsim.cluster.placement import Sizing, plan
from fedsim.errors import InputError
from fedsim.prepare import sizing_of
from fedsim.sweep.config import Sweep

MANY = 1_000_000  # more workers than any cluster has room for
TINY = 1 << 20  # bytes reserved for a trial's process when its actors do the work; Ray refuses an empty bundle


@dataclass(frozen=True)
class TrialResources:
    """What each trial gets, and how many run at once.

    Attributes:
        sizing: of a trial's pool.
        bundles: of a trial's placement group: its process, then one for each actor.
        at_once: concurrent trials.
        several_machines: whether the cluster has more than one.
    """

    sizing: Sizing
    bundles: list[dict[str, float]]
    at_once: int
    several_machines: bool

    @classmethod
    def of(cls, ray, sweep: Sweep) -> "TrialResources":
        """Raises InputError when the trials of `sweep` do not fit."""
        sizing = sizing_of(sweep.config)
        nodes = nodes_of(ray, sizing)
        # All workers that the cluster has room for: a trial takes one, or as many as it has actors.
        workers = plan(replace(sizing, actors=None), MANY, nodes)
        per_trial = max(1, sizing.actors or 0)
        cpus, gpus = (min(getattr(worker, name) for worker in workers) for name in ("num_cpus", "num_gpus"))
        bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        room = len(workers) // per_trial
        size = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        if not room:
            raise InputError(
                f"--actors {per_trial} for each trial, but the cluster has room for {len(workers)} of {size}"
            )
        if sweep.at_once and sweep.at_once > room:
            trial = f"{per_trial} actors of {size}" if sizing.actors else size
            raise InputError(f"--at-once {sweep.at_once} trials of {trial} each, but the cluster has room for {room}")
        if not sizing.actors:
            bundles, sizing = [bundle], replace(sizing, actors=0, gpus_per_actor=gpus)
        else:
            bundles, sizing = [{"CPU": 0, "memory": TINY}, *[bundle] * per_trial], replace(sizing, grouped=True)
        return cls(sizing, bundles, sweep.at_once or room, len(nodes) > 1)

    def describe(self, trials: int) -> str:
        """Such as `2 at once, each with 1 CPU`."""
        size = " and ".join(f"{share:g} {unit}" for unit, share in self.bundles[-1].items())
        actors = len(self.bundles) - 1
        trial = f"{actors} actor{'s' * (actors > 1)} of {size}" if actors else size
        return f"{min(self.at_once, trials)} at once, each with {trial}"
