"""What the converters of all families share; see also tests/models/<family>/test_convert.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hf_vla.models.conversion import (
    DTYPES,
    INDEX,
    Conversion,
    convert_checkpoint,
    find_checkpoint,
    match_weights,
    one_dtype,
    read_json,
    read_statistics,
    read_weights,
)

WEIGHTS = {"old.a": torch.ones(2, 3), "old.b": torch.zeros(4), "other": torch.arange(3)}


class Model:
    """Stands for a model without weights."""

    def __init__(self, broken=False):
        self.broken = broken

    def save_pretrained(self, folder, state_dict, max_shard_size):
        (folder / "config.json").write_text("{}")
        save_file(state_dict, folder / "model.safetensors")
        state_dict.clear()  # as transformers does
        if self.broken:
            raise ValueError("the disk is full")


def translation(**options):
    return lambda folder, statistics, cameras, dtype: Conversion(Model(**options), dict(WEIGHTS))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder


def shard(folder, places):
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name in set(places.values()):
        save_file({key: WEIGHTS[key] for key in WEIGHTS if places.get(key) == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_one_file_and_shards_are_read_alike(source):
    whole = read_weights(source)
    shard(source, {"old.a": "model-1.safetensors", "old.b": "model-2.safetensors", "other": "model-1.safetensors"})
    parts = read_weights(source)
    assert whole.keys() == parts.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensor, whole[key]) and torch.equal(tensor, parts[key]) for key, tensor in WEIGHTS.items())


def test_a_missing_shard_or_weight_is_named(source):
    shard(source, {"old.a": "one.safetensors", "old.b": "two.safetensors", "lost": "one.safetensors"})
    with pytest.raises(ValueError, match=r"names 1 weights that its files lack: \['lost'\]"):
        read_weights(source)
    (source / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 2 files, of which \['two.safetensors'\] are missing"):
        read_weights(source)


def test_shards_outside_the_folder_are_not_read(source, tmp_path):
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    (source / INDEX).write_text(json.dumps({"weight_map": {"old.a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="'secret.safetensors'.* are missing"):
        read_weights(source)


def test_pickled_weights_are_refused_with_the_way_out(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"came \['pytorch_model.bin'\].*never read.*weights_only=True.*save_file"):
        read_weights(source)


def test_weights_get_our_names():
    model = torch.nn.ParameterDict({"new": torch.nn.ParameterDict({"a": torch.empty(2, 3), "b": torch.empty(4)})})
    published = {key: WEIGHTS[key] for key in ("old.a", "old.b")}
    weights = match_weights(published, [("old.", "new.")], model)
    assert list(weights) == ["new.a", "new.b"] and weights["new.a"] is WEIGHTS["old.a"]


def test_weights_that_do_not_fit_are_all_listed_by_their_published_names():
    model = torch.nn.ParameterDict({"new": torch.nn.ParameterDict({"a": torch.empty(3, 2), "c": torch.empty(4)})})
    with pytest.raises(
        ValueError,
        match=r"Missing: \['old.c'\]. Left over: \['old.b', 'other'\]. "
        r"Of another shape: \['old.a \(2, 3\) instead of \(3, 2\)'\]",
    ):
        match_weights(WEIGHTS, [("old.", "new.")], model)


@pytest.mark.parametrize(("name", "shape"), [("c", (4,)), ("a", (3, 2)), ("b", None)])
def test_each_kind_of_misfit_alone_is_refused(name, shape):
    """Missing, of another shape, left over."""
    shapes = {"a": (2, 3), "b": (4,)} | {name: shape}
    parts = {key: torch.empty(size) for key, size in shapes.items() if size is not None}
    model = torch.nn.ParameterDict({"new": torch.nn.ParameterDict(parts)})
    with pytest.raises(ValueError, match=rf"\['old.{name}"):
        match_weights({key: WEIGHTS[key] for key in ("old.a", "old.b")}, [("old.", "new.")], model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_kept_or_chosen(dtype):
    weights = {"a": torch.ones(2, dtype=dtype), "n": torch.ones(2, dtype=torch.int64)}
    assert [tensor.dtype for tensor in one_dtype(weights).values()] == [dtype, torch.int64]
    assert [tensor.dtype for tensor in one_dtype(weights, torch.bfloat16).values()] == [torch.bfloat16, torch.int64]


def test_a_mixture_of_precisions_is_never_guessed_away():
    weights = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float16)}
    with pytest.raises(ValueError, match=r"mixture of \['float16', 'float32'\]; choose one of \['float32'"):
        one_dtype(weights)
    assert {tensor.dtype for tensor in one_dtype(weights, torch.float32).values()} == {torch.float32}


def test_statistics_are_json_or_safetensors_and_never_pickled(tmp_path):
    (tmp_path / "stats.json").write_text('{"action_min": [0.5, -1.0]}')
    save_file({"action_min": torch.tensor([0.5, -1.0])}, tmp_path / "stats.safetensors")
    for name in ("stats.json", "stats.safetensors"):
        assert read_statistics(tmp_path / name) == {"action_min": [0.5, -1.0]}
    with pytest.raises(ValueError, match="came 'dataset_stats.pkl'. Pickles can run any code"):
        read_statistics(tmp_path / "dataset_stats.pkl")
    for content in ("[1]", "no json"):
        (tmp_path / "stats.json").write_text(content)
        with pytest.raises(ValueError, match=r"Expected .*JSON.* in .*stats\.json"):
            read_json(tmp_path / "stats.json")


def test_sources_are_folders_or_names_on_the_hub(source, monkeypatch):
    asked = []
    hub = SimpleNamespace(snapshot_download=lambda name, **options: asked.append((name, options)) or str(source))
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    assert find_checkpoint(source) == find_checkpoint("somebody/tinyvla") == source
    ((name, options),) = asked
    assert name == "somebody/tinyvla" and not any("bin" in pattern for pattern in options["allow_patterns"])
    for wrong in (source / "nowhere", "nowhere", "./a/b"):
        with pytest.raises(FileNotFoundError, match="no such folder, and no Hub name"):
            find_checkpoint(wrong)


def test_writes_a_folder_of_usual_rights(source, tmp_path):
    destination = tmp_path / "new" / "folder"
    done = convert_checkpoint(translation(), source, destination)
    assert done.weights.keys() == WEIGHTS.keys()
    assert sorted(path.name for path in destination.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "plain").mkdir()
    assert destination.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [path.name for path in destination.parent.iterdir()] == ["folder"]


def test_an_empty_folder_is_filled(source, tmp_path):
    (tmp_path / "empty").mkdir()
    convert_checkpoint(translation(), source, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written_stays_behind(source, tmp_path, existing):
    destination = tmp_path / "out" / "converted"
    if existing:
        convert_checkpoint(translation(), source, destination)
        (destination / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="the disk is full"):
        convert_checkpoint(translation(broken=True), source, destination, overwrite=True)
    assert [path.name for path in destination.parent.iterdir()] == (["converted"] if existing else [])
    assert not existing or (destination / "mine.txt").read_text() == "keep"


def test_files_at_the_destination_are_kept_unless_a_checkpoint_is_to_be_overwritten(source, tmp_path):
    destination = tmp_path / "converted"
    convert_checkpoint(translation(), source, destination)
    (destination / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="is there already: choose another folder, or overwrite it with --overwrite"):
        convert_checkpoint(translation(), source, destination)
    assert (destination / "old.txt").is_file()
    convert_checkpoint(translation(), source, destination, overwrite=True)
    assert sorted(path.name for path in destination.iterdir()) == ["config.json", "model.safetensors"]
    (destination / "config.json").unlink()
    with pytest.raises(ValueError, match="is no checkpoint .*, so it is not overwritten"):
        convert_checkpoint(translation(), source, destination, overwrite=True)
    with pytest.raises(ValueError, match="so it is not overwritten"):
        convert_checkpoint(translation(), source, destination / "model.safetensors", overwrite=True)


def test_the_source_is_never_overwritten(source):
    (source / "config.json").write_text("{}")
    for destination in (source, source.parent):
        (destination / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="is the source, or holds it"):
            convert_checkpoint(translation(), source, destination, overwrite=True)


def test_unknown_precisions_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a dtype in \['float32', 'bfloat16', 'float16'\], came 'fp16'"):
        convert_checkpoint(translation(), tmp_path / "nowhere", tmp_path / "new", dtype="fp16")
    assert [*DTYPES] == ["float32", "bfloat16", "float16"]
