import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.spec import ActionSpec, CameraSpec, StateSpec
from hf_vla.models.outputs import VLAOutput
from hf_vla.policy import Policy

CHUNK = 4


class Counter(torch.nn.Module):
    """A model whose k-th prediction is the chunk k + 0.0, k + 0.1, k + 0.2, k + 0.3 in both dimensions."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def predict_action(self, **options):
        self.calls += 1
        self.options = options
        chunk = self.calls + 0.1 * torch.arange(CHUNK)
        return VLAOutput(actions=chunk[None, :, None].expand(1, CHUNK, 2))


class EchoProcessor:
    """Remembers what it was called with; decodes by the real codec, which is told to change nothing."""

    def __init__(self, *cameras, state_spec=None):
        specs = {"action": ActionSpec(("a", "b"), "joint").to_dict(), "state": state_spec and state_spec.to_dict()}
        limits = {"q01": [-1.0] * 2, "q99": [1.0] * 2}
        statistics = {"arm": {"action": limits, "state": limits}}
        normalization = {"mode": "identity", "clip": False, "convention": "lerobot"}
        config = {"chunk_size": CHUNK, "normalization": normalization, "specs": {"arm": specs}}
        config["state_normalization"] = state_spec and normalization
        self.action_codec = ActionCodec(statistics, config)
        self._cameras = cameras

    def camera_specs(self, unnorm_key):
        assert unnorm_key == "arm"
        return self._cameras

    def __call__(self, **inputs):
        self.inputs = inputs
        return BatchFeature({})

    def decode_actions(self, output, unnorm_key):
        return self.action_codec.decode(output.actions.numpy(), unnorm_key)


def observe(**more):
    return {"observation.images.front": np.zeros((8, 8, 3), np.uint8), "task": "wave", **more}


def first_values(policy, steps):
    return [float(policy.select_action(observe())[0]) for _ in range(steps)]


def test_executes_the_whole_chunk_by_default():
    policy = Policy(Counter(), EchoProcessor())
    assert first_values(policy, 6) == pytest.approx([1.0, 1.1, 1.2, 1.3, 2.0, 2.1])


def test_executes_n_action_steps_of_each_chunk_and_reset_forgets_the_rest():
    policy = Policy(Counter(), EchoProcessor(), n_action_steps=2)
    assert first_values(policy, 3) == pytest.approx([1.0, 1.1, 2.0])
    policy.reset()
    assert first_values(policy, 1) == pytest.approx([3.0])


def test_ensembling_averages_what_was_predicted_for_a_step():
    policy = Policy(Counter(), EchoProcessor(), ensemble_coefficient=0.0)
    # step 2 was predicted as 1.2 by the first chunk, 2.1 by the second and 3.0 by the third
    assert first_values(policy, 3) == pytest.approx([1.0, (1.1 + 2.0) / 2, (1.2 + 2.1 + 3.0) / 3])
    policy.reset()
    assert first_values(policy, 1) == pytest.approx([4.0])


def test_predict_chunk_keeps_no_actions():
    policy = Policy(Counter(), EchoProcessor())
    chunk = policy.predict_chunk(observe())
    assert chunk.shape == (CHUNK, 2) and chunk.dtype == np.float32
    assert first_values(policy, 1) == pytest.approx([2.0])


def test_passes_image_text_and_key():
    policy = Policy(Counter(), EchoProcessor())
    observation = observe(**{"observation.state": np.zeros(3), "next.reward": 0.0})
    policy.predict_chunk(observation)
    inputs = policy.processor.inputs
    assert inputs["images"][0] is observation["observation.images.front"]
    assert inputs["text"] == ["wave"] and inputs["unnorm_key"] == "arm"
    assert "state" not in inputs and "depth" not in inputs  # the checkpoint declares neither


@pytest.mark.parametrize("key", ["observation.image", "observation.images.observation.image"])
def test_a_camera_may_be_called_as_its_column(key):
    policy = Policy(Counter(), EchoProcessor(CameraSpec("observation.image", 8, 8)))
    picture = np.ones((8, 8, 3), np.uint8)
    policy.predict_chunk(observe(**{key: picture}))
    assert policy.processor.inputs["images"][0] is picture


def test_takes_the_declared_camera_depth_and_state():
    camera = CameraSpec("wrist", 8, 8, depth=True)
    policy = Policy(Counter(), EchoProcessor(camera, state_spec=StateSpec(("x", "y"))))
    wrist = np.ones((8, 8, 3), np.uint8)
    more = {"observation.images.wrist": wrist, "observation.depth.wrist": np.full((8, 8), 2.0)}
    policy.predict_chunk(observe(**more, **{"observation.state": [0.5, 1.5]}))
    inputs = policy.processor.inputs
    assert inputs["images"][0] is wrist
    assert inputs["depth"].shape == (1, 8, 8) and inputs["state"].tolist() == [[0.5, 1.5]]


def test_takes_several_cameras_by_name_and_says_which_is_missing():
    policy = Policy(Counter(), EchoProcessor(CameraSpec("wrist", 8, 8), CameraSpec("front", 8, 8)))
    wrist = np.ones((8, 8, 3), np.uint8)
    observation = observe(**{"observation.images.wrist": wrist, "observation.images.back": wrist})
    policy.predict_chunk(observation)
    (images,) = policy.processor.inputs["images"]
    assert list(images) == ["wrist", "front"] and images["wrist"] is wrist
    assert images["front"] is observation["observation.images.front"]
    policy.predict_chunk({**observation, "observation.images.wrist": None})
    assert policy.processor.inputs["images"][0]["wrist"] is None


def test_a_picture_of_some_camera_is_needed():
    wrist, front = CameraSpec("wrist", 8, 8), CameraSpec("front", 8, 8)
    missing = observe(**{"observation.images.front": None, "observation.images.wrist": None})
    for cameras, names in (((front,), "'front'"), ((wrist, front), "'wrist' or 'front'")):
        with pytest.raises(ValueError, match=f"needs a picture of {names}, came None"):
            Policy(Counter(), EchoProcessor(*cameras)).predict_chunk(missing)


def test_another_task_starts_ensemble_and_seed_anew():
    policy = Policy(Counter(), EchoProcessor(), ensemble_coefficient=0.0, seed=3)

    def act(task):
        action = float(policy.select_action(observe(task=task))[0])
        return action, torch.rand(1, generator=policy.model.options["generator"]).item()

    first, second, third = act("push"), act("push"), act("pull")
    assert [action for action, _ in (first, second, third)] == pytest.approx([1.0, (1.1 + 2.0) / 2, 3.0])
    assert third[1] == first[1] != second[1]


def test_another_given_reasoning_starts_the_ensemble_anew_but_not_the_seed():
    processor, model = EchoProcessor(), Counter()
    processor.takes_reasoning, model.config = True, SimpleNamespace(max_reasoning_tokens=8)
    policy, alone = Policy(model, processor, ensemble_coefficient=0.0, seed=3), torch.Generator().manual_seed(3)

    def act(words, task="push"):
        action = float(policy.select_action(observe(task=task), words)[0])
        return action, torch.rand(1, generator=policy.model.options["generator"]).item()

    numbers = torch.rand(3, 1, generator=alone)[:, 0].tolist()
    actions, drawn = zip(*map(act, ("lift", "lift", "drop")), strict=True)
    assert actions == pytest.approx([1.0, (1.1 + 2.0) / 2, 3.0]) and list(drawn) == numbers
    assert act("drop", "pull")[1] == numbers[0]


def test_a_seed_repeats_from_reset_on():
    policy = Policy(Counter(), EchoProcessor(), seed=3)

    def draw():
        policy.predict_chunk(observe())
        return torch.rand(1, generator=policy.model.options["generator"]).item()

    first, second = draw(), draw()
    assert first == torch.rand(1, generator=torch.Generator().manual_seed(3)).item() != second
    policy.reset()
    assert [draw(), draw()] == [first, second]


def test_the_model_gets_only_the_options_that_are_given():
    policy = Policy(Counter(), EchoProcessor())
    policy.predict_chunk(observe())
    assert policy.model.options == {}
    policy = Policy(Counter(), EchoProcessor(), num_inference_steps=5)
    policy.predict_chunk(observe())
    assert policy.model.options == {"num_inference_steps": 5}


WRIST = {"observation.images.wrist": np.ones((8, 8, 3), np.uint8)}


@pytest.mark.parametrize(
    ("cameras", "state_spec", "observation", "message"),
    [
        ((), None, {"observation.images.front": 0}, "an instruction under 'task'"),
        ((), None, {"task": "wave"}, r"exactly one 'observation.images.<name>'; came \[\]"),
        ((), None, observe(**WRIST), r"exactly one 'observation.images.<name>'; came \['front', 'wrist'\]"),
        ([CameraSpec("wrist", 8, 8)], None, observe(), r"needs the camera 'wrist'; the observation has \['front'\]"),
        ([CameraSpec("front", 8, 8, depth=True)], None, observe(), "metric depth: give 'observation.depth.front'"),
        ((), StateSpec(("x", "y")), observe(), r"give 'observation.state', 2 numbers \['x', 'y'\]"),
        ((), StateSpec(("x", "y")), observe(**{"observation.state": [1.0]}), "Expected 2 finite numbers"),
        ((), StateSpec(("x", "y")), observe(**{"observation.state": [1.0, np.nan]}), "Expected 2 finite numbers"),
        (
            [CameraSpec("front", 8, 8), CameraSpec("wrist", 8, 8)],
            None,
            observe(),
            r"the camera 'wrist'; .* \['front'\]",
        ),
        (
            [CameraSpec("a", 8, 8), CameraSpec("b", 8, 8)],
            None,
            observe(),
            r"needs the cameras 'a', 'b'; .* \['front'\]",
        ),
    ],
)
def test_names_what_an_observation_lacks(cameras, state_spec, observation, message):
    policy = Policy(Counter(), EchoProcessor(*cameras, state_spec=state_spec))
    with pytest.raises(ValueError, match=message):
        policy.select_action(observation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unnorm_key": "amr"}, "Did you mean 'arm'"),
        ({"n_action_steps": CHUNK + 1}, "at most the chunk size 4, came 5"),
        ({"n_action_steps": 0}, "n_action_steps of 1 or more, came 0"),
        ({"n_action_steps": 1, "ensemble_coefficient": 0.01}, "not both"),
        ({"reasoning_interval": 0}, "reasoning_interval of 1 or more, came 0"),
        ({"reasoning_interval": 2}, "does not reason: leave reasoning_interval out, came 2"),
        ({"max_reasoning_tokens": 0}, "does not reason: leave max_reasoning_tokens out, came 0"),
    ],
)
def test_rejects_options(options, message):
    with pytest.raises(ValueError, match=message):
        Policy(Counter(), EchoProcessor(), **options)


def test_rejects_a_checkpoint_of_another_kind():
    with pytest.raises(ValueError, match="processor of a hf_vla family, came BatchFeature"):
        Policy(Counter(), BatchFeature({}))


@pytest.mark.parametrize("left", ["nothing", "a bare tokenizer"])
def test_a_checkpoint_without_its_processor_is_said_to_be_one(tiny_checkpoint, tmp_path, left):
    lost = {"processor_config.json"} | ({"tokenizer.json", "tokenizer_config.json"} if left == "nothing" else set())
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "mine", ignore=lambda _, names: lost & {*names})
    with pytest.raises(ValueError, match=r"mine was saved without its processor: call processor\.save_pretrained"):
        Policy.from_pretrained(folder)


def test_runs_a_checkpoint_on_a_demonstration(tiny_checkpoint, demo_item):
    policy = Policy.from_pretrained(tiny_checkpoint, device="cpu", n_action_steps=3)
    assert policy.cameras[0].name == "agentview" and policy.action_spec.names[0] == "dx"
    chunk = policy.predict_chunk(demo_item)
    assert chunk.shape == (4, 7) and np.isfinite(chunk).all() and np.abs(chunk).max() <= 1.0 + 1e-6
    assert set(chunk[:, 6]) <= {-1.0, 1.0}
    image = (demo_item["observation.images.agentview"].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    observation = {"observation.images.agentview": image, "task": demo_item["task"]}
    assert np.array_equal(policy.predict_chunk(observation), chunk)
    assert np.array_equal([policy.select_action(observation) for _ in range(3)], chunk[:3])
    with pytest.raises(ValueError, match="needs the camera 'agentview'"):
        policy.predict_chunk({"observation.images.wrist": image, "task": "x"})


def test_a_folder_or_a_device_that_is_not_there(tiny_checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Policy.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Cannot use the device 'gpuu'"):
        Policy.from_pretrained(tiny_checkpoint, device="gpuu")


def test_a_model_in_training_is_put_into_evaluation_mode(tiny_checkpoint):
    policy = Policy.from_pretrained(tiny_checkpoint)
    assert not Policy(policy.model.train(), policy.processor).model.training


def test_a_chunk_is_given_up_when_the_task_changes(tiny_checkpoint, demo_item, monkeypatch):
    policy = Policy.from_pretrained(tiny_checkpoint)
    observation = {"observation.images.agentview": demo_item["observation.images.agentview"], "task": "push"}
    chunks = []
    monkeypatch.setattr(policy, "predict_chunk", lambda seen, _: chunks.append(seen["task"]) or np.zeros((4, 7)))
    for task in ("push", "push", "pull", "pull"):
        policy.select_action(observation | {"task": task})
    assert chunks == ["push", "pull"]
    with pytest.raises(ValueError, match="needs the camera 'agentview'"):
        policy.select_action({"task": "pull"})  # also while a chunk is being executed


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        Policy.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Policy.from_pretrained("tests/modell")


def test_a_name_on_the_hub_is_not_taken_for_a_folder(tmp_path, monkeypatch, hub):
    (tmp_path / "lerobot" / "src").mkdir(parents=True)
    (tmp_path / "outputs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="'lerobot/pi0_base' is not on the Hub"):
        Policy.from_pretrained("lerobot/pi0_base")
    with pytest.raises(FileNotFoundError, match="outputs/modell: no such folder. Did you mean 'outputs/model'"):
        Policy.from_pretrained("outputs/modell")
    assert hub.requests("*lerobot/pi0_base*") and not hub.requests("*outputs*")
