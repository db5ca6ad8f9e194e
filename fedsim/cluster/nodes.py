"""The machines of the cluster: what each of them has, and what it sees."""

import tempfile
from math import inf
from pathlib import Path
from typing import Any

import torch

from fedsim.cluster.placement import Node, Sizing, on

PROBE_S = 120  # for a machine to tell about its GPUs


def nodes_of(ray, sizing: Sizing) -> list[Node]:
    """The machines that are alive."""
    nodes = []
    for told in ray.nodes():
        has = told["Resources"]
        if told["Alive"]:
            gpus, memory = int(has.get("GPU", 0)), has.get("memory", inf) / 2**30
            gpu_gb = _gpu_gb(ray, told["NodeID"]) if gpus and sizing.gpu_gb_per_actor else None
            nodes.append(Node(told["NodeID"], has.get("CPU", 0.0), gpus, memory, gpu_gb))
    return nodes


def _gpu_gb(ray, node: str) -> float | None:
    """Asks a node, since Ray does not know; None where its GPUs are only logical, or it does not answer."""

    def smallest() -> float | None:
        found = [torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count())]
        return min(found, default=0) / 2**30 or None

    # One call, after which the process ends: it has a CUDA context.
    probe = ray.remote(num_cpus=0, max_calls=1, scheduling_strategy=on(node))(smallest)
    try:
        return ray.get(probe.remote(), timeout=PROBE_S)
    except ray.exceptions.RayError:
        return None


def blind(ray, folder: Path) -> list[str]:
    """Names of the machines that do not see a folder of this one's, or do not answer."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="seen-by-all-") as mark:
        probe = ray.remote(num_cpus=0, max_retries=0)(lambda file: file.exists())
        nodes = {told["NodeID"]: told["NodeManagerHostname"] for told in ray.nodes() if told["Alive"]}
        asked = {}
        for node in nodes:
            asked[probe.options(scheduling_strategy=on(node, soft=False)).remote(Path(mark.name))] = node
        ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_S)
        return sorted(nodes[node] for ref, node in asked.items() if not _says_yes(ray, ref))


def _says_yes(ray, ref: Any) -> bool:
    try:
        return ray.get(ref, timeout=0)
    except (ray.exceptions.RayError, ValueError):  # of a machine that has just been lost, or is too slow
        return False
