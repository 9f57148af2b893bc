"""Tiny image-text-to-text models of every architecture, and a robot, which families are tested on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from hf_vla.models.byte_tokenizer import byte_tokenizer

ACTION_DIM, STATE_DIM, CHUNK_SIZE, IMAGE_SIZE, IMAGE_TOKEN = 3, 2, 4, 28, 259
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**LAYERS, "image_size": IMAGE_SIZE, "patch_size": 7}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
TEXT = {**LAYERS, **SPECIAL, "vocab_size": 300, "max_position_embeddings": 512}
GROUPED = {**TEXT, "num_key_value_heads": 2}
FOCUS = ["<fake_token_around_image>", "<global-img>", "<|im_start|>", "<|begin_of_text|>", "<end_of_utterance>"]
QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]


def llava(vision_config, **options):
    text_config = {**TEXT, "model_type": "gpt_neox"}
    vision = {"vision_config": vision_config, "text_config": text_config, "image_token_index": IMAGE_TOKEN}
    return {"model_type": "llava", **vision, **options}


def idefics(model_type):
    vision_config = {**VISION, "model_type": f"{model_type}_vision"}
    text_config = {**GROUPED, "model_type": "llama"}
    both = {"vision_config": vision_config, "text_config": text_config}
    return {"model_type": model_type, **both, "image_token_id": IMAGE_TOKEN, "scale_factor": 2}


def qwen(model_type, vision_config):
    text_config = {
        **GROUPED,
        "model_type": f"{model_type}_text",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 2, "num_heads": 4, "hidden_size": 32, "patch_size": 7, **vision_config}
    both = {"vision_config": vision, "text_config": text_config}
    return {"model_type": model_type, **both, "image_token_id": 260, "video_token_id": 261}


# backbone's configuration, its image processor, special tokens beside the byte tokenizer's
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
SQUARE = {"size": SIZE, "do_pad": True, "do_center_crop": False}
NATIVE = {"patch_size": 7, "size": {"shortest_edge": 14 * 14, "longest_edge": 42 * 42}}
SPLIT = {"size": {"longest_edge": 2 * IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
BACKBONES = {
    "llava_clip": (llava({**VISION, "model_type": "clip_vision_model"}), LlavaImageProcessorPil(**SQUARE), []),
    "llava_siglip": (
        llava(SIGLIP, vision_feature_layer=-1, vision_feature_select_strategy="full"),
        SiglipImageProcessorPil(size=SIZE),
        [],
    ),
    "paligemma": (
        {
            "model_type": "paligemma",
            "vision_config": SIGLIP,
            "text_config": {**GROUPED, "model_type": "gemma", "head_dim": 8},
            "projection_dim": 32,
            "image_token_index": IMAGE_TOKEN,
        },
        SiglipImageProcessorPil(size=SIZE),
        [],
    ),
    "idefics3": (idefics("idefics3"), Idefics3ImageProcessorPil(**SPLIT), FOCUS),
    "smolvlm": (idefics("smolvlm"), SmolVLMImageProcessorPil(**SPLIT), FOCUS),
    "qwen2_vl": (qwen("qwen2_vl", {"embed_dim": 32}), Qwen2VLImageProcessorPil(**NATIVE), QWEN),
    "qwen2_5_vl": (
        qwen(
            "qwen2_5_vl",
            {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 28, "fullatt_block_indexes": [1]},
        ),
        Qwen2VLImageProcessorPil(**NATIVE),
        QWEN,
    ),
    "gemma3": (
        {
            "model_type": "gemma3",
            "vision_config": SIGLIP,
            "text_config": {
                **GROUPED,
                "model_type": "gemma3_text",
                "head_dim": 8,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE_TOKEN,
            "boi_token_id": 260,
            "eoi_token_id": 261,
        },
        Gemma3ImageProcessorPil(size=SIZE, do_pan_and_scan=True, pan_and_scan_min_crop_size=8),
        ["<start_of_image>", "<end_of_image>"],
    ),
    "idefics2": (
        {
            "model_type": "idefics2",
            "vision_config": {**VISION, "model_type": "idefics2_vision"},
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            "text_config": {**GROUPED, "model_type": "mistral"},
            "image_token_id": IMAGE_TOKEN,
        },
        Idefics2ImageProcessorPil(do_image_splitting=True, size={"shortest_edge": 28, "longest_edge": 28}),
        FOCUS,
    ),
    "internvl": (
        {
            "model_type": "internvl",
            "vision_config": {
                **VISION,
                "model_type": "internvl_vision",
                "image_size": [IMAGE_SIZE, IMAGE_SIZE],
                "patch_size": [7, 7],
            },
            "text_config": {**GROUPED, "model_type": "qwen2"},
            "image_token_id": IMAGE_TOKEN,
            "downsample_ratio": 0.5,
        },
        GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=True, min_patches=2, max_patches=4),
        ["<img>", "</img>"],
    ),
}
# of those whose prompt is not known
PROMPTS = {
    "gemma3": {"image_prefix": "<start_of_image>", "image_suffix": "<end_of_image>"},
    "idefics2": {"image_prefix": FOCUS[0], "image_suffix": FOCUS[0]},
    "internvl": {"image_prefix": "<img>", "image_suffix": "</img>"},
}
STATISTICS = {
    "robot": {
        "action": {"min": [-1.0, 0.0, 0.0], "max": [1.0, 2.0, 4.0]},
        "state": {"mean": [0.0, 1.0], "std": [1.0, 2.0]},
    }
}
ACTION_CONFIG = {
    "chunk_size": CHUNK_SIZE,
    "normalization": {"mode": "min_max", "convention": "tinyvla"},
    "state_normalization": {"mode": "mean_std", "convention": "tinyvla"},
}
CAMERAS = {
    "robot": [{"name": "front", "width": 40, "height": 30}, {"name": "wrist", "width": 28, "height": 28}],
}


def vlm_processor(backbone):
    """What stands for a pretrained VLM's own processor."""
    _, image_processor, tokens = BACKBONES[backbone]
    tokenizer = byte_tokenizer(0)
    tokenizer.add_tokens(tokens, special_tokens=True)
    return SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def backbones():
    """By name: configuration, something like the pretrained model's own processor, and prompt where none is known."""
    return {
        name: SimpleNamespace(
            config=config,
            processor=vlm_processor(name),
            prompt={"template": "{bos}{images}{instruction}", **PROMPTS[name]} if name in PROMPTS else None,
        )
        for name, (config, _, _) in BACKBONES.items()
    }


@pytest.fixture(scope="session")
def robot():
    """Its sizes, as a configuration takes them, and what a processor has to know of it."""
    sizes = {"action_dim": ACTION_DIM, "state_dim": STATE_DIM, "chunk_size": CHUNK_SIZE}
    return SimpleNamespace(sizes=sizes, processor=(STATISTICS, ACTION_CONFIG, CAMERAS))


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request):
    """The name of every one."""
    return request.param


@pytest.fixture
def pictures():
    """Two of the front camera, two of the wrist camera."""
    rng = np.random.default_rng(0)
    front, wrist = (rng.integers(0, 255, (2, *size, 3), np.uint8) for size in ((30, 40), (28, 28)))
    return [{"front": front[index], "wrist": wrist[index]} for index in range(2)]


@pytest.fixture
def chunks():
    """Actions of two samples in robot units."""
    return np.random.default_rng(1).uniform(0.0, 1.0, (2, CHUNK_SIZE, ACTION_DIM))


@pytest.fixture(scope="session")
def few_steps():
    """Train a model on one batch."""

    def make(model, batch, steps=4):
        optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
        for _ in range(steps):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return make
