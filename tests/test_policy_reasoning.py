import numpy as np
import pytest

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.policy import Policy


@pytest.fixture(scope="module")
def frames(demos):
    """Frames of which an untrained model says different things."""
    dataset = LeRobotEpisodes(demos)
    return [dataset[row] | {"task": "push"} for row in (0, 400, 800, 1200)]


@pytest.fixture(scope="module")
def talker(reasoning_checkpoint):
    """Makes policies of a model that reasons, and says what they were made under."""
    loaded = Policy.from_pretrained(reasoning_checkpoint, device="cpu")

    def make(**options):
        return Policy(loaded.model, loaded.processor, **options)

    return make


@pytest.fixture(scope="module")
def own(talker, frames):
    """What the model says of each frame."""
    policy, texts = talker(), []
    assert policy.reasoning is None
    for frame in frames:
        policy.predict_chunk(frame)
        texts.append(policy.reasoning)
    assert len(set(texts)) == len(frames)
    return texts


def predict(policy, frame, reasoning=None, **options):
    """The chunk that model and processor give without the policy, and the reasoning's ids."""
    images = {name: frame[f"observation.images.{name}"] for name in ("agentview", "wrist")}
    inputs = policy.processor(images=[images], text=[frame["task"]], reasoning=reasoning)
    output = policy.model.predict_action(**inputs, **options)
    return policy.processor.decode_actions(output)[0], output.reasoning_ids


def test_reasons_before_every_nth_chunk(talker, frames, own):
    policy = talker(reasoning_interval=3)
    texts, chunks = [], []
    for frame in frames:
        chunks.append(policy.predict_chunk(frame))
        texts.append(policy.reasoning)
    assert texts == [own[0]] * 3 + [own[3]]
    first, ids = predict(policy, frames[0])
    assert np.array_equal(chunks[0], first)
    assert np.array_equal(chunks[1], predict(policy, frames[1], reasoning_ids=ids)[0])
    assert not np.allclose(chunks[1], predict(policy, frames[1])[0], atol=1e-3)  # which reasons anew


def test_reset_and_another_task_make_it_reason_anew(talker, frames, own):
    policy = talker(reasoning_interval=9)
    policy.predict_chunk(frames[0])
    policy.reset()
    assert policy.reasoning is None
    policy.predict_chunk(frames[1])
    assert policy.reasoning == own[1]
    pull = frames[2] | {"task": "pull"}
    policy.predict_chunk(pull)
    fresh = talker()
    fresh.predict_chunk(pull)
    assert policy.reasoning == fresh.reasoning not in own
    policy.predict_chunk(frames[3])
    assert policy.reasoning == own[3]


def test_executes_chunks_under_one_reasoning(talker, frames, own):
    policy = talker(reasoning_interval=2, n_action_steps=1)
    actions = [(policy.select_action(frame), policy.reasoning) for frame in frames]
    assert [text for _, text in actions] == [own[0], own[0], own[2], own[2]]


def test_an_ensembles_predictions_count(talker, frames, own):
    policy = talker(reasoning_interval=2, ensemble_coefficient=0.0)
    texts = [policy.select_action(frame) is not None and policy.reasoning for frame in frames]
    assert texts == [own[0], own[0], own[2], own[2]]


def test_acts_under_a_given_reasoning_and_reasons_anew_after_it(talker, frames, own):
    policy = talker(reasoning_interval=9)
    policy.predict_chunk(frames[0])
    chunk = policy.predict_chunk(frames[1], reasoning=" lift the can\n")
    assert policy.reasoning == "lift the can"
    assert np.array_equal(chunk, predict(policy, frames[1], "lift the can")[0])
    assert not np.allclose(chunk, predict(policy, frames[1])[0], atol=1e-3)
    policy.predict_chunk(frames[2])
    assert policy.reasoning == own[2]


