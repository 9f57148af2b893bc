"""A whole training run, from recipe to checkpoint."""

from collections.abc import Sequence

from transformers import TrainerCallback, set_seed

from hf_vla.data.collator import VLACollator
from hf_vla.training.builders.registry import build
from hf_vla.training.callbacks import SeedOfProcess
from hf_vla.training.checkpoints import check_same_model, check_same_robot, checkpoint_to_resume
from hf_vla.training.datasets import open_dataset
from hf_vla.training.recipe import Recipe
from hf_vla.training.trainer import VLATrainer


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, float]:
    """Train as a recipe says; model and processor are saved in `recipe.training.output_dir`.

    Args:
        recipe (`Recipe`): see [`~hf_vla.training.recipe.load_recipe`].
        callbacks (`Sequence[TrainerCallback]`): called by the Trainer beside its own.

    Returns:
        `dict[str, float]`: the last evaluation's metrics; the training's where no episodes are held out.

    Raises:
        ValueError: the recipe, the dataset and the checkpoint do not fit together.
    """
    data = recipe.data
    set_seed(recipe.training.seed)  # a new model's weights
    dataset, train_set, eval_set = open_dataset(data)
    model, processor = build(recipe, dataset, train_set)
    cameras = [camera.name for camera in data.cameras]
    trainer = VLATrainer(
        model=model,
        args=recipe.training,
        data_collator=VLACollator(processor, data.unnorm_key, cameras, data.state is not None, data.reasoning),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
        camera_dropout=data.camera_dropout,
        callbacks=[SeedOfProcess(), *callbacks],
    )
    checkpoint = checkpoint_to_resume(recipe.training)
    if checkpoint is not None:
        check_same_robot(checkpoint, processor)
        check_same_model(checkpoint, model.config)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if eval_set is not None:
        metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return metrics
