from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Qwen2VLForConditionalGeneration, set_seed
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hf_vla.data.collator import VLACollator
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import join, open_datasets
from hf_vla.training.recipe import load_recipe
from hf_vla.training.trainer import VLATrainer

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


@pytest.fixture(scope="session")
def make_recipe(demos):
    """A recipe, made short: two episodes held out, four rows a step, a checkpoint every three steps."""

    def make(output_dir, recipe="spatialvla_tiny", **overrides):
        short = {
            "data.source": str(demos),
            "data.eval_episodes": [3, 7],
            "training.output_dir": str(output_dir),
            "training.max_steps": 6,
            "training.per_device_train_batch_size": 4,
            "training.warmup_steps": 0,
            "training.logging_steps": 1,
            "training.eval_strategy": "no",
            "training.eval_action_samples": 6,
            "training.save_steps": 3,
            "training.disable_tqdm": True,
            "training.estimate_memory": False,  # a second
        }
        overrides = {name.replace("__", "."): value for name, value in overrides.items()}
        return load_recipe(RECIPES / f"{recipe}.yaml", short | overrides)

    return make


@pytest.fixture(scope="session")
def make_trainer(make_recipe):
    """The trainer of a short recipe, two rows a step, not yet started."""

    def make(output_dir, recipe="spatialvla_tiny", **overrides):
        options = {"training__per_device_train_batch_size": 2, "training__save_strategy": "no"}
        recipe = make_recipe(output_dir, recipe, **(options | overrides))
        set_seed(recipe.training.seed)
        datasets = open_datasets(recipe.data)
        model, processor = build(recipe, datasets)
        train_set, eval_set = join(recipe.data, datasets)
        with_state = recipe.data.state is not None
        return VLATrainer(
            model=model,
            args=recipe.training,
            data_collator=VLACollator(processor, None, recipe.data.roles, with_state, recipe.data.reasoning),
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=processor,
        )

    return make


@pytest.fixture(scope="session")
def small_head():
    """Configuration of a diffusion head of few channels, instead of the published one's."""
    return {"head_config": {"type": "diffusion", "denoiser": {"type": "conditional_unet1d", "down_dims": [16, 32]}}}


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    """A saved, untrained tiny vision-language model of transformers with its processor: no model of ours."""
    config = TinyVLAConfig.from_preset("tiny").backbone_config
    config.text_config.vocab_size = 260  # no room for readout tokens
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vlm")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    image_processor = LlavaImageProcessorPil(size={"height": 84, "width": 84}, do_pad=True, do_center_crop=False)
    LlavaProcessor(image_processor, byte_tokenizer(0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A saved, untrained tiny Qwen2-VL of transformers with its tokens and image processor."""
    config = DiVLAConfig.from_preset("tiny").backbone_config
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = byte_tokenizer(0)
    tokens = ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 84**2}).save_pretrained(folder)
    return folder
