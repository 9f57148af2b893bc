"""Cameras under the names of their roles, and datasets without some of their rows."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.schema import camera_key

TOP, WRIST, HAND = "observation.images.top", "observation.images.wrist", "observation.images.hand"
NAMES = ["v30_video_av1", "v30_images", "v21_video"]


@pytest.fixture
def folder(goldens):
    return goldens / "lerobot" / "datasets"


@pytest.mark.parametrize("role", ["hand", HAND])
@pytest.mark.parametrize("name", NAMES)
def test_a_camera_is_read_under_the_name_of_its_role(folder, name, role):
    plain = LeRobotEpisodes(folder / name, {WRIST: [0.0, 0.1]})
    dataset = LeRobotEpisodes(folder / name, {HAND: [0.0, 0.1]}, camera_map={role: "wrist"})
    assert dataset.camera_keys == [TOP, HAND]
    assert [*dataset.features] == [HAND if key == WRIST else key for key in plain.features]
    assert dataset.statistics.keys() == {HAND if key == WRIST else key for key in plain.statistics}
    for row in (0, len(plain) - 1):
        item, expected = dataset[row], plain[row]
        assert WRIST not in item and [*item][:2] == [TOP, HAND]
        assert torch.equal(item[HAND], expected[WRIST]) and torch.equal(item[TOP], expected[TOP])
        assert torch.equal(item[HAND + "_is_pad"], expected[WRIST + "_is_pad"])
    alone = LeRobotEpisodes(folder / name, cameras=["hand"], camera_map={role: WRIST})
    assert [key for key in alone[3] if "images" in key] == [HAND]
    assert torch.equal(alone[3][HAND], plain[3][WRIST][0])


@pytest.mark.parametrize("name", NAMES)
def test_two_cameras_may_change_their_names(folder, name):
    plain = LeRobotEpisodes(folder / name)
    dataset = LeRobotEpisodes(folder / name, camera_map={"top": "wrist", "wrist": "top"})
    assert torch.equal(dataset[3][TOP], plain[3][WRIST]) and torch.equal(dataset[3][WRIST], plain[3][TOP])
    for statistic, value in dataset.statistics.get(TOP, {}).items():
        np.testing.assert_array_equal(value, plain.statistics[WRIST][statistic])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_camera_on_the_hub_is_found_by_its_own_name(hub, folder, name, streaming):
    hub.upload("somebody/blocks", folder / name)
    options = {"camera_map": {"hand": "wrist"}, "cameras": ["hand"], "streaming": streaming, "episodes": [1]}
    dataset = LeRobotEpisodes("somebody/blocks", **options)
    expected = LeRobotEpisodes(folder / name, episodes=[1])
    assert torch.equal(dataset[3][HAND], expected[3][WRIST])
    assert not any(TOP in path for path in hub.fetched())


def test_a_camera_of_any_name_may_have_a_role(copy, edit):
    """Such as `observation.image`, which some datasets have."""
    root = copy()

    def rename(info):
        return {**info, "features": {("view" if key == TOP else key): v for key, v in info["features"].items()}}

    edit(root / "meta/info.json", rename)
    (root / "videos" / TOP).rename(root / "videos/view")
    for path in root.glob("meta/episodes/*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([name.replace(TOP, "view") for name in table.column_names]), path)
    assert LeRobotEpisodes(root, camera_map={"top": "view"})[0][TOP].shape == (3, 108, 108)


@pytest.fixture
def openpi(copy, edit):
    """The dataset as openpi's converters name its columns."""
    names = {"action": "actions", "observation.state": "state", TOP: "image", WRIST: "wrist_image"}

    def make(name="v30_images"):
        root = copy(name)

        def rename(entries):
            return {names.get(key, key): value for key, value in entries.items()}

        edit(root / "meta/info.json", lambda info: info | {"features": rename(info["features"])})
        edit(root / "meta/stats.json", rename)
        for path in root.glob("data/*/*.parquet"):
            table = pq.read_table(path)
            pq.write_table(table.rename_columns([names.get(key, key) for key in table.column_names]), path)
        return root

    return make


