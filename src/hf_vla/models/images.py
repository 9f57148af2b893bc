"""Whatever a caller has for an image -> an upright 8-bit RGB image; image processors that always resize alike."""

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers.image_processing_backends import TorchvisionBackend


def to_rgb(image) -> Image.Image:
    """Convert one image to RGB.

    Args:
        image: a PIL image of any mode (EXIF rotation is applied, transparency dropped); an array of shape
            `(height, width)`, `(height, width, 1 | 3 | 4)`; or a tensor of shape `(1 | 3 | 4, height, width)` or
            `(height, width)`. uint8 in [0, 255], uint16 in [0, 65535], floating point in [0, 1].

    Returns:
        `PIL.Image.Image` in mode RGB.

    Raises:
        ValueError: another type, shape or value range, or NaN.
    """
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode == "I":
            raise ValueError(
                "Expected 8 or 16 bits a channel, got a PIL image of 32: which value is white? Make it I;16."
            )
        if image.mode.startswith("I;16") or image.mode == "F":  # PIL would clip them to white, or black
            return to_rgb(np.asarray(image).astype(np.float32 if image.mode == "F" else np.uint16))
        return image.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray):
        raise ValueError(f"Expected a PIL image, an array or a tensor, got {type(image).__name__}.")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[-1] in (3, 4)) or image.size == 0:
        raise ValueError(
            f"Expected an array of shape (height, width), (height, width, 3) or (height, width, 4), or a tensor with "
            f"its channels first, got the shape (height, width, channels) = {image.shape}."
        )
    return Image.fromarray(_to_uint8(image)).convert("RGB")


def pil_backend(image_processor):
    """Take the PIL backend of an image processor, which resizes otherwise than torchvision's.

    Transformers chooses the latter wherever torchvision is installed; a model must not see other pixels for that.

    Args:
        image_processor (`BaseImageProcessor`): of transformers, of any backend.

    Returns:
        `BaseImageProcessor`: with the same options; itself, where torchvision has no part in it.

    Raises:
        ValueError: transformers has no PIL backend for it.
    """
    if not isinstance(image_processor, TorchvisionBackend):
        return image_processor
    name = type(image_processor).__name__
    name = "SiglipImageProcessor" if name == "PI0ImageProcessor" else name  # the same steps, without a PIL backend
    backend = getattr(transformers, f"{name}Pil", None)
    if backend is None:
        raise ValueError(
            f"Expected an image processor with a PIL backend, got {name}, which has none: its pixels would change "
            "with the version of torchvision."
        )
    return backend(**image_processor.to_dict())


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return np.round(values / 257.0).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"Expected an image of uint8, uint16 or floating point, got {values.dtype}.")
    if not np.isfinite(values).all():
        raise ValueError("Expected a finite image, got NaN or infinity.")
    if values.min() < 0.0 or values.max() > 1.0:
        raise ValueError(
            f"Expected a floating-point image in [0, 1], got [{values.min():g}, {values.max():g}]: "
            "divide by 255, or pass uint8."
        )
    return np.round(values * 255.0).astype(np.uint8)
