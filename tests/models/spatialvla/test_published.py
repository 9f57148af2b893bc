"""Checkpoints in the published layout, against what the published system computed (goldens/README.md)."""

import pytest
import torch
from safetensors.torch import load_file

from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration

VOCABULARY = slice(None, None, 8)  # goldens/README.md: which of the logits are kept


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0)


def test_loads_with_no_key_missing_or_unexpected(published):
    assert not published.info["missing_keys"] and not published.info["unexpected_keys"]
    processor = published.case["tokenizer"]
    assert published.model.config.action_token_begin_idx == processor["action_token_begin_idx"]
    expected = {"zoe1_spatial_chunk4": ([128, 64, 2], 4), "nozoe_nospatial_tied_batch2_pad_chunk1": ([30, 27, 2], 1)}
    assert (published.model.config.action_block_sizes, published.model.config.chunk_size) == expected[published.name]


def test_depth_and_image_features(published):
    outputs, infer = published.outputs, published.infer
    if published.model.config.use_vision_zoe:
        close(published.model.estimate_depth(infer["pixel_values"]), outputs["depth"][:, 0], 2e-4)
    features = published.model.get_image_features(infer["pixel_values"], infer["intrinsics"])
    close(features, outputs["image_features"], 5e-5)


def test_recorded_depth_replaces_the_depth_model(published):
    model, infer = published.model, published.infer
    if not model.config.use_vision_zoe:
        with pytest.raises(ValueError, match="no 3-D positions and would ignore `depth`"):
            model.get_image_features(infer["pixel_values"], infer["intrinsics"], torch.ones(2, 28, 28))
        return
    model.vision_zoe_model.forward = None  # calling it would raise
    try:
        depth = published.outputs["depth"][:, 0]
        features = model.get_image_features(infer["pixel_values"], infer["intrinsics"], depth)
    finally:
        del model.vision_zoe_model.forward
    close(features, published.outputs["image_features"], 5e-5)


def test_prompt_logits_and_hidden_states(published):
    real = published.infer["attention_mask"].bool()
    output = published.model(**published.infer, output_hidden_states=True)
    close(output.logits[real][:, VOCABULARY], published.outputs["eval.logits"][real], 1e-3)
    close(output.hidden_states[-1][real], published.outputs["eval.hidden_states"][-1][real], 1e-3)


def test_generate_gives_the_recorded_tokens(published):
    expected = published.outputs["gen.token_ids"]
    new = expected.shape[1]
    output = published.model.generate(
        **published.infer, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(output.sequences[:, -new:], expected)
    close(torch.stack(output.logits, dim=1), published.outputs["gen.step_logits"], 1e-3)


def test_training_loss_and_logits(published):
    """The recorded loss of a padded batch has the reference's padding leak; each sample alone has not."""
    output = published.model(**published.train)
    close(output.loss, published.outputs["train.loss_each_unpadded"].mean(), 1e-4)
    unpadded = published.train["attention_mask"].all(-1)
    assert unpadded.any()
    close(output.logits[unpadded][..., VOCABULARY], published.outputs["train.logits"][unpadded], 1e-3)
    assert torch.equal(
        published.model(**published.train, token_type_ids=published.inputs["train.token_type_ids"]).loss, output.loss
    )


def test_training_gradients(goldens):
    folder = goldens / "spatialvla" / "zoe1_spatial_chunk4"
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    model = SpatialVLAForConditionalGeneration.from_pretrained(folder / "checkpoint").train()
    model(
        input_ids=inputs["train.input_ids"],
        attention_mask=inputs["train.attention_mask"],
        pixel_values=inputs["train.pixel_values"],
        intrinsics=inputs["train.intrinsic"],
        labels=inputs["train.labels"],
    ).loss.backward()
    parameters = dict(model.named_parameters())
    recorded = {key.removeprefix("train.grad."): value for key, value in outputs.items() if "train.grad." in key}
    assert len(recorded) == 9
    for name, expected in recorded.items():
        grad = parameters[name.removesuffix("[action_rows]").replace("vision_model.", "")].grad
        grad = grad[-model.config.spatial_token_num :] if name.endswith("[action_rows]") else grad
        close(grad[::4], expected, 1e-3 * expected.abs().max().item())
    frozen = [name for name, parameter in parameters.items() if parameter.grad is None]
    assert frozen == [name for name in parameters if name.startswith("vision_zoe_model.")]
    assert not any(parameters[name].requires_grad for name in frozen)


@pytest.mark.parametrize("save_original_format", [True, False])
def test_saves_and_loads_back_bit_equal(published, tmp_path, save_original_format):
    published.model.save_pretrained(tmp_path, save_original_format=save_original_format)
    assert not list(tmp_path.glob("*.bin"))
    again = SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    expected, actual = published.model.state_dict(), again.state_dict()
    assert expected.keys() == actual.keys() and all(torch.equal(expected[key], actual[key]) for key in expected)
    assert again.config.action_block_sizes == published.model.config.action_block_sizes
    assert torch.equal(again(**published.infer).logits, published.model(**published.infer).logits)


def test_predict_action_follows_generate_as_long_as_that_stays_in_the_blocks(published):
    """The recorded random weights leave the blocks, so compare step by step with what the model itself would score."""
    config, model = published.model.config, published.model
    starts = torch.tensor([0, *config.action_block_sizes]).cumsum(0)
    output = model.predict_action(**published.infer)
    first = published.outputs["gen.step_logits"][:, 0, config.action_token_begin_idx :]
    close(output.logits[:, 0, : starts[1]], first[:, : starts[1]], 1e-3)
    num_blocks = len(config.action_block_sizes)
    for step in range(output.action_ids.shape[1]):
        start, stop = starts[step % num_blocks], starts[step % num_blocks + 1]
        ids, logits = output.action_ids[:, step], output.logits[:, step]
        assert ((start <= ids) & (ids < stop)).all()
        assert torch.equal(torch.isfinite(logits).sum(-1), (stop - start).expand(len(logits)))
        assert torch.equal(ids, logits.argmax(-1))
    # the same logits as a plain forward pass over prompt and chosen tokens
    tokens = torch.cat([published.infer["input_ids"], output.action_ids + config.action_token_begin_idx], dim=-1)
    mask = torch.nn.functional.pad(published.infer["attention_mask"], (0, output.action_ids.shape[1]), value=1)
    whole = model(**{**published.infer, "input_ids": tokens, "attention_mask": mask}).logits
    whole = whole[:, -output.action_ids.shape[1] - 1 : -1, config.action_token_begin_idx :]
    allowed = torch.isfinite(output.logits)
    close(output.logits[allowed], whole[allowed], 1e-3)
