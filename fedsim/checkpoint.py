"""A run in a file: the server's state and the report so far, whole or not at all, never pickled."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsim.errors import InputError, listing
from fedsim.report import Report
from fedsim.servers import ServerState

NAME = "checkpoint.safetensors"


def save_checkpoint(folder: Path, experiment: dict[str, Any], state: ServerState, report: Report) -> None:
    """Writes `folder/checkpoint.safetensors` in place of the last one."""
    tensors = {f"params/{name}": tensor for name, tensor in state.params.items()}
    for slot, values in state.slots.items():
        tensors |= {f"slots/{slot}/{name}": tensor for name, tensor in values.items()}
    tensors |= {f"private/{client}": torch.from_numpy(vector) for client, vector in state.private.items()}
    tensors |= {f"report/{name}": tensor for name, tensor in report.tensors().items()}
    about = {"experiment": experiment, "round": state.round, "report": report.about()}
    write_safetensors(folder / NAME, tensors, about)


def load_checkpoint(folder: Path, experiment: dict[str, Any]) -> tuple[ServerState, Report] | None:
    """What `save_checkpoint` wrote, or None where there is nothing yet.

    Raises:
        InputError: the file is cut short, or belongs to another experiment; the message names the fields.
    """
    file = folder / NAME
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as reader:
            about = json.loads((reader.metadata() or {})["fedsim"])
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        theirs = about["experiment"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(f"{file} is not a whole checkpoint ({error}); delete it to start again") from None
    refuse_another(folder, theirs, experiment)
    slots: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _below("slots/", tensors).items():
        slot, _, param = name.partition("/")
        slots.setdefault(slot, {})[param] = tensor
    private = {int(client): tensor.numpy() for client, tensor in _below("private/", tensors).items()}
    state = ServerState(about["round"], _below("params/", tensors), slots, private)
    return state, Report.restore(_below("report/", tensors), about["report"])


def refuse_another(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises InputError, naming the fields that differ, when a folder holds another experiment."""
    ours = json.loads(json.dumps(ours))
    differ = [
        f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differ:
        raise InputError(f"{folder} holds another experiment ({listing(differ)}); give another --out")


def write_safetensors(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a safetensors file whole or not at all, with `about` as JSON in its metadata."""
    part = file.with_name(f"part-{file.name}")
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    # One entry: safetensors writes several in any order, and the same run would not give the same bytes.
    part.write_bytes(save(whole, metadata={"fedsim": json.dumps(about)}))  # save_file would hide it from the group
    part.replace(file)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
