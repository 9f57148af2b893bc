"""Every family that a recipe can train, by model type."""

from pathlib import Path

from transformers import AutoConfig

from hf_vla.models.base import BASE, base_of_adapter, check_folder
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.divla import build_divla
from hf_vla.training.builders.pi0_vla import build_pi0_vla
from hf_vla.training.builders.spatialvla import build_spatialvla
from hf_vla.training.builders.tinyvla import build_tinyvla
from hf_vla.training.checkpoints import check_same_model
from hf_vla.training.datasets import OpenDataset
from hf_vla.training.facts import data_facts
from hf_vla.training.optimization import SPATIAL_EMBEDDING, freeze_backbone
from hf_vla.training.recipe import Recipe
from hf_vla.training.saving import publish, staging_folder

BUILDERS = {
    "divla": build_divla,
    "pi0_vla": build_pi0_vla,
    "spatialvla": build_spatialvla,
    "tinyvla": build_tinyvla,
}


def build(recipe: Recipe, datasets: list[OpenDataset], checkpoint: str | None = None):
    """Make or load the model, and the processor that knows the datasets' statistics, robots and cameras.

    Args:
        recipe (`Recipe`): what to make.
        datasets (`list[OpenDataset]`): to train on.
        checkpoint (`str`, *optional*): folder that the training goes on from; its weights are not loaded yet, but for
            those of the model that its adapters were added to.

    Returns:
        `tuple`: the model, with adapters where the recipe asks for them, and the processor.

    Raises:
        ValueError: the family is unknown or not the checkpoint's, or recipe and data do not suit it.
    """
    arguments, name = recipe.model, family(recipe.model)
    model, processor = BUILDERS[name](arguments, data_facts(recipe.data, datasets))
    if code := getattr(model.config, "auto_map", None):  # a new processor stays with the code of its model
        processor.auto_map = dict(code)
    if arguments.tune == "head":
        freeze_backbone(model, is_new=arguments.path is None)
    if arguments.lora is None:
        return model, processor
    from hf_vla.training.lora import add_lora  # takes seconds to import

    base = Path(recipe.training.output_dir, BASE).resolve()
    if arguments.path is None or arguments.decoding is not None:
        model = _with_base(recipe, model, processor, base, checkpoint)
    elif base.exists():
        raise ValueError(
            f"{base} is what another training's adapters were added to, and would be taken for {arguments.path!r}: "
            "choose another training.output_dir, or delete that one."
        )
    lora = arguments.lora
    in_full = [SPATIAL_EMBEDDING] if arguments.adapt_grid else []
    return add_lora(model, lora.r, lora.alpha, lora.dropout, lora.parts, in_full), processor


def _with_base(recipe, model, processor, base, checkpoint):
    """Save a new model, since an adapter is saved with the name of its base model; return the one to adapt.

    The adapters of a checkpoint belong to the head that was saved with them, which another seed would not draw again.
    """
    saved = None
    if checkpoint is not None:
        check_same_model(checkpoint, model.config)
        if (saved := base_of_adapter(Path(checkpoint))) is None:
            raise ValueError(f"{checkpoint} holds whole weights, no adapters: leave model.lora out to go on with it.")
        subfolder = "" if Path(saved).is_dir() else BASE  # on the Hub, adapters lie above it
        model = type(model).from_pretrained(saved, dtype=recipe.model.dtype, subfolder=subfolder)
    if recipe.training.should_save and (saved is None or Path(saved).resolve() != base):
        staged = staging_folder(base.parent) / BASE
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        publish(staged, base)
    model.name_or_path = str(base)
    return model


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
