import pytest

from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import open_datasets


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__config": {"max_action_dim": 6}}, "actions of at most 6 numbers, those of 'robosuite_demos' have 7"),
        ({"model__config": {"max_state_dim": 3}}, "states of at most 3 numbers, those of 'robosuite_demos' have 8"),
        ({"model__grid": {"num_bins": [8, 16, 8, 8, 8, 8]}}, "pi0_vla takes no model.grid"),
    ],
)
def test_what_pi0_has_not_is_refused(make_recipe, tmp_path, overrides, message):
    recipe = make_recipe(tmp_path, "pi0_vla_tiny", **overrides)
    datasets = open_datasets(recipe.data)
    with pytest.raises(ValueError, match=message):
        build(recipe, datasets)
