import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_vla.actions.normalization import MODES, ActionNormalizer
from hf_vla.actions.statistics import ActionStatistics

LEROBOT_MODES = {
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantile",
    "QUANTILE10": "quantile10",
    "IDENTITY": "identity",
}
PUBLISHED = {"q01": [-0.02, -1.0, 0.3, 0.0], "q99": [0.03, 4.0, 0.9, 1.0], "mask": [True, True, True, False]}


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(500, 4)) * [0.01, 3.0, 1.0, 20.0] + [0.0, 5.0, -2.0, 100.0]


@pytest.fixture
def statistics(rows):
    whole = ActionStatistics()
    whole.update(rows)
    return whole.to_dict()


def assert_equals_lerobot(normalizer, golden, mode, what):
    normalized = normalizer.normalize(golden[what])
    # LeRobot calculates in float32, ours in float64: two units in the last place
    np.testing.assert_allclose(normalized, golden[f"{mode}/{what}"], rtol=3e-7, atol=3e-7)
    back = normalizer.unnormalize(golden[f"{mode}/{what}"])
    np.testing.assert_allclose(back, golden[f"{mode}/{what}_back"], rtol=3e-7, atol=3e-7)
    assert normalized.dtype == back.dtype == np.float32


@pytest.mark.parametrize(("what", "key"), [("action", "action"), ("state", "observation.state")])
@pytest.mark.parametrize("mode", LEROBOT_MODES)
def test_equals_lerobot_in_all_five_modes(goldens, mode, what, key):
    golden = load_file(goldens / "normalize" / "v30_video_av1.safetensors")
    entries = json.loads((goldens / "lerobot" / "expected" / "v30_video_av1" / "stats.json").read_text())
    normalizer = ActionNormalizer(entries[key], LEROBOT_MODES[mode], convention="lerobot")
    assert_equals_lerobot(normalizer, golden, mode, what)


