"""SpatialVLA's grids. Recordings: edges and decoded values 1e-12, ids exact but for rows flagged near an edge."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_vla.actions.tokenizers.gaussian_grid import MIN_WIDTH, GaussianGridTokenizer, transfer_embeddings

BRIDGE = {
    "theta": (2.1809353828430176, 0.7849347591400146),
    "phi": (0.14071796834468842, 1.79030179977417),
    "r": (0.5538575649261475, 0.3001556098461151),
    "roll": (-0.008261306211352348, 0.3131641745567322),
    "pitch": (0.08297622203826904, 0.3307911157608032),
    "yaw": (0.009338612668216228, 0.2981548309326172),
}
POLICIES = ["policy_bridge", "policy_uniform", "policy_tiny_bridge"]
CELL_STEP = 7  # every seventh cell is recorded: each bin of each axis is among them
CHECKPOINTS = {"nozoe_nospatial_tied_batch2_pad_chunk1": 2, "zoe1_spatial_chunk4": 1}


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "spatialvla" / "action_tokenizer"


@pytest.fixture(scope="module", params=POLICIES)
def recorded(request, folder):
    """A policy's recording and the tokenizer of its edges."""
    data = load_file(folder / f"{request.param}.safetensors")
    return data, GaussianGridTokenizer({axis: data[f"edges.{axis}_bins"] for axis in BRIDGE})


def in_blocks(tokenizer, ids):
    """The reference clips each id to its own block; ours raises, so its recordings are read through this."""
    blocks = np.array([block[1:] for block in tokenizer.blocks])
    return np.clip(ids, blocks[:, 0], blocks[:, 1] - 1)


def single_axis_motion(noise, count=4000):
    """The arm goes along x only; the other axes hold sensor noise."""
    generator = np.random.default_rng(0)
    actions = np.zeros((count, 7))
    actions[:, 0] = generator.uniform(-1, 1, count)
    actions[:, 1:6] = generator.normal(0, noise, (count, 5))
    return actions


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_ids_and_decoded_actions_equal_the_recorded(recorded, folder, name):
    data, tokenizer = recorded
    actions = load_file(folder / "actions.safetensors")["actions_f64"].astype(f"float{name[1:]}")
    ids = tokenizer.encode(actions[:, None])
    clear = ~data[f"near_edge_{name}"]
    assert clear.sum() > 320
    np.testing.assert_array_equal(ids[clear], data[f"rel_ids_{name}"][clear])
    decoded = tokenizer.decode(data[f"rel_ids_{name}"])[:, 0]
    np.testing.assert_allclose(decoded, data[f"decoded_{name}"], rtol=0, atol=1e-12)


def test_cells_of_every_bin_decode_as_recorded(recorded):
    data, tokenizer = recorded
    (_, _, first), (_, _, second), _ = tokenizer.blocks
    for block, (name, start, end) in enumerate(tokenizer.blocks):
        cells = np.arange(start, end, CELL_STEP)
        ids = np.repeat([[0, first, second]], len(cells), axis=0)
        ids[:, block] = cells
        part = tokenizer.decode(ids)[:, 0, 3 * block : 3 * block + 3]
        np.testing.assert_allclose(part, data[f"decode_table.{name}"], rtol=0, atol=1e-12)


def test_ids_outside_their_block_decode_as_recorded_once_clipped(recorded):
    data, tokenizer = recorded
    offset = (data["abs_ids_f64"] - data["rel_ids_f64"])[0, 0]
    ids = data["decode_any.abs_ids"] - offset
    decoded = tokenizer.decode(in_blocks(tokenizer, ids))[:, 0]
    np.testing.assert_allclose(decoded, data["decode_any.actions"], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"expected an id of the \w+ block, \[\d+, \d+\)"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["policy_bridge", "policy_tiny_bridge"])
def test_edges_of_published_gaussians(name, folder):
    data = load_file(folder / f"{name}.safetensors")
    num_bins = [len(data[f"edges.{axis}_bins"]) - 1 for axis in BRIDGE]
    edges = GaussianGridTokenizer.from_gaussians(BRIDGE, num_bins).edges
    for axis in BRIDGE:
        np.testing.assert_allclose(edges[axis], data[f"edges.{axis}_bins"], rtol=0, atol=1e-12)


