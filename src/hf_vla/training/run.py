"""A whole training run, from recipe to checkpoint."""

import logging
from collections.abc import Callable, Sequence

from torch.utils.data import Sampler
from transformers import TrainerCallback, set_seed

from hf_vla.data.collator import VLACollator
from hf_vla.data.mixture import Mixture, MixtureSampler
from hf_vla.data.sampling import WindowSampler
from hf_vla.training.builders.registry import build
from hf_vla.training.callbacks import SeedOfProcess, StopOnTermination
from hf_vla.training.checkpoints import checkpoint_to_resume
from hf_vla.training.datasets import OpenDataset, join, open_datasets, write_report
from hf_vla.training.recipe import Recipe
from hf_vla.training.summary import training_summary
from hf_vla.training.trainer import VLATrainer

logger = logging.getLogger(__name__)

MAX_OPEN = 32  # windows that a worker reads side by side; fewer decoders than VideoFrames keeps open


def train(
    recipe: Recipe, callbacks: Sequence[TrainerCallback] = (), write_card: Callable | None = None
) -> dict[str, float]:
    """Train as a recipe says; model and processor are saved in `recipe.training.output_dir`.

    Args:
        recipe (`Recipe`): see [`~hf_vla.training.recipe.load_recipe`].
        callbacks (`Sequence[TrainerCallback]`): called by the Trainer beside its own.
        write_card (`Callable`, *optional*): of the model card where the model is pushed, see
            [`~hf_vla.training.durable.DurableTrainer`].

    Returns:
        `dict[str, float]`: the last evaluation's metrics; the training's where no episodes are held out.

    Raises:
        ValueError: the recipe, the dataset and the checkpoint do not fit together.
    """
    data = recipe.data
    set_seed(recipe.training.seed)  # a new model's weights
    datasets = open_datasets(data)
    if recipe.training.should_save:
        write_report(datasets, recipe.training.output_dir)
    checkpoint = checkpoint_to_resume(recipe.training)
    model, processor = build(recipe, datasets, checkpoint)
    train_set, eval_set = join(data, datasets)
    with_state = data.datasets[0].state is not None  # all of them have one, or none
    collator = VLACollator(
        processor, None, data.roles, with_state, data.reasoning, hold_tail=data.chunk_tail == "hold"
    )
    trainer = VLATrainer(
        model=model,
        args=recipe.training,
        data_collator=collator,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
        train_sampler=sampler(recipe, datasets, train_set),
        camera_dropout=data.camera_dropout,
        state_dropout=data.state_dropout,
        callbacks=[SeedOfProcess(), StopOnTermination(), *callbacks],
        recipe=recipe,
        summary=training_summary(recipe, datasets, model),
        write_card=write_card,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if eval_set is not None:
        metrics = _evaluated(trainer) or trainer.evaluate()
        logger.info("The model that is saved: %s", {name: round(value, 4) for name, value in metrics.items()})
    trainer.save_model()
    trainer.save_state()
    return metrics


def _evaluated(trainer: VLATrainer) -> dict[str, float]:
    """Metrics of the final weights where the training has just measured them; {} elsewhere."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    if last.get("step") != trainer.state.global_step or trainer.args.load_best_model_at_end:
        return {}
    return {name: value for name, value in last.items() if name != "step"}


def sampler(recipe: Recipe, datasets: list[OpenDataset], train_set: Mixture) -> Sampler | None:
    """Order of the training rows; None for the Trainer's own, which draws every row once an epoch."""
    data, training = recipe.data, recipe.training
    batch_size = training.train_batch_size
    seed = training.seed if training.data_seed is None else training.data_seed
    if data.shuffle == "windows":
        lanes = max(1, training.dataloader_num_workers) * training.world_size
        orders = []
        for place, (opened, share) in enumerate(zip(datasets, train_set.shares.values(), strict=True)):
            num_open = min(MAX_OPEN, max(1, round(batch_size * share)))  # as many as there are rows of it in a batch
            orders.append(WindowSampler(opened.learnt_starts, num_open=num_open, lanes=lanes, seed=(seed, place)))
        return MixtureSampler(train_set, seed, orders, lanes, batch_size)
    if all(dataset.weight == 1 for dataset in data.datasets) and data.balance == "size":
        return None
    return MixtureSampler(train_set, seed)
