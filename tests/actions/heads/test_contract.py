"""What every action head must do; a new one in the registry is tested by these without a new file."""

import copy

import pytest
import torch

from hf_vla.actions.heads.base import DenoisingHead
from hf_vla.actions.heads.networks.registry import DENOISERS, build_denoiser
from hf_vla.actions.heads.networks.samples import draw
from hf_vla.actions.heads.registry import ACTION_HEADS, build_action_head

BATCH, LENGTH, FEATURES, ACTIONS, CHUNK, STATE = 3, 6, 16, 3, 5, 4
UNET = {"type": "conditional_unet1d", "down_dims": [16, 32], "n_groups": 4, "diffusion_step_embed_dim": 16}
DIT = {"type": "dit", "hidden_size": 16, "depth": 2, "num_heads": 2}
DPM = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 100,
    "prediction_type": "sample",
}
PARALLEL = {"network": "parallel", "hidden_dim": 16}
GIVEN_TIMES = {"diffusion": {"timesteps": torch.arange(3)}, "flow_matching": {"times": torch.zeros(3)}}
# options that make a head small; a head without any here is tested with its defaults
SMALL = {
    "diffusion": [
        {"denoiser": UNET},
        {"denoiser": DIT, "condition_dropout": 0.2, "guidance_scale": 1.5, "condition": {"pooling": "last"}},
        {"denoiser": DIT | {"conditioning": "in_context"}, "scheduler": DPM},
    ],
    "flow_matching": [
        {"denoiser": DIT | {"conditioning": "cross_attention"}},
        {"denoiser": UNET, "solver": "heun", "condition": {"combine": "mlp", "hidden_dim": 16}},
    ],
    "regression": [
        {"hidden_dim": 16},
        {"hidden_dim": 16, "loss": "huber", "condition": {"pooling": "attention"}},
        PARALLEL,
    ],
    "classification": [
        {"hidden_dim": 32, "num_bins": 32},
        {"hidden_dim": 32, "num_bins": 32, "decoding": "sample"},
    ],
}
CASES = [(name, options) for name in sorted(ACTION_HEADS) for options in SMALL.get(name, [{}])]
DENOISING = [case for case in CASES if issubclass(ACTION_HEADS[case[0]], DenoisingHead)]
ONE_PASS = [case for case in CASES if case not in DENOISING]


