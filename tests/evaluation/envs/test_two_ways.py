import numpy as np
import pytest

EPISODES = 200


@pytest.fixture
def task():
    """The task and its expert."""
    from hf_vla.evaluation.envs.experts.registry import expert
    from hf_vla.evaluation.envs.registry import simulator

    env = simulator("two_ways")("reach-behind", depth=True)
    return env, expert("two_ways")(env)


def play(env, seed, act):
    """Run an episode; returns the actions taken."""
    env.restart(seed)
    actions, over = [], (False, False)
    while not any(over):
        actions.append(act())
        over = env.advance(actions[-1])
    assert over == (env.success, env.touched or env.episode_length == env.horizon)
    return np.array(actions)


def by_expert(env, expert, seed, side=None):
    env.restart(seed)
    expert.reset()
    expert.side = side or expert.side
    return play(env, seed, expert.act)


def test_the_expert_always_arrives_and_half_of_the_times_by_the_left(task):
    env, expert = task
    lefts = 0
    for seed in range(EPISODES):
        actions = by_expert(env, expert, seed)
        assert env.success and not env.touched and env.side == expert.side
        assert np.abs(actions).max() <= 1 and len(actions) < env.horizon
        lefts += env.side == "left"
    assert abs(lefts - EPISODES / 2) < 3 * np.sqrt(EPISODES) / 2  # 3 standard deviations of a fair coin's count


def test_both_sides_can_be_gone_from_every_start_and_their_mean_hits_the_obstacle(task):
    env, expert = task
    for seed in range(EPISODES // 4):
        ways = {}
        for side in ("left", "right"):
            ways[side] = by_expert(env, expert, seed, side)
            assert env.success and env.side == side
        steps = min(map(len, ways.values()))
        mean = (ways["left"][:steps] + ways["right"][:steps]) / 2
        play(env, seed, iter(mean).__next__)
        assert env.touched and not env.success and env.side is None

        def indifferent(expert=expert):
            both = []
            for expert.side in ("left", "right"):
                both.append(expert.act())
            return np.mean(both, 0)

        play(env, seed, indifferent)  # also one that sees, at every step, how far it has come
        assert env.touched and not env.success


def test_what_is_seen_does_not_tell_the_side(task):
    env, expert = task
    seen, sides = [], []
    for seed in range(EPISODES):
        env.restart(seed)
        expert.reset()
        seen.append([*env.hand, *env.obstacle, *env.goal, 1.0])
        sides.append(1.0 if expert.side == "left" else -1.0)
    guess = np.array(seen[::2]) @ np.linalg.lstsq(np.array(seen[1::2]), np.array(sides[1::2]), rcond=None)[0]
    assert abs(np.corrcoef(guess, sides[::2])[0, 1]) < 0.3


def test_the_left_is_what_is_left_for_whoever_looks_at_the_goal(task):
    env, expert = task
    by_expert(env, expert, 0, "left")
    env.restart(0)
    expert.reset()
    expert.side, before = "left", env.hand.copy()
    env.advance(expert.act())
    (x, y), (dx, dy) = (env.hand - before)[:2], env.goal - before[:2]
    assert dx * y - dy * x > 0


def test_a_touch_ends_the_episode_and_nothing_mends_it(task):
    env, expert = task
    env.restart(5)
    straight = np.array([*env.ahead, 0.0, -1.0])
    while not env.touched:
        terminated, truncated = env.advance(straight)
    stopped = env.hand.copy()
    assert (terminated, truncated) == (False, True)
    for _ in range(5):
        assert env.advance(-straight) == (False, True)
    assert (env.hand == stopped).all() and env.step(straight)[4]["touched"]


def test_success_at_any_step_is_success(task):
    env, expert = task
    by_expert(env, expert, 0)
    for _ in range(8):
        terminated, _ = env.advance(np.array([*-env.ahead, 0.0, -1.0]))
    assert terminated and np.linalg.norm(env.hand[:2] - env.goal) > 0.2


def test_one_seed_is_one_episode(task):
    env, expert = task
    first, second = by_expert(env, expert, 7), by_expert(env, expert, 7)
    np.testing.assert_array_equal(first, second)
    views = []
    for seed in (7, 7, 8):
        observation, info = env.reset(seed=seed)
        assert env.observation_space.contains(observation) and info["side"] is None
        views.append(observation["observation.images.top"])
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_picture_and_depth_show_everything_where_it_is(task, seed):
    """Through the camera's intrinsics and pose, within half a pixel, 16 mm of the table."""
    env, _ = task
    observation, _ = env.reset(seed=seed)
    (spec,), depth = env.camera_specs.values(), observation["observation.depth.top"]
    picture = observation["observation.images.top"].astype(int)
    assert picture.shape == (64, 64, 3) and depth.shape == (64, 64)
    rows, columns = np.mgrid[:64, :64] + 0.5
    rays = np.stack([columns, rows, np.ones((64, 64))], -1) @ np.linalg.inv(np.array(spec.intrinsics)).T
    pose = env.camera_pose("top")
    places = (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]
    red, green, blue = np.moveaxis(picture, -1, 0)
    seen = {
        "goal": (green > red + 60, np.array([*env.goal, 0.0])),
        "obstacle": (blue > red + 40, np.array([*env.obstacle, 0.15])),
        "hand": (red > blue + 120, env.hand),
    }
    for mask, place in seen.values():
        assert mask.sum() >= 4
        np.testing.assert_allclose(places[mask].mean(0)[:2], place[:2], atol=0.016)
        np.testing.assert_allclose(np.median(places[mask][:, 2]), place[2], atol=1e-6)


def test_other_cameras_and_tasks_are_refused(task):
    env, _ = task
    with pytest.raises(ValueError, match="'topview'.*Did you mean 'top'"):
        type(env)("reach-behind", cameras={"topview": (64, 64)})
    with pytest.raises(ValueError, match="reach-behind"):
        type(env)("reach")
