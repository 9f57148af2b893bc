"""The transformer denoiser: ScaleDP as recorded, CogACT's and the cross-attention against plain restatements."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from hf_vla.actions.heads.diffusion import DiffusionHead
from hf_vla.actions.heads.networks.condition import Condition
from hf_vla.actions.heads.networks.dit import CONDITIONINGS, DiT

CHUNK, ACTION_DIM, COND_DIM = 6, 3, 10


def build(conditioning="adaln_zero", seed=0, **options):
    """A tiny DiT away from its initial zeros, so that everything in it counts."""
    torch.manual_seed(seed)
    network = DiT(
        ACTION_DIM, CHUNK, COND_DIM, hidden_size=16, depth=2, num_heads=4, conditioning=conditioning, **options
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def observe(batch_size=2, length=5, seed=1):
    """A condition whose second sample has two padded tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch_size, length, dtype=torch.bool)
    mask[1:, -2:] = False
    return Condition(
        torch.randn(batch_size, COND_DIM, generator=generator),
        torch.randn(batch_size, length, COND_DIM, generator=generator),
        mask,
    )


def noisy(batch_size=2, horizon=CHUNK):
    return torch.randn(batch_size, horizon, ACTION_DIM, generator=torch.Generator().manual_seed(2))


def call(network, sample, condition, time=7.0):
    (context,) = network.prepare(condition, torch.tensor([[time]]))
    return network(sample, context)


@pytest.fixture(scope="module", params=[("float32", "fp32emb"), ("bfloat16", "bf16emb")], ids=lambda param: param[0])
def scaledp(request, goldens):
    """Head with ScaleDP's recorded weights, its inputs and outputs, at one precision of the timestep embedding."""
    dtype, variant = request.param
    folder = goldens / "scaledp" / "scaledp_a"
    head = DiffusionHead(
        48,
        14,
        16,
        14,
        condition={"norm": False, "combine": "mlp", "hidden_dim": 64},
        reduction="published",
        denoiser={"type": "dit", "hidden_size": 64, "depth": 2, "num_heads": 4, "timestep_embedding_dtype": dtype},
    )
    weights = load_file(folder / "weights.safetensors")
    prefixes = {name: "condition_encoder." if name.startswith("combine.") else "denoiser." for name in weights}
    head.load_state_dict({prefixes[name] + name: weight for name, weight in weights.items()})
    return head, load_file(folder / "inputs.safetensors"), load_file(folder / f"outputs_{variant}.safetensors")


def real(inputs):
    return torch.ones(inputs["hidden_states"].shape[:2], dtype=torch.bool)


@torch.no_grad()
def test_scaledp_forward_is_as_recorded(scaledp):
    head, inputs, recorded = scaledp
    network, times = head.denoiser, inputs["timestep"]
    torch.testing.assert_close(network.t_embedder.waves(times), recorded["t_freq"], rtol=0, atol=1e-6)
    torch.testing.assert_close(network.t_embedder(times), recorded["t_encoded"], rtol=0, atol=2e-5)
    condition = head.condition_encoder(inputs["hidden_states"], real(inputs), inputs["states"])
    for name, times in (("out_vec", inputs["timestep"][None]), ("out_scalar", inputs["timestep_scalar"].view(1, 1))):
        (context,) = network.prepare(condition, times)
        torch.testing.assert_close(network(inputs["sample"], context), recorded[name], rtol=0, atol=2e-5)


