import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_vla.actions.chunking import RecedingHorizon, TemporalEnsembler


def test_ensembling_equals_the_recording(goldens):
    golden = load_file(goldens / "tinyvla_pipeline" / "temporal_aggregation.safetensors")
    ensembler = TemporalEnsembler(skip_zeros=True)
    for _ in range(2):  # a second episode after reset() must not remember the first
        ensembler.reset()
        actions = np.stack([ensembler.update(chunk) for chunk in golden["chunks"]])
        assert actions.dtype == np.float32
        np.testing.assert_allclose(actions, golden["actions_fp32"], atol=1e-6)
        np.testing.assert_allclose(actions, golden["actions_fp16_reference"], atol=2e-3)  # its rounding


def test_zero_actions_count_unless_skipped(goldens):
    golden = load_file(goldens / "tinyvla_pipeline" / "temporal_aggregation.safetensors")
    ensembler = TemporalEnsembler()
    actions = np.stack([ensembler.update(chunk) for chunk in golden["chunks"]])
    # the recording holds one all-zero prediction, made at step 4 for step 6; the reference drops it
    differs = np.abs(actions - golden["actions_fp32"]).max(axis=1) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(differs), [6])
    predictions = np.stack([golden["chunks"][made, 6 - made] for made in range(7)])
    np.testing.assert_allclose(actions[6], np.average(predictions, 0, np.exp(-0.01 * np.arange(7))), atol=1e-6)
    np.testing.assert_array_equal(TemporalEnsembler(skip_zeros=True).update(np.zeros((2, 3, 4))), np.zeros((2, 4)))


@pytest.mark.parametrize("coefficient", [0.01, 0.0, 2.0, -0.5])
def test_ensembling_weighs_the_oldest_first(coefficient):
    chunks = np.random.default_rng(0).normal(size=(9, 2, 4, 3))  # steps, environments, chunk, dimensions
    ensembler = TemporalEnsembler(coefficient)
    for step, chunk in enumerate(chunks):
        predictions = [chunks[made][:, step - made] for made in range(max(0, step - 3), step + 1)]
        weights = np.exp(-coefficient * np.arange(len(predictions)))
        wanted = np.einsum("p,pbd->bd", weights / weights.sum(), predictions)
        action = ensembler.update(chunk)
        assert action.dtype == np.float64
        np.testing.assert_allclose(action, wanted, rtol=1e-10, atol=1e-12)


def test_receding_horizon_executes_the_first_actions_of_each_chunk():
    chunks = np.arange(2 * 2 * 5 * 3, dtype=np.float32).reshape(2, 2, 5, 3)
    horizon = RecedingHorizon(3)
    for chunk in chunks:
        assert horizon.empty
        horizon.push(chunk)
        for step in range(3):
            assert not horizon.empty
            np.testing.assert_array_equal(horizon.pop(), chunk[:, step])
    with pytest.raises(ValueError, match="No action is left of this chunk; push a new one first"):
        horizon.pop()


def test_receding_horizon_drops_old_actions():
    horizon = RecedingHorizon(2)
    buffer = np.zeros((2, 1))
    horizon.push(buffer)
    buffer[:] = 1.0
    np.testing.assert_array_equal(horizon.pop(), [0.0])  # its own copy
    horizon.push(buffer)
    np.testing.assert_array_equal([horizon.pop(), horizon.pop()], buffer)
    horizon.push(buffer)
    horizon.reset()
    assert horizon.empty


def test_bad_chunks_are_refused():
    chunk = np.zeros((2, 4, 3))
    chunk[1, 2, 0] = np.nan
    for take in (RecedingHorizon(1).push, TemporalEnsembler().update):
        with pytest.raises(ValueError, match="Expected finite chunk, came nan at row 6, dimension 0"):
            take(chunk)
        for shape in ((3,), (0, 3)):
            with pytest.raises(ValueError, match=r"chunk of shape \(..., chunk_size, action_dim\), came"):
                take(np.zeros(shape))
    with pytest.raises(ValueError, match="at least n_action_steps=5 actions, came 4; lower n_action_steps"):
        RecedingHorizon(5).push(np.zeros((4, 3)))
    ensembler = TemporalEnsembler()
    ensembler.update(np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"shape \(4, 3\) like the one before, came \(2, 4, 3\); call reset\(\)"):
        ensembler.update(np.zeros((2, 4, 3)))


@pytest.mark.parametrize("steps", [0, -1, 2.5, None, True])
def test_bad_n_action_steps_are_refused(steps):
    with pytest.raises(ValueError, match="Expected n_action_steps of 1 or more, came"):
        RecedingHorizon(steps)


def test_n_action_steps_may_be_numpys():
    horizon = RecedingHorizon(np.int64(2))
    horizon.push(np.zeros((2, 1)))
    assert horizon.n_action_steps == 2


@pytest.mark.parametrize("coefficient", ["nan", "inf", "-inf"])
def test_a_coefficient_that_is_not_finite_is_refused(coefficient):
    with pytest.raises(ValueError, match=f"finite ensembling coefficient, came {coefficient}"):
        TemporalEnsembler(float(coefficient))


@pytest.mark.parametrize(("coefficient", "chosen"), [(-1e308, "newest"), (-300.0, "newest"), (1e308, "oldest")])
def test_an_extreme_coefficient_leaves_one_prediction(coefficient, chosen):
    ensembler = TemporalEnsembler(coefficient)
    for step in range(6):
        action = ensembler.update(np.full((4, 1), float(step)))
        np.testing.assert_array_equal(action, [step if chosen == "newest" else max(0, step - 3)])


def test_a_skipped_prediction_does_not_fade_the_others():
    ensembler = TemporalEnsembler(-0.5, skip_zeros=True)
    for chunk in ([[1.0], [1.0], [1.0]], [[0.0], [0.0], [0.0]]):
        ensembler.update(chunk)
    weights = np.exp([0.0, 0.5])
    np.testing.assert_allclose(ensembler.update([[3.0], [3.0], [3.0]]), [weights @ [1.0, 3.0] / weights.sum()])
