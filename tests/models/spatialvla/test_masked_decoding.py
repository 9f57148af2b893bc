"""Oracles that know the answer, and properties that hold whatever is predicted."""

import pytest
import torch

from hf_vla.models.spatialvla.masked_decoding import cosine_schedule, decode, random_mask

SIZES = (1024, 512, 2)  # of the blocks of three tokens
CHUNK = 4
NUM_TOKENS = CHUNK * len(SIZES)
STOPS = torch.tensor(SIZES).cumsum(0)
RANGES = torch.stack([STOPS - torch.tensor(SIZES), STOPS], dim=-1).repeat(CHUNK, 1)


class Oracle:
    """Gives each sample's ids the probabilities that it is told; keeps what it is asked."""

    def __init__(self, answers, probabilities):
        others = (1 - probabilities) / (RANGES[:, 1] - RANGES[:, 0] - 1)
        scores = others.log()[..., None].expand(*answers.shape, 1538)
        self.scores, self.calls = scores.scatter(-1, answers[..., None], probabilities.log()[..., None]), []

    def __call__(self, ids, masked):
        self.calls.append((ids.clone(), masked.clone()))
        return self.scores


def some_ids(batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low, stop = RANGES.T
    return (low + torch.rand(batch_size, NUM_TOKENS, generator=generator) * (stop - low)).long()


def noise(ids, masked):
    """Scores that depend on what is seen: of every sample on its own."""
    seen = torch.where(masked, -1, ids)
    weights = torch.linspace(-2, 2, NUM_TOKENS * 1538).view(NUM_TOKENS, 1538)
    return 5 * torch.sin(weights * (seen.sum(-1)[:, None, None] % 97 + 3))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("num_tokens", "num_steps"), [(12, 4), (12, 12), (12, 1), (1, 1), (56, 12), (84, 83)])
def test_the_schedule_falls_from_all_to_none(num_tokens, num_steps):
    schedule = [num_tokens, *cosine_schedule(num_tokens, num_steps)]
    assert len(schedule) == num_steps + 1 and schedule[-1] == 0
    assert all(after < before for before, after in zip(schedule, schedule[1:], strict=False))


def test_the_schedule_is_a_cosine():
    assert cosine_schedule(100, 4) == [92, 70, 38, 0]  # cos(22.5), cos(45), cos(67.5) degrees


@pytest.mark.parametrize("num_steps", [0, -1, 13])
def test_no_more_passes_than_tokens(num_steps):
    with pytest.raises(ValueError, match=f"Expected 1 to 12 decoding passes.*got {num_steps}"):
        cosine_schedule(12, num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 12])
def test_an_oracle_is_decoded_in_the_scheduled_passes_surest_first(num_steps):
    """Whatever order each sample's positions are sure in."""
    answers, order = some_ids(), torch.stack([torch.randperm(NUM_TOKENS, generator=generator(n)) for n in (1, 2)])
    oracle = Oracle(answers, 0.95 - 0.03 * order.argsort(-1))  # order[:, 0] is the surest position
    ids, scores = decode(oracle, RANGES, 2, num_steps)
    assert torch.equal(ids, answers) and torch.equal(scores.argmax(-1), answers)
    assert len(oracle.calls) == num_steps
    for (seen, masked), left in zip(oracle.calls, [NUM_TOKENS, *cosine_schedule(NUM_TOKENS, num_steps)], strict=False):
        for sample in range(2):
            assert set(order[sample, NUM_TOKENS - left :].tolist()) == set(masked[sample].nonzero()[:, 0].tolist())
        assert torch.equal(seen[~masked], answers[~masked])


def one_mistake(later):
    """An oracle that is first surest of a wrong id in one place; once that stands, its probability is `later`."""
    answers = some_ids(1)
    wrong = answers.clone()
    wrong[0, 0] = (wrong[0, 0] + 7) % SIZES[0]
    sure = torch.full((1, NUM_TOKENS), 0.9)
    surest, doubtful = sure.clone(), sure.clone()
    surest[0, 0], doubtful[0, 0] = 0.99, later

    def predict(ids, masked):
        if masked.all():
            return Oracle(wrong, surest).scores
        return (Oracle(answers, sure) if masked[0, 0] else Oracle(wrong, doubtful)).scores

    return predict, answers, wrong


