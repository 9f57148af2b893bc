"""Processors of models that are built on any image-text-to-text model: its prompt, pictures and tokens."""

import copy
import re
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from hf_vla.models.backbones import num_image_tokens
from hf_vla.models.batches import check_words, control_ids, token_id
from hf_vla.models.processing import ContinuousActionProcessor

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
PROMPT_KEYS = ("template", "image_prefix", "image_token", "image_suffix", "image_seq_length", "image_size")


class PromptProcessor(ContinuousActionProcessor):
    """Everything outside the network: pixels, prompt, normalisation of states and actions.

    Args:
        image_processor (`BaseImageProcessor`): the backbone's.
        tokenizer (`PreTrainedTokenizerFast`): the backbone's, with the image token.
        statistics (`dict`, *optional*): `{unnorm_key: {"action": {"min": [...], ...}, "state": {...}}}`.
        action_config (`dict`, *optional*): chunk size, normalisations and specs, see
            [`~hf_vla.actions.codec.ActionCodec`]. With `"state_normalization"` every call needs a state.
        camera_config (`dict`, *optional*): `{unnorm_key: [CameraSpec.to_dict(), ...]}`, in the order in which the
            cameras' images enter the prompt; the key `"default"` serves every dataset that has no cameras of its own.
        prompt_config (`dict`): `"template"`, a text with `{images}` and `{instruction}`; `"image_token"`, which stands
            `"image_seq_length"` times for an image (None: as often as its `image_grid_thw` says); `"image_prefix"` and
            `"image_suffix"` around these, `""` by default; `"image_size"`, the width and height in pixels to which
            every picture is resized before the image processor sees it (None, the default: it stays as it is).
        chat_template (`str`, *optional*): unused, kept for `ProcessorMixin`.
    """

    own_prompt: ClassVar[dict[str, str]] = {}  # entries of prompt_config that a family alone has, by default

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
        _check_prompt(prompt_config, (*PROMPT_KEYS, *self.own_prompt))
        super().__init__(image_processor, tokenizer, statistics, action_config, camera_config, chat_template)
        _check_tokens(prompt_config, tokenizer)
        self.image_token_id = token_id(tokenizer, prompt_config["image_token"])
        self._control_ids = control_ids(tokenizer, self.image_token_id)

    @classmethod
    def from_backbone(
        cls,
        processor,
        config,
        statistics: dict | None,
        action_config: dict,
        camera_config: dict | None,
        prompt_config: dict | None = None,
        **others,
    ):
        """Processor of a pretrained vision-language model, which keeps its image processing, tokens and prompt.

        Args:
            processor (`ProcessorMixin`): of the vision-language model, or anything else that has an `image_processor`
                and a `tokenizer`; copied, not changed. A `PromptProcessor` keeps its prompt, too, without what only
                its own family has.
            config (`PreTrainedConfig`): the family's, with the model's own `backbone_config`.
            statistics, action_config, camera_config (`dict`): see the class.
            prompt_config (`dict`, *optional*): entries that replace those known for the model, see the class; in them
                `{bos}` and `{eos}` stand for the tokenizer's.
            others: what else the family's class takes.

        Raises:
            ValueError: the config's ids are not the tokenizer's, its sizes not those of the actions and states, or it
                does not tell the prompt or the number of image tokens.
        """
        if not isinstance(prompt_config, (dict, type(None))):
            raise ValueError(f"Expected prompt_config to be a dictionary, got {prompt_config!r}.")
        prompt = cls.own_prompt | getattr(processor, "prompt_config", _known_prompt(config))
        prompt = {key: prompt[key] for key in (*PROMPT_KEYS, *cls.own_prompt) if key in prompt} | (prompt_config or {})
        if "template" not in prompt:
            raise ValueError(
                f"No prompt is known for a backbone {config.backbone_config.model_type!r} with a language model "
                f"{config.get_text_config().model_type!r}, only for {sorted(PROMPTS)} (Llava with GPT-NeoX): give "
                "prompt_config with a template, and what the model puts around its image tokens."
            )
        tokenizer, image_processor = copy.deepcopy(processor.tokenizer), copy.deepcopy(processor.image_processor)
        _take_pictures_whole(image_processor)
        for field in ("bos", "eos"):
            token = getattr(tokenizer, f"{field}_token") or ""
            prompt |= {key: text.replace(f"{{{field}}}", token) for key, text in _texts(prompt)}
        prompt["image_token"] = _image_token(tokenizer, config, prompt.get("image_token"))
        if "image_seq_length" not in prompt:
            prompt["image_seq_length"] = num_image_tokens(config.backbone_config)
        _check_prompt(prompt, (*PROMPT_KEYS, *cls.own_prompt))
        cls.complete_prompt(prompt, tokenizer, config)
        made = cls(image_processor, tokenizer, statistics, action_config, camera_config, prompt, **others)
        made.check_sizes(config)
        return made

    @classmethod
    def complete_prompt(cls, prompt: dict[str, Any], tokenizer, config) -> None:
        """Add what a family has of its own to a prompt and its tokenizer, both changed in place; nothing by default.

        Args:
            prompt (`dict`): a prompt_config.
            tokenizer (`PreTrainedTokenizerFast`): of the new processor.
            config (`PreTrainedConfig`): the family's.

        Raises:
            ValueError: the tokenizer's ids are not the config's.
        """

    def check_sizes(self, config) -> None:
        """Check that a model predicts the actions and takes the states that the statistics are of.

        Args:
            config (`PreTrainedConfig`): the model's.

        Raises:
            ValueError: it does not.
        """
        codec = self.action_codec
        sizes = [
            ("a chunk_size", codec.chunk_size, config.chunk_size),
            ("n_obs_steps", codec.n_obs_steps, getattr(config, "n_obs_steps", 1)),
        ]
        for key in codec.keys:
            state_dim = codec.state_normalizer(key).action_dim if codec.takes_state else None
            wanted_action_dim, wanted_state_dim = self.robot_sizes(config, key)
            for name, size, padded, wanted in (
                ("an action_dim", codec.normalizer(key).action_dim, codec.action_dim, wanted_action_dim),
                ("a state_dim", state_dim, codec.state_dim, wanted_state_dim),
            ):
                sizes.append((f"{name} of {key!r}", padded if self.pads and padded == wanted else size, wanted))
        for name, size, expected in sizes:
            if size != expected:
                hint = ""
                if self.pads and "_dim" in name and None not in (size, expected) and size < expected:
                    hint = f" To pad it, set action_config[{name.split()[1]!r}] to {expected}."
                raise ValueError(
                    f"Expected {name} of {expected}, as the config says, got {size} in action_config and "
                    f"statistics.{hint}"
                )

    def robot_sizes(self, config, unnorm_key: str) -> tuple[int, int | None]:
        """action_dim and state_dim of a dataset's robot, as the model's configuration has them."""
        return config.action_dim, config.state_dim

    def fill_prompts(
        self, views: list[list[tuple[Image.Image, bool]]], texts: list[str]
    ) -> tuple[dict[str, np.ndarray], list[list[int]], list[list[int]]]:
        """Resize the pictures and fill the template; whatever the image processor returns is handed on.

        Nothing attends to the image tokens of a missing camera.

        Args:
            views (`list[list[tuple]]`): for each sample, step and camera an RGB picture and whether it is there.
            texts (`list[str]`): instructions.

        Returns:
            `tuple`: `pixel_values` and whatever else the image processor makes, and of each sample the tokens' ids and
            their mask, unpadded.

        Raises:
            ValueError: an instruction is no text or holds control tokens, or an image's tokens cannot be counted.
        """
        pictures = [[self._resized(image) for image, _ in sample] for sample in views]
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
        return data, rows, masks

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self.prompt_config.get("image_size")
        return image if size is None else image.resize(tuple(size), Image.Resampling.BICUBIC)

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


