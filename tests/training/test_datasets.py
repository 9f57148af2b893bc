"""Several datasets in one recipe: two robots of different sizes and cameras."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor

from hf_vla.actions.spec import CameraSpec
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.oxe import oxe_dataset
from hf_vla.data.recorder import LeRobotRecorder
from hf_vla.data.tail import hold_tail
from hf_vla.policy import Policy
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import join, open_datasets, write_report
from hf_vla.training.facts import data_facts
from hf_vla.training.run import sampler, train

HELD_OUT = {"data__datasets__0__eval_episodes": [3], "data__datasets__1__eval_episodes": [5, 11]}


@pytest.fixture(scope="module")
def two_robots(make_recipe, demos):
    """The recipe of two robots, made short."""

    def make(folder, **overrides):
        sources = {"data__datasets__0__source": str(demos), "data__datasets__1__source": str(demos.parent / SAWYER)}
        no_source = {"data__source": None, "data__eval_episodes": []}
        return make_recipe(folder, "mixture_tiny", **no_source | sources | HELD_OUT | overrides)

    return make


AXES = ["height", "width", "channels"]
PANDA, SAWYER = "robosuite_demos", "metaworld_demos"


@pytest.fixture(scope="module")
def run(two_robots, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, train(two_robots(folder, training__eval_strategy="steps", training__eval_steps=6))


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_each_dataset_keeps_its_own_facts(two_robots, tmp_path):
    data = two_robots(tmp_path).data
    datasets = open_datasets(data)
    facts = data_facts(data, datasets)
    assert list(facts.datasets) == [PANDA, SAWYER] and data.roles == ["front", "wrist"]
    assert facts.sizes == {"action_dim": 7, "state_dim": 8, "chunk_size": 4}
    for opened in datasets:
        key, rows = opened.arguments.unnorm_key, opened.train_rows
        wanted = opened.episodes.column("action")[rows]
        np.testing.assert_allclose(facts.statistics[key]["action"]["mean"], wanted.mean(0, dtype=float), atol=1e-9)
        assert facts.statistics[key]["num_transitions"] == len(rows)
    front, wrist = facts.datasets[SAWYER].cameras
    assert (front.name, wrist) == ("front", CameraSpec("wrist", 96, 96))
    assert [spec.name for spec in facts.datasets[PANDA].cameras] == ["front", "wrist"]


def test_pictures_come_under_their_roles(two_robots, tmp_path):
    data = two_robots(tmp_path).data
    datasets = open_datasets(data)
    train_set, eval_set = join(data, datasets)
    panda, sawyer = train_set[0], train_set[-1]
    assert (panda["dataset"], sawyer["dataset"]) == (PANDA, SAWYER)
    assert panda["observation.images.front"].shape == panda["observation.images.wrist"].shape == (3, 96, 96)
    assert sawyer["observation.images.front"].shape == (3, 96, 96) and sawyer["observation.images.wrist"] is None
    assert not torch.equal(panda["observation.images.front"], panda["observation.images.wrist"])
    assert len(train_set) + len(eval_set) == sum(len(opened.episodes) for opened in datasets)
    held_out = {(eval_set[row]["dataset"], int(eval_set[row]["episode_index"])) for row in (0, -1)}
    assert held_out == {(PANDA, 3), (SAWYER, 11)}


def test_windows_of_observations_are_read_where_they_are_asked_for(two_robots, tmp_path):
    (panda, sawyer) = open_datasets(two_robots(tmp_path, data__n_obs_steps=3).data)
    item = panda.episodes[1]
    assert item["observation.images.front"].shape == (3, 3, 96, 96) and item["observation.state"].shape == (3, 8)
    assert item["observation.images.wrist_is_pad"].tolist() == [True, False, False]
    assert sawyer.episodes[0]["observation.state_is_pad"].tolist() == [True, True, False]


def test_a_recipe_trains_on_two_robots(run, demo_item):
    folder, metrics = run
    wanted = {f"eval_{key}_action_error" for key in (PANDA, SAWYER)}
    assert wanted <= set(metrics)
    assert f"eval_{PANDA}_action_error_rotation" in metrics
    assert np.isfinite([metrics[name] for name in (*wanted, "eval_loss")]).all()
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.action_codec.keys == [SAWYER, PANDA] or processor.action_codec.keys == [PANDA, SAWYER]
    picture, state = demo_item["observation.images.agentview"], np.zeros(8, np.float32)
    observation = {"observation.images.front": picture, "observation.images.wrist": picture, "task": "reach"}
    panda = Policy.from_pretrained(folder, PANDA, seed=0)
    assert panda.predict_chunk(observation | {"observation.state": state}).shape == (4, 7)
    sawyer = Policy.from_pretrained(folder, SAWYER, seed=0)
    observation |= {"observation.images.wrist": None, "observation.state": state[:4]}
    assert sawyer.predict_chunk(observation).shape == (4, 4)
    with pytest.raises(ValueError, match="metaworld_demos.*robosuite_demos|robosuite_demos.*metaworld_demos"):
        Policy.from_pretrained(folder)


def test_a_run_on_two_robots_goes_on_exactly(run, two_robots, tmp_path):
    folder, metrics = run
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    options = {"training__eval_strategy": "steps", "training__eval_steps": 6}
    resumed = train(two_robots(tmp_path, training__resume_from_checkpoint=True, **options))
    assert losses(tmp_path) == losses(folder) and len(losses(folder)) == 6
    assert resumed["eval_loss"] == metrics["eval_loss"]


def test_the_shares_are_the_recipes(two_robots, tmp_path):
    recipe = two_robots(tmp_path)
    datasets = open_datasets(recipe.data)
    train_set, _ = join(recipe.data, datasets)
    rows = list(sampler(recipe, datasets, train_set))
    panda, sawyer = (sum(row in part for row in rows) for part in train_set.rows.values())
    sizes = [len(part) for part in train_set.rows.values()]
    assert panda / sawyer == pytest.approx(sizes[0] / (0.5 * sizes[1]), rel=1e-2)
    recipe.training.data_seed = 7
    assert list(sampler(recipe, datasets, train_set)) != rows
    recipe = two_robots(tmp_path, data__datasets__1__weight=1.0)
    assert sampler(recipe, datasets, train_set) is None  # every row once: the Trainer's own order


def test_windows_go_forward_in_each_worker_and_leave_held_out_rows_alone(two_robots, tmp_path):
    recipe = two_robots(
        tmp_path, data__shuffle="windows", training__dataloader_num_workers=2, data__datasets__1__weight=1.0
    )
    datasets = open_datasets(recipe.data)
    train_set, _ = join(recipe.data, datasets)
    order = sampler(recipe, datasets, train_set)
    rows = list(order)
    assert sorted(rows) == list(range(len(train_set)))
    items = [
        (dataset, opened.train_rows[row])
        for dataset, opened in enumerate(datasets)
        for row in range(len(opened.train_rows))
    ]
    read = [items[row] for row in rows]
    for worker in range(2):
        batches = range(worker * 4, len(read), 8)
        own = [read[row] for first in batches for row in range(first, min(first + 4, len(read)))]
        seen, forward = set(), 0
        for dataset, row in own:
            forward += (dataset, row - 1) in seen
            seen.add((dataset, row))
        assert forward / len(own) > 0.9


FILTERS = {"idle": 0.05, "idle_seconds": 0.2, "outliers": 0.2, "duplicates": True}


def test_filters_leave_rows_out_and_say_which(make_recipe, tmp_path):
    plain, filtered = (
        make_recipe(tmp_path, data__eval_episodes=[0, 7], data__filters=filters) for filters in (None, FILTERS)
    )
    (before,), (after,) = open_datasets(plain.data), open_datasets(filtered.data)
    write_report([after], tmp_path)
    (report,) = json.loads((tmp_path / "data_report.json").read_text())
    dropped = report["dropped"]
    assert len(before.episodes) - len(after.episodes) == dropped["idle"]["rows"] > 0
    assert dropped["outlier"]["rows"] > 0 == dropped["duplicate"]["rows"]
    held_out = before.episodes.column("action")[before.eval_rows]
    assert np.array_equal(after.episodes.column("action")[after.eval_rows], held_out)  # held-out episodes stay whole
    episode, ((first, last), *_) = next(iter(dropped["outlier"]["episodes"].items()))
    frames, episodes = (after.episodes.column(key)[after.train_rows] for key in ("frame_index", "episode_index"))
    learnt = frames[episodes == int(episode)]
    assert not np.isin(np.arange(first - 3, last + 1), learnt).any() and last + 1 in learnt
    (episode, ((first, last), *_)) = next(iter(dropped["idle"]["episodes"].items()))
    row = np.flatnonzero(
        (after.episodes.column("episode_index") == int(episode)) & (after.episodes.column("frame_index") == first - 1)
    )
    ahead = after.episodes[int(row[0])]["action"][1]
    behind = before.episodes.column("episode_index") == int(episode), before.episodes.column("frame_index") == last + 1
    assert np.array_equal(ahead, before.episodes.column("action")[behind[0] & behind[1]][0])  # chunks jump over it


def test_statistics_are_of_what_is_learnt_not_of_where_chunks_start(make_recipe, tmp_path):
    state = {"data__state": {"rotation": "axis_angle", "frame": "base"}}
    recipe = make_recipe(tmp_path, data__eval_episodes=[0, 7], data__filters=FILTERS | {"jerk": 0.6}, **state)
    (opened,) = open_datasets(recipe.data)
    dataset, report = opened.episodes, opened.drop_report
    facts = data_facts(recipe.data, [opened]).datasets[opened.arguments.unnorm_key]
    held_out = np.isin(dataset.column("episode_index"), [0, 7])
    learnt = ~held_out & ~report.excluded[~report.removed]
    assert np.array_equal(opened.action_rows, np.flatnonzero(learnt))
    wanted = dataset.column("action")[learnt]
    assert np.array_equal(facts.actions, wanted) and facts.statistics["num_transitions"] == len(wanted)
    np.testing.assert_allclose(facts.statistics["action"]["mean"], wanted.mean(0, dtype=float), atol=1e-9)
    np.testing.assert_array_equal(facts.statistics["action"]["max"], wanted.max(0))
    states = dataset.column("observation.state")[learnt]
    np.testing.assert_allclose(facts.statistics["state"]["mean"], states.mean(0, dtype=float), atol=1e-9)
    # the last chunk before an excluded row ends with a row that none may start at
    excluded, size = np.flatnonzero(report.excluded[~report.removed]), recipe.data.chunk_size
    inside = dataset.column("frame_index")[excluded] > 20
    (row, *_) = excluded[inside & np.isin(excluded[:, None] - np.arange(1, 2 * size), opened.action_rows).all(1)]
    assert row - size in opened.train_rows and not np.isin(row - np.arange(size), opened.train_rows).any()
    targets, is_pad = dataset.windows("action")
    chunks = targets[opened.train_rows][~is_pad[opened.train_rows]]
    assert {row.tobytes() for row in chunks} <= {row.tobytes() for row in wanted}


def test_history_goes_back_over_removed_rows(make_recipe, tmp_path):
    """As docs/data.md says: a rest that is removed is missing from the observations before a row, too."""
    plain, filtered = (
        make_recipe(tmp_path, data__filters=filters, data__n_obs_steps=2, data__state={"frame": "base"})
        for filters in (None, {"idle": 0.05, "idle_seconds": 0.2})
    )
    (before,), (after,) = open_datasets(plain.data), open_datasets(filtered.data)
    removed, starts = after.drop_report.removed, before.episodes.episode_starts
    rows = np.flatnonzero(~removed)  # of the recorded dataset
    (jump, *_) = np.setdiff1d(np.flatnonzero(np.diff(rows) > 1) + 1, np.searchsorted(rows, starts))
    history = after.episodes[int(jump)]["observation.state"]
    states = before.episodes.column("observation.state")
    assert np.array_equal(history, states[[rows[jump - 1], rows[jump]]]) and rows[jump - 1] < rows[jump] - 1


def test_copies_of_held_out_episodes_are_not_learnt(make_recipe, demos, tmp_path):
    root = tmp_path / "twice"
    shutil.copytree(demos, root)
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    plain = make_recipe(tmp_path, data__source=str(root))
    (opened,) = open_datasets(plain.data)
    lengths, starts = np.diff(opened.episodes.episode_starts), opened.episodes.episode_starts
    first, last = np.flatnonzero(lengths == np.bincount(lengths).argmax())[:2]
    for key in ("action", "observation.state"):
        values = opened.episodes.column(key).copy()
        values[starts[first] : starts[first + 1]] = values[starts[last] : starts[last + 1]]
        place = table.column_names.index(key)
        table = table.set_column(place, key, pa.array(values.tolist(), table[key].type))
    pq.write_table(table, path)
    recipe = make_recipe(
        tmp_path, data__source=str(root), data__eval_episodes=[int(last)], data__filters={"duplicates": True}
    )
    (opened,) = open_datasets(recipe.data)
    assert np.unique(opened.episodes.column("episode_index")[opened.eval_rows]).tolist() == [last]
    assert first not in opened.episodes.column("episode_index")


@pytest.mark.parametrize("filters", [{"jerk": 0.0}, {"idle": 1e9, "idle_seconds": 0}])
def test_filters_that_leave_nothing(make_recipe, tmp_path, filters):
    recipe = make_recipe(tmp_path, data__filters=filters, data__eval_episodes=[], data__action__gripper=None)
    (reason, _), *_ = filters.items()
    with pytest.raises(ValueError, match=f"The filters leave nothing of .*robosuite_demos to train on: .*{reason}: "):
        open_datasets(recipe.data)


@pytest.fixture(scope="module")
def open_x(tmp_path_factory):
    """A folder with two small datasets in the form of IPEC-COMMUNITY's conversions."""
    root, generator = tmp_path_factory.mktemp("open_x"), np.random.default_rng(0)
    for name in ("bridge_orig", "fractal20220817_data"):
        facts = oxe_dataset(name)
        features = {
            f"observation.images.{facts.cameras['primary']}": {"dtype": "video", "shape": [64, 96, 3], "names": AXES},
            "observation.state": {"dtype": "float32", "shape": [8], "names": {"motors": list(facts.state.names)}},
            "action": {"dtype": "float32", "shape": [7], "names": {"motors": list(facts.action.names)}},
        }
        with LeRobotRecorder(root / facts.lerobot.rpartition("/")[2], facts.fps, features, facts.robot) as recorder:
            for _ in range(3):
                for _ in range(12):
                    values = {"observation.state": generator.random(8), "action": generator.random(7)}
                    frame = {key: value.astype(np.float32) for key, value in values.items()}
                    picture = generator.integers(0, 256, (64, 96, 3), np.uint8)
                    recorder.add_frame({**frame, next(iter(features)): picture, "task": "move the towel"})
                recorder.save_episode()
    return root