def test_a_refused_call_counts_for_nothing(talker, frames, own):
    policy, no_picture = talker(reasoning_interval=3), {"observation.images.wrist": "no picture"}
    policy.predict_chunk(frames[0])
    for refused, reasoning in ((no_picture, None), ({}, "lift<eos>"), (no_picture, "lift")):
        with pytest.raises(ValueError, match="Expected"):
            policy.predict_chunk(frames[1] | refused, reasoning)
        assert policy.reasoning == own[0]
    texts = [policy.predict_chunk(frame) is not None and policy.reasoning for frame in frames[1:]]
    assert texts == [own[0], own[0], own[3]]


def test_a_reasoning_is_as_long_as_the_policy_says(talker, frames, own):
    policy = talker(max_reasoning_tokens=3, reasoning_interval=2)
    chunk, (expected, ids) = policy.predict_chunk(frames[0]), predict(policy, frames[0], max_reasoning_tokens=3)
    assert np.array_equal(chunk, expected) and ids.shape == (1, 3)
    assert own[0].startswith(policy.reasoning) and 0 < len(policy.reasoning) < len(own[0])
    recalled = predict(policy, frames[1], reasoning_ids=ids)[0]
    assert np.array_equal(policy.predict_chunk(frames[1]), recalled)
    given = predict(policy, frames[2], "lift the can")[0]
    assert np.array_equal(policy.predict_chunk(frames[2], "lift the can"), given)


def test_acts_without_a_word(talker, frames, monkeypatch):
    policy = talker(max_reasoning_tokens=0)
    silent, _ = predict(policy, frames[0], max_reasoning_tokens=0)
    assert not np.allclose(silent, predict(policy, frames[0])[0], atol=1e-3)
    assert np.array_equal(policy.predict_chunk(frames[0]), silent) and policy.reasoning is None
    with pytest.raises(ValueError, match="With max_reasoning_tokens=0 .* leave it or reasoning out, came 'lift'"):
        policy.predict_chunk(frames[0], "lift")
    with pytest.raises(ValueError, match="With max_reasoning_tokens=0 .* leave it or reasoning_interval out, came 2"):
        talker(max_reasoning_tokens=0, reasoning_interval=2)
    with pytest.raises(ValueError, match="max_reasoning_tokens of 0 or more, came -1"):
        talker(max_reasoning_tokens=-1)
    monkeypatch.setattr(policy.model.config, "max_reasoning_tokens", 0)
    trained_so = talker()
    assert np.array_equal(trained_so.predict_chunk(frames[0]), silent)
    assert trained_so.reasoning is None and not trained_so.takes_reasoning
    refused = r"trained to act without words \(config.max_reasoning_tokens is 0\): leave {} out"
    with pytest.raises(ValueError, match=refused.format("reasoning")):
        trained_so.predict_chunk(frames[0], "lift")
    for option in ("reasoning_interval", "max_reasoning_tokens"):
        with pytest.raises(ValueError, match=refused.format(option)):
            talker(**{option: 2})


def test_another_given_reasoning_gives_the_chunk_up(talker, frames):
    policy, given = talker(), ["lift", "lift", "drop", None, None]
    predicted = []
    for reasoning in given:
        policy.select_action(frames[0], reasoning)
        predicted.append((policy.reasoning, len(policy._horizon._actions)))
    assert [left for _, left in predicted] == [3, 2, 3, 3, 2]
    assert [text for text, _ in predicted[:3]] == ["lift", "lift", "drop"] and predicted[3][0] == predicted[4][0]


def test_a_datasets_reasoning_is_not_peeked_at(talker, frames, own):
    policy = talker()
    policy.predict_chunk(frames[0] | {"reasoning": "lift", "subtask": "lift"})
    assert policy.reasoning == own[0]


def test_a_family_that_does_not_reason_takes_no_reasoning(tiny_checkpoint, demo_item):
    policy = Policy.from_pretrained(tiny_checkpoint)
    policy.predict_chunk(demo_item)
    assert policy.reasoning is None and not policy.takes_reasoning
    with pytest.raises(ValueError, match="does not reason: leave reasoning out, came 'lift'"):
        policy.predict_chunk(demo_item, reasoning="lift")
