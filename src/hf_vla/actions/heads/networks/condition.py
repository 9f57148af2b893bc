"""What a head knows of the observation: VLM features, masked and pooled, joined with the robot's state."""

from dataclasses import dataclass

import torch
from torch import nn

POOLINGS = ("mean", "last", "attention")
COMBINATIONS = ("linear", "mlp")


@dataclass
class Condition:
    """An encoded observation.

    Args:
        vector (`torch.Tensor` of shape `(batch_size, feature_dim)`): pooled features and state.
        tokens (`torch.Tensor` of shape `(batch_size, sequence_length, feature_dim)`): the features themselves.
        token_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): True where a token is real.
    """

    vector: torch.Tensor
    tokens: torch.Tensor
    token_mask: torch.Tensor


class ConditionEncoder(nn.Module):
    """Pools the real tokens, normalises, and joins the state: padding never moves an action.

    Args:
        feature_dim (`int`): size of a VLM token.
        state_dim (`int`, *optional*): numbers of the robot's state; None for heads that see none.
        pooling (`str`): `"mean"` as TinyVLA, `"last"` (the last real token, as CogACT's cognition token) or
            `"attention"` (one learnt query over the tokens).
        norm (`bool`): LayerNorm behind the pooling, as TinyVLA; ScaleDP has none.
        combine (`str`): how state and features are joined, `"linear"` (TinyVLA) or `"mlp"` (ScaleDP: three layers).
            Without a state `"linear"` is left out.
        hidden_dim (`int`): width of the `"mlp"`.
        num_attention_heads (`int`): of the attention pooling.

    Raises:
        ValueError: an option is not valid.

    Source: TinyVLA's ConditionalUnet1D, DexVLA's ScaleDP (published code).
    """

    def __init__(
        self,
        feature_dim: int,
        state_dim: int | None = None,
        *,
        pooling: str = "mean",
        norm: bool = True,
        combine: str = "linear",
        hidden_dim: int = 1024,
        num_attention_heads: int = 8,
    ):
        super().__init__()
        if pooling not in POOLINGS or combine not in COMBINATIONS:
            raise ValueError(
                f"Expected pooling in {POOLINGS} and combine in {COMBINATIONS}, came {pooling!r} and {combine!r}."
            )
        self.pooling, self.feature_dim, self.state_dim = pooling, feature_dim, state_dim
        if pooling == "attention":
            if feature_dim % num_attention_heads:
                raise ValueError(f"{num_attention_heads} attention heads do not divide {feature_dim} features.")
            self.query = nn.Parameter(torch.empty(1, 1, feature_dim))
            self.attention = nn.MultiheadAttention(feature_dim, num_attention_heads, batch_first=True)
        self.norm = nn.LayerNorm(feature_dim) if norm else nn.Identity()
        joined = feature_dim + (state_dim or 0)
        if combine == "mlp":
            self.combine: nn.Module = nn.Sequential(
                nn.Linear(joined, hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, feature_dim),
            )
        else:
            self.combine = nn.Linear(joined, feature_dim) if state_dim else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights: the joining Linears N(0, 0.02) without bias, as TinyVLA; the query of length 1."""
        if self.pooling == "attention":
            nn.init.normal_(self.query, std=self.feature_dim**-0.5)
            self.attention._reset_parameters()  # leaves out the weights behind the heads
            self.attention.out_proj.reset_parameters()
            nn.init.zeros_(self.attention.out_proj.bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()
        for linear in (module for module in self.combine.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self, features: torch.Tensor, feature_mask: torch.Tensor, state: torch.Tensor | None = None
    ) -> Condition:
        """Encode an observation.

        Args:
            features (`torch.Tensor` of shape `(batch_size, sequence_length, feature_dim)`): of the VLM, in the
                precision of the weights.
            feature_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): True where a token is real.
            state (`torch.Tensor` of shape `(batch_size, state_dim)`, *optional*): normalised.

        Returns:
            [`Condition`], in the precision of the features.

        Raises:
            ValueError: a shape does not fit, the mask is not bool, a sample has no real token, or a state is missing
                or not wanted.
        """
        expected = (*feature_mask.shape, self.feature_dim)
        if features.shape != expected or (state is not None and len(state) != len(features)):
            raise ValueError(
                f"Expected features of shape {expected} and one state for each sample, came {tuple(features.shape)} "
                f"and {None if state is None else len(state)} states."
            )
        check_mask("feature_mask", feature_mask)
        given = None if state is None else state.shape[-1]
        if given != self.state_dim:
            raise ValueError(f"Expected a state of {self.state_dim} numbers (None: no state), came {given}.")
        if not feature_mask.any(-1).all():
            raise ValueError("Expected at least one real token in every sample, came a feature_mask without any.")
        features = features.masked_fill(~feature_mask[..., None], 0.0)
        pooled = self.norm(self._pool(features, feature_mask))
        joined = pooled if state is None else torch.cat([pooled, state.to(pooled.dtype)], -1)
        return Condition(self.combine(joined), features, feature_mask)

    def _pool(self, features, mask):
        if self.pooling == "mean":
            return (features.sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True)).to(features.dtype)
        if self.pooling == "last":
            positions = torch.arange(mask.shape[1], device=mask.device)
            last = (positions * mask).argmax(1)
            return features[torch.arange(len(features), device=mask.device), last]
        query = self.query.expand(len(features), -1, -1)
        return self.attention(query, features, features, key_padding_mask=~mask, need_weights=False)[0][:, 0]


def check_mask(name: str, mask: torch.Tensor) -> None:
    """Raise where a mask is not bool: `~` of an integer is no negation.

    Raises:
        ValueError: it is not.
    """
    if mask.dtype != torch.bool:
        raise ValueError(
            f"Expected {name} to be bool, True where something is real, came {mask.dtype}: use {name}.bool()."
        )
