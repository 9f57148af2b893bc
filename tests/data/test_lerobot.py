import json
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from hf_vla.data.lerobot import LeRobotEpisodes

TOP, WRIST = "observation.images.top", "observation.images.wrist"
CASES = [
    (name, setting)
    for name in ("v30_video_av1", "v30_images", "v21_video")
    for setting in ("plain", "delta", "window", "subset")
    if (name, setting) != ("v21_video", "subset")  # not recorded
]


@pytest.fixture
def recorded(goldens):
    def load(name, setting):
        folder = goldens / "lerobot" / "expected" / name
        meta = json.loads((folder / f"{setting}.json").read_text())
        pictures = dict(np.load(folder / "plain_pictures.npz")) if setting == "plain" else {}
        return meta, load_file(folder / f"{setting}.safetensors") | pictures

    return load


def pictures(item, key):
    """(window, channels, height, width) in [0, 255]; one time step where the item has no window."""
    picture = item[key] if item[key].ndim == 4 else item[key][None]
    return picture.numpy().astype(np.float64) * 255


def code(picture):
    """Read the number that every recorded frame carries: rows of four cells, white is 1; a red corner is camera 0."""
    _, height, width = picture.shape
    cells = picture[:, height // 8 :: height // 4, width // 8 :: width // 4][:, :4, :4]
    bits = (cells.mean(0) > 127).astype(int)
    episode = int("".join(map(str, bits[0])), 2)
    frame = int("".join(map(str, bits[1:3].ravel())), 2)
    return [episode, frame, int(cells[0, 3, 0] < 127), 1]


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_items_equal_what_lerobot_returns(goldens, recorded, name, setting):
    meta, expected = recorded(name, setting)
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / name, **meta["kwargs"])
    assert (len(dataset), dataset.num_frames) == (meta["len"],) * 2
    assert dataset.num_episodes == meta["num_episodes"]
    assert dataset.fps == meta["fps"]
    assert dataset.camera_keys == meta["camera_keys"]
    for position, index in enumerate(meta["indices"]):
        item = dataset[index]
        assert [*item] == [*meta["item_keys"], "task"]
        assert item["task"] == meta["task"][position]
        types = {key: [str(item[key].dtype).removeprefix("torch."), [*item[key].shape]] for key in meta["item_keys"]}
        assert types == meta["item_types"]
        for key in meta["item_keys"]:
            if key not in meta["camera_keys"]:
                np.testing.assert_array_equal(item[key].numpy(), expected[key][position])
                continue
            picture = pictures(item, key)
            assert [code(frame) for frame in picture] == expected[f"img_code/{key}"][position].tolist()
            np.testing.assert_allclose(
                picture.mean((2, 3)) / 255, expected[f"img_mean/{key}"][position], rtol=0, atol=1e-6
            )
            if position < len(expected.get(f"img_full/{key}", ())):
                np.testing.assert_array_equal(np.round(picture[0]), expected[f"img_full/{key}"][position])
                assert torch.equal(item[key], torch.from_numpy(expected[f"img_full/{key}"][position]).float() / 255)


@pytest.mark.parametrize("name", ["v30_video_av1", "v30_images", "v21_video"])
def test_statistics_equal_lerobots(goldens, name):
    expected = json.loads((goldens / "lerobot" / "expected" / name / "stats.json").read_text())
    statistics = LeRobotEpisodes(goldens / "lerobot" / "datasets" / name).statistics
    assert statistics.keys() == expected.keys()
    for key, entry in expected.items():
        assert statistics[key].keys() == entry.keys()
        for statistic, value in entry.items():
            np.testing.assert_allclose(statistics[key][statistic], value, rtol=1e-12, atol=1e-15)


def test_every_frame_is_the_right_one_in_any_order(goldens):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1")
    for row in np.random.default_rng(0).permutation(len(dataset)):
        item = dataset[int(row)]
        for camera, key in enumerate((TOP, WRIST)):
            assert code(pictures(item, key)[0]) == [int(item["episode_index"]), int(item["frame_index"]), camera, 1]


def test_indices_behave_like_a_sequence(goldens):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1", cameras=[])
    assert dataset[-1]["index"] == dataset[np.int64(174)]["index"] == 174
    for index in (175, -176):
        with pytest.raises(IndexError, match="of 175"):
            dataset[index]
    assert sum(1 for _ in dataset) == 175


def test_an_item_is_its_own_copy(goldens):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1", {"action": [0.0]}, cameras=[])
    for key in ("action", "observation.state", "timestamp"):
        before = dataset[3][key].clone()
        dataset[3][key].add_(1)
        assert torch.equal(dataset[3][key], before)


