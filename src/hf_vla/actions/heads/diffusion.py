"""Actions as the end of a denoising diffusion: DDPM training, sampling with any scheduler of diffusers."""

import inspect
import json
import logging
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch

from hf_vla.actions.heads.base import DenoisingHead
from hf_vla.actions.heads.networks.samples import check_finite, draw

logger = logging.getLogger(__name__)

# of the published TinyVLA: ten steps are the times 90, 80, ... 0
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class DiffusionHead(DenoisingHead):
    """Learns what noise was added to a chunk, and removes it step by step. Time 0 = hardly any noise, last = noise.

    Schedule, noise and chunk are float32 whatever the denoiser's precision.

    Args:
        scheduler (`dict`, *optional*): configuration of a diffusers scheduler as it is saved, `_class_name` its class
            (a scheduler's own `config` lacks that); what it leaves out is as diffusers has it. `prediction_type` is
            what the denoiser learns: `"epsilon"` (the noise), `"sample"` (the actions) or `"v_prediction"`. None: the
            published DDIM of 100 training steps. With `"epsilon"` the first step multiplies the network's error by the
            noise over the signal: where the schedule ends in pure noise and the scheduler clips nothing (DPM-Solver++,
            Euler, UniPC), take another.
        others: see [`~hf_vla.actions.heads.base.DenoisingHead`].

    Raises:
        ValueError: an option is not valid, or the scheduler does not lead from noise to actions in the default steps.

    Source: Diffusion Policy, https://huggingface.co/papers/2303.04137; DDPM, https://huggingface.co/papers/2006.11239,
        equation 14; v prediction, https://huggingface.co/papers/2202.00512, appendix D.
    """

    def __init__(
        self,
        feature_dim: int,
        action_dim: int,
        chunk_size: int,
        state_dim: int | None = None,
        *,
        scheduler: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(feature_dim, action_dim, chunk_size, state_dim, **kwargs)
        self.scheduler_config = dict(SCHEDULER if scheduler is None else scheduler)
        config = self.build_scheduler().config
        self.prediction_type, self.num_train_timesteps = config.prediction_type, config.num_train_timesteps
        if config.get("clip_sample"):
            self.bound = config.get("clip_sample_range", 1.0)

    @torch.compiler.disable
    def build_scheduler(self, num_inference_steps: int | None = None) -> Any:
        """Build the scheduler; each sampling has its own, since the multistep ones remember their steps.

        Args:
            num_inference_steps (`int`, *optional*): the head's own by default.

        Returns:
            A diffusers scheduler, its times set.

        Raises:
            ValueError: the configuration is not one of a diffusion scheduler, it does not allow as many steps, or what
                it does with an ideal network is not right; see [`check_scheduler`].
        """
        steps = self.num_steps(num_inference_steps)
        check_scheduler(json.dumps(self.scheduler_config), steps)
        return make_scheduler(self.scheduler_config, steps)

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """Share of the actions in the variance of a noised chunk, at each training time."""
        return self.build_scheduler().alphas_cumprod

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
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Squared error of the prediction at one time for each sample, or several (`noise_draws`); see [`ActionHead`].

        Args:
            noise (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`, *optional*): drawn by default.
            timesteps (`torch.Tensor` of shape `(batch_size,)`, *optional*): int64; drawn by default, all alike likely.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, float32.

        Raises:
            ValueError: also where timesteps have another shape or dtype, or lie outside the training times.
        """
        actions = self.mask_padding(features, actions, action_mask)
        count, last = (len(features),), self.num_train_timesteps - 1
        if timesteps is not None and (
            timesteps.shape != count or timesteps.dtype != torch.int64 or ((timesteps < 0) | (timesteps > last)).any()
        ):
            raise ValueError(f"Expected timesteps of shape {count}, int64, in 0 to {last}, came {timesteps}.")
        noises, times, losses = [], [], []
        for _ in range(self.num_draws(noise, timesteps)):
            noises.append(self.initial_noise(features, generator, noise, action_mask))
            if timesteps is None:
                times.append(draw(torch.randint, last + 1, count, generator=generator, device=features.device))
            else:
                times.append(timesteps)
        condition = self.encode_condition(features, feature_mask, state, generator)
        contexts = self.denoiser.prepare(condition, torch.stack(times))
        for added, time, context in zip(noises, times, contexts, strict=True):
            alpha = self.alphas_cumprod.to(features.device)[time][:, None, None]
            signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
            prediction = self.denoise(signal * actions + spread * added, context)
            wanted = target(self.prediction_type, actions, added, signal, spread)
            losses.append(self.reduce((prediction - wanted) ** 2, action_mask))
        return torch.stack(losses).mean(0)

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
        """Take the noise away step by step; see [`ActionHead`]."""
        scheduler = self.build_scheduler(num_inference_steps)
        contexts = self.prepare(features, feature_mask, state, scheduler.timesteps.to(features.device))
        sample = self.initial_noise(features, generator, noise, action_mask) * scheduler.init_noise_sigma
        for index, (time, context) in enumerate(zip(scheduler.timesteps, contexts, strict=True)):
            prediction = self.guided(scheduler.scale_model_input(sample, time), context)
            sample = step(scheduler, self.keep_own(prediction, action_mask), time, sample, generator)
            sample = self.keep_own(sample, action_mask)  # some schedulers add noise in between
            if callback is not None:
                callback(index, sample)
        return check_finite(sample)


def make_scheduler(config: dict[str, Any], steps: int) -> Any:
    """Build the diffusers scheduler of a configuration and set its times.

    Args:
        config (`dict`): `_class_name` and options.
        steps (`int`): denoising steps.

    Returns:
        The scheduler.

    Raises:
        ValueError: it is none of a diffusion, does not allow as many steps, or begins at a time that is not noise.
    """
    import diffusers  # takes seconds

    name = config.get("_class_name")
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"Expected _class_name of a diffusers scheduler, such as 'DDIMScheduler', came {name!r}.")
    with torch.device("cpu"):  # while models are built on the meta device, too
        try:
            scheduler: Any = kind(**options)
        except Exception as error:
            raise ValueError(f"Expected options of {name}, came {options}: {error}") from error
        prediction_type = scheduler.config.get("prediction_type")
        if prediction_type not in PREDICTION_TYPES or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"Expected a diffusion scheduler with prediction_type in {PREDICTION_TYPES}, came {name} with "
                f"{prediction_type!r}."
            )
        last = scheduler.config.num_train_timesteps - 1
        if steps > last + 1:
            raise ValueError(f"Expected at most num_train_timesteps = {last + 1} denoising steps, came {steps}.")
        try:
            scheduler.set_timesteps(steps)
        except Exception as error:
            raise ValueError(f"{name} cannot take {steps} steps with {options}: {error}") from error
    first = min(max(int(scheduler.timesteps[0]), 0), last)
    share = scheduler.alphas_cumprod[first].item()
    if share > 0.5:
        raise ValueError(
            f"Expected a first denoising time at which a chunk is noise, as the sample is; {name} with {steps} steps "
            f"begins at {first} of {last}, where the actions still have {share:.0%} of the variance: set "
            "timestep_spacing: trailing, or choose another number of steps (or betas that end in noise)."
        )
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} with use_flow_sigmas samples as flow matching, which is a head of its own: set false."
        )
    return scheduler


@lru_cache(maxsize=128)
def check_scheduler(config: str, steps: int) -> None:
    """Try a scheduler once with an ideal network, whose only data is the action 0.3.

    What the network sees at a time must be as noisy as in training, and the sampling must end at 0.3. Tolerances: 0.35
    in the standard deviation (beginning where a chunk holds half of the actions' variance is 0.32 off), with a warning
    from 0.17 (30 %) on, since real networks suffer from it; 0.05 at the end (some schedulers stop at the first
    training time, usually 0.02).

    Args:
        config (`str`): the scheduler's configuration, JSON.
        steps (`int`): denoising steps.

    Raises:
        ValueError: see [`make_scheduler`]; or the scheduler fails or misses.
    """
    options = json.loads(config)
    scheduler = make_scheduler(options, steps)
    try:
        with torch.device("cpu"):
            off, miss = dry_run(scheduler)
    except Exception as error:
        raise ValueError(
            f"{options['_class_name']} fails in {steps} denoising steps with {options}: {error!r}; choose other "
            "options, another number of steps or another scheduler."
        ) from error
    if not (off < 0.35 and miss < 0.05):  # NaN, too
        raise ValueError(
            f"Expected a scheduler that leads from noise to the actions; in {steps} denoising steps with {options} an "
            f"ideal network sees {off:.2g} more or less noise than in training, and the sample ends {miss:.2g} beside "
            "the actions: choose other options, another number of steps (a small divisor of num_train_timesteps) or "
            "another scheduler."
        )
    if off > 0.17:
        logger.warning(
            "%s in %d denoising steps shows the network %.2g more or less noise than in training: its actions will be "
            "inexact. More steps, timestep_spacing: trailing or betas that end in noise avoid it.",
            options["_class_name"],
            steps,
            off,
        )


def dry_run(scheduler: Any, action: float = 0.3) -> tuple[float, float]:
    """Sample with the network that is ideal where one action is the only data.

    Returns:
        Largest difference of the standard deviation of what the network sees from that in training; root mean square
        of what the sample misses the action by.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(16, 16, 4, generator=generator, dtype=torch.float32) * scheduler.init_noise_sigma
    angles = scheduler.alphas_cumprod.sqrt().acos()  # bounded, so that times between two can be interpolated
    off = 0.0
    for time in scheduler.timesteps:
        place = time.float().clamp(0, len(angles) - 1)
        angle = torch.lerp(angles[place.floor().long()], angles[place.ceil().long()], place.frac())
        signal, spread = angle.cos(), angle.sin()
        noise = (scheduler.scale_model_input(sample, time) - signal * action) / spread
        off = max(off, (noise.square().mean().sqrt() * spread - spread).abs().item())
        prediction = target(scheduler.config.prediction_type, torch.full_like(sample, action), noise, signal, spread)
        sample = step(scheduler, prediction, time, sample, generator)
    return off, (sample - action).square().mean().sqrt().item()


@torch.compiler.disable  # diffusers' own code would be compiled anew for every time
def step(
    scheduler: Any, prediction, time, sample, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Take one denoising step; the schedulers that draw numbers take a generator."""
    random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return scheduler.step(prediction, time, sample, **random).prev_sample


def target(prediction_type: str, actions, noise, signal, spread) -> torch.Tensor:
    """What a network is to predict of `signal * actions + spread * noise`."""
    if prediction_type == "epsilon":
        return noise
    return actions if prediction_type == "sample" else signal * noise - spread * actions
