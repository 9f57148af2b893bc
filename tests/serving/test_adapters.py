"""Adapters by name: each acts as it would alone, with its own statistics, and shares the memory of the others."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vla.models.auto import FAMILIES
from hf_vla.serving.models import ServedModels
from hf_vla.training.lora import add_lora

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WIDTH = {"pick": 2.0, "place": 3.0}  # of their robots' actions
PLACES = 2


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def checkpoints(request, sawyer, tmp_path_factory):
    """A family's folder of a checkpoint, and of two adapters that change whatever adapters of the family may."""
    model, processor = sawyer(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for seed, (name, width) in enumerate(WIDTH.items()):
        torch.manual_seed(seed)
        in_full = ["spatial_embed_tokens"] * (request.param == "spatialvla")
        adapted = add_lora(type(model).from_pretrained(folder / "base"), r=2 + 2 * seed, in_full=in_full)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        adapted.save_pretrained(folder / name)
        limits = {key: [sign * width] * 4 for key, sign in (("min", -1), ("q01", -1), ("max", 1), ("q99", 1))}
        statistics = {f"{name}_data": {"action": limits, "state": limits}}
        config = {**processor.action_config}
        config["specs"] = {f"{name}_data": next(iter(config["specs"].values()))}
        more = dict(zip(("camera_config", "intrinsic_config"), [None] * 2, strict=True))
        for key in more:
            if getattr(processor, key, None):
                more[key] = {f"{name}_data": next(iter(getattr(processor, key).values()))}
        own = type(processor).from_pretrained(
            folder / "base", statistics=statistics, action_config=config, **{k: v for k, v in more.items() if v}
        )
        own.save_pretrained(folder / name)
    return folder


def observe(index):
    rng = np.random.default_rng(index)
    return {
        "observation.images.corner4": rng.integers(0, 256, (48, 48, 3), np.uint8),
        "observation.state": rng.normal(0, 0.3, 4).astype(np.float32),
        "task": "push",
    }


def test_adapters_act_as_they_would_alone(checkpoints, serve, plain):
    names = [None, *WIDTH]
    paths = {name: str(checkpoints / (name or "base")) for name in names}
    alone = {
        name: [
            plain(serve(ServedModels(path, seed=0), batch_size=2).url).ask(observe(place)) for place in range(PLACES)
        ]
        for name, path in paths.items()
    }
    models = ServedModels(paths[None], {name: paths[name] for name in WIDTH}, seed=0)
    running = serve(models, batch_size=2, window_s=0.02)
    clients = {name: [plain(running.url) for _ in range(PLACES)] for name in names}
    for turn in range(2):  # both in turn, and all at once
        for place in range(PLACES):
            for name in names:
                message = {**observe(place), "adapter": name, "reset": True}
                clients[name][place].send(message)
                if turn == 0:
                    check(clients[name][place].receive(), alone[name][place])
        if turn == 1:
            for place in range(PLACES):
                for name in names:
                    check(clients[name][place].receive(), alone[name][place])
    chunks = {name: answers[0]["actions"] for name, answers in alone.items()}
    assert len({chunk.tobytes() for chunk in chunks.values()}) == 3
    assert clients[None][0].metadata["adapters"]["pick"]["unnorm_key"] == "pick_data"
    changing = clients[None][0]  # one client may change from one to the other
    for name in ("pick", None, "place"):
        check(changing.ask({**observe(0), "adapter": name}), alone[name][0])


def check(answer, wanted):
    assert np.array_equal(answer["actions"], wanted["actions"])
    assert answer.get("reasoning") == wanted.get("reasoning")


def test_adapters_share_what_they_adapt(checkpoints):
    base, folders = str(checkpoints / "base"), {name: str(checkpoints / name) for name in WIDTH}
    models = ServedModels(base, folders)
    model = models.policy().model
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    for name in WIDTH:
        adapted = models.policy(name).model
        extra = [(key, each) for key, each in adapted.named_parameters() if each.data_ptr() not in owned]
        assert extra and all(".lora_" in key or ".default" in key for key, _ in extra)
        kept = sum(each.nbytes for each in model.parameters())
        assert models.shared[name] == pytest.approx(kept / (kept + sum(each.nbytes for _, each in extra)), abs=0.02)


def test_what_is_no_adapter_of_it_is_an_error(checkpoints, tmp_path):
    base, pick = str(checkpoints / "base"), str(checkpoints / "pick")
    with pytest.raises(ValueError, match="has no weights beside those of"):
        ServedModels(base, {"pick": base})
    with pytest.raises(ValueError, match="is an adapter itself"):
        ServedModels(pick, {"pick": pick})
    with pytest.raises(FileNotFoundError, match="adapter pick: no such folder"):
        ServedModels(base, {"pick": "./nowhere"})
    with pytest.raises(ValueError, match="Expected adapters' names of letters"):
        ServedModels(base, {"pick me": pick})
    with pytest.raises(ValueError, match=r"A dataset is given for \['place'\]"):
        ServedModels(base, {"pick": pick}, {"place": "place_data"})
    with pytest.raises(ValueError, match="this checkpoint knows .'pick_data'."):
        ServedModels(base, {"pick": pick}, {"pick": "metaworld"})
    policy = ServedModels(base, {"pick": pick}).policy()
    other = type(policy.model).from_pretrained(base)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    other.save_pretrained(tmp_path)
    policy.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not one of .* weights of the model that it adapts are others"):
        ServedModels(str(tmp_path), {"pick": pick})


@pytest.mark.parametrize("checkpoints", ["tinyvla"], indirect=True)
def test_an_adapter_on_the_hub_is_no_checkpoint_for_others(checkpoints, hub):
    hub.upload("somebody/pick", checkpoints / "pick", kind="model")
    with pytest.raises(ValueError, match="'somebody/pick' is an adapter itself: serve the model"):
        ServedModels("somebody/pick", {"pick": str(checkpoints / "place")})


def test_what_cannot_predict_is_not_served(checkpoints, tmp_path):
    base, broken = checkpoints / "base", tmp_path / "broken"
    shutil.copytree(checkpoints / "pick", broken)
    weights = load_file(broken / "adapter_model.safetensors")
    for weight in weights.values():
        weight.fill_(torch.nan)
    save_file(weights, broken / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="The adapter 'broken' cannot predict, tried with black pictures"):
        ServedModels(str(base), {"pick": str(checkpoints / "pick"), "broken": str(broken)})
