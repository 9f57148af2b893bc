"""Flow matching: a velocity field carries noise to actions along straight lines. Time 0 = noise, 1 = data."""

from collections.abc import Callable
from typing import Any

import torch

from hf_vla.actions.heads.base import DenoisingHead
from hf_vla.actions.heads.networks.samples import check_finite, draw

SOLVERS = ("euler", "heun")
TIME_SAMPLINGS = ("beta", "uniform")


class FlowMatchingHead(DenoisingHead):
    """Learns the velocity `actions - noise` at `x_t = (1 - t) * noise + t * actions`, and integrates it from 0 to 1.

    Args:
        time_sampling (`str`): of training times. `"beta"`: `0.999 * (1 - u)` with u from Beta(1.5, 1), as pi0: mostly
            noisy times, mean 0.4, and never the last thousandth. `"uniform"`: on [0, 1).
        solver (`str`): `"euler"`, or `"heun"` (second order, two calls of the denoiser for each step).
        others: see [`DenoisingHead`].

    Raises:
        ValueError: an option is not valid.

    Source: flow matching, https://huggingface.co/papers/2210.02747; pi0, https://huggingface.co/papers/2410.24164,
        appendix B. Its paper's time runs as ours; its published code's runs the other way.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        chunk_size: int,
        state_dim: int | None = None,
        *,
        time_sampling: str = "beta",
        solver: str = "euler",
        **kwargs: Any,
    ):
        super().__init__(feature_dim, action_dim, chunk_size, state_dim, **kwargs)
        if time_sampling not in TIME_SAMPLINGS or solver not in SOLVERS:
            raise ValueError(
                f"Expected time_sampling in {TIME_SAMPLINGS} and solver in {SOLVERS}, came {time_sampling!r} and "
                f"{solver!r}."
            )
        self.time_sampling, self.solver = time_sampling, solver

    def loss(
        self,
        features: torch.Tensor,
        feature_mask: torch.Tensor,
        actions: torch.Tensor,
        action_mask: torch.Tensor,
        state: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        noise: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Squared error of the velocity at one time for each sample, or several (`noise_draws`); see [`ActionHead`].

        Args:
            noise (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`, *optional*): drawn by default.
            times (`torch.Tensor` of shape `(batch_size,)`, *optional*): in [0, 1]; drawn by default.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, float32.

        Raises:
            ValueError: also where times have another shape or lie outside [0, 1].
        """
        actions = self.mask_padding(features, actions, action_mask)
        if times is not None and (times.shape != (len(features),) or not ((times >= 0) & (times <= 1)).all()):
            raise ValueError(f"Expected times of shape {(len(features),)} in [0, 1], came {times}.")
        starts, drawn, losses = [], [], []
        for _ in range(self.num_draws(noise, times)):
            starts.append(self.initial_noise(features, generator, noise, action_mask))
            time = self.draw_times(len(features), generator, features.device) if times is None else times.float()
            drawn.append(time)
        condition = self.encode_condition(features, feature_mask, state, generator)
        contexts = self.denoiser.prepare(condition, 1000 * torch.stack(drawn))
        for start, time, context in zip(starts, drawn, contexts, strict=True):
            velocity = self.denoise(torch.lerp(start, actions, time[:, None, None]), context)
            losses.append(self.reduce((velocity - (actions - start)) ** 2, action_mask))
        return torch.stack(losses).mean(0)

    def draw_times(self, count: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        """Training times `(count,)` on [0, 1), float32; the Beta's by its inverse distribution function."""
        uniform = draw(torch.rand, count, generator=generator, device=device, dtype=torch.float32)
        return uniform if self.time_sampling == "uniform" else 0.999 * (1 - uniform ** (1 / 1.5))

    @torch.no_grad()
    def sample(
        self,
        features: torch.Tensor,
        feature_mask: torch.Tensor,
        state: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        action_mask: torch.Tensor | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Integrate the velocity from noise to actions; see [`ActionHead`]."""
        steps = self.num_steps(num_inference_steps)
        sample = self.initial_noise(features, generator, noise, action_mask)
        times = torch.linspace(0, 1000, steps + 1, device=features.device)
        contexts = self.prepare(features, feature_mask, state, times if self.solver == "heun" else times[:-1])
        for step in range(steps):
            velocity = self.keep_own(self.guided(sample, contexts[step]), action_mask)
            if self.solver == "heun":
                end = self.guided(sample + velocity / steps, contexts[step + 1])
                velocity = (velocity + self.keep_own(end, action_mask)) / 2
            sample = sample + velocity / steps
            if callback is not None:
                callback(step, sample)
        return check_finite(sample)
