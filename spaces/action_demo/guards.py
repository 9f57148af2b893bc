"""What strangers may send: pictures and numbers are checked here before anything is computed with them."""

import logging
import math
import warnings
from functools import wraps
from pathlib import Path

import gradio as gr
from PIL import Image

from hf_vla.models.images import to_rgb

MAX_MEGABYTES = 12  # of a picture's file
MAX_PIXELS = 24_000_000
MAX_WORDS = 500  # characters of an instruction
MAX_SAMPLES, MAX_STEPS, MAX_SEED = 16, 100, 2**31 - 1
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

logger = logging.getLogger(__name__)
# a picture of more pixels than Pillow's own bound is refused when its header is read, with whatever filters are set
warnings.simplefilter("error", Image.DecompressionBombWarning)


class Refused(gr.Error, ValueError):
    """What a user can mend, in a sentence, without a traceback in the log."""

    def __init__(self, message):
        super().__init__(message, duration=None, print_exception=False, title="That did not work")


def sentences(function):
    """Let a function of the page or of the API fail in sentences: the library's own, or one that tells nothing."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except ValueError as error:
            raise Refused(str(error)) from None
        except Exception:
            logger.exception("%s failed", function.__name__)
            raise Refused("The server failed at this. Its log says why; trying once more may help.") from None

    return wrapper


def read_picture(path):
    """Open an uploaded picture as an upright RGB one; of several frames the first.

    Args:
        path (`str`, *optional*): of the file.

    Returns:
        `PIL.Image.Image`: 8 bits, RGB, as [`~hf_vla.models.images.to_rgb`] makes it; None where there is no path.

    Raises:
        Refused: the file is gone, empty, too large, no picture, of another format, damaged, or of too many pixels.
    """
    if path is None:
        return None
    try:
        size = Path(path).stat().st_size
    except FileNotFoundError:
        raise Refused(
            "This picture is no longer here: uploads are deleted after half an hour. Give it again."
        ) from None
    if size == 0:
        raise Refused("This file is empty (0 bytes): choose another picture.")
    if size > MAX_MEGABYTES * 1e6:
        raise Refused(f"This file has more than {MAX_MEGABYTES} megabytes: make the picture smaller first.")
    too_large = f"is larger than {MAX_PIXELS / 1e6:.0f} megapixels: make it smaller first."
    try:
        with Image.open(path, formats=FORMATS) as file:  # reads the header only
            if file.width * file.height > MAX_PIXELS:
                raise Refused(f"This picture of {file.width} x {file.height} pixels {too_large}")
            return to_rgb(file)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(f"This picture {too_large}") from None
    except Exception:  # Pillow's decoders raise all kinds of errors at damaged files
        raise Refused(
            f"This file cannot be read as a picture. Whatever it is called, it has to be {', '.join(FORMATS[:-1])} or "
            f"{FORMATS[-1]}, and whole."
        ) from None


def parse_state(text, names):
    """Read a robot's state.

    Args:
        text (`str`): numbers parted by blanks or commas.
        names (`list[str]`): of its dimensions.

    Returns:
        `list[float]`

    Raises:
        Refused: something is no finite number, or there are more or fewer than names.
    """
    words = (text or "").replace(",", " ").split()
    wanted = f"The state needs {len(names)} numbers ({', '.join(names)}), such as '{' '.join(['0.1'] * len(names))}'"
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            raise Refused(f"{wanted}; {word[:40]!r} is not a number.") from None
        if not math.isfinite(numbers[-1]):
            raise Refused(f"{wanted}; {word[:40]!r} is not finite.")
    if len(numbers) != len(names):
        raise Refused(f"{wanted}; there are {len(numbers)}.")
    return numbers


def parse_whole(value, what, least, most):
    """Read a whole number within bounds.

    Raises:
        Refused: it is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value):
        raise Refused(f"{what} has to be a whole number from {least} to {most}; {value!r} is not.")
    if not least <= value <= most:
        raise Refused(f"{what} has to be from {least} to {most}; {value:g} is not.")
    return int(value)


def check_instruction(text):
    """Return an instruction.

    Raises:
        Refused: it is empty or very long.
    """
    if not isinstance(text, str) or not text.strip():
        raise Refused("Write an instruction, such as 'Open a drawer'.")
    if len(text) > MAX_WORDS:
        raise Refused(f"The instruction has {len(text)} characters; {MAX_WORDS} are the most.")
    return text.strip()