COLUMNS = {"action": "actions", "observation.state": "state"}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_other_names_are_read_under_ours(hub, openpi, folder, streaming):
    root = openpi()
    hub.upload("somebody/blocks", root)
    options = {"delta_timestamps": {"action": [0.0, 0.1], TOP: [0.0]}, "episodes": [1, 3]}
    expected = LeRobotEpisodes(folder / "v30_images", **options)
    cameras = {"top": "image", "wrist": "wrist_image"}
    for source in (root, "somebody/blocks"):
        dataset = LeRobotEpisodes(
            source, **options, camera_map=cameras, column_map=COLUMNS, streaming=streaming and source != root
        )
        assert [*dataset.features] == [*expected.features] and dataset.camera_keys == [TOP, WRIST]
        assert dataset.statistics.keys() == expected.statistics.keys()
        np.testing.assert_array_equal(dataset.column("observation.state"), expected.column("observation.state"))
        for row in (0, len(expected) - 1):
            item, other = dataset[row], expected[row]
            assert [*item] == [*other] and item["task"] == other["task"]
            assert all(torch.equal(item[key], other[key]) for key in other if key != "task")
    assert [*LeRobotEpisodes(root)[0]][:2] == ["image", "wrist_image"] and "actions" in LeRobotEpisodes(root)[0]


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (
            {"column_map": {"action": "act"}},
            r"no column \['act'\] for the roles of column_map; it has \['state', 'act",
        ),
        ({"column_map": {"action": "image"}}, r"no column \['image'\] for the roles of column_map"),
        ({"column_map": {"action": "timestamp"}}, r"no column \['timestamp'\] for the roles of column_map"),
        (
            {"column_map": {"state": "actions"}},
            "another role of column_map for each of its columns .*came {'state': 'a",
        ),
        ({"column_map": {"a": "state", "b": "state"}}, "another role of column_map for each of its columns"),
        ({"column_map": {"image": "state"}}, "names that no other column of .* keeps, came {} and {'image': 'state'}"),
    ],
)
def test_wrong_names_of_columns_are_errors(openpi, maps, message):
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(openpi(), cameras=[], **maps)


def test_two_columns_may_change_their_names(folder):
    plain = LeRobotEpisodes(folder / "v30_images", cameras=[])
    swapped = {"action": "observation.state", "observation.state": "action"}
    dataset = LeRobotEpisodes(folder / "v30_images", cameras=[], column_map=swapped)
    np.testing.assert_array_equal(dataset.column("action"), plain.column("observation.state"))
    np.testing.assert_array_equal(dataset.statistics["action"]["mean"], plain.statistics["observation.state"]["mean"])


def test_a_column_of_observations_is_a_cameras_own_name():
    assert camera_key("wrist") == camera_key(WRIST) == WRIST
    assert camera_key("observation.image") == "observation.image" and camera_key("image") == "observation.images.image"


@pytest.mark.parametrize(
    ("camera_map", "message"),
    [
        ({"hand": "front"}, r"no camera \['observation.images.front'\] for the roles of camera_map; it has .*top"),
        ({"top": "wrist"}, "another role of camera_map for each of its cameras .*, came {'top': 'wrist'}; a role may"),
        ({"a": "top", "b": TOP}, "expected another role of camera_map for each"),
        ({"a": "top", "observation.images.a": "wrist"}, "expected another role of camera_map for each"),
    ],
)
def test_wrong_roles_are_errors(folder, camera_map, message):
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(folder / NAMES[0], camera_map=camera_map)


@pytest.mark.parametrize("name", NAMES)
def test_windows_jump_over_rows_that_were_taken_out(folder, name):
    deltas = {"action": [-0.1, 0.0, 0.1], TOP: [0.0, 0.2]}
    whole = LeRobotEpisodes(folder / name, deltas)
    mask = np.random.default_rng(0).random(len(whole)) < 0.6
    mask[whole.column("episode_index") == 2] = False  # an episode of which nothing is left
    kept, rows = whole.keep(mask), np.flatnonzero(mask)
    episodes, actions = whole.column("episode_index")[rows], whole.column("action")[rows]
    assert len(kept) == mask.sum() and len(whole) == len(mask)
    assert [episode.index for episode in kept.episodes] == [0, 1, 3, *range(4, len(whole.episodes))]
    assert kept.episode_starts.tolist() == [*np.unique(episodes, return_index=True)[1], len(kept)]
    np.testing.assert_array_equal(kept.column("index"), rows)
    plain = LeRobotEpisodes(folder / name)
    for row in (0, 1, len(kept) // 2, len(kept) - 1):
        item = kept[row]
        own = np.flatnonzero(episodes == episodes[row])
        for key, steps in {"action": [-1, 0, 1], TOP: [0, 2]}.items():
            window = np.clip(row + np.array(steps), own[0], own[-1])
            assert item[key + "_is_pad"].tolist() == (window != row + np.array(steps)).tolist()
            if key == "action":
                np.testing.assert_array_equal(item[key].numpy(), actions[window])
            else:
                assert torch.equal(item[key], torch.stack([plain[int(rows[place])][TOP] for place in window]))
        assert item["task"] == whole[int(rows[row])]["task"]
    assert kept.texts("task").tolist() == whole.texts("task")[mask].tolist()
    again = kept.keep(np.arange(len(kept)) % 2 == 0)
    np.testing.assert_array_equal(again.column("index"), rows[::2])
    assert torch.equal(again[5][TOP][0], plain[int(rows[10])][TOP])


@pytest.mark.parametrize(
    "mask", [np.ones(174, bool), np.zeros(175, bool), np.ones(175), np.ones((175, 1), bool), [True, False]]
)
def test_wrong_masks_are_errors(folder, mask):
    with pytest.raises(ValueError, match="v30_video_av1: expected a mask of 175 bool, some of them True, came"):
        LeRobotEpisodes(folder / NAMES[0], cameras=[]).keep(mask)
