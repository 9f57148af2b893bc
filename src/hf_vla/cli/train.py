"""`hf-vla train`: a training run from a recipe; `scripts/train.py` is the same for `accelerate launch`."""

import typer


def train(context: typer.Context):
    """Train a VLA from a recipe; --help lists every name in it."""
    import logging

    from accelerate import PartialState

    from hf_vla.hub.card import write_card
    from hf_vla.training import run
    from hf_vla.training.recipe import parse_recipe

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    run.train(parse_recipe(context.args), write_card=write_card)
    # A process that leaves while its group still talks may abort, and take the others with it in mid-save.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
