"""Callbacks for the Trainer."""

import logging
import time

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class SeedOfProcess(TrainerCallback):
    """Gives every process random numbers of its own, where there are several.

    The Trainer seeds all processes alike, so that they build the same model and shuffle alike; the noise and times
    that action heads draw from then on would be the same in each of them.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Seed anew; the order of the data is settled by now, and resuming restores each process's numbers later."""
        if args.world_size > 1:
            torch.manual_seed(args.seed + args.process_index)


class TimeLimit(TrainerCallback):
    """Ends a training in good order after some time; the main process's clock counts for all.

    Args:
        seconds (`float`): from the first step on.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._end = time.monotonic() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        """Stop when the time is over."""
        over = torch.tensor(time.monotonic() > self._end, device=args.device, dtype=torch.int)
        if args.world_size > 1:
            torch.distributed.broadcast(over, 0)
        if over.item():
            logger.warning("Stopped at step %d of %d after %g s.", state.global_step, state.max_steps, self.seconds)
            control.should_training_stop = True
