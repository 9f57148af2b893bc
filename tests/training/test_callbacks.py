import logging

import pytest

from hf_vla.training.callbacks import TimeLimit
from hf_vla.training.trainer import train


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 1), (600.0, 3)])
def test_a_time_limit_ends_the_training_and_still_saves(make_recipe, tmp_path, caplog, seconds, steps):
    recipe = make_recipe(tmp_path, training__max_steps=3)
    with caplog.at_level(logging.WARNING):
        train(recipe, callbacks=[TimeLimit(seconds)])
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "trainer_state.json").is_file()
    assert f'"global_step": {steps}' in (tmp_path / "trainer_state.json").read_text()
    assert ("Stopped at step 1 of 3 after 0 s." in caplog.text) == (seconds == 0.0)
