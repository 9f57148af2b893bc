"""What every simulator promises; run over the registry, so that a new one is tested without a new file."""

import hashlib
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED, RENDERINGS
from hf_vla.evaluation.envs.registry import ENVS, simulator

WITHOUT_SIMULATOR = {"two_ways"}  # needs nothing, so that this also runs by default
NAMES = [pytest.param(name, marks=[] if name in WITHOUT_SIMULATOR else pytest.mark.sim) for name in sorted(ENVS)]
SEED = 3
TABLE = {
    "metaworld": 0.0,
    "robosuite": 0.8,
    "simpler": 0.8705,
    "two_ways": 0.0,
}  # metres in the world, of the first task
CORNERS = ("corner", "corner2", "corner3", "corner4", "behindGripper", "gripperPOV", "topview")
MIRRORED = {"libero"}  # its published pictures are mirrored, and so are the axes of its cameras
VIEWS = {"metaworld": dict.fromkeys(CORNERS, (80, 60))}  # more than the default cameras
HASH = """
from hf_vla.evaluation.envs.registry import simulator
from test_contract import fingerprint
env = simulator({name!r})({task!r}, depth=True)
print("fingerprint", fingerprint(env.reset(seed={seed})[0]))
"""


def fingerprint(observation):
    """A digest of every bit of an observation."""
    digest = hashlib.sha256()
    for key, value in sorted(observation.items()):
        digest.update(key.encode() + (value.encode() if isinstance(value, str) else value.tobytes()))
    return digest.hexdigest()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def open_env(name, **options):
    try:
        return simulator(name)(simulator(name).tasks()[0], **options)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=NAMES)
def env(request):
    """The first task of every simulator, with depth."""
    env = open_env(request.param, depth=True)
    yield env
    env.close()


@pytest.fixture(scope="module", params=NAMES)
def watched(request):
    """The first task of every simulator, seen with depth by more cameras."""
    env = open_env(request.param, cameras=VIEWS.get(request.param), depth=True)
    yield env
    env.close()


@pytest.fixture
def actions(env):
    """Random actions, (12, D)."""
    rng = np.random.default_rng(0)
    return rng.uniform(env.action_space.low, env.action_space.high, (12, *env.action_space.shape))


def play(env, actions):
    """What an episode begins and ends with."""
    begin, _ = env.reset(seed=SEED)
    for action in actions:
        env.advance(action)
    return begin, env.observe()


def test_an_episode_is_the_same_in_a_fresh_environment_and_in_a_used_one(env, actions):
    fresh = open_env(env.name, depth=True)
    expected = play(fresh, actions)
    fresh.close()
    env.restart(SEED + 1)
    for action in actions:
        env.advance(-action)
    for one, other in zip(play(env, actions), expected, strict=True):
        assert_same(one, other)
    env.restart(SEED)
    assert_same(env.reset(seed=SEED)[0], expected[0])


def test_another_process_begins_a_seed_alike(env):
    script = HASH.format(name=env.name, task=env.task, seed=SEED)
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=__file__.rpartition("/")[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"fingerprint {fingerprint(env.reset(seed=SEED)[0])}" in done.stdout


def test_the_global_generator_is_neither_heard_nor_touched(env, actions):
    ends = []
    for noise in (1, 2):
        np.random.seed(noise)
        before = np.random.get_state()[1].copy()
        ends.append(play(env, actions)[1])
        np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert_same(*ends)


def test_seeds_differ(env):
    pictures = [env.reset(seed=seed)[0][f"observation.images.{next(iter(env.sizes))}"] for seed in range(4)]
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_without_a_seed_one_is_drawn_that_the_last_decides(env):
    drawn = []
    for seed in (SEED, SEED, SEED + 1):
        env.restart(seed)
        drawn.append([env.reset()[1]["seed"] for _ in range(2)])
    assert drawn[0] == drawn[1]
    assert len({SEED, SEED + 1, *drawn[0], *drawn[2]}) == 6, "environments side by side would repeat episodes"
    assert max(map(max, drawn)) < FIRST_RECORDING_SEED


def test_observations_are_what_space_and_specs_say(env):
    seen, info = env.reset(seed=SEED)
    assert env.observation_space.contains(seen)
    assert seen["observation.state"].shape == (len(env.state_spec.names),)
    assert env.action_space.shape == (len(env.action_spec.names),)
    assert seen["task"] == env.instruction
    assert info["success"] is False
    assert set(env.camera_specs) == set(env.sizes)
    for name, spec in env.camera_specs.items():
        assert (spec.name, spec.width, spec.height, spec.depth) == (name, *env.sizes[name], True)
        assert seen[f"observation.images.{name}"].std() > 10, "the picture is empty"
        depth = seen[f"observation.depth.{name}"]
        assert np.isfinite(depth).all() and (depth > 0).all()
        pose = env.camera_pose(name)
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-6)
        assert (np.linalg.det(pose[:3, :3]) < 0) == (env.name in MIRRORED)