def build(name, options, state_dim=STATE):
    """A head whose every weight is away from its initial value: some networks begin as zeros or identities."""
    head = build_action_head({"type": name, **options}, FEATURES, ACTIONS, CHUNK, state_dim)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return head


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{SMALL.get(case[0], [{}]).index(case[1])}")
def case(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def head(case):
    return build(*case)


@pytest.fixture
def observation(case):
    """Features, their mask and state; the samples have 6, 4 and 1 real tokens, or as many as there are actions."""
    lengths = [CHUNK] * BATCH if case[1].get("network") == "parallel" else [6, 4, 1]
    generator = torch.Generator().manual_seed(2)
    return {
        "features": torch.randn(BATCH, LENGTH, FEATURES, generator=generator),
        "feature_mask": torch.arange(LENGTH) < torch.tensor(lengths)[:, None],
        "state": torch.randn(BATCH, STATE, generator=generator),
    }


@pytest.fixture
def batch(observation):
    """The same with actions, of which 5, 3 and 1 are real."""
    actions = torch.rand(BATCH, CHUNK, ACTIONS, generator=torch.Generator().manual_seed(3)) * 1.8 - 0.9
    return observation | {"actions": actions, "action_mask": torch.arange(CHUNK) < torch.tensor([[5], [3], [1]])}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loss(head, batch, seed=0):
    return head.loss(**batch, generator=seeded(seed))


def sample(head, observation, seed=0, **kwargs):
    return head.sample(**observation, generator=seeded(seed), **kwargs)


def gradients(head, value):
    head.zero_grad()
    value.backward()
    return {name: parameter.grad for name, parameter in head.named_parameters()}


def garbage_where(tensor, chosen, value):
    return torch.where(chosen[..., None], torch.full_like(tensor, value), tensor)


def test_losses_are_one_float32_per_sample(head, batch):
    value = loss(head, batch)
    assert value.shape == (BATCH,) and value.dtype == torch.float32
    assert (value > 0).all() and torch.isfinite(value).all()


def test_samples_are_float32_chunks_without_a_graph(head, observation):
    actions = sample(head, observation)
    assert actions.shape == (BATCH, CHUNK, ACTIONS) and actions.dtype == torch.float32
    assert torch.isfinite(actions).all() and not actions.requires_grad


def test_every_weight_is_trained_and_the_gradient_reaches_features_and_state(head, batch):
    batch["features"].requires_grad_(), batch["state"].requires_grad_()
    grads = gradients(head, sum(loss(head, batch, seed).sum() for seed in range(4)))
    assert [name for name, grad in grads.items() if grad is None] == []
    reached = batch["features"].grad.abs().sum(-1) > 0
    assert reached.any(1).all() and not reached[~batch["feature_mask"]].any()
    assert (batch["state"].grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("value", [1e9, float("nan"), float("inf")])
def test_padded_actions_change_neither_loss_nor_gradient(head, batch, value):
    changed = batch | {"actions": garbage_where(batch["actions"], ~batch["action_mask"], value)}
    torch.testing.assert_close(loss(head, changed), loss(head, batch), rtol=0, atol=0)
    torch.testing.assert_close(
        gradients(head, loss(head, changed).sum()), gradients(head, loss(head, batch).sum()), rtol=0, atol=0
    )


def test_real_actions_change_the_loss(head, batch):
    for row, last in enumerate([4, 2, 0]):
        changed = batch | {"actions": batch["actions"].clone()}
        changed["actions"][row, last] += 0.5
        assert ((loss(head, changed) != loss(head, batch)).nonzero() == row).all()


def test_a_fully_padded_sample_costs_nothing(head, batch):
    expected = loss(head, batch)
    batch["action_mask"][1] = False
    batch["actions"][1] = float("nan")
    value = loss(head, batch)
    assert value[1] == 0
    torch.testing.assert_close(value[[0, 2]], expected[[0, 2]], rtol=0, atol=0)
    assert all((grad == 0).all() for grad in gradients(head, value[1]).values() if grad is not None)


@pytest.fixture
def wide(case, head):
    """A head for two more dimensions that does with the others what `head` does: its weights, amid noise."""
    wide = build_action_head({"type": case[0], **case[1]}, FEATURES, ACTIONS + 2, CHUNK, STATE)
    for own, parameter in zip(head.parameters(), wide.parameters(), strict=True):
        with torch.no_grad():
            torch.nn.init.normal_(parameter)
            target = parameter
            for axis, (less, more) in enumerate(zip(own.shape, parameter.shape, strict=True)):
                if less != more:  # an action, a chunk of them, or the bins of a chunk
                    each = (more - less) // 2
                    steps = CHUNK if each > 1 else 1
                    own = own.unflatten(axis, (steps, -1, each // steps)).movedim(axis + 1, 0)
                    target = target.unflatten(axis, (steps, -1, each // steps)).movedim(axis + 1, 0)[:ACTIONS]
            target.copy_(own)
    return wide


def widened(values, fill):
    return torch.nn.functional.pad(values, (0, 2), value=fill)


def own_noise(head, fill):
    """The same noise for heads of both sizes, with something else in the dimensions that one of them has not."""
    if not isinstance(head, DenoisingHead):
        return {}
    noise = torch.randn(BATCH, CHUNK, ACTIONS, generator=seeded(5))
    return {"noise": noise if head.action_dim == ACTIONS else widened(noise, fill)}


@pytest.mark.parametrize("reduction", ["masked", "published"])
@pytest.mark.parametrize("fill", [0.0, 7.0])
def test_a_robot_of_fewer_dimensions_has_the_loss_that_it_would_have_alone(head, wide, batch, fill, reduction):
    head.reduction = wide.reduction = reduction
    expected = head.loss(**batch, generator=seeded(), **own_noise(head, fill))
    padded = batch | {"actions": widened(batch["actions"], fill)}
    padded["action_mask"] = widened(batch["action_mask"][..., None].expand(-1, -1, ACTIONS), False)
    value = wide.loss(**padded, generator=seeded(), **own_noise(wide, fill))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    expected, grads = gradients(head, expected.sum()), gradients(wide, value.sum())
    untouched = [name for name in grads if grads[name].shape == expected[name].shape]
    for name in untouched:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", [0.0, 7.0])
def test_a_robot_of_fewer_dimensions_acts_as_it_would_alone(head, wide, observation, fill):
    if getattr(head, "decoding", None) == "sample":
        head.decoding = wide.decoding = "argmax"  # a wider head draws other numbers
    own = widened(torch.ones(BATCH, CHUNK, ACTIONS, dtype=torch.bool), False)
    actions = sample(wide, observation, **own_noise(wide, fill), action_mask=own)
    expected = sample(head, observation, **own_noise(head, fill))
    torch.testing.assert_close(actions[..., :ACTIONS], expected, rtol=1e-4, atol=1e-5)
    assert not actions[..., ACTIONS:].any()


def test_robots_of_a_batch_may_have_different_dimensions(head, batch, observation):
    """The first has all, the others lack the last; each is as it is among its like."""
    own = torch.ones(BATCH, CHUNK, ACTIONS, dtype=torch.bool)
    own[1:, :, -1] = False
    mixed = batch | {"action_mask": batch["action_mask"][..., None] & own}
    all_of_them = mixed | {"action_mask": batch["action_mask"][..., None].expand(-1, -1, ACTIONS)}
    few = mixed | {"action_mask": mixed["action_mask"] & own[1:2]}
    torch.testing.assert_close(loss(head, all_of_them), loss(head, batch), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss(head, mixed)[:1], loss(head, batch)[:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(head, mixed)[1:], loss(head, few)[1:], rtol=1e-5, atol=1e-6)
    actions, each = sample(head, observation, action_mask=own), sample(head, observation)
    torch.testing.assert_close(actions[:1], each[:1], rtol=1e-4, atol=1e-5)
    assert not actions[1:, :, -1].any() and actions[1:, :, :-1].any()
    assert torch.equal(sample(head, observation, action_mask=batch["action_mask"]), each)


@pytest.mark.parametrize("shape", [(BATCH, CHUNK, 1), (BATCH, CHUNK, ACTIONS + 1), (1, CHUNK, ACTIONS), (BATCH, 4)])
def test_masks_of_other_shapes_raise(head, batch, observation, shape):
    wrong = {"action_mask": torch.ones(shape, dtype=torch.bool)}
    for function, inputs in ((loss, batch), (sample, observation)):
        with pytest.raises(ValueError, match=r"action_mask of shape \(3, 5\) or \(3, 5, 3\), came"):
            function(head, {**inputs, **wrong})
    with pytest.raises(ValueError, match="Expected action_mask to be bool"):
        sample(head, observation, action_mask=torch.ones(BATCH, CHUNK, ACTIONS))


@pytest.mark.parametrize("value", [1e9, float("nan")])
def test_masked_tokens_change_nothing(head, batch, observation, value):
    changed = {"features": garbage_where(batch["features"], ~batch["feature_mask"], value)}
    torch.testing.assert_close(loss(head, batch | changed), loss(head, batch), rtol=0, atol=0)
    torch.testing.assert_close(sample(head, observation | changed), sample(head, observation), rtol=0, atol=0)


def test_longer_padding_changes_nothing(head, batch, observation):
    padding = torch.full((BATCH, 3, FEATURES), float("nan"))
    longer = {
        "features": torch.cat([batch["features"], padding], 1),
        "feature_mask": torch.cat([batch["feature_mask"], torch.zeros(BATCH, 3, dtype=torch.bool)], 1),
    }
    torch.testing.assert_close(loss(head, batch | longer), loss(head, batch), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sample(head, observation | longer), sample(head, observation), rtol=1e-4, atol=1e-5)


def test_real_tokens_and_state_change_the_sample(head, observation):
    if hasattr(head, "decoding"):
        head.decoding = "expectation"  # a small change of the scores seldom moves the bin
    expected = sample(head, observation)
    for key in ("features", "state"):
        changed = sample(head, observation | {key: observation[key] + torch.randn_like(observation[key])})
        assert (changed != expected).flatten(1).any(1).all()


def test_batch_mates_change_nothing(head, batch, observation):
    mates = {key: value.clone() for key, value in batch.items()}
    mates["features"][1:] = torch.randn(2, LENGTH, FEATURES) * 5
    mates["state"][1:] += 5
    mates["actions"][1:] = 0.0
    mates["feature_mask"][1:] = mates["feature_mask"][1:].flip(0)
    mates["action_mask"][1:] = True
    torch.testing.assert_close(loss(head, mates)[0], loss(head, batch)[0], rtol=1e-5, atol=1e-6)
    others = {key: mates[key] for key in observation}
    torch.testing.assert_close(sample(head, others)[0], sample(head, observation)[0], rtol=1e-5, atol=1e-5)


def test_the_loss_does_not_depend_on_the_batch_size(head, batch):
    many = {key: value[:1].expand(256, *value.shape[1:]) for key, value in batch.items()}
    few = {key: value[:16] for key, value in many.items()}
    mean = torch.stack([loss(head, few, seed).mean() for seed in range(1, 17)]).mean()
    assert loss(head, many).mean().item() == pytest.approx(mean.item(), rel=0.2)


def test_a_generator_makes_loss_and_sample_repeatable_and_leaves_the_global_one_alone(head, batch, observation):
    expected_loss, expected_sample = loss(head, batch), sample(head, observation)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(loss(head, batch), expected_loss) and torch.equal(sample(head, observation), expected_sample)
    assert torch.equal(torch.get_rng_state(), before)


def test_loss_and_sample_share_no_mode(head, batch, observation):
    """A head in training mode predicts what it predicts in evaluation mode: nothing is dropped from a sample."""
    expected_loss, expected_sample = loss(head.train(), batch), sample(head.train(), observation)
    assert torch.equal(sample(head.eval(), observation), expected_sample)
    assert torch.equal(loss(head.eval(), batch), expected_loss)


@pytest.mark.parametrize("case", ONE_PASS, indirect=True)
def test_heads_of_one_pass_refuse_noise_and_steps(head, observation):
    for extra in ({"noise": torch.randn(BATCH, CHUNK, ACTIONS)}, {"num_inference_steps": 3}, {"callback": print}):
        with pytest.raises(ValueError, match="in one pass: it takes none of noise, num_inference_steps, callback"):
            sample(head, observation, **extra)


@pytest.mark.parametrize("case", DENOISING, indirect=True)
def test_a_callback_sees_every_denoising_step_and_changes_nothing(head, observation):
    seen = []
    actions = sample(head, observation, num_inference_steps=4, callback=lambda *step: seen.append(step))
    assert torch.equal(actions, sample(head, observation, num_inference_steps=4))
    assert [step for step, _ in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][1], actions)
    assert len({chunk.numpy().tobytes() for _, chunk in seen}) == 4
    assert all(chunk.shape == actions.shape and not chunk.requires_grad for _, chunk in seen)


@pytest.mark.parametrize("case", DENOISING, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_given_noise_becomes_float32(head, batch, observation, dtype):
    noise = torch.randn(BATCH, CHUNK, ACTIONS).to(dtype)
    actions, expected = sample(head, observation, noise=noise), sample(head, observation, noise=noise.float())
    assert actions.dtype == torch.float32 and torch.equal(actions, expected)
    value, expected = (head.loss(**batch, noise=given, generator=seeded()) for given in (noise, noise.float()))
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@pytest.mark.parametrize("case", DENOISING, indirect=True)
def test_heads_that_denoise_begin_with_the_given_noise(head, observation):
    noise = torch.randn(BATCH, CHUNK, ACTIONS)
    expected = sample(head, observation, 0, noise=noise)
    assert torch.equal(sample(head, observation, 1, noise=noise), expected)
    assert not torch.equal(sample(head, observation, 0), sample(head, observation, 1))
    assert not torch.equal(sample(head, observation, noise=noise, num_inference_steps=3), expected)
    with pytest.raises(ValueError, match=r"noise of shape \(3, 5, 3\), came \(3, 4, 3\)"):
        sample(head, observation, noise=noise[:, 1:])
    alone = [sample(head, {k: v[[i]] for k, v in observation.items()}, noise=noise[[i]]) for i in range(BATCH)]
    torch.testing.assert_close(torch.cat(alone), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", DENOISING, indirect=True)
def test_several_draws_are_the_mean_of_single_ones(case, batch):
    name, options = case[0], {**case[1], "condition_dropout": 0.0, "guidance_scale": 1.0}
    one, four = (build(name, {**options, "noise_draws": draws}) for draws in (1, 4))
    four.load_state_dict(one.state_dict())
    generator = seeded()
    singles = torch.stack([one.loss(**batch, generator=generator) for _ in range(4)])
    torch.testing.assert_close(loss(four.train(), batch), singles.mean(0))
    assert torch.equal(loss(four.eval(), batch), singles[0]) and not torch.equal(singles[0], singles[1])
    for options in ({}, {"condition_dropout": 0.5}):
        head, calls = build(name, {**case[1], **options, "noise_draws": 4}).train(), []
        head.denoiser.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert torch.equal(loss(head, batch), loss(head, batch)) and len(calls) == 8
        head.loss(**batch, noise=torch.zeros(BATCH, CHUNK, ACTIONS), **GIVEN_TIMES[name])
        assert len(calls) == 9
    with pytest.raises(ValueError, match="noise_draws of 1 or more"):
        build(name, {"noise_draws": 0})


def test_a_state_is_needed_exactly_where_it_is_declared(case, batch, observation):
    without = {"state": None}
    blind = build(*case, state_dim=None)
    assert loss(blind, batch | without).shape == (BATCH,)
    assert sample(blind, observation | without).shape == (BATCH, CHUNK, ACTIONS)
    seeing = build(*case)
    for head, given, message in (
        (blind, {}, r"a state of None numbers \(None: no state\), came 4"),
        (seeing, without, "a state of 4 numbers .*, came None"),
        (seeing, {"state": torch.zeros(BATCH, STATE + 1)}, "a state of 4 numbers .*, came 5"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(head, batch | given)
        with pytest.raises(ValueError, match=message):
            sample(head, observation | given)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("actions", (BATCH, CHUNK + 1, ACTIONS)),
        ("actions", (BATCH, CHUNK, ACTIONS - 1)),
        ("actions", (BATCH - 1, CHUNK, ACTIONS)),
        ("actions", (1, CHUNK, ACTIONS)),
        ("action_mask", (BATCH, CHUNK - 1)),
        ("features", (BATCH, LENGTH, FEATURES + 1)),
        ("feature_mask", (BATCH, LENGTH - 1)),
        ("feature_mask", (1, LENGTH)),
        ("state", (1, STATE)),
    ],
)
def test_other_shapes_raise(head, batch, key, shape):
    wrong = torch.ones(shape, dtype=batch[key].dtype)
    with pytest.raises(ValueError, match="Expected .*, came "):
        loss(head, batch | {key: wrong})
    if key not in ("actions", "action_mask"):
        with pytest.raises(ValueError, match="Expected .*, came "):
            sample(head, {k: v for k, v in (batch | {key: wrong}).items() if "action" not in k})


def test_chunks_of_another_batch_raise(head, batch):
    few = {key: batch[key][:1] for key in ("actions", "action_mask")}
    with pytest.raises(ValueError, match=r"actions of shape \(3, 5, 3\) .*came \(1, 5, 3\) and \(1, 5\)"):
        loss(head, batch | few)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("key", ["feature_mask", "action_mask"])
def test_masks_that_are_not_bool_raise(head, batch, observation, key, dtype):
    """`~` of an integer is no negation, and tokenizers give integers."""
    wrong = {key: batch[key].to(dtype)}
    with pytest.raises(ValueError, match=f"Expected {key} to be bool, .*came {dtype}: use {key}.bool"):
        loss(head, batch | wrong)
    if key in observation:
        with pytest.raises(ValueError, match=f"Expected {key} to be bool"):
            sample(head, observation | wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["masked", "published"])
def test_real_actions_that_are_not_finite_raise_and_their_samples_are_named(case, batch, value, reduction):
    head = build(case[0], case[1] | {"reduction": reduction})
    batch["actions"][1, 2, 1] = value
    with pytest.raises(ValueError, match=r"Expected finite actions, came NaN or infinity in samples \[1\]"):
        loss(head, batch)


def test_features_without_a_real_token_raise(head, batch, observation):
    observation["feature_mask"][1] = False
    with pytest.raises(ValueError, match="at least one real token in every sample"):
        sample(head, observation)
    with pytest.raises(ValueError, match="at least one real token in every sample"):
        loss(head, batch)


@pytest.mark.parametrize("key", ["features", "state"])
def test_predictions_that_are_not_finite_raise_and_are_named(head, observation, key):
    observation[key][1] = float("nan")
    with pytest.raises(ValueError, match=r"actions of samples \[1\] are NaN or infinite"):
        sample(head, observation)


def test_weights_may_be_bfloat16(head, batch, observation):
    head.to(torch.bfloat16)
    features = {"features": batch["features"].to(torch.bfloat16)}
    value, actions = loss(head, batch | features), sample(head, observation | features)
    assert value.dtype == actions.dtype == torch.float32
    assert torch.isfinite(value).all() and torch.isfinite(actions).all()
    assert not torch.equal(value, value.to(torch.bfloat16).float())  # the loss itself is computed in float32
    grads = gradients(head, value.sum()).values()
    assert all(torch.isfinite(grad).all() for grad in grads if grad is not None)


def test_features_may_have_another_precision_than_the_weights(head, batch, observation):
    expected_loss, expected_sample = loss(head, batch), sample(head, observation)
    wide = {"features": batch["features"].double()}
    assert torch.equal(loss(head, batch | wide), expected_loss)
    assert torch.equal(sample(head, observation | wide), expected_sample)
    low = batch["features"].to(torch.bfloat16)
    rounded = sample(head, observation | {"features": low.float()})
    assert torch.equal(sample(head, observation | {"features": low}), rounded)
    head.to(torch.bfloat16)
    assert torch.equal(sample(head, observation), sample(head, observation | {"features": low}))


@pytest.mark.gpu
def test_generators_may_live_on_another_device_than_the_features(head, batch, observation):
    head.cuda().train()
    batch, observation = ({k: v.cuda() for k, v in inputs.items()} for inputs in (batch, observation))
    for function, inputs in ((loss, batch), (sample, observation)):
        first = function(head, inputs)
        assert first.is_cuda and torch.equal(function(head, inputs), first)
    drawn = draw(torch.rand, 3, generator=torch.Generator("cuda").manual_seed(0), device=torch.device("cpu"))
    assert drawn.device.type == "cpu"


def test_numbers_are_drawn_where_the_generator_lives():
    places = []

    def rand(*size, device, **options):
        places.append(device)
        return torch.rand(*size, device=device, **options)

    drawn = draw(rand, 3, generator=seeded(), device=torch.device("meta"), dtype=torch.float64)
    assert places == [torch.device("cpu")]
    assert drawn.device.type == "meta" and drawn.shape == (3,) and drawn.dtype == torch.float64
    expected = torch.randint(9, (4,), generator=seeded(1))
    assert torch.equal(draw(torch.randint, 9, (4,), generator=seeded(1), device=torch.device("cpu")), expected)
    torch.manual_seed(1)
    assert torch.equal(draw(torch.randint, 9, (4,), generator=None, device=torch.device("cpu")), expected)


@pytest.mark.parametrize("case", [(n, SMALL[n][0]) for n in ("diffusion", "flow_matching")], indirect=True)
def test_a_compiled_sample_equals_the_plain_one(head, observation):
    options = {"noise": torch.randn(BATCH, CHUNK, ACTIONS), "num_inference_steps": 3}
    torch.compiler.reset()
    compiled = torch.compile(head.sample, backend="eager")(**observation, **options)
    torch.testing.assert_close(compiled, head.sample(**observation, **options), rtol=0, atol=1e-6)


def test_saved_weights_give_the_same_head_even_from_the_meta_device(case, head, batch, observation):
    expected_loss, expected_sample = loss(head, batch), sample(head, observation)
    with torch.device("meta"):
        again = build_action_head({"type": case[0], **case[1]}, FEATURES, ACTIONS, CHUNK, STATE)
    assert all(tensor.device.type == "meta" for tensor in [*again.parameters(), *again.buffers()])
    again.to_empty(device="cpu")
    again.load_state_dict(head.state_dict())
    assert torch.equal(loss(again, batch), expected_loss) and torch.equal(sample(again, observation), expected_sample)


def test_use_leaves_no_trace_in_the_head(head, batch, observation):
    weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    first = sample(head, observation)
    loss(head, batch)
    after = head.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(sample(head, observation), first)


def test_copies_are_equal_and_independent(head, batch, observation):
    expected = sample(head, observation)
    twin = copy.deepcopy(head)
    assert torch.equal(sample(twin, observation), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(sample(head, observation), expected)


def test_training_lowers_the_loss_and_the_samples_reach_the_actions(case):
    torch.manual_seed(0)
    head = build_action_head({"type": case[0], **case[1]}, FEATURES, ACTIONS, CHUNK, STATE)
    observation = {
        "features": torch.randn(2, LENGTH, FEATURES),
        "feature_mask": (torch.arange(LENGTH) < CHUNK).repeat(2, 1),
        "state": torch.randn(2, STATE),
    }
    actions = torch.rand(2, CHUNK, ACTIONS) * 1.6 - 0.8
    many = {key: value.repeat(16, *[1] * (value.ndim - 1)) for key, value in observation.items()}
    many |= {"actions": actions.repeat(16, 1, 1), "action_mask": torch.ones(32, CHUNK, dtype=torch.bool)}
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        value = head.loss(**many, generator=generator).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    error = (sample(head, observation) - actions).abs().mean()
    swapped = (sample(head, observation) - actions.flip(0)).abs().mean()
    assert error < 0.2 and swapped > 2.5 * error


@pytest.mark.parametrize("name", sorted(ACTION_HEADS))
def test_misspelt_options_raise_and_are_named(name):
    with pytest.raises(ValueError, match=f"Action head '{name}' has no option 'reducton'; .*mean 'reduction' for"):
        build_action_head({"type": name, "reducton": "masked"}, FEATURES, ACTIONS, CHUNK)
    with pytest.raises(ValueError, match="The condition has no option 'poling'; .*mean 'pooling' for 'poling'"):
        build_action_head({"type": name, "condition": {"poling": "mean"}}, FEATURES, ACTIONS, CHUNK)
    for options, message in (
        ({"reduction": "sum"}, r"reduction in \('masked', 'published'\), came 'sum'"),
        ({"condition": {"pooling": "max"}}, "pooling in .*came .*'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_action_head({"type": name, **options}, FEATURES, ACTIONS, CHUNK)


@pytest.mark.parametrize("name", sorted(DENOISERS))
def test_misspelt_options_of_denoisers_raise_and_are_named(name):
    with pytest.raises(ValueError, match=f"Denoiser '{name}' has no option 'timestep_embeding_dtype'; .*Did you mean"):
        build_denoiser({"type": name, "timestep_embeding_dtype": "float32"}, ACTIONS, CHUNK, FEATURES)


@pytest.mark.parametrize(
    ("name", "options"), [("regression", {"num_blocks": "two"}), ("diffusion", {"denoiser": DIT | {"depth": "2"}})]
)
def test_errors_that_are_not_about_names_are_not_relabelled(name, options):
    with pytest.raises(TypeError):
        build_action_head({"type": name, **options}, FEATURES, ACTIONS, CHUNK)


@pytest.mark.parametrize("config", [{"type": "regresion"}, {}])
def test_unknown_types_raise_and_list_the_known_ones(config):
    with pytest.raises(ValueError, match=r"No action head .*; there are \[.*'regression'"):
        build_action_head(config, FEATURES, ACTIONS, CHUNK)


def test_of_a_list_of_generators_each_sample_draws_from_its_own(head, observation):
    """Also heads and schedulers that draw while they sample."""
    together = head.sample(**observation, generator=[seeded(number) for number in (7, 8, 9)])
    for place, number in enumerate((7, 8, 9)):
        row = {name: values[place : place + 1] for name, values in observation.items()}
        alone = head.sample(**row, generator=seeded(number))
        torch.testing.assert_close(together[place : place + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_scheduler_that_adds_noise_draws_from_each_samples_own_generator():
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
    head = build("diffusion", {"denoiser": UNET, "scheduler": scheduler, "num_inference_steps": 10})
    features, mask, state = (
        torch.randn(2, LENGTH, FEATURES),
        torch.ones(2, LENGTH, dtype=torch.bool),
        torch.randn(2, 4),
    )
    for numbers in ((7, 8), (7, 9)):
        together = head.sample(features, mask, state, [seeded(number) for number in numbers])
        alone = head.sample(features[:1], mask[:1], state[:1], seeded(7))
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_another_number_of_generators_than_samples_is_refused():
    with pytest.raises(ValueError, match="a generator for each of 3 samples, came 2"):
        draw(torch.randn, (3, 4), generator=[seeded(), seeded()], device=torch.device("cpu"))
    drawn = draw(torch.randint, 9, (2, 4), generator=[seeded(1), seeded(2)], device=torch.device("cpu"))
    expected = [torch.randint(9, (1, 4), generator=seeded(number)) for number in (1, 2)]
    assert torch.equal(drawn, torch.cat(expected))
