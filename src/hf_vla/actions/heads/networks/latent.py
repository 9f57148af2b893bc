"""A space of actions that robots share, and what each of them needs of its own to act in it."""

import logging

import torch
from torch import nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

# An optimiser moves all weights by about its rate in a step; those of the linear map have to go all the way to -1.
_PACE = 4.0
# What a volume weighs beside the mean squared error of noise that diffusion heads learn. In a likelihood it would be
# the density of their training times over the logarithm of signal to noise, there where the head's own doubt is: 0.03
# to 0.09 for the published schedule and doubts of a tenth to a third.
_VOLUME_WEIGHT, _SOFTENING = 0.05, 0.03
# Singular value of a map below which a robot is not to be driven.
_LEAST = 0.05


class ActionDecoder(nn.Module):
    """Latents -> one robot's actions, by a linear map and MLPs that can be run backwards.

    A head that denoises latents needs to know which latents an action has. Here they are those which decode to it:
    MLPs in a stack of additive couplings, `x[odd] += MLP(x[even])` and the other way round, bend the robot's own
    actions, and a linear map places them among the latents; its pseudo-inverse leads back, the couplings' inverse is
    exact and as cheap. Compared with an encoder of its own, which a second loss would have to teach: nothing is lost
    between actions and latents, from the first step on, and there is no such loss to balance. An untrained decoder is
    the identity: latents are the actions, followed by zeros, which is how models share their weights among robots.

    In front of a frozen head a decoder learns latents that the head finds likely. Smaller ones would be likelier, and
    what is decoded then too large; hence [`volume_loss`], the other half of a likelihood. Couplings preserve volume,
    so that of the map is all. It is free, not a rotation: a joint that counts the other way round would have to turn
    through numbers of the latent that the head has always seen at 0, and stops there, but it can pass through 0.
    Couplings over the whole latent preserve volume there, yet not that of the few dimensions which actions fill. The
    better the head knows what to do, before it is frozen, the better a new robot can learn its language.

    Only where `latent_dim` is smaller than `action_dim` something is lost: the decoder guesses the rest by one more
    MLP, and [`reconstruction_loss`] is not 0, by which it learns while the head does, too.

    Latents that were learnt may leave the interval of the actions. Behind a frozen head that does no harm, since what
    it cannot sample it does not find likely; a head that learns them has to be able to (`bound` of the head).

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
        even, odd = (action_dim + 1) // 2, action_dim // 2
        sizes = [(even, odd) if index % 2 == 0 else (odd, even) for index in range(num_couplings)]
        self.couplings = nn.ModuleList(_mlp(*each, hidden_dim) for each in sizes if odd)
        self.rest = _mlp(latent_dim, action_dim, hidden_dim) if action_dim > latent_dim else None
        self.map = nn.Parameter(torch.empty(latent_dim, action_dim))
        self.origin = nn.Parameter(torch.empty(latent_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Become the identity."""
        for mlp in [*self.couplings, *([] if self.rest is None else [self.rest])]:
            nn.init.zeros_(mlp[2].weight)
            nn.init.zeros_(mlp[2].bias)
        with torch.no_grad():
            nn.init.eye_(self.map).div_(_PACE)
        nn.init.zeros_(self.origin)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode `(..., latent_dim)` to `(..., action_dim)`, float32."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            placed, there = latents - self.origin.float(), _PACE * self.map.float()
            back = torch.linalg.pinv(there)
            x = F.linear(placed, back)
            x = x + F.linear(placed - F.linear(x, there), back)  # what rounding left
            if self.rest is not None:
                x = x + _float32(self.rest, latents)
            return self._couple(x, 1)

    def inverse(self, actions: torch.Tensor) -> torch.Tensor:
        """Latents `(..., latent_dim)`, float32, of actions `(..., action_dim)`.

        Raises:
            ValueError: actions are of another size.
        """
        if actions.shape[-1] != self.action_dim:
            raise ValueError(
                f"Expected actions of {self.action_dim} numbers, as this embodiment has, came {actions.shape[-1]}: "
                "is it the right one?"
            )
        with torch.autocast(actions.device.type, enabled=False):
            return F.linear(self._couple(actions.float(), -1), _PACE * self.map.float(), self.origin.float())

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
        actions = actions.masked_fill(~action_mask[..., None], 0.0)  # NaN there would reach the gradients
        error = (self(self.inverse(actions)) - actions).square().mean(-1)
        return error.masked_fill(~action_mask, 0.0).sum() / action_mask.sum().clamp(min=1)

    def volume_loss(self) -> torch.Tensor:
        """Cost of latents that are smaller than their actions, 0 at first, negative where they are larger.

        Returns:
            `torch.Tensor` of shape `()`: `-log det` of the map, weighted, and softened for joints to pass through 0.
        """
        with torch.autocast(self.map.device.type, enabled=False):
            scaled = _PACE * self.map.float()
            gram = scaled @ scaled.T if self.rest is not None else scaled.T @ scaled
            softened = (gram + _SOFTENING * torch.eye(len(gram), device=gram.device)) / (1 + _SOFTENING)
            return -_VOLUME_WEIGHT / self.latent_dim * torch.logdet(softened)

    def check_learnt(self) -> None:
        """Warn where decoding would multiply what a sample is off by: a joint is on its way through 0."""
        least = torch.linalg.svdvals(_PACE * self.map.detach().float()).min().item()
        if least < _LEAST:
            logger.warning(
                "A decoder multiplies errors of its latents by up to %.3g: train this robot further before it moves.",
                1 / max(least, 1e-12),
            )

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
    """What one robot has of its own: the decoder of its actions and the entry of its state, identities at first.

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
        # also between states of one size: those of another robot mean something else
        self.state_encoder = None if state_dim is None else nn.Linear(state_dim, shared_state_dim)
        if self.state_encoder is not None:
            nn.init.eye_(self.state_encoder.weight)
            nn.init.zeros_(self.state_encoder.bias)

    def encode_state(self, state: torch.Tensor | None) -> torch.Tensor | None:
        """The robot's state `(batch_size, state_dim)` as the shared head takes it, float32.

        Raises:
            ValueError: it is of another size, or missing, or there is none to be given.
        """
        wanted = None if self.state_encoder is None else self.state_encoder.in_features
        given = None if state is None else state.shape[-1]
        if given != wanted:
            raise ValueError(f"Expected a state of {wanted} numbers, as this embodiment has, came {given}.")
        return None if state is None else _float32(self.state_encoder, state)


def _mlp(in_dim: int, out_dim: int, hidden_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))


def _float32(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a module in float32 whatever its weights are, and under autocast: a robot's numbers are not rounded."""
    weights = {name: parameter.float() for name, parameter in module.named_parameters()}
    with torch.autocast(x.device.type, enabled=False):
        return torch.func.functional_call(module, weights, x.float())