def test_looking_changes_nothing(env, actions):
    env.restart(SEED)
    for action in actions:
        advanced = env.advance(action)
    expected = env.observe()
    env.reset(seed=SEED)
    for action in actions:
        seen, reward, *stepped, info = env.step(action)
    assert_same(seen, expected)
    assert tuple(stepped) == advanced and reward == float(info["success"]) == float(stepped[0])


def test_states_do_not_jump(env):
    """A rotation vector near half a turn would, between its two signs."""
    rng, states = np.random.default_rng(1), []
    for seed in (SEED, SEED + 1):
        states.append(env.reset(seed=seed)[0]["observation.state"])
        for _ in range(40):
            if any(env.advance(rng.uniform(env.action_space.low, env.action_space.high))):
                break
            states.append(env.observe()["observation.state"])
    assert np.abs(np.diff(states, axis=0)).max() < 3  # radians among them


def test_an_episode_is_given_up_at_the_horizon(env):
    env.restart(SEED)
    still = np.zeros(env.action_space.shape)
    ends = [env.advance(still)[1] for _ in range(env.horizon)]
    assert ends == [False] * (env.horizon - 1) + [True]


def test_actions_are_clipped(env, actions):
    ends = []
    for factor in (1.0, 100.0):
        env.restart(SEED)
        env.advance(factor * np.where(actions[0] > 0, env.action_space.high, env.action_space.low))
        ends.append(env.observe())
    assert_same(*ends)


def test_actions_that_are_none_are_refused(env):
    env.restart(SEED)
    action = np.zeros(env.action_space.shape)
    with pytest.raises(ValueError, match="Expected a finite action of shape"):
        env.advance(np.where(np.arange(len(action)) == 1, np.nan, action))
    with pytest.raises(ValueError, match="Expected a finite action of shape"):
        env.advance(action[:-1])
    assert env.episode_length == 0


def test_unknown_names_are_refused_with_a_hint(env):
    cls, camera = type(env), next(iter(env.sizes))
    with pytest.raises(ValueError, match=f"Did you mean '{env.task}'"):
        cls(f"{env.task}x")
    with pytest.raises(ValueError, match=f"Did you mean '{camera}'"):
        cls(env.task, {f"{camera}x": (32, 32)})
    with pytest.raises(ValueError, match="Expected a rendering among"):
        cls(env.task, rendering="slow")


@pytest.mark.parametrize("cameras", [{}, ["front"], {"front": 64}, {"front": (64, 0)}, {"front": (64.0, 64)}])
def test_cameras_need_sizes(env, cameras):
    with pytest.raises(ValueError, match="Expected (one camera or more|pixels of camera 'front')"):
        type(env)(env.task, cameras)


def test_an_episode_has_to_begin_before_it_goes_on():
    env = simulator("two_ways")("reach-behind")
    with pytest.raises(gym.error.ResetNeeded, match="call `reset`"):
        env.step(np.zeros(4))


def test_tasks_share_their_spaces_so_that_vectors_of_them_are_made(env):
    other = type(env)(env.tasks()[-1], env.sizes, depth=True)
    assert (env.observation_space, env.action_space) == (other.observation_space, other.action_space)
    assert env.observation_space["task"].contains(other.instruction)
    other.close()