@pytest.mark.parametrize("what", ["action", "state"])
@pytest.mark.parametrize("mode", LEROBOT_MODES)
@pytest.mark.parametrize("name", ["v30_head_video", "v30_bimanual_f64"])
def test_equals_lerobot_where_only_values_were_recorded(goldens, name, mode, what):
    """Their stats.json were not recorded: recover two numbers per dimension from the values, then hold all to them.

    This shows the form of the map (affine, unclipped, its own inverse) on every row, not that ours reads the right
    statistic; `test_equals_lerobot_in_all_five_modes` shows that.
    """
    golden = load_file(goldens / "normalize" / f"{name}.safetensors")
    actions, normalized = (
        golden[k].astype(np.float64).reshape(-1, golden[k].shape[-1]) for k in (what, f"{mode}/{what}")
    )
    slope, offset = np.transpose([np.polyfit(x, y, 1) for x, y in zip(actions.T, normalized.T, strict=True)])
    zero, minus_one = -offset / slope, (-1 - offset) / slope
    (first, second), interval = MODES[LEROBOT_MODES[mode]][0] or ("mean", "std"), MODES[LEROBOT_MODES[mode]][1]
    pair = (minus_one, minus_one + 2 / slope) if interval else (zero, 1 / slope - 1e-8)
    normalizer = ActionNormalizer(
        dict(zip((first, second), pair, strict=True)), LEROBOT_MODES[mode], convention="lerobot"
    )
    np.testing.assert_allclose(normalizer.normalize(golden[what]), golden[f"{mode}/{what}"], rtol=1e-5, atol=2e-6)
    back = normalizer.unnormalize(golden[f"{mode}/{what}"])
    np.testing.assert_allclose(back, golden[f"{mode}/{what}_back"], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(back, golden[what], rtol=1e-5, atol=2e-6)


def test_published_spatialvla_formula():
    q01, q99 = np.array(PUBLISHED["q01"]), np.array(PUBLISHED["q99"])
    actions = np.random.default_rng(1).uniform(-2, 5, size=(6, 4, 4))
    wanted = np.clip(2 * (actions - q01) / (q99 - q01 + 1e-8) - 1, -1, 1)
    wanted[..., 3] = actions[..., 3]  # the gripper
    normalizer = ActionNormalizer(PUBLISHED)
    np.testing.assert_allclose(normalizer.normalize(actions), wanted, rtol=0, atol=1e-12)
    predicted = np.random.default_rng(2).uniform(-1.5, 1.5, size=(6, 4, 4))
    wanted = 0.5 * (predicted + 1) * (q99 - q01) + q01  # the published decoder does not clip
    wanted[..., 3] = predicted[..., 3]
    np.testing.assert_allclose(normalizer.unnormalize(predicted), wanted, rtol=0, atol=1e-12)


def test_published_tinyvla_formulas():
    """Recorded ones are in tests/models/tinyvla/test_processing.py."""
    statistics = {"min": [-0.5, 0.0], "max": [0.5, 3.0], "mean": [0.1, 2.0], "std": [0.2, 0.001]}
    values = np.random.default_rng(4).uniform(-2, 5, size=(6, 4, 2))
    low, high = np.array([-0.5001, -0.0001]), np.array([0.5001, 3.0001])
    actions = ActionNormalizer(statistics, "min_max", convention="tinyvla")
    wanted = (values - low) / (high - low) * 2 - 1
    np.testing.assert_allclose(actions.normalize(values), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(actions.unnormalize(wanted), values, rtol=0, atol=1e-12)
    states = ActionNormalizer(statistics, "mean_std", convention="tinyvla")
    wanted = (values - [0.1, 2.0]) / [0.2, 0.01]
    np.testing.assert_allclose(states.normalize(values), wanted, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(states.unnormalize(wanted), values, rtol=0, atol=1e-12)


def test_a_missing_mask_is_all_true():
    statistics = {name: PUBLISHED[name] for name in ("q01", "q99")}
    assert ActionNormalizer(statistics).mask.all()
    assert not ActionNormalizer(PUBLISHED).mask[3]
    np.testing.assert_array_equal(ActionNormalizer(PUBLISHED, mask=[False] * 4).normalize([9.0, 9, 9, 9]), [9.0] * 4)


@pytest.mark.parametrize("convention", ["spatialvla", "lerobot", "tinyvla"])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_round_trip(rows, statistics, mode, convention):
    normalizer = ActionNormalizer(statistics, mode, clip=False, convention=convention)
    chunks = rows.reshape(5, 25, 4, 4)
    tolerance = 1e-5 if mode != "zero_one" and convention == "spatialvla" else 1e-9  # 1e-8 / range, forward only
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(chunks)), chunks, rtol=tolerance, atol=1e-7)


def test_one_mode_per_dimension(rows, statistics):
    modes = ["quantile", "min_max", "mean_std", "zero_one"]
    mixed = ActionNormalizer(statistics, modes)
    for dimension, mode in enumerate(modes):
        single = ActionNormalizer(statistics, mode)
        np.testing.assert_array_equal(mixed.normalize(rows)[:, dimension], single.normalize(rows)[:, dimension])
        np.testing.assert_array_equal(mixed.unnormalize(rows)[:, dimension], single.unnormalize(rows)[:, dimension])


def test_zero_one_gives_a_gripper_its_ends_back():
    normalizer = ActionNormalizer({"min": [-1.0], "max": [1.0]}, "zero_one")
    np.testing.assert_array_equal(normalizer.normalize([[-1.0], [1.0], [3.0]]), [[0.0], [1.0], [1.0]])
    np.testing.assert_array_equal(normalizer.unnormalize([[0.0], [1.0]]), [[-1.0], [1.0]])


def test_clipping_follows_the_convention_unless_told(rows, statistics):
    assert np.abs(ActionNormalizer(statistics).normalize(rows)).max() == 1
    assert np.abs(ActionNormalizer(statistics, clip=False).normalize(rows)).max() > 1
    assert np.abs(ActionNormalizer(statistics, convention="lerobot").normalize(rows)).max() > 1
    assert np.abs(ActionNormalizer(statistics, clip=True, convention="lerobot").normalize(rows)).max() == 1
    assert np.abs(ActionNormalizer(statistics, "mean_std").normalize(rows)).max() > 2  # z-scores have no interval


@pytest.mark.parametrize("convention", ["spatialvla", "lerobot", "tinyvla"])
@pytest.mark.parametrize("mode", sorted(set(MODES) - {"identity"}))
def test_constant_dimensions_never_spike(mode, convention, caplog):
    rows = np.random.default_rng(3).normal(size=(1000, 3))
    rows[:, 1] = 0.3
    whole = ActionStatistics()
    whole.update(rows)
    statistics = whole.summary()
    for shift in (0.0, 1e-10):  # equal but for rounding
        moved = {name: values + shift * (name in ("max", "q90", "q99", "std")) for name, values in statistics.items()}
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            normalizer = ActionNormalizer(moved, mode, convention=convention)
        assert "Action dimensions [1] are constant in these statistics" in caplog.text
        np.testing.assert_array_equal(normalizer.constant, [False, True, False])
        centred = convention != "lerobot" or mode in ("mean_std", "zero_one")
        outliers = np.array([[0.0, 0.3, 0.0], [0.0, 0.3 + 1e-7, 0.0], [0.0, 77.0, 0.0]])
        np.testing.assert_array_equal(normalizer.normalize(outliers)[:, 1], 0.0 if centred else -1.0)
        np.testing.assert_allclose(normalizer.unnormalize(outliers)[:, 1], 0.3, atol=1e-9)


def test_quantiles_may_be_constant_where_the_range_is_not():
    statistics = {"q01": [0.0], "q99": [0.0], "min": [0.0], "max": [1.0]}
    assert ActionNormalizer(statistics, "quantile").constant.all()
    assert not ActionNormalizer(statistics, "zero_one").constant.any()
    assert not ActionNormalizer(statistics, "quantile", mask=[False]).constant.any()
    assert ActionNormalizer({"q01": [0.0], "q99": [0.1], "min": [0.0], "max": [0.0]}).constant.all()


def test_types_are_kept():
    normalizer = ActionNormalizer(PUBLISHED)
    for dtype, wanted in (("f2", "f4"), ("f4", "f4"), ("f8", "f8"), ("i8", "f8")):
        actions = np.ones((2, 4), dtype)
        assert normalizer.normalize(actions).dtype == normalizer.unnormalize(actions).dtype == wanted
        assert (actions == 1).all()  # never in place


def test_missing_statistics_are_named():
    with pytest.raises(
        ValueError,
        match=r"mode 'quantile' needs the statistics \['q01', 'q99'\]; came \['max', 'min'\]. Compute them with "
        r"ActionStatistics \(LeRobot v2.1 files hold no quantiles\), or choose another mode",
    ):
        ActionNormalizer({"min": [0.0], "max": [1.0]})
    with pytest.raises(ValueError, match=r"mode 'mean_std' needs the statistics \['std'\]"):
        ActionNormalizer({"mean": [0.0]}, "mean_std")
    for nothing in ({}, None):
        with pytest.raises(ValueError, match=r"mode 'identity' needs statistics; came \[\]"):
            ActionNormalizer(nothing, "identity")
    ActionNormalizer({"mean": [0.0], "std": [1.0]}, ["quantile"], mask=[False])  # not needed where masked


def test_lerobot_v21_files_need_another_mode(goldens):
    entries = json.loads((goldens / "lerobot" / "expected" / "v21_video" / "stats.json").read_text())
    with pytest.raises(ValueError, match=r"needs the statistics \['q01', 'q99'\]"):
        ActionNormalizer(entries["action"], "quantile", convention="lerobot")
    assert ActionNormalizer(entries["action"], "min_max", convention="lerobot").action_dim == 7


@pytest.mark.parametrize(
    ("statistics", "kwargs", "message"),
    [
        (PUBLISHED, {"convention": "openvla"}, r"among \['spatialvla', 'lerobot', 'tinyvla'\], came 'openvla'"),
        (PUBLISHED, {"mode": "quantiles"}, r"Unknown normalization modes \['quantiles'\]; known are"),
        (PUBLISHED, {"mode": ["quantile"] * 3}, "one normalization mode for each of 4 dimensions, came 3"),
        (PUBLISHED, {"mask": [True]}, r"Expected 'mask' for 4 dimensions, came shape \(1,\)"),
        (PUBLISHED, {"clip": "false"}, "Expected clip to be true or false, came 'false'"),
        (PUBLISHED | {"q99": [1.0]}, {}, r"Expected 'q99' for 4 dimensions, came shape \(1,\)"),
        (PUBLISHED | {"q01": [0.0] * 5}, {}, r"Expected 'mask' for 5 dimensions, came shape \(4,\)"),
        ({"q01": [0.0] * 5, "q99": [1.0] * 4}, {}, r"Expected 'q99' for 5 dimensions, came shape \(4,\)"),
        ({"q01": [0.0] * 4, "q99": [1.0] * 5}, {}, r"Expected 'q99' for 4 dimensions, came shape \(5,\)"),
        (PUBLISHED | {"q99": [1.0, np.nan, 1, 1]}, {}, "finite statistics 'q99', came nan at row 0, dimension 1"),
        (PUBLISHED | {"q99": [-1.0, 4, 1, 1]}, {}, r"Expected q01 <= q99, came q01=\[-0.02, -1.0, 0.3\]"),
        ({"mean": [0.0], "std": [-1.0]}, {"mode": "mean_std"}, "Expected std >= 0, came"),
    ],
)
def test_bad_arguments_are_refused(statistics, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ActionNormalizer(statistics, **kwargs)


def test_bad_values_are_refused():
    normalizer = ActionNormalizer(PUBLISHED)
    with pytest.raises(ValueError, match="Expected finite actions, came nan at row 1, dimension 3"):
        normalizer.normalize([[0, 0, 0, 0], [0, 0, 0, np.nan]])
    with pytest.raises(ValueError, match="Expected finite normalized actions, came inf at row 0, dimension 2"):
        normalizer.unnormalize([0, 0, np.inf, 0])
    with pytest.raises(ValueError, match=r"Expected actions of shape \(..., 4\), came \(2, 3\)"):
        normalizer.normalize(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"Expected normalized actions of shape \(..., 4\), came \(\)"):
        normalizer.unnormalize(1.0)
