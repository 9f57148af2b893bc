from pathlib import Path

import pytest

from hf_vla.training.arguments import load_recipe

RECIPE = Path(__file__).parents[2] / "scripts" / "recipes" / "spatialvla_tiny.yaml"


@pytest.fixture(scope="session")
def make_recipe(demos):
    """The tiny recipe, made short: two episodes held out, four rows a step, a checkpoint every three steps."""

    def make(output_dir, **overrides):
        short = {
            "data.source": str(demos),
            "data.eval_episodes": [3, 7],
            "training.output_dir": str(output_dir),
            "training.max_steps": 6,
            "training.per_device_train_batch_size": 4,
            "training.warmup_steps": 0,
            "training.logging_steps": 1,
            "training.eval_strategy": "no",
            "training.eval_action_samples": 6,
            "training.save_steps": 3,
            "training.disable_tqdm": True,
        }
        return load_recipe(RECIPE, short | {name.replace("__", "."): value for name, value in overrides.items()})

    return make
