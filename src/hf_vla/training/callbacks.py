"""Callbacks for the Trainer."""

import logging
import signal
import threading
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


class EvaluationLeft(SystemExit):
    """An evaluation was broken off by SIGTERM."""


class StopOnTermination(TrainerCallback):
    """Saves a checkpoint and stops when the process is told to end (SIGTERM), as slurm does before it takes a node.

    One process that is told is enough. The training leaves by `SystemExit(143)`, the exit status of a process that
    SIGTERM ended, so that nothing takes it for finished.
    """

    def __init__(self):
        self._in_training, self._told, self._leaves, self._former = False, False, False, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen for the signal; only a main thread can."""
        self._in_training, self._told, self._leaves = True, False, False
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, number, frame):
        self._told = True

    def _any_told(self, args):
        told = torch.tensor(self._told, device=args.device, dtype=torch.int)
        if args.world_size > 1:
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told.item())

    def on_step_end(self, args, state, control, **kwargs):
        """Save instead of evaluating: time is short."""
        if self._any_told(args):
            self._leaves = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args, state, control, **kwargs):
        """Leave an evaluation within a training, which then saves.

        Raises:
            EvaluationLeft: the process was told to end.
        """
        if self._in_training and self._any_told(args):
            self._leaves = control.should_training_stop = True
            raise EvaluationLeft(128 + signal.SIGTERM)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave if the signal came before the end."""
        self.listen_no_longer()
        if self._leaves:
            raise SystemExit(128 + signal.SIGTERM)

    def listen_no_longer(self) -> None:
        """Give the signal back to whoever had it."""
        self._in_training = False
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
            self._former = None
