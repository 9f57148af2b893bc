import logging
from types import SimpleNamespace

import pytest
import torch

from hf_vla.training.callbacks import SeedOfProcess, TimeLimit
from hf_vla.training.run import train


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 1), (600.0, 3)])
def test_a_time_limit_ends_the_training_and_still_saves(make_recipe, tmp_path, caplog, seconds, steps):
    recipe = make_recipe(tmp_path, training__max_steps=3)
    with caplog.at_level(logging.WARNING):
        train(recipe, callbacks=[TimeLimit(seconds)])
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "trainer_state.json").is_file()
    assert f'"global_step": {steps}' in (tmp_path / "trainer_state.json").read_text()
    assert ("Stopped at step 1 of 3 after 0 s." in caplog.text) == (seconds == 0.0)


@pytest.mark.parametrize(("world_size", "seeds"), [(1, [100, 100]), (2, [7, 8])])
def test_several_processes_draw_different_numbers(world_size, seeds):
    drawn = []
    for process in range(2):
        torch.manual_seed(100)  # all alike, as the Trainer does
        arguments = SimpleNamespace(world_size=world_size, process_index=process, seed=7)
        SeedOfProcess().on_train_begin(arguments, None, None)
        drawn.append(torch.rand(3).tolist())
    assert drawn == [torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist() for seed in seeds]
