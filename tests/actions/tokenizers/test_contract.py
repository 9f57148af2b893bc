"""What every action tokenizer must do; a new one in the registry is tested by these without a new file."""

import json

import numpy as np
import pytest

from hf_vla.actions.tokenizers.registry import ACTION_TOKENIZERS, build_action_tokenizer

HORIZON, DIMS = 8, 7


def smooth_chunks(count, seed):
    phase, rate = np.random.default_rng(seed).uniform(0, 2 * np.pi, (2, count, 1, DIMS))
    return np.sin(rate * np.linspace(0, 1, HORIZON)[:, None] + phase).astype(np.float32)


@pytest.fixture(scope="module", params=sorted(ACTION_TOKENIZERS))
def tokenizer(request):
    """Fitted where it can be fitted, else with its defaults."""
    kind = ACTION_TOKENIZERS[request.param]
    return kind.fit(smooth_chunks(400, seed=0)) if hasattr(kind, "fit") else kind()


@pytest.fixture
def chunks():
    return smooth_chunks(24, seed=1)


def test_round_trip_error_is_within_resolution(tokenizer, chunks):
    corners = np.stack([np.ones((HORIZON, DIMS)), -np.ones((HORIZON, DIMS)), np.zeros((HORIZON, DIMS))])
    for actions in (chunks, corners):
        error = np.abs(tokenizer.decode(tokenizer.encode(actions), HORIZON) - actions)
        assert tokenizer.resolution().shape == (DIMS,)
        assert (error <= tokenizer.resolution() + 1e-9).all()


def test_the_resolution_is_no_idle_promise(tokenizer, chunks):
    error = np.abs(tokenizer.decode(tokenizer.encode(chunks), HORIZON) - chunks)
    assert (error.max(axis=(0, 1)) > 0.2 * tokenizer.resolution()).all()


def test_ids_of_decoded_actions_are_the_ids(tokenizer, chunks):
    ids = tokenizer.encode(chunks / 2)
    decoded = tokenizer.decode(ids, HORIZON)
    inside = (np.abs(decoded) < 1).all(axis=(1, 2))  # a centre that was clipped into the cube lies in another cell
    assert inside.sum() >= 3
    width = tokenizer.encode(decoded[inside]).shape[-1]
    np.testing.assert_array_equal(tokenizer.encode(decoded[inside]), ids[inside][:, :width])


def test_json_round_trip_keeps_ids_and_actions(tokenizer, chunks):
    saved = json.dumps(tokenizer.to_dict(), sort_keys=True)  # as transformers saves a processor
    again = build_action_tokenizer(json.loads(saved))
    assert type(again) is type(tokenizer) and again.to_dict() == tokenizer.to_dict()
    ids = tokenizer.encode(chunks)
    np.testing.assert_array_equal(again.encode(chunks), ids)
    np.testing.assert_array_equal(again.decode(ids, HORIZON), tokenizer.decode(ids, HORIZON))


def test_leading_axes_are_kept(tokenizer, chunks):
    ids = tokenizer.encode(chunks)
    assert ids.dtype == np.int64 and ids.min(where=ids != -100, initial=0) >= 0 and ids.max() < tokenizer.vocab_size
    many = tokenizer.encode(chunks.reshape(2, 3, 4, HORIZON, DIMS))
    np.testing.assert_array_equal(many, ids.reshape(2, 3, 4, -1))
    decoded = tokenizer.decode(many, HORIZON)
    assert decoded.shape == (2, 3, 4, HORIZON, DIMS) and decoded.dtype == np.float64
    one = tokenizer.encode(chunks[5])
    np.testing.assert_array_equal(one, ids[5][: len(one)])
    np.testing.assert_array_equal(tokenizer.decode(one, HORIZON), decoded.reshape(-1, HORIZON, DIMS)[5])