@pytest.mark.parametrize("checks", [{"remask_threshold": 0.5}, {"remask_drop": 0.5}])
def test_remasking_repairs_what_an_oracle_first_got_wrong(checks):
    predict, answers, wrong = one_mistake(later=0.1)
    calls = []
    ids, _ = decode(lambda *seen: calls.append(seen) or predict(*seen), RANGES, 1, 4, **checks)
    assert torch.equal(ids, answers) and len(calls) == 4
    assert [bool(masked[0, 0]) for _, masked in calls][:3] == [True, False, True]
    assert torch.equal(decode(predict, RANGES, 1, 4)[0], wrong)  # without the checks it stands


def test_the_drop_is_from_when_the_id_was_revealed():
    """Just under an absolute bound, and yet far less sure than before."""
    predict, answers, wrong = one_mistake(later=0.52)
    assert torch.equal(decode(predict, RANGES, 1, 4, remask_threshold=0.5)[0], wrong)
    assert torch.equal(decode(predict, RANGES, 1, 4, remask_drop=0.6)[0], wrong)
    assert torch.equal(decode(predict, RANGES, 1, 4, remask_drop=0.4)[0], answers)


def test_the_threshold_rises():
    """Probability 0.52 is above half of 0.9, which counts in the second of four passes, not above three quarters."""
    predict, answers, _ = one_mistake(later=0.52)
    seen = []
    decode(lambda ids, masked: seen.append(masked) or predict(ids, masked), RANGES, 1, 4, remask_threshold=0.9)
    assert [bool(masked[0, 0]) for masked in seen] == [True, False, False, True]


def test_everything_is_revealed_in_the_end_whatever_is_doubted():
    """An oracle that is sure of nothing: all that was revealed is taken back, the last pass decides."""
    answers = some_ids()
    oracle = Oracle(answers, torch.full((2, NUM_TOKENS), 0.6))
    ids, _ = decode(oracle, RANGES, 2, 4, remask_threshold=1.0)
    assert torch.equal(ids, answers) and len(oracle.calls) == 4
    revealed = [12 - int(masked[0].sum()) for _, masked in oracle.calls]
    assert revealed == [0, 1, 4, 4]  # 1, 4 and 8 by the schedule; of the last 8, 4 stood already and are doubted


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"remask_threshold": 0.3, "remask_drop": 0.1}])
def test_batch_mates_change_nothing(options):
    def run(samples):
        offsets = torch.stack([(number + 1) * torch.arange(1538).cos() for number in samples])[:, None]
        generators = [generator(number) for number in samples]
        return decode(lambda *seen: noise(*seen) + offsets, RANGES, len(samples), 5, generator=generators, **options)

    ids, scores = run(range(3))
    for number in range(3):
        alone = run([number])
        assert torch.equal(alone[0][0], ids[number]) and torch.equal(alone[1][0], scores[number])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_only_permitted_ids(temperature):
    low, stop = RANGES.T
    for seed in range(5):
        ids, scores = decode(noise, RANGES, 4, 6, temperature=temperature, generator=generator(seed))
        assert ((ids >= low) & (ids < stop)).all()
        permitted = torch.isfinite(scores)
        assert torch.equal(permitted.sum(-1), (stop - low).expand(4, -1))
        assert permitted.gather(-1, ids[..., None]).all()


def test_sampling_is_repeatable():
    def sample(seed):
        return decode(noise, RANGES, 2, 4, temperature=1.0, generator=generator(seed))[0]

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    greedy = decode(noise, RANGES, 2, 4)[0]
    assert torch.equal(decode(noise, RANGES, 2, 4, generator=generator(3))[0], greedy)
    assert torch.equal(decode(noise, RANGES, 2, 4, temperature=1e-6, generator=generator(3))[0], greedy)


