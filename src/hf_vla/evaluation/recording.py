"""Recording a simulator's expert as a LeRobot dataset v3.0, in several processes.

Task by task, seed by seed, every success becomes an episode until there are enough: whatever the number of processes,
and however often it is interrupted, the dataset comes out the same.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_vla.data.recorder import LeRobotRecorder
from hf_vla.evaluation.demonstrations import ACTION, Demonstration, Demonstrators, RecordingPlan
from hf_vla.evaluation.envs.base import SimulatedTask
from hf_vla.evaluation.envs.experts.registry import expert
from hf_vla.evaluation.records import write_whole
from hf_vla.evaluation.workers import simulator_versions

LOG = "meta/recording.json"
GIVE_UP = 20  # failures one after the other, after which a task is given up
VIDEO_MB = 20  # of LeRobot's 200: the last video is copied with every episode


@dataclass(frozen=True)
class Recorded:
    """What a recording has of a task.

    Args:
        episodes (`int`): successes; they are in the dataset.
        failures (`int`): attempts that did not solve the task.
        in_a_row (`int`): how many of them came since the last success.
    """

    episodes: int = 0
    failures: int = 0
    in_a_row: int = 0

    @property
    def attempts(self) -> int:
        """Episodes and failures."""
        return self.episodes + self.failures

    @property
    def given_up(self) -> bool:
        """Whether nothing more is expected of the task's expert."""
        return self.in_a_row >= GIVE_UP

    def after(self, success: bool) -> "Recorded":
        """Return what there is after one attempt more."""
        if success:
            return Recorded(self.episodes + 1, self.failures)
        return Recorded(self.episodes, self.failures + 1, self.in_a_row + 1)


def record(
    plan: RecordingPlan,
    root: str | Path,
    processes: int = 1,
    on_progress: Callable[[dict[str, Recorded], int], None] | None = None,
) -> dict[str, Recorded]:
    """Record what a plan asks for.

    An interrupted recording goes on behind its last episode when it is called again. `meta/recording.json` says what
    was asked for, with which versions, and every attempt: its task, its seed, its steps, the episode it became (null
    for a failure), and why it was begun anew where a process died or hung.

    Args:
        plan (`RecordingPlan`): what to record.
        root (`str` or `Path`): the dataset's folder; new, or of an interrupted recording of the same plan.
        processes (`int`): that simulate, beside this one, which writes.
        on_progress (callable, *optional*): called at the beginning and after every attempt with what there is of every
            task, and the number of frames recorded since the beginning.

    Returns:
        `dict[str, Recorded]`: of every task; one that was given up has fewer episodes than the plan wants.

    Raises:
        ValueError: the simulator has no expert, or the folder holds another recording.
        BlockingIOError: another recording is writing into the folder.
        ImportError, FileNotFoundError: the simulator or its assets are not installed.
        ChildProcessError: processes died or hung over an attempt again and again.
    """
    if processes < 1:
        raise ValueError(f"Expected 1 process or more, came {processes}.")
    root, on_progress = Path(root), on_progress or (lambda recorded, frames: None)
    env = plan.make(plan.tasks[0])
    try:
        expert(plan.env)  # there is one
        features, fps = _features(env), env.action_spec.control_hz
        versions = {name: version(name) for name in ("hf-vla", "numpy")} | simulator_versions()
        asked = {"plan": asdict(replace(plan, cameras=env.sizes)), "versions": versions}
    finally:
        env.close()
    _check_same(root, asked)
    with LeRobotRecorder(root, fps, features, env.robot, video_files_size_in_mb=VIDEO_MB) as recorder:
        log = _Log(root, asked, recorder.num_episodes)
        before = recorder.num_frames
        on_progress(log.recorded, 0)
        with Demonstrators(plan, processes) as demonstrators:
            for demonstration in _in_order(log, demonstrators, look_ahead=2 * processes):
                log.add(demonstration)
                if demonstration.success:
                    for frame in demonstration.frames:
                        recorder.add_frame(frame)
                    recorder.save_episode()
                on_progress(log.recorded, recorder.num_frames - before)
    return log.recorded


