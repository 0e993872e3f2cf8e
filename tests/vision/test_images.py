"""Images are read as what they are, and each bad one is found and named before training."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_adapters.errors import DataError
from tests.mutations import byte_edits
from tests.vision.image_folders import module, noise, write_folder
from vision.images import EncodedImage, decode, open_image

RAMP = np.linspace(0, 1, 16 * 16).reshape(16, 16)
GREY = np.rint(RAMP * 255)


def encoded(image: Image.Image, form: str, **options) -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return EncodedImage(f"an image.{form.lower()}", buffer.getvalue())


def grey(image: EncodedImage) -> np.ndarray:
    pixels = np.asarray(open_image(image)).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_eight(form):
    assert np.abs(grey(encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), form)) - GREY).max() <= 1


def test_floating_point_values_become_eight_bits():
    assert np.abs(grey(encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF")) - GREY).max() <= 1


def test_tiff_whose_zero_is_white():
    white = encoded(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF", tiffinfo={262: 0})
    assert np.abs(grey(white) - GREY[::-1, ::-1]).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.float32) * 255, r"from 0 to 255, and must lie in \[0, 1\]"),
        (RAMP.astype(np.float32) - 0.5, "from -0.5 to 0.5"),
        (np.full((4, 4), np.nan, np.float32), "from nan to nan"),
        (np.full((4, 4), np.inf, np.float32), "from inf to inf"),
        ((RAMP * 1e6).astype(np.int32), "integers of 32 bits or with a sign"),
    ],
)
def test_values_of_unknown_range_are_refused(values, message):
    with pytest.raises(DataError, match=f"cannot decode image an image.tiff: .*{message}"):
        open_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize(
    ("form", "bits"), [("JPEG", 8), ("PNG", 8), ("TIFF", 8), ("WEBP", 8), ("PNG", 16), ("TIFF", 16)]
)
def test_photos_are_turned_as_their_exif_data_say(form, bits):
    half = np.zeros((32, 64), np.uint16 if bits == 16 else np.uint8)
    half[:16] = 2**bits - 1
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn clockwise: the top becomes the right side
    pixels = grey(encoded(Image.fromarray(half), form, exif=exif))
    assert pixels.shape == (64, 32)
    assert pixels[:, :14].max() < 30
    assert pixels[:, 18:].min() > 225


def half_transparent(mode: str) -> Image.Image:
    """Left half red and opaque; the right half is green that nobody sees."""
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (4, 0, 8, 4))
    if mode == "LA":
        return image.convert("LA")
    return image.quantize(4) if mode == "P" else image


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGBA", "PNG"), ("RGBA", "WEBP"), ("P", "PNG"), ("RGBA", "GIF"), ("LA", "PNG"), ("RGBA", "TIFF")],
)
def test_what_is_transparent_is_white(mode, form):
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = np.asarray(open_image(encoded(half_transparent(mode), form, **options)))
    assert (pixels[:, 4:] == 255).all()
    assert (pixels[:, :4] != 255).any()


def test_opaque_images_keep_their_values():
    image = noise(0)
    for form in ("PNG", "BMP", "TIFF", "PPM"):
        assert open_image(encoded(image, form)).tobytes() == image.tobytes()
    opaque = image.copy()
    opaque.putalpha(255)
    assert open_image(encoded(opaque, "PNG")).tobytes() == image.tobytes()
    few_colours = image.quantize(256)
    assert open_image(encoded(few_colours, "PNG")).tobytes() == few_colours.convert("RGB").tobytes()


def test_printers_colours():
    pixels = np.asarray(open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 12


def test_further_frames_are_counted_and_named():
    frames = [noise(i) for i in range(3)]
    animated = {"save_all": True, "append_images": frames[1:]}
    images = [encoded(frames[0], form, **animated) for form in ("GIF", "TIFF", "PNG")]
    with pytest.warns(UserWarning, match=r"3 images have several frames.*an image\.gif, an image\.tiff"):
        pixels = decode(images, "decoding")
    assert (pixels[1] == np.asarray(frames[0])).all()
    with pytest.warns(UserWarning, match="1 images have several frames"):
        decode([encoded(noise(0, (9, 9)), "PNG"), images[1]], "decoding")


def bomb() -> bytes:
    """A PNG whose header says 400 million pixels."""
    data = encoded(noise(0), "PNG").data or b""
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_a_bad_image_behind_one_of_another_size_is_found_at_once(tmp_path):
    """The sizes differ, so images are decoded when they are used; each is decoded once before."""
    whole = {form: encoded(noise(1, (64, 64)), form).data or b"" for form in ("JPEG", "PNG", "GIF")}
    bad = {f"torn.{form.lower()}": data[: len(data) - 200] for form, data in whole.items()}
    bad |= {"bomb.png": bomb(), "empty.png": b"", "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    folder = write_folder(tmp_path)
    noise(0, (9, 9)).save(folder / "test" / "bee" / "0000.png")
    for name, data in bad.items():
        path = folder / "test" / "dog" / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"cannot decode image .*{name}: .*; replace or remove it"):
            module(folder).setup("test")
        path.unlink()
    module(folder).setup("test")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling link"])
def test_what_is_no_file_neither_hangs_nor_fills_the_memory(tmp_path, kind):
    path = write_folder(tmp_path) / "test" / "dog" / "0009.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"image .*dog/0009\.png.*remove it"):
        module(tmp_path).setup("test")


def test_a_link_to_an_image_is_an_image(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "test" / "dog" / "link.png").symlink_to(folder / "test" / "dog" / "0000.png")
    data = module(folder)
    data.setup("test")
    assert len(data.test_dataloader().dataset) == 13


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_damaged_images_decode_or_are_named(form):
    """60 damages of each format."""
    exif = Image.Exif()
    exif[0x112] = 6
    options = {"exif": exif} if form in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    data = encoded(noise(3), form, **options).data or b""
    for what, damaged in byte_edits(data, 60):
        try:
            decoded = open_image(EncodedImage(what, damaged))
        except DataError:
            continue
        assert decoded.mode == "RGB", what


def test_a_file_of_another_kind_is_not_read(tmp_path):
    Path(tmp_path / "a.png").write_text("not an image")
    with pytest.raises(DataError, match=r"cannot decode image .*a\.png"):
        open_image(EncodedImage(str(tmp_path / "a.png")))
