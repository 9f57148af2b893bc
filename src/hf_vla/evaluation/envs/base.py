"""The interface of every simulated task: a gymnasium environment that speaks LeRobot's names and this library's specs.

Times are control steps, poses metres in the simulator's world frame, actions and states in robot units.
"""

import os
import string
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np

try:
    import gymnasium as gym
except ImportError as error:
    raise ImportError("Simulators need gymnasium: `pip install 'hf-vla[sim]'`, see docs/simulators.md.") from error

from hf_vla.actions.spec import ActionSpec, CameraSpec, StateSpec, whole_number

# MuJoCo looks at these when it is first imported: without a screen it renders by EGL, in software on one thread.
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")

RENDERINGS = ("fast", "full")
FIRST_RECORDING_SEED = 1_000_000  # demonstrations begin here, evaluations at 0
LONGEST_INSTRUCTION = 256  # characters


class SimulatedTask(gym.Env, ABC):
    """One task of a simulator, as a policy meets it.

    The seed alone decides an episode: `reset(seed=3)` gives the same initial state in every process. An observation is
    a dictionary with `observation.images.<camera>` (H, W, 3) uint8, upright, `observation.state` (S,) float32,
    `observation.depth.<camera>` (H, W) float32 in metres where `depth` is wanted, and `task`, the instruction.
    `terminated` is success, `truncated` the end of the horizon; `info["success"]` says whether it succeeded so far.

    Rendering takes most of the time, so that whoever executes a chunk calls `advance` for every action and `observe`
    when the policy wants to look.

    Args:
        task (`str`): one of `tasks()`.
        cameras (`Mapping[str, tuple[int, int]]`, *optional*): width and height in pixels of every camera wanted;
            `default_cameras` otherwise.
        depth (`bool`): whether observations hold depth.
        rendering (`str`): "fast", without shadows, reflections and multisampling, or "full", the simulator's own.

    Attributes:
        name (`str`), robot (`str`): what simulator and robot are called.
        instruction (`str`): what the robot is told.
        action_spec (`ActionSpec`), state_spec (`StateSpec`): what the simulated robot takes and tells.
        camera_specs (`dict[str, CameraSpec]`): with intrinsics; `depth` where it is wanted.
        horizon (`int`): control steps until an episode is given up.

    Raises:
        ValueError: the task, a camera or the rendering is unknown, or a size is none.
        ImportError: the simulator is not installed.
        FileNotFoundError: the simulator's assets are not installed; the text says how to get them.
    """

    name: ClassVar[str]
    robot: ClassVar[str]
    default_cameras: ClassVar[Mapping[str, tuple[int, int]]]
    how_to_install: ClassVar[str] = "`pip install 'hf-vla[sim]'`"
    render_mode = "rgb_array"

    instruction: str
    action_spec: ActionSpec
    state_spec: StateSpec
    camera_specs: dict[str, CameraSpec]
    horizon: int

    def __init__(self, task, cameras=None, depth=False, rendering="fast"):
        if rendering not in RENDERINGS:
            raise ValueError(f"Expected a rendering among {RENDERINGS}, came {rendering!r}.")
        check_known(f"{self.name} task", task, self.tasks())
        self.task, self.depth, self.rendering = task, depth, rendering
        self.sizes = _checked_sizes(self.default_cameras if cameras is None else cameras)
        try:
            self._make()
        except (ImportError, AttributeError) as error:
            if "egl" in str(error).lower():  # as MuJoCo puts it: 'NoneType' object has no attribute 'eglQueryString'
                raise ImportError(
                    f"The simulator {self.name!r} draws with EGL, which does not work here ({error}): "
                    "`apt-get install libegl1 libgl1-mesa-dri`, see docs/simulators.md."
                ) from error
            if isinstance(error, AttributeError):
                raise
            raise ImportError(
                f"The simulator {self.name!r} needs {error.name}: {self.how_to_install}, see docs/simulators.md."
            ) from error
        self.camera_specs = {name: replace(spec, depth=depth) for name, spec in self.camera_specs.items()}
        self.metadata = {"render_modes": [self.render_mode], "render_fps": self.action_spec.control_hz}
        self.action_space = self._action_space()
        self.observation_space = self._observation_space()
        self.seed: int | None = None
        self.episode_length, self.success = 0, False

    @classmethod
    @abstractmethod
    def splits(cls) -> Mapping[str, tuple[str, ...]]:
        """Name of every selection of tasks that papers use -> its tasks."""

    @classmethod
    def tasks(cls) -> tuple[str, ...]:
        """Every task."""
        return tuple(dict.fromkeys(task for tasks in cls.splits().values() for task in tasks))

    @classmethod
    def count_starts(cls, task: str) -> int | None:
        """How many initial states a task has for evaluations; None where every seed has its own."""
        return None

    @classmethod
    def select(cls, names: str) -> tuple[str, ...]:
        """Return the tasks that names stand for.

        Args:
            names (`str`): tasks and splits, separated by commas.

        Raises:
            ValueError: one is neither.
        """
        splits, tasks = cls.splits(), {task: (task,) for task in cls.tasks()}
        chosen = []
        for name in (name.strip() for name in names.split(",")):
            check_known(f"task or split of {cls.name}", name, {**tasks, **splits})
            chosen += splits.get(name) or tasks[name]
        return tuple(dict.fromkeys(chosen))

    @abstractmethod
    def _make(self) -> None:
        """Import and build the simulator, and set the attributes of the class's docstring."""

    @abstractmethod
    def _restart(self, seed: int) -> None:
        """Put the simulator into the initial state of a seed."""

    @abstractmethod
    def _advance(self, action: np.ndarray) -> bool:
        """Execute one action and return whether the task is done."""

    @abstractmethod
    def _state(self) -> np.ndarray:
        """The robot's state, `(S,)`, robot units."""

    @abstractmethod
    def _pictures(self, camera: str, depth: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """What a camera sees: `(H, W, 3)` uint8, and, where wanted, `(H, W)` metres."""

    @abstractmethod
    def camera_pose(self, camera: str) -> np.ndarray:
        """Where a camera is now.

        Args:
            camera (`str`): one of `camera_specs`.

        Returns:
            `np.ndarray` of shape `(4, 4)`: camera to world, in metres; x to the right of the picture, y down, z ahead.
        """

    def reset(self, *, seed=None, options=None):
        """Begin the episode of a seed; gymnasium's method.

        Args:
            seed (`int`, *optional*): decides the episode. Without one it is drawn, at random at first and then as the
                last seed has it, from those that are not for demonstrations; `info["seed"]` tells.

        Returns:
            `tuple[dict, dict]`: observation and info.
        """
        # not the next one: environments side by side, begun with seeds 0 to 7, would repeat each other's episodes
        self.restart(int(self.np_random.integers(FIRST_RECORDING_SEED)) if seed is None else seed)
        return self.observe(), self._info()

    def restart(self, seed: int) -> None:
        """Begin the episode of a seed without looking."""
        super().reset(seed=seed)
        self.seed, self.episode_length, self.success = seed, 0, False
        self._restart(seed)

    def advance(self, action) -> tuple[bool, bool]:
        """Execute one action without looking.

        Args:
            action (`np.ndarray` of shape `(D,)`): robot units; clipped to what the robot takes.

        Returns:
            `tuple[bool, bool]`: terminated, truncated.

        Raises:
            ValueError: it has another shape, or holds NaN or infinity.
            gymnasium.error.ResetNeeded: no episode has begun.
        """
        if self.seed is None:
            raise gym.error.ResetNeeded("Expected an episode to act in, came none: call `reset` or `restart` first.")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(
                f"Expected a finite action of shape {self.action_space.shape}, {list(self.action_spec.names)}, came "
                f"{action.tolist()}."
            )
        done = self._advance(np.clip(action, self.action_space.low, self.action_space.high))
        self.episode_length += 1
        self.success = self.success or bool(done)
        return self.success, self.episode_length >= self.horizon

    def step(self, action):
        """Execute one action and look; gymnasium's method, with a reward of 1 for success.

        Returns:
            `tuple`: observation, reward, terminated, truncated, info.
        """
        terminated, truncated = self.advance(action)
        return self.observe(), float(terminated), terminated, truncated, self._info()

    def observe(self) -> dict[str, Any]:
        """Look; see the class for what there is to see."""
        seen: dict[str, Any] = {}
        for camera in self.sizes:
            picture, depth = self._pictures(camera, self.depth)
            seen[f"observation.images.{camera}"] = picture
            if self.depth:
                seen[f"observation.depth.{camera}"] = depth
        seen["observation.state"] = np.asarray(self._state(), dtype=np.float32)
        return {**seen, "task": self.instruction}

    def render(self):
        """Picture of the first camera, `(H, W, 3)` uint8."""
        return self._pictures(next(iter(self.sizes)), False)[0]

    def _info(self) -> dict[str, Any]:
        # `is_success` is LeRobot's name for it
        return {"success": self.success, "is_success": self.success, "seed": self.seed}

    def _action_space(self) -> gym.spaces.Box:
        """What the robot takes; -1 to 1 unless a simulator says otherwise."""
        return gym.spaces.Box(-1.0, 1.0, (len(self.action_spec.names),), np.float32)

    def _observation_space(self) -> gym.spaces.Dict:
        spaces: dict[str, gym.Space] = {}
        for camera, (width, height) in self.sizes.items():
            spaces[f"observation.images.{camera}"] = gym.spaces.Box(0, 255, (height, width, 3), np.uint8)
            if self.depth:
                spaces[f"observation.depth.{camera}"] = gym.spaces.Box(0.0, np.inf, (height, width), np.float32)
        states = gym.spaces.Box(-np.inf, np.inf, (len(self.state_spec.names),), np.float32)
        # one space for every task, or gymnasium would not put several into one vector environment
        text = gym.spaces.Text(LONGEST_INSTRUCTION, charset=string.printable)
        return gym.spaces.Dict({**spaces, "observation.state": states, "task": text})


class Expert(ABC):
    """Solves one task by knowing the simulator's state.

    Args:
        env (`SimulatedTask`): to act in.
    """

    def __init__(self, env: SimulatedTask):
        self.env = env

    @abstractmethod
    def reset(self) -> None:
        """Forget everything, as an episode starts; called after the environment's `restart`."""

    @abstractmethod
    def act(self) -> np.ndarray:
        """Next action, `(D,)`, robot units, for the state the simulator is in."""


def _checked_sizes(cameras):
    wrong = not isinstance(cameras, Mapping) or not cameras
    if wrong or any(np.shape(size) != (2,) for size in cameras.values()):
        raise ValueError(
            f"Expected one camera or more with width and height, such as {{'front': (128, 128)}}, came {cameras!r}."
        )
    return {
        name: tuple(whole_number(side, f"pixels of camera {name!r}") for side in size)
        for name, size in cameras.items()
    }


def check_known(what: str, name: str, known) -> None:
    """Raise a ValueError where a name is unknown, with the one that was probably meant."""
    if name not in known:
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"No {what} is called {name!r}; there are {sorted(known)}.{hint}")


@contextmanager
def numpy_seed(seed: int):
    """Let a seed decide what is drawn from numpy's global generator, and leave that as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
