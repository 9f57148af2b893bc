"""Who shares a batch with whom changes nothing, not even the last bit."""

import numpy as np
import pytest
import torch

from hf_vla.models.requests import answer
from hf_vla.policy import Policy, predict_chunks

TASKS = ("Reach a goal position", "Press a button", "Press a buttom")  # the last two are equally long
COUNT = 6
# family, configuration, policy's options
DIT = {"type": "dit", "hidden_size": 32, "depth": 2, "num_heads": 2}
VARIANTS = {
    "history": ("tinyvla", {"n_obs_steps": 2}, {}),
    "frames": ("spatialvla", {"n_obs_steps": 2}, {}),
    "interval": ("divla", {}, {"reasoning_interval": 2}),
    "silent": ("divla", {}, {"max_reasoning_tokens": 0}),
    "flow": ("tinyvla", {"head_config": {"type": "flow_matching", "denoiser": DIT}}, {}),
}


def observations(step):
    rng = np.random.default_rng(step)
    pictures = rng.integers(0, 256, (COUNT, 48, 48, 3), np.uint8)
    states = rng.uniform(-1, 1, (COUNT, 4)).astype(np.float32)
    return [
        {"observation.images.corner4": picture, "observation.state": state, "task": TASKS[place % 3]}
        for place, (picture, state) in enumerate(zip(pictures, states, strict=True))
    ]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def predictions(make, orders, batch_size):
    """Chunk of every episode at every step; each step's order says who is asked, and in which place."""
    policies, chunks = [make(seed) for seed in range(COUNT)], {}
    for step, order in enumerate(orders):
        seen = observations(step)
        for members in order:
            answers = predict_chunks(
                [policies[place] for place in members], [seen[place] for place in members], batch_size=batch_size
            )
            chunks |= {(step, place): chunk for place, chunk in zip(members, answers, strict=True)}
    return chunks


ALONE = [[[place] for place in range(COUNT)]] * 3
COMPANIES = [
    [[[0, 1, 2, 3, 4, 5]], [[5, 4, 3, 2, 1, 0]], [[3, 0, 5], [1, 4, 2]]],
    [[[2, 5], [4, 1, 3, 0]], [[0, 3, 1, 4]] + [[2, 5]], [[4, 1, 5, 2, 0, 3]]],
]


def check(make):
    expected = predictions(make, ALONE, 4)
    for orders in COMPANIES:
        chunks = predictions(make, orders, 4)
        assert all(np.array_equal(chunks[key], chunk) for key, chunk in expected.items())
    return expected


def test_batch_mates_change_nothing(sawyer, family, one_thread):
    model, processor = sawyer(family)
    expected = check(lambda seed: Policy(model, processor, seed=seed))
    distinct = {chunk.tobytes() for chunk in expected.values()}
    assert len(distinct) > COUNT  # the episodes are not all alike


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_batch_mates_change_nothing_with_a_past_or_words(sawyer, variant, one_thread):
    family, config, options = VARIANTS[variant]
    model, processor = sawyer(family, **config)
    check(lambda seed: Policy(model, processor, seed=seed, **options))


def test_one_policy_is_a_batch_of_one(sawyer, family):
    model, processor = sawyer(family)
    own = Policy(model, processor, seed=3).predict_chunk(observations(0)[0])
    (chunk,) = predict_chunks([Policy(model, processor, seed=3)], [observations(0)[0]], batch_size=1)
    assert np.array_equal(own, chunk)


def test_prompts_alike_share_a_call_and_fill_it(sawyer, monkeypatch):
    model, processor = sawyer("tinyvla")
    calls, predict = [], model.predict_action

    def count(input_ids, **others):
        calls.append(input_ids.shape)
        return predict(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "predict_action", count)
    policies = [Policy(model, processor, seed=seed) for seed in range(COUNT)]
    predict_chunks(policies, observations(0))
    assert sorted(rows for rows, _ in calls) == [2, 4] and len({length for _, length in calls}) == 2
    calls.clear()
    predict_chunks(policies, observations(0), batch_size=3)
    assert [rows for rows, _ in calls] == [3, 3, 3]  # two; four, in three and one


def test_a_refused_observation_counts_for_nobody(sawyer):
    model, processor = sawyer("tinyvla", n_obs_steps=2)
    policies = [Policy(model, processor, seed=seed) for seed in range(2)]
    first, second = observations(0)[:2]
    broken = {**second, "observation.state": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="Expected 4 finite numbers"):
        predict_chunks(policies, [first, broken])
    again = predict_chunks(policies, [first, second], batch_size=4)
    fresh = predict_chunks([Policy(model, processor, seed=seed) for seed in range(2)], [first, second], batch_size=4)
    assert np.array_equal(again, fresh)


def test_a_call_that_fails_uses_up_no_random_numbers(sawyer, monkeypatch):
    model, processor = sawyer("tinyvla")
    policies, seen = [Policy(model, processor, seed=seed) for seed in range(2)], observations(0)[:2]
    with monkeypatch.context() as broken:
        broken.setattr(processor, "decode_actions", lambda output, unnorm_key: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict_chunks(policies, seen, batch_size=2)
    fresh = predict_chunks([Policy(model, processor, seed=seed) for seed in range(2)], seen, batch_size=2)
    assert np.array_equal(predict_chunks(policies, seen, batch_size=2), fresh)


def test_to_check_an_observation_keeps_nothing(sawyer):
    model, processor = sawyer("tinyvla", n_obs_steps=2)
    policy, (first, second) = Policy(model, processor, seed=0), observations(0)[:2]
    with pytest.raises(ValueError, match="Expected 4 finite numbers"):
        policy.check({**first, "observation.state": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="does not reason"):
        policy.check(first, "slowly")
    policy.check(first)
    wanted = Policy(model, processor, seed=0).predict_chunk(second)
    assert np.array_equal(policy.predict_chunk(second), wanted)


def test_given_words_are_each_ones_own(sawyer):
    model, processor = sawyer("divla")
    policies, seen = [Policy(model, processor, seed=0) for _ in range(3)], [observations(0)[0]] * 3
    told, told_else, own = predict_chunks(policies, seen, ["go left", "go up", None])
    assert [policy.reasoning for policy in policies[:2]] == ["go left", "go up"]
    assert len({chunk.tobytes() for chunk in (told, told_else, own)}) == 3
    alone = Policy(model, processor, seed=0)
    np.testing.assert_allclose(alone.predict_chunk(seen[0], "go up"), told_else, atol=1e-4)


def test_nobody_asks(sawyer):
    assert answer([]) == [] and predict_chunks([], []) == []


@pytest.mark.parametrize("options", [{"n_action_steps": 3}, {"ensemble_coefficient": 0.01}, {}])
def test_executing_chunks_is_what_selecting_actions_does(sawyer, options):
    """With a past, the observations in between count, too."""
    model, processor = sawyer("tinyvla", n_obs_steps=2)
    stepwise, chunked = (Policy(model, processor, seed=0, **options) for _ in range(2))
    seen = [{**observations(step)[0], "task": "reach"} for step in range(6)]
    selected = [stepwise.select_action(each) for each in seen]
    executed = []
    while len(executed) < len(seen):
        actions = chunked.execute(chunked.predict_chunk(seen[len(executed)]))
        for between in range(1, len(actions)):
            if len(executed) + between < len(seen):
                chunked.remember(seen[len(executed) + between])
        executed += [*actions]
    assert np.array_equal(selected, executed[: len(seen)])