def test_a_named_mixture_trains(open_x, make_recipe, tmp_path):
    one = {"data__source": None, "data__action": None, "data__eval_episodes": [2]}
    recipe = make_recipe(
        tmp_path,
        **one,
        data__mixture="bridge_rt_1",
        data__mixture_root=str(open_x),
        data__cameras=[{"name": "primary", "fovy": 45}],
        data__shuffle="windows",
        data__frame_cache=str(tmp_path / "frames"),
        data__frame_cache_gb=0.01,
        data__chunk_tail="hold",
        training__max_steps=2,
    )
    metrics = train(recipe)
    assert np.isfinite(
        [metrics[f"eval_{name}_action_error"] for name in ("bridge_orig", "fractal20220817_data")]
    ).all()
    processor = AutoProcessor.from_pretrained(tmp_path)
    (bridge,), (fractal,) = (processor.camera_specs(f"{name}") for name in ("bridge_orig", "fractal20220817_data"))
    # calibrated at 640 x 480 and 640 x 512, recorded at 96 x 64
    np.testing.assert_allclose(bridge.intrinsics[0][0], 623.588 * 96 / 640)
    np.testing.assert_allclose(fractal.intrinsics[1], [0, 413.1 * 64 / 512, 233.0 * 64 / 512])
    assert any((tmp_path / "frames").iterdir())


