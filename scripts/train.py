"""`hf-vla train` for launchers: `accelerate launch scripts/train.py --config scripts/recipes/spatialvla_tiny.yaml`.

Every value of the recipe can be overridden: `--training.max_steps 20`.
"""

import sys

from hf_vla.cli.main import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
