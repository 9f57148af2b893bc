import itertools

import pytest
import torch
from torch.nn import functional as F

from hf_vla.actions.heads.networks.latent import ActionDecoder, Embodiment

ACTION_DIMS = [1, 2, 3, 6, 7]


def make(action_dim, latent_dim, trained=True):
    """A decoder; trained: to turn and bend actions, as those of a new robot are, until nothing is the identity."""
    torch.manual_seed(0)
    decoder = ActionDecoder(action_dim, latent_dim, hidden_dim=32)
    if trained:
        actions, generator = chunk(action_dim), torch.Generator().manual_seed(5)
        size = max(action_dim, latent_dim)
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q[:action_dim, :latent_dim]
        wanted = torch.sin(actions) @ turn + 0.3
        optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            (decoder.inverse(actions) - wanted).square().mean().backward()
            optimizer.step()
    return decoder.eval()


def chunk(action_dim, *shape):
    return torch.rand(*(shape or (64,)), action_dim, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("action_dim", ACTION_DIMS)
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_nothing_is_lost_between_actions_and_latents(action_dim, extra):
    decoder, actions = make(action_dim, action_dim + extra), chunk(action_dim)
    latents = decoder.inverse(actions)
    assert latents.shape == (64, action_dim + extra) and latents.dtype == torch.float32
    assert (latents - F.pad(actions, (0, extra))).abs().max() > 0.05
    torch.testing.assert_close(decoder(latents), actions, rtol=0, atol=1e-6)
    assert decoder.reconstruction_loss(actions[None], torch.ones(1, 64, dtype=torch.bool)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("action_dim", ACTION_DIMS)
def test_an_untrained_decoder_is_the_identity_and_rounds_nothing(action_dim, dtype):
    decoder, actions = make(action_dim, action_dim + 2, trained=False).to(dtype), chunk(action_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = decoder.inverse(actions)
        again = decoder(latents)
    assert torch.equal(latents, F.pad(actions, (0, 2))) and latents.dtype == again.dtype == torch.float32
    torch.testing.assert_close(again, actions, rtol=0, atol=1e-6)


def test_a_trained_decoder_keeps_its_precision_under_autocast():
    decoder, actions = make(6, 8), chunk(6)
    latents = decoder.inverse(actions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decoder.inverse(actions), latents)
        assert torch.equal(decoder(latents), decoder.float()(latents))
    half = decoder.to(torch.bfloat16)
    torch.testing.assert_close(half(half.inverse(actions)), actions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("action_dim", [2, 3, 6])
def test_couplings_preserve_volume(action_dim):
    decoder = make(action_dim, action_dim)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: decoder._couple(x, -1)))(chunk(action_dim))
    assert (jacobian - torch.eye(action_dim)).abs().max() > 0.01
    torch.testing.assert_close(torch.linalg.det(jacobian), torch.ones(64), rtol=0, atol=1e-5)


def test_reset_is_the_identity_again():
    decoder, actions = make(4, 6), chunk(4)
    decoder.reset_parameters()
    assert torch.equal(decoder.inverse(actions), F.pad(actions, (0, 2)))


def test_a_map_that_lost_all_rank_still_decodes_to_numbers():
    decoder = make(4, 6)
    torch.nn.init.zeros_(decoder.map)
    assert torch.isfinite(decoder(chunk(6))).all()


def test_smaller_latents_learn_what_matters():
    """Two of four joints follow the others, but in a plane that is not the first two's."""
    torch.manual_seed(0)
    decoder = ActionDecoder(4, 2, hidden_dim=32)
    actions = chunk(2, 8, 16) @ torch.tensor([[0.2, -0.1, 0.9, 0.3], [0.1, 0.2, -0.3, 0.8]])
    mask = torch.ones(8, 16, dtype=torch.bool)
    optimizer, losses = torch.optim.Adam(decoder.parameters(), lr=0.01), []
    for _ in range(100):
        optimizer.zero_grad()
        loss = decoder.reconstruction_loss(actions, mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert decoder.inverse(actions).shape == (8, 16, 2) and decoder(decoder.inverse(actions)).shape == actions.shape
    assert losses[-1] < 0.02 * losses[0] and losses[0] > 0.05


@pytest.mark.parametrize("value", [1e9, float("nan")])
def test_masked_rows_change_no_bit_of_a_reconstruction_and_its_gradients(value):
    decoder, actions, mask = make(4, 2), chunk(4, 3, 5), torch.arange(5) < torch.tensor([[5], [2], [0]])

    def run(actions):
        decoder.zero_grad()
        loss = decoder.reconstruction_loss(actions, mask)
        loss.backward()
        return [loss, *(parameter.grad.clone() for parameter in decoder.parameters())]

    before, after = run(actions), run(actions.masked_fill(~mask[..., None], value))
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(gradient.isfinite().all() for gradient in after) and after[0] > 0
    error = (decoder(decoder.inverse(actions)) - actions).square().mean(-1)
    torch.testing.assert_close(before[0], error[mask].mean(), rtol=0, atol=1e-6)
    assert decoder.reconstruction_loss(actions, torch.zeros_like(mask)) == 0


def test_actions_of_another_robot_are_refused():
    with pytest.raises(ValueError, match="actions of 4 numbers, as this embodiment has, came 5"):
        make(4, 6).inverse(chunk(5))


def head_loss(latents, expected, spread, generator):
    """What an ideal frozen diffusion head says of latents that it expects at `expected`, give or take `spread`.

    Its schedule is the published one's, a squared cosine.
    """
    alpha = torch.cos(torch.rand(len(latents), 1, generator=generator) * 1.5 + 0.03).square()
    noise = torch.randn(latents.shape, generator=generator)
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    gain = alpha.sqrt() * spread**2 / (alpha * spread**2 + 1 - alpha)
    denoised = expected + gain * (noised - alpha.sqrt() * expected)
    return ((noised - alpha.sqrt() * denoised) / (1 - alpha).sqrt() - noise).square().mean()


def test_a_volume_costs_what_its_latents_lack():
    decoder = make(4, 6, trained=False)
    assert decoder.volume_loss().abs() < 1e-7
    costs = []
    for scale in (2.0, 0.5, 0.1, 0.0):
        decoder.zero_grad()
        decoder.reset_parameters()
        with torch.no_grad():
            decoder.map.mul_(scale)
        costs.append(decoder.volume_loss())
        costs[-1].backward()
        assert decoder.map.grad.isfinite().all()
    assert costs[0] < 0 < costs[1] < costs[2] < costs[3] < 1
    assert make(4, 2, trained=False).volume_loss().abs() < 1e-7


def test_a_volume_is_not_rounded_under_autocast():
    """In bfloat16 the determinant of a map through 0 may come out negative, and its logarithm NaN."""
    decoder = make(7, 16, trained=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        left, singular, right = torch.linalg.svd(torch.randn(16, 7, generator=generator), full_matrices=False)
        singular = 8 * singular / singular.max()
        singular[-1] = 0.0
        with torch.no_grad():
            decoder.map.copy_(left * singular @ right / 4)
        wanted = decoder.volume_loss()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(decoder.volume_loss(), wanted) and wanted.isfinite()


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (0.1, False), (0.04, True), (0.0, True)])
def test_a_joint_on_its_way_through_zero_is_warned_of(scale, warns, caplog):
    decoder = make(4, 6, trained=False)
    with torch.no_grad():
        decoder.map[2] *= scale
    decoder.check_learnt()
    assert bool(caplog.records) == warns


@pytest.mark.parametrize(
    ("order", "signs"),
    [([0, 1, 2, 3], [1, -1, 1, 1]), ([2, 0, 3, 1], [1, 1, 1, 1]), ([1, 3, 0, 2], [-1, 1, -1, -1])],
)
def test_learns_joints_that_are_renumbered_and_count_the_other_way_round(order, signs):
    """In front of a frozen head, from what it finds likely; one changed sign turns an orientation round.

    Neither too small nor too large, though smaller latents would be likelier.
    """
    torch.manual_seed(0)
    decoder, generator = ActionDecoder(4, 6, hidden_dim=32), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    signs, spread = torch.tensor(signs, dtype=torch.float32), 0.1

    def draw(count):
        expected = torch.tanh(torch.randn(count, 4, generator=generator)) * torch.tensor([1.0, 0.8, 0.6, 0.9])
        actual = expected + spread * torch.randn(count, 4, generator=generator)
        return actual[:, order] * signs, F.pad(expected, (0, 2))

    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        actions, expected = draw(256)
        optimizer.zero_grad()
        (head_loss(decoder.inverse(actions), expected, spread, generator) + decoder.volume_loss()).backward()
        optimizer.step()
    with torch.no_grad():
        actions, expected = draw(2048)
        mode, best = decoder(expected), expected[:, order] * signs
        assert (mode - best).square().mean().sqrt() < 0.1 * (expected[:, :4] - best).square().mean().sqrt()
        gain = (mode * best).mean(0) / best.square().mean(0)
    torch.testing.assert_close(gain, torch.ones(4), rtol=0, atol=0.03)


@pytest.mark.parametrize("state_dim", [2, 3, 5])
def test_a_state_enters_as_it_is_until_trained(state_dim):
    embodiment, state = Embodiment(4, state_dim, 6, 3).to(torch.bfloat16), chunk(state_dim, 2)
    expected = F.pad(state, (0, max(3 - state_dim, 0)))[:, :3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embodiment.encode_state(state), expected)
    assert any(parameter.requires_grad for parameter in embodiment.state_encoder.parameters())


def test_states_that_do_not_fit_are_refused():
    for own, shared in itertools.product((None, 3), repeat=2):
        if (own is None) != (shared is None):
            with pytest.raises(ValueError, match="embodiment's state_dim to be"):
                Embodiment(4, own, 6, shared)
    for own, given, text in ((3, 2, "of 3 numbers.*came 2"), (3, None, "came None"), (None, 3, "of None.*came 3")):
        state = None if given is None else torch.zeros(1, given)
        with pytest.raises(ValueError, match=text):
            Embodiment(4, own, 6, own).encode_state(state)
    assert Embodiment(4, None, 6, None).encode_state(None) is None
