"""Processes in which environments live: several environments each, a simulator's crash or hanging kept apart.

Pipes carry numpy arrays and plain data between this library's own processes. A process does one thing at a time, so
that the time without an answer is the time that one call of a simulator takes.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from hf_vla.actions.spec import ActionSpec, CameraSpec, StateSpec
from hf_vla.evaluation.envs.base import SimulatedTask

# module -> distribution; what decides how a simulator moves and looks
SIMULATORS = {
    "metaworld": "metaworld",
    "robosuite": "robosuite",
    "libero": "hf-libero",
    "mani_skill": "mani-skill",
    "sapien": "sapien",
    "mujoco": "mujoco",
    "gymnasium": "gymnasium",
}
DEADLINE_S = 120.0  # without an answer for so long, a simulator hangs; to import and build one takes seconds


@dataclass(frozen=True)
class SimulatorOptions:
    """How a process makes its environments.

    Args:
        kind (`type[SimulatedTask]`): the simulator's class.
        cameras (`dict[str, tuple[int, int]]`, *optional*): see [`~hf_vla.evaluation.envs.base.SimulatedTask`].
        depth (`bool`), rendering (`str`): likewise.
        horizon (`int`, *optional*): control steps of an episode; the simulator's own by default.
    """

    kind: type[SimulatedTask]
    cameras: dict[str, tuple[int, int]] | None = None
    depth: bool = False
    rendering: str = "fast"
    horizon: int | None = None

    def make(self, task: str) -> SimulatedTask:
        """Build the environment of a task; see [`~hf_vla.evaluation.envs.base.SimulatedTask`] for what it raises."""
        env = self.kind(task, self.cameras, depth=self.depth, rendering=self.rendering)
        env.horizon = self.horizon or env.horizon
        return env


@dataclass(frozen=True)
class Begun:
    """An episode that has begun, or a task that was looked at: what the simulator says of itself.

    Args:
        observation (`dict`, *optional*): the first.
        picture (`np.ndarray`, *optional*): for a video, where wanted.
        others: see [`~hf_vla.evaluation.envs.base.SimulatedTask`].
        versions (`dict[str, str]`): of what is simulated with.
        refused (`str`): why the cameras wanted are not there, and the default ones are.
    """

    instruction: str
    action_spec: ActionSpec
    state_spec: StateSpec
    camera_specs: dict[str, CameraSpec]
    horizon: int
    observation: dict[str, Any] | None = None
    picture: np.ndarray | None = None
    versions: dict[str, str] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Went:
    """What came of a chunk of actions.

    Args:
        steps (`int`): actions executed; fewer than given where the episode ended.
        success (`bool`), done (`bool`): whether the task is solved; whether the episode is over.
        observations (`list[dict]`): the last one, or those of all steps; without the one at an episode's end.
        pictures (`list[np.ndarray]`): for a video, of every step, where wanted.
    """

    steps: int
    success: bool
    done: bool
    observations: list[dict[str, Any]]
    pictures: list[np.ndarray]


@dataclass(frozen=True)
class Lost:
    """An environment is gone, and so is its episode.

    Args:
        why (`str`): what happened to its process, or what it raised, with the traceback.
        guilty (`bool`): whether it was this environment's turn when it happened.
    """

    why: str
    guilty: bool


class EnvironmentWorkers:
    """Environments in processes; leaving the `with` ends them all.

    Args:
        options (`SimulatorOptions`): of all environments.
        envs (`int`): how many; they are called 0 to `envs - 1`.
        processes (`int`): among which they are divided.
        deadline_s (`float`): time for one call, to import and build the simulator included.
    """

    def __init__(self, options: SimulatorOptions, envs: int, processes: int, deadline_s: float = DEADLINE_S):
        count = min(envs, processes)
        self._processes = [_Process(options, deadline_s) for _ in range(count)]
        self._of = {env: self._processes[env % count] for env in range(envs)}

    def begin(self, env: int, task: str, seed: int, film: bool = False) -> None:
        """Have an environment begin an episode; [`Begun`] will come of it."""
        self._of[env].ask(env, "begin", (task, seed, film))

    def advance(self, env: int, actions: np.ndarray, look_always: bool = False, film: bool = False) -> None:
        """Have actions `(n, action_dim)` executed; [`Went`] will come of it."""
        self._of[env].ask(env, "advance", (actions, look_always, film))

    def describe(self, task: str) -> Begun:
        """Look at a task without beginning an episode; waits.

        Raises:
            ImportError, FileNotFoundError: the simulator or its assets are not installed.
            ChildProcessError: the simulator raises, or its process dies or hangs.
        """
        self._of[0].ask(0, "describe", (task,))
        ((_, answer),) = self.wait()
        if isinstance(answer, Lost):
            raise ChildProcessError(f"{task}: {answer.why}.")
        return answer

    @property
    def busy(self) -> bool:
        """Whether an answer is to be waited for."""
        return any(process.asked for process in self._processes)

    def wait(self, timeout_s: float | None = None) -> list[tuple[int, Begun | Went | Lost]]:
        """Wait for answers, until there are some.

        Args:
            timeout_s (`float`, *optional*): not longer than that; 0 takes what is there.

        Returns:
            `list[tuple]`: environment and answer.

        Raises:
            ImportError, FileNotFoundError: the simulator or its assets are not installed.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        answers: list = []
        while not answers and self.busy:
            asked = [process for process in self._processes if process.asked]
            until = min([process.deadline for process in asked] + [end] * (end is not None))
            ready = connection.wait([each.pipe for each in asked], max(0.0, until - time.monotonic()))
            for process in asked:
                answers += process.answers(process.pipe in ready)
            if end is not None and time.monotonic() >= end:
                break
        return answers

    def __enter__(self):
        for process in self._processes:  # all at once: the imports take a second
            process.start()
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.end()