def test_scaledp_loss_and_gradients_are_as_recorded(scaledp):
    head, inputs, recorded = scaledp
    features, state = (inputs[name].clone().requires_grad_() for name in ("hidden_states", "states"))
    actions, mask = inputs["actions"][:, :16], ~inputs["is_pad"][:, :16]
    loss = head.loss(
        features, real(inputs), actions, mask, state, noise=inputs["noise"][0], timesteps=inputs["train_timesteps"]
    ).mean()
    torch.testing.assert_close(loss, recorded["loss"], rtol=0, atol=4e-5)
    for tensor, name in ((features, "grad_hidden_states"), (state, "grad_states")):
        (gradient,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        torch.testing.assert_close(gradient, recorded[name], rtol=0, atol=1e-3 * float(recorded[name].abs().max()))


def test_scaledp_sampling_is_as_recorded_in_every_step(scaledp, monkeypatch):
    head, inputs, recorded = scaledp
    calls = []

    def predict(sample, context):
        calls.append((sample, DiffusionHead.guided(head, sample, context)))
        return calls[-1][1]

    monkeypatch.setattr(head, "guided", predict)
    final = head.sample(inputs["hidden_states"], real(inputs), inputs["states"], noise=inputs["init_noise"])
    torch.testing.assert_close(final, recorded["ddim_final"], rtol=0, atol=7e-4)
    samples, predictions = (torch.stack(tensors) for tensors in zip(*calls, strict=True))
    torch.testing.assert_close(predictions, recorded["ddim_eps"], rtol=0, atol=7e-4)
    torch.testing.assert_close(samples[1:], recorded["ddim_samples"][:-1], rtol=0, atol=7e-4)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_untrained_blocks_are_identities_and_the_output_is_zero(conditioning):
    network = DiT(ACTION_DIM, CHUNK, COND_DIM, hidden_size=16, depth=2, num_heads=4, conditioning=conditioning)
    (context,) = network.prepare(observe(), torch.tensor([[3.0]]))
    assert call(network, noisy(), observe()).eq(0).all()
    assert network.pos_embed.eq(0).all()
    x = torch.randn(2, CHUNK, 16)
    for block, modulation, memory in zip(network.blocks, context.modulations, context.memories, strict=False):
        torch.testing.assert_close(block(x, modulation, memory, context.memory_mask), x, rtol=0, atol=0)


def plain_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def plain_attention(queries, keys, values, num_heads=4):
    heads = []
    for q, k, v in zip(*(t.chunk(num_heads, -1) for t in (queries, keys, values)), strict=True):
        heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return torch.cat(heads, -1)


def test_in_context_equals_a_plain_restatement_of_cogact():
    network, condition, sample = build("in_context"), observe(), noisy()
    weights = network.state_dict()

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    angles = 7.0 * 10000.0 ** (-torch.arange(128) / 128)
    time = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()]), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    token = time + linear(condition.vector, "cond_obs_emb")
    x = torch.cat([token[:, None], linear(sample, "x_embedder")], 1) + weights["pos_embed"]
    for i in range(2):
        attended = plain_attention(*linear(plain_norm(x), f"blocks.{i}.attn.qkv").chunk(3, -1))
        x = x + linear(attended, f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(plain_norm(x), f"blocks.{i}.mlp.fc1"), approximate="tanh")
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    expected = linear(plain_norm(x), "final_layer.linear")[:, 1:]
    torch.testing.assert_close(call(network, sample, condition), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name in weights if "adaLN" in name or "cross_attn" in name]


