"""Training: the Hugging Face Trainer with the processor beside every checkpoint and an error in robot units."""

import inspect
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec
from hf_vla.actions.statistics import ActionStatistics
from hf_vla.actions.tokenizers.gaussian_grid import NUM_BINS, GaussianGridTokenizer
from hf_vla.data import schema
from hf_vla.data.collator import VLACollator
from hf_vla.data.lerobot import LeRobotEpisodes, local_folder
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor
from hf_vla.training.arguments import CameraArguments, DataArguments, GridArguments, ModelArguments, Recipe

logger = logging.getLogger(__name__)


class VLATrainer(Trainer):
    """[`~transformers.Trainer`] whose evaluation also predicts actions and measures how far off they are.

    `processing_class` is the processor, `data_collator` a [`~hf_vla.data.collator.VLACollator`]. Metrics are in robot
    units, see [`action_error`], over `args.eval_action_samples` frames of the evaluation set.
    """

    def _issue_warnings_after_load(self, load_result):
        """Raise where the Trainer only warns: a weight that a checkpoint lacks would stay random."""
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
        if missing := [key for key in load_result.missing_keys if key not in tied]:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of the model, among them {missing[:5]}: it was saved by "
                "another version or of another model. Start a new run with model.path set to it."
            )

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Ask models that score a vocabulary for one position's logits: the loss has its own, the rest is memory."""
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            inputs = {**inputs, "logits_to_keep": 1}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """Add the action errors to the loss that the Trainer computes."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        errors = self.action_errors(dataloader.dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in errors.items()})
        return output

    def action_errors(self, dataset) -> dict[str, float]:
        """Predict the chunks of some frames of a dataset and compare them with the recorded ones."""
        count = min(len(dataset), self.args.eval_action_samples)
        if count == 0:
            return {}
        rows = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
        collator, model = self.data_collator, self.accelerator.unwrap_model(self.model)
        loader = self.accelerator.prepare(
            DataLoader(Subset(dataset, rows), batch_size=self.args.eval_batch_size, collate_fn=collator.prompts)
        )
        parts = []
        for batch in loader:
            output = model.predict_action(**batch["inputs"])
            predicted = self.processing_class.decode_actions(output, collator.unnorm_key)
            predicted = torch.from_numpy(predicted).to(batch["actions"].device)
            parts.append(self.accelerator.gather_for_metrics((predicted, batch["actions"], batch["action_mask"])))
        predicted, actions, mask = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        spec, _ = self.processing_class.action_codec.specs(collator.unnorm_key)
        return action_error(predicted, actions, mask, spec)


def action_error(
    predicted: np.ndarray, actions: np.ndarray, action_mask: np.ndarray, spec: ActionSpec | None = None
) -> dict[str, float]:
    """Mean absolute error over the actions that are real.

    Args:
        predicted, actions (`np.ndarray` of shape `(batch_size, chunk_size, action_dim)`): robot units.
        action_mask (`np.ndarray` of shape `(batch_size, chunk_size)`): True where an action is real.
        spec (`ActionSpec`, *optional*): tells which dimensions belong together.

    Returns:
        `dict[str, float]`: "action_error" over all dimensions and, with a spec, "action_error_translation",
        "action_error_rotation", "action_error_joints" and "action_error_gripper" where it has them.
    """
    error = np.abs(np.asarray(predicted, np.float64) - actions)[action_mask].mean(0)
    groups = {"action_error": list(range(len(error)))}
    if spec is not None:
        body = [index for index in groups["action_error"] if spec.gripper is None or index != spec.gripper.index]
        if spec.kind == "joint":
            groups["action_error_joints"] = body
        else:
            groups |= {"action_error_translation": body[:3], "action_error_rotation": body[3:]}
        groups["action_error_gripper"] = [] if spec.gripper is None else [spec.gripper.index]
    return {name: float(error[dimensions].mean()) for name, dimensions in groups.items() if dimensions}


def train(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, float]:
    """Train as a recipe says; model and processor are saved in `recipe.training.output_dir`.

    Args:
        recipe (`Recipe`): see [`~hf_vla.training.arguments.load_recipe`].
        callbacks (`Sequence[TrainerCallback]`): called by the Trainer beside its own.

    Returns:
        `dict[str, float]`: the last evaluation's metrics; the training's where no episodes are held out.

    Raises:
        ValueError: the recipe, the dataset and the checkpoint do not fit together.
    """
    set_seed(recipe.training.seed)  # a new model's weights
    dataset, train_set, eval_set = open_dataset(recipe.data)
    model, processor = build(recipe, dataset, train_set)
    trainer = VLATrainer(
        model=model,
        args=recipe.training,
        data_collator=VLACollator(processor, recipe.data.unnorm_key, recipe.data.camera.name),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
        callbacks=[*callbacks],
    )
    checkpoint = checkpoint_to_resume(recipe.training)
    if checkpoint is not None:
        check_same_robot(checkpoint, processor)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if eval_set is not None:
        metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return metrics


def open_dataset(data: DataArguments) -> tuple[LeRobotEpisodes, Subset, Subset | None]:
    """Open the dataset with windows of actions, and split it by episodes.

    Returns:
        `tuple`: the whole dataset, the rows to train on, and those of the held-out episodes (None without any).

    Raises:
        ValueError: a held-out episode does not exist, or none is left to train on.
    """
    fps = schema.read_info(local_folder(data.source, data.revision)).fps
    deltas = {schema.ACTION: [step / fps for step in range(data.chunk_size)]}
    dataset = LeRobotEpisodes(data.source, deltas, cameras=[data.camera.name], revision=data.revision)
    known = {episode.index for episode in dataset.episodes}
    unknown = sorted(set(data.eval_episodes) - known)
    if unknown or known == set(data.eval_episodes):
        raise ValueError(
            f"Expected data.eval_episodes to be some of the {len(known)} episodes of {dataset.name} "
            f"({min(known)} to {max(known)}), came {unknown or 'all of them'}."
        )
    held_out = np.isin(dataset.column("episode_index"), data.eval_episodes)
    train_set = Subset(dataset, np.flatnonzero(~held_out).tolist())
    return dataset, train_set, Subset(dataset, np.flatnonzero(held_out).tolist()) if held_out.any() else None


def build(recipe: Recipe, dataset: LeRobotEpisodes, train_set: Subset):
    """Make or load the model, and the processor that knows the dataset's statistics, grid, robot and camera.

    Returns:
        `tuple`: the model, with adapters where the recipe asks for them, and the processor.
    """
    data, arguments = recipe.data, recipe.model
    actions = dataset.column(schema.ACTION)[train_set.indices]
    statistics = ActionStatistics()
    statistics.update(actions)
    entry = {
        "action": statistics.to_dict(),
        "num_trajectories": len(np.unique(dataset.column("episode_index")[train_set.indices])),
        "num_transitions": len(actions),
    }
    spec = action_spec(data, dataset)
    if spec.gripper is None:
        raise ValueError("SpatialVLA's grid ends in a gripper: give data.action.gripper with index, open and closed.")
    _check_gripper(spec.gripper, actions[:, spec.gripper.index])
    modes = ["quantile"] * len(spec.names)
    modes[spec.gripper.index] = "zero_one"
    action_config = {
        "chunk_size": data.chunk_size,
        "normalization": {"mode": modes, "clip": True, "convention": "spatialvla"},
        "tokenizer": None,
        "specs": {data.unnorm_key: {"action": spec.to_dict(), "state": None}},
    }
    dictionaries = {
        "statistics": {data.unnorm_key: entry},
        "action_config": action_config,
        "camera_config": {data.unnorm_key: camera_spec(data.camera, dataset).to_dict()},
    }
    codec = ActionCodec(dictionaries["statistics"], action_config)
    normalized_actions = codec.normalizer(data.unnorm_key).normalize(actions)
    make = _new if arguments.preset is not None else _pretrained
    model, processor = make(arguments, normalized_actions, dictionaries)
    if model.config.use_ego3d and processor.camera(data.unnorm_key).intrinsics is None:
        raise ValueError("This model encodes 3-D positions: give data.camera.fovy or data.camera.intrinsics.")
    return model, processor


def _check_gripper(gripper: GripperSpec, values: np.ndarray) -> None:
    low, high = sorted((gripper.open, gripper.closed))
    if values.min() < low - 1e-6 or values.max() > high + 1e-6:
        raise ValueError(
            f"The recipe says that the gripper (action {gripper.index}) goes from {low} to {high}, the dataset's goes "
            f"from {values.min():g} to {values.max():g}: mend data.action.gripper."
        )


def _new(arguments: ModelArguments, normalized_actions, dictionaries):
    """Untrained model whose vocabulary has room for the grid."""
    grid = _fit(normalized_actions, arguments.grid or GridArguments(), NUM_BINS)
    dictionaries["action_config"]["tokenizer"] = {"type": "gaussian_grid", **grid.to_dict()}
    preset = SpatialVLAConfig.from_preset(arguments.preset)
    config = SpatialVLAConfig.from_preset(
        arguments.preset,
        chunk_size=dictionaries["action_config"]["chunk_size"],
        spatial_token_num=grid.vocab_size,
        action_block_sizes=[end - start for _, start, end in grid.blocks],
        text_config=preset.text_config.to_dict() | {"vocab_size": preset.action_token_begin_idx + grid.vocab_size},
    )
    model = SpatialVLAForConditionalGeneration(config).to(getattr(torch, arguments.dtype))
    return model, SpatialVLAProcessor.from_scratch(config, **dictionaries)


def _pretrained(arguments: ModelArguments, normalized_actions, dictionaries):
    """Checkpoint that keeps its weights, tokenizer and, unless it is adapted, its grid, but speaks for our dataset."""
    if (Path(arguments.path) / "adapter_config.json").is_file():
        raise ValueError(
            f"model.path {arguments.path!r} is an adapter, which a new training would drop: resume its own run, or "
            "merge it into its base model (PeftModel.merge_and_unload), save that with its processor and name it here."
        )
    # An adapter remembers its checkpoint by this name: a folder's must not depend on where one stands.
    path = str(Path(arguments.path).resolve()) if Path(arguments.path).is_dir() else arguments.path
    model, pretrained = AutoModel.from_pretrained(path, dtype=arguments.dtype), AutoProcessor.from_pretrained(path)
    grid = source = pretrained.action_codec.tokenizer
    if arguments.adapt_grid:
        grid = _fit(normalized_actions, arguments.grid or GridArguments(), source.num_bins, source.use_spherical)
        model.adapt_spatial_embeddings(source, grid)
    dictionaries["action_config"]["tokenizer"] = {"type": "gaussian_grid", **grid.to_dict()}
    chunk_size = dictionaries["action_config"]["chunk_size"]
    processor = type(pretrained)(pretrained.image_processor, pretrained.tokenizer, **dictionaries)
    if arguments.lora is not None:
        from hf_vla.training.lora import add_lora  # takes seconds to import

        if chunk_size != model.config.chunk_size:
            raise ValueError(
                f"An adapter shares its checkpoint's config: expected data.chunk_size {model.config.chunk_size}, "
                f"came {chunk_size}."
            )
        lora = arguments.lora
        return add_lora(model, lora.r, lora.alpha, lora.dropout, arguments.adapt_grid), processor
    model.config.chunk_size = chunk_size
    if model.config.use_spatial_token:
        model.get_input_embeddings().requires_grad_(False)
    return model, processor


def _fit(normalized_actions, grid: GridArguments, num_bins, use_spherical: bool = True) -> GaussianGridTokenizer:
    num_bins, action_dim = grid.num_bins or num_bins, normalized_actions.shape[-1]
    if action_dim not in (4, 7) or len(num_bins) + 1 != action_dim:
        raise ValueError(
            "SpatialVLA's grid bins 7 numbers (translation, rotation, gripper) with six model.grid.num_bins, or 4 "
            f"(translation, gripper) with three; the dataset's actions have {action_dim}, model.grid.num_bins "
            f"{list(num_bins)}."
        )
    return GaussianGridTokenizer.fit(normalized_actions, num_bins, grid.distribution, grid.min_sigma, use_spherical)


def action_spec(data: DataArguments, dataset: LeRobotEpisodes) -> ActionSpec:
    """Meaning of the dataset's actions: names and rate from the dataset, the rest from the recipe."""
    feature, action = dataset.features[schema.ACTION], data.action
    names = feature.get("names") or [f"action_{index}" for index in range(feature["shape"][0])]
    if isinstance(names, dict):  # some datasets group them, {"motors": [...]}
        names = [name for group in names.values() for name in group]
    return ActionSpec(tuple(names), action.kind, action.rotation, action.frame, float(dataset.fps), action.gripper)


