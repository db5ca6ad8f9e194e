"""Finds the weights of a CLIP, and checks that a file fits its architecture before anything starts.

open_clip knows how the weights of a tag were trained (activation, preprocessing), but nothing about a file. A file is
therefore first compared with the published ones.
"""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils.serialization
from torch import Tensor, nn

from fedsim.clip.architectures import ASSETS, EMBEDDED, import_open_clip, tokenizer_of
from fedsim.clip.folders import HUB, LOCAL, find_folder, from_transformers, is_transformers
from fedsim.clip.hub import hub_or_cache
from fedsim.clip.key import key_of
from fedsim.clip.precision import Precision
from fedsim.clip.published import (
    PREPROCESSING,
    assumed_activation,
    cache_folder,
    common_preprocessing,
    of_repository,
    published_as,
)
from fedsim.clip.unset import Unset
from fedsim.errors import InputError, first_line, listing

_serialization: Any = torch.utils.serialization.config  # a module that becomes an object when it is imported
_CONSTANTS = "input_resolution", "context_length", "vocab_size"  # in OpenAI's archives, next to the weights
_SUFFIXES = ".pt", ".pth", ".bin", ".safetensors", ".npz", ".ckpt", ".pkl"


@dataclass(frozen=True)
class Weights:
    """An open_clip architecture and the file of its weights.

    Attributes:
        model: open_clip's name of the architecture, or `local-dir:PATH`.
        pretrained: an open_clip tag, or the absolute path of a file.
        file: the weights on this machine.
        key: changes with the architecture, bytes, activation and preprocessing of the weights, and the precision.
        about: open_clip's description of the tag or of the published file: `quick_gelu`, `mean`, ...
        note: for the user: what is assumed about a file that was not recognized.
        architecture: arguments of open_clip's CLIP, for a `CLIPModel` of transformers; empty: `model` says it.
        precision: in which the towers compute.
    """

    model: str
    pretrained: str
    file: Path
    key: str
    about: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is QuickGELU even where the architecture says GELU."""
        return bool(self.about.get("quick_gelu"))

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Arguments of open_clip's `create_model_and_transforms`."""
        return {f"image_{name}": self.about[name] for name in PREPROCESSING if name in self.about}

    def at(self, precision: Precision) -> "Weights":
        """The same weights, which are for fp32, for towers that compute in this precision."""
        return self if precision == "fp32" else replace(self, precision=precision, key=f"{self.key}-{precision}")

    def build(self, device: str = "cpu") -> tuple[Any, Any]:
        """The model before its weights are loaded, and its preprocessing of images for evaluation."""
        with Unset():
            model, _, preprocess = import_open_clip().create_model_and_transforms(
                "ViT-B-32" if self.architecture else self.model,  # any plain CLIP: its architecture is replaced
                load_weights=False,
                pretrained_text=False,
                device=device,
                # Differs: open_clip 3 only warns when weights were trained with QuickGELU and the architecture has
                # GELU (ViT-B-32 with openai is such a pair); the features would be wrong.
                force_quick_gelu=self.quick_gelu,
                **self.preprocessing,
                **self.architecture,
            )
        return model, preprocess

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Copies the tensors of the file into the model, strictly, without unpickling other objects.

        Args:
            tensors: what `_tensors` has read of the file (default: it is read here).
        """
        if is_torchscript(self.file):
            model.load_state_dict(tensors or load_torchscript(self.file))
        elif self.architecture:
            model.load_state_dict(from_transformers(tensors or _tensors(self.file)))
        else:
            import_open_clip().load_checkpoint(model, str(self.file), weights_only=True)

    def tokenizer(self) -> Any:
        """Raises InputError if it needs a package or a vocabulary that this machine does not have."""
        if self.architecture:
            return tokenizer_of("ViT-B-32", self.architecture["text_cfg"]["context_length"])
        return tokenizer_of(self.model)


def find_weights(model: str, pretrained: str) -> Weights:
    """Finds the weights, downloads them where a tag names them, and checks that a file fits the architecture.

    Raises:
        InputError: open_clip has no such model or tag, the weights are not available, or a file does not hold them.
    """
    if (model, pretrained) == EMBEDDED:
        file = ASSETS / "tiny.safetensors"
        config = json.loads((ASSETS / "tiny.json").read_text(encoding="utf-8"))
        return Weights(model, str(file), file, key_of(config, None, file))
    if model.startswith((HUB, LOCAL)):
        return _in_folder(model, pretrained)
    open_clip = import_open_clip()
    if model not in open_clip.list_models():
        raise InputError(f"no backbone {model!r} in open_clip; there are: {_alike(model, open_clip.list_models())}")
    config, tag = open_clip.get_model_config(model), open_clip.pretrained.get_pretrained_cfg(model, pretrained)
    if tag:
        file = _download(model, pretrained, tag)
        weights = Weights(model, pretrained, file, key_of(config, tag, file), tag)
        _check_fits(weights)
        return weights
    file = _given(model, pretrained)
    _format(file)  # refuses a file that is no checkpoint before all of it is read
    published = published_as(file)
    if published and model not in published:
        raise InputError(f"{file.name} holds the weights of {listing(published)}; --backbone is {model}")
    about = published.get(model) or of_repository(model, file)
    note = "" if about else assumed_activation(model, file)
    about = about or common_preprocessing(model)
    weights = Weights(model, str(file), file, key_of(config, about, file), about, note)
    _check_fits(weights)
    return weights


def _in_folder(backbone: str, pretrained: str) -> Weights:
    if pretrained:
        raise InputError(f"--backbone {backbone} names the weights too; remove --pretrained {pretrained}")
    folder = find_folder(backbone)
    _format(folder.file)
    key = key_of(dict(folder.config), folder.about or None, folder.file, *folder.tokenizer)
    model = f"{LOCAL}{folder.path}"
    weights = Weights(model, str(folder.file), folder.file, key, folder.about, architecture=folder.architecture)
    _check_fits(weights)
    return weights


def width_of(weights: Weights) -> int:
    """D, the width of the model's features."""
    if weights.architecture:
        return weights.architecture["embed_dim"]
    if weights.model == EMBEDDED[0]:
        return json.loads((ASSETS / "tiny.json").read_text(encoding="utf-8"))["embed_dim"]
    return import_open_clip().get_model_config(weights.model)["embed_dim"]