def test_sampling_draws_from_the_softmax():
    """One pass at temperature 1; of two ids one has three times the other's weight."""
    ranges = torch.tensor([[0, 2]])
    scores = torch.tensor([0.0, 3.0]).log1p().expand(20000, 1, 2)  # weights 1 and 4
    ids, _ = decode(lambda *_: scores, ranges, 20000, 1, temperature=1.0, generator=generator())
    assert ids.float().mean().item() == pytest.approx(0.8, abs=0.01)
    cool, _ = decode(lambda *_: scores, ranges, 20000, 1, temperature=0.5, generator=generator())
    assert cool.float().mean().item() == pytest.approx(16 / 17, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remask_threshold": 1.5}, "remask_threshold in .0, 1., a probability, got 1.5"),
        ({"remask_drop": -0.1}, "remask_drop in .0, 1., a probability, got -0.1"),
        ({"temperature": -1.0}, "temperature of 0 or more, got -1.0"),
        ({"temperature": 1.0, "generator": [generator()]}, "a generator for each of 2 samples, came 1"),
    ],
)
def test_options_that_are_no_use(options, message):
    with pytest.raises(ValueError, match=message):
        decode(noise, RANGES, 2, 4, **options)


def test_training_hides_some_real_tokens_and_all_padded_ones():
    real = torch.ones(4000, NUM_TOKENS, dtype=torch.bool)
    real[1000:2000, 3:] = False
    real[2000:3000] = False
    masked = random_mask(real, generator())
    assert masked[~real].all()
    hidden = (masked & real).sum(-1)
    assert (hidden[:1000] >= 1).all() and hidden[:1000].max() == NUM_TOKENS  # decoding begins with all of them
    assert set(hidden[1000:2000].tolist()) == {1, 2, 3} and (hidden[2000:3000] == 0).all()
    assert set(hidden[3000:].tolist()) == set(range(1, NUM_TOKENS + 1))


def test_the_ratio_is_drawn_from_the_schedule():
    masked = random_mask(torch.ones(20000, 100, dtype=torch.bool), generator())
    ratios = masked.float().mean(-1)
    quantiles = torch.quantile(ratios, torch.tensor([0.25, 0.5, 0.75]))
    expected = torch.cos(torch.pi / 2 * torch.tensor([0.75, 0.5, 0.25]))
    torch.testing.assert_close(quantiles, expected, atol=0.02, rtol=0)
    assert masked.float().mean(0).std() < 0.01  # no place is preferred


def test_training_masks_are_repeatable_and_differ():
    real = torch.ones(8, NUM_TOKENS, dtype=torch.bool)
    assert torch.equal(random_mask(real, generator(1)), random_mask(real, generator(1)))
    assert not torch.equal(random_mask(real, generator(1)), random_mask(real, generator(2)))
    torch.manual_seed(3)
    first = random_mask(real)
    torch.manual_seed(3)
    assert torch.equal(random_mask(real), first)
    assert len({tuple(row.tolist()) for row in first}) > 1


def test_the_ratio_is_of_the_real_tokens():
    """Of one sample with 100 real tokens and one with as many padded ones the same share is hidden."""
    real = torch.ones(2000, 200, dtype=torch.bool)
    real[:, 100:] = False
    hidden = (random_mask(real, generator()) & real).sum(-1) / 100
    whole = random_mask(real[:, :100], generator()).float().mean(-1)
    assert hidden.mean().item() == pytest.approx(2 / torch.pi, abs=0.02)
    assert hidden.mean().item() == pytest.approx(whole.mean().item(), abs=0.02)


def test_sampling_cools_as_fewer_are_masked():
    """Two passes over two positions: the second draws at half of the temperature."""
    ranges, scores = torch.tensor([[0, 2], [0, 2]]), torch.tensor([0.0, 3.0]).log1p()
    scores = torch.stack([10 * scores, scores]).expand(20000, 2, 2)  # the left is surer and comes first
    ids, _ = decode(lambda *_: scores, ranges, 20000, 2, temperature=1.0, generator=generator())
    assert ids[:, 1].float().mean().item() == pytest.approx(16 / 17, abs=0.01)


def test_scores_are_those_that_chose():
    """Not those of later passes, in which an id is no longer asked for."""
    answers, counter = some_ids(1), iter(range(4))
    order = torch.arange(NUM_TOKENS)[None]
    oracle = Oracle(answers, 0.95 - 0.03 * order)
    _, scores = decode(lambda *seen: oracle(*seen) + 100.0 * next(counter), RANGES, 1, 4)
    left = torch.tensor([NUM_TOKENS, *cosine_schedule(NUM_TOKENS, 4)])
    chosen_in = (NUM_TOKENS - left[1:, None] <= order).sum(0)  # the passes that had not reached a position yet
    assert torch.equal((scores.amax(-1)[0] / 100).round().long(), chosen_in)