@pytest.mark.parametrize("cameras", [["wrist"], [WRIST]])
def test_cameras_select_what_is_decoded(goldens, cameras):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1", cameras=cameras)
    assert dataset.camera_keys == [key for key in dataset[0] if "images" in key] == [WRIST]
    assert TOP not in dataset.features


def test_columns_and_windows_equal_the_items(goldens):
    deltas = {"action": [-0.2, 0.0, 0.1, 0.7]}
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v21_video", deltas, episodes=[3, 1], cameras=[])
    values, is_pad = dataset.windows("action")
    assert [episode.index for episode in dataset.episodes] == [1, 3]
    assert dataset.episode_starts.tolist() == [0, 30, 64]
    for row, item in enumerate(dataset):
        np.testing.assert_array_equal(item["action"].numpy(), values[row])
        np.testing.assert_array_equal(item["action_is_pad"].numpy(), is_pad[row])
        np.testing.assert_array_equal(item["observation.state"].numpy(), dataset.column("observation.state")[row])
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("action")[0] = 0
    with pytest.raises(ValueError, match="no column 'actions'.*action"):
        dataset.column("actions")
    with pytest.raises(ValueError, match="give delta_timestamps"):
        dataset.windows("observation.state")


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_open_their_own_containers(demos, context):
    dataset = LeRobotEpisodes(demos, cameras=["agentview"])
    rows = np.random.default_rng(0).integers(0, len(dataset), 200).tolist()
    alone = [dataset[row][dataset.camera_keys[0]] for row in rows]  # the parent's containers are open by now
    loader = DataLoader(
        dataset,
        sampler=rows,
        batch_size=None,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(context),
    )
    for item, picture in zip(loader, alone, strict=True):
        assert torch.equal(item[dataset.camera_keys[0]], picture)


def test_pickling_keeps_what_is_read_and_drops_what_is_open(goldens):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1")
    picture = dataset[5][TOP]
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[5][TOP], picture)


def test_wrong_file_numbers_in_the_table_of_episodes_do_not_matter(copy, rewrite):
    root = copy()
    for path in root.glob("meta/episodes/*/*.parquet"):
        rewrite(path, "data/file_index", lambda column: pa.array([7] * len(column)))
    # Rows move to another file as well: only their own number counts.
    first, second = sorted(root.glob("data/chunk-000/*.parquet"))
    first.rename(root / "swap"), second.rename(first), (root / "swap").rename(second)
    dataset = LeRobotEpisodes(root, episodes=[1, 3])
    assert dataset.column("index").tolist() == [*range(25, 58), *range(78, 118)]
    assert code(pictures(dataset[40], TOP)[0]) == [3, 7, 0, 1]


def test_float64_lists_and_named_tasks_read_alike(copy, goldens, rewrite):
    root = copy()
    for path in root.glob("data/*/*.parquet"):
        rewrite(path, "action", lambda column: pa.array(column.to_pylist(), pa.list_(pa.float64())))
    tasks = pq.read_table(root / "meta/tasks.parquet").rename_columns(["task_index", "task"])
    pq.write_table(tasks, root / "meta/tasks.parquet")
    dataset = LeRobotEpisodes(root, cameras=[])
    same = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1", cameras=[])
    assert dataset[30]["action"].dtype == torch.float32
    np.testing.assert_array_equal(dataset.column("action"), same.column("action"))
    assert dataset.tasks == same.tasks


def test_columns_of_one_and_of_several_axes(copy, edit):
    root = copy()
    new = {"next.reward": [1], "next.done": [1], "pose": [2, 3], "note": [1]}
    types = {"next.reward": "float64", "next.done": "bool", "pose": "float32", "note": "string"}
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        rows = table["index"].to_pylist()
        table = table.append_column("next.reward", pa.array([row / 2 for row in rows]))
        table = table.append_column("next.done", pa.array([row % 2 == 0 for row in rows]))
        table = table.append_column("pose", pa.array([[[row] * 3, [-row] * 3] for row in rows]))
        table = table.append_column("note", pa.array([f"row {row}" for row in rows]))
        pq.write_table(table, path)
    features = {key: {"dtype": types[key], "shape": shape, "names": None} for key, shape in new.items()}
    edit(root / "meta/info.json", lambda info: info | {"features": info["features"] | features})
    item = LeRobotEpisodes(root, {"next.reward": [0.0, 0.1]}, cameras=[])[3]
    assert item["next.reward"].tolist() == [1.5, 2.0]
    assert (item["next.done"].dtype, item["next.done"].item()) == (torch.bool, False)
    assert item["pose"].tolist() == [[3, 3, 3], [-3, -3, -3]]
    assert item["note"] == "row 3"
    with pytest.raises(ValueError, match="no column 'note' to take a window of"):
        LeRobotEpisodes(root, {"note": [0.0]})


