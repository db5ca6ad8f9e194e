"""The last stage: one file of half-precision weights that open_clip loads.  Source: ours."""

from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save
from torch import Tensor, nn

from align import ImageHead
from distil import CONFIG

MODEL = CONFIG.with_suffix(".safetensors")


@torch.no_grad()
def assemble(clip: Any, network: nn.Module, head: ImageHead, scale: Tensor) -> None:
    """Puts the tower without its classifier, the folded projection and the scale into `clip`."""
    trunk = {k: v for k, v in network.state_dict().items() if not k.startswith("classifier")}
    clip.visual.trunk.load_state_dict(trunk)
    weight, bias = head.folded()
    clip.visual.head.proj.weight.copy_(weight)
    clip.visual.head.proj.bias.copy_(bias)
    clip.logit_scale.fill_(scale)


def write(clip: Any, file: Path) -> None:
    """Writes half-precision safetensors, whole or not at all."""
    halves = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    unfinished = file.with_suffix(".part")
    unfinished.write_bytes(save({k: v.contiguous() for k, v in halves.items()}))
    unfinished.rename(file)


def load(file: Path) -> tuple[Any, Any, Any]:
    """(model, preprocessing, tokenizer) just as a user gets them."""
    open_clip.add_model_config(CONFIG)
    clip: Any
    clip, _, preprocess = open_clip.create_model_and_transforms(CONFIG.stem, pretrained=str(file))
    return clip.eval(), preprocess, open_clip.get_tokenizer(CONFIG.stem)
