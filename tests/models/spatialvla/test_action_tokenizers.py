"""The same language model with every action tokenizer, and with RT-2's layout of uniform bins."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor

from hf_vla.actions.tokenizers.fast import FastTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import NUM_BINS
from hf_vla.actions.tokenizers.registry import ACTION_TOKENIZERS
from hf_vla.actions.tokenizers.uniform import UniformTokenizer
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.spatialvla.action_tokens import token_fields
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor

CHUNK_SIZE = 5
NAMES = [*sorted(ACTION_TOKENIZERS), "rt2"]
TEXTS = ["push", "pick up the red cube"]


def chunks(count, action_dim, seed):
    phase, rate = np.random.default_rng(seed).uniform(0, 2 * np.pi, (2, count, 1, action_dim))
    actions = 0.9 * np.sin(rate * np.linspace(0, 1, CHUNK_SIZE)[:, None] + phase)
    actions[..., -1] = np.sign(actions[..., -1])  # a gripper
    return actions


def make_tokenizer(name, action_dim=7):
    if name == "rt2":
        return UniformTokenizer(action_dim, terminate=True)
    if name == "fast":
        return FastTokenizer.fit(chunks(300, action_dim, seed=0), vocab_size=256)
    kind = ACTION_TOKENIZERS[name]
    if name == "gaussian_grid":
        return kind.fit(chunks(300, action_dim, seed=0), [bins // 2 for bins in NUM_BINS[: action_dim - 1]])
    return kind.fit(chunks(300, action_dim, seed=0)) if hasattr(kind, "fit") else kind(action_dim)


def make(name, action_dim=7, spread=None):
    """Model and processor of a robot whose actions are in [-1, 1]; `spread` makes a fresh network listen."""
    tokenizer = make_tokenizer(name, action_dim)
    text_config = SpatialVLAConfig.from_preset("tiny").text_config.to_dict()
    config = SpatialVLAConfig.from_preset(
        "tiny",
        use_vision_zoe=False,
        chunk_size=CHUNK_SIZE,
        text_config={**text_config, "vocab_size": 260 + tokenizer.vocab_size},
        **token_fields(tokenizer),
    )
    torch.manual_seed(0)
    model = SpatialVLAForConditionalGeneration(config).eval()
    model.set_action_tokenizer(tokenizer, CHUNK_SIZE)
    if spread is not None:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=spread * parameter[0].numel() ** -0.5)
    mode = ["min_max"] * (action_dim - 1) + ["zero_one" if name == "gaussian_grid" else "min_max"]
    limits = {"min": [-1.0] * action_dim, "max": [1.0] * action_dim}
    action_config = {
        "chunk_size": CHUNK_SIZE,
        "normalization": {"mode": mode, "clip": True, "convention": "spatialvla"},
        "tokenizer": {"type": tokenizer.type, **tokenizer.to_dict()},
    }
    return model, SpatialVLAProcessor.from_scratch(config, {"robot": {"action": limits}}, action_config, {})


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """Random weights in float64: two ways to the same number then agree to the last digits."""
    model, processor = make(request.param, spread=2.0)
    return model.requires_grad_(False).double(), processor


@pytest.fixture
def images():
    return list(np.random.default_rng(1).integers(0, 255, (2, 48, 64, 3), np.uint8))


@pytest.mark.parametrize("action_dim", [pytest.param(4, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_learnt_chunks_says_them(name, action_dim, images):
    """With rotations or, as on Meta-World, without."""
    model, processor = make(name, action_dim)
    targets, codec = chunks(2, action_dim, seed=3), processor.action_codec
    ends = np.array([[False] * CHUNK_SIZE, [False] * (CHUNK_SIZE - 1) + [True]])
    batch = processor(images=images, text=TEXTS, actions=targets, terminate=ends)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    loss, steps = torch.inf, 0
    while loss > 0.01:  # every token is the likeliest, by far
        loss, steps = model(**batch).loss, steps + 1
        assert steps < 300
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    output = model.eval().predict_action(**processor(images=images, text=TEXTS))
    decoded = processor.decode_actions(output)
    expected = np.stack(
        [codec.decode(codec.encode(chunk, terminate=end)) for chunk, end in zip(targets, ends, strict=True)]
    )
    np.testing.assert_array_equal(decoded, expected)
    assert np.abs(decoded - targets).max() < 0.7 and decoded.shape == (2, CHUNK_SIZE, action_dim)
    if codec.terminates:
        np.testing.assert_array_equal(processor.decode_terminate(output), ends)


def test_only_what_may_follow_is_chosen(pair, images):
    model, processor = pair
    tokenizer = processor.action_codec.tokenizer
    for options in ({}, {"do_sample": True, "temperature": 100.0, "generator": torch.Generator().manual_seed(0)}):
        output = model.predict_action(**processor(images=images, text=TEXTS), **options)
        for ids, logits in zip(output.action_ids, output.logits, strict=True):
            stream = tokenizer.stream(CHUNK_SIZE)
            for token, scores in zip(ids.tolist(), logits, strict=True):
                assert np.array_equal(torch.isfinite(scores).numpy(), stream.allowed())  # nothing once it is complete
                if stream.complete:
                    assert token == -100
                    continue
                stream.push(token)
                assert options or token == scores.argmax()
            assert stream.complete
        assert processor.decode_actions(output).shape == (2, CHUNK_SIZE, 7)


def test_batch_mates_and_padding_change_nothing(pair, images):
    model, processor = pair
    together = model.predict_action(**processor(images=images, text=TEXTS))
    lengths = (together.action_ids >= 0).sum(-1).tolist()
    for index, length in enumerate(lengths):
        alone = model.predict_action(**processor(images=images[index], text=TEXTS[index]))
        assert alone.action_ids.shape == (1, length)
        assert torch.equal(alone.action_ids[0], together.action_ids[index, :length])
        torch.testing.assert_close(alone.logits[0], together.logits[index, :length], atol=1e-5, rtol=0)


def test_right_padding_is_visible_to_nobody(pair, images):
    model, processor = pair
    targets, ends = chunks(2, 7, seed=4), np.zeros((2, CHUNK_SIZE), bool)
    together = model(**processor(images=images, text=TEXTS, actions=targets, terminate=ends)).loss
    alone = [
        model(**processor(images=image, text=text, actions=target, terminate=end)).loss
        for image, text, target, end in zip(images, TEXTS, targets, ends, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-6, rtol=0)


def test_prediction_and_forward_score_alike(pair, images):
    model, processor = pair
    inputs = processor(images=images, text=TEXTS)
    output = model.predict_action(**inputs)
    begin = model.config.action_token_begin_idx
    tokens = torch.cat([inputs["input_ids"], output.action_ids.clamp(min=0) + begin], dim=-1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, output.action_ids.shape[1]), value=1)
    whole = model(input_ids=tokens, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
    whole = whole[:, -output.action_ids.shape[1] - 1 : -1, begin:]
    allowed = torch.isfinite(output.logits)
    torch.testing.assert_close(output.logits[allowed].double(), whole[allowed], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_predicts_the_same(name, images, tmp_path):
    model, processor = make(name, spread=2.0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    names = ("action_block_sizes", "action_token_ranges", "spatial_token_num", "chunk_size")
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in names)
    expected = model.predict_action(**processor(images=images, text=TEXTS))
    output = again.predict_action(**reader(images=images, text=TEXTS))
    assert torch.equal(output.action_ids, expected.action_ids) and torch.equal(output.logits, expected.logits)
    np.testing.assert_array_equal(reader.decode_actions(output), processor.decode_actions(expected))


def test_ids_of_generate_decode(pair, images):
    """Behind a prompt, with the end token that training puts there."""
    model, processor = pair
    output = model.predict_action(**processor(images=images, text=TEXTS))
    begin, eos = processor.action_token_begin, processor.tokenizer.eos_token_id
    rows = [ids[ids >= 0] + begin for ids in output.action_ids]
    rows = torch.nn.utils.rnn.pad_sequence([torch.cat([row, torch.tensor([eos])]) for row in rows], batch_first=True)
    np.testing.assert_array_equal(processor.decode_actions(rows), processor.decode_actions(output))


@pytest.mark.parametrize("name", ["uniform", "fast"])
def test_joints_need_no_grid(name):
    model, processor = make(name)
    names = [f"joint_{index}" for index in range(7)]
    config = {**processor.action_config, "specs": {"robot": {"action": {"names": names, "kind": "joint"}}}}
    parts = (processor.image_processor, processor.tokenizer, processor.statistics)
    assert SpatialVLAProcessor(*parts, config).action_codec.specs("robot")[0].kind == "joint"


@pytest.mark.parametrize("do_sample", [False, True])
def test_fast_always_decodes(do_sample):
    """Whatever random weights say: 200 prompts, chunks of many lengths."""
    model, processor = make("fast", spread=3.0)
    generator, lengths = torch.Generator().manual_seed(0), set()
    for start in range(0, 200, 50):
        rng = np.random.default_rng(start)
        pictures = list(rng.integers(0, 255, (50, 8, 8, 3), np.uint8))
        texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 20)))) for _ in pictures]
        inputs = processor(images=pictures, text=texts)
        output = model.predict_action(**inputs, do_sample=do_sample, temperature=5.0, generator=generator)
        actions = processor.decode_actions(output)
        assert actions.shape == (50, CHUNK_SIZE, 7) and np.isfinite(actions).all()
        lengths |= set((output.action_ids >= 0).sum(-1).tolist())
    assert len(lengths) > 5


def test_fast_needs_its_vocabulary(images, tmp_path):
    model, processor = make("fast")
    model.save_pretrained(tmp_path)  # without its processor
    with pytest.raises(ValueError, match="only its action tokenizer knows: load it from a folder that holds its proc"):
        AutoModel.from_pretrained(tmp_path).predict_action(**processor(images=images, text=TEXTS))
    with pytest.raises(ValueError, match=f"tokenizer of {model.config.spatial_token_num} ids, .* got 2: is processor"):
        model.set_action_tokenizer(UniformTokenizer(7, 2), CHUNK_SIZE)
    processor.action_config["tokenizer"] = UniformTokenizer(7, 16).to_dict()
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 16: is processor_config.json another checkpoint's"):
        AutoModel.from_pretrained(tmp_path)


def test_fast_learns_whole_chunks_alone(images):
    _, processor = make("fast")
    mask = np.ones((2, CHUNK_SIZE), bool)
    batch = processor(images=images, text=TEXTS, actions=chunks(2, 7, seed=5), action_mask=mask)
    for ids, labels, types in zip(batch["input_ids"], batch["labels"], batch["token_type_ids"], strict=True):
        assert torch.equal(labels[types == 1], ids[types == 1]) and labels[types == 1][-1] == 1
    mask[1, 3:] = False
    with pytest.raises(ValueError, match="cannot be left out: .* data.chunk_tail: hold"):
        processor(images=images, text=TEXTS, actions=chunks(2, 7, seed=5), action_mask=mask)
    with pytest.raises(ValueError, match="no blocks to move ids into: leave clip_ids out"):
        processor.decode_actions(VLAOutput(action_ids=torch.zeros(1, 3, dtype=torch.long)), clip_ids=True)


def test_the_terminate_token_stands_in_front_of_every_action(images):
    _, processor = make("rt2")
    targets, mask = chunks(2, 7, seed=6), np.ones((2, CHUNK_SIZE), bool)
    mask[1, 3:] = False
    ends = np.zeros((2, CHUNK_SIZE), bool)
    ends[1, 2:] = True
    batch = processor(images=images, text=TEXTS, actions=targets, action_mask=mask, terminate=ends)
    labels = [row[types == 1] for row, types in zip(batch["labels"], batch["token_type_ids"], strict=True)]
    first, second = (row[:-1].view(CHUNK_SIZE, 8) - processor.action_token_begin for row in labels)
    assert (first[:, 0] == 0).all() and second[:3, 0].tolist() == [0, 0, 1]
    assert labels[0][-1] == 1 and (labels[1][24:] == -100).all() and (labels[1][:24] >= 0).all()
    ids = UniformTokenizer(7).encode(targets[0]).reshape(CHUNK_SIZE, 7)
    np.testing.assert_array_equal(first[:, 1:], ids)
    for wrong, message in ((None, "give `terminate`, True at its last action"), (ends[:1], r"of shape \(2, 5\)")):
        with pytest.raises(ValueError, match=message):
            processor(images=images, text=TEXTS, actions=targets, terminate=wrong)
    _, plain = make("uniform")
    with pytest.raises(ValueError, match="do not say where an episode ends"):
        plain.decode_terminate(VLAOutput(action_ids=torch.zeros(1, 35, dtype=torch.long)))


def test_grids_keep_their_block_sizes(tmp_path):
    SpatialVLAConfig.from_preset("tiny").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["action_block_sizes"] == [1024, 512, 2] and saved["action_token_ranges"] is None
    ranges = SpatialVLAConfig.from_pretrained(tmp_path).action_ranges(2)
    assert ranges == [(0, 1024), (1024, 1536), (1536, 1538)] * 2
