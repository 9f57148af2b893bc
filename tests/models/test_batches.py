import numpy as np
import pytest
import torch

from hf_vla.models.batches import VLAFeatures, as_numpy, padded, per_sample, targets


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0]],
        np.array([[1.0, 2.0]]),
        torch.tensor([[1.0, 2.0]], requires_grad=True),
        torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16),
        [torch.tensor([1.0, 2.0], requires_grad=True)],
        [np.array([1.0, 2.0])],
        [[torch.tensor(1.0), torch.tensor(2.0)]],
    ],
    ids=["list", "array", "tensor", "bfloat16", "list of tensors", "list of arrays", "numbers as tensors"],
)
def test_whatever_holds_numbers_becomes_an_array(values):
    assert np.array_equal(as_numpy(values), [[1.0, 2.0]])


def test_rows_are_padded_on_either_side():
    rows = [[1], [2, 3, 4]]
    assert padded(rows, -1).tolist() == [[1, -1, -1], [2, 3, 4]]
    assert padded(rows, -1, left=True).tolist() == [[-1, -1, 1], [2, 3, 4]]


def test_one_text_and_key_serve_every_sample():
    assert per_sample(["a", "b"], "push", None) == (["a", "b"], ["push", "push"], [None, None])
    assert per_sample("a", ("push",), ("robot",)) == (["a"], ["push"], ["robot"])
    with pytest.raises(ValueError, match="Got 2 images, 2 texts and 1 unnorm_keys"):
        per_sample(["a", "b"], "push", ["robot"])


def test_padded_actions_become_zero():
    actions, mask = targets([[1.0], [np.nan]], [True, False], 1)
    assert np.array_equal(actions, [[[1.0], [0.0]]]) and mask.tolist() == [[True, False]]
    actions, mask = targets([[1.0], [2.0]], None, 1)
    assert np.array_equal(actions, [[[1.0], [2.0]]]) and mask.all()


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_robots_of_a_batch_keep_their_own_sizes(kind):
    chunks = [kind([[1.0], [np.nan]]), kind([[1.0, 2.0], [3.0, 4.0]])]
    actions, mask = targets(chunks, torch.tensor([[True, False], [True, True]]), 2)
    assert [chunk.tolist() for chunk in actions] == [[[1.0], [0.0]], [[1.0, 2.0], [3.0, 4.0]]]
    assert mask.tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match=r"shape \(3, T, D\) .* got \[\(2, 1\), \(2, 2\)\] and \(2, 2\)"):
        targets(chunks, None, 3)


@pytest.mark.parametrize("actions", [[], 3.0, [1.0, 2.0]])
def test_what_is_no_chunk_is_refused(actions):
    with pytest.raises(ValueError, match=r"Expected actions of shape \(2, T, D\)"):
        targets(actions, None, 2)


def test_measurements_keep_their_precision():
    third = torch.tensor([1 / 3])
    names = ("pixel_values", "intrinsics", "depth", "state", "actions")
    batch = VLAFeatures({name: third.clone() for name in names}).to("cpu", torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert all(torch.equal(batch[name], third) for name in names[1:])


def test_measurements_need_no_pictures_beside_them_and_arrays_stay():
    third = np.float32([1 / 3])
    batch = VLAFeatures({"state": torch.from_numpy(third), "actions": third}).to("cpu", torch.bfloat16)
    assert batch["state"].dtype == torch.float32 and batch["actions"] is third
