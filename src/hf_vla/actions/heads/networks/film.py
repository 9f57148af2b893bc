"""Feature-wise linear modulation: what was thought changes how what was seen conditions the actions.

Source: FiLM, https://huggingface.co/papers/1709.07871; DiVLA, https://huggingface.co/papers/2412.03293, as in its
published code.
"""

import torch
from torch import nn


class FiLM(nn.Module):
    """`x * (1 + scale(r)) + shift(r)`; the identity until it is trained.

    Args:
        dim (`int`): size of `x` and `r`.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale, self.shift = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let scale and shift start at 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor, r: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Modulate.

        Args:
            x, r (`torch.Tensor` of shape `(batch_size, dim)`): what is modulated, and by what.
            mask (`torch.Tensor` of shape `(batch_size,)`, bool): False where `x` is to stay as it is.

        Returns:
            `torch.Tensor` of shape `(batch_size, dim)`.
        """
        scale, shift = (torch.where(mask[:, None], layer(r), 0.0) for layer in (self.scale, self.shift))
        return x * (1 + scale) + shift


class TokenProjector(nn.Sequential):
    """Mean over the tokens that are real, then Linear, GELU, Linear."""

    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, sequence_length, dim)` to `(batch_size, dim)`."""
        return super().forward(masked_mean(tokens, mask))


class ReasoningFiLM(nn.Module):
    """One condition vector from the hidden states of a prompt, modulated by those of the reasoning behind it.

    Beside the modulated projection of the prompt stands the mean of its hidden states, so that whatever is trained
    starts from what a head without reasoning sees.

    Args:
        dim (`int`): size of a hidden state.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.prompt_proj, self.reasoning_proj = TokenProjector(dim), TokenProjector(dim)
        self.film = FiLM(dim)

    def forward(self, tokens: torch.Tensor, prompt_mask: torch.Tensor, reasoning_mask: torch.Tensor) -> torch.Tensor:
        """Condition the actions on prompt and reasoning.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`): hidden states behind the final norm.
            prompt_mask, reasoning_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): True where a
                token is real and belongs to the prompt, or to the reasoning; a sample may have none of the latter.

        Returns:
            `torch.Tensor` of shape `(batch_size, dim)`.
        """
        tokens = tokens.to(self.film.scale.weight.dtype)
        prompt = self.prompt_proj(tokens, prompt_mask)
        reasoning = self.reasoning_proj(tokens, reasoning_mask)
        return self.film(prompt, reasoning, reasoning_mask.any(-1)) + masked_mean(tokens, prompt_mask)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens `(batch_size, sequence_length, dim)` where `mask` is True, in float32; 0 without any."""
    total = tokens.masked_fill(~mask[..., None], 0.0).sum(1, dtype=torch.float32)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(tokens.dtype)
