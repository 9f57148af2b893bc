"""The recorded UNet, and what must hold for any: tolerances as published, 2e-5 on the output."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vla.actions.heads.networks import conditional_unet1d
from hf_vla.actions.heads.networks.condition import Condition
from hf_vla.actions.heads.networks.conditional_unet1d import ConditionalUnet1D, StepEncoder

ACTIONS, COND = 3, 12
SMALL = {"down_dims": (16, 32, 64), "diffusion_step_embed_dim": 8, "n_groups": 4}


def build(cond_dim=COND, **options):
    torch.manual_seed(0)
    return ConditionalUnet1D(ACTIONS, 16, cond_dim, **SMALL | options)


def condition(batch_size, cond_dim=COND, seed=1):
    vector = torch.randn(batch_size, cond_dim, generator=torch.Generator().manual_seed(seed))
    return Condition(vector, vector[:, None], torch.ones(batch_size, 1, dtype=torch.bool))


def chunk(batch_size, length, seed=2):
    return torch.randn(batch_size, length, ACTIONS, generator=torch.Generator().manual_seed(seed))


def denoise(unet, sample, time=37):
    (context,) = unet.prepare(condition(len(sample)), torch.full((1, len(sample)), time))
    return unet(sample, context)


def test_published_outputs(published):
    """At every step of the recorded sampling, from the recorded sample."""
    head, outputs = published.head, published.outputs
    encoded = head.condition_encoder(**published.batch)
    samples = [published.inputs["init_noise"], *outputs["ddim_samples"]]
    contexts = head.denoiser.prepare(encoded, torch.arange(90, -1, -10)[:, None])
    for sample, context, expected in zip(samples, contexts, outputs["ddim_eps"], strict=False):
        torch.testing.assert_close(head.denoiser(sample, context), expected, rtol=0, atol=2e-5)
    assert len(contexts) == len(outputs["ddim_eps"]) == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_two_precisions_of_the_time_differ(dtype, goldens):
    """So that the test above could not pass with one in place of the other."""
    folder = goldens / "unet1d" / "tinyvla_a"
    raw = load_file(folder / "outputs.safetensors")[f"t_emb_raw_{dtype}"]
    times = load_file(folder / "inputs.safetensors")["timestep"]
    assert raw.dtype == getattr(torch, dtype)
    errors = {
        other: (StepEncoder(32, getattr(torch, other)).waves(times).float() - raw.float()).abs().max()
        for other in ("float32", "bfloat16")
    }
    assert errors.pop(dtype) <= (2e-5 if dtype == "float32" else 0) and min(errors.values()) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_time_embeddings_are_the_published_tables(dtype, goldens):
    tables = load_file(goldens / "unet1d" / "scheduler_and_timestep_tables.safetensors")
    table = tables[{"float32": "sinusoid_fp32_dim256", "bfloat16": "sinusoid_bf16_dim256"}[dtype]]
    times = torch.arange(100)[::9]  # every ninth row is kept
    embedded = StepEncoder(256, getattr(torch, dtype)).waves(times)
    assert embedded.dtype == table.dtype
    torch.testing.assert_close(embedded, table, rtol=0, atol=2e-5 if dtype == "float32" else 0)


def test_weights_have_the_published_names(published):
    assert {name for name, _ in published.head.named_parameters()} == published.names
    assert not list(published.head.denoiser.buffers())


@pytest.mark.parametrize("n_groups", [4, 16])
def test_the_last_norm_has_eight_groups_whatever_the_others_have(n_groups):
    unet = build(down_dims=(32, 64), n_groups=n_groups)
    norms = {name: module.num_groups for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm)}
    assert norms.pop("final_conv.0.block.1") == 8 and set(norms.values()) == {n_groups}


def test_the_full_size_has_the_published_number_of_weights():
    with torch.device("meta"):
        unet = ConditionalUnet1D(10, 16, 2048)
    assert sum(p.numel() for p in unet.parameters()) == 94_584_330  # 98.8 M with the condition's norm and Linear


def test_weights_start_as_published():
    unet = build(down_dims=(64, 128))
    linears = [module for module in unet.modules() if isinstance(module, nn.Linear)]
    assert torch.cat([linear.weight.flatten() for linear in linears]).std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(linear.bias.any() for linear in linears)
    conv = unet.mid_modules[0].blocks[0].block[0]
    bound = (128 * 5) ** -0.5  # torch's own: uniform within 1 / sqrt(fan in), bias too
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01) and conv.bias.any()


@pytest.mark.parametrize("length", range(1, 18))
def test_any_length_is_padded_with_zeros_and_cropped(length):
    unet, sample = build(), chunk(2, length)
    result = denoise(unet, sample)
    assert result.shape == sample.shape
    padded = torch.cat([sample, torch.zeros(2, -length % 4, ACTIONS)], 1)
    torch.testing.assert_close(result, denoise(unet, padded)[:, :length], rtol=0, atol=1e-6)


def test_one_level_has_no_stride():
    unet = build(down_dims=(16,))
    assert unet.stride == 1 and denoise(unet, chunk(2, 5)).shape == (2, 5, ACTIONS)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [4, 7, 16])
def test_products_and_convolutions_agree_with_their_gradients(batch_size, length, monkeypatch):
    results = []
    for rows in (0, 1000):
        monkeypatch.setattr(conditional_unet1d, "MAX_ROWS", rows)
        unet, sample = build(), chunk(batch_size, length).requires_grad_()
        output = denoise(unet, sample)
        output.square().sum().backward()
        results.append([output, sample.grad, *(parameter.grad for parameter in unet.parameters())])
    for of_convolutions, of_products in zip(*results, strict=True):
        scale = of_convolutions.abs().max().item()
        torch.testing.assert_close(of_products, of_convolutions, rtol=0, atol=1e-5 * max(scale, 1.0))


def test_products_take_the_place_of_convolutions_only_of_few_rows_on_a_cpu():
    """Elsewhere nobody has measured which is faster."""
    assert conditional_unet1d.few_rows(torch.zeros(2, 8, 3)) and not conditional_unet1d.few_rows(torch.zeros(1, 17, 3))
    assert not conditional_unet1d.few_rows(torch.zeros(2, 8, 3, device="meta"))


def test_blocks_have_the_given_kernel_size():
    kernels = [block.blocks[0].block[0].kernel_size for block in build(kernel_size=3).residual_blocks()]
    assert kernels == [(3,)] * len(kernels) and build(kernel_size=3).final_conv[0].block[0].kernel_size == (3,)
    assert {block.blocks[1].block[0].kernel_size for block in build().residual_blocks()} == {(5,)}
    assert denoise(build(kernel_size=3), chunk(2, 8)).shape == (2, 8, ACTIONS)


@pytest.mark.parametrize("rows", [0, 1000])
def test_layers_are_torchs_convolutions(rows, monkeypatch):
    monkeypatch.setattr(conditional_unet1d, "MAX_ROWS", rows)
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    layers = [conditional_unet1d.Conv1d(8, 4, 5), conditional_unet1d.Conv1d(8, 8, 3, stride=2)]
    references = [nn.Conv1d(8, 4, 5, padding=2), nn.Conv1d(8, 8, 3, 2, 1)]
    layers.append(conditional_unet1d.ConvTranspose1d(8))
    references.append(nn.ConvTranspose1d(8, 8, 4, 2, 1))
    for layer, reference in zip(layers, references, strict=True):
        reference.load_state_dict(layer.state_dict())
        expected = reference(x.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_film_scales_by_s_and_not_by_one_plus_s():
    """With scale 0 and shift 0 nothing of the first convolution is left."""
    block = build().mid_modules[0]
    x, other = torch.randn(2, 2, 4, 64)
    film = torch.zeros(2, 128)
    skipped = block(x, film) - x
    torch.testing.assert_close(block(other, film) - other, skipped, rtol=0, atol=1e-6)
    film[:, :64] = 1.0
    assert (block(other, film) - other - skipped).abs().max() > 0.1


def test_contexts_of_many_steps_are_those_of_each_alone():
    unet, encoded = build(), condition(3)
    times = torch.tensor([90, 40, 0])
    together = unet.prepare(encoded, times[:, None])
    assert len(together) == 3
    for time, context in zip(times, together, strict=True):
        (alone,) = unet.prepare(encoded, time.expand(1, 3))
        torch.testing.assert_close(unet(chunk(3, 8), context), unet(chunk(3, 8), alone), rtol=0, atol=1e-6)


def test_time_and_condition_move_the_output_of_their_own_sample_only():
    unet, sample = build(), chunk(3, 8)
    encoded = condition(3)
    (context,) = unet.prepare(encoded, torch.tensor([[5, 50, 95]]))
    before = unet(sample, context)
    changed = Condition(encoded.vector.clone(), encoded.tokens, encoded.token_mask)
    changed.vector[1] += 5
    for other, times in ((changed, [5, 50, 95]), (encoded, [5, 80, 95])):
        (context,) = unet.prepare(other, torch.tensor([times]))
        moved = (unet(sample, context) - before).abs().amax((1, 2))
        assert moved[1] > 1e-4 and moved[[0, 2]].max() < 1e-6


def test_the_condition_costs_the_same_for_any_number_of_steps():
    def flops(cond_dim, steps):
        unet, encoded = build(cond_dim), condition(1, cond_dim)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            contexts = unet.prepare(encoded, torch.arange(steps)[:, None])
            for context in contexts:
                unet(chunk(1, 16), context)
        return counter.get_total_flops()

    widths = sum(block.film_size for block in build().residual_blocks())
    for steps in (1, 10):
        assert flops(1012, steps) - flops(12, steps) == 2 * 1000 * widths


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bfloat16_weights_stay_near_float32(batch_size):
    unet, sample = build(), chunk(batch_size, 16)
    expected = denoise(unet, sample)
    unet.to(torch.bfloat16)
    encoded = condition(batch_size)
    low = Condition(encoded.vector.to(torch.bfloat16), encoded.tokens, encoded.token_mask)
    (context,) = unet.prepare(low, torch.full((1, batch_size), 37))
    result = unet(sample.to(torch.bfloat16), context)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_new_weights_are_seen_at_once():
    unet, sample = build(), chunk(1, 8)
    before = denoise(unet, sample)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.5)
    assert (denoise(unet, sample) - before).abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_is_one_graph_to_the_compiler(batch_size):
    unet, sample = build(down_dims=(16, 32)), chunk(batch_size, 7)
    with torch.no_grad():
        (context,) = unet.prepare(condition(batch_size), torch.full((1, batch_size), 37))
        compiled = torch.compile(unet, backend="eager", fullgraph=True)(sample, context)
        torch.testing.assert_close(compiled, unet(sample, context), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down_dims": ()}, r"down_dims .*came \[\], 4 and 5"),
        ({"down_dims": (16, 30)}, r"multiples of n_groups, .*came \[16, 30\]"),
        ({"down_dims": (12, 16)}, r"the first of 8 too, .*came \[12, 16\]"),
        ({"kernel_size": 4}, "odd kernel_size, came .*4 and 4"),
        ({"diffusion_step_embed_dim": 7}, "even diffusion_step_embed_dim .*came 7"),
        ({"timestep_embedding_dtype": "float16"}, r"in \['float32', 'bfloat16'\], came 8 and 'float16'"),
    ],
)
def test_options_without_a_meaning_raise(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
