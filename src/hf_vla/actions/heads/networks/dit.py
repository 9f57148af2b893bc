"""A transformer over the noisy chunk: ScaleDP, CogACT's DiT and cross-attention to all VLM tokens, by option."""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from hf_vla.actions.heads.networks.base import DTYPES, Denoiser
from hf_vla.actions.heads.networks.condition import Condition

CONDITIONINGS = ("adaln_zero", "in_context", "cross_attention")


class DiTContext(NamedTuple):
    """What one call of the network needs beside the sample.

    Args:
        token (`torch.Tensor` of shape `(batch_size, 1, hidden_size)`): time and condition, embedded.
        modulations (`list`): shift, scale and gate of each sub-block, then of the final layer (no gate), each of shape
            `(batch_size, 1, hidden_size)`; without adaLN 0, 0 and 1.
        memories (`list`): keys and values of each block, `(batch_size, num_heads, sequence_length, head_dim)` each;
            empty without cross-attention.
        memory_mask (`torch.Tensor` of shape `(batch_size, 1, 1, sequence_length)`, bool): True where a token is real.
    """

    token: torch.Tensor
    modulations: list[tuple]
    memories: list[tuple]
    memory_mask: torch.Tensor


class DiT(Denoiser):
    """Diffusion transformer; chunks shorter than `chunk_size` use its first positions.

    Args:
        action_dim (`int`): numbers of one action.
        chunk_size (`int`): actions of one chunk.
        cond_dim (`int`): size of the condition's vector and tokens.
        hidden_size (`int`): width. CogACT S 384, B 768, L 1024; ScaleDP-L 1024, -H 1280.
        depth (`int`): blocks. CogACT S 6, B 12, L 24; ScaleDP-L 24, -H 32.
        num_heads (`int`): attention heads. CogACT S 4, B 12, L 16; ScaleDP-L and -H 16.
        mlp_ratio (`float`): width of a block's MLP over `hidden_size`.
        conditioning (`str`): how time and condition reach the blocks.
            - `"adaln_zero"` (ScaleDP): their sum shifts, scales and gates each sub-block; untrained blocks are
              identities.
            - `"in_context"` (CogACT): their sum is one token in front of the chunk.
            - `"cross_attention"`: as `"adaln_zero"`, and each block attends to all of the condition's tokens.
        timestep_embedding_dtype (`str`): `"bfloat16"` rounds as the published ScaleDP does.

    Raises:
        ValueError: an option is not valid.

    Source: DiT, https://huggingface.co/papers/2212.09748; ScaleDP, https://huggingface.co/papers/2409.14411, as in
        DexVLA's published code; CogACT, https://huggingface.co/papers/2411.19650; the place of the cross-attention,
        PixArt-alpha, https://huggingface.co/papers/2310.00426.
    """

    def __init__(
        self,
        action_dim: int,
        chunk_size: int,
        cond_dim: int,
        *,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        conditioning: str = "adaln_zero",
        timestep_embedding_dtype: str = "float32",
    ):
        super().__init__()
        if conditioning not in CONDITIONINGS or timestep_embedding_dtype not in DTYPES:
            raise ValueError(
                f"Expected conditioning in {CONDITIONINGS} and timestep_embedding_dtype in {tuple(DTYPES)}, came "
                f"{conditioning!r} and {timestep_embedding_dtype!r}."
            )
        if hidden_size % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide a hidden_size of {hidden_size}.")
        self.chunk_size, self.in_context = chunk_size, conditioning == "in_context"
        memory_dim = cond_dim if conditioning == "cross_attention" else None
        self.x_embedder = nn.Linear(action_dim, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, DTYPES[timestep_embedding_dtype])
        self.cond_obs_emb = nn.Linear(cond_dim, hidden_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.in_context + chunk_size, hidden_size))
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, int(mlp_ratio * hidden_size), not self.in_context, memory_dim)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, action_dim, not self.in_context)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the published initial weights: the output starts at 0 and, with adaLN, every block as the identity."""
        for name, linear in self.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            nn.init.zeros_(linear.bias)
            if name.endswith(("adaLN_modulation.1", "cross_attn.proj", "final_layer.linear")):
                nn.init.zeros_(linear.weight)
            elif name.startswith(("x_embedder", "cond_obs_emb", "t_embedder")):
                nn.init.normal_(linear.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(linear.weight)
        if self.in_context:
            nn.init.normal_(self.pos_embed, std=self.pos_embed.shape[-1] ** -0.5)
        else:
            nn.init.zeros_(self.pos_embed)

    def prepare(self, condition: Condition, times: torch.Tensor) -> list[DiTContext]:
        """See [`Denoiser`]; keys and values once for all steps.

        The modulations of adaLN are a nonlinear function of the sum of time and condition, so each step has its own:
        those of all steps are one matrix product.
        """
        tokens = (self.t_embedder(times) + self.cond_obs_emb(condition.vector))[:, :, None]
        modulations = zip(*(layer.modulations(tokens) for layer in (*self.blocks, self.final_layer)), strict=True)
        memories = [block.memory(condition.tokens) for block in self.blocks]
        mask = condition.token_mask[:, None, None]
        return [DiTContext(token, list(step), memories, mask) for token, step in zip(tokens, modulations, strict=True)]

    def forward(self, sample: torch.Tensor, context: DiTContext) -> torch.Tensor:
        """See [`Denoiser`].

        Raises:
            ValueError: the sample is longer than `chunk_size`.
        """
        horizon = sample.shape[1]
        if horizon > self.chunk_size:
            raise ValueError(f"Expected at most chunk_size = {self.chunk_size} actions, came {horizon}.")
        x = self.x_embedder(sample)
        if self.in_context:
            x = torch.cat([context.token, x], 1)
        x = x + self.pos_embed[:, : x.shape[1]]
        *modulations, last = context.modulations
        for block, modulation, memory in zip(self.blocks, modulations, context.memories, strict=True):
            x = block(x, modulation, memory, context.memory_mask)
        return self.final_layer(x[:, -horizon:], last)


class TimestepEmbedder(nn.Module):
    """256 cosines and sines of a time, through an MLP."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """Embed times of shape `(...)`, shape `(..., hidden_size)`."""
        return self.mlp(self.waves(times).to(self.mlp[0].weight.dtype))

    def waves(self, times: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines, shape `(..., 256)`; published: frequencies rounded to `dtype`, angles never."""
        half = torch.arange(128, device=times.device, dtype=self.dtype)
        angles = times[..., None].float() * torch.exp(half * (-math.log(10000.0) / 128)).float()
        return torch.cat([angles.cos(), angles.sin()], -1).to(self.dtype)


