"""Train a VLA from a recipe: `accelerate launch scripts/train.py --config scripts/recipes/spatialvla_tiny.yaml`.

Every value of the recipe can be overridden: `--training.max_steps 20`.
"""

import logging
import sys

from hf_vla.training.arguments import parse_recipe
from hf_vla.training.trainer import train

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    train(parse_recipe(sys.argv[1:]))
