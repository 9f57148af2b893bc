"""Train a VLA from a recipe: `accelerate launch scripts/train.py --config scripts/recipes/spatialvla_tiny.yaml`.

Every value of the recipe can be overridden: `--training.max_steps 20`.
"""

import logging
import sys

from accelerate import PartialState

from hf_vla.training.recipe import parse_recipe
from hf_vla.training.run import train

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    train(parse_recipe(sys.argv[1:]))
    # A process that leaves while its group still talks may abort, and take the others with it in mid-save.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
