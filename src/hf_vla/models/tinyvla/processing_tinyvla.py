"""TinyVLA processor: images of several cameras, prompt, state and actions <-> tensors; keeps every statistic."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hf_vla.models.batches import check_words, control_ids, padded, token_id
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.processing import ContinuousActionProcessor
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig

# Two blanks before the end token, in training and inference alike; the published evaluation script has one.
PUBLISHED_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {images}\n{instruction} ASSISTANT:  "
)
_FAKE = "<fake_token_around_image>"
_IDEFICS = {
    "template": "User:{images}{instruction}<end_of_utterance>\nAssistant:",
    "image_prefix": f"{_FAKE}<global-img>",
    "image_suffix": _FAKE,
}
_QWEN = {
    "template": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{instruction}"
    "<|im_end|>\n<|im_start|>assistant\n",
    "image_prefix": "<|vision_start|>",
    "image_suffix": "<|vision_end|>",
}
# model type of a backbone: the prompt that it was pretrained with (Llava: TinyVLA's Pythia was; others differ by
# their language model); `{eos}` and `{bos}` are its tokenizer's
PROMPTS = {
    "llava": {"template": PUBLISHED_TEMPLATE + "{eos}"},
    "paligemma": {"template": "{images}{bos}{instruction}\n"},
    "idefics3": {**_IDEFICS, "template": "<|begin_of_text|>" + _IDEFICS["template"]},
    "smolvlm": {**_IDEFICS, "template": "<|im_start|>" + _IDEFICS["template"]},
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
}
# by which image processors cut up an image, or add crops of it
TILINGS = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")
TILE_COUNTS = ("num_crops", "num_patches")
PROMPT_KEYS = ("template", "image_prefix", "image_token", "image_suffix", "image_seq_length")


class TinyVLAProcessor(ContinuousActionProcessor):
    """Everything outside the network: pixels, prompt, normalisation of states and actions.

    Args:
        image_processor (`BaseImageProcessor`): the backbone's.
        tokenizer (`PreTrainedTokenizerFast`): the backbone's, with the image token and any readout tokens.
        statistics (`dict`, *optional*): `{unnorm_key: {"action": {"min": [...], ...}, "state": {...}}}`.
        action_config (`dict`, *optional*): chunk size, normalisations and specs, see
            [`~hf_vla.actions.codec.ActionCodec`]. With `"state_normalization"` every call needs a state.
        camera_config (`dict`, *optional*): `{unnorm_key: [CameraSpec.to_dict(), ...]}`, in the order in which the
            cameras' images enter the prompt; the key `"default"` serves every dataset that has no cameras of its own.
        prompt_config (`dict`): `"template"`, a text with `{images}` and `{instruction}`; `"image_token"`, which stands
            `"image_seq_length"` times for an image (None: as often as its `image_grid_thw` says); `"image_prefix"` and
            `"image_suffix"` around these, `""` by default.
        chat_template (`str`, *optional*): unused, kept for `ProcessorMixin`.

    Source: TinyVLA, https://huggingface.co/papers/2409.12514
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        statistics=None,
        action_config=None,
        camera_config=None,
        prompt_config=None,
        chat_template=None,
    ):
        self.prompt_config = prompt_config
        _check_prompt(prompt_config)
        super().__init__(image_processor, tokenizer, statistics, action_config, camera_config, chat_template)
        _check_tokens(prompt_config, tokenizer)
        self.image_token_id = token_id(tokenizer, prompt_config["image_token"])
        self._control_ids = control_ids(tokenizer, self.image_token_id)

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
    def from_backbone(
        cls,
        processor,
        config: TinyVLAConfig,
        statistics: dict | None,
        action_config: dict,
        camera_config: dict | None,
        prompt_config: dict | None = None,
    ):
        """Processor of a pretrained vision-language model, which keeps its image processing, tokens and prompt.

        Args:
            processor (`ProcessorMixin`): of the vision-language model, or anything else that has an `image_processor`
                and a `tokenizer`; copied, not changed. A TinyVLA's own keeps its prompt, too.
            config ([`TinyVLAConfig`]): with the model's own `backbone_config`.
            statistics, action_config, camera_config (`dict`): see the class.
            prompt_config (`dict`, *optional*): entries that replace those known for the model, see the class.

        Raises:
            ValueError: the config's ids are not the tokenizer's, its sizes not those of the actions and states, or it
                does not tell the prompt or the number of image tokens.
        """
        prompt = {**getattr(processor, "prompt_config", _known_prompt(config)), **(prompt_config or {})}
        if "template" not in prompt:
            raise ValueError(
                f"No prompt is known for a backbone {config.backbone_config.model_type!r} with a language model "
                f"{config.get_text_config().model_type!r}, only for {sorted(PROMPTS)} (Llava with GPT-NeoX): give "
                "prompt_config with a template, and what the model puts around its image tokens."
            )
        tokenizer, image_processor = copy.deepcopy(processor.tokenizer), copy.deepcopy(processor.image_processor)
        _take_pictures_whole(image_processor)
        readout = _add_readout_tokens(tokenizer, config)
        template = re.sub(r"(<readout\d+>)*$", "", prompt["template"])  # those of another head
        template = template.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token or "")
        prompt["template"] = template + readout
        prompt["image_token"] = _image_token(tokenizer, config, prompt.get("image_token"))
        if "image_seq_length" not in prompt:
            prompt["image_seq_length"] = config.num_image_tokens
        made = cls(image_processor, tokenizer, statistics, action_config, camera_config, prompt)
        made.check_sizes(config)
        return made

    def check_sizes(self, config: TinyVLAConfig) -> None:
        """Check that a model predicts the actions and takes the states that the statistics are of.

        Args:
            config ([`TinyVLAConfig`]): the model's.

        Raises:
            ValueError: it does not.
        """
        codec = self.action_codec
        sizes = [("a chunk_size", codec.chunk_size, config.chunk_size)]
        for key in codec.keys:
            state_dim = codec.state_normalizer(key).action_dim if codec.takes_state else None
            sizes += [
                (f"an action_dim of {key!r}", codec.normalizer(key).action_dim, config.action_dim),
                (f"a state_dim of {key!r}", state_dim, config.state_dim),
            ]
        for name, size, expected in sizes:
            if size != expected:
                raise ValueError(
                    f"Expected {name} of {expected}, as the config says, got {size} in action_config and statistics."
                )

    def encode_prompts(self, views: list[list[tuple[Image.Image, bool]]], texts: list[str]) -> dict[str, np.ndarray]:
        """Fill the template; whatever the image processor returns is handed on.

        Nothing attends to the image tokens of a missing camera.

        Args:
            views (`list[list[tuple]]`): for each sample and camera an RGB picture and whether it is there.
            texts (`list[str]`): instructions.

        Returns:
            `dict[str, np.ndarray]`: `input_ids` and `attention_mask` `(batch_size, L)`, padded on the right, beside
            `pixel_values` and whatever else the image processor makes.

        Raises:
            ValueError: an instruction is no text or holds control tokens, or an image's tokens cannot be counted.
        """
        pictures = [[image for image, _ in sample] for sample in views]
        data = dict(self.image_processor(pictures, return_tensors="np"))
        data = {name: value for name, value in data.items() if name not in TILE_COUNTS}
        lengths = iter(self._image_lengths(sum(map(len, views)), data.get("image_grid_thw")))
        prompt, rows, masks = self.prompt_config, [], []
        for text, sample in zip(texts, views, strict=True):
            check_words(text, self.tokenizer, self._control_ids)
            counts = [next(lengths) for _ in sample]
            images = "".join(
                prompt.get("image_prefix", "") + prompt["image_token"] * count + prompt.get("image_suffix", "")
                for count in counts
            )
            filled = prompt["template"].replace("{images}", images).replace("{instruction}", text.strip())
            ids = np.array(self.tokenizer(filled, add_special_tokens=False)["input_ids"])
            mask = np.ones_like(ids)
            mask[ids == self.image_token_id] = np.repeat([present for _, present in sample], counts)
            rows.append(ids.tolist())
            masks.append(mask.tolist())
        data["input_ids"], data["attention_mask"] = padded(rows, self.tokenizer.pad_token_id or 0), padded(masks, 0)
        return data

    def _image_lengths(self, num_images, image_grid_thw) -> list[int]:
        length = self.prompt_config["image_seq_length"]
        if length is not None:
            return [length] * num_images
        if image_grid_thw is None:
            raise ValueError(
                f"{type(self.image_processor).__name__} does not tell how many tokens an image takes: give "
                "prompt_config['image_seq_length']."
            )
        return (image_grid_thw.prod(-1) // self.image_processor.merge_size**2).tolist()


def _known_prompt(config: TinyVLAConfig) -> dict[str, str]:
    model_type = config.backbone_config.model_type
    pythia = config.get_text_config().model_type == "gpt_neox"
    return PROMPTS.get(model_type, {}) if pythia or model_type != "llava" else {}


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


def _image_token(tokenizer, config: TinyVLAConfig, wanted: str | None) -> str:
    token = tokenizer.added_tokens_decoder.get(config.image_token_id)
    if token is None:
        raise ValueError(
            f"Expected an added token for images with the config's id {config.image_token_id}, but the tokenizer has "
            f"{tokenizer.convert_ids_to_tokens(config.image_token_id)!r} there: set backbone_config's image token id "
            "to the tokenizer's."
        )
    if wanted not in (None, token.content):
        raise ValueError(
            f"Expected the image token {token.content!r} in prompt_config, whose id is the config's, got {wanted!r}."
        )
    return token.content


def _take_pictures_whole(image_processor) -> None:
    """One camera, one picture, which is not enlarged for pieces that nobody cuts."""
    if getattr(image_processor, "do_image_splitting", False) and hasattr(image_processor, "max_image_size"):
        image_processor.size = image_processor.max_image_size
    for name in TILINGS:
        if hasattr(image_processor, name):
            setattr(image_processor, name, False)


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, dict) or not {"template", "image_token", "image_seq_length"} <= prompt.keys():
        raise ValueError(f"Expected a prompt_config with {list(PROMPT_KEYS)}, got {prompt!r}.")
    if unknown := sorted(prompt.keys() - set(PROMPT_KEYS)):
        raise ValueError(f"Unknown keys {unknown} in prompt_config; known are {list(PROMPT_KEYS)}.")
    for field in ("{images}", "{instruction}"):
        if prompt["template"].count(field) != 1:
            raise ValueError(f"Expected {field} once in prompt_config['template'], got {prompt['template']!r}.")


def _check_tokens(prompt: dict[str, Any], tokenizer) -> None:
    for name in ("template", "image_prefix", "image_suffix"):
        for token in re.findall(r"<[^<>\s]+>", prompt.get(name, "")):
            ids = tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"Expected {token} of prompt_config[{name!r}] to be one token, but the tokenizer does not know "
                    "it: is the prompt that of another model?"
                )