def test_empty_batches_stay_empty(tokenizer, chunks):
    ids = tokenizer.encode(chunks[:0])
    assert ids.shape[0] == 0 and ids.ndim == 2
    width = tokenizer.encode(chunks).shape[1]
    assert tokenizer.decode(np.empty((0, width), dtype=np.int64), HORIZON).shape == (0, HORIZON, DIMS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_raise_and_are_located(tokenizer, chunks, value):
    chunks[3, 2, 4] = value
    with pytest.raises(ValueError, match=rf"actions\[3, 2, 4\] is {value}; expected finite values"):
        tokenizer.encode(chunks)


@pytest.mark.parametrize("shape", [(DIMS,), (HORIZON, DIMS - 1), (0, DIMS)])
def test_other_shapes_raise(tokenizer, shape):
    with pytest.raises(ValueError, match=rf"Expected actions of shape \(\.\.\., chunk_size, {DIMS}\); got \("):
        tokenizer.encode(np.zeros(shape))


def test_actions_that_are_no_numbers_raise(tokenizer):
    with pytest.raises(ValueError, match="Expected real numbers as actions; got an array of <U1"):
        tokenizer.encode(np.full((HORIZON, DIMS), "a"))


@pytest.mark.parametrize("offset", [-1, 0, 10**6])
def test_ids_out_of_range_raise_and_are_located(tokenizer, chunks, offset):
    ids = tokenizer.encode(chunks)
    ids[2, 1] = -1 if offset < 0 else tokenizer.vocab_size + offset
    with pytest.raises(ValueError, match=rf"ids\[2, 1\] is {ids[2, 1]}; expected .*id"):
        tokenizer.decode(ids, HORIZON)


def test_ids_that_are_no_integers_raise(tokenizer, chunks):
    ids = tokenizer.encode(chunks)
    for wrong in (ids.astype(np.float64), np.int64(3)):
        with pytest.raises(ValueError, match=r"Expected integer ids of shape \(\.\.\., N\); got"):
            tokenizer.decode(wrong, HORIZON)


@pytest.mark.parametrize("horizon", [HORIZON - 1, HORIZON + 1])
def test_another_number_of_actions_than_wanted_raises(tokenizer, chunks, horizon):
    with pytest.raises(ValueError, match=rf"xpected {horizon} actions of"):
        tokenizer.decode(tokenizer.encode(chunks), horizon)


def test_missing_ids_raise(tokenizer, chunks):
    ids = tokenizer.encode(chunks[0])
    for wrong in (ids[:-1], ids[:0]):
        with pytest.raises(ValueError, match=r"Expected \d+ ids for each action|hold \d+ coefficients; expected"):
            tokenizer.decode(wrong, HORIZON)


@pytest.mark.parametrize("horizon", [1, 3, HORIZON])
def test_every_walk_over_allowed_ids_decodes(tokenizer, horizon):
    generator = np.random.default_rng(horizon)
    for _ in range(5):
        stream, ids = tokenizer.stream(horizon), []
        while not stream.complete:
            allowed = stream.allowed()
            assert allowed.shape == (tokenizer.vocab_size,) and allowed.dtype == bool
            ids.append(generator.choice(np.flatnonzero(allowed)))
            stream.push(ids[-1])
        assert not stream.allowed().any()
        assert tokenizer.decode(np.array(ids), horizon).shape == (horizon, DIMS)
        with pytest.raises(ValueError, match=f"The chunk is complete after {len(ids)} ids; expected no id, got 0"):
            stream.push(0)


def test_the_stream_admits_every_encoding(tokenizer, chunks):
    for ids in tokenizer.encode(chunks):
        stream = tokenizer.stream(HORIZON)
        for token_id in ids[ids >= 0]:
            stream.push(token_id)
        assert stream.complete


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_a_stream_refuses_unknown_ids(tokenizer, token_id):
    with pytest.raises(ValueError, match=f"Id {token_id} cannot come at position 0; expected one of the"):
        tokenizer.stream(HORIZON).push(token_id)


@pytest.mark.parametrize("token_id", [2.7, 2.0, True, None])
def test_a_stream_refuses_what_is_no_integer(tokenizer, token_id):
    with pytest.raises(ValueError, match="Expected integer ids"):
        tokenizer.stream(HORIZON).push(token_id)


def test_horizons_below_one_raise(tokenizer, chunks):
    ids = tokenizer.encode(chunks)
    for call in (lambda: tokenizer.stream(0), lambda: tokenizer.decode(ids, 0)):
        with pytest.raises(ValueError, match="Expected a horizon of at least one action; got 0"):
            call()


def test_misspelt_options_raise_and_list_the_known_ones(tokenizer):
    config = tokenizer.to_dict() | {"horizonn": 3}
    known = next(key for key in tokenizer.to_dict() if key != "type")
    with pytest.raises(
        ValueError, match=rf"Unknown option\(s\) \['horizonn'\] .*{tokenizer.type}.*known: .*'{known}'"
    ):
        build_action_tokenizer(config)


def test_the_options_of_another_tokenizer_raise(tokenizer):
    with pytest.raises(ValueError, match=f"Expected the options of a {tokenizer.type!r} .*; got type 'other'"):
        type(tokenizer).from_dict(tokenizer.to_dict() | {"type": "other"})


def test_missing_options_raise():
    with pytest.raises(ValueError, match=r"'fast' needs the option\(s\) \['bpe', 'action_dim'\]; got \['scale'\]"):
        build_action_tokenizer({"type": "fast", "scale": 10.0})


def test_unknown_types_raise_and_list_the_known_ones():
    known = r"known types: \[.*'uniform'.*\]\. Did you mean 'uniform'\?"
    with pytest.raises(ValueError, match=f"Unknown action tokenizer 'unifrom'; {known}"):
        build_action_tokenizer({"type": "unifrom"})
    with pytest.raises(ValueError, match="Unknown action tokenizer None; known types"):
        build_action_tokenizer({})
    with pytest.raises(ValueError, match=r"dictionary like \{'type': 'uniform'\}, came 'uniform'"):
        build_action_tokenizer("uniform")