def test_a_robot_of_a_mixture_learns_on_alone(run, two_robots, make_recipe, tmp_path):
    folder, _ = run
    checkpoint = {"model__preset": None, "model__family": None, "model__config": None, "model__path": str(folder)}
    recipe = two_robots(tmp_path, **checkpoint)
    del recipe.data.datasets[0]
    train(recipe)
    policy = Policy.from_pretrained(tmp_path)
    assert (policy.unnorm_key, policy.model.config.action_dim, policy.action_spec.names[-1]) == (SAWYER, 7, "gripper")
    other = make_recipe(tmp_path, "tinyvla_tiny", **checkpoint, data__unnorm_key="other")
    build(other, open_datasets(other.data))  # as large as the checkpoint: any robot
    recipe.data.datasets[0].unnorm_key = "other"
    with pytest.raises(ValueError, match="has action_dim 7, the recipe's data have 4"):
        build(recipe, open_datasets(recipe.data))


@pytest.mark.parametrize("recipe", ["mixture_tiny", "spatialvla_tiny"])
def test_a_recipe_trains_on_several_observations(recipe, make_recipe, two_robots, demo_item, tmp_path):
    make = two_robots if recipe == "mixture_tiny" else make_recipe
    metrics = train(make(tmp_path, data__n_obs_steps=2, training__max_steps=2))
    assert np.isfinite(metrics["eval_loss"])
    policy = Policy.from_pretrained(tmp_path, PANDA, seed=0)
    assert policy.processor.action_codec.n_obs_steps == policy.model.config.n_obs_steps == 2
    pictures = {
        f"observation.images.{name}": demo_item["observation.images.wrist"] for name in ("front", "wrist", "agentview")
    }
    assert np.isfinite(policy.select_action(demo_item | pictures)).all()


