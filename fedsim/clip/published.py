"""What open_clip says of published weights: their activation and preprocessing, by tag, digest or repository."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.clip.architectures import import_open_clip
from fedsim.clip.key import sha256_of

PREPROCESSING = "mean", "std", "interpolation", "resize_mode"


def published_as(file: Path, whole: bool = False) -> dict[str, dict]:
    """open_clip's descriptions of the published weights with the content of this file, by architecture.

    Published weights are recognized if their URL contains their digest (OpenAI's) or its start (open_clip's releases).

    Args:
        whole: compare whole digests only, because a file whose digest has a given start can be forged.
    """
    digest = sha256_of(file)
    pretrained = import_open_clip().pretrained
    published = [(model, pretrained.get_pretrained_cfg(model, tag)) for model, tag in pretrained.list_pretrained()]
    stated = re.compile(r"/([0-9a-f]{64})/" if whole else r"(?:/|-)([0-9a-f]{64}|[0-9a-f]{8})(?:/|\.pth?$)")
    return {
        model: about
        for model, about in published
        if (match := stated.search(about.get("url", ""))) and digest.startswith(match[1])
    }


def of_repository(model: str, file: Path) -> dict[str, Any]:
    """open_clip's description of the tag whose Hugging Face repository is in the file's path."""
    pretrained = import_open_clip().pretrained
    for tag in pretrained.list_pretrained_tags_by_model(model):
        about = pretrained.get_pretrained_cfg(model, tag)
        if about.get("hf_hub") and not {cache_folder(about), _repository(about)[1]}.isdisjoint(file.parts):
            return about
    return {}


def _repository(about: Mapping[str, Any]) -> list[str]:
    """Owner and name of a repository on the Hugging Face hub."""
    return about["hf_hub"].split("/")[:2]


def cache_folder(about: Mapping[str, Any]) -> str:
    """The folder of a repository in the hub's cache."""
    return "--".join(["models", *_repository(about)])


def downloaded() -> list[str]:
    """Published weights in the cache of the Hugging Face hub on this machine, such as `ViT-B-32 openai`."""
    from huggingface_hub.constants import HF_HUB_CACHE

    pretrained = import_open_clip().pretrained
    published = ((model, tag, pretrained.get_pretrained_cfg(model, tag)) for model, tag in pretrained.list_pretrained())
    there = {folder.name for folder in Path(HF_HUB_CACHE).glob("models--*")}
    return [f"{model} {tag}" for model, tag, about in published if about.get("hf_hub") and cache_folder(about) in there]


def common_preprocessing(model: str) -> dict[str, Any]:
    """The preprocessing of an architecture's published weights if it is the same for all, as for SigLIP."""
    pretrained = import_open_clip().pretrained
    tags = pretrained.list_pretrained_tags_by_model(model)
    each = [{name: pretrained.get_pretrained_cfg(model, tag)[name] for name in PREPROCESSING} for tag in tags]
    return each[0] if each and each.count(each[0]) == len(each) else {}


def assumed_activation(model: str, file: Path) -> str:
    """The activation assumed for a file that was not recognized, if published weights of its architecture differ."""
    open_clip = import_open_clip()
    if open_clip.get_model_config(model).get("quick_gelu") or f"{model}-quickgelu" not in open_clip.list_models():
        return ""
    return (
        f"{file.name} is read with the activation GELU, as {model} is defined; weights by OpenAI and others trained "
        f"with QuickGELU need --backbone {model}-quickgelu"
    )
