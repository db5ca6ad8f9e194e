"""How a drawing may look: colours, paper, ink, outlines, shading, blur.  Source: ours."""

import io

import numpy as np
import resvg_py  # pyright: ignore[reportMissingImports] - of the group assets
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from corpus import EMOJI_FAMILIES, Icon
from tower import SIZE

RASTER = 128  # pixels a side at which an icon is drawn
SMALL = 64  # the size of many stored drawings: half of the views pass through it
_BLANK = 0.02  # share of pixels below which nothing was drawn


def draw(icon: Icon) -> Tensor | None:
    """(4, RASTER, RASTER) in [0, 1], colour not multiplied by alpha; None where nothing shows."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=icon.svg, width=RASTER, height=RASTER)
    except ValueError:  # a body that is no valid SVG
        return None
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((RASTER, RASTER))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return pixels if (pixels[3] > 0.15).float().mean() > _BLANK else None


class Views:
    """Draws views of icons, each with random numbers of its own stream."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def of(self, icon: Icon) -> list[Tensor]:
        """(3, SIZE, SIZE) views in [0, 1]: more where more is known of the icon."""
        drawn = draw(icon)
        if drawn is None:
            return []
        plain, varied = (self.inked, self.tinted) if icon.inked else (self.plain, self.varied)
        kinds = [plain]
        if icon.classes or icon.above:
            kinds += [varied] if icon.inked else [varied, self.sketched]
        if icon.family in EMOJI_FAMILIES:
            kinds += [plain, varied] if icon.inked else [varied, varied, self.sketched]
        return [self._finish(kind(drawn)) for kind in kinds]

    def plain(self, drawn: Tensor) -> Tensor:
        """As drawn, on white paper."""
        return _on(self._move(drawn, 0.8, 1.0), torch.ones(3, 1, 1))

    def varied(self, drawn: Tensor) -> Tensor:
        """Moved, shaded, perhaps outlined, on light paper."""
        rng, drawn = self.rng, self._move(drawn, 0.7, 1.25, flip=0.5)
        if rng.random() < 0.5:
            drawn = self._shade(drawn)
        if rng.random() < 0.3:
            drawn = _outlined(drawn, int(rng.integers(1, 4)))
        return _on(drawn, self._paper(0.5))

    def sketched(self, drawn: Tensor) -> Tensor:
        """A coloured drawing as ink: its edges, its dark parts, or both."""
        rng = self.rng
        grey = _on(self._move(drawn, 0.75, 1.05, flip=0.5), torch.ones(3, 1, 1)).mean(0)[None]
        edges = (_swell(grey, 2) - _shrink(grey, 2)).mul(rng.uniform(1.5, 5)).clamp(0, 1)
        drawn_on = grey[grey < 0.97]
        level = torch.quantile(drawn_on, rng.uniform(0.2, 0.6)) if len(drawn_on) else 0.5
        dark = torch.sigmoid((level - grey) * 25)
        ink = (edges, torch.maximum(dark, edges), dark)[rng.choice(3, p=(0.45, 0.4, 0.15))]
        return (1 - ink).expand(3, -1, -1)

    def inked(self, drawn: Tensor) -> Tensor:
        """An icon of one colour in dark ink, at times with a thicker or thinner line."""
        rng, drawn = self.rng, self._move(drawn, 0.75, 1.0)
        if rng.random() < 0.3:
            change = _swell if rng.random() < 0.6 else _shrink
            drawn = torch.cat([drawn[:3], change(drawn[3:], int(rng.integers(1, 3)))])
        ink = torch.full((3, 1, 1), rng.uniform(0, 0.25))
        return _on(torch.cat([ink.expand_as(drawn[:3]), drawn[3:]]), torch.ones(3, 1, 1))

    def tinted(self, drawn: Tensor) -> Tensor:
        """An icon of one colour in colours, outlined, or light upon dark."""
        rng, drawn = self.rng, self._move(drawn, 0.7, 1.2, flip=0.5)
        ink = torch.from_numpy(rng.uniform(0, 0.8, 3)).float().view(3, 1, 1)
        drawn = torch.cat([ink.expand_as(drawn[:3]), drawn[3:]])
        how = rng.random()
        if how < 0.25:
            return 1 - _on(drawn, torch.ones(3, 1, 1))
        if how < 0.5:
            return _on(_outlined(drawn, int(rng.integers(1, 4))), torch.ones(3, 1, 1))
        return _on(self._shade(drawn) if how < 0.75 else drawn, self._paper(0.5))

    def _finish(self, pixels: Tensor) -> Tensor:
        if self.rng.random() < 0.5:
            pixels = _resize(pixels, SMALL)
        return _resize(pixels, SIZE)

    def _move(self, drawn: Tensor, low: float, high: float, flip: float = 0.0) -> Tensor:
        rng = self.rng
        scale = 1 / rng.uniform(low, high)
        side = -scale if rng.random() < flip else scale
        x, y = rng.uniform(-0.08, 0.08, 2)
        turn = torch.tensor([[[side, 0, x], [0, scale, y]]]).float()
        grid = F.affine_grid(turn, [1, 4, RASTER, RASTER], align_corners=False)
        colour = drawn[:3] * drawn[3:]  # what is transparent must not bleed in
        moved = F.grid_sample(torch.cat([colour, drawn[3:]])[None], grid, align_corners=False)[0]
        return torch.cat([moved[:3] / moved[3:].clamp(min=1e-3), moved[3:]])

    def _shade(self, drawn: Tensor) -> Tensor:
        light = torch.from_numpy(self.rng.uniform(0.55, 1.35, (1, 1, 3, 3))).float()
        field = F.interpolate(light, size=(RASTER, RASTER), mode="bicubic")[0]
        return torch.cat([(drawn[:3] * field).clamp(0, 1), drawn[3:]])

    def _paper(self, coloured: float) -> Tensor:
        if self.rng.random() > coloured:
            return torch.ones(3, 1, 1)
        return torch.from_numpy(self.rng.uniform(0.45, 1, 3)).float().view(3, 1, 1)


def _on(drawn: Tensor, paper: Tensor) -> Tensor:
    return drawn[:3] * drawn[3:] + paper * (1 - drawn[3:])


def _swell(mask: Tensor, by: int) -> Tensor:
    return F.max_pool2d(mask[None], 2 * by + 1, 1, by)[0]


def _shrink(mask: Tensor, by: int) -> Tensor:
    return 1 - _swell(1 - mask, by)


def _outlined(drawn: Tensor, width: int) -> Tensor:
    wide = _swell(drawn[3:], width)
    return torch.cat([drawn[:3] * drawn[3:], wide])


def _resize(pixels: Tensor, side: int) -> Tensor:
    resized = F.interpolate(pixels[None], (side, side), mode="bicubic", antialias=True)
    return resized[0].clamp(0, 1)
