"""Uniform bins; OpenVLA's ids and values as recorded (exact)."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_vla.actions.tokenizers.uniform import UniformTokenizer


@pytest.fixture(scope="module", params=[(32000, 256), (32000, 128), (50257, 256)], ids=str)
def openvla(request, goldens):
    """Vocabulary size, tokenizer, and the recording of that case."""
    vocab_size, bins = request.param
    recorded = load_file(goldens / "openvla" / "action_tokenizer.safetensors")
    prefix = f"v{vocab_size}_b{bins}/"
    case = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
    return vocab_size - bins, UniformTokenizer(7, bins, "openvla"), case


def test_openvla_ids_and_values(openvla):
    offset, tokenizer, recorded = openvla
    ids = tokenizer.encode(recorded["action"][:, None])
    np.testing.assert_array_equal(ids + offset, recorded["ids"])
    np.testing.assert_array_equal(tokenizer.decode(ids)[:, 0], recorded["decoded"])


def test_openvla_special_values(openvla):
    offset, tokenizer, recorded = openvla
    one = UniformTokenizer(1, tokenizer.n_bins, "openvla")
    finite = np.isfinite(recorded["special_action"])
    assert 0 < (~finite).sum() < 5
    ids = one.encode(recorded["special_action"][finite, None])
    np.testing.assert_array_equal(ids + offset, recorded["special_ids"][finite])
    np.testing.assert_array_equal(one.decode(ids)[:, 0], recorded["special_decoded"][finite])
    for value in recorded["special_action"][~finite]:  # OpenVLA turns NaN into +1 without a word
        with pytest.raises(ValueError, match="expected finite values"):
            one.encode([[value]])


def test_foreign_ids_raise_where_openvla_clamps_them(openvla):
    offset, tokenizer, recorded = openvla
    one = UniformTokenizer(1, tokenizer.n_bins, "openvla")
    ids = recorded["foreign_ids"] - offset
    own = (ids >= 0) & (ids < one.vocab_size)
    assert 0 < own.sum() < len(ids)
    np.testing.assert_array_equal(one.decode(ids[own, None])[:, 0, 0], recorded["foreign_decoded"][own])
    for token_id in ids[~own]:
        with pytest.raises(
            ValueError, match=rf"ids\[0\] is {token_id}; expected an id of the dimension 0 block, \[0, "
        ):
            one.decode([token_id])


@pytest.mark.parametrize("convention", ["centers", "openvla"])
@pytest.mark.parametrize("bins", [2, 3, 7, 100, 255, 256, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ids_are_those_of_digitize_on_and_beside_every_edge(convention, bins, dtype):
    edges = np.linspace(-1, 1, bins + 1 if convention == "centers" else bins)
    near = np.concatenate([edges, np.nextafter(edges, 2), np.nextafter(edges, -2)]).astype(dtype)
    values = np.concatenate([near, np.random.default_rng(0).uniform(-1.2, 1.2, 500).astype(dtype)])
    position = np.digitize(np.clip(values, -1, 1), edges)
    expected = np.minimum(position - 1, bins - 1) if convention == "centers" else bins - position
    ids = UniformTokenizer(1, bins, convention).encode(values[:, None, None])[:, 0]
    np.testing.assert_array_equal(ids, expected)


def test_centers_decode_to_the_middle_of_their_bins():
    tokenizer = UniformTokenizer(2, 4)
    np.testing.assert_allclose(tokenizer.decode([0, 1, 2, 3]), [[-0.75, -0.25], [0.25, 0.75]], atol=1e-15)
    np.testing.assert_array_equal(tokenizer.encode([[-1.0, -0.5], [0.0, 1.0]]), [0, 1, 2, 3])
    np.testing.assert_array_equal(tokenizer.resolution(), [0.25, 0.25])


def test_every_position_permits_every_id():
    np.testing.assert_array_equal(UniformTokenizer(2, 16).id_ranges(3), [[0, 16]] * 6)


def test_bad_options_raise():
    with pytest.raises(ValueError, match="Unknown convention 'centres'; expected one of"):
        UniformTokenizer(convention="centres")
    with pytest.raises(ValueError, match="Expected action_dim >= 1 and n_bins >= 2; got 7 and 1"):
        UniformTokenizer(n_bins=1)


@pytest.mark.parametrize("convention", ["centers", "openvla"])
def test_the_terminate_id_of_rt2(convention):
    """terminate, then the numbers: 1 where the episode ends, of the ids that all share."""
    plain, tokenizer = (UniformTokenizer(7, 256, convention, terminate) for terminate in (False, True))
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 2, 4, 7))
    ends = np.random.default_rng(1).random((3, 2, 4)) < 0.5
    ids = tokenizer.encode(actions, ends)
    assert ids.shape == (3, 2, 32) and ids.dtype == np.int64 and tokenizer.vocab_size == 256
    steps = ids.reshape(3, 2, 4, 8)
    np.testing.assert_array_equal(steps[..., 0], ends)
    np.testing.assert_array_equal(steps[..., 1:].reshape(3, 2, 28), plain.encode(actions))
    np.testing.assert_array_equal(tokenizer.decode(ids, 4), plain.decode(plain.encode(actions)))
    np.testing.assert_array_equal(tokenizer.decode_terminate(ids, 4), ends)
    np.testing.assert_array_equal(tokenizer.encode(actions), tokenizer.encode(actions, np.zeros_like(ends)))
    np.testing.assert_array_equal(tokenizer.id_ranges(2), [[0, 2], *[[0, 256]] * 7] * 2)
    again = UniformTokenizer.from_dict(tokenizer.to_dict())
    np.testing.assert_array_equal(again.decode_terminate(ids), ends)
    ids[1, 0, 8] = 2
    with pytest.raises(ValueError, match=r"ids\[1, 0, 8\] is 2; expected an id of the terminate block, \[0, 2\)"):
        tokenizer.decode(ids)


def test_bad_terminate_raises():
    for wrong in (np.zeros((2, 3), bool), np.zeros(4)):
        with pytest.raises(ValueError, match=r"Expected terminate as bool of shape \(4,\), got "):
            UniformTokenizer(7, terminate=True).encode(np.zeros((4, 7)), wrong)
    with pytest.raises(ValueError, match="needs terminate=True"):
        UniformTokenizer(7).decode_terminate(np.zeros(7, int))