def _features(env: SimulatedTask) -> dict[str, dict]:
    """LeRobot's features of what [`~hf_vla.evaluation.demonstrations.demonstrate`] yields."""
    features = {}
    for camera, (width, height) in env.sizes.items():
        names = ["height", "width", "channels"]
        features[f"observation.images.{camera}"] = {"dtype": "video", "shape": [height, width, 3], "names": names}
    for key, spec in {"observation.state": env.state_spec, ACTION: env.action_spec}.items():
        features[key] = {"dtype": "float32", "shape": [len(spec.names)], "names": [*spec.names]}
    return features


def _in_order(log: "_Log", demonstrators: Demonstrators, look_ahead: int) -> Iterator[Demonstration]:
    """Yield attempt after attempt, in the order of the tasks and the seeds, while there are episodes missing.

    Some more are under way meanwhile, though never more than it takes if all of them succeed: none is in vain, unless
    its task is given up.
    """
    waiting: dict[str, deque] = {task: deque() for task in log.recorded}
    for task in log.recorded:
        while log.missing(task):
            room = look_ahead - sum(map(len, waiting.values()))
            room = max(room, not waiting[task])  # the task in turn does not wait for others
            for other, attempts in waiting.items():
                for _ in range(min(room, log.missing(other) - len(attempts))):
                    attempts.append(demonstrators.submit(other, log.next_seed(other) + len(attempts)))
                    room -= 1
            yield waiting[task].popleft().result()
        for attempt in waiting.pop(task):
            attempt.cancel()


class _Log:
    """What was asked for, and every attempt.

    An episode is noted before it is saved. One that the dataset does not have was noted just before an interruption:
    it is dropped, and made again.
    """

    def __init__(self, root: Path, asked: dict[str, Any], saved: int):
        self._path, self._asked = root / LOG, asked
        attempts = _read(root).get("attempts", [])
        self._attempts = [attempt for attempt in attempts if attempt["episode"] is None or attempt["episode"] < saved]
        self.recorded = {task: Recorded() for task in asked["plan"]["tasks"]}
        for attempt in self._attempts:
            self._count(attempt)
        if self._episodes() != saved:
            raise ValueError(f"{root} holds episodes that are not in {LOG}; choose another folder.")
        self._write()

    def add(self, demonstration: Demonstration) -> None:
        attempt = {
            "task": demonstration.task,
            "seed": demonstration.seed,
            "steps": len(demonstration.frames),
            "episode": self._episodes() if demonstration.success else None,
        }
        self._attempts.append(attempt | ({"restarts": demonstration.restarts} if demonstration.restarts else {}))
        self._count(attempt)
        self._write()

    def missing(self, task: str) -> int:
        """How many episodes of a task are still wanted; none of one that is given up."""
        recorded = self.recorded[task]
        return 0 if recorded.given_up else self._asked["plan"]["episodes"] - recorded.episodes

    def next_seed(self, task: str) -> int:
        return self._asked["plan"]["first_seed"] + self.recorded[task].attempts

    def _count(self, attempt):
        task, success = attempt["task"], attempt["episode"] is not None
        self.recorded = {**self.recorded, task: self.recorded[task].after(success)}

    def _episodes(self):
        return sum(recorded.episodes for recorded in self.recorded.values())

    def _write(self):
        lines = ",\n".join(json.dumps(attempt, ensure_ascii=False) for attempt in self._attempts)
        head = json.dumps(self._asked, indent=1, ensure_ascii=False).removesuffix("\n}")
        write_whole(self._path, f'{head},\n "attempts": [\n{lines}\n]\n}}\n')


def _read(root: Path) -> dict[str, Any]:
    return json.loads((root / LOG).read_text(encoding="utf-8")) if (root / LOG).is_file() else {}


def _check_same(root: Path, asked: dict[str, Any]) -> None:
    """Raise a ValueError where a folder holds a recording of something else."""
    if not (found := _read(root)):
        return
    now, before = ({**side["plan"], **side["versions"]} for side in (json.loads(json.dumps(asked)), found))
    # a simulator that only one of the two had imported made no difference
    names = [name for name in now if name in before and now[name] != before[name]]
    if names:
        different = "; ".join(f"{name}: then {before[name]!r}, now {now[name]!r}" for name in names)
        raise ValueError(f"{root} holds a recording that differs in {different}. Choose another folder.")