def test_cross_attention_block_equals_a_plain_restatement():
    network, condition = build("cross_attention"), observe(1)
    block, x = network.blocks[0], torch.randn(1, CHUNK, 16, generator=torch.Generator().manual_seed(3))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation = torch.randn(6, 16).unbind()
    layers = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = plain_norm(x) * (1 + scale) + shift
    expected = x + gate * layers["attn.proj"](plain_attention(*layers["attn.qkv"](expected).chunk(3, -1)))
    queries, memory = layers["cross_attn.q"](plain_norm(expected)), layers["cross_attn.kv"](condition.tokens)
    expected = expected + layers["cross_attn.proj"](plain_attention(queries, *memory.chunk(2, -1)))
    hidden = layers["mlp.fc1"](plain_norm(expected) * (1 + mlp_scale) + mlp_shift)
    expected = expected + mlp_gate * layers["mlp.fc2"](F.gelu(hidden, approximate="tanh"))
    result = block(x, modulation, block.memory(condition.tokens), condition.token_mask[:, None, None])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_cross_attention_reads_every_real_token_and_no_other():
    network, condition, sample = build("cross_attention"), observe(), noisy()
    expected = call(network, sample, condition)
    tokens = condition.tokens.masked_fill(~condition.token_mask[..., None], 1e6)
    assert call(network, sample, Condition(condition.vector, tokens, condition.token_mask)).equal(expected)
    for sample_index, token in condition.token_mask.nonzero().tolist():
        tokens = condition.tokens.clone()
        tokens[sample_index, token] += 1.0
        changed = (call(network, sample, Condition(condition.vector, tokens, condition.token_mask)) - expected).abs()
        assert changed[sample_index].max() > 1e-4
        assert changed[1 - sample_index].max() == 0


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
def test_without_cross_attention_tokens_change_nothing(conditioning):
    network, condition, sample = build(conditioning), observe(), noisy()
    other = Condition(condition.vector, condition.tokens + 1.0, condition.token_mask)
    assert call(network, sample, condition).equal(call(network, sample, other))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_projection_of_time_and_condition_is_called_once_for_all_steps(conditioning):
    network, condition, calls = build(conditioning), observe(), []
    per_step = (
        "x_embedder",
        "attn.qkv",
        "attn.proj",
        "cross_attn.q",
        "cross_attn.proj",
        "mlp.fc1",
        "mlp.fc2",
        "linear",
    )
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(per_step):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for context in network.prepare(condition, torch.arange(20.0)[:, None]):
        network(noisy(), context)
    assert len(calls) == len(set(calls)) == {"adaln_zero": 6, "in_context": 3, "cross_attention": 8}[conditioning]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_steps_prepared_together_equal_steps_prepared_alone(conditioning):
    network, condition, sample = build(conditioning), observe(), noisy()
    times = torch.tensor([[0.0, 3.0], [900.0, 40.0], [12.5, 12.5]])
    for row, context in zip(times, network.prepare(condition, times), strict=True):
        for i, time in enumerate(row):
            expected = call(network, sample, condition, time.item())[i]
            torch.testing.assert_close(network(sample, context)[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_batch_mates_change_nothing(conditioning):
    network, condition, sample = build(conditioning), observe(3), noisy(3)
    together = call(network, sample, condition)
    for i in range(3):
        alone = Condition(*(getattr(condition, name)[i : i + 1] for name in ("vector", "tokens", "token_mask")))
        torch.testing.assert_close(call(network, sample[i : i + 1], alone)[0], together[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_shorter_chunks_use_the_first_positions_and_longer_ones_raise(conditioning):
    network, condition, sample = build(conditioning), observe(), noisy(horizon=CHUNK - 2)
    expected = call(network, sample, condition)
    assert expected.shape == sample.shape
    with torch.no_grad():
        network.pos_embed[:, -2:] += 1.0
        assert call(network, sample, condition).equal(expected)
        network.pos_embed[:, -3:] += torch.arange(16.0)
        assert not call(network, sample, condition).allclose(expected)
    with pytest.raises(ValueError, match="at most chunk_size = 6 actions, came 7"):
        call(network, noisy(horizon=CHUNK + 1), condition)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_parameter_learns_from_the_initial_zeros(conditioning):
    torch.manual_seed(0)
    network = DiT(ACTION_DIM, CHUNK, COND_DIM, hidden_size=16, depth=2, num_heads=4, conditioning=conditioning)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (call(network, noisy(), observe()) - 1.0).square().mean().backward()
        optimizer.step()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.abs().max() > 0] == []


@torch.no_grad()
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_bfloat16_weights_stay_near_float32(conditioning):
    network, condition, sample = build(conditioning), observe(), noisy()
    for parameter in network.parameters():
        parameter.mul_(0.5)
    expected = call(network, sample, condition, 640.0)
    low = Condition(condition.vector.bfloat16(), condition.tokens.bfloat16(), condition.token_mask)
    result = call(network.bfloat16(), sample.bfloat16(), low, 640.0)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.04 * float(expected.abs().max()))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_reset_parameters_reaches_every_parameter_of_a_network_built_on_meta(conditioning):
    torch.manual_seed(0)
    options = {"hidden_size": 64, "depth": 1, "num_heads": 4, "conditioning": conditioning}
    with torch.device("meta"):
        network = DiT(ACTION_DIM, CHUNK, COND_DIM, **options)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    network.reset_parameters()
    built = DiT(ACTION_DIM, CHUNK, COND_DIM, **options)
    for (name, parameter), other in zip(network.named_parameters(), built.parameters(), strict=True):
        torch.testing.assert_close(parameter.std(), other.std(), rtol=0.3, atol=0, msg=name)
    for layer in (network.x_embedder, network.cond_obs_emb, network.t_embedder.mlp[0], network.t_embedder.mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert network.blocks[0].attn.qkv.weight.std().item() == pytest.approx((2 / (64 + 192)) ** 0.5, rel=0.1)  # Xavier
    if conditioning == "in_context":
        assert network.pos_embed.std().item() == pytest.approx(64**-0.5, rel=0.2)


@pytest.mark.parametrize(
    ("conditioning", "depth", "hidden_size", "num_heads", "cond_dim", "published"),
    [
        ("in_context", 6, 384, 4, 4096, 13e6),
        ("in_context", 12, 768, 12, 4096, 89e6),
        ("in_context", 24, 1024, 16, 4096, 308e6),
        ("adaln_zero", 24, 1024, 16, 1536, 0.4e9),
        ("adaln_zero", 32, 1280, 16, 1536, 1e9),
    ],
)
def test_published_sizes(conditioning, depth, hidden_size, num_heads, cond_dim, published):
    with torch.device("meta"):
        network = DiT(
            14, 16, cond_dim, hidden_size=hidden_size, depth=depth, num_heads=num_heads, conditioning=conditioning
        )
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == pytest.approx(published, rel=0.05 if conditioning == "in_context" else 0.15)  # as rounded


@pytest.mark.parametrize("mlp_ratio", [1.5, 2.0])
def test_mlp_ratio_is_the_width_of_the_mlp_over_the_hidden_size(mlp_ratio):
    block = build(mlp_ratio=mlp_ratio).blocks[0]
    assert block.mlp.fc1.weight.shape == (16 * mlp_ratio, 16) and block.mlp.fc2.weight.shape == (16, 16 * mlp_ratio)
    assert build().blocks[0].mlp.fc1.out_features == 64  # four times is the default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "film"}, "Expected conditioning in .*'in_context'.* came 'film'"),
        ({"timestep_embedding_dtype": "float16"}, "timestep_embedding_dtype in .* came .*'float16'"),
        ({"hidden_size": 18, "num_heads": 4}, "4 attention heads do not divide a hidden_size of 18"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(ACTION_DIM, CHUNK, COND_DIM, **options)