def test_select_takes_tasks_and_splits(env):
    cls = type(env)
    for split, tasks in cls.splits().items():
        assert cls.select(split) == tuple(tasks)
        assert set(tasks) <= set(cls.tasks())
    first, last = cls.tasks()[0], cls.tasks()[-1]
    assert cls.select(f"{last}, {first},{last}") == tuple(dict.fromkeys((last, first)))
    with pytest.raises(ValueError, match=f"No task or split of {cls.name}.*Did you mean '{first}'"):
        cls.select(f"{last},{first}x")


def test_fast_and_full_rendering_show_one_scene(env):
    full = open_env(env.name, rendering="full")
    pictures = [one.reset(seed=SEED)[0] for one in (env, full)]
    full.close()
    assert {env.rendering, full.rendering} == set(RENDERINGS)
    for camera in env.sizes:
        fast, slow = (seen[f"observation.images.{camera}"].astype(float) for seen in pictures)
        assert np.corrcoef(fast.ravel(), slow.ravel())[0, 1] > 0.9


def test_depth_lands_on_the_table(watched):
    if watched.name not in TABLE:
        pytest.skip("where its table lies is not known here")
    seen, _ = watched.reset(seed=SEED)
    for name, spec in watched.camera_specs.items():
        (focal_x, _, x), (_, focal_y, y), _ = spec.intrinsics
        rows, columns = np.mgrid[: spec.height, : spec.width] + 0.5
        depth = seen[f"observation.depth.{name}"].astype(float)
        points = np.stack([(columns - x) / focal_x * depth, (rows - y) / focal_y * depth, depth], axis=-1)
        pose = watched.camera_pose(name)
        heights = (points @ pose[:3, :3].T + pose[:3, 3])[..., 2]
        assert (np.abs(heights - TABLE[watched.name]) < 1e-3).mean() > 0.05, name


def test_up_is_up_in_the_pictures(watched):
    """The gripper goes up; what is nearer than before lies higher in the picture than what is farther."""
    up = next((i for i, name in enumerate(watched.action_spec.names) if name in ("z", "dz")), None)
    if up is None or watched.name == "simpler":
        pytest.skip("no action moves up, or the arm hangs into the picture from above (test_simpler.py has its own)")
    watched.restart(SEED)
    action = np.zeros(watched.action_space.shape)
    poses, looks = [], []
    for direction, steps in ((watched.action_space.low, 10), (watched.action_space.high, 8)):
        action[up] = direction[up]
        for _ in range(steps):
            watched.advance(action)
        poses.append({name: watched.camera_pose(name) for name in watched.sizes})
        looks.append(watched.observe())
    for name in watched.sizes:
        pose = poses[0][name]
        if not np.allclose(pose, poses[1][name]) or abs(pose[2, 1]) < 0.2:
            continue  # a camera on the hand, or one that looks straight down
        assert pose[2, 1] < 0, "the pose says that the picture stands on its head"
        low, high = (look[f"observation.depth.{name}"] for look in looks)
        nearer, farther = high < low - 0.01, high > low + 0.01
        assert np.nonzero(nearer)[0].mean() < np.nonzero(farther)[0].mean()
        before, after = (look[f"observation.images.{name}"].astype(int) for look in looks)
        changed = np.abs(after - before).max(axis=-1) > 8
        assert changed[nearer | farther].mean() > 0.5, "picture and depth are not of one view"


def test_gymnasium_approves(env):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*For Box action spaces.*")  # metres and radians need not be +-1
        warnings.filterwarnings("ignore", ".*Box observation space.*")  # a state has no natural bounds
        warnings.filterwarnings("ignore", ".*not within the observation space.*")
        check_env(env, skip_render_check=True)
    assert env.metadata == {"render_modes": [env.render_mode], "render_fps": env.action_spec.control_hz}
    assert env.render().shape == (*env.sizes[next(iter(env.sizes))][::-1], 3)


def test_an_unknown_simulator_is_refused_with_a_hint():
    with pytest.raises(ValueError, match="Did you mean 'metaworld'"):
        simulator("metawrld")
