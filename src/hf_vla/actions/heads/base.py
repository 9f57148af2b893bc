"""What every action head offers: a loss for training, samples for acting, nothing in between."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_vla.actions.heads.networks.base import check_options
from hf_vla.actions.heads.networks.condition import Condition, ConditionEncoder, check_mask
from hf_vla.actions.heads.networks.registry import build_denoiser
from hf_vla.actions.heads.networks.samples import draw

REDUCTIONS = ("masked", "published")


class ActionHead(nn.Module, ABC):
    """VLM features -> chunk of continuous, normalised actions.

    Args:
        feature_dim (`int`): size of a VLM token.
        action_dim (`int`): numbers of one action.
        chunk_size (`int`): actions of one prediction.
        state_dim (`int`, *optional*): numbers of the robot's state; None for heads that see none.
        condition (`dict`, *optional*): options of
            [`~hf_vla.actions.heads.networks.condition.ConditionEncoder`].
        reduction (`str`): `"masked"`: a sample's loss is the mean over its real actions. `"published"`: as the
            published diffusion heads, padded actions enter the noised chunk and the mean divides by all of them.
            Dimensions that a robot has not are left out in both.

    Raises:
        ValueError: an option is not valid.
    """

    bound: float = math.inf  # a sample has no larger numbers, nor any below -bound
    differentiable: bool = True  # whether the loss has gradients for the actions that it is given

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        chunk_size: int,
        state_dim: int | None = None,
        *,
        condition: dict[str, Any] | None = None,
        reduction: str = "masked",
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"Expected a reduction in {REDUCTIONS}, came {reduction!r}.")
        self.feature_dim, self.action_dim = feature_dim, action_dim
        self.chunk_size, self.state_dim, self.reduction = chunk_size, state_dim, reduction
        check_options("The condition", ConditionEncoder, condition or {})
        self.condition_encoder = ConditionEncoder(feature_dim, state_dim, **(condition or {}))

    @abstractmethod
    def loss(
        self,
        features: torch.Tensor,
        feature_mask: torch.Tensor,
        actions: torch.Tensor,
        action_mask: torch.Tensor,
        state: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Training loss of each sample.

        With a generator, keep the draw outside of a checkpointed region, whose recomputation would draw anew: call the
        loss outside of it, or hand over noise and times where the head takes them.

        Args:
            features (`torch.Tensor` of shape `(batch_size, sequence_length, feature_dim)`): of the VLM.
            feature_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): True where a token is real.
            actions (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`): normalised.
            action_mask (`torch.Tensor` of shape `(batch_size, chunk_size)`, bool): True where an action is real;
                padded ones cannot change the loss. Of shape `(batch_size, chunk_size, action_dim)` where robots have
                fewer dimensions: the loss is that which the robot would have in a head of its own size.
            state (`torch.Tensor` of shape `(batch_size, state_dim)`, *optional*): normalised.
            generator (`torch.Generator`, *optional*): makes noise and times repeatable.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, float32; 0 for a sample without real actions.

        Raises:
            ValueError: a shape does not fit, a mask is not bool, or a real action is NaN or infinite.
        """

    @abstractmethod
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
        """Predict a chunk for each sample.

        Args:
            features, feature_mask, state: as in `loss`.
            generator (`torch.Generator`, *optional*): makes the prediction repeatable; a list has one for each sample.
            noise (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`, *optional*): to start from; heads
                that start from none take only None.
            num_inference_steps (`int`, *optional*): denoising steps; the head's own by default; heads without any
                take only None.
            action_mask (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`, bool, *optional*): as in
                training, where robots have fewer dimensions than the head: which are theirs.
            callback (`Callable`, *optional*): called behind every denoising step, with its number from 0 and what is
                denoised so far, `(batch_size, chunk_size, action_dim)`, at last what is returned; not to be changed.

        Returns:
            `torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`, float32, normalised; 0 in dimensions that a
            robot has not.

        Raises:
            ValueError: a shape does not fit, an argument is not for this head, or a prediction is not finite.
        """

    def encode(self, features: torch.Tensor, feature_mask: torch.Tensor, state: torch.Tensor | None) -> Condition:
        """Encode the observation, in the precision of the head's weights whatever that of the features."""
        return self.condition_encoder(features.to(next(self.parameters()).dtype), feature_mask, state)

    def mask_padding(self, features: torch.Tensor, actions: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
        """Set padded actions to 0, so that they reach nothing (unless published), and dimensions that are no robot's.

        Args:
            features, actions, action_mask: as in `loss`.

        Returns:
            `torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`, float32.

        Raises:
            ValueError: the shapes are not those of one chunk for each sample, the mask is not bool, or a real action
                is NaN or infinite.
        """
        expected = (len(features), self.chunk_size, self.action_dim)
        if actions.shape != expected:
            raise ValueError(
                f"Expected actions of shape {expected} and an action_mask of shape {expected[:2]}, came "
                f"{tuple(actions.shape)} and {tuple(action_mask.shape)}."
            )
        real = self.entries(action_mask, len(features))
        actions = actions.float()
        finite = (torch.isfinite(actions) | ~real).all(-1)
        if not finite.all():
            samples = (~finite.all(1)).nonzero()[:, 0].tolist()
            raise ValueError(
                f"Expected finite actions, came NaN or infinity in samples {samples}: mend them in the data, or mask "
                "them out."
            )
        return actions.masked_fill(~(_own(real) if self.reduction == "published" else real), 0.0)

    def reduce(self, error: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
        """Mean of an error over the actions of a sample.

        Args:
            error (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`): float32.
            action_mask (`torch.Tensor`, bool): as in `loss`.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`; with `"masked"` over the real actions.
        """
        real = self.entries(action_mask, len(error))
        counted = _own(real) if self.reduction == "published" else real
        count = counted.expand_as(error).sum((1, 2)).clamp(min=1)
        return error.masked_fill(~real, 0.0).sum((1, 2)) / count

    def entries(self, action_mask: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Check a mask of actions, or of their numbers, and give it three axes.

        Args:
            action_mask (`torch.Tensor`, bool): as in `loss`.
            batch_size (`int`): number of samples.

        Returns:
            `torch.Tensor` of shape `(batch_size, chunk_size, 1)` or `(batch_size, chunk_size, action_dim)`, bool.

        Raises:
            ValueError: it is of another shape, or not bool.
        """
        expected = (batch_size, self.chunk_size, self.action_dim)
        if action_mask.shape not in (expected[:2], expected):
            raise ValueError(
                f"Expected an action_mask of shape {expected[:2]} or {expected}, came {tuple(action_mask.shape)}."
            )
        check_mask("action_mask", action_mask)
        return action_mask if action_mask.ndim == 3 else action_mask[..., None]

    def keep_own(self, values: torch.Tensor, action_mask: torch.Tensor | None) -> torch.Tensor:
        """Set dimensions that a robot has not to 0, throughout a sampling as in training.

        A network that saw noise there would act on it, and no loss ever told it what becomes of that.

        Args:
            values (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`): actions, noise or predictions.
            action_mask (`torch.Tensor`, bool, *optional*): as in `loss`; None: all dimensions are the robots'.

        Returns:
            `torch.Tensor` of the same shape.

        Raises:
            ValueError: the mask is of another shape, or not bool.
        """
        if action_mask is None:
            return values
        real = self.entries(action_mask, len(values))
        return values if real.shape[-1] == 1 else values.masked_fill(~_own(real), 0.0)


def _own(real: torch.Tensor) -> torch.Tensor:
    """Which dimensions are a robot's: `(batch_size, chunk_size, action_dim)` -> `(batch_size, 1, action_dim)`."""
    return real.any(1, keepdim=True) if real.shape[-1] > 1 else torch.ones_like(real[:, :1])


def check_one_pass(**given: Any) -> None:
    """Raise where a head without denoising is asked for it.

    Raises:
        ValueError: noise, steps or what is to be called behind them are given.
    """
    if any(value is not None for value in given.values()):
        raise ValueError(f"This head predicts in one pass: it takes none of {', '.join(given)}; leave them out.")


class DenoisingHead(ActionHead):
    """What heads that turn noise into actions share: denoiser, classifier-free guidance, noise.

    Args:
        denoiser (`dict`): `{"type": ..., **options}`, see `hf_vla.actions.heads.networks.registry`.
        num_inference_steps (`int`): of a sampling, where the caller names none.
        condition_dropout (`float`): share of training samples that see a learnt null condition instead of theirs, for
            classifier-free guidance.
        guidance_scale (`float`): 1: no guidance; s: `null + s * (conditioned - null)`. Above 0.
        noise_draws (`int`): noises and times that a loss in training mode draws for each sample, and is the mean of;
            of given ones, it takes those. The VLM runs once for all, so that its gradient is steadier at the cost of
            so many passes of the denoiser. A dropped condition is dropped for all of a sample.
        others: see [`ActionHead`].

    Raises:
        ValueError: an option is not valid, or there is guidance without a null condition.

    Source: classifier-free guidance, https://huggingface.co/papers/2207.12598; several draws: CogACT,
        https://huggingface.co/papers/2411.19650 (`repeated_diffusion_steps` of its code)
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        chunk_size: int,
        state_dim: int | None = None,
        *,
        denoiser: dict[str, Any] | None = None,
        num_inference_steps: int = 10,
        condition_dropout: float = 0.0,
        guidance_scale: float = 1.0,
        noise_draws: int = 1,
        **kwargs,
    ):
        super().__init__(feature_dim, action_dim, chunk_size, state_dim, **kwargs)
        if min(num_inference_steps, noise_draws) < 1 or not 0 <= condition_dropout < 1 or guidance_scale <= 0:
            raise ValueError(
                "Expected num_inference_steps and noise_draws of 1 or more, condition_dropout in [0, 1) and "
                f"guidance_scale above 0, came {num_inference_steps}, {noise_draws}, {condition_dropout} and "
                f"{guidance_scale}."
            )
        if guidance_scale != 1.0 and condition_dropout == 0.0:
            raise ValueError("Guidance needs a null condition: train with condition_dropout above 0 (0.1 is usual).")
        self.num_inference_steps = num_inference_steps
        self.condition_dropout, self.guidance_scale = condition_dropout, guidance_scale
        self.noise_draws = noise_draws
        denoiser = {"type": "conditional_unet1d"} if denoiser is None else denoiser
        self.denoiser = build_denoiser(denoiser, action_dim, chunk_size, feature_dim)
        if condition_dropout:
            # one for vector and tokens: a null of its own for tokens would have no gradient where no network sees them
            self.null_condition = nn.Parameter(torch.empty(feature_dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the learnt null condition start at 0."""
        if self.condition_dropout:
            nn.init.zeros_(self.null_condition)

    def num_draws(self, *given: torch.Tensor | None) -> int:
        """Noises and times of a loss; one where both are given."""
        return self.noise_draws if self.training and None in given else 1

    def encode_condition(self, features, feature_mask, state, generator) -> Condition:
        """Encode the observation for a loss; in training mode a share of conditions is dropped."""
        condition = self.encode(features, feature_mask, state)
        if not (self.training and self.condition_dropout):
            return condition
        uniform = draw(torch.rand, len(features), generator=generator, device=features.device)
        return self.drop_condition(condition, uniform < self.condition_dropout)

    def drop_condition(self, condition: Condition, dropped: torch.Tensor) -> Condition:
        """Replace the conditions of the samples where `dropped` `(batch_size,)` is True by the learnt null."""
        null = self.null_condition.to(condition.vector)
        vector = torch.where(dropped[:, None], null, condition.vector)
        tokens = torch.where(dropped[:, None, None], null.to(condition.tokens), condition.tokens)
        return Condition(vector, tokens, condition.token_mask)

    def prepare(self, features, feature_mask, state, times: torch.Tensor) -> Sequence[Any]:
        """Contexts of a sampling at `times` `(num_steps,)`; with guidance for the batch and its null twin."""
        condition = self.encode(features, feature_mask, state)
        if self.guidance_scale != 1.0:
            null = self.drop_condition(condition, torch.ones(len(features), dtype=torch.bool, device=features.device))
            parts = ("vector", "tokens", "token_mask")
            condition = Condition(*(torch.cat((getattr(condition, part), getattr(null, part))) for part in parts))
        return self.denoiser.prepare(condition, times[:, None])

    def denoise(self, sample: torch.Tensor, context: Any) -> torch.Tensor:
        """One call of the denoiser, float32 in and out whatever its precision."""
        dtype = next(self.denoiser.parameters()).dtype
        return self.denoiser(sample.to(dtype), context).float()

    def guided(self, sample: torch.Tensor, context: Any) -> torch.Tensor:
        """One call of the denoiser for a sampling, moved away from the null prediction by `guidance_scale`."""
        if self.guidance_scale == 1.0:
            return self.denoise(sample, context)
        conditioned, null = self.denoise(torch.cat([sample, sample]), context).chunk(2)
        return torch.lerp(null, conditioned, self.guidance_scale)

    def num_steps(self, num_inference_steps: int | None) -> int:
        """Denoising steps of a sampling.

        Raises:
            ValueError: fewer than 1 are asked for.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"Expected num_inference_steps of 1 or more, came {steps}.")
        return steps

    def initial_noise(self, features, generator, noise, action_mask) -> torch.Tensor:
        """Given noise, checked, or standard normal noise, float32, drawn where the generator is; see `keep_own`.

        Raises:
            ValueError: the given noise has another shape.
        """
        shape = (len(features), self.chunk_size, self.action_dim)
        if noise is None:
            noise = draw(torch.randn, shape, generator=generator, device=features.device, dtype=torch.float32)
        if noise.shape != shape:
            raise ValueError(f"Expected noise of shape {shape}, came {tuple(noise.shape)}.")
        return self.keep_own(noise.float(), action_mask)
