"""The multilayer perceptrons of the heads that predict in one pass."""

import itertools

import torch
from torch import nn


def mlp(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    """Build `num_layers` Linear layers with ReLU between them.

    Raises:
        ValueError: there is no layer.
    """
    if num_layers < 1:
        raise ValueError(f"Expected num_layers of 1 or more, came {num_layers}.")
    dims = [in_dim, *[hidden_dim] * (num_layers - 1)]
    layers = [layer for pair in itertools.pairwise(dims) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(dims[-1], out_dim))


class MLPResNet(nn.Module):
    """Residual perceptron.

    Args:
        in_dim, hidden_dim, out_dim (`int`): sizes.
        num_blocks (`int`): residual blocks of LayerNorm, Linear and ReLU.

    Source: OpenVLA-OFT's action head, https://huggingface.co/papers/2502.19645
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_blocks: int):
        super().__init__()
        self.input = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, hidden_dim), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, hidden_dim), nn.ReLU())
            for _ in range(num_blocks)
        )
        self.output = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, out_dim))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map `(..., in_dim)` to `(..., out_dim)`."""
        hidden = self.input(hidden)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.output(hidden)
