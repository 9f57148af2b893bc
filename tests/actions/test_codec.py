import json

import numpy as np
import pytest

import hf_vla.actions.codec as codec_module
from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.spec import ActionSpec, GripperSpec, StateSpec

T, D = 3, 4
BRIDGE = {"action": {"q01": [-0.02, -1.0, 0.3, 0.0], "q99": [0.03, 4.0, 0.9, 1.0], "mask": [True, True, True, False]}}
ROBOT = {"action": {"q01": [0.0] * D, "q99": [2.0] * D}}
CONFIG = {"chunk_size": T, "normalization": {"mode": "quantile", "clip": True, "convention": "spatialvla"}}
ACTION_SPEC = ActionSpec(("x", "y", "yaw", "gripper"), "delta_ee", gripper=GripperSpec(3, open=0.0, closed=1.0))
STATE_SPEC = StateSpec(("x", "y"))


class Tenths:
    """One id per number: tenths of [-1, 1]."""

    action_dim = D
    terminate = False

    def encode(self, actions):
        return np.rint((actions.reshape(*actions.shape[:-2], -1) + 1) * 10).astype(np.int64)

    def decode(self, ids, horizon=None):
        return np.asarray(ids).reshape(*np.shape(ids)[:-1], horizon, D) / 10 - 1


@pytest.fixture
def chunk():
    return np.random.default_rng(0).uniform(0.31, 0.9, size=(2, 5, T, D)) * [0.03, 1, 1, 1]


def test_without_tokenizer_the_target_is_the_normalised_chunk(chunk):
    codec = ActionCodec({"bridge": BRIDGE}, CONFIG)
    target = codec.encode(chunk)
    assert target.dtype == np.float32 and target.shape == chunk.shape and codec.tokenizer is None
    np.testing.assert_allclose(target[..., 3], chunk[..., 3], rtol=1e-6)  # the gripper's mask is False
    decoded = codec.decode(target.astype(np.float64))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, chunk, atol=1e-6)


def test_with_tokenizer_the_target_is_its_ids(chunk, monkeypatch):
    built = []
    monkeypatch.setattr(codec_module, "build_action_tokenizer", lambda config: built.append(config) or Tenths())
    codec = ActionCodec({"robot": ROBOT}, CONFIG | {"tokenizer": {"type": "tenths"}})
    assert built == [{"type": "tenths"}]
    ids = codec.encode(chunk)
    assert ids.dtype == np.int64 and ids.shape == (2, 5, T * D)
    decoded = codec.decode(ids)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, chunk, atol=0.0501)
    with pytest.raises(ValueError, match="'small' have 2 dimensions, the action tokenizer has 4"):
        ActionCodec(
            {"small": {"action": {"q01": [0.0] * 2, "q99": [1.0] * 2}}}, CONFIG | {"tokenizer": {"type": "tenths"}}
        ).normalizer()


def test_tokens_that_say_where_an_episode_ends(chunk):
    plain, codec = (
        ActionCodec({"robot": ROBOT}, CONFIG | {"tokenizer": {"type": "uniform", "action_dim": D, "terminate": ends}})
        for ends in (False, True)
    )
    assert codec.terminates and not plain.terminates
    ends = np.zeros(chunk.shape[:-1], bool)
    ends[..., -1] = True
    ids = codec.encode(chunk, terminate=ends)
    assert ids.shape == (2, 5, T * (D + 1))
    np.testing.assert_array_equal(codec.tokenizer.decode_terminate(ids), ends)
    np.testing.assert_array_equal(codec.decode(ids), plain.decode(plain.encode(chunk, terminate=ends)))
    with pytest.raises(ValueError, match="give `terminate`, True at its last action"):
        codec.encode(chunk)


def test_with_the_256_bins_of_the_registry(chunk):
    config = CONFIG | {"tokenizer": {"type": "uniform", "action_dim": D}}
    codec = ActionCodec({"robot": ROBOT}, json.loads(json.dumps(config)))
    ids = codec.encode(chunk)
    assert ids.dtype == np.int64 and ids.shape == (2, 5, T * D)
    decoded = codec.decode(ids)
    assert decoded.dtype == np.float32
    half_range = 1.0  # q01 = 0, q99 = 2
    assert (np.abs(decoded - chunk) <= codec.tokenizer.resolution() * half_range + 1e-6).all()
    with pytest.raises(ValueError, match="ids"):
        codec.decode(ids[..., :-1])


def test_both_dictionaries_survive_json(chunk):
    statistics, config = {"bridge": BRIDGE, "robot": ROBOT}, CONFIG | {"tokenizer": None}
    again = ActionCodec(*json.loads(json.dumps([statistics, config])))
    np.testing.assert_array_equal(
        again.encode(chunk, "bridge"), ActionCodec(statistics, config).encode(chunk, "bridge")
    )


