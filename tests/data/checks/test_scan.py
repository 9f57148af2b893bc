import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vla.data.checks.scan import SHOWN_PLACES, DatasetScan, merged_plan, plan_scan
from hf_vla.data.checks.scan_processes import scan_datasets
from hf_vla.data.lerobot import LeRobotEpisodes

GOLDEN = ["v30_video_av1", "v30_images", "v21_video"]


def scanned(*args, **kwargs):
    scan = DatasetScan(plan_scan(*args, **kwargs))
    for path in scan.plan.files:
        for _ in scan.read(path):
            pass
    scan.check()
    return scan


def assert_is_of(statistics, rows):
    rows, summary = np.asarray(rows, np.float64), statistics.summary()
    assert statistics.count == len(rows)
    np.testing.assert_allclose(summary["mean"], rows.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(summary["std"], rows.std(0), rtol=1e-9)
    np.testing.assert_array_equal(summary["min"], rows.min(0))
    np.testing.assert_array_equal(summary["max"], rows.max(0))
    for name, rank in {"q01": 0.01, "q50": 0.5, "q99": 0.99}.items():
        np.testing.assert_allclose(summary[name], np.quantile(rows, rank, axis=0), rtol=1e-14)


def in_some_order(rows):
    return sorted(map(tuple, rows.reshape(len(rows), -1).tolist()))


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_numpy_on_what_the_training_reads(goldens, name):
    root = goldens / "lerobot" / "datasets" / name
    dataset, found = LeRobotEpisodes(root), scanned(root, chunk_size=4)
    assert (found.num_rows, found.num_episodes) == (len(dataset), dataset.num_episodes)
    assert list(found.columns) == ["action", "observation.state"]
    for key, column in found.columns.items():
        assert_is_of(column.statistics, dataset.column(key))
        assert in_some_order(column.sample.entries()) == in_some_order(dataset.column(key))
        assert column.names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    starts = dataset.episode_starts
    windows = [
        dataset.column("action")[first : first + 4]
        for begin, end in zip(starts[:-1], starts[1:], strict=True)
        for first in range(begin, end - 3)
    ]
    assert in_some_order(found.windows.entries()) == in_some_order(np.stack(windows))


@pytest.mark.parametrize("name", GOLDEN)
def test_reads_chosen_episodes(goldens, name):
    root = goldens / "lerobot" / "datasets" / name
    dataset, found = LeRobotEpisodes(root, episodes=[1, 3]), scanned(root, episodes=[3, 1])
    assert (found.num_rows, found.num_episodes, found.plan.rows) == (len(dataset), 2, len(dataset))
    assert_is_of(found.columns["action"].statistics, dataset.column("action"))
    for wrong, said in (([0, 99], r"\[99\]"), ([], "none"), ([-1], r"\[-1\]")):
        with pytest.raises(ValueError, match=f"expected episodes of its {'.*'}, came {said}"):
            plan_scan(root, episodes=wrong)


@pytest.mark.parametrize(("row_group", "read"), [(50, [2]), (80, [1]), (None, [0])])
def test_row_groups_without_chosen_episodes_are_not_read(write_dataset, row_group, read):
    root, columns = write_dataset([50, 50, 50, 50], row_group=row_group)
    found = scanned(root, episodes=[2])
    assert found._wanted_groups(pq.read_metadata(found.plan.files[0])) == read
    assert (found.num_rows, found.num_episodes) == (50, 1) and len(found.windows.entries()) == 35
    assert_is_of(found.columns["action"].statistics, columns["action"][100:150])
    assert in_some_order(found.columns["action"].sample.entries()) == in_some_order(columns["action"][100:150])


def test_windows_go_across_batches_but_not_across_episodes(write_dataset, monkeypatch):
    root, columns = write_dataset([37, 5, 3, 61], files=2)
    expected = scanned(root, chunk_size=5)
    windows = expected.windows.entries()
    assert windows.shape == (33 + 1 + 57, 5, 2)
    numbers = columns["action"][:, 0]  # 0, 1, 2, ...: the rows' own numbers
    assert set(windows[:, 0, 0]) == {*numbers[:33], numbers[37], *numbers[45:102]}
    np.testing.assert_array_equal(windows[:, :, 0] - windows[:, :1, 0], np.tile(np.arange(5), (91, 1)))
    for rows in (1, 4, 7):
        monkeypatch.setattr("hf_vla.data.checks.scan.BATCH_ROWS", rows)
        np.testing.assert_array_equal(scanned(root, chunk_size=5).windows.entries(), windows)
    assert scanned(root, chunk_size=62).windows.entries() is None


def test_scans_of_several_files_merge(write_dataset):
    root, columns = write_dataset([20, 30, 40], files=3)
    whole, parts = scanned(root), [DatasetScan(plan_scan(root)) for _ in range(2)]
    for part, paths in zip(parts, (whole.plan.files[2:], whole.plan.files[:2]), strict=True):
        for path in paths:
            list(part.read(path))
    with pytest.raises(ValueError, match="gives episode 0 20 rows, the data files have 0 for it"):
        parts[0].check()
    parts[0].merge(parts[1])
    parts[0].check()
    assert (parts[0].num_rows, parts[0].num_episodes) == (90, 3)
    assert_is_of(parts[0].columns["action"].statistics, columns["action"])
    np.testing.assert_array_equal(parts[0].windows.entries(), whole.windows.entries())
    np.testing.assert_array_equal(
        parts[0].columns["action"].sample.entries(), whole.columns["action"].sample.entries()
    )


def test_datasets_merge_where_their_dimensions_agree(write_dataset, goldens):
    (first, one), (second, two) = write_dataset([20, 30]), write_dataset([25], names=["x", "y"])
    scans = [scanned(first), scanned(second)]
    merged = DatasetScan(merged_plan([scan.plan for scan in scans]))
    for scan in scans:
        merged.merge(scan)
    assert (merged.num_rows, merged.num_episodes, merged.name) == (75, 3, "merged")
    assert_is_of(merged.columns["action"].statistics, np.concatenate([one["action"], two["action"]]))
    assert merged.columns["action"].names == ("action_0", "action_1")  # the second's x and y may be others
    assert len(merged.windows.entries()) == 5 + 15 + 10
    assert_is_of(scans[0].columns["action"].statistics, one["action"])  # the parts stay what they are
    other = plan_scan(goldens / "lerobot" / "datasets" / "v30_images")
    assert merged_plan([scans[0].plan, other]).columns == {}
    assert merged_plan([other, other]).columns == other.columns


def test_rows_that_are_no_numbers_are_named_and_left_out(write_dataset):
    bad = np.zeros((90, 2), bool)
    bad[[25, 26, 70], [0, 1, 1]] = True

    def spoil(columns):
        columns["action"][bad] = [np.nan, np.inf, -np.inf]

    root, columns = write_dataset([20, 30, 40], files=2, change=spoil)
    found = scanned(root, chunk_size=4)
    action, state = found.columns["action"], found.columns["observation.state"]
    assert (action.bad_rows, action.bad_places) == (3, [(1, 5), (1, 6), (2, 20)])
    assert (state.bad_rows, state.bad_places) == (0, [])
    good = columns["action"][~bad.any(1)]
    assert_is_of(action.statistics, good)
    assert_is_of(state.statistics, columns["observation.state"])
    assert found.num_rows == 90 and in_some_order(action.sample.entries()) == in_some_order(good)
    # of 17 + 27 + 37 windows, those that hold a bad row are missing: 5 and 4
    assert len(found.windows.entries()) == 81 - 9 and np.isfinite(found.windows.entries()).all()


def test_a_window_does_not_leave_its_episode_where_frames_seem_to_go_on(write_dataset):
    def spoil(columns):
        columns["action"][4:8] = np.nan  # frames 0 to 3 of the second episode: after the first one's 3 comes its 4

    root, _ = write_dataset([4, 10], change=spoil)
    starts = scanned(root, chunk_size=2).windows.entries()[:, 0, 0]
    assert sorted(starts) == [0, 1, 2, 8, 9, 10, 11, 12]


def test_of_many_bad_rows_the_first_are_named_whatever_the_order(write_dataset):
    def spoil(columns):
        columns["action"][5:95] = np.nan

    root, _ = write_dataset([50, 50], files=2, change=spoil)
    scan = DatasetScan(plan_scan(root))
    for path in reversed(scan.plan.files):
        list(scan.read(path))
    action = scan.columns["action"]
    assert action.bad_rows == 90 and action.bad_places == [(0, 5 + place) for place in range(SHOWN_PLACES)]
    assert action.statistics.count == 10


def test_what_float32_cannot_hold_is_no_number(write_dataset):
    root, _ = write_dataset([20])
    path = next(root.glob("data/*/*.parquet"))
    table = pq.read_table(path)
    values = np.arange(40.0).reshape(20, 2)
    values[3, 1] = 1e300
    pq.write_table(table.set_column(table.column_names.index("action"), "action", [pa.array(list(values))]), path)
    action = scanned(root).columns["action"]
    assert (action.bad_rows, action.bad_places) == (1, [(0, 3)])
    assert action.sample.entries().dtype == np.float32


def test_other_columns_of_numbers(write_dataset):
    root, columns = write_dataset([20, 30])
    found = scanned(root, columns=["reward", "action", "reward"])
    assert list(found.columns) == ["reward", "action"] and found.columns["reward"].names == ("reward_0",)
    assert_is_of(found.columns["reward"].statistics, columns["reward"][:, None])
    assert scanned(root, columns=["reward"]).windows.entries() is None


@pytest.mark.parametrize(
    ("key", "came"),
    [
        ("lost", "no column"),
        ("observation.images.top", r"video of shape \[8, 8, 3\]"),
        ("words", r"string of shape \[1\]"),
        ("pose", r"float32 of shape \[4, 4\]"),
    ],
)
def test_columns_that_are_no_rows_of_numbers_are_refused(write_dataset, edit, key, came):
    root, _ = write_dataset([20])
    features = {
        "observation.images.top": {"dtype": "video", "shape": [8, 8, 3], "names": None},
        "words": {"dtype": "string", "shape": [1], "names": None},
        "pose": {"dtype": "float32", "shape": [4, 4], "names": None},
    }
    edit(root / "meta/info.json", lambda info: info | {"video_path": "x", "features": info["features"] | features})
    with pytest.raises(ValueError, match=rf"under '{key}', came {came}; there are \['action', 'obs"):
        plan_scan(root, columns=["action", key])


def test_a_dataset_without_action_and_state_asks_for_columns(write_dataset, edit):
    root, _ = write_dataset([20])
    edit(root / "meta/info.json", lambda info: info | {"features": {"reward": info["features"]["reward"]}})
    with pytest.raises(ValueError, match=r"neither action nor observation.state; name columns of \['reward'\]"):
        plan_scan(root)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [[0.0, 1.0]] * 7 + [[1.0, 2.0, 3.0]] + [[1.0]] + [[0.0, 1.0]] * 11,
            r"came \[1.0, 2.0, 3.0\] in episode 0, f",
        ),
        ([[0.0, 1.0]] * 7 + [None] + [[0.0, 1.0]] * 12, "came None in episode 0, frame 7"),
        (pa.array([[0.0] * 3] * 20, pa.list_(pa.float32(), 3)), r"came \[0.0, 0.0, 0.0\] in episode 0, frame 0"),
        ([0.0] * 20, "expected 2 numbers a row under 'action', as meta/info.json says, came 0.0"),
        ([["a", "b"]] * 20, "expected numbers, came list<"),
    ],
)
def test_rows_of_another_shape_are_refused_with_their_place(write_dataset, rewrite, values, message):
    root, _ = write_dataset([20])
    path = next(root.glob("data/*/*.parquet"))
    rewrite(path, "action", lambda _: pa.chunked_array([pa.array(values)]))
    with pytest.raises(ValueError, match=message) as error:
        scanned(root)
    assert str(path) in str(error.value)