@pytest.mark.parametrize("family", ["divla", "pi0_vla"])
def test_families_of_one_observation_say_so(family, make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, f"{family}_tiny", data__n_obs_steps=2)
    with pytest.raises(ValueError, match=f"{family} takes no data.n_obs_steps: it sees the present alone"):
        build(recipe, open_datasets(recipe.data))


@pytest.mark.parametrize("tail", ["mask", "hold"])
def test_tokens_are_fitted_to_the_chunks_that_are_learnt(tail, make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, "tinyvla_tiny", data__chunk_tail=tail)
    (opened,) = open_datasets(recipe.data)
    (facts,) = data_facts(recipe.data, [opened]).datasets.values()
    assert len(facts.chunks) == len(opened.train_rows)
    for place in (0, 40, -1):
        item = opened.episodes[int(opened.train_rows[place])]
        wanted = item["action"].numpy()
        if tail == "hold":
            wanted = hold_tail(wanted, item["action_is_pad"].numpy(), facts.action_spec)
        np.testing.assert_array_equal(facts.chunks[place], wanted)


def test_columns_may_have_other_names(make_recipe, demos, tmp_path):
    shutil.copytree(demos, tmp_path / "renamed")
    for path in [*tmp_path.glob("renamed/data/*/*.parquet")]:
        table = pq.read_table(path)
        names = {"action": "actions", "observation.state": "state"}
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)
    info = tmp_path / "renamed/meta/info.json"
    info.write_text(info.read_text().replace('"action":', '"actions":').replace('"observation.state":', '"state":'))
    recipe = make_recipe(
        tmp_path,
        "tinyvla_tiny",
        data__source=str(tmp_path / "renamed"),
        data__columns={"action": "actions", "observation.state": "state"},
    )
    (opened,) = open_datasets(recipe.data)
    assert np.array_equal(opened.episodes.column("action"), LeRobotEpisodes(demos, cameras=[]).column("action"))
    facts = data_facts(recipe.data, [opened])
    assert facts.sizes == {"action_dim": 7, "state_dim": 8, "chunk_size": 4}
    recipe.data.datasets[0].columns = None
    with pytest.raises(ValueError, match="action"):
        open_datasets(recipe.data)
