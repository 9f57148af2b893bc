"""The one thread that runs the model: requests of several clients wait here, and those that can share a batch do."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_vla.models.backbones import PromptTooLong
from hf_vla.policy import TASK, Policy, predict_chunks
from hf_vla.serving.protocol import RefusedRequest

logger = logging.getLogger(__name__)

MAX_WINDOW_S = 60


@dataclass(frozen=True)
class Prediction:
    """What a request gets.

    Args:
        actions (`np.ndarray` of shape `(chunk_size, action_dim)`): float32, robot units.
        reasoning (`str`, *optional*): under which they were predicted.
        queue_s (`float`), infer_s (`float`): seconds it waited, and those of the model.
        mates (`int`): requests that were answered together, itself included.
    """

    actions: np.ndarray
    reasoning: str | None
    queue_s: float
    infer_s: float
    mates: int


@dataclass(eq=False)
class _Job:
    policy: Policy
    observation: dict[str, Any]
    reasoning: str | None
    arrived: float = field(default_factory=time.monotonic)
    future: Future = field(default_factory=Future)

    def __post_init__(self):
        # equal for those that may share a batch: prompts of one instruction are as long as each other
        self.alone = self.policy.talks(self.observation, self.reasoning)
        self.kind = id(self.policy.model), self.observation[TASK], self.reasoning, self if self.alone else None


class Engine:
    """Predicts for clients that do not know of each other, in one thread.

    A batch has always `batch_size` rows, filled up with copies: to the last bit an answer is the one that a client who
    is alone gets. Requests of one model and one instruction share it, the longest waiting first.

    Args:
        batch_size (`int`): rows of every call of the model. 1: nobody shares.
        window_s (`float`): for how long a request waits for others, at most; it does not wait where everybody who is
            connected is already there.
        max_queue (`int`): requests that may wait; one more is refused.
        observe (`Callable[[int, float], None]`): told how many requests each call of the model answered, and its
            seconds.

    Raises:
        ValueError: the window is no time, or a very long one.
    """

    def __init__(
        self,
        batch_size: int = 1,
        window_s: float = 0.005,
        max_queue: int = 256,
        observe: Callable[[int, float], None] = lambda requests, seconds: None,
    ):
        if not 0 <= window_s <= MAX_WINDOW_S:
            raise ValueError(f"Expected a window of 0 to {MAX_WINDOW_S} seconds, came {window_s}.")
        self.batch_size, self.window_s, self.max_queue = batch_size, window_s, max_queue
        self._observe = observe
        self.clients = 0  # connected, each of whom asks one thing at a time
        self._waiting: list[_Job] = []
        self._changed, self._stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="hf-vla-engine", daemon=True)
        self._thread.start()

    def submit(self, policy: Policy, observation: dict[str, Any], reasoning: str | None = None) -> Future:
        """Ask for a chunk. Cancelled before its turn, it is not predicted.

        Args:
            policy ([`~hf_vla.policy.Policy`]): of this client alone, who leaves it in peace until the answer is there.
            observation (`dict`), reasoning (`str`, *optional*): see [`~hf_vla.policy.Policy.check`].

        Returns:
            `Future` of a [`Prediction`]; it raises [`~hf_vla.serving.protocol.RefusedRequest`].

        Raises:
            RefusedRequest: too many requests are waiting, or the engine has been stopped.
        """
        job = _Job(policy, observation, reasoning)
        with self._changed:
            if self._stopped:
                raise RefusedRequest("stopping", "The server is stopping.")
            self._forget_cancelled()
            if len(self._waiting) >= self.max_queue:
                raise RefusedRequest(
                    "overloaded", f"{self.max_queue} requests are waiting already; ask again in a moment."
                )
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    @property
    def queue_length(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Answer what is waiting, and end the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _work(self):
        batch: list[_Job] = []
        try:
            while batch := self._next():
                running = [job for job in batch if job.future.set_running_or_notify_cancel()]
                if running:
                    self._predict(running)
        finally:  # nobody waits for a thread that has failed
            with self._changed:
                self._stopped, left = True, [*batch, *self._waiting]
            for job in left:
                with suppress(InvalidStateError):  # answered, or cancelled
                    job.future.set_exception(RefusedRequest("internal", "The model's thread failed; see the log."))

    def _next(self) -> list[_Job]:
        """The next batch; empty when stopped."""
        with self._changed:
            while True:
                self._forget_cancelled()
                if not self._waiting:
                    if self._stopped:
                        return []
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                batch = [job for job in self._waiting if job.kind == first.kind][: self.batch_size]
                left = first.arrived + self.window_s - time.monotonic()
                full = len(batch) == self.batch_size or first.alone or len(self._waiting) >= self.clients
                if full or left <= 0 or self._stopped:
                    self._waiting = [job for job in self._waiting if job not in batch]
                    return batch
                self._changed.wait(left)

    def _forget_cancelled(self):
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]

    def _predict(self, batch: Sequence[_Job]):
        begun = time.monotonic()
        try:
            chunks = predict_chunks(
                [job.policy for job in batch],
                [job.observation for job in batch],
                [job.reasoning for job in batch],
                self.batch_size,
            )
        except Exception as error:
            if len(batch) > 1:  # one of them is to blame, the others are not
                for job in batch:
                    self._predict([job])
                return
            batch[0].future.set_exception(_refusal(batch[0], error))
            return
        infer_s = time.monotonic() - begun
        self._observe(len(batch), infer_s)
        for job, chunk in zip(batch, chunks, strict=True):
            reasoning = job.policy.reasoning
            job.future.set_result(Prediction(chunk, reasoning, begun - job.arrived, infer_s, len(batch)))


def _refusal(job, error):
    """Whose fault it was: the observation's, of which nothing can be made for the model, else the server's."""
    if isinstance(error, PromptTooLong):
        return RefusedRequest("observation", str(error))
    try:
        job.policy.request(job.observation, job.reasoning)
    except ValueError as unusable:
        return RefusedRequest("observation", str(unusable))
    except Exception as same:
        error = same
    logger.error("event=prediction_failed", exc_info=error)
    return RefusedRequest("internal", "The prediction failed; the server's log says why.")
