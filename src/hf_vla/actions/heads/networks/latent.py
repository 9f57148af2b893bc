"""A space of actions that robots share, and what each of them needs of its own to act in it."""

import torch
from torch import nn
from torch.nn import functional as F


class ActionDecoder(nn.Module):
    """Latents -> one robot's actions, by MLPs that can be run backwards.

    A head that denoises latents needs to know which latents an action has. Here they are those which decode to it: the
    decoder is a stack of additive couplings, `x[odd] += MLP(x[even])` and the other way round, so that its inverse is
    exact and as cheap. Compared with an encoder of its own, which a second loss would have to teach: nothing is lost
    between actions and latents, from the first step on; there is no such loss to balance; and since a coupling
    preserves volume, latents cannot shrink to what is easy to denoise. An untrained decoder is the identity: latents
    are the actions, followed by zeros, which is how models without decoders share their weights among robots.

    Only where `latent_dim` is smaller than `action_dim` something is lost: the decoder guesses the rest by one more
    MLP, and [`reconstruction_loss`] is not 0.

    Args:
        action_dim (`int`): numbers of one action.
        latent_dim (`int`): numbers of one latent.
        hidden_dim (`int`): width of the MLPs.
        num_couplings (`int`): their number.

    Source: NICE, https://huggingface.co/papers/1410.8516, equations 7 and 8.
    """

    def __init__(self, action_dim: int, latent_dim: int, *, hidden_dim: int = 256, num_couplings: int = 4):
        super().__init__()
        self.action_dim, self.latent_dim = action_dim, latent_dim
        self.size = max(action_dim, latent_dim)
        even, odd = (self.size + 1) // 2, self.size // 2
        sizes = [(even, odd) if index % 2 == 0 else (odd, even) for index in range(num_couplings)]
        self.couplings = nn.ModuleList(_mlp(*each, hidden_dim) for each in sizes if odd)
        self.rest = _mlp(latent_dim, action_dim - latent_dim, hidden_dim) if action_dim > latent_dim else None

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode `(..., latent_dim)` to `(..., action_dim)`, float32."""
        latents = latents.float()
        if self.rest is None:
            x = F.pad(latents, (0, self.size - self.latent_dim))
        else:
            x = torch.cat([latents, _float32(self.rest, latents)], -1)
        return self._couple(x, 1)[..., : self.action_dim]

    def inverse(self, actions: torch.Tensor) -> torch.Tensor:
        """Latents `(..., latent_dim)`, float32, of actions `(..., action_dim)`."""
        return self._couple(F.pad(actions.float(), (0, self.size - self.action_dim)), -1)[..., : self.latent_dim]

    def reconstruction_loss(self, actions: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the actions behind their latents; 0 where these hold as many numbers.

        Args:
            actions (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`): normalised.
            action_mask (`torch.Tensor` of shape `(batch_size, chunk_size)`, bool): True where an action is real.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        if self.rest is None:
            return actions.new_zeros((), dtype=torch.float32)
        error = (self(self.inverse(actions)) - actions).square().mean(-1)
        return error.masked_fill(~action_mask, 0.0).sum() / action_mask.sum().clamp(min=1)

    def _couple(self, x: torch.Tensor, sign: int) -> torch.Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        order = list(enumerate(self.couplings))
        for index, mlp in order if sign > 0 else reversed(order):
            if index % 2 == 0:
                odd = odd + sign * _float32(mlp, even)
            else:
                even = even + sign * _float32(mlp, odd)
        x = torch.empty_like(x)
        x[..., 0::2], x[..., 1::2] = even, odd
        return x


class Embodiment(nn.Module):
    """What one robot has of its own: the decoder of its actions and, where they differ, the entry of its state.

    Args:
        action_dim (`int`), state_dim (`int`, *optional*): of the robot.
        latent_dim (`int`), shared_state_dim (`int`, *optional*): of the shared head.

    Raises:
        ValueError: either the robot or the head knows no state.
    """

    def __init__(self, action_dim: int, state_dim: int | None, latent_dim: int, shared_state_dim: int | None):
        super().__init__()
        if (state_dim is None) != (shared_state_dim is None):
            raise ValueError(
                f"Expected an embodiment's state_dim to be {'None' if shared_state_dim is None else 'a number'}, as "
                f"the action head takes {'no' if shared_state_dim is None else 'a'} state, came {state_dim}."
            )
        self.decoder = ActionDecoder(action_dim, latent_dim)
        self.state_encoder: nn.Module = nn.Identity()
        if state_dim != shared_state_dim:
            self.state_encoder = nn.Linear(state_dim, shared_state_dim)
            nn.init.eye_(self.state_encoder.weight)
            nn.init.zeros_(self.state_encoder.bias)

    def encode_state(self, state: torch.Tensor | None) -> torch.Tensor | None:
        """The robot's state `(batch_size, state_dim)` as the shared head takes it, float32."""
        return None if state is None else _float32(self.state_encoder, state)


def _mlp(in_dim: int, out_dim: int, hidden_dim: int) -> nn.Sequential:
    mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))
    nn.init.zeros_(mlp[2].weight)
    nn.init.zeros_(mlp[2].bias)
    return mlp


def _float32(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a module in float32 whatever its weights are: a robot's numbers are not rounded."""
    weights = {name: parameter.float() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, weights, x.float())
