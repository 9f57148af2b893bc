import json

import numpy as np
import pytest

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.normalization import ActionNormalizer
from hf_vla.actions.tokenizers.fast import FastTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.actions.tokenizers.registry import ACTION_TOKENIZERS
from hf_vla.data.checks.grids import fit_tokenizers
from hf_vla.data.checks.scan import DatasetScan, plan_scan
from hf_vla.data.lerobot import LeRobotEpisodes


def scanned(root, **kwargs):
    scan = DatasetScan(plan_scan(root, **kwargs))
    for path in scan.plan.files:
        list(scan.read(path))
    return scan


@pytest.fixture(scope="module")
def root(goldens):
    return goldens / "lerobot" / "datasets" / "v30_video_av1"


@pytest.fixture(scope="module")
def scan(root):
    return scanned(root, chunk_size=8)


@pytest.mark.parametrize("name", sorted(ACTION_TOKENIZERS))
def test_every_representation_is_fitted_and_serves_in_a_checkpoint(scan, root, name):
    fitted, refused = fit_tokenizers(scan)
    assert refused == {} and list(fitted) == list(ACTION_TOKENIZERS)
    entry = json.loads(json.dumps(fitted[name]))
    statistics = {"mine": {"action": scan.columns["action"].statistics.to_dict()}}
    codec = ActionCodec(statistics, {"chunk_size": 8, **entry})
    chunks = LeRobotEpisodes(root).column("action")[: 8 * 8].reshape(8, 8, 7)
    decoded = codec.decode(codec.encode(chunks, "mine"), "mine")
    normalizer = codec.normalizer("mine")
    assert decoded.shape == chunks.shape
    # FAST's bound takes every coefficient for half a step off; the grid's are ranges of whole cells
    error = np.abs(normalizer.normalize(decoded) - normalizer.normalize(chunks)).max(axis=(0, 1))
    assert (error <= codec.tokenizer.resolution() + 1e-6).all()


def test_the_grid_is_the_one_that_the_training_fits(scan, root):
    actions = LeRobotEpisodes(root).column("action")
    entry = fit_tokenizers(scan)[0]["gaussian_grid"]
    assert entry["normalization"] == {
        "mode": ["quantile"] * 6 + ["zero_one"],
        "clip": True,
        "convention": "spatialvla",
    }
    codec = ActionCodec({"mine": {"action": scan.columns["action"].statistics.to_dict()}}, {"chunk_size": 8, **entry})
    expected = GaussianGridTokenizer.fit(codec.normalizer().normalize(actions))
    for axis, edges in expected.edges.items():
        np.testing.assert_allclose(entry["tokenizer"]["edges"][axis], edges, atol=1e-6)


def test_fast_is_fitted_to_normalised_chunks_of_the_size_asked_for(scan, root):
    dataset = LeRobotEpisodes(root)
    starts = dataset.episode_starts
    chunks = [
        dataset.column("action")[first : first + 8]
        for begin, end in zip(starts[:-1], starts[1:], strict=True)
        for first in range(begin, end - 7)
    ]
    entry = fit_tokenizers(scan)[0]["fast"]
    normalizer = ActionNormalizer(scan.columns["action"].statistics.summary(), **entry["normalization"])
    expected = FastTokenizer.fit(normalizer.normalize(np.stack(chunks)))
    assert entry["tokenizer"] == expected.to_dict() and expected.horizon == 8


def test_what_does_not_fit_is_said_in_words(write_dataset, scan):
    root, _ = write_dataset([10, 12])
    fitted, refused = fit_tokenizers(scanned(root))
    assert list(fitted) == ["uniform"] and fitted["uniform"]["tokenizer"]["action_dim"] == 2
    assert "or translation and gripper (4); these actions have 2" in refused["gaussian_grid"]
    assert refused["fast"] == "it is fitted to 16 consecutive actions, and no episode has as many"
    long, _ = write_dataset([3000])
    assert "Raise vocab_size" in fit_tokenizers(scanned(long, chunk_size=2700))[1]["fast"]
    without = fit_tokenizers(scanned(root, columns=["observation.state"]))
    assert without == ({}, dict.fromkeys(ACTION_TOKENIZERS, "there are no rows of 'action'"))


def test_datasets_without_one_good_row_have_no_grid(write_dataset):
    def spoil(columns):
        columns["action"][:] = np.nan

    root, _ = write_dataset([10], change=spoil)
    fitted, refused = fit_tokenizers(scanned(root))
    assert fitted == {} and refused.keys() == ACTION_TOKENIZERS.keys()


def of_seven(write_dataset, names):
    def change(columns):
        columns["action"] = np.random.default_rng(0).random((60, 7), np.float32)

    return scanned(write_dataset([30, 30], names=names, change=change)[0])


@pytest.mark.parametrize(
    "names",
    [
        ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
        {"motors": ["dx", "dy", "dz", "drx", "dry", "drz", "gripper_closedness"]},
        ["delta_x", "delta_y", "delta_z", "axis_angle_1", "axis_angle_2", "axis_angle_3", "gripper.pos"],
        ["eef.x.vel", "eef.y.vel", "eef.z.vel", "rx.vel", "ry.vel", "rz.vel", "Gripper"],
    ],
)
def test_names_of_an_end_effector_have_a_grid(write_dataset, names):
    assert "gaussian_grid" in fit_tokenizers(of_seven(write_dataset, names))[0]


@pytest.mark.parametrize(
    "names",
    [
        [f"joint_{index}" for index in range(7)],
        [*(f"joint_{index}" for index in range(6)), "gripper"],
        ["gripper", "x", "y", "z", "roll", "pitch", "yaw"],
        ["y", "x", "z", "roll", "pitch", "yaw", "gripper"],
        ["x", "y", "z", "qx", "qy", "qz", "qw"],
        ["x", "y", "z", "left_gripper", "a", "b", "right_gripper"],
        None,
    ],
)
def test_other_actions_have_no_grid_unless_they_are_said_to_be(write_dataset, names):
    scan = of_seven(write_dataset, names)
    fitted, refused = fit_tokenizers(scan)
    assert list(fitted) == ["uniform", "fast"] and [*refused] == ["gaussian_grid"]
    listed = names or [f"action_{index}" for index in range(7)]
    assert f"if {listed} are these, in this order, say so (--end-effector)" in refused["gaussian_grid"]
    assert "gaussian_grid" in fit_tokenizers(scan, end_effector=True)[0]
