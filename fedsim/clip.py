"""The frozen CLIP, through open_clip: any of its models, with a pretrained tag or a checkpoint of one's own.

`tiny` with `embedded` is the small dual encoder that comes with fedsim (`assets/tiny/CARD.md`).
"""

import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fedsim.errors import InputError, listing
from fedsim.towers import ImageTower, TextTower

EMBEDDED = "tiny", "embedded"
_ASSETS = Path(__file__).parent / "assets" / "tiny"


@dataclass(frozen=True)
class Weights:
    """Which CLIP: an open_clip architecture and the file of its weights.

    Attributes:
        model: open_clip's name of the architecture.
        pretrained: the tag, or the absolute path of a file; open_clip finds preprocessing by it.
        file: where the weights lie on this machine.
        key: changes with the architecture, the bytes of the weights, or open_clip's preprocessing.
    """

    model: str
    pretrained: str
    file: Path
    key: str


def find_weights(model: str, pretrained: str) -> Weights:
    """Finds the weights, downloads them where a tag says so, and reads none of them.

    Raises:
        InputError: open_clip has no such model or tag, or the weights cannot be had.
    """
    if (model, pretrained) == EMBEDDED:
        file = _ASSETS / "tiny.safetensors"
        config = json.loads((_ASSETS / "tiny.json").read_text(encoding="utf-8"))
        return Weights(model, str(file), file, _key(config, None, file))
    open_clip = _open_clip()
    if model not in open_clip.list_models():
        raise InputError(f"no backbone {model!r} in open_clip; there are: {_alike(model, open_clip.list_models())}")
    tag = open_clip.pretrained.get_pretrained_cfg(model, pretrained)
    # Absolute: a trial of a sweep, and a worker of another machine, runs in a folder of its own.
    file = _download(model, pretrained, tag) if tag else Path(os.path.expanduser(pretrained)).absolute()
    if not file.is_file():
        tags = listing(open_clip.pretrained.list_pretrained_tags_by_model(model)) or "none"
        raise InputError(f"no file and no tag {pretrained!r} for {model}; its tags: {tags}; or give a checkpoint file")
    return Weights(model, pretrained if tag else str(file), file, _key(open_clip.get_model_config(model), tag, file))


@dataclass(frozen=True)
class Frozen:
    """A CLIP that has been read, for other processes: its tensors as arrays, which the workers of a machine share.

    Attributes:
        state: by name in open_clip's model; read-only, and of convolutions with the channels last, as they are used.
    """

    weights: Weights
    state: dict[str, np.ndarray]

    def open(self, device: str = "cpu") -> "Clip":
        return Clip(self.weights, device, self.state)


def width_of(weights: Weights) -> int:
    """D, the width of a model's features, of which nothing is read but its description."""
    if weights.model == EMBEDDED[0]:
        return json.loads((_ASSETS / "tiny.json").read_text(encoding="utf-8"))["embed_dim"]
    return _open_clip().get_model_config(weights.model)["embed_dim"]