def test_edges_of_the_uniform_grid(folder):
    data = load_file(folder / "policy_uniform.safetensors")
    tokenizer = GaussianGridTokenizer(distribution="uniform")
    assert tokenizer.vocab_size == 8194
    assert tokenizer.blocks == [("translation", 0, 4096), ("rotation", 4096, 8192), ("gripper", 8192, 8194)]
    for axis, edges in tokenizer.edges.items():
        np.testing.assert_allclose(edges, data[f"edges.{axis}_bins"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_published_checkpoints_decode_as_recorded(case, goldens):
    """The first of them is a cartesian grid with polar ranges, as the published code writes it."""
    folder = goldens / "spatialvla" / case
    config = json.loads((folder / "checkpoint" / "processor_config.json").read_text())
    policy = config["bin_policy"]
    tokenizer = GaussianGridTokenizer.from_published(config["action_config"], policy, config["min_sigma"])
    assert tokenizer.use_spherical == config["action_config"]["use_spherical"]
    assert tokenizer.vocab_size == config["action_config"]["num_bins"]["total"]
    flat = policy["translation"] | policy["rotation"]
    actions = np.random.default_rng(0).uniform(-1, 1, (500, 1, 7))
    assert (np.abs(tokenizer.decode(tokenizer.encode(actions)) - actions) <= tokenizer.resolution() + 1e-9).all()
    assert [*tokenizer.to_dict()["edges"].values()] == [flat[f"{axis}_bins"] for axis in BRIDGE]
    outputs = load_file(folder / "outputs.safetensors")
    vocab_size = outputs["gen.step_logits"].shape[-1]
    for sample in range(CHECKPOINTS[case]):
        ids = outputs[f"gen.action_ids_{sample}"].reshape(-1, 3) - (vocab_size - tokenizer.vocab_size)
        decoded = tokenizer.decode(in_blocks(tokenizer, ids))[:, 0]
        np.testing.assert_allclose(decoded, outputs[f"gen.normalized_actions_{sample}"], rtol=0, atol=1e-12)


def test_ids_outside_their_block_are_never_clipped_into_a_block():
    tokenizer = GaussianGridTokenizer(distribution="uniform", num_bins=(2, 2, 2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"ids\[1, 4\] is 7; expected an id of the rotation block, \[8, 16\)"):
        tokenizer.decode([[0, 8, 16, 0, 8, 16], [0, 8, 16, 0, 7, 16]])
    np.testing.assert_array_equal(tokenizer.id_ranges(2), [[0, 8], [8, 16], [16, 18]] * 2)


def test_a_value_on_an_edge_goes_up_and_values_outside_are_clipped():
    tokenizer = GaussianGridTokenizer(num_bins=(2,) * 6, distribution="uniform", use_spherical=False)
    ids = tokenizer.encode([[[0, -1e-9, -5, 5, 0, 0, 0.5]], [[-1, -1, -1, -1, -1, -1, 0.4999]]])
    np.testing.assert_array_equal(ids, [[4, 8 + 7, 17], [0, 8, 16]])


def test_polar_axes_are_theta_phi_r():
    tokenizer = GaussianGridTokenizer(num_bins=(2, 4, 3, 1, 1, 1), distribution="uniform")
    # theta: above or below the plane; phi: quadrants from -pi; r: thirds of sqrt(3)
    actions = np.zeros((4, 1, 7))
    actions[:, 0, :3] = [[0.3, 0.3, 0.1], [-0.3, -0.3, -0.1], [-0.9, 0.9, 0.9], [0.9, -0.5, 0.5]]
    theta_phi_r = np.array([[0, 2, 0], [1, 0, 0], [0, 3, 2], [0, 1, 1]])
    np.testing.assert_array_equal(tokenizer.encode(actions)[:, 0], theta_phi_r @ [12, 3, 1])


def test_negative_translations_of_a_cartesian_grid_are_told_apart():
    """The reference keeps the polar ranges, under which every negative x and z is in the lowest bin."""
    tokenizer = GaussianGridTokenizer.fit(
        np.random.default_rng(0).normal(0, 0.3, (500, 7)), (8, 8, 8, 4, 4, 4), use_spherical=False
    )
    assert list(tokenizer.edges) == ["x", "y", "z", "roll", "pitch", "yaw"]
    assert all(tokenizer.edges[axis][0] == -1 for axis in "xyz")
    actions = np.zeros((4, 1, 7))
    actions[:, 0, 0] = [-0.8, -0.3, -0.1, 0.3]
    assert len(np.unique(tokenizer.encode(actions)[:, 0])) == 4
    decoded = tokenizer.decode(tokenizer.encode(actions))[:, 0]
    assert (np.abs(decoded - actions[:, 0]) <= tokenizer.resolution() + 1e-12).all()


def test_grids_without_rotation_have_two_ids_per_action():
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 5, 4))
    tokenizer = GaussianGridTokenizer.fit(actions, (8, 16, 4))
    assert (tokenizer.action_dim, tokenizer.vocab_size) == (4, 8 * 16 * 4 + 2)
    ids = tokenizer.encode(actions)
    assert ids.shape == (100, 10)
    assert (np.abs(tokenizer.decode(ids) - actions) <= tokenizer.resolution() + 1e-12).all()
    assert GaussianGridTokenizer.from_dict(tokenizer.to_dict()).blocks == tokenizer.blocks


@pytest.mark.parametrize("num_bins", [(1, 1, 1), (3, 1, 2), (1, 5, 2), (2, 3, 1)])
def test_round_trips_through_coarse_polar_cells_stay_within_resolution(num_bins):
    actions = np.random.default_rng(0).uniform(-1, 1, (3000, 1, 4))
    tokenizer = GaussianGridTokenizer(num_bins=num_bins, distribution="uniform")
    worst = np.abs(tokenizer.decode(tokenizer.encode(actions)) - actions).max(axis=(0, 1))
    assert (worst <= tokenizer.resolution()).all() and (worst > 0.5 * tokenizer.resolution()).all()


def test_axes_of_many_bins_are_searched_to_the_same_ids():
    many = GaussianGridTokenizer(num_bins=(200, 4, 100, 65, 66, 300), distribution="uniform", use_spherical=False)
    actions = np.random.default_rng(0).uniform(-1, 1, (500, 1, 7))
    actions[:66, 0, 4] = many.edges["pitch"][:66]  # a value on an edge goes up here too
    columns = actions[:, 0].T
    axes = [np.digitize(c, e[1:-1]) for c, e in zip(columns, many.edges.values(), strict=False)]
    expected = np.ravel_multi_index(axes[:3], (200, 4, 100)), np.ravel_multi_index(axes[3:], (65, 66, 300)) + 80000
    np.testing.assert_array_equal(many.encode(actions)[:, :2], np.stack(expected, axis=1))


def test_a_gaussian_fit_uses_mean_and_deviation_of_the_polar_axes():
    actions = np.random.default_rng(0).uniform(-0.8, 1, (3000, 7))
    x, y, z = actions[:, :3].T
    polar = {"theta": np.arctan2(np.hypot(x, y), z), "phi": np.arctan2(y, x), "r": np.linalg.norm([x, y, z], axis=0)}
    columns = polar | dict(zip(["roll", "pitch", "yaw"], actions[:, 3:6].T, strict=True))
    expected = GaussianGridTokenizer.from_gaussians({k: (v.mean(), v.std()) for k, v in columns.items()})
    fitted = GaussianGridTokenizer.fit(actions)
    for axis in columns:
        np.testing.assert_allclose(fitted.edges[axis], expected.edges[axis], rtol=0, atol=1e-12)


def test_translations_of_length_zero_have_no_direction():
    actions = np.random.default_rng(0).uniform(-1, 1, (500, 7))
    still = actions.copy()
    still[:, :3] = 0
    alone, mixed = (GaussianGridTokenizer.fit(data) for data in (actions, np.concatenate([actions, still])))
    np.testing.assert_array_equal(alone.edges["theta"], mixed.edges["theta"])
    np.testing.assert_array_equal(alone.edges["phi"], mixed.edges["phi"])
    assert not np.allclose(alone.edges["r"], mixed.edges["r"])


def test_min_sigma_widens_narrow_gaussians_and_is_kept():
    actions = single_axis_motion(0.01)
    narrow, wide = (GaussianGridTokenizer.fit(actions, min_sigma=sigma) for sigma in (0.0, 0.5))
    expected = GaussianGridTokenizer.from_gaussians(BRIDGE | {"yaw": (actions[:, 5].mean(), 0.5)}).edges["yaw"]
    np.testing.assert_allclose(wide.edges["yaw"], expected, rtol=0, atol=1e-12)
    assert np.diff(narrow.edges["yaw"]).max() > 0.9 > 0.4 > np.diff(wide.edges["yaw"]).max()
    assert wide.to_dict()["min_sigma"] == 0.5


@pytest.mark.parametrize("noise", [0.0, 0.005])
@pytest.mark.parametrize("distribution", ["mixture", "quantile"])
def test_single_axis_motion_leaves_the_other_axes_usable(distribution, noise):
    """The paper names this as the limit of its Gaussians: all bins of the still axes crowd around zero."""
    data = single_axis_motion(noise)
    probes = np.random.default_rng(1).uniform(-0.6, 0.6, (4000, 1, 7))
    probes[..., 0], probes[..., 6] = 0.0, 1.0

    def errors(kind):
        tokenizer = GaussianGridTokenizer.fit(data, distribution=kind)
        return np.abs(tokenizer.decode(tokenizer.encode(probes)) - probes).max(axis=(0, 1))[1:6]

    assert (errors(distribution) < 0.2).all()
    assert (errors("gaussian") > 0.35).all()


@pytest.mark.parametrize("distribution", ["mixture", "quantile"])
@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_no_bin_is_wider_than_the_floor_allows(distribution, weight):
    tokenizer = GaussianGridTokenizer.fit(single_axis_motion(0.005), distribution=distribution, uniform_weight=weight)
    for axis, edges in tokenizer.edges.items():
        low, high = tokenizer.ranges[axis]
        limit = (high - low) / ((len(edges) - 1) * weight)
        assert np.diff(edges).max() <= limit * (1 + 1e-9) + 100 * MIN_WIDTH


def test_a_mixture_of_weight_zero_is_the_gaussian_and_of_one_the_uniform_grid():
    gaussian, uniform = GaussianGridTokenizer.from_gaussians(BRIDGE), GaussianGridTokenizer(distribution="uniform")
    for weight, other in ((0.0, gaussian), (1.0, uniform)):
        mixture = GaussianGridTokenizer.from_gaussians(BRIDGE, distribution="mixture", uniform_weight=weight)
        for axis in BRIDGE:
            np.testing.assert_allclose(mixture.edges[axis], other.edges[axis], rtol=0, atol=1e-9)


def test_quantiles_without_a_floor_hold_equal_counts():
    actions = np.random.default_rng(0).beta(2, 5, (8000, 7)) * 2 - 1
    tokenizer = GaussianGridTokenizer.fit(actions, distribution="quantile", uniform_weight=0.0)
    counts = np.histogram(actions[:, 3], tokenizer.edges["roll"])[0]
    assert counts.sum() == 8000 and np.abs(counts - 500).max() <= 2


@pytest.mark.parametrize("distribution", ["gaussian", "uniform", "quantile", "mixture"])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, -1.0, 7.0])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_constant_data_give_increasing_edges_and_are_kept(distribution, value, weight):
    data = np.full((5, 7), value)
    data[:, 6] = 1.0
    for spherical in (True, False):
        tokenizer = GaussianGridTokenizer.fit(data, (16, 32, 8, 16, 16, 16), distribution, 0.0, spherical, weight)
        for axis, edges in tokenizer.edges.items():
            assert (edges[0], edges[-1]) == pytest.approx(tokenizer.ranges[axis], abs=1e-9)
            assert (np.diff(edges) > 0).all()
        decoded = tokenizer.decode(tokenizer.encode(data))
        error = np.abs(decoded - np.clip(data, -1, 1))
        assert (error <= tokenizer.resolution() + 1e-9).all()
        if distribution in ("gaussian", "mixture") and abs(value) < 1 and not spherical:
            assert error.max() < 1e-4


