"""Converted checkpoints against what the published system computed (goldens/README.md)."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

import hf_vla  # noqa: F401
from hf_vla.actions.codec import ActionCodec
from hf_vla.cli.main import app
from hf_vla.models.backbones import token_positions
from hf_vla.models.conversion import rename
from hf_vla.models.divla.convert_divla import PREFIXES
from hf_vla.models.divla.modeling_divla import Encoding
from hf_vla.models.published import published_statistics

CASES = ("unet_b1", "unet_b2_leftpad")
EMBEDDINGS = {"bfloat16": "outputs_bf16emb", "float32": "outputs_fp32emb"}
MAX_NEW_TOKENS = 12  # of the recording
IMAGE_INPUTS = ("pixel_values", "image_grid_thw")


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0)


@pytest.fixture(scope="module", params=CASES)
def published(request, goldens, tmp_path_factory):
    """A converted checkpoint with the inputs and outputs that the published system recorded."""
    source = goldens / "divla" / request.param
    path = tmp_path_factory.mktemp("converted") / request.param
    result = CliRunner().invoke(app, ["convert", "divla", str(source / "checkpoint"), str(path)])
    assert result.exit_code == 0, result.output
    models = {}
    for dtype in EMBEDDINGS:
        config = AutoConfig.from_pretrained(path)
        assert config.head_config["denoiser"]["timestep_embedding_dtype"] == "bfloat16" and config.film_includes_end
        config.head_config["denoiser"]["timestep_embedding_dtype"] = dtype
        config.max_reasoning_tokens = MAX_NEW_TOKENS
        models[dtype] = AutoModel.from_pretrained(path, config=config)
    raw = load_file(source / "inputs.safetensors")
    inputs = {name: raw[name] for name in ("input_ids", *IMAGE_INPUTS)}
    inputs["attention_mask"] = raw["attention_mask"].long()
    return SimpleNamespace(
        models=models,
        outputs={dtype: load_file(source / f"{name}.safetensors") for dtype, name in EMBEDDINGS.items()},
        raw=raw,
        inputs=inputs,
        real=raw["attention_mask"],
        chunk={
            "actions": raw["actions"][:, : config.chunk_size],
            "action_mask": ~raw["is_pad"][:, : config.chunk_size],
            "state": raw["states"],
        },
        gradient_names=json.loads((source / "grad_norm_names.json").read_text()),
    )


def teacher_forced(published, dtype="bfloat16"):
    with torch.no_grad():
        return published.models[dtype].encode(**published.inputs, labels=published.raw["labels"])


def prompts(published, rows=None):
    """Prompts without a reasoning, padded on the left; of one sample alone, without padding."""
    raw = published.raw
    rows = range(len(raw["input_ids"])) if rows is None else rows
    ids = [raw[f"prompt_ids_{row}"][0] for row in rows]
    longest, pad = max(map(len, ids)), 0
    images = len(raw["image_grid_thw"]) // len(raw["input_ids"])
    patches = raw["image_grid_thw"].prod(-1).tolist()
    chosen = [image for row in rows for image in range(row * images, (row + 1) * images)]
    return {
        "input_ids": torch.stack([F.pad(row, (longest - len(row), 0), value=pad) for row in ids]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids]),
        "pixel_values": torch.cat([raw["pixel_values"].split(patches)[image] for image in chosen]),
        "image_grid_thw": raw["image_grid_thw"][chosen],
    }


def acting(published, rows=None):
    """What predict_action needs beside the prompts."""
    chosen = slice(None) if rows is None else list(rows)
    return {"state": published.raw["states"][chosen], "noise": published.raw["init_noise"][chosen]}


def test_positions_of_images_and_words(published):
    model, inputs = published.models["bfloat16"], published.inputs
    is_image = inputs["input_ids"] == model.config.image_token_id
    grids = {"image_grid_thw": inputs["image_grid_thw"]}
    positions = token_positions(model.backbone.base_model, inputs["input_ids"], published.real, is_image, grids)
    expected = published.outputs["bfloat16"]["position_ids"]
    assert torch.equal(positions[:, published.real], expected[:, published.real])
    assert not torch.equal(expected[0], expected[1])  # they are not those of a text


@torch.no_grad()
def test_hidden_states_and_logits(published):
    model, expected, real = published.models["bfloat16"], published.outputs["bfloat16"], published.real
    encoding = teacher_forced(published)
    assert torch.equal(encoding.mask, real)
    assert torch.equal(encoding.is_reasoning, published.raw["labels"] != -100)
    features = model.backbone.get_image_features(*(published.raw[name] for name in IMAGE_INPUTS)).pooler_output
    close(torch.cat(tuple(features)), expected["image_embeds"], 2e-4)
    close(encoding.hidden_states[real], expected["last_hidden_state"][real], 2e-4)
    close(model.get_output_embeddings()(encoding.hidden_states)[real], expected["logits"][real], 6e-4)


@torch.no_grad()
def test_every_part_of_the_film(published):
    film, expected = published.models["bfloat16"].film, published.outputs["bfloat16"]
    encoding = teacher_forced(published)
    prompt = film.prompt_proj(encoding.hidden_states, encoding.mask & ~encoding.is_reasoning)
    reasoning = film.reasoning_proj(encoding.hidden_states, encoding.is_reasoning)
    close(prompt, expected["input_action_proj"], 2e-4)
    close(reasoning, expected["reasoning_action_proj"], 2e-4)
    close(film.film.scale(reasoning), expected["film_scale"], 2e-4)
    close(film.film.shift(reasoning), expected["film_shift"], 2e-4)
    features, mask = published.models["bfloat16"].condition(encoding)
    close(features, expected["film_forward"], 2e-4)
    assert mask.all() and mask.shape == features.shape[:2]


def losses(published, dtype):
    """The published action loss divides by padded actions, too; noise and times are the recorded ones."""
    model, raw = published.models[dtype], published.raw
    head = model.action_head
    assert head.reduction == "masked"
    head.reduction = "published"
    recorded = {"noise": raw["noise"][0], "timesteps": raw["train_timesteps"]}
    loss = head.loss
    try:
        head.loss = functools.partial(loss, **recorded)
        return model(**published.inputs, labels=raw["labels"], **published.chunk)
    finally:
        head.reduction = "masked"
        del head.loss


@pytest.mark.parametrize("dtype", EMBEDDINGS)
def test_losses(published, dtype):
    output, expected = losses(published, dtype), published.outputs[dtype]
    close(output.ntp_loss, published.outputs["bfloat16"]["llm_loss"], 4e-5)
    close(output.diffusion_loss, expected["action_loss"], 4e-5)
    close(output.loss, expected["loss"], 4e-5)


def test_gradient_norms(published):
    model, norms = published.models["bfloat16"], published.outputs["bfloat16"]["grad_norm_per_param"]
    model.zero_grad()
    losses(published, "bfloat16").loss.backward()
    parameters = dict(model.named_parameters())
    assert len(published.gradient_names) == len(parameters)
    for name, expected in zip(published.gradient_names, norms, strict=True):
        gradient = parameters[rename(name, PREFIXES)].grad
        torch.testing.assert_close(gradient.norm(), expected, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", EMBEDDINGS)
def test_every_step_of_the_sampling_under_a_given_reasoning(published, dtype, monkeypatch):
    expected, steps, step = published.outputs[dtype], [], DDIMScheduler.step

    @functools.wraps(step)
    def record(self, noise, time, *arguments, **options):
        steps.append((time, noise, step(self, noise, time, *arguments, **options).prev_sample))
        return SimpleNamespace(prev_sample=steps[-1][-1])

    monkeypatch.setattr(DDIMScheduler, "step", record)
    output = published.models[dtype].predict_action(
        **published.inputs, labels=published.raw["labels"], **acting(published)
    )
    times, noises, samples = (torch.stack(values) for values in zip(*steps, strict=True))
    assert torch.equal(times, published.outputs["bfloat16"]["tf_ddim_timesteps"])
    close(samples, expected["tf_ddim_samples"], 7e-4)
    close(output.actions, expected["tf_ddim_samples"][-1], 7e-4)
    if dtype == "bfloat16":  # the others were not kept
        close(noises, expected["tf_ddim_eps"], 7e-4)


def test_the_two_precisions_of_the_time_differ(published):
    """So that the test above could not pass with one in place of the other."""
    bfloat16, float32 = (published.outputs[dtype]["tf_ddim_samples"] for dtype in EMBEDDINGS)
    assert (bfloat16 - float32).abs().max() > 0.05


@pytest.mark.parametrize("dtype", EMBEDDINGS)
def test_reasoning_and_actions_of_the_published_evaluation(published, dtype, monkeypatch):
    """Each sample of a batch, padded on the left, and each alone, as the published code runs them."""
    model, expected, raw = published.models[dtype], published.outputs[dtype], published.raw
    monkeypatch.setattr(model.config, "film_includes_end", False)
    together = model.predict_action(**prompts(published), **acting(published))
    encoding, ids = model.reason(**prompts(published))
    assert torch.equal(ids, together.reasoning_ids)
    for row in range(len(raw["input_ids"])):
        alone = model.predict_action(**prompts(published, [row]), **acting(published, [row]))
        recorded = published.outputs["bfloat16"]
        said = recorded[f"eval{row}_sequence"][0, raw[f"prompt_ids_{row}"].shape[1] :]
        assert torch.equal(alone.reasoning_ids[0], said) and len(said) < MAX_NEW_TOKENS
        assert torch.equal(ids[row, : len(said)], said) and (ids[row, len(said) :] == model.config.end_token_id).all()
        close(alone.actions, expected[f"eval{row}_action"], 7e-4)
        close(together.actions[row], expected[f"eval{row}_action"][0], 7e-4)
        states, is_reasoning = (part[row, encoding.mask[row]][None, :-1] for part in (encoding[0], encoding[2]))
        close(states, recorded[f"eval{row}_hidden"], 2e-4)  # theirs lack the last token
        kept = Encoding(states, torch.ones_like(is_reasoning), is_reasoning)
        close(model.condition(kept)[0], recorded[f"eval{row}_film"], 2e-4)


def test_generated_reasoning_acts_as_in_training_and_not_as_published(published):
    """The hidden state of the end token counts in training; the published evaluation has none."""
    model = published.models["bfloat16"]
    generated = model.predict_action(**prompts(published), **acting(published))
    for row in range(len(published.raw["input_ids"])):
        said = published.outputs["bfloat16"][f"eval{row}_sequence"][0]
        labels = said.clone()
        labels[: published.raw[f"prompt_ids_{row}"].shape[1]] = -100
        images = {name: prompts(published, [row])[name] for name in IMAGE_INPUTS}
        taught = model.predict_action(said[None], labels=labels[None], **images, **acting(published, [row])).actions
        close(generated.actions[row], taught[0], 1e-4)
        again = model.predict_action(
            **prompts(published, [row]), **acting(published, [row]), reasoning_ids=generated.reasoning_ids[[row]]
        )
        close(again.actions, taught, 1e-4)
        other = published.outputs["bfloat16"][f"eval{row}_action"][0]
        assert (generated.actions[row] - other).abs().max() > 0.02


def test_normalisation(goldens):
    """With the statistics as published.

    DiVLA's recording of these arrays is, bit for bit, TinyVLA's. It has a second mode, whose targets are differences
    of consecutive actions, normalised with the statistics of the actions themselves. Ours has no such mode:
    differences that are learnt need statistics of their own.
    """
    arrays = load_file(goldens / "tinyvla_pipeline" / "dataset.safetensors")
    arrays = {name: array.numpy() for name, array in arrays.items()}
    info = json.loads((goldens / "tinyvla_pipeline" / "dataset.json").read_text())
    entries = {name: arrays[f"stat_{name}"].tolist() for name in ("action_min", "action_max", "qpos_mean", "qpos_std")}
    options = {"clip": False, "convention": "tinyvla"}  # DiVLA's is TinyVLA's
    config = {
        "chunk_size": info["chunk_size"],
        "normalization": {"mode": "min_max", **options},
        "state_normalization": {"mode": "mean_std", **options},
    }
    codec = ActionCodec({"robot": published_statistics(entries)}, config)
    rows = [row for row in info["rows"] if row["kind"] == "diffusion"]
    for row in rows:
        episode, step = row["episode_and_start"]
        real = ~arrays[f"diffusion_{row['index']}_is_pad"]
        start = max(0, step - 1)
        chunk = np.zeros((info["chunk_size"], 10))
        chunk[real] = arrays[f"ep{episode}_action"][start : start + real.sum()]
        published = arrays[f"diffusion_{row['index']}_action"]
        # Dimension 3 is constant: 0 in ours, float32's rounding divided by the margin in theirs.
        error = np.abs(codec.encode(chunk) - published)[real].max(0)
        assert error[3] < 1e-4 and np.delete(error, 3).max() < 2e-6
        np.testing.assert_allclose(codec.decode(published)[real], chunk[real], rtol=0, atol=2e-6)
        state = arrays[f"ep{episode}_qpos"][step]
        np.testing.assert_allclose(
            codec.encode_state(state), arrays[f"diffusion_{row['index']}_state"], rtol=0, atol=5e-7
        )
    assert len(rows) == 8 and any(arrays[f"diffusion_{row['index']}_is_pad"].any() for row in rows)
