"""Robots that share one action head, and the next one that learns in front of it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

LATENT_DIM = 6
UNET = {"type": "conditional_unet1d", "down_dims": [16, 32], "diffusion_step_embed_dim": 16}
HEADS = {
    "regression": {"type": "regression", "hidden_dim": 64},
    "classification": {"type": "classification", "num_bins": 16, "hidden_dim": 64},
    "diffusion": {"type": "diffusion", "denoiser": UNET},
    "flow_matching": {"type": "flow_matching", "denoiser": UNET},
}
LEARNING = sorted(HEADS.keys() - {"classification"})
ALOHA = {"action_dim": 4, "state_dim": 5}


def other_robot(batch, action_dim=4, state_dim=5):
    """What a second robot does and feels under the same prompts: none of its numbers means what the first's did."""
    generator = torch.Generator().manual_seed(4)
    first = batch["actions"][..., [1, 0, 2]] * torch.tensor([-1.0, 1.0, -1.0])
    extra = torch.rand(*first.shape[:2], max(action_dim - 3, 0), generator=generator)
    actions = torch.cat([first, extra], -1)[..., :action_dim]
    return {**batch, "actions": actions, "state": torch.randn(len(first), state_dim, generator=generator)}


def repeated(batch, times):
    """More noise and times for the same samples."""
    return {name: torch.cat([value] * times) for name, value in batch.items()}


