import pytest
import torch
from safetensors.torch import load_file

from hf_vla.models.spatialvla.ego3d import Ego3DPositionEncoding, back_project


@pytest.fixture(scope="module")
def recorded(goldens):
    folder = goldens / "spatialvla" / "zoe1_spatial_chunk4"
    return {**load_file(folder / "inputs.safetensors"), **load_file(folder / "outputs.safetensors")}


@pytest.fixture(scope="module")
def encoding(goldens):
    weights = load_file(goldens / "spatialvla" / "zoe1_spatial_chunk4" / "checkpoint" / "model.safetensors")
    prefix = "position_embedding_3d."
    module = Ego3DPositionEncoding(points_per_patch=4, n_freqs=8, hidden_size=48)
    module.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    )
    return module.requires_grad_(False)


def test_back_projection_equals_the_recording(recorded):
    depth, intrinsics = recorded["standalone.depth"][:, 0], recorded["standalone.intrinsic"]
    xyz = back_project(depth, intrinsics, patch_size=14, points_per_side=2)
    torch.testing.assert_close(xyz, recorded["standalone.backprojected_xyz"], atol=5e-4, rtol=0)


def test_frequencies_and_embedding_equal_the_recording(recorded, encoding):
    xyz = recorded["standalone.xyz"]
    normalized = (xyz - torch.tensor([0.0, 0.0, 2.0]).repeat(4)) / 2
    torch.testing.assert_close(
        encoding.encode_frequencies(normalized), recorded["standalone.frequency_encoding"], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(encoding(xyz), recorded["standalone.pos_embed_3d"], atol=1e-3, rtol=0)


def test_a_flat_wall_back_projects_to_its_own_plane():
    intrinsics = torch.tensor([[50.0, 0.0, 28.0], [0.0, 50.0, 28.0], [0.0, 0.0, 1.0]])
    xyz = back_project(torch.full((1, 56, 56), 1.5), intrinsics, patch_size=14, points_per_side=2).reshape(16, 4, 3)
    torch.testing.assert_close(xyz[..., 2], torch.full((16, 4), 1.5))
    # the first point of the first patch looks through pixel (3.5, 3.5)
    torch.testing.assert_close(xyz[0, 0, :2], torch.full((2,), (3.5 - 28) / 50 * 1.5))
    # within a patch: row, then column
    assert xyz[0, 1, 0] > xyz[0, 0, 0] and xyz[0, 2, 1] > xyz[0, 0, 1]


@pytest.mark.parametrize("points_per_side", [1, 2, 3, 4])
def test_any_number_of_points_fits_a_patch_of_14_pixels(points_per_side):
    """The reference's own default of 4 crashes: 14 is no multiple of it."""
    xyz = back_project(torch.ones(2, 28, 28), torch.eye(3), 14, points_per_side)
    assert xyz.shape == (2, 4, points_per_side**2 * 3)


def test_geometry_keeps_float32_precision_under_bfloat16(recorded, encoding):
    """In bfloat16 pixel 115.5 becomes 115 or 116 and the high frequencies turn to noise."""
    depth, intrinsics = recorded["standalone.depth"][:, 0], recorded["standalone.intrinsic"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        xyz = back_project(depth, intrinsics, 14, 2)
        encoded = encoding.encode_frequencies(xyz)
    assert xyz.dtype == encoded.dtype == torch.float32
    assert back_project(depth.bfloat16(), intrinsics.bfloat16(), 14, 2).dtype == torch.float32
    torch.testing.assert_close(xyz, recorded["standalone.backprojected_xyz"], atol=5e-4, rtol=0)
    torch.testing.assert_close(encoded, encoding.encode_frequencies(xyz), atol=0, rtol=0)