def load_torchscript(file: Path) -> dict[str, Tensor]:
    """The tensors of one of OpenAI's TorchScript archives.

    Raises:
        InputError: its SHA-256 is unknown. Reading any other archive could run code that it contains.
    """
    if not published_as(file, whole=True):
        raise InputError(
            f"{file.name} is a TorchScript archive and, by its SHA-256, not one of OpenAI's; reading it could run "
            "code, so save its tensors alone: torch.save(model.state_dict(), FILE)"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        state = torch.jit.load(str(file), map_location="cpu").state_dict()
    return {name: tensor for name, tensor in state.items() if name not in _CONSTANTS}


def is_torchscript(file: Path) -> bool:
    return _format(file) == "TorchScript"


def _download(model: str, tag: str, source: dict) -> Path:
    from huggingface_hub import constants

    try:
        with hub_or_cache():
            return Path(import_open_clip().pretrained.download_pretrained(source))
    except Exception as error:
        folder = cache_folder(source) if source.get("hf_hub") else "the file"
        raise InputError(
            f"the weights {tag!r} of {model} are not on this machine and the hub cannot be reached; run once where it "
            f"can and copy {folder} of its cache ({constants.HF_HUB_CACHE}) here, or use the embedded model: "
            "--backbone tiny"
        ) from error


def _given(model: str, pretrained: str) -> Path:
    """The checkpoint file that --pretrained names if it is no tag."""
    tags = import_open_clip().pretrained.list_pretrained_tags_by_model(model)
    if not pretrained:
        raise InputError(
            f"--backbone {model} needs --pretrained: a checkpoint file, or a tag: {listing(tags) or 'none'}"
        )
    # Absolute: trials of a sweep and workers on other machines run in other folders.
    file = Path(os.path.expanduser(pretrained)).absolute()
    if file.is_dir():
        raise InputError(
            f"--pretrained needs a checkpoint file; {pretrained} is a folder, which --backbone {LOCAL}PATH reads if it "
            "holds an open_clip model or a CLIPModel of transformers"
        )
    if file.is_file():
        return file
    if os.sep in pretrained or file.suffix in _SUFFIXES:
        raise InputError(f"no file {pretrained} for --pretrained")
    raise InputError(
        f"no file and no tag {pretrained!r} for {model}; its tags: {_alike(pretrained, tags) or 'none'}; "
        "or give a checkpoint file"
    )


def _format(file: Path) -> str:
    """The format of a checkpoint, by its content: safetensors, TorchScript, PyTorch or NumPy.

    Raises:
        InputError: it is none of these, or the suffix of its name is that of another.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(9)
    if size == 0:
        raise InputError(f"{file.name} is empty; --pretrained needs a checkpoint file")
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        format = "safetensors"
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
        format = "TorchScript" if "constants.pkl" in names else "PyTorch" if "data.pkl" in names else "NumPy"
    elif start[:1] == b"\x80":  # a pickle, which torch.save wrote before it wrote zip archives
        format = "PyTorch"
    else:
        raise InputError(
            f"{file.name} is not a checkpoint: it begins with {start!r}; expected: safetensors, a state_dict by "
            "torch.save, or OpenAI's TorchScript archive"
        )
    for name, suffixes in {"safetensors": (".safetensors",), "NumPy": (".npz",)}.items():
        if (format == name) != (file.suffix in suffixes):  # open_clip chooses how to read a file by its suffix
            raise InputError(f"{file.name} is in the format of {format}; rename it, so that its suffix says so")
    return format


def _check_fits(weights: Weights) -> None:
    """Raises InputError unless the file holds the tensors of the architecture. Does not load them into memory."""
    file = weights.file
    try:
        with torch.device("meta"):
            model, _ = weights.build("meta")
    except Exception as error:  # what a folder says of its architecture can be wrong in many ways
        raise InputError(f"open_clip cannot build {weights.model} here: {first_line(error)}") from None
    # Memory-mapped: of a checkpoint of any size, only names and shapes are read.
    with warnings.catch_warnings(), _serialization.patch({"load.mmap": zipfile.is_zipfile(file)}):
        warnings.simplefilter("ignore")  # about tensors that share memory with the file, as intended
        state = _tensors(file)
        if not is_torchscript(file) and state.keys() >= set(_CONSTANTS):
            raise InputError(
                f"{file.name} was saved from OpenAI's archive: leave {listing(_CONSTANTS)} out, and give --backbone "
                f"{weights.model.removesuffix('-quickgelu')}-quickgelu for its activation"
            )
        if is_transformers(state) and not weights.architecture:
            raise InputError(
                f"{file.name} is of a CLIPModel of transformers; give its folder, with config.json: --backbone "
                f"{LOCAL}{file.parent}"
            )
        try:
            weights.load(model, state)
        except Exception:  # open_clip converts other layouts first, which fails in many ways
            if weights.architecture:
                state = _converted(file, state)
            raise InputError(f"{file.name} holds no weights of {weights.model}: {_difference(model, state)}") from None


def _converted(file: Path, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    try:
        return from_transformers(state)
    except (LookupError, RuntimeError):
        raise InputError(
            f"{file.name} holds no CLIPModel of transformers: parts of its attention are missing"
        ) from None


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; empty for NumPy's format, which open_clip checks itself.

    Raises:
        InputError: it is damaged, or holds other objects than tensors.
    """
    if file.suffix == ".npz":
        return {}
    try:
        if is_torchscript(file):
            return load_torchscript(file)
        state = import_open_clip().factory.load_state_dict(str(file))
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"{file.name} holds Python objects besides tensors, which are never unpickled; save its tensors alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception:  # its message has advice for another program
        raise InputError(f"{file.name} is damaged, or holds no state_dict of tensors") from None


def _difference(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    needed, given = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (model.state_dict(), state))
    if missing := [name for name in needed if name not in given]:
        return f"it lacks {len(missing)} of {len(needed)} tensors, such as {missing[0]}"
    if other := [name for name in needed if needed[name] != given[name]]:
        name = other[0]
        return (
            f"the shape differs in {len(other)} of {len(needed)} tensors, such as {name}: {needed[name]} is needed, "
            f"{given[name]} given"
        )
    more = sorted(given.keys() - needed)
    return f"it has {len(more)} more than the {len(needed)} tensors, such as {listing(more, 1)}"


def _alike(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, names, n=5, cutoff=0.4)
    return f"{', '.join(close)}, ... ({len(names)} in all)" if close else listing(names)