@pytest.mark.parametrize(("shift", "fits"), [(9e-5, True), (1.1e-4, False)])
def test_a_timestamp_may_miss_its_frame_by_a_tenth_of_a_millisecond(copy, shift, fits, rewrite):
    root = copy()
    for path in root.glob("data/*/*.parquet"):
        rewrite(path, "timestamp", lambda column: pa.array(np.asarray(column) + np.float32(shift), pa.float32()))
    dataset = LeRobotEpisodes(root)
    if fits:
        assert code(pictures(dataset[30], TOP)[0]) == [1, 5, 0, 1]
    else:
        with pytest.raises(ValueError, match=r"episode 1, frame 5, .*top: .*file-000\.mp4: expected a frame within"):
            dataset[30]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cameras": ["front"]}, r"no camera \['observation.images.front'\]; it has .*top.*wrist"),
        ({"cameras": "top"}, r"a list of names, came the text 'top'; write \['top'\]"),
        ({"episodes": [1, 6]}, r"expected episodes of its 6, 0 to 5, came \[6\]"),
        ({"episodes": []}, "came none"),
        ({"delta_timestamps": {"action": [0.0, 0.1002]}}, r"'action' should be multiples of 1/10 s, came \[0.1002\]"),
        ({"delta_timestamps": {"action": [0.0, float("nan")]}}, r"'action' should be multiples .*, came \[nan\]"),
        ({"delta_timestamps": {"action": [float("inf"), 0.0]}}, r"'action' should be multiples .*, came \[inf\]"),
        ({"delta_timestamps": {"actions": [0.0]}}, "no column 'actions' to take a window of; it reads .*'action'"),
        (
            {"delta_timestamps": {TOP: [0.0]}, "cameras": ["wrist"]},
            "no column 'observation.images.top' to take",
        ),
    ],
)
def test_wrong_requests_are_errors(goldens, arguments, message):
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1", **arguments)


@pytest.mark.parametrize("name", ["v30_video_av1", "v21_video"])
def test_windows_may_be_given_in_rows(goldens, name):
    source = goldens / "lerobot" / "datasets" / name
    dataset = LeRobotEpisodes(
        source, {"observation.state": [-0.1, 0.0]}, delta_indices={"action": range(3), TOP: [-1]}
    )
    seconds = {"observation.state": [-0.1, 0.0], "action": [0.0, 0.1, 0.2], TOP: [-0.1]}
    expected = LeRobotEpisodes(source, seconds)
    for row in (0, len(dataset) - 1):
        item, other = dataset[row], expected[row]
        assert [*item] == [*other] and item["action"].shape == (3, 7)
        assert all(torch.equal(item[key], other[key]) for key in other if key != "task")
    with pytest.raises(ValueError, match=r"'action' should be multiples of 1/10 s, came \[0.05\]"):
        LeRobotEpisodes(source, delta_indices={"action": [0, 0.5]})


def test_windows_in_rows_fit_a_rate_that_is_no_whole_number(copy, edit):
    root = copy("v30_images")
    edit(root / "meta/info.json", lambda info: info | {"fps": 29.97})
    dataset = LeRobotEpisodes(root, delta_indices={"action": range(-50, 50)}, cameras=[])
    np.testing.assert_array_equal(dataset._deltas["action"], range(-50, 50))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_pictures_are_copied_when_the_dataset_is_opened_and_shared_by_workers(copy, context, monkeypatch, tmp_path):
    """Not in every worker, when it needs the first of them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = LeRobotEpisodes(copy("v30_images"), cameras=["wrist"])
    copies = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert len(copies) == 1
    for number, item in enumerate(DataLoader(dataset, None, num_workers=1, multiprocessing_context=context)):
        assert torch.equal(item[WRIST], dataset[number][WRIST])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == copies


def test_deltas_within_a_tenth_of_a_millisecond_are_rounded(goldens):
    source = goldens / "lerobot" / "datasets" / "v30_video_av1"
    assert LeRobotEpisodes(source, {"action": [0.10009]}, cameras=[])[0]["action"].shape == (1, 7)


@pytest.mark.parametrize(("name", "frames", "deltas"), [("robosuite_demos", 1584, 20), ("metaworld_demos", 2251, 80)])
def test_the_example_data_reads_in_full(name, frames, deltas, request):
    source = request.config.rootpath / "scripts" / "data" / name
    dataset = LeRobotEpisodes(source, {"action": [step / deltas for step in range(4)]})
    assert len(dataset) == frames
    for row in np.linspace(0, frames - 1, 25).astype(int):
        item = dataset[row]
        assert {tuple(item[key].shape) for key in dataset.camera_keys} == {(3, 96, 96)}
        assert item["action"].shape[0] == 4
