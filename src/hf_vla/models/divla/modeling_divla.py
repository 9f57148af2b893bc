"""DiVLA: a vision-language model that says what it is about to do; what it said modulates how it acts.

images + prompt -> backbone -> reasoning, token by token
hidden states of prompt and reasoning -> FiLM -> action head (+ state) -> chunk of actions (or latents -> decoder)

Source: Diffusion-VLA, https://huggingface.co/papers/2412.03293
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from hf_vla.actions.heads.networks.condition import check_mask
from hf_vla.actions.heads.networks.film import ReasoningFiLM
from hf_vla.actions.heads.networks.latent import Embodiment
from hf_vla.actions.heads.networks.samples import check_finite
from hf_vla.actions.heads.registry import build_action_head
from hf_vla.models.backbones import (
    BackbonePreTrainedModel,
    backbone_inputs,
    check_generation,
    check_images,
    check_length,
    pretrained_backbone,
    token_positions,
    token_types,
)
from hf_vla.models.batches import IGNORED
from hf_vla.models.divla.configuration_divla import DiVLAConfig, check_embodiment
from hf_vla.models.divla.encoding import Encoding, append, last_real, pad_left, reasoning_mask, without_end
from hf_vla.models.outputs import VLAOutput

TARGETS = ("actions", "action_mask", "state", "embodiment", "generator")  # what forward takes beside the prompts


class DiVLAForActionPrediction(BackbonePreTrainedModel):
    """Images, an instruction and (where the robot has one) its state in; a reasoning and a chunk of actions out.

    Args:
        config ([`DiVLAConfig`]): of the model.
        backbone (`PreTrainedModel`, *optional*): a pretrained one with its language head, whose configuration is
            `config.backbone_config`; the rest, untrained, follows its device and precision. Default: an untrained one.

    Examples:
    ```python
    >>> import hf_vla
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained(path)
    >>> processor = AutoProcessor.from_pretrained(path)
    >>> inputs = processor(images={"front": image}, text="clear the table", state=state)
    >>> output = model.predict_action(**inputs)
    >>> actions, reasoning = processor.decode_actions(output), processor.decode_reasoning(output)
    ```

    A pretrained vision-language model gets an action head:
    ```python
    >>> from transformers import AutoModelForImageTextToText

    >>> backbone = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", dtype="bfloat16")
    >>> config = DiVLAConfig(backbone_config=backbone.config, action_dim=7, state_dim=8)
    >>> model = DiVLAForActionPrediction(config, backbone)
    ```
    """

    config: DiVLAConfig

    def __init__(self, config: DiVLAConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if backbone is None:
            self.backbone = AutoModelForImageTextToText.from_config(config.backbone_config)
        else:
            self.backbone = pretrained_backbone(backbone, config)
        check_generation(self.backbone)
        self._backbone_inputs = backbone_inputs(self.backbone.base_model)
        hidden_size = config.get_text_config().hidden_size
        self.film = ReasoningFiLM(hidden_size) if config.use_film else None
        self.action_head = build_action_head(
            config.head_config,
            hidden_size,
            config.action_dim if config.latent_dim is None else config.latent_dim,
            config.chunk_size,
            config.state_dim,
        )
        self.embodiments = torch.nn.ModuleDict()
        for name, sizes in (config.embodiments or {}).items():
            self.embodiments[name] = Embodiment(
                **sizes, latent_dim=config.latent_dim, shared_state_dim=config.state_dim
            )
        if backbone is not None:
            self.follow_backbone()
        self.post_init()

    def get_output_embeddings(self):
        """The backbone's language head."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        """Replace the backbone's language head."""
        self.backbone.set_output_embeddings(new_embeddings)

    def add_embodiment(self, name: str, action_dim: int, state_dim: int | None = None) -> Embodiment:
        """Give the model a further robot: its own decoder behind the shared action head.

        Args:
            name (`str`): by which `embodiment=` selects it.
            action_dim (`int`), state_dim (`int`, *optional*): of the robot; a state of the head's own size by default.

        Returns:
            [`~hf_vla.actions.heads.networks.latent.Embodiment`], untrained; see `train_embodiment`. A processor that
            serves it needs its dataset's statistics, cameras and specs, and the name under `embodiments`.

        Raises:
            ValueError: the model denoises actions themselves, or the name is taken or no name.
        """
        if self.config.latent_dim is None:
            raise ValueError(
                "This model denoises the actions of one robot: build it with latent_dim (32 is usual) to share it."
            )
        if name in self.embodiments:
            raise ValueError(f"There is an embodiment {name!r} already; others are {sorted(self.embodiments)}.")
        sizes = {"action_dim": action_dim, "state_dim": self.config.state_dim if state_dim is None else state_dim}
        check_embodiment(name, sizes)
        embodiment = Embodiment(**sizes, latent_dim=self.config.latent_dim, shared_state_dim=self.config.state_dim)
        self.embodiments[name] = embodiment.to(self.device, self.dtype)
        self.config.embodiments = {**self.config.embodiments, name: sizes}
        return embodiment

    def train_embodiment(self, name: str) -> None:
        """Freeze everything but what one robot has of its own.

        The frozen model reasons as it did; a robot that is to act under that is to learn under it, too, see
        `with_own_words`, which the trainer of this library calls.

        Raises:
            ValueError: there is no such embodiment.
        """
        chosen = self._embodiment(name)
        self.requires_grad_(False)
        chosen.requires_grad_(True)

    def _embodiment(self, name: str | None) -> Embodiment | None:
        if not self.embodiments:
            if name is not None:
                raise ValueError(f"This model knows one robot only: leave embodiment={name!r} out.")
            return None
        if not isinstance(name, (str, type(None))):
            raise ValueError(f"Expected the name of one embodiment for the batch, got {name!r}: batch robots apart.")
        if name is None and len(self.embodiments) == 1:
            return next(iter(self.embodiments.values()))
        if name not in self.embodiments:
            raise ValueError(f"No embodiment {name!r}; this checkpoint knows {sorted(self.embodiments)}.")
        return self.embodiments[name]

    def encode(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **others,
    ) -> Encoding:
        """Run the backbone over prompts and the reasoning that is given with them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): from the processor.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 where a token is real, 0 where
                it is padding or belongs to a missing camera.
            pixel_values (`torch.FloatTensor`): as the backbone takes them.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): the reasoning's tokens;
                -100 in front of it, and everywhere in samples without any. Where `attention_mask` is 0 nobody reads
                them.
            others: what else the processor says of pictures, such as `image_grid_thw`.

        Returns:
            [`Encoding`]

        Raises:
            ValueError: a prompt is too long, or there is none in front of a reasoning, or its pictures are missing,
                the labels are of another shape or type, or the backbone knows no picture input of that name.
        """
        others = self.check_inputs("encode", others, self._backbone_inputs)
        check_length(self.config.get_text_config(), input_ids.shape[1])
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.bool()
        is_reasoning = reasoning_mask(input_ids, mask, labels)
        outputs, _ = self._prefill(input_ids, attention_mask, pixel_values, is_reasoning, others, use_cache=False)
        return Encoding(outputs.last_hidden_state, mask, is_reasoning & mask)

    @torch.no_grad()
    def reason(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        max_reasoning_tokens: int | None = None,
        **others,
    ) -> tuple[Encoding, torch.LongTensor]:
        """Let the model say what it is about to do, always the likeliest token next, as published.

        The end token is run through the backbone like all others, since in training its hidden state counts, too. A
        reasoning that would grow too long is ended by it.

        Args:
            input_ids, attention_mask, pixel_values, others: see `encode`.
            max_reasoning_tokens (`int`, *optional*): with the end token; the config's by default.

        Returns:
            `tuple`: [`Encoding`] of prompt and reasoning, and the reasoning's ids `(batch_size, reasoning_length)`,
            with the end token, which also fills the places behind it.

        Raises:
            ValueError: the limit is negative, or a training with activation checkpointing is under way; see also
                `encode`.
        """
        others = self.check_inputs("reason", others, self._backbone_inputs)
        limit = self.config.max_reasoning_tokens if max_reasoning_tokens is None else max_reasoning_tokens
        if limit < 0:
            raise ValueError(f"Expected max_reasoning_tokens of 0 or more, got {limit}.")
        if self.training and self.is_activation_checkpointing:
            raise ValueError("Expected a model that keeps its past: with activation checkpointing, call eval() first.")
        check_length(self.config.get_text_config(), input_ids.shape[1], limit)
        input_ids, attention_mask = pad_left(input_ids, attention_mask, self.config.image_token_id)
        outputs, places = self._prefill(input_ids, attention_mask, pixel_values, None, others, use_cache=True)
        states, mask = [outputs.last_hidden_state], attention_mask.bool()
        state = states[0][torch.arange(len(mask), device=mask.device), last_real(mask)[:, -1]]
        end, ids, active = self.config.end_token_id, [], mask.new_ones(len(mask))
        while len(ids) < limit and active.any():
            logits = self._logits(state)
            logits[:, self.config.image_token_id] = -torch.inf  # which stands for pictures alone
            ids.append(logits.argmax(-1).where(active & (len(ids) + 1 < limit), end))
            mask = torch.cat([mask, active[:, None]], 1)
            outputs = self.backbone.base_model(
                input_ids=ids[-1][:, None],
                attention_mask=mask.to(attention_mask.dtype),
                position_ids=places,
                past_key_values=outputs.past_key_values,
                use_cache=True,
            )
            states.append(outputs.last_hidden_state)
            state, places, active = states[-1][:, 0], places + 1, active & (ids[-1] != end)
        is_reasoning = mask & (torch.arange(mask.shape[1], device=mask.device) >= input_ids.shape[1])
        reasoning_ids = torch.stack(ids, 1) if ids else input_ids[:, :0]
        return Encoding(torch.cat(states, 1), mask, is_reasoning), reasoning_ids

    def _prefill(self, input_ids, attention_mask, pixel_values, is_reasoning, others, use_cache):
        """Outputs of the backbone, and the place behind each prompt, shaped as its `position_ids` of one token."""
        backbone, is_image = self.backbone.base_model, input_ids == self.config.image_token_id
        check_images(backbone, is_image, pixel_values, others)
        in_prompt = attention_mask.bool() | is_image  # a missing camera keeps its place
        places = token_positions(backbone, input_ids, in_prompt, is_image, others)
        outputs = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            position_ids=places,
            use_cache=use_cache,
            **token_types(backbone, input_ids, is_image, is_reasoning),
            **others,
        )
        following = places.masked_fill(~in_prompt, 0).amax(-1, keepdim=True) + 1
        return outputs, following.amax(0, keepdim=True).expand_as(following) if following.ndim == 3 else following

    def condition(self, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
        """What the action head sees of prompt and reasoning.

        Args:
            encoding ([`Encoding`]): of a batch.

        Returns:
            `tuple`: features and their mask, `(batch_size, 1, hidden_size)` and `(batch_size, 1)` with FiLM, else
            those of the encoding.
        """
        states, mask, is_reasoning = encoding
        if self.film is None:
            return states, mask
        features = self.film(states, mask & ~is_reasoning, is_reasoning)[:, None]
        return features, mask.new_ones(features.shape[:2])

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        actions: torch.FloatTensor | None = None,
        action_mask: torch.BoolTensor | None = None,
        state: torch.FloatTensor | None = None,
        embodiment: str | None = None,
        reasoning_ids: torch.LongTensor | None = None,
        generator: torch.Generator | None = None,
        **others,
    ) -> VLAOutput:
        """Training loss.

        Args:
            input_ids, attention_mask, pixel_values, labels, others: see `encode`. Without labels, and for samples
                without any, the action head alone learns, from the prompt alone.
            actions (`torch.FloatTensor` of shape `(batch_size, chunk_size, action_dim)`): normalised.
            action_mask (`torch.BoolTensor` of shape `(batch_size, chunk_size)`, *optional*): True where an action is
                real; all of them by default. Without latents also `(batch_size, chunk_size, action_dim)`, for robots
                of fewer dimensions.
            state (`torch.FloatTensor` of shape `(batch_size, state_dim)`, *optional*): normalised.
            embodiment (`str`, *optional*): whose actions these are; may be left out where the model knows one robot.
            reasoning_ids (`torch.LongTensor` of shape `(batch_size, reasoning_length)`, *optional*): instead of
                labels, a reasoning to act under that is not to be learnt, see `with_own_words`.
            generator (`torch.Generator`, *optional*): makes the head's noise repeatable.

        Returns:
            [`VLAOutput`] with `loss` = `diffusion_loss` (mean over the samples) + `ntp_loss_weight` * `ntp_loss` (mean
            over the batch's reasoning tokens) + `reconstruction_loss` (only where latents hold less than actions) +
            `volume_loss` (only in front of a frozen head, see `ActionDecoder`), and `hidden_states`, those of prompt
            and reasoning.

        Raises:
            ValueError: there are no actions or two reasonings, the embodiment is unknown or has other sizes, or the
                head would learn latents that its samples are clipped short of; see also `encode`.
        """
        if actions is None:
            raise ValueError("Expected `actions` to learn from; to predict some, call predict_action.")
        if action_mask is None:
            action_mask = torch.ones(actions.shape[:2], dtype=torch.bool, device=actions.device)
        others = self.check_inputs("forward", others, self._backbone_inputs)
        robot = self._embodiment(embodiment)
        said = labels
        if reasoning_ids is not None:
            if labels is not None:
                raise ValueError("Expected one reasoning, as labels to learn or as reasoning_ids, got both.")
            input_ids, attention_mask, said = append(self.config, input_ids, attention_mask, reasoning_ids)
        encoding = self.encode(input_ids, attention_mask, pixel_values, said, **others)
        parts = {"ntp_loss": self._ntp_loss(encoding, labels)}
        if robot is not None:
            actions, of_decoder = self._latents(robot, actions, action_mask)
            state, parts = robot.encode_state(state), parts | of_decoder
        features, mask = self.condition(encoding)
        parts["diffusion_loss"] = self.action_head.loss(features, mask, actions, action_mask, state, generator).mean()
        weights = {"ntp_loss": self.config.ntp_loss_weight}
        loss = sum(weights.get(name, 1.0) * part for name, part in parts.items())
        return VLAOutput(loss=loss, hidden_states=(encoding.hidden_states,), **parts)

    def _latents(self, robot: Embodiment, actions, action_mask):
        """What the head has to predict for a robot's actions, and the parts of the loss that are of its decoder."""
        check_whole(action_mask)
        check_mask("action_mask", action_mask)
        actions = actions.masked_fill(~action_mask[..., None], 0.0)  # NaN there would reach the gradients
        parts = {"reconstruction_loss": robot.decoder.reconstruction_loss(actions, action_mask)}
        latents = robot.decoder.inverse(actions)
        if any(parameter.requires_grad for parameter in self.action_head.parameters()):
            # Latents that learn would learn to be easily denoised. Before a frozen head, they learn its language.
            latents = latents.detach()
            self._check_bound(latents, actions)
        elif latents.requires_grad and not self.action_head.differentiable:
            raise ValueError(
                f"Expected an action head behind which an embodiment can learn, got a "
                f"{type(self.action_head).__name__}, whose loss has no gradient for latents: take another head."
            )
        else:
            parts["volume_loss"] = robot.decoder.volume_loss()
        return latents, parts

    def _check_bound(self, latents, actions):
        """Raise where latents leave what the head can sample, and the actions do not."""
        largest = latents.abs().max()
        if largest > max(self.action_head.bound, actions.abs().max()) + 1e-3:
            raise ValueError(
                f"Expected latents in [-{self.action_head.bound:g}, {self.action_head.bound:g}], which this action "
                f"head's samples are clipped to, got {largest:.3g}: give its scheduler a larger clip_sample_range "
                "(2 is ample), take another head, or let the embodiment's decoder.reset_parameters()."
            )

    def _ntp_loss(self, encoding, labels):
        states, mask, _ = encoding
        labels = mask.new_full(mask.shape, IGNORED, dtype=torch.long) if labels is None else labels
        # of the few that are needed: a vocabulary's worth of logits for every token would fill the memory
        rows, columns = ((labels[:, 1:] != IGNORED) & mask[:, 1:]).nonzero(as_tuple=True)
        logits = self._logits(states[rows, last_real(mask)[rows, columns]])
        # A sum over none is 0 with gradients of 0, for which distributed training waits.
        return F.cross_entropy(logits, labels[rows, columns + 1], reduction="sum") / max(len(rows), 1)

    def _logits(self, states):
        logits = self.get_output_embeddings()(states).float()
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def with_own_words(self, **inputs) -> dict[str, torch.Tensor]:
        """Let the model speak to a training batch, as it does before it acts.

        Args:
            inputs: of `forward`, without labels.

        Returns:
            `dict[str, torch.Tensor]`: `inputs` and `reasoning_ids`.
        """
        prompts = {name: value for name, value in inputs.items() if name not in TARGETS}
        training = self.training
        _, reasoning_ids = self.eval().reason(**prompts)
        self.train(training)
        return {**inputs, "reasoning_ids": reasoning_ids}

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        state: torch.FloatTensor | None = None,
        embodiment: str | None = None,
        action_mask: torch.BoolTensor | None = None,
        reasoning_ids: torch.LongTensor | None = None,
        max_reasoning_tokens: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.FloatTensor | None = None,
        num_inference_steps: int | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        **others,
    ) -> VLAOutput:
        """Reason (greedily, as published) unless a reasoning is given, and predict a chunk of actions under it.

        Args:
            input_ids, attention_mask, pixel_values, others: from the processor, see `encode`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): from a processor that was
                given a reasoning for each sample: its tokens, and -100 in front of them.
            state (`torch.FloatTensor` of shape `(batch_size, state_dim)`, *optional*): normalised.
            embodiment (`str`, *optional*): whose actions are wanted; may be left out where the model knows one robot.
            action_mask (`torch.BoolTensor` of shape `(batch_size, chunk_size, action_dim)`, *optional*): from the
                processor, where robots have fewer dimensions than the model: which are theirs.
            reasoning_ids (`torch.LongTensor` of shape `(batch_size, reasoning_length)`, *optional*): an earlier
                output's, to act under it once more.
            max_reasoning_tokens (`int`, *optional*): of the model's own reasoning, with the end token; the config's by
                default. 0: act without reasoning.
            generator, noise, num_inference_steps, callback: see `ActionHead.sample`; noise is of latents where there
                are any, and the callback gets the actions that they decode to.

        Returns:
            [`VLAOutput`] with `actions` `(batch_size, chunk_size, action_dim)`, normalised, float32, and
            `reasoning_ids` `(batch_size, reasoning_length)` with the end token, which also fills the places behind it;
            None where the reasoning came as labels.

        Raises:
            ValueError: a prediction is NaN or infinite, a reasoning is given in two ways, or for some samples only, or
                reasoning_ids are not a model's, the embodiment is unknown, an argument is not for this head; or what
                `encode` and `reason` refuse.
        """
        if others.get("reasoning") is not None:
            raise ValueError(
                "A reasoning in words is for the processor: processor(images=..., text=..., reasoning=...)."
            )
        others = self.check_inputs("predict_action", others, self._backbone_inputs)
        robot = self._embodiment(embodiment)
        choices = {"labels": labels, "reasoning_ids": reasoning_ids, "max_reasoning_tokens": max_reasoning_tokens}
        if len(given := [name for name, value in choices.items() if value is not None]) > 1:
            raise ValueError(
                "Expected a reasoning, as labels or as reasoning_ids, or max_reasoning_tokens of the model's own, got "
                f"{' and '.join(given)}: choose one."
            )
        generated = labels is None
        if reasoning_ids is not None:
            input_ids, attention_mask, labels = append(self.config, input_ids, attention_mask, reasoning_ids)
        if labels is not None:
            encoding = self.encode(input_ids, attention_mask, pixel_values, labels, **others)
        else:
            encoding, reasoning_ids = self.reason(
                input_ids, attention_mask, pixel_values, max_reasoning_tokens, **others
            )
        if not generated and not encoding.is_reasoning.any(-1).all():
            raise ValueError(
                "Expected labels with a reasoning for every sample, got some without: give all of them one, or leave "
                "labels out and the model reasons itself (with max_reasoning_tokens=0 it acts without)."
            )
        if generated and not self.config.film_includes_end:
            encoding = without_end(encoding)
        features, mask = self.condition(encoding)
        if robot is not None:
            check_whole(action_mask)
            state, action_mask, report = robot.encode_state(state), None, callback
            if report is not None:
                callback = lambda step, latents: report(step, robot.decoder(latents))  # noqa: E731
        options = {"noise": noise, "num_inference_steps": num_inference_steps, "action_mask": action_mask}
        options |= {"generator": generator, "callback": callback}
        actions = self.action_head.sample(features, mask, state, **options)
        if robot is not None:
            robot.decoder.check_learnt()
            actions = check_finite(robot.decoder(actions))
        return VLAOutput(actions=actions, reasoning_ids=reasoning_ids)


def check_whole(action_mask: torch.Tensor | None) -> None:
    """Raise where a mask is of single numbers: a latent is of all numbers of an action.

    Raises:
        ValueError: it is.
    """
    if action_mask is not None and action_mask.ndim != 2:
        raise ValueError(
            "Expected an action_mask of shape (batch_size, chunk_size), since each embodiment has its own number of "
            f"dimensions, got {tuple(action_mask.shape)}: give the processor embodiments, one for each dataset."
        )


# Only for registered models does peft translate adapters of older layouts; the backbones bring the translations along.
register_checkpoint_conversion_mapping(DiVLAConfig.model_type, [], overwrite=True)
