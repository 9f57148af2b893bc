import pytest
import torch

from hf_vla.actions.heads.registry import build_action_head

BATCH, FEATURES, ACTIONS, CHUNK, STATE = 2, 8, 3, 4, 5
PARALLEL = {"network": "parallel", "tokens_per_action": 2, "hidden_dim": 16}


def build(state_dim=None, **options):
    torch.manual_seed(0)
    return build_action_head({"type": "regression", "hidden_dim": 16, **options}, FEATURES, ACTIONS, CHUNK, state_dim)


@pytest.fixture
def observation():
    """Features of as many tokens as `PARALLEL` reads out."""
    features = torch.randn(BATCH, 2 * CHUNK, FEATURES, generator=torch.Generator().manual_seed(1))
    return {"features": features, "feature_mask": torch.ones(BATCH, 2 * CHUNK, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("options", "error_of"),
    [
        ({}, lambda e: e**2),
        ({"loss": "mse"}, lambda e: e**2),
        ({"loss": "l1"}, lambda e: e.abs()),
        (
            {"loss": "huber", "huber_delta": 0.5},
            lambda e: torch.where(e.abs() < 0.5, e**2 / 2, 0.5 * (e.abs() - 0.25)),
        ),
    ],
)
def test_the_loss_is_the_mean_error_of_the_real_actions(observation, options, error_of):
    head = build(**options)
    predicted = head.sample(**observation)
    distance = torch.linspace(-1.5, 1.5, BATCH * CHUNK * ACTIONS).reshape(BATCH, CHUNK, ACTIONS)
    mask = torch.arange(CHUNK) < torch.tensor([[4], [3]])
    loss = head.loss(**observation, actions=predicted + distance, action_mask=mask)
    expected = torch.stack([error_of(distance[i, : mask[i].sum()]).mean() for i in range(BATCH)])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    published = build(**options, reduction="published").loss(
        **observation, actions=predicted + distance, action_mask=mask
    )
    torch.testing.assert_close(published, expected * torch.tensor([1.0, 0.75]), rtol=1e-5, atol=1e-6)


def test_the_prediction_needs_no_randomness(observation):
    head = build()
    first = head.sample(**observation, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.sample(**observation, generator=torch.Generator().manual_seed(1)), first)
    assert torch.equal(head.sample(**observation), first)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_num_blocks_counts_residual_blocks_of_the_given_width(blocks):
    head = build(**PARALLEL | {"num_blocks": blocks, "hidden_dim": 24})
    linears = [m.weight.shape for m in head.network.modules() if isinstance(m, torch.nn.Linear)]
    assert linears == [(24, 2 * FEATURES), *[(24, 24)] * blocks, (ACTIONS, 24)]


def test_the_default_width_is_that_of_the_docs():
    head = build_action_head({"type": "regression"}, FEATURES, ACTIONS, CHUNK)
    assert [m.weight.shape[0] for m in head.network if isinstance(m, torch.nn.Linear)] == [1024, 1024, CHUNK * ACTIONS]


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_num_layers_counts_linear_layers(layers):
    linears = [m for m in build(num_layers=layers).network if isinstance(m, torch.nn.Linear)]
    assert len(linears) == layers


def test_the_parallel_network_is_openvla_ofts(observation):
    """Written out with the head's weights: LayerNorm, Linear, ReLU, residual blocks, LayerNorm, Linear."""
    head = build(**PARALLEL, num_blocks=2)
    weights = {name.removeprefix("network."): value for name, value in head.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = observation["features"].reshape(BATCH, CHUNK, 2 * FEATURES)
    x = linear(norm(x, "input.0"), "input.1").relu()
    for block in ("blocks.0", "blocks.1"):
        x = x + linear(norm(x, f"{block}.0"), f"{block}.1").relu()
    expected = linear(norm(x, "output.0"), "output.1")
    torch.testing.assert_close(head.sample(**observation), expected, rtol=1e-4, atol=1e-5)


def test_a_parallel_action_comes_from_its_own_tokens(observation):
    head = build(**PARALLEL)
    expected = head.sample(**observation)
    observation["features"][:, 5] += 1.0
    moved = (head.sample(**observation) != expected).any(-1)
    assert moved.tolist() == [[False, False, True, False]] * BATCH


def test_the_state_moves_every_parallel_action_and_every_weight_is_trained(observation):
    head, states = build(STATE, **PARALLEL), torch.randn(2, BATCH, STATE)
    moved = head.sample(**observation, state=states[0]) != head.sample(**observation, state=states[1])
    assert moved.any(-1).all()
    actions, mask = torch.zeros(BATCH, CHUNK, ACTIONS), torch.ones(BATCH, CHUNK, dtype=torch.bool)
    head.loss(**observation, actions=actions, action_mask=mask, state=states[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_a_parallel_head_without_a_state_trains_every_weight_and_pools_nothing(observation):
    head = build(**PARALLEL)
    actions, mask = torch.zeros(BATCH, CHUNK, ACTIONS), torch.ones(BATCH, CHUNK, dtype=torch.bool)
    head.loss(**observation, actions=actions, action_mask=mask).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    with pytest.raises(ValueError, match="Expected no condition for a parallel network without a state"):
        build(**PARALLEL, condition={"pooling": "attention"})


def test_padding_between_readout_tokens_changes_nothing(observation):
    head = build(**PARALLEL)
    features, mask = torch.full((BATCH, 2 * CHUNK + 3, FEATURES), torch.nan), torch.ones(BATCH, 2 * CHUNK + 3) > 0
    mask[0, [0, 4, 5]], mask[1, [1, 2, 10]] = False, False
    features[mask] = observation["features"].flatten(0, 1)
    torch.testing.assert_close(head.sample(features, mask), head.sample(**observation), rtol=0, atol=1e-6)


def test_a_parallel_head_in_bfloat16_stays_finite(observation):
    head = build(**PARALLEL).to(torch.bfloat16)
    actions = head.sample(observation["features"].to(torch.bfloat16), observation["feature_mask"])
    assert actions.dtype == torch.float32 and torch.isfinite(actions).all()


def test_a_parallel_head_refuses_other_numbers_of_tokens(observation):
    shorter = {key: value[:, 1:] for key, value in observation.items()}
    masked = observation | {"feature_mask": observation["feature_mask"].clone()}
    masked["feature_mask"][1, 2] = False
    with pytest.raises(ValueError, match=r"came \[7, 7\] real ones of 7: set the model's num_readout_tokens to 8"):
        build(**PARALLEL).sample(**shorter)
    with pytest.raises(
        ValueError, match=r"Expected 8 readout tokens .* in every sample, came \[8, 7\] real ones of 8"
    ):
        build(**PARALLEL).sample(**masked)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "l2"},
        {"network": "transformer"},
        {"huber_delta": 0.0},
        {"tokens_per_action": 0},
        {"num_blocks": -1},
        {"num_layers": 0},
    ],
)
def test_wrong_values_raise_and_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"Expected .*{name}.*came .*{value}"):
        build(**options)