def test_rows_and_table_of_episodes_must_agree(write_dataset, rewrite):
    root, _ = write_dataset([20, 30], files=2)
    files = sorted(root.glob("data/*/*.parquet"))
    table = next(root.glob("meta/episodes/*/*.parquet"))
    rewrite(table, "length", lambda _: [[20, 31]])
    with pytest.raises(ValueError, match="gives episode 1 31 rows, the data files have 30 for it"):
        scanned(root)
    assert scanned(root, episodes=[0]).num_rows == 20
    rewrite(table, "length", lambda _: [[20, 30]])
    for episode in (7, -1):
        rewrite(files[1], "episode_index", lambda _, episode=episode: [[episode] * 30])
        for chosen in (None, [0]):
            with pytest.raises(ValueError, match=f"there are rows of episode {episode}, which the table"):
                scanned(root, episodes=chosen)


def test_damaged_files_and_files_without_a_column_are_named(write_dataset):
    root, _ = write_dataset([20, 30], files=2)
    first, second = sorted(root.glob("data/*/*.parquet"))
    second.write_bytes(second.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{second}: "):
        scanned(root)
    pq.write_table(pq.read_table(first).drop_columns(["observation.state"]), first)
    with pytest.raises(ValueError, match=rf"{first}: expected the columns \['observation.state'\], the file has"):
        scanned(root)


def test_of_a_dataset_on_the_hub_no_video_is_downloaded(goldens, hub):
    root = goldens / "lerobot" / "datasets" / "v30_video_av1"
    hub.upload("somebody/demos", root)
    found = scanned("somebody/demos", revision="main")
    assert found.name == "somebody/demos"
    assert_is_of(found.columns["action"].statistics, LeRobotEpisodes(root).column("action"))
    assert hub.fetched("data/*") and not hub.fetched("videos/*")


@pytest.mark.parametrize("workers", [1, 2])
def test_of_pictures_in_parquet_on_the_hub_nothing_is_downloaded(goldens, hub, copy, rewrite, workers):
    root, generator = copy("v30_images"), np.random.default_rng(0)
    for path in root.glob("data/*/*.parquet"):  # a hundred times what the numbers take
        picture = {"bytes": generator.bytes(20_000), "path": None}
        rewrite(path, "observation.images.top", lambda column, p=picture: pa.array([p] * len(column), column.type))
        table = pq.read_table(path)
        pq.write_table(table, path, use_dictionary=False, compression="none")
    hub.upload("somebody/pictures", root)
    (found,) = scan_datasets([plan_scan("somebody/pictures", episodes=[1, 3])], workers)
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_images", episodes=[1, 3], cameras=[])
    assert found.num_rows == len(dataset)
    for key, column in found.columns.items():
        assert_is_of(column.statistics, dataset.column(key))
    assert 0 < hub.sent("*/data/*") < sum(path.stat().st_size for path in root.glob("data/*/*")) / 5


def test_statistics_are_what_the_training_puts_into_a_checkpoint(demos):
    from hf_vla.training.datasets import open_datasets
    from hf_vla.training.facts import data_facts
    from hf_vla.training.recipe import load_recipe

    path = Path(__file__).parents[3] / "scripts" / "recipes" / "tinyvla_tiny.yaml"
    data = load_recipe(path, {"data.source": str(demos), "data.eval_episodes": [3, 7]}).data
    (trained,) = data_facts(data, open_datasets(data)).datasets.values()
    found = scanned(demos, episodes={*range(22)} - {3, 7})
    entries = {"action": "action", "observation.state": "state"}
    assert (found.num_episodes, found.num_rows) == tuple(
        trained.statistics[name] for name in ("num_trajectories", "num_transitions")
    )
    for key, column in found.columns.items():
        own, expected = column.statistics.to_dict(), trained.statistics[entries[key]]
        assert own.keys() == expected.keys()
        for name in own:
            np.testing.assert_allclose(own[name], expected[name], rtol=1e-12, atol=1e-15)


def test_statistics_are_what_lerobot_wrote(goldens):
    root = goldens / "lerobot" / "datasets" / "v30_video_av1"
    expected = json.loads((root / "meta/stats.json").read_text())
    for key, column in scanned(root).columns.items():
        summary = column.statistics.summary()
        for name in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(summary[name], expected[key][name], rtol=1e-5, atol=1e-6)
