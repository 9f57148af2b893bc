"""RLDS folders that TensorFlow Datasets really wrote: read back, standardised, converted."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import hf_vla.data.rlds
import hf_vla.data.rlds_conversion
from hf_vla.cli.main import app
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.oxe import DATASETS, oxe_dataset
from hf_vla.data.reading.pictures import decoded
from hf_vla.data.rlds import RldsEpisodes

needs_tensorflow = pytest.mark.skipif(
    find_spec("tensorflow") is None or find_spec("tensorflow_datasets") is None,
    reason="the extra 'rlds' is not installed",
)
LENGTHS, HEIGHT, WIDTH = (6, 9, 7, 8, 5), 48, 64
TEXTS = ("pick up the cup", "", "Öffne die Tür", "pick up the cup", "push")


def colours(length, seed):
    """Flat pictures, which encoders keep well: one colour per step."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (length, 1, 1, 3), dtype=np.uint8).repeat(HEIGHT, 1).repeat(WIDTH, 2)


def recording(number):
    generator, length = np.random.default_rng(number), LENGTHS[number]
    state = np.cumsum(generator.normal(0, 0.05, (length, 7)), axis=0).astype(np.float32)
    action = generator.uniform(0, 1, (length, 7)).astype(np.float32)
    action[:, 6] = action[:, 6] > 0.5
    return {"state": state, "action": action, "pictures": [colours(length, (number, view)) for view in range(2)]}


