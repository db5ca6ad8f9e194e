"""Folders that hold a CLIP with its architecture: open_clip's (`open_clip_config.json`) and transformers' `CLIPModel`.

`local-dir:PATH` names a folder on this machine, `hf-hub:OWNER/NAME` a repository of the Hugging Face hub.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.clip.hub import hub_or_cache
from fedsim.errors import InputError, first_line, listing

HUB, LOCAL = "hf-hub:", "local-dir:"
OPEN_CLIP, TRANSFORMERS = "open_clip_config.json", "config.json"
# The names that the two programs give to the weights, next to their file with the architecture.
NAMES = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    TRANSFORMERS: ("model.safetensors", "pytorch_model.bin"),
}
PREPROCESSOR = "preprocessor_config.json"  # transformers' image preprocessing; optional

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)
_STEPS = "do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"  # of a preprocessor

# transformers' defaults, which its config.json leaves out.
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VISION |= {"image_size": 224, "patch_size": 32, "num_channels": 3}
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT |= {"vocab_size": 49408, "max_position_embeddings": 77}
_BOTH: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_ACTIVATIONS: dict[Any, bool] = {"quick_gelu": True, "gelu": False}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which transformers writes

# Parts of transformers' names of tensors, and of open_clip's.
_RENAMED = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}


@dataclass(frozen=True)
class Folder:
    """A folder that holds a CLIP.

    Attributes:
        file: the weights.
        config: what the folder says of the architecture and the preprocessing.
        architecture: arguments of open_clip's CLIP, for a `CLIPModel` of transformers; otherwise empty.
        about: its preprocessing, by open_clip's names; empty if open_clip reads it itself.
    """

    path: Path
    file: Path
    config: Mapping[str, Any]
    architecture: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def tokenizer(self) -> list[Path]:
        """The files of a tokenizer other than CLIP's, which open_clip reads from the folder."""
        if not _has_tokenizer(self.config):
            return []
        return [self.path / name for name in TOKENIZER if (self.path / name).is_file()]


def find_folder(backbone: str) -> Folder:
    """The folder that `hf-hub:OWNER/NAME` or `local-dir:PATH` names; what is on the hub is downloaded.

    Raises:
        InputError: there is no such folder or repository, it cannot be reached, or it holds no CLIP.
    """
    if backbone in (HUB, LOCAL):
        raise InputError(f"--backbone {backbone} needs a folder or a repository")
    if backbone.startswith(HUB):
        path = _download(backbone, backbone.removeprefix(HUB))
    else:
        # Absolute: trials of a sweep and workers on other machines run in other folders.
        path = Path(os.path.expanduser(backbone.removeprefix(LOCAL))).absolute()
    if not path.is_dir():
        raise InputError(f"--backbone {backbone}: {path} is not a folder")
    if (path / OPEN_CLIP).is_file():
        config = _read(path / OPEN_CLIP)
        if not isinstance(config.get("model_cfg"), dict):
            raise InputError(f"{path / OPEN_CLIP} has no model_cfg, which says the architecture")
        if _asks_to_run_code(config):
            raise InputError(
                f"{path / OPEN_CLIP} sets trust_remote_code, which would run code of the folder; remove it"
            )
        return Folder(path, _weights(path, OPEN_CLIP), config, {}, {})
    if (path / TRANSFORMERS).is_file():
        config = _read(path / TRANSFORMERS)
        architecture = _architecture(config, path / TRANSFORMERS)
        preprocessor = path / PREPROCESSOR
        about = _preprocessing(_read(preprocessor), preprocessor) if preprocessor.is_file() else {}
        return Folder(path, _weights(path, TRANSFORMERS), {"architecture": architecture}, architecture, about)
    names = sorted(file.name for file in path.iterdir())
    raise InputError(f"{path} has neither {OPEN_CLIP} nor {TRANSFORMERS}; there are: {listing(names) or 'no files'}")


def _has_tokenizer(config: Mapping[str, Any]) -> bool:
    """Whether an open_clip config names a tokenizer of transformers in place of CLIP's."""
    model = config.get("model_cfg")
    text = model.get("text_cfg") if isinstance(model, Mapping) else None
    return isinstance(text, Mapping) and "hf_tokenizer_name" in text


def _asks_to_run_code(config: Any) -> bool:
    """Whether a config sets `trust_remote_code` anywhere, which open_clip would pass on to transformers."""
    if isinstance(config, Mapping):
        return bool(config.get("trust_remote_code")) or any(map(_asks_to_run_code, config.values()))
    return isinstance(config, list) and any(map(_asks_to_run_code, config))


