"""Items per second of a LeRobot dataset with video: `OMP_NUM_THREADS=1 python scripts/benchmark_data.py`.

A dataset is generated (two cameras, AV1 as LeRobot encodes it, textured pictures that move) and read in several
orders: rows at random, in order, and shuffled by windows (`WindowSampler`); single rows, and rows with a chunk of 16
actions and two frames of each camera; with and without `FrameCache`; through a `DataLoader` with workers. What
decoding alone costs is printed first. Where lerobot is installed it reads the same rows, with each of its backends
that imports, in turns with ours. Each number is the best of several rounds; other programs disturb CPU times less
than the others.
"""

import argparse
import importlib.machinery
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, RandomSampler

from hf_vla.data.cache import FrameCache
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.sampling import WindowSampler
from hf_vla.data.video import VideoFrames

FPS, EPISODE, BATCH = 30, 250, 32
CAMERAS = ["observation.images.top", "observation.images.wrist"]
WINDOWS = {"action": [step / FPS for step in range(16)]} | {camera: [-1 / FPS, 0.0] for camera in CAMERAS}


def generate(root, frames, size):
    from hf_vla.data.recorder import LeRobotRecorder

    generator = np.random.default_rng(0)
    texture = generator.integers(0, 256, (size // 2, size // 2, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    features = {key: {"dtype": "float32", "shape": [7], "names": None} for key in ("action", "observation.state")}
    picture = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"]}
    with LeRobotRecorder(root, FPS, features | dict.fromkeys(CAMERAS, picture)) as recorder:
        for frame in track(range(frames), f"generating {frames} frames of {size} x {size} in {root}"):
            phases = [(frame / 40 + camera, frame / 30 + camera) for camera in range(len(CAMERAS))]
            corners = [(np.array([np.sin(y), np.cos(x)]) + 1) * size / 2 for y, x in phases]
            places = [(slice(int(y), int(y) + size), slice(int(x), int(x) + size)) for y, x in corners]
            pictures = {key: texture[place] for key, place in zip(CAMERAS, places, strict=True)}
            numbers = {key: generator.normal(size=7).astype(np.float32) for key in features}
            recorder.add_frame(pictures | numbers | {"task": "push the block"})
            if (frame + 1) % EPISODE == 0:
                recorder.save_episode()


def stand_in_for_torchvision():
    """What LeRobot's PyAV backend uses of torchvision, which has no build for every torch."""

    class VideoReader:
        def __init__(self, source, stream="video"):
            self.container = av.open(source)
            self.frames = self.container.decode(video=0)

        def seek(self, seconds, keyframes_only=False):
            stream = self.container.streams.video[0]
            self.container.seek(round(seconds / stream.time_base), stream=stream)
            self.frames = self.container.decode(video=0)

        def __iter__(self):
            for frame in self.frames:
                picture = torch.as_tensor(frame.to_rgb().to_ndarray()).permute(2, 0, 1)
                yield {"data": picture, "pts": float(frame.pts * frame.time_base)}

    for name in ("torchvision", "torchvision.transforms", "torchvision.io"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    torchvision = sys.modules["torchvision"]
    torchvision.transforms, torchvision.io = sys.modules["torchvision.transforms"], sys.modules["torchvision.io"]
    torchvision.set_video_backend = lambda backend: None
    torchvision.io.VideoReader = VideoReader


def lerobot_readers(root):
    """LeRobot's datasets by the name of their backend; none where lerobot is not installed."""
    if not importlib.util.find_spec("lerobot"):
        return {}
    if not importlib.util.find_spec("torchvision"):
        stand_in_for_torchvision()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    name = f"lerobot {importlib.metadata.version('lerobot')}"
    backends = ["pyav", "torchcodec"] if torchcodec_decoder() else ["pyav"]
    return {
        f"{name} {backend}": partial(LeRobotDataset, "local/benchmark", root=root, video_backend=backend)
        for backend in backends
    }


def torchcodec_decoder():
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError):
        return None
    return VideoDecoder


def timed(read, rows):
    """Items per second, and CPU milliseconds per item."""
    clock, cpu = time.perf_counter(), time.process_time()
    for row in rows:
        read(row)
    return len(rows) / (time.perf_counter() - clock), 1e3 * (time.process_time() - cpu) / len(rows)


def best(results):
    return max(result[0] for result in results), min(result[1] for result in results)


def decoding(path, starts, count):
    """CPU milliseconds per item of one file, ours and torchcodec's."""
    with av.open(str(path)) as container:
        starts = starts[starts <= container.streams.video[0].frames]  # of the episodes in this file
    places = np.random.default_rng(0).integers(1, starts[-1], count).tolist()
    orders = {
        "one frame, random": [[place] for place in places],
        "two frames, random": [[place - 1, place] for place in places],
        "one frame, in order": [[place] for place in range(min(count, starts[-1]))],
        "one frame, windows side by side": [[place] for place in list(WindowSampler(starts, num_open=16))[:count]],
    }
    readers = {"VideoFrames": VideoFrames().read}
    if decoder := torchcodec_decoder():
        decoder = decoder(str(path), dimension_order="NHWC", seek_mode="approximate")
        readers["torchcodec"] = lambda path, times: decoder.get_frames_played_at(times).data.numpy()
    table = Table("decoding alone, CPU ms per item", *readers)
    for order, items in orders.items():
        # Half a frame late torchcodec is sure to take the right one.
        late = {reader: 0.5 * (reader == "torchcodec") for reader in readers}
        results = {reader: [] for reader in readers}
        for _ in range(5):
            for reader, read in readers.items():
                times = [[(place + late[reader]) / FPS for place in item] for item in items]
                results[reader].append(timed(partial(read, path), times))
        table.add_row(order, *(f"{best(result)[1]:.3f}" for result in results.values()))
    return table


def reading(readers, starts, items):
    count = int(starts[-1])
    orders = {
        "random": np.random.default_rng(0).integers(0, count, items).tolist(),
        "in order": list(range(items)),
        "windows": list(WindowSampler(starts, num_open=16))[:items],
    }
    table = Table("item", "order", "reader", "items/s", "CPU ms per item")
    for name, windows in (("one frame", None), ("chunk 16, two frames", WINDOWS)):
        datasets = {reader: make(delta_timestamps=windows) for reader, make in readers.items()}
        for order, rows in orders.items():
            results = {reader: [] for reader in datasets}
            for dataset in datasets.values():
                timed(dataset.__getitem__, rows)
            for _ in range(2):
                for reader, dataset in datasets.items():
                    results[reader].append(timed(dataset.__getitem__, rows))
            for reader, result in results.items():
                speed, cpu = best(result)
                table.add_row(name, order, reader, f"{speed:.0f}", f"{cpu:.2f}")
    return table


def loading(readers, starts, items, workers):
    table = Table(f"DataLoader, {workers} workers, batches of {BATCH}", "order", "items/s")
    for reader, make in readers.items():
        dataset = make(delta_timestamps=WINDOWS)
        samplers = {
            "random": RandomSampler(dataset),
            "windows": WindowSampler(starts, lanes=workers, batch_size=BATCH),
        }
        for order, sampler in samplers.items():
            loader = iter(DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers))
            next(loader)  # the workers have begun
            speed, _ = timed(lambda _, loader=loader: next(loader), range(items // BATCH))
            table.add_row(reader, order, f"{speed * BATCH:.0f}")
            del loader
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=5000, help="rows of the generated dataset (default: 5000)")
    parser.add_argument("--size", type=int, default=128, help="height and width of its pictures (default: 128)")
    parser.add_argument("--items", type=int, default=600, help="items per measurement (default: 600)")
    parser.add_argument("--workers", type=int, default=2, help="workers of the DataLoader (default: 2)")
    parser.add_argument("--dataset", type=Path, help="read this one, of such cameras, instead of generating one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="hf_vla_benchmark_") as folder:
        root = args.dataset or Path(folder, "dataset")
        if not args.dataset:
            generate(root, args.frames - args.frames % EPISODE or EPISODE, args.size)
        cache = FrameCache(Path(folder, "cache"), 4 * 10**9)
        ours = {
            "hf_vla": partial(LeRobotEpisodes, root),
            "hf_vla, FrameCache": partial(LeRobotEpisodes, root, frame_cache=cache),
        }
        readers = ours | lerobot_readers(root)
        starts = LeRobotEpisodes(root, cameras=[]).episode_starts
        items = min(args.items, int(starts[-1]))
        console.print(decoding(sorted(root.glob(f"videos/{CAMERAS[0]}/*/*.mp4"))[0], starts, items))
        # Workers first: those of LeRobot with torchcodec fail where decoders were open before they were forked.
        console.print(loading(readers, starts, 4 * items, args.workers))
        console.print(reading(readers, starts, items))
    packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "av", "numpy"))
    console.print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {packages}")


if __name__ == "__main__":
    main()
