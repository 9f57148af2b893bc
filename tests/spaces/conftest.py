import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

SPACE = Path(__file__).parents[2] / "spaces" / "action_demo"
sys.path.insert(0, str(SPACE))  # as `hf-vla space` does: the app's files import each other by name

SHIPPED = ("tinyvla_metaworld", "spatialvla_metaworld", "divla_metaworld", "spatialvla_robosuite")


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for(url, process, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError(f"The Space did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The real page, started as a user does: `url`, and the `log` and the folder of `uploads` of its process.

    The clone is neither in its working directory nor in its TMPDIR: what lies in those, gradio shows to everybody.
    """
    folder, port = tmp_path_factory.mktemp("space"), free_port()
    log, uploads = folder / "log", folder / "uploads"
    environment = os.environ | {"GRADIO_TEMP_DIR": str(uploads), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).parent / "hf-vla"), "space", "--port", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield SimpleNamespace(url=url, log=log, uploads=uploads)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def served():
    """The embedded checkpoints in this process, by name."""
    from predict import CHECKPOINTS, load

    load([str(SPACE / "checkpoints" / name) for name in SHIPPED], warm_up=False)
    return CHECKPOINTS


def scene(width=96, height=72):
    """A picture with structure in all channels."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 255 * ((x // 8 + y // 8) % 2)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


GOOD = ("plain.png", "rotated.jpg", "cmyk.jpg", "animated.gif", "sixteen.png", "palette.png", "alpha.webp")


@pytest.fixture(scope="session")
def good_pictures(tmp_path_factory):
    """Pictures that are unusual but right, by name."""
    folder, picture = tmp_path_factory.mktemp("good"), scene()
    picture.save(folder / "plain.png")
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    picture.save(folder / "rotated.jpg", exif=exif, quality=95)
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    later = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture.rotate(90)]
    picture.save(folder / "animated.gif", save_all=True, append_images=later, duration=100)
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "sixteen.png")
    picture.quantize(64).save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    return {name: folder / name for name in GOOD}


BAD = {
    "text.png": "cannot be read as a picture",
    "empty.png": "is empty (0 bytes)",
    "huge.png": "6000 x 5000 pixels is larger than 24 megapixels",
    "cut.png": "cannot be read as a picture",
    "vector.png": "cannot be read as a picture",
}


@pytest.fixture(scope="session")
def bad_pictures(tmp_path_factory):
    """Files that are no pictures for this, by name."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.png").write_text("no picture at all")
    (folder / "empty.png").touch()
    Image.new("RGB", (6000, 5000)).save(folder / "huge.png")  # 30 megapixels in less than 100 kB
    scene().save(folder / "cut.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "vector.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    return {name: folder / name for name in BAD}
