import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_vla.actions.heads.registry import ACTION_HEADS
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor

UNET = {"type": "conditional_unet1d", "down_dims": [8, 16], "diffusion_step_embed_dim": 16}
DIFFUSION = {"type": "diffusion", "denoiser": UNET}
# small versions of the heads that are large by default
HEADS = {"diffusion": DIFFUSION, "flow_matching": {"type": "flow_matching", "denoiser": UNET}}
TEXTS = ["push", "pick up the red cube"]


@pytest.fixture
def batch(make_processor, pictures, chunks):
    return make_processor()(images=pictures, text=TEXTS, state=np.zeros((2, 2)), actions=chunks)


@pytest.fixture
def prompt(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "state")}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", sorted(ACTION_HEADS))
def test_every_head_trains_predicts_saves_and_loads(name, make_model, batch, prompt, tmp_path):
    model = make_model(head_config=HEADS.get(name, {"type": name}))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = model(**batch, generator=seeded()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    actions = model.predict_action(**prompt, generator=seeded()).actions
    assert actions.shape == (2, 4, 3) and actions.dtype == torch.float32 and not actions.requires_grad
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        again = auto_class.from_pretrained(tmp_path)
        assert type(again) is TinyVLAForActionPrediction and not again.training
        assert torch.equal(again.predict_action(**prompt, generator=seeded()).actions, actions)
        assert torch.equal(again(**batch, generator=seeded()).loss, model(**batch, generator=seeded()).loss)


def test_the_loss_is_the_mean_over_the_samples(make_model, batch):
    model = make_model(head_config=DIFFUSION)
    output = model(**batch, generator=seeded())
    (features,) = output.hidden_states
    mask = batch["attention_mask"].bool()
    each = model.action_head.loss(
        features, mask, batch["actions"], batch["action_mask"], batch["state"], generator=seeded()
    )
    assert each.shape == (2,) and torch.equal(output.loss, each.mean())


def test_padded_actions_do_not_enter_the_loss(make_model, batch):
    model = make_model(head_config=DIFFUSION)
    batch["action_mask"][:, 2:] = False
    loss = model(**batch, generator=seeded()).loss
    batch["actions"][:, 2:] = 7.0
    assert torch.equal(model(**batch, generator=seeded()).loss, loss)
    del batch["action_mask"]
    assert model(**batch, generator=seeded()).loss > 1.5 * loss


def test_sampling_runs_the_backbone_once(make_model, prompt):
    model, calls = make_model(head_config=DIFFUSION), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    model.predict_action(**prompt)
    assert len(calls) == 1


def test_noise_generator_and_steps_reach_the_head(make_model, prompt):
    model = make_model(head_config=DIFFUSION)
    first, again, other = (model.predict_action(**prompt, generator=seeded(seed)).actions for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    noise = torch.randn(2, 4, 3, generator=seeded())
    assert torch.equal(model.predict_action(**prompt, noise=noise).actions, first)
    seen = []
    model.predict_action(**prompt, noise=noise, callback=lambda *step: seen.append(step))
    assert torch.equal(seen[-1][1], first)
    assert not torch.equal(model.predict_action(**prompt, noise=noise, num_inference_steps=5).actions, first)


def test_the_head_sees_the_hidden_states_behind_the_final_norm(make_model, prompt):
    model = make_model()
    del prompt["state"]
    features, mask = model.encode(**prompt)
    assert torch.equal(mask, prompt["attention_mask"].bool())
    norm, inputs = model.backbone.language_model.final_layer_norm, []
    norm.register_forward_hook(lambda _module, _inputs, output: inputs.append(output))
    model.encode(**prompt)
    assert torch.equal(features, inputs[0])


def test_without_a_state(make_model, batch, prompt):
    model = make_model(state_dim=None)
    for inputs in (batch, prompt):
        with pytest.raises(ValueError, match=r"Expected a state of None numbers"):
            (model if "actions" in inputs else model.predict_action)(**inputs)
        del inputs["state"]
    assert model(**batch).loss.isfinite() and model.predict_action(**prompt).actions.isfinite().all()
    with pytest.raises(ValueError, match="Expected a state of 2 numbers"):
        make_model().predict_action(**prompt)


def test_prompts_padded_in_front_need_a_backbone_that_takes_positions(make_model, prompt, monkeypatch):
    for name in ("input_ids", "attention_mask"):
        prompt[name] = prompt[name].flip(-1)
    model = make_model()
    monkeypatch.setattr(model.backbone, "forward", lambda input_ids, attention_mask, pixel_values, use_cache: None)
    with pytest.raises(ValueError, match="Expected prompts padded on the right, got padding at the beginning"):
        model.predict_action(**prompt)


def test_actions_are_needed_to_train(make_model, prompt):
    with pytest.raises(ValueError, match="Expected `actions` to learn from; to predict some, call predict_action"):
        make_model()(**prompt)


def test_without_a_mask_every_token_is_real(make_model, prompt):
    model = make_model()
    first = {name: value[1:] for name, value in prompt.items() if name != "pixel_values"}
    first["pixel_values"] = prompt["pixel_values"][2:]
    masked = model.predict_action(**first).actions
    del first["attention_mask"]
    assert torch.equal(model.predict_action(**first).actions, masked)


@pytest.mark.parametrize("where", ["pixel_values", "state"])
def test_predictions_that_are_not_finite_raise(make_model, prompt, where):
    prompt[where][-1] = torch.nan
    with pytest.raises(ValueError, match=r"The predicted actions of samples \[1\] are NaN or infinite"):
        make_model().predict_action(**prompt)


def test_prompts_longer_than_the_backbones_positions_are_refused(make_model, make_config, prompt):
    length = prompt["input_ids"].shape[1]
    backbone = make_config().backbone_config.to_dict()
    for most in (length - 1, length):
        backbone["text_config"]["max_position_embeddings"] = most
        model = make_model(backbone_config=backbone)
        if most == length:
            assert model.predict_action(**prompt).actions.isfinite().all()
        else:
            with pytest.raises(ValueError, match=f"prompts of at most {most} tokens.* got {length}"):
                model.predict_action(**prompt)


def test_a_prompt_that_lacks_readout_tokens(make_model, prompt):
    model = make_model(num_readout_tokens=2)
    with pytest.raises(ValueError, match=r"the 2 readout tokens 260..261 in every prompt, got \[0, 0\] of them"):
        model.predict_action(**prompt)


def test_readout_tokens_are_learnt(make_model, make_processor, pictures, chunks):
    """And no other: the third in this prompt comes behind what the head sees."""
    model, processor = make_model(num_readout_tokens=2), make_processor(num_readout_tokens=3)
    model(**processor(images=pictures, text=TEXTS, state=np.zeros((2, 2)), actions=chunks)).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[260:262].abs().sum(-1).all() and not gradient[262:].any()


def test_the_head_keeps_its_own_initialisation(make_model):
    """Transformers would draw convolutions from N(0, 0.02) and undo the zeros of adaLN."""
    convolution = make_model(head_config=DIFFUSION).action_head.denoiser.final_conv[-1].weight
    bound = convolution[0].numel() ** -0.5  # PyTorch's default is uniform up to it
    assert 0.8 * bound < convolution.abs().max() <= bound
    dit = {"type": "dit", "hidden_size": 32, "depth": 1, "num_heads": 4}
    head = make_model(head_config={"type": "diffusion", "denoiser": dit}).action_head
    assert any(not parameter.any() for name, parameter in head.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(
    ("head_config", "message"),
    [
        ({"type": "difusion"}, "No action head 'difusion'; there are"),
        ({"type": "diffusion", "shedule": "cosine"}, "Action head 'diffusion' has no option 'shedule'"),
        ({"type": "diffusion", "denoiser": {"type": "unet"}}, "No denoiser 'unet'; there are"),
        ({"type": "diffusion", "denoiser": {**UNET, "dims": 3}}, "Denoiser 'conditional_unet1d' has no option 'dims'"),
    ],
)
def test_unknown_heads_and_options(make_model, head_config, message):
    with pytest.raises(ValueError, match=message):
        make_model(head_config=head_config)


@pytest.mark.parametrize("name", sorted(ACTION_HEADS))
def test_built_under_bfloat16_as_default(name, make_model, batch, prompt):
    """The published scheduler keeps its alphas in the default precision and ends in NaN."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make_model(head_config=HEADS.get(name, {"type": name}))
        assert model.dtype == torch.bfloat16
        output, actions = model(**batch, generator=seeded()), model.predict_action(**prompt).actions
    finally:
        torch.set_default_dtype(before)
    assert output.loss.dtype == actions.dtype == torch.float32
    assert output.loss.isfinite() and actions.isfinite().all()


def test_a_backbone_config_with_a_precision_of_its_own(make_model, make_config, prompt, tmp_path):
    """As published ones have; the model's is the one that was asked for, in every part."""
    backbone = make_config().backbone_config.to_dict() | {"dtype": "bfloat16"}
    backbone["text_config"]["dtype"] = "bfloat16"
    model = make_model(backbone_config=backbone)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.predict_action(**prompt).actions.isfinite().all()
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        parts = (saved, saved["backbone_config"], saved["backbone_config"]["text_config"])
        assert {part["dtype"] for part in parts} == {str(dtype).removeprefix("torch.")}
        again = AutoModel.from_pretrained(tmp_path)
        assert {parameter.dtype for parameter in again.parameters()} == {dtype}


def test_autocast(make_model, batch, prompt):
    model = make_model(head_config=DIFFUSION)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).loss.isfinite() and model.predict_action(**prompt).actions.isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_that_begins_with_a_missing_camera(
    make_model, make_config, make_processor, pictures, chunks, implementation
):
    """Its first tokens may attend to nothing at all."""
    processor = make_processor(prompt_config={"template": "{images}{instruction}"})
    pictures[0]["front"] = None
    batch = processor(images=pictures, text=TEXTS, state=np.zeros((2, 2)), actions=chunks)
    assert batch["attention_mask"][0, 0] == 0
    model = AutoModel.from_config(make_config(), attn_implementation=implementation).train()
    model.load_state_dict(make_model().state_dict())
    loss = model(**batch).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_attention_implementations_agree(make_model, make_config, prompt):
    model = make_model()
    assert model.backbone.language_model.config._attn_implementation == "sdpa"
    eager = AutoModel.from_config(make_config(), attn_implementation="eager").eval()
    assert eager.backbone.language_model.config._attn_implementation == "eager"
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(eager.predict_action(**prompt).actions, model.predict_action(**prompt).actions)


def test_what_trainers_and_accelerate_ask_for(make_model):
    model = make_model()
    assert model.accepts_loss_kwargs is False and "GPTNeoXLayer" in model._no_split_modules
    assert model.get_input_embeddings() is model.backbone.language_model.embed_in
    model.resize_token_embeddings(310)
    assert model.get_input_embeddings().num_embeddings == 310 == model.config.get_text_config().vocab_size
    assert get_checkpoint_conversion_mapping("tinyvla") is not None


def test_a_missing_weight_is_an_error(make_model, tmp_path):
    make_model(head_config=DIFFUSION).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["action_head.denoiser.final_conv.1.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of TinyVLAForActionPrediction"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["llava_siglip", "paligemma"])
def test_built_around_a_pretrained_backbone(name, make_model, make_config, robot, tmp_path):
    make_model(name).backbone.save_pretrained(tmp_path / "vlm")
    load = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    backbone = AutoModel.from_pretrained(tmp_path / "vlm", **load)
    backbone.resize_token_embeddings(310, mean_resizing=False)
    shape = backbone.get_input_embeddings().weight.shape  # a layer that transformers has never seen
    backbone.set_input_embeddings(torch.nn.Embedding(*shape, dtype=torch.bfloat16))
    before = {key: value.clone() for key, value in (*backbone.state_dict().items(), *backbone.named_buffers())}
    config = TinyVLAConfig(backbone_config=backbone.config, head_config=DIFFUSION, **robot.sizes, readout_token_id=300)
    model = TinyVLAForActionPrediction(config, backbone)
    assert model.backbone is backbone and {value.dtype for value in model.parameters()} == {torch.bfloat16}
    after = dict((*backbone.state_dict().items(), *backbone.named_buffers()))
    assert after.keys() == before.keys()
    assert all(value.dtype == before[key].dtype and torch.equal(value, before[key]) for key, value in after.items())
    assert torch.float32 in {value.dtype for value in backbone.buffers()}  # frequencies, which bfloat16 would shift
    for part in (backbone.config, backbone.config.text_config, backbone.config.vision_config):
        assert part._attn_implementation == "eager"
    other = AutoModel.from_config(make_config(name, backbone_config=backbone.config.to_dict(), head_config=DIFFUSION))
    assert model.state_dict().keys() == other.state_dict().keys()
    model.save_pretrained(tmp_path / "tinyvla")
    again, weights = AutoModel.from_pretrained(tmp_path / "tinyvla"), model.state_dict()
    assert again.config.get_text_config().vocab_size == 310
    assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match=r"build it as TinyVLAConfig\(backbone_config=backbone.config, ..."):
        TinyVLAForActionPrediction(make_config(name), backbone)


def test_the_tiny_preset_works(pictures, chunks):
    config = TinyVLAConfig.from_preset("tiny", action_dim=3, state_dim=None, chunk_size=4)
    statistics = {"robot": {"action": {"min": [0.0] * 3, "max": [1.0] * 3}}}
    action_config = {"chunk_size": 4, "normalization": {"mode": "min_max", "convention": "tinyvla"}}
    cameras = {"robot": [{"name": name, "width": 28, "height": 28} for name in ("front", "wrist")]}
    processor = TinyVLAProcessor.from_scratch(config, statistics, action_config, cameras)
    model = TinyVLAForActionPrediction(config)
    inputs = processor(images=pictures, text="push")
    assert processor.decode_actions(model.predict_action(**inputs)).shape == (2, 4, 3)
    assert model(**processor(images=pictures, text="push", actions=chunks)).loss.isfinite()
