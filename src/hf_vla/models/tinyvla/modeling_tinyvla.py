"""TinyVLA: any image-text-to-text model of transformers, whose hidden states condition a continuous action head.

images + prompt -> backbone, once -> hidden states behind the final norm -> action head (+ state) -> chunk of actions

Source: TinyVLA, https://huggingface.co/papers/2409.12514
"""

from collections.abc import Callable

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from hf_vla.actions.heads.registry import build_action_head
from hf_vla.models.backbones import (
    BackbonePreTrainedModel,
    backbone_inputs,
    check_images,
    check_length,
    pretrained_backbone,
    token_positions,
    token_types,
)
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig


class TinyVLAForActionPrediction(BackbonePreTrainedModel):
    """Images, an instruction and (where the robot has one) its state in, a chunk of normalised actions out.

    Args:
        config ([`TinyVLAConfig`]): of the model.
        backbone (`PreTrainedModel`, *optional*): a pretrained one without a language head, whose configuration is
            `config.backbone_config`; the head, untrained, follows its device and precision. Default: an untrained one.

    Examples:
    ```python
    >>> import hf_vla
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained(path)
    >>> processor = AutoProcessor.from_pretrained(path)
    >>> inputs = processor(images={"front": image}, text="pick up the red cube", state=state)
    >>> actions = processor.decode_actions(model.predict_action(**inputs))
    ```

    A pretrained vision-language model gets an action head:
    ```python
    >>> backbone = AutoModel.from_pretrained("llava-hf/llava-interleave-qwen-0.5b-hf", dtype="bfloat16")
    >>> config = TinyVLAConfig(backbone_config=backbone.config, action_dim=7, state_dim=8)
    >>> model = TinyVLAForActionPrediction(config, backbone)
    ```
    """

    config: TinyVLAConfig

    def __init__(self, config: TinyVLAConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if backbone is None:
            self.backbone = AutoModel.from_config(config.backbone_config)
        else:
            self.backbone = pretrained_backbone(backbone, config)
        self._backbone_inputs = backbone_inputs(self.backbone)
        feature_dim = config.get_text_config().hidden_size
        state_dim = None if config.state_dim is None else config.n_obs_steps * config.state_dim
        self.action_head = build_action_head(
            config.head_config, feature_dim, config.action_dim, config.chunk_size, state_dim
        )
        if backbone is not None:
            self.follow_backbone()
        self.post_init()

    def encode(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        **others,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the backbone.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): from the processor, padded on the
                right, or on the left where the backbone takes `position_ids`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 where a token is real, 0 where
                it is padding or belongs to a missing camera.
            pixel_values (`torch.FloatTensor`): as the backbone takes them.
            others: what else the processor says of pictures, such as `image_grid_thw`.

        Returns:
            `tuple`: features `(batch_size, L, hidden_size)`, and a mask `(batch_size, L)`, True where a feature is
            real. L is the sequence length, or the number of readout tokens where the config has any.

        Raises:
            ValueError: a prompt is too long or has not all of the readout tokens, or its pictures are missing, or it
                is padded in front and the backbone counts positions itself, or knows no picture input of that name.
        """
        others = self.check_inputs("encode", others, self._backbone_inputs)
        check_length(self.config.get_text_config(), input_ids.shape[1])
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask, is_image = attention_mask.bool(), input_ids == self.config.image_token_id
        check_images(self.backbone, is_image, pixel_values, others)
        inputs, in_prompt = token_types(self.backbone, input_ids, is_image), mask | is_image
        if "image_grid_thw" in others or not in_prompt[:, 0].all():  # else the backbone counts as well itself
            inputs["position_ids"] = token_positions(self.backbone, input_ids, in_prompt, is_image, others)
        inputs |= others
        outputs = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False, **inputs
        )
        features, readout = outputs.last_hidden_state, self.config.readout_token_ids
        if not readout:
            return features, mask
        is_readout = (input_ids >= readout.start) & (input_ids < readout.stop)
        if (is_readout.sum(-1) != len(readout)).any():
            raise ValueError(
                f"Expected the {len(readout)} readout tokens {readout.start}..{readout.stop - 1} in every prompt, got "
                f"{is_readout.sum(-1).tolist()} of them: does the processor belong to this checkpoint?"
            )
        features = features[is_readout].unflatten(0, (len(features), len(readout)))
        return features, mask.new_ones(features.shape[:2])

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        actions: torch.FloatTensor | None = None,
        action_mask: torch.BoolTensor | None = None,
        state: torch.FloatTensor | None = None,
        generator: torch.Generator | None = None,
        **others,
    ) -> VLAOutput:
        """Training loss.

        Args:
            input_ids, attention_mask, pixel_values, others: see `encode`.
            actions (`torch.FloatTensor` of shape `(batch_size, chunk_size, action_dim)`): normalised.
            action_mask (`torch.BoolTensor` of shape `(batch_size, chunk_size)`, *optional*): True where an action is
                real; all of them by default. `(batch_size, chunk_size, action_dim)` for robots of fewer dimensions.
            state (`torch.FloatTensor` of shape `(batch_size, state_dim)`, *optional*): normalised;
                `(batch_size, n_obs_steps, state_dim)` where the model sees several.
            generator (`torch.Generator`, *optional*): makes the head's noise repeatable.

        Returns:
            [`VLAOutput`] with `loss`, the mean over the samples, and `hidden_states`, the features that the head saw.

        Raises:
            ValueError: there are no actions; see also `encode`.
        """
        if actions is None:
            raise ValueError("Expected `actions` to learn from; to predict some, call predict_action.")
        if action_mask is None:
            action_mask = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
        others = self.check_inputs("forward", others, self._backbone_inputs)
        features, mask = self.encode(input_ids, attention_mask, pixel_values, **others)
        loss = self.action_head.loss(features, mask, actions, action_mask, _flat(state), generator)
        return VLAOutput(loss=loss.mean(), hidden_states=(features,))

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        state: torch.FloatTensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.FloatTensor | None = None,
        num_inference_steps: int | None = None,
        action_mask: torch.BoolTensor | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        **others,
    ) -> VLAOutput:
        """Predict a chunk of actions; the backbone runs once, however many steps the head takes.

        Args:
            input_ids, attention_mask, pixel_values, others: see `encode`.
            state: see `forward`.
            generator, noise, num_inference_steps, action_mask, callback: see `ActionHead.sample`.

        Returns:
            [`VLAOutput`] with `actions` `(batch_size, chunk_size, action_dim)`, normalised, float32.

        Raises:
            ValueError: a prediction is NaN or infinite, an argument is not for this head; see also `encode`.
        """
        others = self.check_inputs("predict_action", others, self._backbone_inputs)
        features, mask = self.encode(input_ids, attention_mask, pixel_values, **others)
        options = {"noise": noise, "num_inference_steps": num_inference_steps, "action_mask": action_mask}
        options |= {"generator": generator, "callback": callback}
        actions = self.action_head.sample(features, mask, _flat(state), **options)
        return VLAOutput(actions=actions)


def _flat(state: torch.Tensor | None) -> torch.Tensor | None:
    """The states of all steps one behind the other, the oldest first, as the head takes them."""
    return None if state is None else state.flatten(1)


# Only for registered models does peft translate adapters of older layouts; the backbones bring the translations along.
register_checkpoint_conversion_mapping(TinyVLAConfig.model_type, [], overwrite=True)
