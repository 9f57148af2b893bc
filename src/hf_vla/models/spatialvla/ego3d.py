"""Ego3D position encoding: every image patch learns where in space, in the camera's frame, it looks at.

depth (metres) + intrinsics -> 3-D points (metres) -> sines and cosines -> MLP -> added to the patch's features.
All geometry is computed in float32 whatever the network's precision: half a pixel is lost in bfloat16.

Source: SpatialVLA, section III-A, https://huggingface.co/papers/2501.15830
"""

import torch
import torch.nn.functional as F
from torch import nn


def back_project(depth: torch.Tensor, intrinsics: torch.Tensor, patch_size: int, points_per_side: int) -> torch.Tensor:
    """Lift a depth map to the 3-D points that each patch sees.

    Args:
        depth (`torch.Tensor` of shape `(batch_size, height, width)`): metric depth along the optical axis.
        intrinsics (`torch.Tensor` of shape `(batch_size, 3, 3)` or `(3, 3)`): in pixels of that depth map.
        patch_size (`int`): side of a patch of the vision tower, in pixels.
        points_per_side (`int`): a patch is sampled at `points_per_side ** 2` points (the published 2 gives 4).

    Returns:
        `torch.Tensor` of shape `(batch_size, num_patches, points_per_side ** 2 * 3)`, float32, metres: patches in
        row-major order; within a patch (row, column, xyz).
    """
    depth, intrinsics = depth.float(), intrinsics.float()
    batch_size, height, width = depth.shape
    rows, cols = height // patch_size, width // patch_size
    n = points_per_side
    z = F.interpolate(depth[:, None], size=(rows * n, cols * n), mode="area")[:, 0]

    step = patch_size / n
    y = (torch.arange(rows * n, device=depth.device, dtype=torch.float32) + 0.5) * step
    x = (torch.arange(cols * n, device=depth.device, dtype=torch.float32) + 0.5) * step
    y, x = torch.meshgrid(y, x, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    inverse = torch.linalg.inv(intrinsics).reshape(-1, 1, 1, 3, 3)
    rays = (inverse * pixels[..., None, :]).sum(-1)  # no matmul: autocast would round it to bfloat16
    points = rays * z[..., None]

    points = points.reshape(batch_size, rows, n, cols, n, 3).transpose(2, 3)
    return points.reshape(batch_size, rows * cols, n * n * 3)


class Ego3DPositionEncoding(nn.Module):
    """Embed the points of a patch: `[x, sin(2^k x), cos(2^k x)]` for k = 0..n_freqs-1, then a two-layer MLP.

    The points are first moved to the centre of the usual workspace, `(xyz - (0, 0, 2)) / 2`.
    """

    def __init__(self, points_per_patch: int, n_freqs: int, hidden_size: int):
        super().__init__()
        self.n_freqs = n_freqs
        self.position_embedding_head = nn.Sequential(
            nn.Linear(points_per_patch * 3 * (2 * n_freqs + 1), hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def encode_frequencies(self, xyz: torch.Tensor) -> torch.Tensor:
        """`(..., channels)` normalised points -> `(..., channels * (2 * n_freqs + 1))`, float32.

        Layout per channel: the value, its sines over k, its cosines over k.
        """
        xyz = xyz.float()
        frequencies = 2.0 ** torch.arange(self.n_freqs, device=xyz.device, dtype=torch.float32)
        angles = xyz[..., None] * frequencies
        return torch.cat([xyz[..., None], angles.sin(), angles.cos()], dim=-1).flatten(-2)

    def forward(self, xyz: torch.Tensor) -> torch.Tensor:
        """`(batch_size, num_patches, points_per_patch * 3)` in metres -> `(batch_size, num_patches, hidden_size)`."""
        origin = xyz.new_tensor([0.0, 0.0, 2.0]).repeat(xyz.shape[-1] // 3)
        encoded = self.encode_frequencies((xyz - origin) / 2.0)
        return self.position_embedding_head(encoded.to(self.position_embedding_head[0].weight.dtype))