def test_one_action_is_enough_to_fit():
    for distribution in ("gaussian", "quantile", "mixture"):
        assert GaussianGridTokenizer.fit(np.zeros((1, 7)), distribution=distribution).vocab_size == 8194


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "A 'gaussian' grid needs bin edges; make it with GaussianGridTokenizer.fit"),
        ({"distribution": "gausian"}, r"Unknown distribution 'gausian'; expected one of \['gaussian', 'uniform'"),
        ({"distribution": "uniform", "num_bins": (2, 2)}, r"Expected 6 bin counts, or 3 .* >= 1; got \(2, 2\)"),
        ({"distribution": "uniform", "num_bins": (2, 2, 0)}, r"Expected 6 bin counts, or 3 .* >= 1; got \(2, 2, 0\)"),
        ({"distribution": "uniform", "uniform_weight": 1.5}, r"Expected a uniform_weight in \[0, 1\]; got 1.5"),
        ({"edges": {"theta": [0, 1], "phi": [0, 1], "r": [0, 0]}}, "strictly increasing edges of r; got .*0, 0"),
        ({"edges": {"theta": [0, 1], "phi": [0, np.nan], "r": [0, 1]}}, "finite, strictly increasing edges of phi"),
        ({"edges": {"theta": [0], "phi": [0, 1], "r": [0, 1]}}, "at least two finite, strictly .* edges of theta"),
        ({"edges": {"r": [0, 1], "phi": [0, 1], "x": [0, 1]}}, r"the axes \['theta', 'phi', 'r'\]; got"),
        (
            {"edges": {"x": [0, 1], "y": [0, 1], "z": [0, 1]}},
            r"the axes \['theta', 'phi', 'r'\].*got \['x', 'y', 'z'\]",
        ),
        (
            {"edges": {"theta": [0, 1], "phi": [0, 1], "r": [0, 1]}, "num_bins": [1, 1, 2]},
            r"Expected edges for \[1, 1, 2\] bins; got edges of \[1, 1, 1\] bins",
        ),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianGridTokenizer(**options)


