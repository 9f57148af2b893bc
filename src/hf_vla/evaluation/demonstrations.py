"""Demonstrations: a simulator's expert solves its tasks, in processes of their own.

A demonstration follows from its task, its seed and the plan alone, wherever and after whatever it is made.
"""

import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any

import numpy as np

from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED, RENDERINGS, Expert, SimulatedTask
from hf_vla.evaluation.envs.experts.registry import expert
from hf_vla.evaluation.envs.registry import simulator
from hf_vla.evaluation.workers import SimulatorOptions, die_with_parent, start_shielded

ACTION = "action"
ATTEMPTS = 3  # a worker that dies or hangs so often over one demonstration will do so again
SILENCE_S = 120.0  # without a frame for so long, a worker hangs; to build a simulator takes seconds


@dataclass(frozen=True)
class RecordingPlan:
    """What decides a recording.

    Args:
        env (`str`): name of the simulator.
        tasks (`tuple[str, ...]`): tasks, in the order in which they are recorded.
        episodes (`int`): episodes of every task to keep.
        cameras (`dict[str, tuple[int, int]]`, *optional*): width and height in pixels of every camera; the simulator's
            choice by default.
        rendering (`str`): "fast" or "full".
        noise (`float`): standard deviation of what is added to the actions that are executed, but not to those that
            are recorded, in halves of their range; none is added to the gripper.
        noise_steps (`int`): above 1, each draw lasts for so many control steps and is followed by a rest of twice as
            many: at a high rate noise of single steps leads nowhere, while after a push the expert shows how to come
            back.
        first_seed (`int`): of the first episode of every task; the others count up from it.
        horizon (`int`, *optional*): steps after which an attempt has failed; the simulator's by default.

    Raises:
        ValueError: one of them is unknown or out of range.

    Source: DART, https://arxiv.org/abs/1703.09327 (noise)
    """

    env: str
    tasks: tuple[str, ...]
    episodes: int
    cameras: dict[str, tuple[int, int]] | None = None
    rendering: str = "fast"
    noise: float = 0.0
    noise_steps: int = 1
    first_seed: int = FIRST_RECORDING_SEED
    horizon: int | None = None

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("Expected a task or more to record, came none.")
        simulator(self.env).select(",".join(self.tasks))
        if self.rendering not in RENDERINGS:
            raise ValueError(f"Expected a rendering among {RENDERINGS}, came {self.rendering!r}.")
        for name in ("episodes", "horizon", "noise_steps"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"Expected {name} to be 1 or more, came {count}.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"Expected noise in [0, 1], a share of half the actions' range, came {self.noise}.")
        if self.first_seed < FIRST_RECORDING_SEED:
            raise ValueError(
                f"Expected a first seed of {FIRST_RECORDING_SEED:,} or more, came {self.first_seed:,}: evaluations "
                "use the seeds below, and must not begin as a demonstration does."
            )

    def make(self, task: str) -> SimulatedTask:
        """Build the simulator for a task; see [`~hf_vla.evaluation.envs.base.SimulatedTask`] for what it raises."""
        options = SimulatorOptions(simulator(self.env), self.cameras, rendering=self.rendering, horizon=self.horizon)
        return options.make(task)


def demonstrate(
    env: SimulatedTask, actor: Expert, seed: int, noise: float = 0.0, noise_steps: int = 1
) -> Iterator[dict[str, Any]]:
    """Let an expert act until the episode ends; `env.success` says then whether it solved the task.

    Args:
        env (`SimulatedTask`): to act in.
        actor (`Expert`): of this environment.
        seed (`int`): decides the initial state and the noise.
        noise (`float`), noise_steps (`int`): see [`RecordingPlan`].

    Yields:
        `dict`: an observation, and under "action" what the expert wanted to do then, `(D,)` float32, robot units.
    """
    env.restart(seed)
    actor.reset()
    low, high = env.action_space.low, env.action_space.high
    spread = noise * (high - low) / 2
    if env.action_spec.gripper is not None:
        spread[env.action_spec.gripper.index] = 0.0
    random = np.random.default_rng([seed, zlib.crc32(env.task.encode())])
    ended, push = False, 0.0
    while not ended:
        action = np.clip(actor.act(), low, high).astype(np.float32)
        yield {**env.observe(), ACTION: action}
        if env.episode_length % noise_steps == 0:
            rests = noise_steps > 1 and env.episode_length // noise_steps % 3
            push = 0.0 if rests else spread * random.standard_normal(action.shape)
        ended = any(env.advance(action + push))


@dataclass
class Demonstration:
    """An attempt to demonstrate a task.

    Args:
        task (`str`), seed (`int`): which.
        success (`bool`): whether the task was solved.
        frames (`list[dict]`): of [`demonstrate`].
        restarts (`list[str]`): why the attempt had to be begun anew.
    """

    task: str
    seed: int
    success: bool = False
    frames: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)