def camera_spec(camera: CameraArguments, dataset: LeRobotEpisodes) -> CameraSpec:
    """Camera of the dataset in pixels of its recorded images."""
    key = dataset.camera_keys[0]
    height, width = dataset.features[key]["shape"][:2]
    intrinsics = camera.intrinsics
    if camera.fovy is not None:
        focal = height / 2 / math.tan(math.radians(camera.fovy) / 2)
        intrinsics = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
    return CameraSpec(key.removeprefix(schema.IMAGES), width, height, intrinsics)


def checkpoint_to_resume(arguments) -> str | None:
    """Find the checkpoint that `arguments.resume_from_checkpoint` asks for; None to start anew.

    The Trainer writes `trainer_state.json` last, so a folder without it was killed in mid-save: it is passed over with
    a warning. A complete one that lacks its optimizer would go on with a fresh one: that is an error.

    Raises:
        ValueError: the folder named is no complete checkpoint, or a file that exact resuming needs is missing.
    """
    wanted = arguments.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True:
        folders = Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        steps = {int(step): folder for folder in folders if (step := folder.name.rpartition("-")[2]).isdigit()}
        checkpoint = None
        for _, folder in sorted(steps.items(), reverse=True):
            if _is_complete(folder):
                checkpoint = folder
                break
            logger.warning("%s was not saved completely (killed in mid-save?) and is passed over.", folder)
        if checkpoint is None:
            logger.warning("No complete checkpoint in %s: the training starts anew.", arguments.output_dir)
            return None
    else:
        checkpoint = Path(wanted)
        if not _is_complete(checkpoint):
            raise ValueError(f"{checkpoint} is no complete checkpoint: its trainer_state.json is missing or broken.")
    rng = "rng_state.pth" if arguments.world_size == 1 else f"rng_state_{arguments.process_index}.pth"
    # Sharded optimizers (FSDP, DeepSpeed) have other names, and checks of their own.
    sharded = arguments.fsdp or arguments.deepspeed
    missing = [name for name in ("optimizer.pt", "scheduler.pt", rng) if not (checkpoint / name).is_file()]
    if missing and not sharded:
        raise ValueError(
            f"{checkpoint} lacks {missing}: resuming would go on with fresh ones. Restore them, or resume from "
            "another checkpoint; weights that are no adapter also start a new run, as model.path."
        )
    return str(checkpoint)


def check_same_robot(checkpoint: str, processor) -> None:
    """Check that a checkpoint's weights learnt the tokens and units of the processor they would go on with.

    Raises:
        ValueError: specs, statistics, grid, chunk size or camera differ.
    """
    saved = AutoProcessor.from_pretrained(checkpoint)
    names = {"side": f"the checkpoint {checkpoint}", "other_side": "the recipe"}
    for key in set(saved.action_codec.keys) & set(processor.action_codec.keys):
        specs = [each.action_codec.specs(key)[0] for each in (saved, processor)]
        if None not in specs:
            specs[0].check(specs[1], **names)
        if key in saved.cameras and key in processor.cameras:
            saved.cameras[key].check(processor.cameras[key], **names)
    for name in ("statistics", "action_config", "camera_config"):
        if getattr(saved, name) != json.loads(json.dumps(getattr(processor, name))):
            raise ValueError(
                f"The recipe gives another {name} than {checkpoint} was trained with, so its weights would mean other "
                "actions. Resume with the dataset, split, grid and chunk size of that run, or start a new run."
            )


def _is_complete(checkpoint: Path) -> bool:
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
