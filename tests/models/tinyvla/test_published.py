"""Converted checkpoints against what the published system computed (goldens/README.md)."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

import hf_vla  # noqa: F401
from hf_vla.cli.main import app
from hf_vla.models.conversion import rename
from hf_vla.models.tinyvla.convert_tinyvla import PREFIXES

CASES = ("clip_2cam_a", "siglip_2cam")
EMBEDDINGS = {"bfloat16": "outputs_bf16emb", "float32": "outputs_fp32emb"}
PUBLISHED_IMAGE = -200  # stands once for the images of all cameras


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0)


@pytest.fixture(scope="module", params=CASES)
def published(request, goldens, tmp_path_factory):
    """A converted checkpoint with the inputs and outputs that the published system recorded."""
    source = goldens / "tinyvla" / request.param
    path = tmp_path_factory.mktemp("converted") / request.param
    result = CliRunner().invoke(app, ["convert", "tinyvla", str(source / "checkpoint"), str(path)])
    assert result.exit_code == 0, result.output
    models = {}
    for dtype in EMBEDDINGS:
        config = AutoConfig.from_pretrained(path)
        assert config.head_config["denoiser"]["timestep_embedding_dtype"] == "bfloat16"
        config.head_config["denoiser"]["timestep_embedding_dtype"] = dtype
        models[dtype] = AutoModel.from_pretrained(path, config=config)
    raw = load_file(source / "inputs.safetensors")
    cameras = torch.stack([raw["images"], raw["images_r"]], dim=1)  # (batch_size, 2, 3, height, width)
    return SimpleNamespace(
        models=models,
        outputs={dtype: load_file(source / f"{name}.safetensors") for dtype, name in EMBEDDINGS.items()},
        raw=raw,
        inputs=widen(raw["input_ids"], raw["attention_mask"], models["float32"].config, 2)
        | {"pixel_values": cameras.flatten(0, 1)},
        gradient_names=json.loads((source / "grad_norm_names.json").read_text()),
    )


def widen(input_ids, attention_mask, config, num_images):
    """Our prompts hold a token for every image feature."""
    count, image = num_images * config.backbone_config.image_seq_length, config.image_token_id
    rows = [
        [
            (token, real)
            for i, real in zip(ids, mask, strict=True)
            for token in ([image] * count if i == PUBLISHED_IMAGE else [i])
        ]
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ]
    tokens = torch.tensor(rows)
    return {"input_ids": tokens[..., 0], "attention_mask": tokens[..., 1]}


def alone(inputs, row):
    """One sample without padding."""
    real = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row, real][None],
        "attention_mask": inputs["attention_mask"][row, real][None],
        "pixel_values": inputs["pixel_values"].unflatten(0, (-1, 2))[row],
    }


@torch.no_grad()
def test_vision_features(published):
    backbone, expected = published.models["bfloat16"].backbone, published.outputs["bfloat16"]
    features = backbone.get_image_features(published.raw["images"], output_hidden_states=True)
    start = int(backbone.config.vision_feature_select_strategy == "default")
    close(features.hidden_states[-2][:, start:], expected["vision_features"], 3e-5)
    close(torch.stack(tuple(features.pooler_output)), expected["vision_projected"], 3e-5)


@torch.no_grad()
def test_prompts_and_hidden_states(published):
    model, expected = published.models["bfloat16"], published.outputs["bfloat16"]
    real = published.inputs["attention_mask"].bool()
    assert torch.equal(real, expected["mm_attention_mask"]) and not real.all()
    states = model.backbone(**published.inputs, output_hidden_states=True).hidden_states
    close(states[0][real], expected["inputs_embeds"][real], 3e-5)
    close(states[1][real], expected["hidden_1"][real], 3e-5)
    features, mask = model.encode(**published.inputs)
    assert torch.equal(mask, real)
    close(features[real], expected["hidden_2"][real], 3e-5)


def loss(published, dtype):
    """The published loss divides by padded actions, too, and pools over padded tokens."""
    model, raw = published.models[dtype], published.raw
    features, mask = model.encode(**published.inputs)
    head, size = model.action_head, model.config.chunk_size
    head.reduction = "published"
    try:
        return head.loss(
            features,
            torch.ones_like(mask),
            raw["actions"][:, :size],
            ~raw["is_pad"][:, :size],
            raw["states"],
            noise=raw["noise"][0],
            timesteps=raw["train_timesteps"],
        ).mean()
    finally:
        head.reduction = "masked"


@pytest.mark.parametrize("dtype", EMBEDDINGS)
def test_loss(published, dtype):
    assert published.models[dtype].action_head.reduction == "masked"
    close(loss(published, dtype), published.outputs[dtype]["loss"], 4e-5)
    assert (published.outputs["bfloat16"]["loss"] - published.outputs["float32"]["loss"]).abs() > 2e-4


def test_gradient_norms(published):
    model, norms = published.models["bfloat16"], published.outputs["bfloat16"]["grad_norm_per_param"]
    model.zero_grad()
    loss(published, "bfloat16").backward()
    parameters = dict(model.named_parameters())
    unused = 0
    for name, expected in zip(published.gradient_names, norms, strict=True):
        parameter = parameters.get(rename(name, PREFIXES))
        if expected == -1:  # the vision tower's last layer, behind the features, and SigLIP's head, which ours has not
            unused += 1
            assert parameter is None or parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad.norm(), expected, rtol=1e-3, atol=1e-6, msg=name)
    assert 0 < unused < 0.15 * len(norms)


@pytest.mark.parametrize("dtype", EMBEDDINGS)
def test_every_step_of_the_sampling(published, dtype, monkeypatch):
    """Pooled over padded tokens, too, as the published code does."""
    model, expected, steps = published.models[dtype], published.outputs[dtype], []
    step = DDIMScheduler.step

    @functools.wraps(step)
    def record(self, noise, time, *arguments, **options):
        steps.append((time, noise, step(self, noise, time, *arguments, **options)))
        return steps[-1][-1]

    monkeypatch.setattr(DDIMScheduler, "step", record)
    with torch.no_grad():
        features, mask = model.encode(**published.inputs)
    model.action_head.sample(
        features, torch.ones_like(mask), published.raw["states"], noise=published.raw["init_noise"]
    )
    times, noises, outputs = zip(*steps, strict=True)
    assert torch.equal(torch.stack(times), published.outputs["bfloat16"]["ddim_timesteps"])
    close(torch.stack([output.prev_sample for output in outputs]), expected["ddim_samples"], 7e-4)
    if dtype == "bfloat16":  # the others were not kept
        close(torch.stack(noises), expected["ddim_eps"], 7e-4)
        close(torch.stack([output.pred_original_sample for output in outputs]), expected["ddim_pred_x0"], 7e-4)


@pytest.mark.parametrize("dtype", EMBEDDINGS)
def test_actions_of_a_batch_and_of_each_sample_alone(published, dtype):
    """In the published code padding moves the actions of a batch by more than 1; ours are those of a sample alone."""
    model, raw = published.models[dtype], published.raw
    expected = published.outputs[dtype]["action_batch1_unpadded"]
    together = model.predict_action(**published.inputs, state=raw["states"], noise=raw["init_noise"]).actions
    close(together, expected, 7e-4)
    for row in range(len(expected)):
        one = alone(published.inputs, row)
        assert one["attention_mask"].all()
        actions = model.predict_action(**one, state=raw["states"][row][None], noise=raw["init_noise"][row][None])
        close(actions.actions[0], expected[row], 7e-4)