def learn(model, batch, parameters, steps, embodiment=None):
    """Every step has noise and times of its own, the same ones in every training."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model(**batch, embodiment=embodiment, generator=generator).loss.backward()
        optimizer.step()


def teach_head(model, batch, steps):
    """The head alone, from what the backbone says once."""
    given = {name: batch[name] for name in batch.keys() - {"actions", "action_mask", "state"}}
    with torch.no_grad():
        features = model.condition(model.encode(**given))
        latents = model.embodiments["default"].decoder.inverse(batch["actions"])
    optimizer = torch.optim.Adam(model.action_head.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model.action_head.loss(*features, latents, batch["action_mask"], batch["state"], generator).mean().backward()
        optimizer.step()


@torch.no_grad()
def mean_loss(model, batch, embodiment, seeds=range(1000, 1020)):
    """Over noise and times that no training had."""
    return sum(
        model(**batch, embodiment=embodiment, generator=torch.Generator().manual_seed(seed)).diffusion_loss.item()
        for seed in seeds
    ) / len(seeds)


@pytest.fixture(scope="session", params=sorted(HEADS))
def shared(request, make_model):
    """A model whose head denoises latents, for every head, untrained; not to be changed."""
    return make_model(head_config=HEADS[request.param], latent_dim=LATENT_DIM)


@pytest.fixture(scope="session")
def pretrained(make_model):
    """By head: a model whose head knows what the default robot does, not to be changed; made on first use."""
    models = {}

    def make(head, batch):
        if head not in models:
            models[head] = make_model(head_config=HEADS[head], latent_dim=LATENT_DIM)
            teach_head(models[head], repeated(batch, 64), 60 if head == "regression" else 300)
        return copy.deepcopy(models[head])

    return make


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def prefix(name):
    return f"embodiments.{name}."


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(
    "head", [pytest.param(head, marks=[pytest.mark.slow] * (head == "flow_matching")) for head in LEARNING]
)
def test_a_new_robot_learns_in_front_of_a_frozen_head(pretrained, batch, head, by_hand):
    model, other = pretrained(head, batch), repeated(other_robot(batch), 4)
    torch.manual_seed(0)
    model.add_embodiment("aloha", **ALOHA)
    if by_hand:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefix("aloha")))
    else:
        model.train_embodiment("aloha")
    before, untrained = weights(model), mean_loss(model, other, "aloha")
    learn(model, other, model.parameters(), 60, "aloha")
    after, trained = weights(model), mean_loss(model, other, "aloha")
    known = mean_loss(model, repeated(batch, 4), "default")  # of the robot that taught the head
    assert trained - known < 0.3 * (untrained - known)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(prefix("aloha"))}


def test_smaller_latents_than_actions_learn_too(pretrained, batch):
    model, other = pretrained("regression", batch), other_robot(batch, action_dim=8)
    model.add_embodiment("large", action_dim=8, state_dim=5)
    model.train_embodiment("large")
    with torch.no_grad():
        first = model(**other, embodiment="large")
    learn(model, other, model.parameters(), 60, "large")
    with torch.no_grad():
        last = model(**other, embodiment="large")
    assert last.diffusion_loss < 0.6 * first.diffusion_loss
    assert 0 < last.reconstruction_loss < 0.6 * first.reconstruction_loss
    total = last.diffusion_loss + last.ntp_loss + last.reconstruction_loss
    volume = model.embodiments["large"].decoder.volume_loss()
    torch.testing.assert_close(last.loss, total + volume, rtol=0, atol=1e-6)


def test_a_frozen_classifier_is_refused(make_model, batch):
    """Its bins have no gradient."""
    model = make_model(head_config=HEADS["classification"], latent_dim=LATENT_DIM)
    model.train_embodiment("default")
    with pytest.raises(ValueError, match="ClassificationHead, whose loss has no gradient for latents"):
        model(**batch)
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


def test_while_the_head_learns_decoders_stay_as_they_are(shared, batch):
    """They have no gradient, not even 0, with which weight decay would move them; the entry of the state learns."""
    model = copy.deepcopy(shared)
    before = weights(model)
    model(**batch).loss.backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(".decoder." in name for name in learns)
    assert {"embodiments.default.state_encoder.weight", "film.film.scale.weight"} < learns
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5).step()
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before if ".decoder." in name)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("action_head.") for name in moved)


def test_until_they_learn_robots_share_the_head_as_if_latents_were_actions(shared, batch):
    """A direct head of the latents' size, given actions and zeros, says the same."""
    actions = torch.nn.functional.pad(batch["actions"], (0, LATENT_DIM - 3))
    mask = torch.ones(actions.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        output = shared(**batch, generator=torch.Generator().manual_seed(0))
        given = {name: value for name, value in batch.items() if name not in ("actions", "action_mask", "state")}
        features = shared.condition(shared.encode(**given))
        generator = torch.Generator().manual_seed(0)
        direct = shared.action_head.loss(*features, actions, mask, batch["state"], generator)
    torch.testing.assert_close(output.diffusion_loss, direct.mean(), rtol=0, atol=1e-6)
    assert output.reconstruction_loss == 0


def test_several_robots_in_turn_teach_one_head(make_model, batch):
    model, other = make_model(head_config=HEADS["regression"], latent_dim=LATENT_DIM), other_robot(batch)
    model.add_embodiment("aloha", **ALOHA)
    robots = {"default": batch, "aloha": other}
    before = {name: mean_loss(model, data, name, range(1)) for name, data in robots.items()}
    optimizer = torch.optim.Adam([*model.action_head.parameters(), *model.embodiments.parameters()], lr=5e-3)
    for _ in range(60):
        for name, data in robots.items():
            optimizer.zero_grad()
            model(**data, embodiment=name).loss.backward()
            optimizer.step()
    after = {name: mean_loss(model, data, name, range(1)) for name, data in robots.items()}
    assert all(after[name] < 0.2 * before[name] for name in robots)


@pytest.mark.parametrize("value", [1e9, float("nan")])
@pytest.mark.parametrize("action_dim", [4, 8])
def test_masked_actions_change_no_bit_of_loss_and_gradients(make_model, batch, value, action_dim):
    model = make_model(head_config=HEADS["regression"], latent_dim=LATENT_DIM)
    model.add_embodiment("aloha", action_dim=action_dim, state_dim=5)
    model.train_embodiment("aloha")
    with torch.no_grad():
        for parameter in model.embodiments["aloha"].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
    other, mask = other_robot(batch, action_dim), torch.tensor([[True] * 4, [True, False, True, False]])

    def run(actions):
        model.zero_grad()
        loss = model(**{**other, "actions": actions, "action_mask": mask}, embodiment="aloha").loss
        loss.backward()
        return [loss, *(parameter.grad.clone() for parameter in model.embodiments["aloha"].parameters())]

    before = run(other["actions"])
    after = run(other["actions"].masked_fill(~mask[..., None], value))
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert all(gradient.isfinite().all() for gradient in after)


@pytest.mark.parametrize("use_film", [True, False])
def test_predictions_are_the_robots(make_model, prompt, shared, use_film):
    head = shared.config.head_config
    model = shared if use_film else make_model(head_config=head, latent_dim=LATENT_DIM, use_film=False)
    model = copy.deepcopy(model)
    for name, action_dim in (("aloha", 4), ("large", 8)):
        model.add_embodiment(name, action_dim=action_dim)
        output = model.predict_action(**prompt, embodiment=name, generator=torch.Generator().manual_seed(0))
        assert output.actions.shape == (2, 4, action_dim) and output.actions.dtype == torch.float32
    first = model.predict_action(**prompt, embodiment="default", generator=torch.Generator().manual_seed(0))
    second = model.predict_action(**prompt, embodiment="aloha", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second.actions[..., :3], first.actions, rtol=0, atol=1e-6)


def test_noise_is_of_latents(make_model, prompt):
    model = make_model(head_config=HEADS["flow_matching"], latent_dim=LATENT_DIM)
    noise = torch.randn(2, 4, LATENT_DIM, generator=torch.Generator().manual_seed(0))
    output = model.predict_action(**prompt, noise=noise)
    drawn = model.predict_action(**prompt, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output.actions, drawn.actions) and output.actions.shape == (2, 4, 3)
    with pytest.raises(ValueError, match="noise of shape"):
        model.predict_action(**prompt, noise=noise[..., :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_decoders_are_saved(pretrained, batch, prompt, tmp_path, dtype):
    pretrained("regression", batch).save_pretrained(tmp_path / "first")
    model = AutoModel.from_pretrained(tmp_path / "first", dtype=dtype)
    model.add_embodiment("aloha", **ALOHA)
    model.train_embodiment("aloha")
    other = other_robot(batch)
    learn(model, other, model.parameters(), 3, "aloha")
    assert {parameter.dtype for parameter in model.embodiments["aloha"].parameters()} == {dtype}
    model.save_pretrained(tmp_path / "second")
    loaded = AutoModel.from_pretrained(tmp_path / "second", dtype=dtype)
    assert loaded.config.embodiments == {"default": {"action_dim": 3, "state_dim": 2}, "aloha": ALOHA}
    expected = weights(model)
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())
    for name, state in (("aloha", other["state"]), ("default", batch["state"])):
        given = {**prompt, "state": state, "embodiment": name}
        assert torch.equal(loaded.predict_action(**given).actions, model.predict_action(**given).actions)


@pytest.fixture
def two(make_model):
    """A model of two robots, "default" and "aloha"."""
    model = make_model(latent_dim=LATENT_DIM)
    model.add_embodiment("aloha", **ALOHA)
    return SimpleNamespace(model=model)


def test_a_robot_is_to_be_named_where_there_are_several(two, batch, prompt):
    for name in (None, "franka"):
        for call, given in ((two.model, batch), (two.model.predict_action, prompt)):
            with pytest.raises(ValueError, match=r"No embodiment .*knows \['aloha', 'default'\]"):
                call(**given, embodiment=name)
    with pytest.raises(ValueError, match="No embodiment 'franka'"):
        two.model.train_embodiment("franka")


def test_a_model_of_one_robot_takes_no_name_and_no_second(model, batch):
    with pytest.raises(ValueError, match="knows one robot only"):
        model(**batch, embodiment="default")
    with pytest.raises(ValueError, match="build it with latent_dim"):
        copy.deepcopy(model).add_embodiment("aloha", **ALOHA)


@pytest.mark.parametrize(
    ("name", "sizes", "text"),
    [
        ("aloha", ALOHA, "There is an embodiment 'aloha' already"),
        ("a.b", ALOHA, "a word without points"),
        ("", ALOHA, "a word without points"),
        ("large", {"action_dim": 0}, "action_dim of 1 or more"),
        ("large", {"action_dim": 3, "state_dim": 0}, "state_dim of 1 or more"),
    ],
)
def test_embodiments_that_cannot_be_are_refused(two, name, sizes, text):
    before = copy.deepcopy(two.model.config.embodiments)
    with pytest.raises(ValueError, match=text):
        two.model.add_embodiment(name, **sizes)
    assert two.model.config.embodiments == before and set(two.model.embodiments) == {"default", "aloha"}


def test_sizes_of_another_robot_are_refused(two, batch):
    other = other_robot(batch)
    with pytest.raises(ValueError, match="state of 5 numbers, as this embodiment has, came 2"):
        two.model(**{**other, "state": batch["state"]}, embodiment="aloha")
    with pytest.raises(ValueError, match="actions of 4 numbers, as this embodiment has, came 3"):
        two.model(**{**other, "actions": batch["actions"]}, embodiment="aloha")
    with pytest.raises(ValueError, match="state of 5 numbers.*came None"):
        two.model(**{**other, "state": None}, embodiment="aloha")


def test_latents_that_samples_are_clipped_short_of_are_refused(make_model, batch):
    """By a head that learns them; a frozen one cannot be taught anything wrong."""
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
    clips = {"type": "diffusion", "denoiser": UNET, "scheduler": scheduler}
    wider = {**clips, "scheduler": {**scheduler, "clip_sample_range": 2.5}}
    for head in (HEADS["classification"], HEADS["diffusion"], clips, wider, HEADS["flow_matching"]):
        model = make_model(head_config=head, latent_dim=LATENT_DIM)
        model(**batch)
        torch.nn.init.constant_(model.embodiments["default"].decoder.origin, 1.4)
        if head is wider or head["type"] == "flow_matching":
            model(**batch)
            continue
        with pytest.raises(ValueError, match=r"latents in \[-1, 1\], which .* clipped to"):
            model(**batch)
        model.action_head.requires_grad_(False)
        with torch.no_grad():
            assert model(**batch).loss.isfinite()
        model.action_head.requires_grad_(True)
        model.embodiments["default"].decoder.reset_parameters()
        model(**batch)


def test_actions_beyond_the_bound_are_the_datas_own(make_model, batch):
    """Untrained latents are no further out than the actions, of which a head without latents says nothing either."""
    model = make_model(head_config=HEADS["diffusion"], latent_dim=LATENT_DIM)
    assert model(**{**batch, "actions": 3 * batch["actions"]}).loss.isfinite()


def test_checkpointing_changes_no_gradient_of_an_embodiment(make_model, batch):
    model = make_model(head_config=HEADS["regression"], latent_dim=LATENT_DIM)
    model.train_embodiment("default")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.embodiments.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert any(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("head", ["diffusion", "flow_matching"])
def test_a_callback_sees_actions_not_latents(make_model, prompt, head):
    model = make_model(head_config=HEADS[head], latent_dim=LATENT_DIM)
    with torch.no_grad():
        model.embodiments["default"].decoder.origin.add_(0.5)  # no longer the identity
    seen = []
    options = {"num_inference_steps": 3, "max_reasoning_tokens": 2}
    output = model.predict_action(
        **prompt, **options, generator=torch.Generator().manual_seed(0), callback=lambda *step: seen.append(step)
    )
    assert [step for step, _ in seen] == [0, 1, 2] and torch.equal(seen[-1][1], output.actions)
    assert seen[0][1].shape == output.actions.shape
