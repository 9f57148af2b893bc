"""pi0 processor: pictures of several cameras, instruction, state and actions <-> tensors, in transformers' layout."""

import numpy as np
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_vla.models.batches import check_words, control_ids, padded, token_id
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig
from hf_vla.models.processing import ContinuousActionProcessor

IMAGE_TOKEN = "<image>"


class PI0VLAProcessor(ContinuousActionProcessor):
    """Everything outside the network: pixels, prompt, normalisation of state and actions.

    A prompt is `<image>` for every patch of every picture, `<bos>`, the instruction, a newline. Missing cameras have
    no place in it; the state of a robot that declares none is 0. pi0 was trained with mean and standard deviation of
    both state and actions: `{"mode": "mean_std", "convention": "lerobot"}`. See the base class for the arguments.

    Source: pi0, https://huggingface.co/papers/2410.24164; transformers' `PI0Processor` and `PI0ImageProcessor`, which
    need torchvision.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        statistics=None,
        action_config=None,
        camera_config=None,
        chat_template=None,
    ):
        if not hasattr(image_processor, "image_seq_length"):
            raise ValueError("Expected an image processor with `image_seq_length`, the number of patches of an image.")
        super().__init__(image_processor, tokenizer, statistics, action_config, camera_config, chat_template)
        self.image_token_id = token_id(tokenizer, IMAGE_TOKEN)
        self._control_ids = control_ids(tokenizer, self.image_token_id)

    @classmethod
    def from_tokenizer(
        cls, tokenizer, config: PI0VLAConfig, statistics: dict, action_config: dict, camera_config: dict
    ) -> "PI0VLAProcessor":
        """Processor for weights that come without one of ours, such as `lerobot/pi0_base`.

        Pictures keep their aspect: they are resized until they fit a square, which is then filled up on the right and
        below with the middle grey.

        Args:
            tokenizer (`PreTrainedTokenizerFast`): the language model's (PaliGemma's for the published weights), with
                `<image>`.
            config ([`PI0VLAConfig`]): gives image size and number of patches.
            statistics, action_config, camera_config (`dict`): see the class.

        Raises:
            ValueError: the tokenizer's `<image>` is not the config's, or actions or states are too wide for it.
        """
        side = config.vlm_config.vision_config.image_size
        image_processor = SiglipImageProcessorPil(
            size={"max_height": side, "max_width": side},
            do_pad=True,
            pad_size={"height": side, "width": side},
            image_seq_length=config.num_image_tokens,
        )
        processor = cls(image_processor, tokenizer, statistics, action_config, camera_config)
        if processor.image_token_id != config.vlm_config.image_token_id:
            raise ValueError(
                f"Expected {IMAGE_TOKEN!r} to have the id {config.vlm_config.image_token_id} of the config, got "
                f"{processor.image_token_id}: is this the tokenizer of another model?"
            )
        processor.check_sizes(config)
        return processor

    @classmethod
    def from_scratch(cls, config: PI0VLAConfig, statistics: dict, action_config: dict, camera_config: dict):
        """Processor of an untrained model: as `from_tokenizer`, with bytes as text tokens."""
        return cls.from_tokenizer(byte_tokenizer(0), config, statistics, action_config, camera_config)

    def encode_prompts(
        self, views: list[list[tuple[Image.Image, bool]]], texts: list[str], reasonings: list[None]
    ) -> dict[str, np.ndarray]:
        """Return `input_ids`, `attention_mask`, `pixel_values` and `pixel_attention_mask`; see the base class."""
        present = padded([[there for _, there in sample] for sample in views], False)
        pictures = [picture for sample in views for picture, there in sample if there]
        pixels = np.stack(self.image_processor(pictures, return_tensors="np")["pixel_values"])
        pixel_values = np.zeros((*present.shape, *pixels.shape[1:]), np.float32)
        pixel_values[present] = pixels
        prompts = [self._prompt_ids(text, count) for text, count in zip(texts, present.sum(1), strict=True)]
        inputs = {
            "input_ids": padded(prompts, self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(prompt) for prompt in prompts], 0),
            "pixel_values": pixel_values,
            "pixel_attention_mask": present,
        }
        if not self.action_codec.takes_state:
            inputs["state"] = np.zeros((len(texts), 1), np.float32)
        return inputs

    def _prompt_ids(self, text: str, num_pictures: int) -> list[int]:
        check_words(text, self.tokenizer, self._control_ids)
        words = self.tokenizer(f"{self.tokenizer.bos_token}{text.strip()}\n", add_special_tokens=False)["input_ids"]
        return [self.image_token_id] * (self.image_processor.image_seq_length * num_pictures) + words

    def decode_actions(self, output: VLAOutput, unnorm_key=None) -> np.ndarray:
        """Turn predicted actions into robot actions, without what pi0 appends to the robot's own dimensions.

        Arguments, result and errors are those of the base class.
        """
        if getattr(output, "actions", None) is None:
            return super().decode_actions(output, unnorm_key)
        width = self.action_codec.action_dim
        return super().decode_actions(VLAOutput(actions=output.actions[..., :width]), unnorm_key)

    def own_dims(self, unnorm_keys: list[str | None]) -> None:
        """None: pi0 learns, as published, that whatever a robot has not is 0."""
        return None

    def check_sizes(self, config: PI0VLAConfig) -> None:
        """Check that a model has room for the actions and states of every dataset.

        Args:
            config ([`PI0VLAConfig`]): the model's.

        Raises:
            ValueError: it has not.
        """
        codec = self.action_codec
        for key in codec.keys:
            state_dim = codec.state_normalizer(key).action_dim if codec.takes_state else 0
            sizes = {"actions": codec.normalizer(key).action_dim, "states": state_dim}
            for (what, size), most in zip(sizes.items(), (config.max_action_dim, config.max_state_dim), strict=True):
                if size > most:
                    raise ValueError(f"This pi0 takes {what} of at most {most} numbers, those of {key!r} have {size}.")
