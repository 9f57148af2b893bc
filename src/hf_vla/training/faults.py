"""What stops a training before its end: a fault, or a signal."""

import signal
import threading

import torch
from transformers import TrainerCallback


class TrainingStopped(ValueError):
    """A training cannot go on; the message says why, and which checkpoint is the last good one."""


def one_line(error: BaseException) -> str:
    """Say in one line what happened, of errors that come from a worker of the data loader as well."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    return lines[-1] if "Original Traceback" in str(error) else f"{type(error).__name__}: {lines[0]}"


class StopOnTermination(TrainerCallback):
    """Saves a checkpoint and stops when the process is told to end (SIGTERM), as slurm does before it takes a node.

    One process that is told is enough. The training leaves by `SystemExit(143)`, the exit status of a process that
    SIGTERM ended, so that nothing takes it for finished.
    """

    def __init__(self):
        self._told, self._stopping, self._former = False, False, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen for the signal; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, number, frame):
        self._told = True

    def on_step_end(self, args, state, control, **kwargs):
        """Save instead of evaluating: time is short."""
        told = torch.tensor(self._told, device=args.device, dtype=torch.int)
        if args.world_size > 1:
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        if told.item():
            self._stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        """Listen no longer, and leave if the signal came before the end."""
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
        if self._stopping and state.global_step < state.max_steps:
            raise SystemExit(128 + signal.SIGTERM)


class RowsOfBatch:
    """A collator whose batches also say, as `rows`, which rows of which dataset they are made of."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, items):
        """Make a batch."""
        batch = self.collator(items)
        batch["rows"] = [(item.get("dataset"), int(item["index"])) for item in items]
        return batch


def describe_rows(rows: list[tuple[str | None, int]]) -> str:
    """Say which rows of which datasets these are."""
    named = {}
    for dataset, row in rows:
        named.setdefault(dataset, []).append(row)
    parts = (f"rows {members}" + (f" of {dataset}" if dataset else "") for dataset, members in named.items())
    return " and ".join(parts) or "unknown rows"
