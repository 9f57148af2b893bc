"""TinyVLA's denoiser: a 1-D UNet over the chunk whose every block is modulated by time and observation (FiLM)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hf_vla.actions.heads.networks.base import DTYPES, Denoiser
from hf_vla.actions.heads.networks.condition import Condition

# scripts/benchmark_heads.py: up to here, on a CPU, a matrix product is as fast as torch's convolution, or faster
FINAL_GROUPS = 8  # of the last block's norm, whatever n_groups is, as published
MAX_ROWS = 16


class ConditionalUnet1D(Denoiser):
    """Convolutional residual blocks along the chunk, down to half its length per level and up again.

    Its modules have the published names. A chunk whose length is no multiple of the total stride
    `2 ** (len(down_dims) - 1)` is padded with zeros at its end and the prediction cropped.

    Args:
        action_dim (`int`): numbers of one action.
        chunk_size (`int`): not used, any length will do; every denoiser is built with it.
        cond_dim (`int`): size of the condition's vector.
        down_dims (`list[int]`): channels of each level.
        diffusion_step_embed_dim (`int`): size of the embedded time, even.
        kernel_size (`int`): of the blocks' convolutions, odd.
        n_groups (`int`): of the blocks' group norms; divides every level's channels. The last norm has 8.
        timestep_embedding_dtype (`str`): precision in which sines and cosines of the time are computed. `"bfloat16"`
            for weights that the published code has trained: it computes them so, whatever the network's precision.

    The Linears of the blocks' `cond_encoder` are read by `prepare`, not called: adapters and hooks on them have no
    effect. Train them in full, as the LoRA recipe does with the whole head.

    Raises:
        ValueError: an option is not valid.

    Source: Diffusion Policy, https://huggingface.co/papers/2303.04137; TinyVLA's published ConditionalUnet1D.
    """

    def __init__(
        self,
        action_dim: int,
        chunk_size: int,
        cond_dim: int,
        *,
        down_dims: Sequence[int] = (256, 512, 1024),
        diffusion_step_embed_dim: int = 256,
        kernel_size: int = 5,
        n_groups: int = 8,
        timestep_embedding_dtype: str = "float32",
    ):
        super().__init__()
        indivisible = [channels for channels in down_dims if channels % n_groups] + [
            channels for channels in down_dims[:1] if channels % FINAL_GROUPS
        ]
        if not down_dims or kernel_size % 2 == 0 or indivisible:
            raise ValueError(
                f"Expected down_dims that are multiples of n_groups, the first of {FINAL_GROUPS} too, and an odd "
                f"kernel_size, came {list(down_dims)}, {n_groups} and {kernel_size}."
            )
        if diffusion_step_embed_dim < 4 or diffusion_step_embed_dim % 2 or timestep_embedding_dtype not in DTYPES:
            raise ValueError(
                f"Expected an even diffusion_step_embed_dim of 4 or more and timestep_embedding_dtype in {[*DTYPES]}, "
                f"came {diffusion_step_embed_dim} and {timestep_embedding_dtype!r}."
            )
        self.step_dim, self.stride = diffusion_step_embed_dim, 2 ** (len(down_dims) - 1)

        def block(in_channels, out_channels):
            film_dim = diffusion_step_embed_dim + cond_dim
            return ResidualBlock(in_channels, out_channels, film_dim, kernel_size, n_groups)

        self.diffusion_step_encoder = StepEncoder(diffusion_step_embed_dim, DTYPES[timestep_embedding_dtype])
        levels = list(zip((action_dim, *down_dims[:-1]), down_dims, strict=True))
        self.down_modules = nn.ModuleList(
            nn.ModuleList([block(low, high), block(high, high), Resample(Conv1d(high, high, 3, stride=2))])
            for low, high in levels
        )
        self.down_modules[-1][2] = nn.Identity()
        self.mid_modules = nn.ModuleList(block(down_dims[-1], down_dims[-1]) for _ in range(2))
        self.up_modules = nn.ModuleList(
            nn.ModuleList([block(2 * high, low), block(low, low), Resample(ConvTranspose1d(low))])
            for low, high in levels[:0:-1]
        )
        self.final_conv = nn.Sequential(
            ConvBlock(down_dims[0], down_dims[0], kernel_size, FINAL_GROUPS), Conv1d(down_dims[0], action_dim, 1)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the published initial weights: Linears N(0, 0.02) without bias, convolutions and norms torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.GroupNorm):
                module.reset_parameters()

    def prepare(self, condition: Condition, times: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Project times and condition to the scales and biases of every block: a Linear of both is a sum of two."""
        encoders = [block.cond_encoder[1] for block in self.residual_blocks()]
        step, vector = F.mish(self.diffusion_step_encoder(times)), F.mish(condition.vector)
        of_times = torch.cat([F.linear(step, e.weight[:, : self.step_dim]) for e in encoders], -1)
        of_vector = torch.cat([F.linear(vector, e.weight[:, self.step_dim :], e.bias) for e in encoders], -1)
        return [(of_time, of_vector) for of_time in of_times]

    def residual_blocks(self) -> list["ResidualBlock"]:
        """Every block with a FiLM projection, in the order of the forward pass."""
        levels = [*self.down_modules, self.mid_modules, *self.up_modules]
        return [block for level in levels for block in level if isinstance(block, ResidualBlock)]

    def forward(self, sample: torch.Tensor, context: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Denoise `(batch_size, T, action_dim)`, any T, into the same shape."""
        films = iter(torch.add(*context).split([block.film_size for block in self.residual_blocks()], -1))
        length = sample.shape[1]
        x = F.pad(sample, (0, 0, 0, -length % self.stride))
        skipped = []
        for first, second, downsample in self.down_modules:
            x = second(first(x, next(films)), next(films))
            skipped.append(x)
            x = downsample(x)
        for block in self.mid_modules:
            x = block(x, next(films))
        for first, second, upsample in self.up_modules:
            x = torch.cat([x, skipped.pop()], -1)
            x = upsample(second(first(x, next(films)), next(films)))
        return self.final_conv(x)[:, :length]


class StepEncoder(nn.Sequential):
    """Sines and cosines of the time through two Linears; the published module 0 is the embedding, without weights."""

    def __init__(self, dim, dtype):
        super().__init__(nn.Identity(), nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.dim, self.dtype = dim, dtype

    def forward(self, times):
        """Encode times `(...)` as `(..., dim)` in the precision of the weights."""
        return super().forward(self.waves(times).to(self[1].weight.dtype))

    def waves(self, times):
        """Sines, then cosines of frequencies from 1 down to 1/10000, `(..., dim)`, all computed in `dtype`."""
        half = torch.arange(self.dim // 2, device=times.device, dtype=self.dtype)
        angles = times[..., None].to(self.dtype) * torch.exp(half * (-math.log(10000.0) / (self.dim // 2 - 1)))
        return torch.cat([angles.sin(), angles.cos()], -1)


class Conv1d(nn.Conv1d):
    """A convolution over `(batch_size, T, channels)`; of a few positions, one product with the weight matrix.

    Reading the weights is what a convolution of a single short chunk costs. A product reads them where they lie,
    torch's convolution rearranges them in every call; with many rows that no longer matters.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)

    def forward(self, x):
        """Convolve `(batch_size, T, in_channels)` into `(batch_size, ceil(T / stride), out_channels)`."""
        if not few_rows(x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        padding = self.padding[0]
        windows = F.pad(x, (0, 0, padding, padding)).unfold(1, self.kernel_size[0], self.stride[0])
        return F.linear(windows.flatten(2), self.weight.flatten(1), self.bias)


class ConvTranspose1d(nn.ConvTranspose1d):
    """A transposed convolution over `(batch_size, T, channels)` to twice the length, computed as in [`Conv1d`]."""

    def __init__(self, channels):
        super().__init__(channels, channels, 4, stride=2, padding=1)

    def forward(self, x):
        """Map `(batch_size, T, channels)` to `(batch_size, 2 * T, channels)`."""
        if not few_rows(x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        windows = (x @ self.weight.flatten(1)).transpose(1, 2)  # what each input adds to four outputs in a row
        summed = F.fold(windows, (1, 2 * x.shape[1]), (1, 4), padding=(0, 1), stride=(1, 2))
        return summed[:, :, 0].transpose(1, 2) + self.bias


class Resample(nn.Module):
    """Half or twice the length."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        """Map `(batch_size, T, channels)` to `(batch_size, T / 2 or 2 * T, channels)`."""
        return self.conv(x)


def few_rows(x):
    """Whether a product with the weights of a convolution is as fast as the convolution: measured on CPUs only."""
    return x.is_cpu and x.shape[0] * x.shape[1] <= MAX_ROWS


class ConvBlock(nn.Module):
    """Convolution, group norm, Mish."""

    def __init__(self, in_channels, out_channels, kernel_size, n_groups):
        super().__init__()
        self.block = nn.Sequential(
            Conv1d(in_channels, out_channels, kernel_size), nn.GroupNorm(n_groups, out_channels), nn.Mish()
        )

    def forward(self, x):
        """Map `(batch_size, T, in_channels)` to `(batch_size, T, out_channels)`."""
        convolution, norm, activation = self.block
        return activation(norm(convolution(x).transpose(1, 2)).transpose(1, 2))


class ResidualBlock(nn.Module):
    """Two convolution blocks; between them FiLM: every channel is scaled (by s, not 1 + s) and shifted."""

    def __init__(self, in_channels, out_channels, film_dim, kernel_size, n_groups):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                ConvBlock(in_channels, out_channels, kernel_size, n_groups),
                ConvBlock(out_channels, out_channels, kernel_size, n_groups),
            ]
        )
        self.film_size = 2 * out_channels
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(film_dim, self.film_size))
        same = in_channels == out_channels
        self.residual_conv = nn.Identity() if same else Conv1d(in_channels, out_channels, 1)

    def forward(self, x, film):
        """Map `(batch_size, T, in_channels)` with `film` `(batch_size, film_size)`."""
        scale, shift = film[:, None].chunk(2, -1)
        return self.blocks[1](torch.addcmul(shift, scale, self.blocks[0](x))) + self.residual_conv(x)