def test_the_published_convention_is_the_default(chunk):
    explicit, default = ActionCodec({"a": BRIDGE}, CONFIG), ActionCodec({"a": BRIDGE}, {"chunk_size": T})
    np.testing.assert_array_equal(explicit.encode(chunk), default.encode(chunk))


def test_each_dataset_has_its_own_statistics(chunk):
    codec = ActionCodec({"robot": ROBOT, "bridge": BRIDGE}, CONFIG)
    assert codec.keys == ["bridge", "robot"]
    for key in codec.keys:
        assert codec.resolve_key(key) == key
        np.testing.assert_array_equal(codec.encode(chunk, key), codec.normalizer(key).normalize(chunk).astype("f4"))
    assert np.abs(codec.encode(chunk, "robot") - codec.encode(chunk, "bridge")).max() > 0.1


def test_one_dataset_needs_no_key():
    assert ActionCodec({"bridge": BRIDGE}, CONFIG).resolve_key() == "bridge"


def test_keys_are_never_guessed():
    codec = ActionCodec({"bridge_orig": BRIDGE, "robot": ROBOT}, CONFIG)
    for method in (codec.resolve_key, codec.normalizer, codec.specs):
        with pytest.raises(ValueError, match=r"choose unnorm_key among \['bridge_orig', 'robot'\]"):
            method()
        with pytest.raises(
            ValueError,
            match=r"No action statistics for 'bridge_orgi'; this checkpoint knows \['bridge_orig', 'robot'\]. "
            r"Did you mean 'bridge_orig'\?",
        ):
            method("bridge_orgi")
        with pytest.raises(ValueError, match=r"for 'zzz'; this checkpoint knows \['bridge_orig', 'robot'\].$"):
            method("zzz")
    for nothing in (None, {}):
        with pytest.raises(ValueError, match="no action statistics; give its processor `statistics`"):
            ActionCodec(nothing, CONFIG).decode(np.zeros((1, T, D)))
    with pytest.raises(ValueError, match="No action statistics for 'robot'; this checkpoint knows"):
        ActionCodec({"bridge": BRIDGE}, CONFIG).encode(np.zeros((1, T, D)), "robot")  # even where there is but one


def test_specs_are_parsed():
    specs = {"bridge": {"action": ACTION_SPEC.to_dict(), "state": STATE_SPEC.to_dict()}, "robot": {"action": None}}
    codec = ActionCodec({"bridge": BRIDGE, "robot": ROBOT, "bare": ROBOT}, CONFIG | {"specs": specs})
    assert codec.specs("bridge") == (ACTION_SPEC, STATE_SPEC)
    assert codec.specs("robot") == codec.specs("bare") == (None, None)


def test_specs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="No action statistics for 'brigde'.*Did you mean 'bridge'"):
        ActionCodec({"bridge": BRIDGE}, CONFIG | {"specs": {"brigde": {}}})
    with pytest.raises(ValueError, match=r"StateSpec needs \['names'\]"):
        ActionCodec({"bridge": BRIDGE}, CONFIG | {"specs": {"bridge": {"state": {}}}})
    short = ActionSpec(("x", "y"), "joint").to_dict()
    with pytest.raises(ValueError, match="statistics of 'bridge' have 4 dimensions, the action spec has 2"):
        ActionCodec({"bridge": BRIDGE}, CONFIG | {"specs": {"bridge": {"action": short}}}).normalizer()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"chunksize": 4}, r"Unknown keys \['chunksize'\] in action_config; known are \['chunk_size', 'norm"),
        (
            CONFIG | {"normalization": {"modes": "quantile"}},
            r"Unknown keys \['modes'\] in action_config\['normalization'\]; known are \['mode', 'clip', 'conv",
        ),
        (
            CONFIG | {"specs": {"bridge": {"actions": None}}},
            r"Unknown keys \['actions'\] in action_config\['specs'\]\['bridge'\]; known are \['action', 'state'\]",
        ),
        (
            CONFIG | {"normalization": "quantile"},
            r"Expected a dictionary for action_config\['normalization'\], came str",
        ),
        ([], "Expected a dictionary for action_config, came list"),
        ({}, r"Expected action_config\['chunk_size'\] of 1 or more, came None"),
        ({"chunk_size": 0}, r"Expected action_config\['chunk_size'\] of 1 or more, came 0"),
        ({"chunk_size": True}, r"Expected action_config\['chunk_size'\] of 1 or more, came True \(bool\)"),
        (CONFIG | {"tokenizer": "uniform"}, r"dictionary like \{'type': 'uniform'\}, came 'uniform'"),
    ],
)
def test_unknown_or_missing_configuration_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ActionCodec({"bridge": BRIDGE}, config)