def steps_of(number):
    own = recording(number)
    for step in range(LENGTHS[number]):
        yield {
            "action": own["action"][step],
            "is_first": step == 0,
            "is_last": step == LENGTHS[number] - 1,
            "language_instruction": TEXTS[number],
            "observation": {
                "image_0": own["pictures"][0][step],
                "image_1": own["pictures"][1][step],
                "depth": np.full((HEIGHT, WIDTH, 1), step, np.float32),
                "state": own["state"][step],
            },
        }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`bridge_orig` in small: five episodes, one in a split of its own."""
    pytest.importorskip("tensorflow_datasets")
    import tensorflow_datasets as tfds

    class BridgeOrig(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # or it is looked for through a package that need not be installed

        def _info(self):
            image = {"shape": (HEIGHT, WIDTH, 3), "dtype": np.uint8}
            observation = {
                "image_0": tfds.features.Image(**image, encoding_format="png"),
                "image_1": tfds.features.Image(**image, encoding_format="jpeg"),
                "depth": tfds.features.Image(shape=(HEIGHT, WIDTH, 1), dtype=np.float32),
                "state": tfds.features.Tensor(shape=(7,), dtype=np.float32),
            }
            step = {
                "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
                "is_first": np.bool_,
                "is_last": np.bool_,
                "language_instruction": tfds.features.Text(),
                "observation": tfds.features.FeaturesDict(observation),
            }
            features = {"steps": tfds.features.Dataset(step), "episode_metadata": {"file_path": tfds.features.Text()}}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(range(4)), "val": self._generate_examples([4])}

        def _generate_examples(self, numbers):
            for number in numbers:
                steps = list(steps_of(number))
                yield str(number), {"steps": steps, "episode_metadata": {"file_path": f"raw/{number}.pkl"}}

    folder = tmp_path_factory.mktemp("rlds")
    BridgeOrig(data_dir=folder).download_and_prepare()
    return folder / "bridge_orig" / "1.0.0"


@pytest.fixture(scope="module")
def order(written):
    """Number of the recording behind each episode of the split: TensorFlow Datasets shuffles when it writes."""
    paths = (episode["episode_metadata/file_path"].item() for _, episode in RldsEpisodes(written).read())
    return [int(path.decode().removeprefix("raw/").removesuffix(".pkl")) for path in paths]


def expected_actions(number):
    own = recording(number)
    return np.concatenate([np.diff(own["state"][:, :6], axis=0)[1:], own["action"][1:-1, 6:]], axis=1)


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", "rlds", *map(str, arguments)], env={"COLUMNS": "2000"})


def check_converted(
    folder, numbers, cameras=("image_0", "image_1"), tolerance=8 / 255
):  # AV1 keeps flat pictures so far
    dataset = LeRobotEpisodes(folder)
    assert dataset.camera_keys == [f"observation.images.{camera}" for camera in cameras] and dataset.fps == 5
    assert [episode.length for episode in dataset.episodes] == [LENGTHS[number] - 2 for number in numbers]
    actions = np.concatenate([expected_actions(number) for number in numbers])
    np.testing.assert_allclose(dataset.column("action"), actions, atol=1e-6)
    texts = [TEXTS[number] for number in numbers for _ in range(LENGTHS[number] - 2)]
    assert dataset.texts("task").tolist() == texts
    for start, number in zip(dataset.episode_starts[:-1], numbers, strict=True):
        for step in (0, LENGTHS[number] - 3):
            for view, camera in enumerate(cameras):
                picture = dataset[int(start) + step][f"observation.images.{camera}"]
                wanted = torch.from_numpy(recording(number)["pictures"][view][step + 1]).permute(2, 0, 1) / 255
                assert (picture - wanted).abs().max() <= tolerance
    return dataset


@needs_tensorflow
def test_reads_what_was_written(written, order):
    episodes = RldsEpisodes(written.parent)  # the folder above, which holds one version
    assert (len(episodes), episodes.name, episodes.version) == (4, "bridge_orig", "1.0.0")
    assert episodes.cameras == ["image_0", "image_1"] and sorted(order) == [0, 1, 2, 3]
    assert episodes.features["observation/state"] == {"dtype": "float32", "shape": [7]}
    assert episodes.features["observation/depth"]["dtype"] == "depth"
    for number, episode in zip(order, episodes, strict=True):
        own = recording(number)
        np.testing.assert_array_equal(episode["observation/state"], own["state"])
        np.testing.assert_array_equal(episode["action"], own["action"])
        assert episode["is_last"].tolist() == [False] * (LENGTHS[number] - 1) + [True]
        assert {text.decode() for text in episode["language_instruction"]} == {TEXTS[number]}
        assert isinstance(episode["observation/image_0"][0], bytes)
        np.testing.assert_array_equal(decoded(episode["observation/image_0"][1]), own["pictures"][0][1])
        assert all(isinstance(value, np.ndarray) for value in episode.values())


@needs_tensorflow
def test_selects_splits_and_starts_anywhere(written, order):
    assert [len(RldsEpisodes(written, split)) for split in ("val", "train[1:3]", "all")] == [1, 2, 5]
    lengths = [LENGTHS[number] for number in order]
    for split, start, wanted in (("train", 2, lengths[2:]), ("train[1:]", 1, lengths[2:]), ("train", 4, [])):
        read = dict(RldsEpisodes(written, split).read(start))
        assert [len(episode["action"]) for episode in read.values()] == wanted
        assert [*read] == [*range(start, start + len(wanted))]
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'val'\]"):
        RldsEpisodes(written, "test")


@needs_tensorflow
def test_the_order_does_not_depend_on_the_start(tmp_path):
    import tensorflow_datasets as tfds

    class Many(tfds.core.GeneratorBasedBuilder):
        VERSION, code_path = tfds.core.Version("1.0.0"), None

        def _info(self):
            features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset({"action": np.int64})})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return ((str(number), {"steps": [{"action": number}]}) for number in range(60))

    # two files of 30: TensorFlow Datasets would take 16 from each in turn
    config = tfds.download.DownloadConfig(num_shards=2)
    Many(data_dir=tmp_path).download_and_prepare(download_config=config)
    episodes = RldsEpisodes(tmp_path / "many")
    assert len([*episodes.folder.glob("*.tfrecord*")]) == 2
    order = [episode["action"].item() for _, episode in episodes.read()]
    assert sorted(order) == [*range(60)]
    for start in (10, 20, 40):
        assert [episode["action"].item() for _, episode in episodes.read(start)] == order[start:]
    error = convert(episodes.folder, tmp_path / "out", "--fps", "3").stderr
    assert "expected one vector 'action' to take as it is, came ['action']. Name an entry of the table" in error


@needs_tensorflow
def test_standardises_and_decodes(written, order):
    for number, episode in zip(
        order, RldsEpisodes(written, dataset=oxe_dataset("bridge_orig"), images=True), strict=True
    ):
        np.testing.assert_allclose(episode["action"], expected_actions(number), atol=1e-6)
        assert episode["task"] == TEXTS[number]
        pictures = episode["observation.images.image_0"]
        np.testing.assert_array_equal(pictures, recording(number)["pictures"][0][1:-1])
        assert episode["observation.images.image_1"].shape == pictures.shape


@needs_tensorflow
def test_wrong_orders_of_colours_are_mended(written):
    plain, swapped = (
        next(iter(RldsEpisodes(written, dataset=replace(oxe_dataset("bridge_orig"), bgr=bgr), images=True)))
        for bgr in ((), ("image_0",))
    )
    key = "observation.images.image_0"
    np.testing.assert_array_equal(plain[key], swapped[key][..., ::-1])
    np.testing.assert_array_equal(plain["observation.images.image_1"], swapped["observation.images.image_1"])


@needs_tensorflow
def test_another_dataset_is_named_with_its_episode(written):
    with pytest.raises(ValueError, match=r"1\.0\.0, episode 0 of 'train': droid: the episode has no 'action_dict/"):
        next(iter(RldsEpisodes(written, dataset=oxe_dataset("droid"))))


@needs_tensorflow
def test_damaged_files_are_named(written, tmp_path):
    copy = tmp_path / "1.0.0"
    copy.mkdir()
    for path in written.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (shard,) = copy.glob("*train*")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"episode 3 of 'train': TensorFlow cannot read it; its file is damaged"):
        list(RldsEpisodes(copy))
    with pytest.raises(FileNotFoundError, match=r"dataset_info\.json, found none\."):
        RldsEpisodes(tmp_path / "1.0.0" / "nothing")
    (tmp_path / "2.0.0").mkdir()
    (tmp_path / "2.0.0" / "dataset_info.json").touch()
    with pytest.raises(FileNotFoundError, match=r"found several versions, \['1\.0\.0', '2\.0\.0'\]: name one"):
        RldsEpisodes(tmp_path)


@needs_tensorflow
def test_becomes_a_lerobot_dataset(written, order, tmp_path):
    result = convert(written, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"{tmp_path}/out holds 4 episodes; 0 left out."
    dataset = check_converted(tmp_path / "out", order)
    assert dataset.info.robot_type == "widowx"
    assert dataset.features["action"]["names"] == [*oxe_dataset("bridge_orig").rlds_action.names]
    np.testing.assert_array_equal(dataset.column("observation.state")[:, 6], 0)


@needs_tensorflow
def test_takes_a_dataset_as_it_is(written, order, tmp_path):
    assert "give fps" in convert(written, tmp_path / "out", "--name", "raw").stderr
    options = ("--name", "raw", "--fps", "7", "--images", "--camera", "image_0", "--split", "train[:2]")
    assert convert(written, tmp_path / "out", *options).exit_code == 0
    dataset = LeRobotEpisodes(tmp_path / "out")
    assert dataset.fps == 7 and dataset.camera_keys == ["observation.images.image_0"] and dataset.num_episodes == 2
    own = recording(order[0])
    np.testing.assert_array_equal(dataset.column("action")[: LENGTHS[order[0]]], own["action"])
    np.testing.assert_array_equal(dataset.column("observation.state")[: LENGTHS[order[0]]], own["state"])
    picture = torch.from_numpy(own["pictures"][0][2]).permute(2, 0, 1)
    assert torch.equal((dataset[2]["observation.images.image_0"] * 255).round().to(torch.uint8), picture)


@needs_tensorflow
@pytest.mark.parametrize("saved", [False, True], ids=["before it is saved", "after it is saved"])
def test_goes_on_where_it_was_interrupted(written, order, tmp_path, monkeypatch, saved):
    from hf_vla.data.recorder import LeRobotRecorder
    from hf_vla.data.rlds_conversion import convert_rlds

    save = LeRobotRecorder.save_episode

    def interrupted(recorder):
        if not saved and recorder.num_episodes == 2:
            raise KeyboardInterrupt
        save(recorder)
        if saved and recorder.num_episodes == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LeRobotRecorder, "save_episode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_rlds(written, tmp_path / "out")
    numbers = []
    assert convert_rlds(written, tmp_path / "out", on_episode=lambda done, _: numbers.append(done)).episodes == 4
    assert numbers == [3, 4]
    check_converted(tmp_path / "out", order)
    assert convert_rlds(written, tmp_path / "out").episodes == 4  # nothing is left to do


@needs_tensorflow
def test_survives_being_killed(written, order, tmp_path):
    program = (
        "import os, sys\n"
        "from hf_vla.data.rlds_conversion import convert_rlds\n"
        "convert_rlds(sys.argv[1], sys.argv[2], on_episode=lambda done, _: done == 3 and os.kill(os.getpid(), 9))\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, written, tmp_path / "out"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and not killed.stderr, killed.stderr  # and TensorFlow was quiet
    journal = tmp_path / "out" / "meta" / "rlds.jsonl"
    journal.write_text(journal.read_text() + '{"episode": 3, "beco')  # a torn line
    assert convert(written, tmp_path / "out").exit_code == 0
    check_converted(tmp_path / "out", order)


@needs_tensorflow
def test_damaged_episodes_are_left_out_and_named(written, order, tmp_path, monkeypatch):
    damaged = recording(order[1])["pictures"][0][3]

    def decode(encoded, bgr=False):
        picture = decoded(encoded, bgr)
        if np.array_equal(picture, damaged):
            raise ValueError("a picture cannot be decoded")
        return picture

    monkeypatch.setattr("hf_vla.data.rlds_conversion.decoded", decode)
    result = convert(written, tmp_path / "out")
    assert "Left out episode 1: a picture cannot be decoded\n" in result.stdout
    assert "holds 3 episodes; 1 left out." in result.stdout
    check_converted(tmp_path / "out", [order[0], *order[2:]])
    lines = [json.loads(line) for line in (tmp_path / "out" / "meta" / "rlds.jsonl").read_text().splitlines()]
    assert lines[0] == {"source": "bridge_orig/1.0.0", "split": "train", "standardized": "bridge_orig"}
    assert lines[2] == {"episode": 1, "left_out": "a picture cannot be decoded"}
    assert lines[3] == {"episode": 2, "becomes": 1}
    result = convert(written, tmp_path / "out")  # it is not tried again
    assert "holds 3 episodes; 1 left out." in result.stdout


@needs_tensorflow
def test_failed_episodes_are_left_out(written, tmp_path, monkeypatch):
    entry = replace(oxe_dataset("bridge_orig"), success="is_first")  # which is never true of all steps
    assert list(RldsEpisodes(written, dataset=entry)) == []
    monkeypatch.setitem(DATASETS, "bridge_orig", entry)
    monkeypatch.setattr("hf_vla.data.rlds_conversion.GIVE_UP", 2)  # failures are no damage
    result = convert(written, tmp_path / "out")
    assert "Left out episode 3: it is marked as a failure\n" in result.stdout
    assert "holds 0 episodes; 4 left out." in result.stdout


@needs_tensorflow
def test_conversions_are_not_mixed_up(written, tmp_path, monkeypatch):
    assert convert(written, tmp_path / "out", "--split", "val").exit_code == 0
    error = convert(written, tmp_path / "out").stderr
    assert "holds a conversion of" in error and "'split': 'val'" in error and "choose another folder" in error
    assert (
        "no camera ['image_7']; it has ['image_0', 'image_1']" in convert(written, "x", "--camera", "image_7").stderr
    )
    assert "--dtype: no option of `hf-vla convert rlds`" in convert(written, "x", "--dtype", "bfloat16").stderr
    monkeypatch.setattr("hf_vla.data.rlds_conversion.GIVE_UP", 2)
    error = convert(written, tmp_path / "other", "--name", "roboturk", "--camera", "image_0").stderr
    assert "episode 0 of 'train' and 1 more cannot be converted: roboturk: the episode has no 'action/world_" in error


def test_says_which_extra_is_missing(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").touch()
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with pytest.raises(ValueError, match=r"`pip install 'hf-vla\[rlds\]'`"):
        RldsEpisodes(tmp_path)
    assert dict(os.environ) == before


def test_is_not_imported_before_it_is_used():
    program = (
        "import sys, hf_vla.cli.main, hf_vla.data.rlds_conversion\n"
        "sys.exit(any(name.startswith('tensorflow') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_pictures_are_decoded_as_those_of_lerobot_datasets_are():
    """The same function: 16 bits are refused, not made white; colours in another order are put right."""
    with pytest.raises(ValueError, match="a picture cannot be decoded: cannot identify"):
        decoded(b"no picture")
    deep, colours = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep, "PNG")
    with pytest.raises(ValueError, match="a picture cannot be decoded: expected 8 bits per channel, came mode 'I;16'"):
        decoded(deep.getvalue())
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(colours, "PNG")
    np.testing.assert_array_equal(decoded(colours.getvalue()), pixels)
    np.testing.assert_array_equal(decoded(colours.getvalue(), bgr=True), pixels[..., ::-1])
    assert hf_vla.data.rlds_conversion.decoded is hf_vla.data.rlds.decoded is decoded
