import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor

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
    assert (batch["unnorm_key"], batch["return_tensors"]) == (["blocks"] * 2, "pt")


def test_a_dataset_of_one_camera_may_call_it_observation_image(copy, edit):
    """As LeRobot's `pusht` does: the dataset and the collator know it by one name."""
    root = copy("v30_images")
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        names = [name.replace("observation.images.wrist", "observation.image") for name in table.column_names]
        pq.write_table(table.rename_columns(names), path)
    edit(
        root / "meta/info.json",
        lambda info: json.loads(json.dumps(info).replace("observation.images.wrist", "observation.image")),
    )
    for camera_map in (None, {"observation.image": "observation.image"}):  # the second is how a recipe has it
        dataset = LeRobotEpisodes(root, {"action": [0.0]}, cameras=["observation.image"], camera_map=camera_map)
        item = dataset[3]
        batch = VLACollator(Recorder(), "x", ["observation.image"])([item])
        assert dataset.camera_keys == ["observation.image"]
        assert torch.equal(batch["images"][0], item["observation.image"])


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
    # another epoch, or the same row of another dataset, is another draw; batch mates are none
    for name, values in {"epoch": range(40), "dataset": map(str, range(40))}.items():
        own = [withheld([items[0] | {name: value}], camera_dropout=0.4)[0] for value in values]
        assert 4 < sum(any(each) for each in own) < 36
    assert withheld(items, camera_dropout=0.4)[1:] == withheld(items[1:], camera_dropout=0.4)
    lacking = [item | {keys[0]: None} for item in items]
    assert all(withheld(lacking, camera_dropout=0.9, seed=seed) == [[True, False]] * 2 for seed in range(20))


def test_states_are_withheld_and_alike_for_the_same_rows(goldens):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_images", {"action": [0.0]})
    items = [dataset[0], dataset[1]]
    collator = VLACollator(Recorder(), "x", dataset.camera_keys[:1], with_state=True)
    told = collator(items)["state"]
    assert (told != 0).any(1).all()

    def withheld(items, **options):
        states = collator(items, **options)["state"]
        out = (states == 0).all(1)
        assert torch.equal(states[~out], torch.stack([item["observation.state"] for item in items])[~out])
        return out.tolist()

    drawn = np.array([withheld(items, state_dropout=0.3, seed=seed) for seed in range(300)])
    assert drawn.mean() == pytest.approx(0.3, abs=0.05)
    assert withheld(items, state_dropout=0.3, seed=4) == withheld(items, state_dropout=0.3, seed=4)
    assert withheld(items, state_dropout=0.3)[1:] == withheld(items[1:], state_dropout=0.3)
    assert 4 < sum(withheld([items[0] | {"epoch": epoch}], state_dropout=0.5)[0] for epoch in range(40)) < 36
    assert torch.equal(collator(items)["state"], told)  # the items are as they were


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


def test_the_reasoning_is_passed_in_training_alone(dataset):
    said = ["lift it", "", "  \n", None]  # blank texts teach nothing
    items = [dataset[row] | {"note": text} for row, text in enumerate(said)]
    collator = VLACollator(Recorder(), "blocks", ["wrist"], reasoning="note")
    batch = collator(items)
    assert batch["reasoning"] == ["lift it", None, None, None]
    assert {key: batch[key] for key in ("text", "unnorm_key")} == {
        "text": [items[0]["task"]] * 4,
        "unnorm_key": ["blocks"] * 4,
    }
    assert collator(items, camera_dropout=0.5)["reasoning"] == batch["reasoning"]
    assert "reasoning" not in collator.prompts(items)["inputs"] and "reasoning" not in collator.prompts(items)
    assert collator(items[3:])["reasoning"] == [None]


@pytest.mark.parametrize("key", ["subtask", "action", "observation.images.wrist"])
def test_a_reasoning_that_is_no_text_is_an_error_that_lists_the_texts(dataset, key):
    items = [dataset[0] | {"note": None}, dataset[1] | {"note": "lift it"}]
    with pytest.raises(ValueError, match=rf"hold no text '{key}' to learn as reasoning, only \['note', 'task'\]"):
        VLACollator(Recorder(), "blocks", ["wrist"], reasoning=key)(items)
    with pytest.raises(ValueError, match="hold no text 'note'"):
        VLACollator(Recorder(), "blocks", ["wrist"], reasoning="note")([items[0], dataset[1]])


def test_a_processor_that_takes_no_reasoning_refuses_it(demos, tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    items = [LeRobotEpisodes(demos, {"action": [step / 20 for step in range(4)]}, cameras=["agentview"])[0]]
    with pytest.raises(ValueError, match="takes no reasoning"):
        VLACollator(processor, "robosuite", ["agentview"], reasoning="subtask")(items)
    assert VLACollator(processor, "robosuite", ["agentview"], reasoning="subtask").prompts(items)


def test_the_example_data_teaches_a_model_what_to_say(demos, reasoning_checkpoint):
    processor = AutoProcessor.from_pretrained(reasoning_checkpoint)
    dataset = LeRobotEpisodes(demos, {"action": [step / 20 for step in range(4)]})
    collator = VLACollator(processor, "robosuite", dataset.camera_keys, reasoning="subtask")
    batch = collator([dataset[0], dataset[25] | {"subtask": None}, dataset[30]])
    said = [processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert [text.partition("Next action:")[0] for text in said] == ["reach for the red cube", "", "lift the red cube"]
    assert said[1] == ""
    assert "labels" not in collator([dataset[0] | {"subtask": " "}])