def test_a_chunk_size_of_numpy_is_one():
    assert ActionCodec({"bridge": BRIDGE}, CONFIG | {"chunk_size": np.int64(T)}).chunk_size == T


def test_a_processor_without_actions_can_be_built_but_not_used(chunk):
    codec = ActionCodec({"bridge": BRIDGE})
    assert codec.keys == ["bridge"] and codec.chunk_size is None
    with pytest.raises(ValueError, match="This processor has no action_config; give it one with its 'chunk_size'"):
        codec.encode(chunk)


def test_bad_statistics_name_their_dataset():
    with pytest.raises(ValueError, match=r"Statistics of 'bridge' have no 'action', only \['state'\]"):
        ActionCodec({"bridge": {"state": {}}}, CONFIG).normalizer()
    with pytest.raises(ValueError, match=r"Action statistics of 'bridge': Normalization mode 'quantile' needs"):
        ActionCodec({"bridge": {"action": {"mean": [0.0], "std": [1.0]}}}, CONFIG).normalizer()
    with pytest.raises(
        ValueError, match=r"Action statistics of 'bridge': Expected 'q99' for 4 dimensions, came shape"
    ):
        ActionCodec({"bridge": {"action": {"q01": [0.0] * 4, "q99": [1.0] * 3}}}, CONFIG).normalizer()


@pytest.mark.parametrize("shape", [(T + 1, D), (T, D - 1), (D,), ()])
def test_shapes_are_checked(shape):
    codec = ActionCodec({"bridge": BRIDGE}, CONFIG)
    expected = r"of shape \(..., chunk_size=3, action_dim=4\), came"
    with pytest.raises(ValueError, match=f"Expected actions {expected}"):
        codec.encode(np.zeros(shape))
    with pytest.raises(ValueError, match=f"Expected predicted actions {expected}"):
        codec.decode(np.zeros(shape))


def test_values_that_are_not_finite_are_refused(chunk):
    codec = ActionCodec({"bridge": BRIDGE}, CONFIG)
    chunk[1, 2, 0, 3] = np.nan
    with pytest.raises(ValueError, match="Expected finite actions, came nan at row 21, dimension 3"):
        codec.encode(chunk)
    with pytest.raises(ValueError, match="Expected finite normalized actions, came nan at row 21, dimension 3"):
        codec.decode(chunk)


STATEFUL = CONFIG | {"state_normalization": {"mode": "mean_std", "convention": "tinyvla"}}
STATE = {"mean": [0.5, -1.0], "std": [2.0, 0.001]}


def test_states_have_their_own_normalization_and_statistics():
    codec = ActionCodec({"bridge": BRIDGE | {"state": STATE}}, json.loads(json.dumps(STATEFUL)))
    assert codec.takes_state and not ActionCodec({"bridge": BRIDGE}, CONFIG).takes_state
    states = np.array([[[0.5, -1.0], [4.5, -0.9]]])
    encoded = codec.encode_state(states)
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, [[[0.0, 0.0], [2.0, 10.0]]], atol=1e-6)
    assert codec.state_normalizer("bridge").convention == "tinyvla"
    assert codec.normalizer("bridge").convention == "spatialvla" and codec.normalizer().action_dim == D


@pytest.mark.parametrize(
    ("statistics", "config", "state", "message"),
    [
        (BRIDGE, CONFIG, [0.0], "This checkpoint takes no state: its action_config has no 'state_normalization'"),
        (BRIDGE, STATEFUL, [0.0, 0.0], r"Statistics of 'bridge' have no 'state', only \['action'\]"),
        (
            BRIDGE | {"state": {"mean": [0.0]}},
            STATEFUL,
            [0.0],
            "State statistics of 'bridge': .* needs the statistics",
        ),
        (BRIDGE | {"state": STATE}, STATEFUL, [0.0] * 3, r"Expected states of shape \(..., 2\), came \(3,\)"),
        (BRIDGE | {"state": STATE}, STATEFUL, 0.0, r"Expected states of shape \(..., 2\), came \(\)"),
        (BRIDGE | {"state": STATE}, STATEFUL, [0.0, np.inf], "Expected finite states, came inf at row 0, dimension 1"),
        (
            BRIDGE | {"state": STATE},
            STATEFUL | {"specs": {"bridge": {"state": StateSpec(("x", "y", "z")).to_dict()}}},
            [0.0, 0.0],
            "State statistics of 'bridge' have 2 dimensions, the state spec has 3",
        ),
        (
            BRIDGE | {"state": STATE},
            CONFIG | {"state_normalization": {"modes": "mean_std"}},
            [0.0, 0.0],
            r"Unknown keys \['modes'\] in action_config\['state_normalization'\]",
        ),
    ],
)
def test_states_that_cannot_be_normalised(statistics, config, state, message):
    with pytest.raises(ValueError, match=message):
        ActionCodec({"bridge": statistics}, config).encode_state(state)


