import numpy as np
import pytest
import torch

from hf_vla.data.collator import VLACollator
from hf_vla.data.lerobot import LeRobotEpisodes


class Recorder:
    """Stands in for a processor: hands back what it was given."""

    def __call__(self, **given):
        return given


@pytest.fixture
def dataset(goldens):
    return LeRobotEpisodes(
        goldens / "lerobot" / "datasets" / "v30_video_av1", {"action": [0.0, 0.1, 0.2, 0.3]}, cameras=["wrist"]
    )


def test_a_batch_is_what_the_processor_takes(dataset):
    items = [dataset[0], dataset[23]]  # the second is two rows from its episode's end
    batch = VLACollator(Recorder(), "blocks", ["wrist"])(items)
    assert batch.keys() == {"images", "text", "actions", "action_mask", "unnorm_key", "return_tensors"}
    assert [image.shape for image in batch["images"]] == [(3, 72, 72)] * 2
    assert batch["text"] == ["pick up the red block"] * 2
    assert torch.equal(batch["actions"], torch.stack([item["action"] for item in items]))
    assert batch["action_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert (batch["unnorm_key"], batch["return_tensors"]) == ("blocks", "pt")


def test_of_several_cameras_each_sample_has_a_dictionary(goldens):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_images", {"action": [0.0]})
    keys = dataset.camera_keys
    assert len(keys) > 1
    items = [dataset[0], dataset[1]]
    batch = VLACollator(Recorder(), "x", keys)(items)
    names = [key.removeprefix("observation.images.") for key in keys]
    assert [list(images) for images in batch["images"]] == [names] * 2
    for images, item in zip(batch["images"], items, strict=True):
        assert all(torch.equal(images[name], item[key]) for name, key in zip(names, keys, strict=True))


def test_cameras_are_withheld_never_all_and_alike_for_the_same_rows(goldens):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_images", {"action": [0.0]})
    keys, items = dataset.camera_keys[:2], [dataset[0], dataset[1]]
    collator = VLACollator(Recorder(), "x", keys)

    def withheld(items, **options):
        return [[each is None for each in images.values()] for images in collator(items, **options)["images"]]

    drawn = np.array([withheld(items, camera_dropout=0.4, seed=seed) for seed in range(300)]).reshape(-1, 2)
    assert not drawn.all(1).any()
    assert drawn.mean() == pytest.approx(0.4 - 0.4**2 / 2, abs=0.04)  # of two that would be withheld one is not
    assert withheld(items, camera_dropout=0.4, seed=1) == withheld(items, camera_dropout=0.4, seed=1)
    rows = [[dataset[row], dataset[row]] for row in range(8)]
    assert len({str(withheld(pair, camera_dropout=0.4)) for pair in rows}) > 1
    assert withheld(items) == [[False, False]] * 2 and items[0][keys[0]] is not None


@pytest.mark.parametrize("cameras", ["wrist", []])
def test_cameras_are_a_list(cameras):
    with pytest.raises(ValueError, match="Expected a list of cameras, one or more, came"):
        VLACollator(Recorder(), "blocks", cameras)


def test_the_state_is_passed_when_it_is_asked_for(dataset):
    batch = VLACollator(Recorder(), "blocks", ["observation.images.wrist"], with_state=True)([dataset[0], dataset[1]])
    assert batch["state"].shape == (2, 7)


def test_missing_keys_are_errors_that_list_what_is_there(dataset):
    with pytest.raises(ValueError, match=r"hold no \['observation.images.top'\].*images.wrist"):
        VLACollator(Recorder(), "blocks", ["top"])([dataset[0]])
    without = LeRobotEpisodes(dataset.root, cameras=["wrist"])
    with pytest.raises(ValueError, match=r"hold no \['action_is_pad'\].*delta_timestamps"):
        VLACollator(Recorder(), "blocks", ["wrist"])([without[0]])


def test_prompts_hold_no_targets_but_keep_them_beside(dataset):
    items = [dataset[0], dataset[23]]
    collator = VLACollator(Recorder(), "blocks", ["wrist"])
    training, batch = collator(items), collator.prompts(items)
    assert batch["inputs"].keys() == {"images", "text", "unnorm_key", "return_tensors"}
    assert torch.equal(batch["actions"], training["actions"])
    assert torch.equal(batch["action_mask"], training["action_mask"])
