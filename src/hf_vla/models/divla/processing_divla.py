"""DiVLA processor: images of several cameras, prompt, reasoning, state and actions <-> tensors."""

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hf_vla.models.batches import IGNORED, as_numpy, check_words, padded
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.prompts import PromptProcessor


class DiVLAProcessor(PromptProcessor):
    """[`~hf_vla.models.prompts.PromptProcessor`] behind whose prompts stands what the model says, padded on the left.

    Args:
        prompt_config (`dict`): also `"answer"`, a text with `{reasoning}` that ends with its only end token.
        embodiments (`dict`, *optional*): `{unnorm_key: name}`, the robot of every dataset; needed where there are
            several.
        others: see [`~hf_vla.models.prompts.PromptProcessor`].

    Source: Diffusion-VLA, https://huggingface.co/papers/2412.03293
    """

    own_prompt: ClassVar[dict[str, str]] = {"answer": "{reasoning}Next action:{eos}"}  # as published
    takes_reasoning = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        statistics=None,
        action_config=None,
        camera_config=None,
        prompt_config=None,
        embodiments=None,
        chat_template=None,
    ):
        self.embodiments = embodiments
        super().__init__(
            image_processor, tokenizer, statistics, action_config, camera_config, prompt_config, chat_template
        )
        answer = prompt_config.get("answer", "")
        if answer.count("{reasoning}") != 1:
            raise ValueError(f"Expected {{reasoning}} once in prompt_config['answer'], got {answer!r}.")
        self._opening, self._closing = answer.split("{reasoning}")
        *others, self.end_token_id = self._ids(self._opening + self._closing) or [None]
        if self.end_token_id not in self._control_ids or self.end_token_id in others:
            raise ValueError(f"Expected prompt_config['answer'] to end with its only end token, got {answer!r}.")
        _check_embodiments(embodiments, self.action_codec.keys)

    @classmethod
    def from_scratch(
        cls,
        config: DiVLAConfig,
        statistics: dict,
        action_config: dict,
        camera_config: dict,
        embodiments: dict | None = None,
    ):
        """Processor of an untrained model: bytes as text tokens, images of whole patches, at most 96 x 96 pixels.

        Args:
            config ([`DiVLAConfig`]): with the ids of the byte tokenizer, see the preset "tiny".
            statistics, action_config, camera_config, embodiments (`dict`): see the class.

        Raises:
            ValueError: the config's ids are not those of the byte tokenizer, or its backbone takes images in another
                form.
        """
        backbone = config.backbone_config
        if backbone.model_type != "qwen2_vl":
            raise ValueError(
                f"Expected a Qwen2-VL, got {backbone.model_type!r}: build its processor with from_backbone."
            )
        vision, tokenizer = backbone.vision_config, byte_tokenizer(0)
        tokenizer.add_tokens(["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
        side = vision.patch_size * vision.spatial_merge_size
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            size={"shortest_edge": side**2, "longest_edge": (96 // side * side) ** 2},
        )
        processor = SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)
        # The published prompt without its system message and roles: bytes are many.
        prompt_config = {"template": "{images}{instruction}\n"}
        return cls.from_backbone(
            processor, config, statistics, action_config, camera_config, prompt_config, embodiments=embodiments
        )

    @classmethod
    def complete_prompt(cls, prompt: dict[str, Any], tokenizer, config: DiVLAConfig) -> None:
        """Leave the end to the answer: the prompt of a TinyVLA, which says nothing, has it already."""
        prompt["template"] = prompt["template"].removesuffix(tokenizer.eos_token or "")

    def check_sizes(self, config: DiVLAConfig) -> None:
        """Check the end token, too; see the base class."""
        super().check_sizes(config)
        if self.end_token_id != config.end_token_id:
            raise ValueError(
                f"Expected the answer to end with the token {config.end_token_id}, as config.end_token_id says, but "
                f"{self.prompt_config['answer']!r} ends with {self.end_token_id}: set one to the other."
            )

    def robot_sizes(self, config: DiVLAConfig, unnorm_key: str) -> tuple[int, int | None]:
        """action_dim and state_dim of a dataset's robot, as the model's configuration has them."""
        known = config.embodiments or {}
        names = [self.embodiments[unnorm_key]] if self.embodiments else list(known)
        if not names:
            return super().robot_sizes(config, unnorm_key)
        if len(names) > 1 or names[0] not in known:
            raise ValueError(
                f"Expected embodiments to name the robot of {unnorm_key!r} among those that the model knows, "
                f"{sorted(known)}, got {self.embodiments}."
            )
        return known[names[0]]["action_dim"], known[names[0]].get("state_dim")

    @property
    def pads(self) -> bool:
        """False where every robot has an embodiment, with a decoder of its own sizes."""
        return not self.embodiments

    def own_dims(self, unnorm_keys: list[str | None]) -> np.ndarray | None:
        """None where every robot has an embodiment; see the base class."""
        return super().own_dims(unnorm_keys) if self.pads else None

    def routing(self, unnorm_keys: list[str | None]) -> dict[str, str]:
        """Name the robot of a batch, where embodiments do; see the base class."""
        if not self.embodiments:
            return {}
        names = {self.embodiments[self.action_codec.resolve_key(key)] for key in unnorm_keys}
        if len(names) > 1:
            raise ValueError(f"Expected a batch of one embodiment, got {sorted(names)}: batch them apart.")
        return {"embodiment": names.pop()}

    def encode_prompts(
        self, views: list[list[tuple[Image.Image, bool]]], texts: list[str], reasonings: list[str | None]
    ) -> dict[str, np.ndarray]:
        """Fill and pad the prompts and what is said behind them.

        In training, a sample whose reasoning is None adds nothing to the reasoning's loss, and nothing modulates its
        actions. In prediction, None leaves the reasoning to the model: give all samples of a batch theirs, or none.

        Args:
            views, texts: those of [`~hf_vla.models.prompts.PromptProcessor.fill_prompts`].
            reasonings (`list[str | None]`): of each sample; `""` is a reasoning of no words, None is none.

        Returns:
            `dict[str, np.ndarray]`: `input_ids` and `attention_mask` `(batch_size, L)`, padded on the left, beside
            `pixel_values` and whatever else the image processor makes; where any sample has a reasoning also `labels`
            `(batch_size, L)`, its tokens' ids and -100 elsewhere.
        """
        data, rows, masks = self.fill_prompts(views, texts)
        labels = [[IGNORED] * len(row) for row in rows]
        for reasoning, row, mask, label in zip(reasonings, rows, masks, labels, strict=True):
            if reasoning is not None:
                check_words(reasoning, self.tokenizer, self._control_ids, "a reasoning")
                ids = self._ids(self._opening + reasoning.strip() + self._closing)
                row += ids
                label += ids
                mask += [1] * len(ids)
        data["input_ids"] = padded(rows, self.tokenizer.pad_token_id or 0, left=True)
        data["attention_mask"] = padded(masks, 0, left=True)
        if any(reasoning is not None for reasoning in reasonings):
            data["labels"] = padded(labels, IGNORED, left=True)
        return data

    def decode_reasoning(self, output: VLAOutput) -> list[str]:
        """What the model said before it acted.

        Args:
            output ([`VLAOutput`] of `predict_action`).

        Returns:
            `list[str]`: one text per sample, without the words that always follow it; of one that was cut short,
            whatever was said.

        Raises:
            ValueError: there is no reasoning in it.
        """
        if getattr(output, "reasoning_ids", None) is None:
            raise ValueError(
                f"Expected the output of predict_action, got a {type(output).__name__} without `reasoning_ids`: was "
                "the reasoning given to it?"
            )
        opening, closing = (self._words(self._ids(text)) for text in (self._opening, self._closing))
        rows = as_numpy(output.reasoning_ids)
        rows = [row[: np.append(np.flatnonzero(row == self.end_token_id), len(row))[0]] for row in rows]
        return [self._words(row).removeprefix(opening).removesuffix(closing) for row in rows]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _words(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _check_embodiments(embodiments, unnorm_keys: list[str]) -> None:
    if embodiments is None:
        return
    if not isinstance(embodiments, dict) or not all(isinstance(name, str) for name in embodiments.values()):
        raise ValueError(f"Expected embodiments to be a dictionary {{unnorm_key: name}}, got {embodiments!r}.")
    if embodiments and set(embodiments) != set(unnorm_keys):
        raise ValueError(f"Expected embodiments to name the robot of each of {unnorm_keys}, got {embodiments}.")
