"""Checks of what lies in the checkpoint: files, weights, and whether its parts agree."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from safetensors import safe_open

from hf_vla.evaluation.examination.patient import FAIL, PASS, WARN, Patient, Unavailable, Verdict
from hf_vla.models.checkpoint_files import is_pickle
from hf_vla.models.spatialvla.action_tokens import token_fields

TRAINING_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
SAME_MERGED = 1e-4  # spreads of the recorded actions; what adding float32 numbers in another order makes of them


def safetensors_only(patient: Patient) -> Iterator[Verdict]:
    """Weights are in safetensors: a pickle runs whatever code its author put into it when it is read."""
    found = [name for name in patient.files if is_pickle(name)]
    state = [name for name in found if name.rpartition("/")[2].startswith(TRAINING_STATE)]
    weights = sorted({*found} - {*state})
    if weights:
        yield Verdict(
            FAIL,
            f"Pickled files, which can run any code when they are read: {_some(weights)}. Save the model again with "
            "save_pretrained, which writes safetensors, and delete them.",
            {"files": weights},
        )
    elif not patient.weight_files:
        yield Verdict(FAIL, "No weights: there is no *.safetensors in the folder. Copy the checkpoint again.")
    if state:
        yield Verdict(
            WARN,
            f"State of a training, pickled and never read for prediction: {_some(state)}. Leave it out of what you "
            "hand on.",
            {"files": state},
        )
    elif patient.weight_files and not weights:
        unseen = (
            "" if patient.is_all_listed else " Of what lies in the cache: the Hub could not be asked for the rest."
        )
        size = sum(path.stat().st_size for path in patient.weight_files) / 1e6
        yield Verdict(
            PASS,
            f"Weights in safetensors alone: {len(patient.weight_files)} file(s), {size:,.1f} MB.{unseen}",
            {"mb": size},
        )


def weights_finite(patient: Patient) -> Iterator[Verdict]:
    """No weight is NaN or infinite; read from the files, so that it is seen though the model may not load."""
    broken, precisions, total = [], Counter(), 0
    for path in patient.weight_files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dictionary)
                tensor = tensors.get_tensor(name)
                precisions[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
                total += tensor.numel()
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    broken.append(name)
    if broken:
        yield Verdict(
            FAIL,
            f"{len(broken)} weight(s) hold NaN or infinity, among them {_some(broken)}: every action would. The "
            "training diverged or the file is damaged; take an earlier checkpoint.",
            {"weights": broken},
        )
    elif total:
        kinds = ", ".join(f"{kind} {count / total:.0%}" for kind, count in precisions.most_common())
        yield Verdict(PASS, f"All {total:,} weights are finite ({kinds}).", {"parameters": total})


def loads(patient: Patient) -> Iterator[Verdict]:
    """Processor and model load, with every weight that the model has."""
    for what in ("processor", "model"):
        try:
            part = getattr(patient, what)
        except Unavailable as error:
            yield Verdict(FAIL, f"The {what} does not load: {error}")
        else:
            yield Verdict(PASS, f"The {what} loads: {type(part).__name__}{_size(part)}.")


def parts_agree(patient: Patient) -> Iterator[Verdict]:
    """The model's configuration and the processor say the same of chunks, dimensions and vocabulary."""
    config, processor = patient.config, patient.processor
    codec = processor.action_codec
    said = {"chunk_size": codec.chunk_size, "n_obs_steps": codec.n_obs_steps}
    _ = patient.normalizer  # broken statistics are another line's
    said["action_dim"] = codec.action_dim
    if patient.state_normalizer is not None:
        said["state_dim"] = codec.state_dim
    if codec.tokenizer is not None and hasattr(config, "action_block_sizes"):
        said |= token_fields(codec.tokenizer)
        said["action_token_begin_idx"] = processor.action_token_begin
    differing = []
    for name, value in said.items():
        if (own := getattr(config, name, None)) is not None and _plain(own) != _plain(value):
            differing.append(f"{name} is {own} in config.json and {value} in processor_config.json")
    rows, words = config.get_text_config().vocab_size, len(processor.tokenizer)
    with suppress(Unavailable):  # config.json speaks for itself where the weights do not fit it
        rows = max(rows, patient.model.get_input_embeddings().weight.shape[0])
    if words > rows:
        differing.append(f"the tokenizer has {words} tokens, the model's embedding {rows} rows")
    if getattr(config, "state_dim", None) and not codec.takes_state:
        differing.append(f"the model takes a state of {config.state_dim} numbers, the processor gives none")
    if differing:
        yield Verdict(
            FAIL,
            f"Model and processor are not of one checkpoint: {'; '.join(differing)}. Copy both from where it was "
            "saved.",
            {"differences": differing},
        )
    else:
        said = ", ".join(f"{name} {value}" for name, value in said.items() if name != "action_token_ranges")
        yield Verdict(PASS, f"Model and processor agree: {said}; {words} tokens for {rows} rows.")


def merge_equal(patient: Patient) -> Iterator[Verdict]:
    """Merging an adapter into its base model changes no action; else the merged model is another one.

    They may differ by what rounding makes of it, [`SAME_MERGED`]. Adapters on a bfloat16 model differ by more: the
    sum of weight and update is rounded to eight bits.
    """
    if not patient.is_adapter:
        yield Verdict(PASS, "Not an adapter: there is nothing to merge.")
        return
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds to import, and only adapters need it

    before = patient.chunks
    layers = [module for module in patient.model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [weight for layer in layers for weight in layer.get_base_layer().parameters()]
    kept = [weight.detach().cpu().clone() for weight in weights]
    try:
        for layer in layers:
            layer.merge()
        moved = max(
            patient.moved(patient.predict(moment), chunk)
            for moment, chunk in zip(patient.moments, before, strict=True)
        )
    finally:
        for layer in layers:
            layer.unmerge()
        with torch.no_grad():  # W + update - update is not W: it was rounded
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    measured = {"moved": moved, "layers": len(layers), "dtype": str(patient.model.dtype)}
    if not layers:
        yield Verdict(
            FAIL, "adapter_config.json is there, but no layer of the model has an adapter: it has no effect."
        )
    elif not moved <= SAME_MERGED:
        yield Verdict(
            FAIL,
            f"Merged into its base model ({len(layers)} layers, {patient.model.dtype}), the adapter acts otherwise: "
            f"predictions move by {moved:.2g} spreads of the recorded actions, expected at most {SAME_MERGED:g}. Do "
            "not merge it, or load the base model in float32 before.",
            measured,
        )
    else:
        yield Verdict(
            PASS,
            f"Merging the adapter ({len(layers)} layers) moves predictions by {moved:.1g} spreads: it may be merged.",
            measured,
        )


def _size(part) -> str:
    if not isinstance(part, torch.nn.Module):
        return ""
    return f", {part.num_parameters() / 1e6:,.1f} million parameters, {str(part.dtype).removeprefix('torch.')}"


def _plain(value):
    return np.asarray(value).tolist()


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
