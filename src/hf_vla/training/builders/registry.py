"""Every family that a recipe can train, by model type."""

from pathlib import Path

from transformers import AutoConfig

from hf_vla.models.base import check_folder
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.divla import build_divla
from hf_vla.training.builders.pi0_vla import build_pi0_vla
from hf_vla.training.builders.spatialvla import build_spatialvla
from hf_vla.training.builders.tinyvla import build_tinyvla
from hf_vla.training.datasets import OpenDataset
from hf_vla.training.facts import data_facts
from hf_vla.training.optimization import SPATIAL_EMBEDDING, freeze_backbone
from hf_vla.training.recipe import Recipe

BUILDERS = {
    "divla": build_divla,
    "pi0_vla": build_pi0_vla,
    "spatialvla": build_spatialvla,
    "tinyvla": build_tinyvla,
}


def build(recipe: Recipe, datasets: list[OpenDataset]):
    """Make or load the model, and the processor that knows the datasets' statistics, robots and cameras.

    Returns:
        `tuple`: the model, with adapters where the recipe asks for them, and the processor.

    Raises:
        ValueError: the family is unknown or not the checkpoint's, or recipe and data do not suit it.
    """
    arguments, name = recipe.model, family(recipe.model)
    model, processor = BUILDERS[name](arguments, data_facts(recipe.data, datasets))
    if arguments.tune == "head":
        freeze_backbone(model)
    if arguments.lora is None:
        return model, processor
    from hf_vla.training.lora import add_lora  # takes seconds to import

    if arguments.path is None:
        # An adapter is saved with the name of its base model, and a pretrained VLM with a new head is a new one.
        base = Path(recipe.training.output_dir, "base").resolve()
        if recipe.training.resume_from_checkpoint and (base / "processor_config.json").is_file():
            # The checkpoint's adapters belong to the head that is there, which another seed would not draw again.
            model = type(model).from_pretrained(base, dtype=arguments.dtype)
        elif recipe.training.should_save:
            model.save_pretrained(base)
            processor.save_pretrained(base)
        model.name_or_path = str(base)
    lora = arguments.lora
    in_full = [SPATIAL_EMBEDDING] if arguments.adapt_grid else []
    return add_lora(model, lora.r, lora.alpha, lora.dropout, lora.parts, in_full), processor


def family(arguments: ModelArguments) -> str:
    """Model type that the recipe trains: its checkpoint's, or what it says.

    Raises:
        FileNotFoundError: a folder that is named is not there.
        ValueError: it is unknown, not the checkpoint's, or the checkpoint is an adapter.
    """
    name = arguments.family
    for source in ("path", "backbone"):
        folder = getattr(arguments, source)
        if folder is None:
            continue
        check_folder(folder, f"model.{source} {folder!r}")
        if Path(folder, "adapter_config.json").is_file():
            raise ValueError(
                f"model.{source} {folder!r} is an adapter, which a new training would drop: resume its own run, or "
                "merge it into its base model (PeftModel.merge_and_unload), save that with its processor and name it "
                "here."
            )
    if arguments.path is not None:
        name = AutoConfig.from_pretrained(arguments.path).model_type
        if arguments.family not in (None, name):
            raise ValueError(
                f"model.path {arguments.path!r} is a {name}, model.family says {arguments.family}: leave that out."
            )
    if name not in BUILDERS:
        raise ValueError(f"No recipe can train the family {name!r}; there are {sorted(BUILDERS)}.")
    return name
