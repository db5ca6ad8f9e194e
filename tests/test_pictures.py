"""Pictures of every mode: CLIP sees what open_clip's own preprocessing makes of the file, or the picture is refused."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fedsim.clip.checkpoints import EMBEDDED, find_weights
from fedsim.clip.model import Clip
from fedsim.datasets import Images
from fedsim.datasets._check import unreadable
from fedsim.errors import InputError

NOISE = np.random.default_rng(0).integers(0, 256, (100, 140, 3), np.uint8)
PICTURE = Image.fromarray(NOISE).filter(ImageFilter.GaussianBlur(3)).point(lambda value: (value - 96) * 4)
GREY, PALETTE, ONE_BIT = PICTURE.convert("L"), PICTURE.quantize(32), PICTURE.convert("1")
RAMP = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # the orientation: turned by a quarter


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def with_alpha(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(alpha)
    return picture


def an_image(file: bytes) -> Images:
    row = np.zeros(1, np.int64)
    return Images(
        files=[file], names=["x"], y=row, domain=row, classes=("a",), domains=("d",), split=row.astype(np.int8)
    )


def refusal(file: bytes) -> str:
    """Why an image is refused: in the same words by the check before a run and when it is opened."""
    images = an_image(file)
    [(_, reason)] = unreadable(images, 1)
    with pytest.raises(InputError) as caught:
        images.open(0)
    assert str(caught.value) == f"x cannot be read: {reason}"
    assert "\n" not in reason
    return reason


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(find_weights(*EMBEDDED))


FRAMES = {"save_all": True, "append_images": [PICTURE.rotate(90)]}
FILES = {
    ("RGB", "PNG"): saved(PICTURE, "PNG"),
    ("RGB", "PNG with a transparent colour"): saved(PICTURE, "PNG", transparency=(1, 2, 3)),
    ("RGB", "JPEG with an orientation"): saved(PICTURE, "JPEG", exif=SIDEWAYS),
    ("RGB", "TIFF of two pages"): saved(PICTURE, "TIFF", **FRAMES),
    ("RGB", "animated WEBP"): saved(PICTURE, "WEBP", **FRAMES),
    ("RGB", "animated PNG"): saved(PICTURE, "PNG", **FRAMES),
    ("1", "PNG"): saved(ONE_BIT, "PNG"),
    ("1", "BMP"): saved(ONE_BIT, "BMP"),
    ("1", "TIFF"): saved(ONE_BIT, "TIFF", compression="group4"),
    ("L", "PNG"): saved(GREY, "PNG"),
    ("L", "PNG with a transparent grey"): saved(GREY, "PNG", transparency=3),
    ("LA", "PNG"): saved(with_alpha(GREY, GREY), "PNG"),
    ("P", "PNG"): saved(PALETTE, "PNG"),
    ("P", "BMP"): saved(PALETTE, "BMP"),
    ("P", "GIF"): saved(PALETTE, "GIF"),
    ("P", "animated GIF"): saved(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(90)]),
    ("P", "PNG with a transparent colour"): saved(PALETTE, "PNG", transparency=3),
    ("P", "PNG of many transparencies"): saved(PALETTE, "PNG", transparency=bytes(range(32))),
    ("RGBA", "PNG"): saved(with_alpha(PICTURE, GREY), "PNG"),
    ("RGBA", "WEBP"): saved(with_alpha(PICTURE, GREY), "WEBP", lossless=True),
    ("CMYK", "JPEG"): saved(PICTURE.convert("CMYK"), "JPEG"),
    ("CMYK", "TIFF"): saved(PICTURE.convert("CMYK"), "TIFF"),
    ("YCbCr", "TIFF"): saved(PICTURE.convert("YCbCr"), "TIFF"),
    ("LAB", "TIFF"): saved(Image.frombytes("LAB", PICTURE.size, PICTURE.tobytes()), "TIFF"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(("mode", "kind"), FILES, ids=lambda word: word.replace(" ", "-"))
def test_a_picture_is_seen_as_open_clip_sees_its_file(clip, mode, kind):
    file = FILES[mode, kind]
    assert Image.open(BytesIO(file)).mode == mode
    images = an_image(file)
    theirs = clip.preprocess(Image.open(BytesIO(file)))
    assert torch.equal(clip.preprocess(images.open(0)), theirs)
    *_, normalise = clip.preprocess.transforms
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (normalise.mean, normalise.std))
    levels = (255 * (theirs * std + mean)).round().byte()
    assert torch.equal(torch.from_numpy(clip.pixels([images.open(0)])[0]), levels)
    assert unreadable(images, 1) == []


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize(("mode", "kind"), FILES, ids=lambda word: word.replace(" ", "-"))
def test_an_augmented_view_is_made_of_a_picture_of_every_mode(clip, mode, kind):
    picture = an_image(FILES[mode, kind]).open(0)
    _, height, width = clip.preprocess(picture).shape
    view = clip.pixels([picture], seeds=[1])
    assert view.shape == (1, 3, height, width) and view.dtype == np.uint8 and len(np.unique(view)) > 1


WIDE = {
    "16 bit PNG": saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
    "16 bit TIFF": saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
    "16 bit PGM": b"P5 256 64 65535\n" + (RAMP.astype(">u2") * 257).tobytes(),
    "32 bit TIFF": saved(Image.fromarray(RAMP.astype(np.int32) * 257), "TIFF"),
    "float TIFF, 0 to 1": saved(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
    "float TIFF, 0 to 255": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_a_picture_of_more_than_8_bits_is_seen_as_the_same_in_8_bits(kind):
    assert np.array_equal(an_image(WIDE[kind]).open(0), np.stack([RAMP] * 3, axis=2))


def test_colours_of_16_bits_are_seen_in_8_bits():
    # A PNG by hand, since Pillow writes none: 1 x 1 pixel, 16 bits a channel.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, pixel = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"\0" + struct.pack(">HHH", 0x1234, 0xABCD, 0xFF00)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixel)) + chunk(b"IEND", b"")
    assert an_image(file).open(0).getpixel((0, 0)) == (0x12, 0xAB, 0xFF)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((RAMP.astype(np.uint16) * 12), "from 0 to 3060 and their range is not known (0 to 65535 would"),
        ((RAMP.astype(np.int32) * 300), "from 0 to 76500 and"),
        ((RAMP.astype(np.int32) - 9), "from -9 to 246 and"),
        ((RAMP / 50).astype(np.float32), "from 0 to 5.1 and their range is not known (0 to 255 would"),
        ((RAMP / 9999).astype(np.float32), "(0 to 1 would"),
        (np.where(RAMP == 7, np.nan, RAMP).astype(np.float32), "from nan to nan and"),
        ((RAMP * 9.0).astype(np.float32), "from 0 to 2295 and"),
    ],
)
def test_a_picture_whose_range_cannot_be_known_is_refused(values, said):
    reason = refusal(saved(Image.fromarray(values), "TIFF"))
    assert said in reason and reason.endswith("save it with 8 bits")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_drawing_in_black_on_transparency_is_refused(clip, mode):
    file = saved(with_alpha(Image.new(mode[:-1], PICTURE.size), ONE_BIT.convert("L")), "PNG")
    assert len(clip.preprocess(Image.open(BytesIO(file))).unique()) <= 3  # a blank picture, to open_clip
    assert refusal(file) == "its pixels differ only in transparency, which CLIP does not see; put it on a background"


def test_a_drawing_in_white_on_transparency_is_seen_as_open_clip_sees_it(clip):
    file = saved(with_alpha(Image.new("RGB", PICTURE.size, "white"), ONE_BIT.convert("L")), "PNG")
    assert torch.equal(clip.preprocess(an_image(file).open(0)), clip.preprocess(Image.open(BytesIO(file))))


def test_a_drawing_in_an_entry_of_a_palette_is_refused_where_only_transparency_shows_it():
    picture = Image.fromarray((RAMP > 99).astype(np.uint8), "L").convert("P")
    picture.putpalette([0, 0, 0] * 256)
    assert "differ only in transparency" in refusal(saved(picture, "PNG", transparency=0))


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    assert refusal(b"") == "the file is empty"
    (tmp_path / "x.png").write_bytes(b"")
    images = an_image(tmp_path / "x.png")
    assert unreadable(images) == [(0, "the file is empty")]


def test_a_huge_picture_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # Pillow's own setting, and half of its limit
    assert refusal(FILES["RGB", "PNG"]) == "more than 10,000 pixels, Pillow's limit against files that fill the memory"


def test_the_cache_key_follows_how_pictures_are_decoded(monkeypatch):
    import fedsim.datasets._labels

    before = an_image(FILES["P", "PNG"]).fingerprint()
    monkeypatch.setattr(fedsim.datasets._labels, "VERSION", 1)
    assert an_image(FILES["P", "PNG"]).fingerprint() != before