class Demonstrators:
    """Processes that make demonstrations.

    One that dies or hangs is replaced, and what it was doing is done again. Leaving the `with` ends them all.

    Args:
        plan (`RecordingPlan`): for all of them.
        processes (`int`): how many.
    """

    def __init__(self, plan: RecordingPlan, processes: int):
        self._workers = [_Worker(plan) for _ in range(processes)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(processes)  # one waits for each process

    def submit(self, task: str, seed: int) -> "Future[Demonstration]":
        """Ask for a demonstration.

        Returns:
            `Future[Demonstration]`: its `result()` raises what the simulator raises, or a ChildProcessError if several
            processes died or hung over it.
        """
        return self._threads.submit(self._demonstrate, task, seed)

    def _demonstrate(self, task, seed):
        worker = self._idle.get()
        try:
            return worker.demonstrate(task, seed)
        finally:
            self._idle.put(worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()


class _Worker:
    """One process at a time, started when there is something to do."""

    def __init__(self, plan):
        self._plan, self._process, self._closed = plan, None, False

    def demonstrate(self, task, seed) -> Demonstration:
        restarts: list[str] = []
        while not self._closed:
            done = Demonstration(task, seed, restarts=restarts)
            try:
                return self._fill(done)
            except (EOFError, ConnectionError, TimeoutError) as error:
                self._kill()
                hung = isinstance(error, TimeoutError)
                what = f"said nothing for {SILENCE_S:g} s" if hung else f"died, exit code {self._process.exitcode},"
                restarts.append(f"the process {what} at step {len(done.frames)}")
            if len(restarts) == ATTEMPTS:
                break
        raise ChildProcessError(f"{task}, seed {seed}, cannot be demonstrated: {'; '.join(restarts)}.")

    def _fill(self, done):
        if self._process is None or not self._process.is_alive():
            spawn = get_context("spawn")  # a simulator's graphics survive no fork
            self._connection, others = spawn.Pipe()
            process = spawn.Process(target=_work, args=(others, self._plan), daemon=True)
            start_shielded(process)
            self._process = process  # not before: what has not started cannot be killed
            others.close()  # or the end of the process would go unnoticed
        self._connection.send((done.task, done.seed))
        while True:
            if not self._connection.poll(SILENCE_S):
                raise TimeoutError
            match self._connection.recv():
                case bool(success):
                    done.success = success
                    return done
                case Exception() as error:
                    raise error
                case frame:
                    done.frames.append(frame)

    def _kill(self):
        self._process.kill()
        self._process.join()

    def close(self):
        self._closed = True
        if self._process is not None:
            self._kill()


def _work(connection, plan):
    """Make the demonstrations asked for through a connection: every frame, and then whether it was a success."""
    die_with_parent()
    env = None
    try:
        while True:
            task, seed = connection.recv()
            if env is None or env.task != task:
                if env is not None:
                    env.close()
                env = plan.make(task)
                actor = expert(plan.env)(env)
            for frame in demonstrate(env, actor, seed, plan.noise, plan.noise_steps):
                connection.send(frame)
            connection.send(env.success)
    except (EOFError, ConnectionError):
        pass  # the recording has ended
    except (ValueError, OSError, ImportError) as error:  # what a user can mend; anything else ends the process
        connection.send(error)
