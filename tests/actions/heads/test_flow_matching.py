"""Flow matching on fields whose flow is known: time 0 = noise, 1 = data, the velocity between."""

import pytest
import torch

from hf_vla.actions.heads.flow_matching import FlowMatchingHead
from hf_vla.actions.heads.networks.base import Denoiser
from hf_vla.actions.heads.networks.dit import CONDITIONINGS

FEATURE_DIM, ACTION_DIM, CHUNK, STATE_DIM = 8, 2, 4, 3


class Field(Denoiser):
    """A known velocity field of position and of time in [0, 1]; keeps the times it was prepared for and its calls."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.times, self.calls = velocity, [], 0
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def prepare(self, condition, times):
        self.times.append(times)
        return list(times[..., None, None] / 1000)

    def forward(self, sample, context):
        self.calls += 1
        return self.velocity(sample, context) + self.weight


def head_of(velocity, **options):
    head = build(**options)
    head.denoiser = Field(velocity)
    return head


def build(conditioning="adaln_zero", **options):
    """A tiny head away from its initial zeros."""
    torch.manual_seed(0)
    dit = {"type": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2, "conditioning": conditioning}
    head = FlowMatchingHead(FEATURE_DIM, ACTION_DIM, CHUNK, STATE_DIM, denoiser=dit, **options)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def observe(batch_size=3, length=5):
    """Features, their mask (the second sample has padding) and state."""
    generator = seeded(1)
    mask = torch.ones(batch_size, length, dtype=torch.bool)
    mask[1:2, -2:] = False
    features = torch.randn(batch_size, length, FEATURE_DIM, generator=generator)
    return features, mask, torch.randn(batch_size, STATE_DIM, generator=generator)


def chunks(batch_size=3):
    """Actions and their mask: the second sample has padding, the third nothing else."""
    mask = torch.ones(batch_size, CHUNK, dtype=torch.bool)
    mask[1:2, -1:], mask[2:3] = False, False
    return torch.randn(batch_size, CHUNK, ACTION_DIM, generator=seeded(2)), mask


def start(batch_size=3, seed=3):
    return torch.randn(batch_size, CHUNK, ACTION_DIM, generator=seeded(seed))


def flow(head, noise, steps=None):
    return head.sample(*observe(len(noise)), noise=noise, num_inference_steps=steps)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_constant_velocity_is_exact_for_any_number_of_steps(solver, steps):
    target = torch.tensor([0.5, -2.0])
    result = flow(head_of(lambda x, t: target.expand_as(x), solver=solver), start(), steps)
    torch.testing.assert_close(result, start() + target, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_optimal_velocity_of_one_chunk_leads_euler_onto_it(steps):
    target = start(seed=4)
    head = head_of(lambda x, t: (target - x) / (1 - t))
    torch.testing.assert_close(flow(head, start(), steps), target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_linear_fields_give_the_known_error_of_each_solver(steps):
    growth = -1.7
    for solver, factor in (
        ("euler", 1 + growth / steps),
        ("heun", 1 + growth / steps + (growth / steps) ** 2 / 2),
    ):
        result = flow(head_of(lambda x, t: growth * x, solver=solver), start(), steps)
        torch.testing.assert_close(result, start() * factor**steps, rtol=1e-5, atol=1e-5)
    # a velocity of 3 t ends 3 / 2 further: Heun's trapezoids are exact, Euler's rectangles are half a step short
    for solver, shift in (("euler", 1.5 * (steps - 1) / steps), ("heun", 1.5)):
        result = flow(head_of(lambda x, t: 3 * t.expand_as(x), solver=solver), start(), steps)
        torch.testing.assert_close(result, start() + shift, rtol=0, atol=1e-5)


MEAN, STD = 0.7, 0.2


def gaussian_velocity(x, t):
    """Optimal velocity towards actions that are normally distributed; its flow is `x -> MEAN + STD * x`."""
    return MEAN + (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * STD**2) * (x - t * MEAN)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    head, exact = head_of(gaussian_velocity, solver=solver), MEAN + STD * start()
    errors = [float((flow(head, start(), steps) - exact).abs().max()) for steps in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_optimal_velocity_of_a_gaussian_gives_its_mean_and_standard_deviation():
    count = 2000
    head = head_of(gaussian_velocity, solver="heun")
    samples = head.sample(*observe(count), generator=seeded(), num_inference_steps=50)
    numbers = count * CHUNK * ACTION_DIM
    assert samples.mean().item() == pytest.approx(MEAN, abs=4 * STD / numbers**0.5)  # four standard errors
    assert samples.std().item() == pytest.approx(STD, abs=4 * STD / (2 * numbers) ** 0.5 + 2e-4)  # and Heun's own


@pytest.mark.parametrize(("solver", "calls"), [("euler", 1), ("heun", 2)])
def test_ten_steps_by_default_and_one_or_two_calls_for_each(solver, calls):
    head = head_of(lambda x, t: x, solver=solver)
    flow(head, start())
    assert head.denoiser.calls == 10 * calls
    head.denoiser.calls = 0
    flow(head, start(), 3)
    assert head.denoiser.calls == 3 * calls
    assert len(head.denoiser.times[-1]) == 3 + calls - 1
    with pytest.raises(ValueError, match="num_inference_steps of 1 or more, came 0"):
        flow(head, start(), 0)


def loss_of(head, actions=None, mask=None, generator=None, **options):
    drawn, real = chunks()
    actions, mask = drawn if actions is None else actions, real if mask is None else mask
    return head.loss(*observe()[:2], actions, mask, observe()[2], generator, **options)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.99])
def test_the_true_velocity_costs_nothing_at_any_time(time):
    actions = chunks()[0]
    mask = torch.ones(3, CHUNK, dtype=torch.bool)
    head = head_of(lambda x, t: (actions - x) / (1 - t))
    loss = loss_of(head, actions, mask, times=torch.full((3,), time))
    torch.testing.assert_close(loss, torch.zeros(3), rtol=0, atol=1e-6)


def test_loss_is_the_mean_squared_error_over_real_actions():
    (actions, mask), times = chunks(), torch.tensor([0.1, 0.5, 0.9])
    head = head_of(lambda x, t: 2 * x + t)
    expected = torch.zeros(3)
    for i in range(2):
        clean, noise, t = actions[i] * mask[i, :, None], start()[i], times[i]
        error = 2 * ((1 - t) * noise + t * clean) + t - (clean - noise)
        expected[i] = error[mask[i]].square().mean()
    result = loss_of(head, noise=start(), times=times)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=0)
    published = head_of(head.denoiser.velocity, reduction="published")
    full, times = torch.ones_like(mask), times[:, None, None]
    error = 2 * torch.lerp(start(), actions, times) + times - (actions - start())
    torch.testing.assert_close(
        loss_of(published, mask=full, noise=start(), times=times.flatten()), error.square().mean((1, 2))
    )


@pytest.mark.parametrize(
    ("time_sampling", "distribution", "mean"),
    [("beta", lambda t: 1 - (1 - t / 0.999) ** 1.5, 0.999 * 0.4), ("uniform", lambda t: t, 0.5)],
)
def test_training_times_follow_their_distribution(time_sampling, distribution, mean):
    count = 20_000
    head = head_of(lambda x, t: x, time_sampling=time_sampling)
    actions = torch.zeros(count, CHUNK, ACTION_DIM)
    head.loss(*observe(count)[:2], actions, torch.ones(count, CHUNK, dtype=torch.bool), observe(count)[2], seeded())
    times = head.denoiser.times[0].flatten().sort().values / 1000
    assert 0 <= times[0] and times[-1] < 1
    assert times.mean().item() == pytest.approx(mean, abs=4 * 0.3 / count**0.5)
    distance = (distribution(times) - torch.linspace(0, 1, count)).abs().max()  # Kolmogorov-Smirnov, p = 0.0001
    assert distance < 2.2 / count**0.5


@pytest.mark.parametrize("padding", [1e9, torch.nan])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_padded_actions_change_no_loss_and_no_gradient(conditioning, padding):
    head, (actions, mask) = build(conditioning), chunks()
    results = []
    for values in (actions, actions.masked_fill(~mask[..., None], padding)):
        loss = loss_of(head, values, generator=seeded())
        results.append([loss, *torch.autograd.grad(loss.sum(), list(head.denoiser.parameters()))])
    assert results[0][0][2] == 0 and results[0][0][:2].gt(0).all()
    for first, second in zip(*results, strict=True):
        assert first.equal(second)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_batch_mates_and_padded_tokens_change_nothing(conditioning):
    head, (features, mask, state), (actions, action_mask) = build(conditioning), observe(), chunks()
    times = torch.tensor([0.2, 0.4, 0.6])
    samples = head.sample(features, mask, state, noise=start())
    losses = head.loss(features, mask, actions, action_mask, state, noise=start(), times=times)
    for i, length in enumerate(mask.sum(1)):
        one, observation = slice(i, i + 1), (features[i : i + 1, :length], mask[i : i + 1, :length])
        alone = head.sample(*observation, state[one], noise=start()[one])
        torch.testing.assert_close(alone, samples[one], rtol=1e-4, atol=1e-5)
        loss = head.loss(
            *observation, actions[one], action_mask[one], state[one], noise=start()[one], times=times[one]
        )
        torch.testing.assert_close(loss, losses[one], rtol=1e-4, atol=1e-6)


def test_state_and_features_move_the_samples():
    head, (features, mask, state) = build(), observe()
    samples = head.sample(features, mask, state, noise=start())
    assert (head.sample(features, mask, state + 1, noise=start()) - samples).abs().max() > 1e-3
    assert (head.sample(features.flip(-1), mask, state, noise=start()) - samples).abs().max() > 1e-3


def test_a_generator_repeats_losses_and_samples():
    head = build(condition_dropout=0.5)
    for draw in (
        lambda seed: loss_of(head, generator=seeded(seed)),
        lambda seed: head.sample(*observe(), seeded(seed)),
    ):
        assert draw(0).equal(draw(0))
        assert not draw(0).equal(draw(1))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_guidance_combines_the_conditioned_and_the_null_velocity(conditioning):
    head, (features, mask, state) = build(conditioning, condition_dropout=0.1), observe()
    unguided = head.sample(features, mask, state, noise=start(), num_inference_steps=1) - start()
    times = torch.zeros(1)
    condition = head.drop_condition(head.condition_encoder(features, mask, state), torch.ones(3, dtype=torch.bool))
    null = head.denoise(start(), head.denoiser.prepare(condition, times[:, None])[0])
    assert (null - unguided).abs().max() > 1e-2
    for scale in (0.5, 1.0, 3.0):
        head.guidance_scale = scale
        guided = head.sample(features, mask, state, noise=start(), num_inference_steps=1) - start()
        torch.testing.assert_close(guided, null + scale * (unguided - null), rtol=1e-4, atol=1e-5)


def test_null_condition_knows_nothing_of_the_observation():
    head, (features, mask, state) = build("cross_attention", condition_dropout=0.1), observe()
    everyone = torch.ones(3, dtype=torch.bool)
    contexts = []
    for observation in ((features, mask, state), (features * 2, mask, state + 1)):
        condition = head.drop_condition(head.condition_encoder(*observation), everyone)
        contexts.append(head.denoise(start(), head.denoiser.prepare(condition, torch.zeros(1, 1))[0]))
    assert contexts[0].equal(contexts[1])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_conditions_are_dropped_in_training_at_the_stated_share_and_the_null_is_learnt(conditioning):
    count = 5000
    head, (features, mask, state) = build(conditioning, condition_dropout=0.2), observe(count)
    condition = head.encode_condition(features, mask, state, seeded())
    dropped = condition.vector.eq(head.null_condition).all(-1)
    assert dropped.equal(condition.tokens.eq(head.null_condition).all(-1).all(-1))
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / count) ** 0.5)
    kept = head.condition_encoder(features, mask, state).vector[~dropped]
    assert condition.vector[~dropped].equal(kept)
    actions = torch.zeros(count, CHUNK, ACTION_DIM)
    head.loss(features, mask, actions, torch.ones(count, CHUNK, dtype=torch.bool), state).mean().backward()
    assert head.null_condition.grad.abs().max() > 0
    head.eval()
    assert not head.encode_condition(features, mask, state, seeded()).vector.eq(head.null_condition).all(-1).any()


def test_null_condition_of_a_head_built_on_meta_is_set_by_reset_parameters():
    with torch.device("meta"):
        head = FlowMatchingHead(FEATURE_DIM, ACTION_DIM, CHUNK, condition_dropout=0.1)
    head.to_empty(device="cpu")
    torch.nn.init.constant_(head.null_condition, torch.nan)
    head.reset_parameters()
    assert head.null_condition.eq(0).all()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_bfloat16_weights_give_finite_float32_samples_near_those_of_float32(conditioning):
    head, (features, mask, state) = build(conditioning, condition_dropout=0.1).eval(), observe()
    head.guidance_scale = 1.5
    expected, expected_loss = head.sample(features, mask, state, noise=start()), loss_of(head, generator=seeded())
    head.bfloat16()
    samples = head.sample(features.bfloat16(), mask, state, noise=start())
    loss = head.loss(features.bfloat16(), mask, *chunks(), state, seeded())
    assert samples.dtype == loss.dtype == torch.float32
    (context,) = head.prepare(features.bfloat16(), mask, state, torch.zeros(1))
    assert head.guided(start(), context).dtype == torch.float32
    torch.testing.assert_close(samples, expected, rtol=0, atol=0.03 * float(expected.abs().max()))
    torch.testing.assert_close(loss, expected_loss, rtol=0.05, atol=0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gradients_reach_every_parameter(conditioning):
    head = build(conditioning, condition_dropout=0.5)
    for seed in range(4):  # some of the draws drop a condition, others do not
        loss_of(head, generator=seeded(seed)).sum().backward()
    assert [name for name, parameter in head.named_parameters() if not parameter.grad.abs().max() > 0] == []


def test_a_sampling_keeps_no_gradients():
    assert not build().sample(*observe()).requires_grad


def test_samples_that_are_not_finite_raise():
    with pytest.raises(ValueError, match=r"samples \[1\] are NaN or infinite"):
        flow(head_of(lambda x, t: x / torch.tensor([1.0, 0.0, 1.0])[:, None, None]), start())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_sampling": "logit_normal"}, "Expected time_sampling in .*'beta', 'uniform'.* came 'logit_normal'"),
        ({"solver": "rk4"}, "solver in .*'euler', 'heun'.* came .*'rk4'"),
        ({"guidance_scale": 2.0}, "condition_dropout above 0"),
        ({"num_inference_steps": 0}, "num_inference_steps and noise_draws of 1 or more"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_shapes_raise():
    with pytest.raises(ValueError, match=r"Expected noise of shape \(3, 4, 2\), came \(3, 5, 2\)"):
        build().sample(*observe(), noise=torch.zeros(3, 5, 2))
    with pytest.raises(ValueError, match=r"Expected actions of shape \(3, 4, 2\)"):
        loss_of(build(), torch.zeros(3, 5, 2))
    for times in (torch.zeros(2), torch.zeros(1, 3), torch.tensor([0, 0.5, 1.1]), torch.tensor([0, torch.nan, 1])):
        with pytest.raises(ValueError, match=r"Expected times of shape \(3,\) in \[0, 1\], came tensor"):
            loss_of(build(), times=times)
