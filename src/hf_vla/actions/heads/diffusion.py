"""Actions as the end of a denoising diffusion: DDPM training, sampling with any scheduler of diffusers."""

import inspect
from functools import cached_property
from typing import Any

import torch

from hf_vla.actions.heads.base import DenoisingHead, check_finite

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
        scheduler (`dict`, *optional*): configuration of a diffusers scheduler, `_class_name` its class; what it leaves
            out is as diffusers has it. `prediction_type` is what the denoiser learns: `"epsilon"` (the noise),
            `"sample"` (the actions) or `"v_prediction"`. None: the published DDIM of 100 training steps.
        others: see [`~hf_vla.actions.heads.base.DenoisingHead`].

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

    def build_scheduler(self, num_inference_steps: int | None = None) -> Any:
        """Build the scheduler; each sampling has its own, since the multistep ones remember their steps.

        Raises:
            ValueError: the configuration is not one of a diffusion scheduler, or it does not allow as many steps.
        """
        import diffusers  # takes seconds

        steps, name = self.num_steps(num_inference_steps), self.scheduler_config.get("_class_name")
        options = {key: value for key, value in self.scheduler_config.items() if not key.startswith("_")}
        kind = getattr(diffusers, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise ValueError(f"Expected _class_name of a diffusers scheduler, such as 'DDIMScheduler', came {name!r}.")
        with torch.device("cpu"):  # while models are built on the meta device, too
            try:
                scheduler: Any = kind(**options)
            except (TypeError, NotImplementedError) as error:
                raise ValueError(f"Expected options of {name}, came {options}: {error}") from error
            prediction_type = scheduler.config.get("prediction_type")
            if prediction_type not in PREDICTION_TYPES or not hasattr(scheduler, "alphas_cumprod"):
                raise ValueError(
                    f"Expected a diffusion scheduler with prediction_type in {PREDICTION_TYPES}, came {name} with "
                    f"{prediction_type!r}."
                )
            if steps > scheduler.config.num_train_timesteps:
                raise ValueError(
                    f"Expected at most num_train_timesteps = {scheduler.config.num_train_timesteps} denoising steps, "
                    f"came {steps}."
                )
            scheduler.set_timesteps(steps)
        return scheduler

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
        """Squared error of the prediction at one time for each sample; see [`ActionHead`].

        Args:
            noise (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`, *optional*): drawn by default.
            timesteps (`torch.Tensor` of shape `(batch_size,)`, *optional*): int64; drawn by default, all alike likely.
        """
        actions = self.targets(features, actions, action_mask)
        noise = self.initial_noise(features, generator, noise)
        if timesteps is None:
            count, device = (len(features),), features.device
            timesteps = torch.randint(self.num_train_timesteps, count, generator=generator, device=device)
        condition = self.encode_condition(features, feature_mask, state, generator)
        (context,) = self.denoiser.prepare(condition, timesteps[None])
        alpha = self.alphas_cumprod.to(features.device)[timesteps][:, None, None]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        prediction = self.denoise(signal * actions + spread * noise, context)
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "sample":
            target = actions
        else:
            target = signal * noise - spread * actions
        return self.reduce((prediction - target) ** 2, action_mask)

    @torch.no_grad()
    def sample(
        self,
        features: torch.Tensor,
        feature_mask: torch.Tensor,
        state: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
    ) -> torch.Tensor:
        """Take the noise away step by step; see [`ActionHead`]."""
        scheduler = self.build_scheduler(num_inference_steps)
        contexts = self.prepare(features, feature_mask, state, scheduler.timesteps.to(features.device))
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        sample = self.initial_noise(features, generator, noise) * scheduler.init_noise_sigma
        for time, context in zip(scheduler.timesteps, contexts, strict=True):
            prediction = self.predict(scheduler.scale_model_input(sample, time), context)
            sample = scheduler.step(prediction, time, sample, **random).prev_sample
        return check_finite(sample)
