"""What datasets of others look like: other sizes, other numbers of dimensions, other texts."""

import io
import json

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_vla.data.lerobot import LeRobotEpisodes

TOP, WRIST = "observation.images.top", "observation.images.wrist"


def encode(path, pictures, fps=10, kind="yuv444p", codec="libx264"):
    """Lossless up to the colours: odd sizes cannot be subsampled."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"qp": "0", "g": "2"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = *pictures.shape[1:3], kind, 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24" if picture.ndim == 3 else kind)))
        container.mux(stream.encode())


@pytest.mark.parametrize("size", [(33, 57), (57, 33), (1, 1)])
def test_pictures_of_odd_sizes_in_videos(copy, size):
    root = copy()
    pictures = np.random.default_rng(0).integers(0, 256, (58, *size, 3), np.uint8)
    encode(root / f"videos/{TOP}/chunk-000/file-000.mp4", pictures)
    dataset = LeRobotEpisodes(root, {TOP: [-0.1, 0.0]}, episodes=[0, 1], cameras=["top"])
    for row in (57, 3, 25):
        first = 0 if row < 25 else 25
        expected = pictures[[max(row - 1, first), row]].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(dataset[row][TOP].numpy() * 255, expected, atol=4)  # YUV and back


def test_grey_videos_have_three_channels(copy):
    root = copy()
    pictures = np.random.default_rng(0).integers(16, 236, (58, 8, 8), np.uint8)
    encode(root / f"videos/{TOP}/chunk-000/file-000.mp4", pictures, kind="gray")
    picture = LeRobotEpisodes(root, cameras=["top"])[3][TOP]
    assert torch.equal(picture, picture[:1].expand(3, 8, 8)) and picture.std() > 0.1


def test_depth_is_not_crushed_to_the_numbers_of_a_colour(copy):
    root = copy()
    depth = np.zeros((58, 8, 8), np.uint16) + np.arange(1000, 1058, dtype=np.uint16)[:, None, None]
    encode(root / f"videos/{TOP}/chunk-000/file-000.mp4", depth, kind="gray16le", codec="ffv1")
    with pytest.raises(
        ValueError, match=r"frame 3, .*top: .*expected pictures of 8 bits, came gray16le; .* `cameras`"
    ):
        LeRobotEpisodes(root)[3]
    assert LeRobotEpisodes(root, cameras=["wrist"])[3][WRIST].shape == (3, 72, 72)


@pytest.mark.parametrize(
    ("place", "mark"),
    [("info", "video.is_depth_map"), ("info", "is_depth_map"), ("video_info", "video.is_depth_map")],
)
@pytest.mark.parametrize("name", ["v30_video_av1", "v30_images"])
def test_a_camera_that_is_marked_as_depth_is_read_where_it_is_asked_for(copy, edit, name, place, mark):
    root = copy(name)
    expected = LeRobotEpisodes(root)[3]

    def declare(info):
        info["features"][TOP][place] = {mark: True}
        info["features"][WRIST][place] = None
        return info

    edit(root / "meta/info.json", declare)
    dataset = LeRobotEpisodes(root)
    assert dataset.camera_keys == [WRIST] and TOP not in dataset.features and TOP not in dataset[3]
    asked = LeRobotEpisodes(root, cameras=["top", "wrist"])
    assert asked.camera_keys == [TOP, WRIST] and torch.equal(asked[3][TOP], expected[TOP])


@pytest.mark.parametrize("size", [(33, 57), (57, 33), (1, 1)])
def test_pictures_of_odd_sizes_in_parquet(copy, rewrite, size):
    root, generator = copy("v30_images"), np.random.default_rng(0)
    pictures = generator.integers(0, 256, (95, *size, 3), np.uint8)
    numbers = iter(range(95))

    def replaced(column):
        files = [io.BytesIO() for _ in column]
        [Image.fromarray(pictures[next(numbers)]).save(file, "PNG") for file in files]
        return pa.array([{"bytes": file.getvalue(), "path": None} for file in files], column.type)

    for path in sorted(root.glob("data/*/*.parquet")):
        rewrite(path, WRIST, replaced)
    dataset = LeRobotEpisodes(root, cameras=["wrist"])
    for row in (0, 50, 94):
        assert torch.equal(dataset[row][WRIST], torch.from_numpy(pictures[row].transpose(2, 0, 1)).float() / 255)


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 14), pa.large_list(pa.float32())])
@pytest.mark.parametrize("name", ["v30_video_av1", "v21_video"])
def test_two_arms_have_fourteen_dimensions(copy, edit, rewrite, name, kind):
    root, generator = copy(name), np.random.default_rng(0)
    actions = {}

    def wider(path):
        rows = pq.read_table(path)["index"].to_pylist()
        new = generator.normal(size=(len(rows), 14)).astype(np.float32)
        actions.update(zip(rows, new, strict=True))
        return pa.array(new.tolist(), kind)

    for path in root.glob("data/*/*.parquet"):
        rewrite(path, "action", lambda _, path=path: wider(path))

    def declare(info):
        info["features"]["action"] |= {"shape": [14], "names": {"motors": [f"joint_{n}" for n in range(14)]}}
        return info

    edit(root / "meta/info.json", declare)
    dataset = LeRobotEpisodes(root, {"action": [0.0, 0.1]}, cameras=[])
    assert dataset[3]["action"].shape == (2, 14) and dataset[3]["observation.state"].shape == (7,)
    np.testing.assert_array_equal(dataset.column("action"), np.stack([actions[row] for row in range(len(dataset))]))


def test_every_column_of_numbers_may_have_a_window(copy, edit):
    root = copy()
    types = {"next.done": "bool", "steps": "int64", "grip": "float64", "pose": "float32"}
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        rows = np.asarray(table["index"])
        table = table.append_column("next.done", pa.array(rows % 3 == 0))
        table = table.append_column("steps", pa.array(rows.astype(np.int16) * 2))
        table = table.append_column("grip", pa.array(rows / 4))
        poses = [[[row, -row]] for row in rows.tolist()]
        table = table.append_column("pose", pa.array(poses, pa.list_(pa.list_(pa.float32()))))
        pq.write_table(table, path)
    features = {key: {"dtype": kind, "shape": [1, 2] if key == "pose" else [1]} for key, kind in types.items()}
    edit(root / "meta/info.json", lambda info: info | {"features": info["features"] | features})
    keys = [*types, "frame_index", "task_index", "timestamp"]
    dataset = LeRobotEpisodes(root, dict.fromkeys(keys, [-0.1, 0.0, 0.2]), cameras=[])
    item = dataset[24]  # the last of its episode
    assert (item["next.done"].dtype, item["next.done"].tolist()) == (torch.bool, [False, True, True])
    assert (item["steps"].dtype, item["steps"].tolist()) == (torch.int64, [46, 48, 48])
    assert (item["grip"].dtype, item["grip"].tolist()) == (torch.float32, [5.75, 6.0, 6.0])
    assert item["pose"].tolist() == [[[23, -23]], [[24, -24]], [[24, -24]]]
    assert item["frame_index"].tolist() == [23, 24, 24]
    for key in keys:
        assert item[key + "_is_pad"].tolist() == [False, False, True]


@pytest.mark.parametrize("texts", [["", "pick up 方块", "nimm den Würfel 🤖"], ["a", "a", " "]])
@pytest.mark.parametrize("name", ["v30_video_av1", "v21_video"])
def test_tasks_may_be_empty_or_of_any_language(copy, name, texts):
    root = copy(name)
    if name == "v21_video":
        lines = (root / "meta/tasks.jsonl").read_text().splitlines()
        texts = (texts * 9)[: len(lines)]
        changed = [json.loads(line) | {"task": text} for line, text in zip(lines, texts, strict=True)]
        lines = [json.dumps(line, ensure_ascii=False) for line in changed]
        (root / "meta/tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    else:
        table = pd.DataFrame({"task_index": range(3)}, index=texts)
        table.to_parquet(root / "meta/tasks.parquet")
    dataset = LeRobotEpisodes(root, cameras=[])
    numbers = dataset.column("task_index")
    assert dataset.texts("task").tolist() == [texts[number] for number in numbers]
    assert dataset[-1]["task"] == texts[numbers[-1]]


def test_a_camera_that_is_not_asked_for_is_not_decoded(copy, rewrite):
    root = copy("v30_images")
    for path in root.glob("data/*/*.parquet"):
        rewrite(path, TOP, lambda column: pa.array([{"bytes": b"none", "path": None}] * len(column), column.type))
    assert LeRobotEpisodes(root, cameras=["wrist"])[3][WRIST].shape == (3, 48, 64)
    with pytest.raises(ValueError, match="frame 3, .*top: a picture cannot be decoded: cannot identify"):
        LeRobotEpisodes(root)[3]
