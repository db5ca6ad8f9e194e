"""The frozen CLIP: any open_clip model, with the weights of a tag or of a custom checkpoint.

`tiny` with `embedded` is the small dual encoder that comes with fedsim (`assets/tiny/CARD.md`).
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from fedsim.clip.checkpoints import Weights
from fedsim.clip.precision import autocast, check_device
from fedsim.clip.tokens import tokenize_distinct
from fedsim.clip.towers import ImageTower, TextTower
from fedsim.errors import InputError, first_line


@dataclass(frozen=True)
class Frozen:
    """A loaded CLIP for other processes: its tensors as arrays, which the workers of a machine share.

    Attributes:
        state: read-only arrays by open_clip's names; those of convolutions have channels last, as they are used.
    """

    weights: Weights
    state: dict[str, np.ndarray]

    def open(self, device: str = "cpu") -> "Clip":
        return Clip(self.weights, device, self.state)


class Clip:
    """One frozen CLIP on one device, in evaluation mode; its weights are float32."""

    def __init__(self, weights: Weights, device: str = "cpu", state: dict[str, np.ndarray] | None = None) -> None:
        """
        Args:
            state: that of a `Frozen`, which is not copied on a CPU; None: the weights are read from their file.

        Raises:
            InputError: the file cannot be read on this machine, or the device does not have the precision.
        """
        check_device(weights.precision, device)
        try:
            model, self.preprocess = weights.build(device if state is None else "cpu")
            if state is None:
                weights.load(model)
        except Exception as error:  # the file was checked on the driver's machine, and may differ on this one
            raise InputError(f"{weights.file} cannot be read as {weights.model}: {first_line(error)}") from error
        if state is not None:
            model.load_state_dict(_tensors(state), assign=True)
            model = model.to(device)
        # Channels last: convolutional towers run 1.7 times as fast on a CPU.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.tokenizer = weights.tokenizer()
        self.weights, self.device = weights, device

    @property
    def logit_scale(self) -> float:
        """exp of the temperature parameter."""
        return self.model.logit_scale.exp().item()

    def encode_images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """n images -> (n, D) float16, projected and not normalized, as FedCLIP's adapter reads them.

        With an iterator that opens images one by one, only one of them is in memory at a time.
        """
        return self.encode_preprocessed(map(self.preprocess, images))

    @torch.no_grad()  # not inference_mode: its tensors could never enter autograd again
    def encode_preprocessed(self, images: Iterable[torch.Tensor]) -> np.ndarray:
        """n images, each as `preprocess` returns it -> as `encode_images`."""
        pixels = torch.stack(list(images)).to(self.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            return self.model.encode_image(pixels).half().cpu().numpy()

    def pixels(self, images: Iterable[Image.Image], seeds: Sequence[int] | None = None) -> np.ndarray:
        """n images -> (n, 3, H, W) uint8, resized and cropped as for evaluation, and not normalized.

        With an iterator that opens images one by one, only one of them is in memory at a time.

        Args:
            seeds: for augmented views, one per image: a random crop, which may be mirrored.
        """
        *geometry, _, _ = self.preprocess.transforms
        if seeds is None:
            views = [type(self.preprocess)(geometry)(image) for image in images]
        else:
            with torch.random.fork_rng(devices=[]):
                views = [self._view(image, seed) for image, seed in zip(images, seeds, strict=True)]
        return np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in views])

    @torch.no_grad()
    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(n, 3, H, W) of `pixels` -> (n, D) float16, projected and not normalized."""
        return self.image_tower().encode(torch.from_numpy(pixels).to(self.device)).half().cpu().numpy()

    def check_tokens(self) -> None:
        """Raises InputError if the image tower has no patch tokens."""
        visual = self.model.visual
        if not hasattr(visual, "output_tokens") or getattr(visual, "attn_pool", None) is not None:
            name = f"{self.weights.model}'s image tower ({type(getattr(visual, 'trunk', visual)).__name__})"
            raise InputError(f"this method needs patch tokens, and {name} has none; use a ViT, such as ViT-B-32")

    @torch.no_grad()
    def encode_tokens(self, pixels: np.ndarray) -> np.ndarray:
        """(n, 3, H, W) of `pixels` -> (n, T, D) float16: the patch tokens, projected and not normalized.

        Raises:
            InputError: the image tower has no patch tokens.
        """
        self.check_tokens()
        visual, x = self.model.visual, self.image_tower().normalized(torch.from_numpy(pixels).to(self.device))
        visual.output_tokens = True
        try:
            with self._autocast():
                _, tokens = visual(x)
                return (tokens if visual.proj is None else tokens @ visual.proj).half().cpu().numpy()
        finally:
            visual.output_tokens = False

    def image_tower(self) -> ImageTower:
        normalise = self.preprocess.transforms[-1]
        visual, about = self.model.visual, self.weights
        return ImageTower(visual, normalise.mean, normalise.std, about.model, about.precision)

    def text_tower(self, blocks: bool) -> TextTower:
        """
        Args:
            blocks: whether a method changes its layers.

        Raises:
            InputError: prompts cannot be trained through this tower.
        """
        return TextTower(self.model, self.tokenizer, self.weights.model, blocks, self.weights.precision)

    def frozen(self) -> Frozen:
        """See `Frozen`."""
        state = {
            name: _channels_last(tensor.cpu()).contiguous().numpy() for name, tensor in self.model.state_dict().items()
        }
        return Frozen(self.weights, state)

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.weights.precision, self.device)

    def _view(self, image: Image.Image, seed: int) -> Image.Image:
        from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop

        height, width = _size(self.model.visual.image_size)
        # As published prompt methods train: torchvision's random resized crop with its default scale, and a flip.
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed GPUs as well
        crop = RandomResizedCrop((height, width), interpolation=InterpolationMode.BICUBIC, antialias=True)
        return RandomHorizontalFlip()(crop(image))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """C texts -> (C, D) float32, unit rows.

        Raises:
            InputError: a text is longer than the model's context, or two texts have the same tokens.
        """
        tokens = tokenize_distinct(self.tokenizer, texts).to(self.device)
        with self._autocast():
            features = self.model.encode_text(tokens)
        return normalize(features.float(), dim=-1).cpu().numpy()

    def encode_classes(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """(C, D) float32, unit rows: the embeddings of C classes.

        Args:
            texts: for each template, the C texts. The text features of several are averaged, and the means normalized
                (CLIP's prompt ensembling).
        """
        if len(texts) == 1:
            return self.encode_texts(texts[0])
        total = sum((self.encode_texts(each).astype(np.float64) for each in texts), start=np.zeros(()))
        return (total / np.linalg.norm(total, axis=1, keepdims=True)).astype(np.float32)


def check_texts(weights: Weights, texts: Sequence[str]) -> None:
    """Raises InputError if `Clip.encode_texts` would; needs no model."""
    tokenize_distinct(weights.tokenizer(), texts)


def _tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tensors that cannot be written to, as intended
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    return {name: tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor for name, tensor in tensors.items()}


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
