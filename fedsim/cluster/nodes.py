"""The machines of the cluster: what each of them has, and which folders it sees."""

import tempfile
from math import inf
from pathlib import Path
from typing import Any

import torch

from fedsim.cluster.placement import Node, Sizing, node_affinity

PROBE_S = 120  # for a machine to answer a probe


def nodes_of(ray: Any, sizing: Sizing) -> list[Node]:
    """The machines that are alive; with the memory of their GPUs where the sizing depends on it."""
    nodes = []
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"]:
            gpus, memory = int(resources.get("GPU", 0)), resources.get("memory", inf) / 2**30
            gpu_gb = _gpu_gb(ray, node["NodeID"]) if gpus and sizing.gpu_gb_per_actor else None
            nodes.append(Node(node["NodeID"], resources.get("CPU", 0.0), gpus, memory, gpu_gb))
    return nodes


def nodes_without_access(ray: Any, folder: Path) -> list[str]:
    """Names of the machines that do not see a folder of this machine, or do not answer."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="seen-by-all-") as mark:
        probe = ray.remote(num_cpus=0, max_retries=0)(lambda file: file.exists())
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        probes = {}
        for node in names:
            strategy = node_affinity(node, soft=False)
            probes[probe.options(scheduling_strategy=strategy).remote(Path(mark.name))] = node
        ray.wait(list(probes), num_returns=len(probes), timeout=PROBE_S)
        return sorted(names[node] for ref, node in probes.items() if not _is_true(ray, ref))


def this_node(ray: Any) -> str:
    """The id of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def _gpu_gb(ray: Any, node: str) -> float | None:
    """Asks a node, since Ray does not know; None where its GPUs are only logical, or it does not answer."""

    def smallest() -> float | None:
        sizes = [torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count())]
        return min(sizes, default=0) / 2**30 or None

    # One call, after which the process ends: it has a CUDA context.
    probe = ray.remote(num_cpus=0, max_calls=1, scheduling_strategy=node_affinity(node))(smallest)
    try:
        return ray.get(probe.remote(), timeout=PROBE_S)
    except ray.exceptions.RayError:
        return None


def _is_true(ray: Any, ref: Any) -> bool:
    try:
        return ray.get(ref, timeout=0)
    except (ray.exceptions.RayError, ValueError):  # the machine has just been lost, or is too slow
        return False