class _Process:
    """One process at a time; another one is started when there is something to do again."""

    def __init__(self, options, deadline_s):
        self._options, self._deadline_s = options, deadline_s
        self._process: Any = None
        self.asked: deque[int] = deque()  # the environment that does something, and behind it those that wait
        self._alive: set[int] = set()  # environments with an episode in this process

    def start(self):
        spawn = get_context("spawn")  # a simulator's graphics survive no fork
        self.pipe, others = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(others, self._options), daemon=True)
        start_shielded(self._process)
        others.close()  # or the end of the process would go unnoticed

    def ask(self, env, command, arguments):
        if self._process is None:
            self.start()
        if not self.asked:
            self.deadline = time.monotonic() + self._deadline_s
        self.asked.append(env)
        self._alive.add(env)
        try:
            self.pipe.send((env, command, arguments))
        except OSError:
            pass  # it has died; whoever waits for the answer will see

    def answers(self, ready):
        if not ready and time.monotonic() < self.deadline:
            return []
        try:
            if not ready:
                raise TimeoutError
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            return self._lose(isinstance(error, TimeoutError))
        env = self.asked.popleft()
        if isinstance(answer, Exception):
            raise answer
        self.deadline = time.monotonic() + self._deadline_s
        return [(env, answer)]

    def _lose(self, hung):
        guilty, lost = self.asked[0], sorted(self._alive)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        why = f"its process {f'gave no answer for {self._deadline_s:g} s' if hung else f'died, exit code {code}'}"
        self.end()
        self.asked.clear()
        self._alive.clear()
        return [(env, Lost(why, env == guilty)) for env in lost]

    def end(self):
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.pipe.close()
            self._process = None


def _work(pipe, options):
    """Do what comes through a pipe until it is closed."""
    die_with_parent()
    envs: dict[int, SimulatedTask] = {}
    while True:
        try:
            env, command, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = COMMANDS[command](envs, options, env, *arguments)
        except (ImportError, FileNotFoundError) as error:
            answer = error  # something is not installed: no attempt more would help
        except Exception:
            envs.pop(env, None)  # nobody knows what state it is in
            answer = Lost(f"it raised\n{traceback.format_exc()}", guilty=True)
        pipe.send(answer)


def start_shielded(process: BaseProcess) -> None:
    """Start a process that Ctrl-C does not reach, not even while it imports: the first one of a terminal ends it."""
    resource_tracker.ensure_running()  # it would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the process inherits
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent() -> None:
    """End this process when the one that started it has ended, also in the middle of a simulator's work."""

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _describe(envs, options, env, task):
    refused = ""
    try:
        made = options.make(task)
    except ValueError as error:
        made, refused = replace(options, cameras=None).make(task), str(error)
    made.close()
    return replace(_begun(made), refused=refused)


def _begin(envs, options, env, task, seed, film):
    if env in envs and envs[env].task != task:
        envs.pop(env).close()
    if env not in envs:
        envs[env] = options.make(task)
    envs[env].restart(seed)
    return _begun(envs[env], envs[env].observe(), envs[env].render() if film else None)


def _begun(env, observation=None, picture=None):
    said = env.instruction, env.action_spec, env.state_spec, env.camera_specs, env.horizon
    return Begun(*said, observation, picture, simulator_versions())


def simulator_versions() -> dict[str, str]:
    """Distribution -> version, of the simulators that this process has imported."""
    return {name: version(name) for module, name in SIMULATORS.items() if module in sys.modules}


def _advance(envs, options, env, actions, look_always, film):
    made, observations, pictures, steps, done = envs[env], [], [], 0, False
    while steps < len(actions) and not done:
        done = any(made.advance(actions[steps]))
        steps += 1
        if film:
            pictures.append(made.render())
        if not done and (look_always or steps == len(actions)):
            observations.append(made.observe())
    return Went(steps, made.success, done, observations, pictures)


COMMANDS = {"describe": _describe, "begin": _begin, "advance": _advance}