class ModulatedLayer(nn.Module):
    """A layer whose `count` modulations come from time and condition by adaLN, or are neutral numbers."""

    def __init__(self, hidden_size: int, neutral: tuple[float, ...], adaln: bool):
        super().__init__()
        self.hidden_size, self.neutral = hidden_size, neutral
        self.adaLN_modulation = (
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, len(neutral) * hidden_size)) if adaln else None
        )

    def modulations(self, tokens: torch.Tensor) -> list[tuple]:
        """Modulations of each step of `(num_steps, batch_size, 1, hidden_size)` tokens."""
        if self.adaLN_modulation is None:
            return [self.neutral] * len(tokens)
        return [step.chunk(len(self.neutral), -1) for step in self.adaLN_modulation(tokens)]

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """LayerNorm without learnt numbers: shift and scale are the modulations' task."""
        return F.layer_norm(x, (self.hidden_size,), eps=1e-6)


class Block(ModulatedLayer):
    """Self-attention, cross-attention if `memory_dim` is given, MLP; each normalised before and added to `x`."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int, adaln: bool, memory_dim: int | None):
        super().__init__(hidden_size, (0.0, 0.0, 1.0) * 2, adaln)
        self.attn = SelfAttention(hidden_size, num_heads)
        self.cross_attn = None if memory_dim is None else CrossAttention(hidden_size, num_heads, memory_dim)
        layers = {
            "fc1": nn.Linear(hidden_size, mlp_dim),
            "act": nn.GELU("tanh"),
            "fc2": nn.Linear(mlp_dim, hidden_size),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def memory(self, tokens: torch.Tensor) -> tuple:
        """Keys and values of `(batch_size, sequence_length, cond_dim)` tokens; nothing without cross-attention."""
        return () if self.cross_attn is None else self.cross_attn.memory(tokens)

    def forward(self, x: torch.Tensor, modulation: tuple, memory: tuple, memory_mask: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, T, hidden_size)` to the same shape; see [`DiTContext`]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        if memory:
            x = x + self.cross_attn(self.norm(x), *memory, memory_mask)
        return x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift)


class FinalLayer(ModulatedLayer):
    """Normalises, modulates and projects to actions."""

    def __init__(self, hidden_size: int, action_dim: int, adaln: bool):
        super().__init__(hidden_size, (0.0, 0.0), adaln)
        self.linear = nn.Linear(hidden_size, action_dim)

    def forward(self, x: torch.Tensor, modulation: tuple) -> torch.Tensor:
        """Map `(batch_size, T, hidden_size)` to `(batch_size, T, action_dim)`."""
        shift, scale = modulation
        return self.linear(self.norm(x) * (1 + scale) + shift)


class SelfAttention(nn.Module):
    """Attention of the chunk's actions to each other."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, T, hidden_size)` to the same shape."""
        heads = F.scaled_dot_product_attention(*split_heads(self.qkv(x), 3, self.num_heads))
        return self.proj(heads.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the chunk's actions to the condition's tokens."""

    def __init__(self, hidden_size: int, num_heads: int, memory_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(memory_dim, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def memory(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of `(batch_size, sequence_length, memory_dim)` tokens."""
        return split_heads(self.kv(tokens), 2, self.num_heads)

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, memory_mask: torch.Tensor
    ) -> torch.Tensor:
        """Map `(batch_size, T, hidden_size)` to the same shape."""
        (queries,) = split_heads(self.q(x), 1, self.num_heads)
        heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=memory_mask)
        return self.proj(heads.transpose(1, 2).flatten(2))


def split_heads(x: torch.Tensor, count: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Split `(batch_size, T, count * hidden_size)` into `count` of `(batch_size, num_heads, T, head_dim)`."""
    return x.unflatten(-1, (count, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
