"""The numeric examples of the action-representation chapter, section 2: two right actions, and sizes of gradients."""

from pathlib import Path

import draw_mode_averaging as example
import pytest
import torch
from PIL import Image

GENERATIVE = ("classification", "diffusion", "flow_matching")


@pytest.fixture(scope="module")
def heads():
    """All four, trained for seconds on 0.5 N(-0.1, 0.01^2) + 0.5 N(+0.1, 0.01^2) metres."""
    return {name: example.train(name) for name in example.HEADS}


def distance_to_nearest_mode(answers):
    return (answers[:, None] - torch.tensor(example.MODES)).abs().min(1).values


def test_the_demonstrations_are_the_chapters():
    actions = example.demonstrations(20_000, torch.Generator().manual_seed(0))
    distance = distance_to_nearest_mode(actions)
    assert actions.mean().abs() < 0.003 and (actions < 0).float().mean() == pytest.approx(0.5, abs=0.02)
    assert distance.square().mean().sqrt() == pytest.approx(0.01, rel=0.03)


def test_regression_answers_the_mean_where_no_action_is_right(heads):
    answers = example.answers(heads["regression"])
    assert (answers == answers[0]).all() and answers[0].abs() < 0.01
    assert distance_to_nearest_mode(answers).min() > 0.09


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_other_heads_answer_with_both_modes(heads, name):
    answers = example.answers(heads[name])
    distance = distance_to_nearest_mode(answers)
    assert (distance < 3 * example.SPREAD).float().mean() >= 0.9  # of the demonstrations themselves 99.7 %
    assert 0.4 < (answers < 0).float().mean() < 0.6
    assert 0.004 < distance.mean() < 0.012  # of the demonstrations themselves 0.008 m
    assert answers.unique().numel() > 20  # spread, not one value for each mode


def test_decoding_decides_whether_classification_averages(heads, monkeypatch):
    head = heads["classification"]
    monkeypatch.setattr(head, "decoding", "expectation")
    assert example.answers(head).abs().max() < 0.015
    monkeypatch.setattr(head, "decoding", "argmax")
    assert distance_to_nearest_mode(example.answers(head)).max() < 0.03


def test_the_chapters_gradients_come_out_of_the_heads_losses():
    regression, diffusion = example.chapter_gradients()
    in_metres = regression * example.UNIT
    torch.testing.assert_close(in_metres, torch.tensor([0.300, 0.002]), rtol=1e-3, atol=1e-6)
    assert regression[0] / regression[1] == pytest.approx(150, rel=1e-3)
    torch.testing.assert_close(diffusion, torch.tensor([0.72, 0.54]), rtol=1e-4, atol=1e-6)
    assert diffusion[0] / diffusion[1] == pytest.approx(1.3333, rel=1e-3)


@pytest.mark.parametrize("demonstrated", [-0.5, 0.0005, 0.5])
def test_gradients_of_denoisers_depend_on_neither_time_nor_action(demonstrated):
    """The same error of noise or velocity weighs the same at every time and for every action: order 1 throughout."""
    actions, noise = torch.full((6,), demonstrated), torch.tensor([1.23, -0.72] * 3)
    error = torch.tensor([-0.36, 0.27] * 3)
    for name, target, times in (
        ("diffusion", noise, {"timesteps": torch.tensor([0, 0, 50, 50, 99, 99])}),
        ("flow_matching", actions - noise, {"times": torch.tensor([0.0, 0.0, 0.5, 0.5, 0.999, 0.999])}),
    ):
        known = {"noise": noise.view(-1, 1, 1), **times}
        found = example.gradients(example.build(name), actions, target + error, **known)
        torch.testing.assert_close(found, 2 * error.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "most"), [("diffusion", 4.0), ("flow_matching", 2.0)])
def test_gradients_stay_large_where_two_actions_are_right(heads, name, most):
    """Measured 2.6 and 1.4: from untrained to trained they fall by a small factor, not by 150."""
    bad, good = example.measured_gradients(name, heads[name])
    assert 1.0 < bad / good < most
    assert 0.3 < good < bad < 3.0


def test_gradients_fall_as_regressions_do_where_one_action_is_right():
    """The limit of the chapter's argument: denoisers that would end at 0.200 m or 0.051 m instead of 0.050 m."""
    action, ends = torch.full((2,), example.DEMONSTRATED), torch.tensor(example.ANSWERS)
    noise, time = torch.tensor([1.23, 1.23]), 0.5
    velocity = (ends - torch.lerp(noise, action, time)) / (1 - time)  # straight to its end
    known = {"noise": noise.view(-1, 1, 1), "times": torch.tensor([time, time])}
    bad, good = example.gradients(example.build("flow_matching"), action, velocity, **known)
    assert bad / good == pytest.approx(150, rel=0.01)


def test_training_and_answers_repeat_under_the_seed(heads):
    again = example.train("regression")
    assert torch.equal(example.answers(again), example.answers(heads["regression"]))
    assert torch.equal(example.answers(heads["diffusion"]), example.answers(heads["diffusion"]))


def test_the_figure_is_drawn_small_enough_for_the_docs(heads, tmp_path):
    example.draw(heads).savefig(tmp_path / "figure.png", dpi=110)
    assert (tmp_path / "figure.png").stat().st_size < 120_000
    published = Path(__file__).parents[3] / "docs" / "mode_averaging.png"
    with Image.open(tmp_path / "figure.png") as drawn, Image.open(published) as image:
        assert drawn.size == image.size
