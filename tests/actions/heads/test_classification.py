import pytest
import torch

from hf_vla.actions.heads.registry import build_action_head
from hf_vla.actions.tokenizers.uniform import UniformTokenizer

FEATURES, ACTIONS, CHUNK, BINS = 8, 3, 4, 8


def build(num_bins=BINS, batch=2, **options):
    """A head and an observation on which its scores are its last bias, shape (chunk, action_dim, num_bins)."""
    torch.manual_seed(0)
    config = {"type": "classification", "hidden_dim": 16, "num_bins": num_bins, **options}
    head = build_action_head(config, FEATURES, ACTIONS, CHUNK)
    torch.nn.init.zeros_(head.network[-1].weight)
    scores = head.network[-1].bias.data.view(CHUNK, ACTIONS, num_bins)
    scores.copy_(torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)))
    return head, scores, (torch.randn(batch, 2, FEATURES), torch.ones(batch, 2, dtype=torch.bool))


def test_argmax_is_the_centre_of_the_likeliest_bin():
    head, scores, observation = build()
    scores[0, 0] = torch.eye(BINS)[0]
    scores[0, 1] = torch.eye(BINS)[BINS - 1]
    actions = head.sample(*observation)
    torch.testing.assert_close(actions[0, 0, :2], torch.tensor([-0.875, 0.875]))
    torch.testing.assert_close(actions, (-0.875 + 0.25 * scores.argmax(-1)).expand(2, -1, -1))


def test_expectation_is_the_mean_of_the_centres():
    head, scores, observation = build(decoding="expectation")
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    expected = (weights * torch.linspace(-0.875, 0.875, BINS)).sum(-1)
    torch.testing.assert_close(head.sample(*observation), expected.expand(2, -1, -1))


def test_samples_have_the_probabilities_of_the_bins_and_are_drawn_apart():
    head, scores, observation = build(decoding="sample", batch=2000)
    generator = torch.Generator().manual_seed(0)
    drawn = head.sample(*observation, generator=generator)
    bins = ((drawn + 1) * BINS / 2 - 0.5).round().long()
    shares = torch.nn.functional.one_hot(bins, BINS).float().mean(0)
    torch.testing.assert_close(shares, scores.softmax(-1), rtol=0, atol=0.045)  # four standard errors of a half
    torch.testing.assert_close(drawn, -0.875 + 0.25 * bins)
    assert not torch.equal(head.sample(*observation, generator=generator), drawn)
    assert drawn.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max() < 0.12  # no number decides another


def test_the_loss_is_the_cross_entropy_averaged_over_the_numbers_of_real_actions():
    head, scores, observation = build()
    bins = torch.randint(BINS, (2, CHUNK, ACTIONS), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(CHUNK) < torch.tensor([[4], [2]])
    chosen = scores.log_softmax(-1).expand(2, -1, -1, -1).gather(-1, bins[..., None])[..., 0]
    expected = -torch.stack([chosen[0].mean(), chosen[1, :2].mean()])
    for place in (0.01, 0.5, 0.99):  # anywhere in its bin, an action costs the same
        actions = (bins + place) * 2 / BINS - 1
        torch.testing.assert_close(head.loss(*observation, actions, mask), expected)


@pytest.mark.parametrize("num_bins", [2, 255, 256])
def test_bins_and_centres_are_those_of_the_uniform_tokenizer(num_bins):
    """Read off by training nothing: the bin of an action is where the gradient of its cross entropy is negative."""
    head, scores, observation = build(num_bins, batch=1)
    actions = torch.rand(1, CHUNK, ACTIONS, generator=torch.Generator().manual_seed(3)) * 2 - 1
    actions[0, 0] = torch.tensor([-1.0, 1.0, 0.0])
    head.loss(*observation, actions, torch.ones(1, CHUNK, dtype=torch.bool)).sum().backward()
    bins = head.network[-1].bias.grad.view(scores.shape).argmin(-1)
    tokenizer = UniformTokenizer(ACTIONS, num_bins)
    ids = torch.from_numpy(tokenizer.encode(actions[0].numpy())).view(CHUNK, ACTIONS)
    assert torch.equal(bins, ids)
    scores.copy_(torch.nn.functional.one_hot(ids, num_bins))
    decoded = torch.from_numpy(tokenizer.decode(ids.flatten().numpy())).float()
    torch.testing.assert_close(head.sample(*observation)[0], decoded, rtol=0, atol=1e-6)


def test_actions_outside_the_range_are_in_the_bins_at_its_ends():
    head, _, observation = build()
    mask = torch.ones(2, CHUNK, dtype=torch.bool)
    for far, end in ((-1e30, -1.0), (-1.01, -1.0), (1.01, 1.0), (1e30, 1.0)):
        losses = [head.loss(*observation, torch.full((2, CHUNK, ACTIONS), value), mask) for value in (far, end)]
        assert torch.equal(*losses)


@pytest.mark.parametrize("decoding", ["argmax", "expectation", "sample"])
def test_scores_that_are_not_finite_become_no_action(decoding):
    head, scores, observation = build(decoding=decoding)
    scores[1, 1, 3] = float("nan")
    with pytest.raises(ValueError, match=r"actions of samples \[0, 1\] are NaN or infinite"):
        head.sample(*observation)


@pytest.mark.parametrize("options", [{"decoding": "mode"}, {"num_bins": 1}, {"num_layers": 0}])
def test_wrong_values_raise_and_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"Expected .*{name}.*came .*{value}"):
        build_action_head({"type": "classification", **options}, FEATURES, ACTIONS, CHUNK)