SMALL = {"action": {"q01": [0.0, -4.0], "q99": [2.0, 4.0]}, "state": {"mean": [1.0], "std": [2.0]}}
LARGE = {"action": ROBOT["action"], "state": STATE}
SIZES = {"small": SMALL, "large": LARGE}


@pytest.mark.parametrize(("given", "action_dim", "state_dim"), [({}, D, 2), ({"action_dim": 6, "state_dim": 3}, 6, 3)])
def test_robots_of_fewer_dimensions_are_padded_and_cut(given, action_dim, state_dim):
    codec = ActionCodec(SIZES, json.loads(json.dumps(STATEFUL | given)))
    assert (codec.action_dim, codec.state_dim, codec.n_obs_steps) == (action_dim, state_dim, 1)
    rng = np.random.default_rng(1)
    for key, own in (("small", 2), ("large", D)):
        alone = ActionCodec({key: SIZES[key]}, STATEFUL)
        actions, states = rng.uniform(0, 2, (5, T, own)), rng.normal(size=(5, 3, own // 2))
        encoded, state = codec.encode(actions, key), codec.encode_state(states, key)
        assert encoded.shape == (5, T, action_dim) and state.shape == (5, 3, state_dim)
        assert np.array_equal(encoded[..., :own], alone.encode(actions)) and not encoded[..., own:].any()
        assert np.array_equal(state[..., : own // 2], alone.encode_state(states)) and not state[..., own // 2 :].any()
        assert np.array_equal(codec.encode(actions, key, pad=False), alone.encode(actions))
        assert np.array_equal(codec.encode_state(states, key, pad=False), alone.encode_state(states))
        encoded[..., own:] = np.nan  # whatever a network leaves there
        np.testing.assert_allclose(codec.decode(encoded, key), actions, atol=1e-5)
        np.testing.assert_allclose(codec.decode(encoded[..., :own], key), actions, atol=1e-5)
    with pytest.raises(ValueError, match=r"predicted actions of shape \(..., chunk_size=3, action_dim=2\), came"):
        codec.decode(np.zeros((T, 3)), "small")
    with pytest.raises(ValueError, match=r"Expected actions of shape \(..., chunk_size=3, action_dim=2\), came"):
        codec.encode(np.zeros((T, action_dim)), "small")


def test_it_is_said_which_dimensions_are_a_robots_own():
    codec = ActionCodec(SIZES, STATEFUL)
    assert codec.own_dims(["small", "large"]).tolist() == [[True, True, False, False], [True] * 4]
    assert codec.own_dims(["large"]).tolist() == [[True] * 4]  # batches have one layout, whatever is in them
    assert ActionCodec({"large": LARGE}, STATEFUL).own_dims(["large"]) is None
    assert ActionCodec(SIZES).own_dims(["large"]) is None and ActionCodec(None, CONFIG).own_dims([None]) is None
    wider = ActionCodec({"large": LARGE}, STATEFUL | {"action_dim": 5})
    assert wider.own_dims([None]).tolist() == [[True] * 4 + [False]]
    assert wider.state_dim == 2 and ActionCodec(SIZES, CONFIG).state_dim is None


@pytest.mark.parametrize(("name", "what", "own"), [("action_dim", "Action", 4), ("state_dim", "State", 2)])
def test_a_dataset_of_more_dimensions_is_named(name, what, own):
    codec = ActionCodec(SIZES, STATEFUL | {name: own - 1})
    build = codec.normalizer if what == "Action" else codec.state_normalizer
    assert build("small").action_dim < own
    with pytest.raises(
        ValueError, match=f"{what} statistics of 'large' have {own} dimensions, but .* at most {own - 1} .*{name}"
    ):
        build("large")


@pytest.mark.parametrize("name", ["action_dim", "state_dim", "n_obs_steps"])
@pytest.mark.parametrize("value", [0, 1.5, "7"])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=rf"action_config\['{name}'\] of 1 or more, came"):
        ActionCodec(SIZES, STATEFUL | {name: value})


def test_one_tokenizer_serves_equally_many_dimensions(monkeypatch):
    monkeypatch.setattr(codec_module, "build_action_tokenizer", lambda _: Tenths())
    codec = ActionCodec(SIZES, CONFIG | {"tokenizer": {"type": "tenths"}})
    assert codec.normalizer("large").action_dim == D
    with pytest.raises(
        ValueError, match="of 'small' have 2 dimensions, the action tokenizer has 4: one tokenizer serves"
    ):
        codec.encode(np.zeros((T, 2)), "small")