class Clip:
    """One frozen CLIP on one device, in evaluation mode and float32."""

    def __init__(self, weights: Weights, device: str = "cpu", state: dict[str, np.ndarray] | None = None) -> None:
        """
        Args:
            state: of a `Frozen`, which on a CPU is used where it lies; none given: the weights are read.
        """
        open_clip = _open_clip()
        tag = open_clip.pretrained.get_pretrained_cfg(weights.model, weights.pretrained) or {}
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                weights.model,
                pretrained=weights.pretrained,
                load_weights=state is None,
                device=device if state is None else "cpu",
                # Differs: open_clip 3 only warns when a tag was trained with QuickGELU and the architecture of
                # that name has GELU (ViT-B-32 with openai is such a pair); the features would be wrong.
                force_quick_gelu=bool(tag.get("quick_gelu")),
                weights_only=True,
            )
        except Exception as error:  # whatever a loader makes of a file that is no checkpoint of this model
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise InputError(f"{weights.file.name} holds no weights of {weights.model}: {first}") from error
        if state is not None:
            model.load_state_dict(_tensors(state), assign=True)
            model = model.to(device)
        # Channels last: convolutional towers run 1.7 times as fast on a CPU.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.tokenizer = open_clip.get_tokenizer(weights.model)
        self.weights, self.device = weights, device

    @property
    def logit_scale(self) -> float:
        """exp of the temperature parameter."""
        return self.model.logit_scale.exp().item()

    @torch.no_grad()  # not inference_mode: its tensors could never enter autograd again
    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """n images -> (n, D) float16, projected and not normalised, as FedCLIP's adapter reads them."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.model.encode_image(pixels).half().cpu().numpy()

    def pixels(self, images: Sequence[Image.Image], seeds: Sequence[int] | None = None) -> np.ndarray:
        """n images -> (n, 3, H, W) uint8, resized and cropped as for judging, and not normalised.

        Args:
            seeds: of an augmented view of each: a random part of the image, perhaps mirrored.
        """
        *geometry, _, _ = self.preprocess.transforms
        if seeds is None:
            seen = [type(self.preprocess)(geometry)(image) for image in images]
        else:
            with torch.random.fork_rng(devices=[]):
                seen = [self._view(image, seed) for image, seed in zip(images, seeds, strict=True)]
        return np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in seen])

    @torch.no_grad()
    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(n, 3, H, W) of `pixels` -> (n, D) float16, projected and not normalised."""
        return self.image_tower().encode(torch.from_numpy(pixels).to(self.device)).half().cpu().numpy()

    def check_tokens(self) -> None:
        """Raises InputError where the image tower has no patch tokens."""
        visual = self.model.visual
        if not hasattr(visual, "output_tokens") or getattr(visual, "attn_pool", None) is not None:
            name = f"{self.weights.model}'s image tower ({type(getattr(visual, 'trunk', visual)).__name__})"
            raise InputError(f"this method wants patch tokens and {name} has none; take a ViT, such as ViT-B-32")

    @torch.no_grad()
    def encode_tokens(self, pixels: np.ndarray) -> np.ndarray:
        """(n, 3, H, W) of `pixels` -> (n, T, D) float16: the patch tokens, projected and not normalised.

        Raises:
            InputError: the image tower has none.
        """
        self.check_tokens()
        visual = self.model.visual
        visual.output_tokens = True
        try:
            _, tokens = self.image_tower().encode(torch.from_numpy(pixels).to(self.device))
        finally:
            visual.output_tokens = False
        return (tokens if visual.proj is None else tokens @ visual.proj).half().cpu().numpy()

    def image_tower(self) -> ImageTower:
        normalise = self.preprocess.transforms[-1]
        return ImageTower(self.model.visual, normalise.mean, normalise.std)

    def text_tower(self, blocks: bool) -> TextTower:
        """
        Args:
            blocks: whether a method changes it inside.

        Raises:
            InputError: it is not of the kind that prompts can be trained through.
        """
        return TextTower(self.model, self.tokenizer, self.weights.model, blocks)

    def frozen(self) -> Frozen:
        """This CLIP for other processes."""
        state = {name: _last(tensor.cpu()).contiguous().numpy() for name, tensor in self.model.state_dict().items()}
        return Frozen(self.weights, state)

    def _view(self, image: Image.Image, seed: int) -> Image.Image:
        from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

        height, width = _size(self.model.visual.image_size)
        # As published prompt methods train: torchvision's random resized crop at its own scale, and a flip.
        torch.manual_seed(seed)
        crop = RandomResizedCrop((height, width), interpolation=InterpolationMode.BICUBIC, antialias=True)
        return RandomHorizontalFlip()(crop(image))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """C texts -> (C, D) float32, unit rows."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return self.model.encode_text(tokens, normalize=True).float().cpu().numpy()


def _tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they cannot be written to, which is as it should be
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    return {name: tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor for name, tensor in tensors.items()}


def _last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


@lru_cache(maxsize=1)
def _open_clip():
    # Imported where CLIP is loaded: it takes three times as long as torch, and client actors only see features.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    logging.getLogger().setLevel(logging.ERROR)
    open_clip.add_model_config(_ASSETS / "tiny.json")
    return open_clip


def _download(model: str, tag: str, source: dict) -> Path:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # offline: say so at once, after a look at what is here, instead of 45 seconds of retries
        constants.HF_HUB_OFFLINE = True
    try:
        return Path(_open_clip().pretrained.download_pretrained(source))
    except Exception as error:
        raise InputError(
            f"the weights {tag!r} of {model} are not on this machine and the hub cannot be reached; run once where "
            f"it can, or copy the file here and give --pretrained FILE (or use the embedded model: --backbone tiny)"
        ) from error


def _key(config: dict | None, tag: dict | None, file: Path) -> str:
    digest = blake2b(json.dumps([config, tag], sort_keys=True, default=str).encode(), digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _alike(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, names, n=5, cutoff=0.4)
    return f"{', '.join(close)}, ... ({len(names)} in all)" if close else listing(names)