def _known_prompt(config) -> dict[str, str]:
    model_type = config.backbone_config.model_type
    pythia = config.get_text_config().model_type == "gpt_neox"
    return PROMPTS.get(model_type, {}) if pythia or model_type != "llava" else {}


def _image_token(tokenizer, config, wanted: str | None) -> str:
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


def _check_prompt(prompt: Any, known: tuple[str, ...]) -> None:
    if not isinstance(prompt, dict) or not {"template", "image_token", "image_seq_length"} <= prompt.keys():
        raise ValueError(f"Expected a prompt_config with {list(known)}, got {prompt!r}.")
    if unknown := sorted(prompt.keys() - set(known)):
        raise ValueError(f"Unknown keys {unknown} in prompt_config; known are {list(known)}.")
    for name, value in prompt.items():
        if name not in ("image_seq_length", "image_size") and not isinstance(value, str):
            raise ValueError(f"Expected a text in prompt_config[{name!r}], got {value!r}.")
    length, size = prompt["image_seq_length"], prompt.get("image_size")
    if length is not None and not _are_counts([length]):
        raise ValueError(
            f"Expected a number of tokens, or None, in prompt_config['image_seq_length'], got {length!r}."
        )
    if size is not None and not (isinstance(size, (list, tuple)) and len(size) == 2 and _are_counts(size)):
        raise ValueError(f"Expected [width, height] in pixels, or None, in prompt_config['image_size'], got {size!r}.")
    for field in ("{images}", "{instruction}"):
        if prompt["template"].count(field) != 1:
            raise ValueError(f"Expected {field} once in prompt_config['template'], got {prompt['template']!r}.")


def _are_counts(values) -> bool:
    return all(type(value) is int and value > 0 for value in values)


def _texts(prompt: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, text) for key, text in prompt.items() if isinstance(text, str)]


def _check_tokens(prompt: dict[str, Any], tokenizer) -> None:
    for name, text in _texts(prompt):
        for token in re.findall(r"<[^<>\s]+>", text):
            ids = tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"Expected {token} of prompt_config[{name!r}] to be one token, but the tokenizer does not know "
                    "it: is the prompt that of another model?"
                )
