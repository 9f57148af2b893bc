import pytest
import torch
from safetensors.torch import load_file

from hf_vla.actions.heads.networks.condition import POOLINGS, ConditionEncoder

FEATURES, STATE = 16, 3


def build(pooling="mean", state_dim=STATE, **options):
    torch.manual_seed(0)
    return ConditionEncoder(FEATURES, state_dim, pooling=pooling, **options)


@pytest.fixture
def inputs():
    """Three samples of 5, 3 and 1 real tokens; the last one's is not the first."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5) < torch.tensor([[5], [3], [0]])
    mask[2, 2] = True
    features = torch.randn(3, 5, FEATURES, generator=generator)
    return features, mask, torch.randn(3, STATE, generator=generator)


def check_published(encoder, features, state, outputs):
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    pooled = encoder._pool(features, mask)
    torch.testing.assert_close(pooled, outputs["pooled"], rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.norm(pooled), outputs["normed"], rtol=0, atol=5e-6)
    torch.testing.assert_close(encoder(features, mask, state).vector, outputs["combined"], rtol=0, atol=5e-6)


@pytest.mark.parametrize(("case", "length"), [("tinyvla_a", 11), ("dexvla_a", 1)])
def test_pools_norms_and_combines_as_published(case, length, goldens):
    """The one token of DexVLA is its own mean."""
    folder = goldens / "unet1d" / case
    inputs = load_file(folder / "inputs.safetensors")
    encoder = ConditionEncoder(inputs["hidden_states"].shape[-1], inputs["states"].shape[-1])
    weights = load_file(folder / "condition_weights.safetensors")
    encoder.load_state_dict({name.replace("norm_after_pool", "norm"): w for name, w in weights.items()})
    assert inputs["hidden_states"].shape[1] == length
    check_published(encoder, inputs["hidden_states"], inputs["states"], load_file(folder / "outputs.safetensors"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_padded_sample_gives_what_its_real_tokens_give(pooling, inputs):
    features, mask, state = inputs
    encoder = build(pooling)
    together = encoder(features, mask, state)
    for row in range(3):
        real = features[row, mask[row]][None]
        alone = encoder(real, torch.ones(real.shape[:2], dtype=torch.bool), state[[row]])
        torch.testing.assert_close(together.vector[[row]], alone.vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [1e9, float("nan"), float("-inf")])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_content_of_padding_changes_no_bit(pooling, value, inputs):
    features, mask, state = inputs
    changed = features.masked_fill(~mask[..., None], value)
    before, after = (build(pooling)(x, mask, state) for x in (features, changed))
    assert torch.equal(before.vector, after.vector) and torch.equal(before.tokens, after.tokens)
    assert torch.equal(after.token_mask, mask) and torch.isfinite(after.tokens).all()


def test_poolings_are_what_they_are_called(inputs):
    features, mask, _ = inputs
    plain = {"state_dim": None, "norm": False}
    mean = torch.stack([features[0].mean(0), features[1, :3].mean(0), features[2, 2]])
    torch.testing.assert_close(build("mean", **plain)(features, mask).vector, mean, rtol=0, atol=1e-6)
    last = torch.stack([features[0, 4], features[1, 2], features[2, 2]])
    assert torch.equal(build("last", **plain)(features, mask).vector, last)


def test_attention_pooling_can_pick_a_token_that_the_mean_blurs():
    """A query with a large logit for one token returns that token's value."""
    encoder = build("attention", state_dim=None, norm=False, num_attention_heads=1)
    features = torch.randn(1, 4, FEATURES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        encoder.attention.in_proj_weight.copy_(torch.eye(FEATURES).repeat(3, 1))
        encoder.attention.out_proj.weight.copy_(torch.eye(FEATURES))
        encoder.query.copy_(1e3 * features[:, 2:3])
    vector = encoder(features, torch.ones(1, 4, dtype=torch.bool)).vector
    torch.testing.assert_close(vector, features[:, 2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("combine", ["linear", "mlp"])
def test_the_state_reaches_the_condition_and_is_left_out_where_there_is_none(combine, inputs):
    features, mask, state = inputs
    encoder = build(combine=combine, hidden_dim=8)
    assert (encoder(features, mask, state).vector != encoder(features, mask, -state).vector).any(1).all()
    blind = build(combine=combine, hidden_dim=8, state_dim=None)
    assert blind(features, mask).vector.shape == (3, FEATURES)
    assert (combine == "linear") == (sum(p.numel() for p in blind.combine.parameters()) == 0)


def test_bfloat16_features_are_averaged_in_float32():
    features = torch.randn(32, 100, FEATURES, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    encoder = build(state_dim=None, norm=False).to(torch.bfloat16)
    vector = encoder(features, torch.ones(32, 100, dtype=torch.bool)).vector
    assert torch.equal(vector, features.float().mean(1).to(torch.bfloat16))


def test_linears_start_small_and_without_bias():
    encoder = ConditionEncoder(256, 7)
    assert encoder.combine.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not encoder.combine.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, r"pooling in \('mean', 'last', 'attention'\).*came 'max' and 'linear'"),
        ({"combine": "sum"}, "combine in .*came 'mean' and 'sum'"),
        ({"pooling": "attention", "num_attention_heads": 5}, "5 attention heads do not divide 16"),
    ],
)
def test_options_without_a_meaning_raise(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_sample_without_a_real_token_raises(inputs):
    features, mask, state = inputs
    mask[1] = False
    with pytest.raises(ValueError, match="at least one real token in every sample"):
        build()(features, mask, state)


def test_num_attention_heads_divide_the_features_among_themselves(inputs):
    features, mask, state = inputs
    encoders = [build("attention", num_attention_heads=heads) for heads in (1, 4)]
    assert [encoder.attention.num_heads for encoder in encoders] == [1, 4]
    assert build("attention").attention.num_heads == 8
    one, four = (encoder(features, mask, state).vector for encoder in encoders)  # the same weights
    assert (one - four).abs().max() > 1e-4


@pytest.mark.parametrize(("options", "width"), [({}, 1024), ({"hidden_dim": 24}, 24)])
def test_hidden_dim_is_the_width_of_the_mlp(options, width):
    linears = [m.weight.shape for m in build(combine="mlp", **options).combine if isinstance(m, torch.nn.Linear)]
    assert linears == [(width, FEATURES + STATE), (width, width), (FEATURES, width)]


@pytest.mark.parametrize("combine", ["linear", "mlp"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_reset_parameters_reaches_every_parameter_of_an_encoder_built_on_meta(pooling, combine):
    options = {"pooling": pooling, "combine": combine}
    with torch.device("meta"):
        encoder = ConditionEncoder(64, 7, **options)
    encoder.to_empty(device="cpu")
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    encoder.reset_parameters()
    built = ConditionEncoder(64, 7, **options)
    for (name, parameter), other in zip(encoder.named_parameters(), built.parameters(), strict=True):
        torch.testing.assert_close(parameter.std(), other.std(), rtol=0.3, atol=0, msg=name)
    if pooling == "attention":
        assert encoder.query.norm().item() == pytest.approx(1.0, rel=0.3)
