import io
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend

from hf_vla.models.images import pil_backend, to_rgb

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        RGB,
        RGB.astype(np.float32) / 255,
        RGB.astype(np.uint16) * 257,
        torch.from_numpy(RGB).permute(2, 0, 1),
        torch.from_numpy(RGB).permute(2, 0, 1).float() / 255,
        np.concatenate([RGB, np.full((4, 6, 1), 9, np.uint8)], axis=-1),
        Image.fromarray(np.concatenate([RGB, np.full((4, 6, 1), 9, np.uint8)], axis=-1), "RGBA"),
    ],
    ids=["pil", "uint8", "float", "uint16", "tensor", "float tensor", "rgba array", "rgba pil"],
)
def test_every_form_gives_the_same_pixels(image):
    converted = to_rgb(image)
    assert converted.mode == "RGB" and np.array_equal(np.asarray(converted), RGB)


GRAY = RGB[..., 0]


@pytest.mark.parametrize(
    "image",
    [
        GRAY,
        GRAY[..., None],
        Image.fromarray(GRAY),
        GRAY.astype(np.uint16) * 257,
        Image.fromarray(GRAY.astype(np.uint16) * 257),
        Image.fromarray(GRAY.astype(np.float32) / 255),
        torch.from_numpy(GRAY),
        torch.from_numpy(GRAY)[None],
    ],
    ids=["2-D", "one channel", "pil", "uint16", "16-bit pil", "float pil", "2-D tensor", "one-channel tensor"],
)
def test_gray_becomes_three_equal_channels(image):
    """PIL alone would clip a 16-bit image to white."""
    assert np.array_equal(np.asarray(to_rgb(image)), np.repeat(GRAY[..., None], 3, axis=-1))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG", exif=exif)
    upright = to_rgb(Image.open(file))
    assert upright.size == (4, 6) and np.array_equal(np.asarray(upright), np.rot90(RGB, -1))


@pytest.mark.parametrize("size", [(1, 1), (4000, 3000)])
def test_tiny_and_huge(size):
    assert to_rgb(Image.new("RGB", size)).size == size


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("cube.png", "Expected a PIL image, an array or a tensor, got str"),
        (np.zeros((3, 4, 6)), r"the shape \(height, width, channels\) = \(3, 4, 6\)"),
        (np.zeros((0, 4, 3), np.uint8), r"= \(0, 4, 3\)"),
        (np.full((2, 2), np.nan), "Expected a finite image, got NaN"),
        (RGB.astype(np.float32), r"Expected a floating-point image in \[0, 1\], got \[0, 213\]: divide by 255"),
        (RGB.astype(np.int64), "uint8, uint16 or floating point, got int64"),
        (Image.fromarray(np.full((2, 2), 700, np.int32)), "Expected 8 or 16 bits a channel, got a PIL image of 32"),
        (Image.fromarray(np.full((2, 2), 200, np.float32)), r"floating-point image in \[0, 1\], got \[200, 200\]"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


@pytest.mark.parametrize("name", ["siglip.SiglipImageProcessor", "clip.CLIPImageProcessor", "pi0.PI0ImageProcessor"])
def test_image_processors_are_pils_whether_there_is_torchvision_or_not(name):
    module, _, name = name.partition(".")
    module = import_module(f"transformers.models.{module}.image_processing_{module}")
    options = {"size": {"height": 8, "width": 8}, "image_seq_length": 4}
    ours = pil_backend(getattr(module, name)(**options))
    assert type(ours).__name__ == name.replace("PI0", "Siglip") + "Pil" and pil_backend(ours) is ours
    assert dict(ours.size) == options["size"] and ours.image_seq_length == 4


def test_an_image_processor_without_a_pil_backend_is_refused():
    class Strange(TorchvisionBackend):
        pass

    with pytest.raises(ValueError, match="got Strange, which has none"):
        pil_backend(Strange())
