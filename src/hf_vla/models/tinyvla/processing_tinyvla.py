"""TinyVLA processor: images of several cameras, prompt, state and actions <-> tensors; keeps every statistic."""

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hf_vla.models.batches import padded, token_id
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.prompts import PromptProcessor
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig


class TinyVLAProcessor(PromptProcessor):
    """[`~hf_vla.models.prompts.PromptProcessor`] whose prompts end with the readout tokens, padded on the right.

    Arguments are that one's; the tokenizer also has the readout tokens, which `prompt_config["readout"]` lists.

    Source: TinyVLA, https://huggingface.co/papers/2409.12514
    """

    own_prompt: ClassVar[dict[str, str]] = {"readout": ""}
    takes_history = True

    @classmethod
    def from_scratch(cls, config: TinyVLAConfig, statistics: dict, action_config: dict, camera_config: dict):
        """Processor of an untrained model: bytes as text tokens, images padded to a square with their mean colour.

        Args:
            config ([`TinyVLAConfig`]): gives the image size and the number of image tokens.
            statistics, action_config, camera_config (`dict`): see the class.

        Raises:
            ValueError: the config's ids are not those of the byte tokenizer, or its backbone takes images in another
                form.
        """
        backbone = config.backbone_config
        if backbone.model_type not in ("llava", "paligemma"):
            raise ValueError(
                f"Expected a backbone that takes every image as one square, Llava or PaliGemma, got "
                f"{backbone.model_type!r}: build its processor with from_backbone."
            )
        size = backbone.vision_config.image_size
        image_processor = LlavaImageProcessorPil(
            do_pad=True, do_center_crop=False, size={"height": size, "width": size}
        )
        processor = SimpleNamespace(image_processor=image_processor, tokenizer=byte_tokenizer(0))
        # The published prompt without its system message: bytes are many.
        prompt_config = {"template": "USER: {images}\n{instruction} ASSISTANT:  {eos}"}
        return cls.from_backbone(processor, config, statistics, action_config, camera_config, prompt_config)

    @classmethod
    def complete_prompt(cls, prompt, tokenizer, config: TinyVLAConfig) -> None:
        """Take the config's readout tokens, in place of another head's."""
        prompt["readout"] = _add_readout_tokens(tokenizer, config)

    def encode_prompts(
        self, views: list[list[tuple[Image.Image, bool]]], texts: list[str], reasonings: list[None]
    ) -> dict[str, np.ndarray]:
        """Fill and pad the prompts.

        Args:
            views, texts: those of [`~hf_vla.models.prompts.PromptProcessor.fill_prompts`].
            reasonings (`list[None]`): one per sample; a TinyVLA says nothing.

        Returns:
            `dict[str, np.ndarray]`: `input_ids` and `attention_mask` `(batch_size, L)`, padded on the right, beside
            `pixel_values` and whatever else the image processor makes.
        """
        data, rows, masks = self.fill_prompts(views, texts)
        readout = self.tokenizer(self.prompt_config.get("readout", ""), add_special_tokens=False)["input_ids"]
        rows, masks = [row + readout for row in rows], [mask + [1] * len(readout) for mask in masks]
        data["input_ids"], data["attention_mask"] = padded(rows, self.tokenizer.pad_token_id or 0), padded(masks, 0)
        return data


def _add_readout_tokens(tokenizer, config: TinyVLAConfig) -> str:
    readout = [f"<readout{index:03d}>" for index in range(config.num_readout_tokens)]
    tokenizer.add_tokens(readout, special_tokens=True)
    for token, index in zip(readout, config.readout_token_ids, strict=True):
        if token_id(tokenizer, token) != index:
            raise ValueError(
                f"Expected {token} to have the id {index}, as the config says, but the tokenizer gives it "
                f"{token_id(tokenizer, token)}: set config.readout_token_id to the tokenizer's length, "
                f"{token_id(tokenizer, readout[0])}."
            )
    return "".join(readout)
