"""pi0: transformers' own model behind this library's `forward(**batch).loss` and `predict_action`.

images, prompt -> PaliGemma -> keys and values -> action expert (state, noised actions) -> velocity -> actions

Time is pi0's own here: 1 = noise, 0 = data; the velocity points from the data to the noise.

Source: pi0, https://huggingface.co/papers/2410.24164
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.pi0.modeling_pi0 import PI0ForConditionalGeneration

from hf_vla.actions.heads.networks.samples import check_finite, draw
from hf_vla.models.base import VLAPreTrainedModel
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig


class PI0VLAForActionPrediction(VLAPreTrainedModel, PI0ForConditionalGeneration):
    """Images, an instruction and a state in, a chunk of continuous actions out.

    `from_pretrained` also reads checkpoints of transformers' own `PI0ForConditionalGeneration` and LeRobot's weights.

    Example:
    ```python
    >>> from hf_vla import PI0VLAForActionPrediction, PI0VLAProcessor

    >>> model = PI0VLAForActionPrediction.from_pretrained("lerobot/pi0_base")
    >>> processor = PI0VLAProcessor.from_tokenizer(tokenizer, model.config, statistics, action_config, camera_config)
    >>> inputs = processor(images=[{"front": image, "wrist": None}], text="fold the towel", state=state)
    >>> actions = processor.decode_actions(model.predict_action(**inputs))
    ```
    """

    config: PI0VLAConfig
    main_input_name = "input_ids"
    # The action expert reads the language model's cache, which activation checkpointing turns off.
    supports_gradient_checkpointing = False

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.BoolTensor | None = None,
        state: torch.FloatTensor | None = None,
        actions: torch.FloatTensor | None = None,
        action_mask: torch.BoolTensor | None = None,
        noise: torch.FloatTensor | None = None,
        timestep: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        past_key_values: Cache | None = None,
        **others,
    ) -> VLAOutput:
        """Training loss.

        Padded actions are 0 before noise is added and cost nothing; a sample's loss is the mean over its real
        actions. Dimensions beyond the robot's own are learnt to be 0, as published: sampling starts from noise in all
        of them, and the network sees where they go.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): from the processor.
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_cameras, 3, height, width)`): normalised.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 where a token is real.
            pixel_attention_mask (`torch.BoolTensor` of shape `(batch_size, num_cameras)`): True where a camera has a
                picture.
            state (`torch.FloatTensor` of shape `(batch_size, state_dim)`): normalised, at most `max_state_dim` wide;
                the processor gives 0 where a robot declares none.
            actions (`torch.FloatTensor` of shape `(batch_size, chunk_size, action_dim)`): normalised, at most
                `max_action_dim` wide.
            action_mask (`torch.BoolTensor` of shape `(batch_size, chunk_size)`, *optional*): True where an action is
                real; all are by default. `(batch_size, chunk_size, action_dim)`: single numbers that are not cost
                nothing; the processor gives none.
            noise (`torch.FloatTensor` of shape `(batch_size, chunk_size, max_action_dim)`, *optional*): what is mixed
                with the actions; drawn by default.
            timestep (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): 1 = noise, 0 = data; drawn by default.
            generator (`torch.Generator`, *optional*): makes what is drawn repeatable.
            past_key_values (`Cache`, *optional*): for transformers' sampling loop alone, which asks for the velocity
                at the noised actions `noise`.
            others: nothing but None.

        Returns:
            [`VLAOutput`] with `loss` and, as `logits`, the velocity `(batch_size, chunk_size, max_action_dim)`.

        Raises:
            ValueError: something is missing or unknown, or a shape does not fit.
        """
        self.check_inputs("forward", others)
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "pixel_attention_mask": pixel_attention_mask,
        }
        if past_key_values is not None:  # a step of transformers' `sample_actions`, whose samples stay float32
            output = super().forward(
                state, noise=noise.to(self.dtype), timestep=timestep, past_key_values=past_key_values, **inputs
            )
            return VLAOutput(logits=output.logits, past_key_values=output.past_key_values)

        if actions is None:
            raise ValueError("Expected `actions` to learn from; to predict some, call predict_action.")
        _check_given(**inputs, state=state)
        action_mask = torch.ones_like(actions[..., 0], dtype=torch.bool) if action_mask is None else action_mask
        expected = (len(actions), self.config.chunk_size)
        if actions.shape[:2] != expected or action_mask.shape not in (expected, actions.shape):
            raise ValueError(
                f"Expected actions of shape (batch_size, {self.config.chunk_size}, action_dim) and their action_mask, "
                f"got {tuple(actions.shape)} and {tuple(action_mask.shape)}."
            )
        actions = _widened(actions.float(), self.config.max_action_dim, "actions")
        real = action_mask if action_mask.ndim == 3 else action_mask[..., None]
        beyond = real.any(-1, keepdim=True).expand(*expected, self.config.max_action_dim - real.shape[-1])
        real = torch.cat([real, beyond], -1)
        actions = actions.masked_fill(~real, 0.0)  # padding must not enter the noised actions
        if noise is None:
            noise = draw(torch.randn, actions.shape, generator=generator, device=actions.device, dtype=torch.float32)
        if timestep is None:
            timestep = self._draw_times(len(actions), generator, actions.device)
        state = self._full_state(state)
        output = super().forward(state, noise=noise, timestep=timestep, actions=actions.to(self.dtype), **inputs)
        error = (noise - actions - output.logits.float()) ** 2
        error = error.masked_fill(~real, 0.0).sum((1, 2)) / real.sum((1, 2)).clamp(min=1)
        return VLAOutput(loss=error.mean(), logits=output.logits)

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_attention_mask: torch.BoolTensor | None = None,
        state: torch.FloatTensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.FloatTensor | None = None,
        num_inference_steps: int | None = None,
        **others,
    ) -> VLAOutput:
        """Integrate the velocity from noise (time 1) to actions (time 0) by Euler steps.

        Args:
            input_ids, pixel_values, attention_mask, pixel_attention_mask, state: as in `forward`.
            generator (`torch.Generator`, *optional*): makes the prediction repeatable; a list has one for each sample.
            noise (`torch.FloatTensor` of shape `(batch_size, chunk_size, max_action_dim)`, *optional*): to start from.
            num_inference_steps (`int`, *optional*): Euler steps; the checkpoint's by default.
            others: nothing but None.

        Returns:
            [`VLAOutput`] with `actions` `(batch_size, chunk_size, max_action_dim)`, float32, normalised; what lies
            beyond the robot's own dimensions is left out by the processor's `decode_actions`.

        Raises:
            ValueError: something is missing or unknown, a shape does not fit, or a prediction is NaN or infinite.
        """
        self.check_inputs("predict_action", others)
        prompt = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "pixel_attention_mask": pixel_attention_mask,
        }
        _check_given(**prompt, state=state)
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"Expected num_inference_steps of 1 or more, got {steps}.")
        shape = (len(input_ids), self.config.chunk_size, self.config.max_action_dim)
        if noise is None:
            noise = draw(torch.randn, shape, generator=generator, device=input_ids.device, dtype=torch.float32)
        if noise.shape != shape:
            raise ValueError(f"Expected noise of shape {shape}, got {tuple(noise.shape)}.")
        actions = self.sample_actions(state=self._full_state(state), noise=noise, num_steps=steps, **prompt)
        return VLAOutput(actions=check_finite(actions.float()))

    def _full_state(self, state: torch.Tensor) -> torch.Tensor:
        """State of pi0's own width in the weights' precision."""
        return _widened(state.to(self.dtype), self.config.max_state_dim, "state")

    def _draw_times(self, count: int, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
        """Training times `(count,)`, float32; torch's own Beta distribution takes no generator."""
        config = self.config
        shape = torch.tensor([config.time_sampling_beta_alpha, config.time_sampling_beta_beta]).expand(count, 2)
        place = device if generator is None else generator.device
        beta = torch._sample_dirichlet(shape.to(place, torch.float32), generator)[:, 0].to(device)
        return beta * config.time_sampling_scale + config.time_sampling_offset


def _check_given(**inputs: torch.Tensor | None) -> None:
    if missing := [name for name, value in inputs.items() if value is None]:
        raise ValueError(f"Expected {list(inputs)} from the processor, got no {', '.join(missing)}.")


def _widened(values: torch.Tensor, width: int, what: str) -> torch.Tensor:
    """Append zeros to the last axis."""
    if values.shape[-1] > width:
        raise ValueError(f"Expected {what} of at most {width} dimensions, got {values.shape[-1]}.")
    return F.pad(values, (0, width - values.shape[-1]))


# LeRobot's names of the weights, which transformers translates for model type "pi0" only; and only where a name
# begins so, since adapters have names that hold our own twice.
register_checkpoint_conversion_mapping(
    PI0VLAConfig.model_type,
    [
        WeightRenaming(f"^{each.source_patterns[0]}", each.target_patterns[0])
        if each.target_patterns[0].startswith("embed_action_time.")
        else each
        for each in get_checkpoint_conversion_mapping("pi0")
    ],
    overwrite=True,
)