def is_transformers(names: Mapping[str, Any]) -> bool:
    """Whether tensors have the names of transformers' `CLIPModel`."""
    return "visual_projection.weight" in names


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `CLIPModel`, by open_clip's names and in its shapes."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".position_ids"):  # 0, 1, 2, ..., which older versions saved
            continue
        if ".q_proj." in name:  # open_clip has queries, keys and values in one tensor
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            name, tensor = name.replace(".self_attn.q_proj.", ".attn.in_proj_"), torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif name in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T
        for theirs, ours in _RENAMED.items():
            name = name.replace(theirs, ours)
        result[name] = tensor
    return result


def _download(backbone: str, name: str) -> Path:
    """The folder of a repository in the hub's cache, where all files that fedsim reads are now."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError

    reason: Exception = FileNotFoundError("no such repository")
    try:
        with hub_or_cache():
            for config, names in NAMES.items():
                for weights in names:
                    try:
                        return _download_files(name, config, weights)
                    except EntryNotFoundError as error:
                        reason = error
    except Exception as error:
        reason = error
    raise InputError(
        f"{backbone} is not on this machine and cannot be read from the hub ({first_line(reason)}); run once where it "
        f"can and copy its folder of the cache ({constants.HF_HUB_CACHE}) here, or use the embedded model: "
        "--backbone tiny"
    ) from reason


def _download_files(name: str, config: str, weights: str) -> Path:
    """The folder of a repository in the hub's cache; of other files than these two, it may lack any."""
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(name, config))
    hf_hub_download(name, weights)
    others = (PREPROCESSOR,) if config == TRANSFORMERS else TOKENIZER if _has_tokenizer(_read(file)) else ()
    for other in others:
        _try_download(name, other)
    return file.parent


def _try_download(name: str, file: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):
        hf_hub_download(name, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} needs to be JSON in UTF-8: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} needs an object, not {type(content).__name__}")
    return content


def _weights(path: Path, config: str) -> Path:
    for name in NAMES[config]:
        if (path / name).is_file():
            return path / name
    names = sorted(file.name for file in path.iterdir())
    raise InputError(f"{path} has {config}, but neither {' nor '.join(NAMES[config])}; there are: {listing(names)}")


def _architecture(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The arguments of open_clip's CLIP for the config.json of a `CLIPModel`.

    Raises:
        InputError: it is another model, or has what open_clip's CLIP has not.
    """
    if config.get("model_type") != "clip":
        raise InputError(
            f"{file} is of a model of the type {config.get('model_type')!r}; expected is a CLIPModel: clip"
        )
    # As transformers reads older files, the second replaces the first.
    vision, text = (
        _BOTH | defaults | (config.get(f"{side}_config") or {}) | (config.get(f"{side}_config_dict") or {})
        for side, defaults in (("vision", _VISION), ("text", _TEXT))
    )
    for side in (vision, text):
        if side["hidden_act"] != vision["hidden_act"] or side["hidden_act"] not in _ACTIVATIONS:
            raise InputError(f"{file}: hidden_act needs to be {' or '.join(_ACTIVATIONS)}, not {side['hidden_act']!r}")
    if text["vocab_size"] != _TEXT["vocab_size"] or vision["num_channels"] != _VISION["num_channels"]:
        raise InputError(
            f"{file} needs the vocabulary of CLIP (vocab_size {_TEXT['vocab_size']}) and 3 channels, not "
            f"{text['vocab_size']} and {vision['num_channels']}"
        )
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[vision["hidden_act"]],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_layers(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_layers(text),
        },
    }


def _layers(side: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": side["hidden_size"],
        "layers": side["num_hidden_layers"],
        "mlp_ratio": side["intermediate_size"] / side["hidden_size"],
        "norm_kwargs": {"eps": side["layer_norm_eps"]},
    }


def _preprocessing(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """open_clip's preprocessing for a preprocessor_config.json; what it does not say is as OpenAI's."""
    resample = config.get("resample", 3)
    if resample not in _INTERPOLATIONS:
        raise InputError(f"{file}: resample needs to be 2 (bilinear) or 3 (bicubic), not {resample!r}")
    if off := [name for name in _STEPS if config.get(name) is False]:
        raise InputError(f"{file}: {listing(off)} must not be false, since open_clip always does it")
    named = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    return {name: value for name, value in named.items() if value} | {"interpolation": _INTERPOLATIONS[resample]}
