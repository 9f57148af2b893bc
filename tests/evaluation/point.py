"""A simulator for tests: a point that actions push about, drawn without any library, and faults on demand."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
from hf_vla.evaluation.envs.base import SimulatedTask, check_known

# "kill", "hang" or "raise", a task, a seed, a step, and a file that is there once it happened; or what is not there:
# "missing", "egl" or "assets"
FAULT = "POINT_FAULT"
MIRRORED = "POINT_MIRRORED"  # its gripper is 1 open and 0 closed, and does the same as the other
PIDS = "POINT_PIDS"  # folder in which every process leaves a file of its number, with a dot for every environment


class PointTask(SimulatedTask):
    name, robot = "point", "finger"
    default_cameras = {"corner4": (48, 48)}
    horizon = 10
    names = ("x", "y", "z", "gripper")
    action_spec = ActionSpec(names, "delta_ee", frame="world", control_hz=20.0, gripper=GripperSpec(3, -1.0, 1.0))
    state_spec = StateSpec(names, frame="world")

    @classmethod
    def splits(cls):
        return {"both": ("left", "right"), "one": ("left",)}

    def _make(self):
        for camera in self.sizes:
            check_known("camera of this scene", camera, ("corner4", "top"))
        if os.environ.get(MIRRORED):
            self.action_spec = replace(self.action_spec, gripper=GripperSpec(3, 1.0, 0.0))
        match os.environ.get(FAULT, "").split():
            case ["missing", *_]:
                import swampland  # noqa: F401
            case ["egl", *_]:
                raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
            case ["assets", *_]:
                raise FileNotFoundError("The point's assets are not installed.")
        self.instruction = f"Go to the {self.task}"
        matrix = ((41.6, 0.0, 24.0), (0.0, 41.6, 24.0), (0.0, 0.0, 1.0))
        self.camera_specs = {name: CameraSpec(name, *size, matrix) for name, size in self.sizes.items()}
        if folder := os.environ.get(PIDS):
            with (Path(folder) / str(os.getpid())).open("a") as file:
                file.write(".")

    def _restart(self, seed):
        self.position = np.random.default_rng(seed).uniform(-0.5, 0.5, 4)

    def _advance(self, action):
        if os.environ.get(MIRRORED):
            action = np.append(action[:3], 1 - 2 * action[3])
        kind, task, seed, step, file = os.environ.get(FAULT, "- - -1 -1 -").split()
        if (task, int(seed), int(step)) == (self.task, self.seed, self.episode_length) and not Path(file).exists():
            if kind not in ("always", "raises"):
                Path(file).touch()
            if kind == "hang":
                time.sleep(1000)
            if kind in ("raise", "raises"):
                raise RuntimeError("the point is lost")
            os.kill(os.getpid(), signal.SIGKILL)
        self.position = np.clip(self.position + 0.2 * action, -1, 1)
        return self.position[0] < -0.8 if self.task == "left" else self.position[0] > 0.8

    def _state(self):
        return self.position

    def _pictures(self, camera, depth):
        width, height = self.sizes[camera]
        waves = np.outer(np.arange(height), np.arange(width))[..., None] * (2 + self.position[:3]) / 50
        return (127.5 + 127.5 * np.sin(waves)).astype(np.uint8), np.full((height, width), 2.0, np.float32)

    def camera_pose(self, camera):
        return np.eye(4)