def test_bad_gaussians_raise():
    with pytest.raises(ValueError, match=r"a \(mean, std\) for each of \['theta', .*; got \['theta'\]"):
        GaussianGridTokenizer.from_gaussians({"theta": (1.0, 1.0)})
    with pytest.raises(ValueError, match="Quantiles need data, .* use fit"):
        GaussianGridTokenizer.from_gaussians(BRIDGE, distribution="quantile")
    with pytest.raises(ValueError, match=r"Expected a mean of r in \[0, 1.73205\] and std >= 0; got -1.0, 1.0"):
        GaussianGridTokenizer.from_gaussians(BRIDGE | {"r": (-1.0, 1.0)})


def test_unfit_data_raise():
    with pytest.raises(ValueError, match=r"actions\[1, 2\] is nan; expected finite values"):
        GaussianGridTokenizer.fit([[0.0] * 7, [0.0, 0.0, np.nan, 0.0, 0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"Expected actions of shape \(\.\.\., chunk_size, 7\); got \(5, 4\)"):
        GaussianGridTokenizer.fit(np.zeros((5, 4)))


def test_incomplete_published_configurations_raise(goldens):
    path = goldens / "spatialvla" / "zoe1_spatial_chunk4" / "checkpoint" / "processor_config.json"
    config = json.loads(path.read_text())
    del config["bin_policy"]["translation"]["r_bins"]
    with pytest.raises(
        ValueError, match="Expected 'r_bins' in a published action_config and bin_policy; it is missing"
    ):
        GaussianGridTokenizer.from_published(config["action_config"], config["bin_policy"])
    with pytest.raises(ValueError, match="A 'gaussian' grid needs bin edges"):
        GaussianGridTokenizer.from_published(config["action_config"], None)


@pytest.fixture(scope="module")
def adaptation(folder):
    data = load_file(folder / "adapt_tiny_bridge_to_fractal.safetensors")
    edges = ({axis: data[f"{which}_edges.{axis}_bins"] for axis in BRIDGE} for which in ("old", "new"))
    return data, *map(GaussianGridTokenizer, edges)


def test_adapted_embeddings_equal_the_recorded(adaptation):
    data, source, target = adaptation
    adapted = transfer_embeddings(data["emb_before"], source, target)
    assert adapted.dtype == np.float32
    np.testing.assert_allclose(adapted, data["emb_after_true_trilinear_ij"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(adapted[-2:], data["emb_before"][-2:])


def test_adaptation_to_the_same_grid_changes_nothing(adaptation):
    data, source, _ = adaptation
    for periodic in (False, True):
        same = transfer_embeddings(data["emb_before"], source, source, periodic)
        np.testing.assert_allclose(same, data["emb_before"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("spherical", [True, False])
def test_functions_linear_in_the_axes_are_carried_to_another_resolution(spherical):
    """Embeddings that are the cell centres themselves come out as the new centres, inside the outermost ones."""
    grids = [
        GaussianGridTokenizer(num_bins=n, distribution="uniform", use_spherical=spherical)
        for n in ((4, 6, 5, 3, 4, 5), (7, 5, 3, 4, 3, 2))
    ]
    centers = []
    for grid in grids:
        axes = [(e[:-1] + e[1:]) / 2 for e in grid.edges.values()]
        parts = [np.stack(np.meshgrid(*axes[i : i + 3], indexing="ij"), -1).reshape(-1, 3) for i in (0, 3)]
        centers.append(np.concatenate([*parts, np.zeros((2, 3))]))
    adapted = transfer_embeddings(centers[0], *grids)
    for block in (0, 1):
        old, new = (slice(*grid.blocks[block][1:]) for grid in grids)
        low, high = centers[0][old].min(axis=0), centers[0][old].max(axis=0)  # replicated beyond the outermost
        np.testing.assert_allclose(adapted[new], np.clip(centers[1][new], low, high), atol=1e-12)


def test_the_azimuths_seam_is_an_end_of_the_grid_unless_periodic():
    source, target = (GaussianGridTokenizer(num_bins=(1, n, 1), distribution="uniform") for n in (4, 8))
    embeddings = np.zeros((6, 1))
    embeddings[:4, 0] = [10.0, 0.0, 0.0, 20.0]  # azimuths -135, -45, 45, 135 degrees
    ends = transfer_embeddings(embeddings, source, target)[:8, 0]
    np.testing.assert_allclose(ends[[0, 1, 6, 7]], [10.0, 7.5, 15.0, 20.0])
    across = transfer_embeddings(embeddings, source, target, periodic_azimuth=True)[:8, 0]
    np.testing.assert_allclose(across[[0, 1, 6, 7]], [12.5, 7.5, 15.0, 17.5])


def test_unfit_adaptations_raise(adaptation):
    data, source, target = adaptation
    cartesian = GaussianGridTokenizer(num_bins=(2,) * 6, distribution="uniform", use_spherical=False)
    with pytest.raises(ValueError, match=r"Expected grids of the same axes; got \['theta', .* and \['x', "):
        transfer_embeddings(data["emb_before"], source, cartesian)
    with pytest.raises(ValueError, match="a cartesian grid has no azimuth"):
        transfer_embeddings(np.zeros((18, 2)), cartesian, cartesian, periodic_azimuth=True)
    for wrong in (data["emb_before"][1:], data["emb_before"].astype(np.int64)):
        with pytest.raises(
            ValueError, match=r"Expected floating point embeddings of shape \(190, H\).*got \w+ of shape"
        ):
            transfer_embeddings(wrong, source, target)
