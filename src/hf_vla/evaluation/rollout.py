"""Closed loop: a checkpoint drives simulated robots, and every episode is written down.

Environments run in processes of their own while the model predicts for those that wait. Who waits with whom is a
matter of timing; what comes out is not: an episode follows from its task and seed alone.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from hf_vla.actions.spec import ActionSpec
from hf_vla.evaluation.contract import CameraPlan, check_contract, convert_gripper, plan_cameras
from hf_vla.evaluation.envs.registry import simulator
from hf_vla.evaluation.probes import PROBES, ProbeContext, check_probes
from hf_vla.evaluation.protocol import EvaluationPlan, describe
from hf_vla.evaluation.records import EpisodeRecord, RecordWriter
from hf_vla.evaluation.videos import Film
from hf_vla.evaluation.workers import DEADLINE_S, Begun, EnvironmentWorkers, Lost, SimulatorOptions, Went
from hf_vla.policy import TASK, Policy, predict_chunks

ATTEMPTS = 3  # an environment that crashes or hangs so often over one episode will do so again
NO_PROBE = "none"
VIDEO_FPS = 30.0  # of a simulator that does not say how often it acts
ENDS = ("failure", "success")


@dataclass(eq=False)
class _Episode:
    """An episode under way; `observation` is there while it waits for a prediction."""

    task: str
    seed: int
    filmed: bool
    film: Film | None = None
    policy: Policy | None = None
    env: int = 0
    instruction: str = ""
    robot: ActionSpec | None = None
    observation: dict | None = None
    steps: int = 0
    latency_ms: list[float] = field(default_factory=list)
    begun_at: float = 0.0
    restarts: int = 0
    faults: int = 0  # restarts for which its own environment was to blame


def evaluate(
    model,
    processor,
    plan: EvaluationPlan,
    folder: str | Path,
    checkpoint: str,
    processes: int = 1,
    envs: int | None = None,
    probe: str = NO_PROBE,
    videos: int = 0,
    video_suffix: str = ".mp4",
    on_episode: Callable[[EpisodeRecord], None] | None = None,
    deadline_s: float = DEADLINE_S,
) -> list[EpisodeRecord]:
    """Run the episodes of a plan that are not in the folder yet.

    On the CPU the model runs on one thread: only there do the last bits of its predictions not depend on timing, and
    the others are for the simulators.

    Args:
        model, processor: see [`~hf_vla.policy.Policy`].
        plan ([`~hf_vla.evaluation.protocol.EvaluationPlan`]): what to run.
        folder (`str` or `Path`): for `episodes.jsonl`, `protocol.json` and `videos/`.
        checkpoint (`str`): where the model is from, for the protocol.
        processes (`int`): in which simulators run.
        envs (`int`, *optional*): simulated at a time; by default two batches, or two for each process.
        probe (`str`): "none", or what is changed of every observation, see `hf_vla.evaluation.probes`.
        videos (`int`): episodes of every task that are filmed; those that are recorded already are run once more for
            it, and their records stay.
        video_suffix (`str`): ".mp4" or ".gif".
        on_episode (`Callable`, *optional*): called with every record, also those that were there.
        deadline_s (`float`): after so long without an answer, a simulator hangs.

    Returns:
        `list[EpisodeRecord]`: those of the plan, in its order.

    Raises:
        ValueError: the checkpoint does not fit the simulator, or the folder holds another evaluation.
        ImportError, FileNotFoundError: the simulator or its assets are not installed.
        ChildProcessError: a simulator raises, crashes or hangs three times over an episode.
    """
    if probe != NO_PROBE:
        check_probes([probe], plan.tasks)
    envs = 2 * max(plan.batch_size, processes) if envs is None else envs
    if min(processes, envs) < 1 or videos < 0:
        raise ValueError(
            f"Expected processes and envs of 1 or more and videos of 0 or more, came {processes}, {envs} and {videos}."
        )
    envs = min(envs, len(plan.tasks) * min(plan.batch_size, plan.episodes))  # more would have nothing to do
    kind, policy = simulator(plan.env), Policy(model, processor, **plan.policy_options)
    cameras = plan_cameras(policy, kind, plan.cameras)
    options = SimulatorOptions(kind, cameras.sizes, cameras.depth, plan.rendering, plan.horizon)
    threads = torch.get_num_threads()
    if model.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with EnvironmentWorkers(options, envs, processes, deadline_s) as workers:
            robot = workers.describe(plan.tasks[0])
            said = robot.action_spec, robot.state_spec, robot.camera_specs
            check_contract(policy, cameras, *said, plan.env, robot.refused)
            instructions = (robot.instruction,)
            if probe == "swap":
                instructions += tuple(workers.describe(task).instruction for task in plan.tasks[1:])
            with RecordWriter(Path(folder), describe(plan, policy, checkpoint, cameras, robot)) as writer:
                on_episode = on_episode or (lambda record: None)
                for record in writer.records:
                    if record.probe == probe:
                        on_episode(record)
                films = Films(Path(folder) / "videos", video_suffix, plan.seeds[:videos])
                rollout = _Rollout(
                    model, processor, plan, workers, writer, cameras, films, probe, instructions, on_episode
                )
                rollout.run(range(envs))
                records = {(each.task, each.seed): each for each in writer.records if each.probe == probe}
    finally:
        torch.set_num_threads(threads)
    return [records[task, seed] for task in plan.tasks for seed in plan.seeds]


class Films(NamedTuple):
    """Where films go, their kind, and the seeds of every task that are filmed."""

    folder: Path
    suffix: str
    seeds: Sequence[int]


class _Rollout:
    """The episodes of an evaluation, from the first to the last; see `evaluate`."""

    def __init__(
        self,
        model,
        processor,
        plan: EvaluationPlan,
        workers: EnvironmentWorkers,
        writer: RecordWriter,
        cameras: CameraPlan,
        films: Films,
        probe: str,
        instructions: tuple[str, ...],
        on_episode: Callable[[EpisodeRecord], None],
    ):
        self._new_policy = lambda seed: Policy(model, processor, seed=seed, **plan.policy_options)
        self._plan, self._workers, self._writer, self._cameras = plan, workers, writer, cameras
        self._probe, self._instructions, self._on_episode = probe, instructions, on_episode
        self._active: dict[int, _Episode] = {}
        self._done = {(each.task, each.seed) for each in writer.records if each.probe == probe}
        self._films = films
        if films.seeds:
            films.folder.mkdir(parents=True, exist_ok=True)

    def run(self, envs) -> None:
        """Run all episodes that are not recorded, or that a film is missing of."""
        pending = {
            task: deque(
                _Episode(task, seed, seed in self._films.seeds)
                for seed in self._plan.seeds
                if self._is_due(task, seed)
            )
            for task in self._plan.tasks
        }
        try:
            self._run(pending, set(envs))
        finally:
            for episode in self._active.values():
                if episode.film is not None:
                    episode.film.discard()

    def _is_due(self, task, seed):
        if (task, seed) not in self._done:
            return True
        return seed in self._films.seeds and not any(self._video(task, seed, end).exists() for end in ENDS)

    def _video(self, task, seed, end):
        probe = "" if self._probe == NO_PROBE else f"_{self._probe}"
        return self._films.folder / f"{task}_seed{seed}{probe}_{end}{self._films.suffix}"

    def _run(self, pending, free):
        stands: dict[int, str] = {}
        while any(pending.values()) or self._active:
            for env in sorted(free):
                if (task := self._choose(pending, stands.get(env))) is not None:
                    free.remove(env)
                    stands[env], episode = task, pending[task].popleft()
                    episode.env = env
                    self._begin(episode)
            turn = self._turn()
            for env, answer in self._workers.wait(0 if turn else None):
                if env in self._active and self._take(env, answer):
                    del self._active[env]
                    free.add(env)
            if turn:
                self._predict([episode for episode in turn if episode.observation is not None])

    def _choose(self, pending, own):
        """The task that an environment goes on with: its own, or one that lacks a full batch of environments.

        To build an environment takes longer than an episode.
        """
        if pending.get(own):
            return own
        tasks = [episode.task for episode in self._active.values()]
        return next((task for task in pending if pending[task] and tasks.count(task) < self._plan.batch_size), None)

    def _begin(self, episode):
        episode.policy = self._new_policy(episode.seed)
        episode.observation, episode.steps, episode.latency_ms = None, 0, []
        if episode.film is not None:
            episode.film.discard()
            episode.film = None
        self._active[episode.env] = episode
        self._workers.begin(episode.env, episode.task, episode.seed, episode.filmed)

    def _turn(self):
        """Episodes to predict for, at most a batch: a full one, or all of a task that there are."""
        waiting: dict[str, list[_Episode]] = {}
        moving = {episode.task for episode in self._active.values() if episode.observation is None}
        for episode in self._active.values():
            if episode.observation is not None:
                if episode.policy.talks(episode.observation):
                    return [episode]
                waiting.setdefault(episode.task, []).append(episode)
        size = self._plan.batch_size
        ready = [group for task, group in waiting.items() if len(group) >= size or task not in moving]
        return max(ready, key=len, default=[])[:size]

    def _predict(self, turn):
        started = time.perf_counter()
        policies, observations = [each.policy for each in turn], [each.observation for each in turn]
        try:
            chunks = predict_chunks(policies, observations, batch_size=self._plan.batch_size) if turn else []
        except ValueError as error:
            episodes = ", ".join(f"{each.task} (seed {each.seed}, step {each.steps})" for each in turn)
            raise ValueError(f"No prediction for {episodes}: {error}") from error
        latency_ms = 1000 * (time.perf_counter() - started)
        for episode, chunk in zip(turn, chunks, strict=True):
            episode.latency_ms.append(latency_ms)
            episode.observation = None
            policy = episode.policy
            actions = convert_gripper(policy.execute(chunk), policy.action_spec, episode.robot)
            self._workers.advance(episode.env, actions, policy.looks_at_every_step, episode.filmed)

    def _take(self, env, answer) -> bool:
        """Go on with an episode after its environment's answer; return whether it is over."""
        episode = self._active[env]
        match answer:
            case Lost():
                self._repeat(episode, answer)
            case Begun():
                said = answer.action_spec, answer.state_spec, answer.camera_specs
                check_contract(episode.policy, self._cameras, *said, f"{self._plan.env}'s {episode.task}")
                episode.begun_at = time.perf_counter()
                episode.robot = answer.action_spec
                if episode.filmed:
                    path = self._video(episode.task, episode.seed, "unfinished")
                    episode.film = Film(path, answer.action_spec.control_hz or VIDEO_FPS)
                    episode.film.add(answer.picture)
                episode.observation = self._seen(episode, answer.observation, 0)
                episode.instruction = episode.observation[TASK]
            case Went():
                first = episode.steps + answer.steps - len(answer.observations) + 1
                episode.steps += answer.steps
                for picture in answer.pictures:
                    episode.film.add(picture)
                if answer.done:
                    self._end(episode, answer.success)
                    return True
                seen = [self._seen(episode, each, first + place) for place, each in enumerate(answer.observations)]
                for observation in seen[:-1]:
                    episode.policy.remember(observation)
                episode.observation = seen[-1]
        return False

    def _repeat(self, episode, lost):
        episode.restarts += 1
        episode.faults += lost.guilty
        if episode.faults == ATTEMPTS:
            raise ChildProcessError(
                f"{self._plan.env}'s {episode.task}, seed {episode.seed}, cannot be simulated: {ATTEMPTS} times in a "
                f"row {lost.why}. Episodes that are recorded stay; leave this task out, or mend the simulator."
            )
        self._begin(episode)

    def _seen(self, episode, observation, step):
        """What the policy is shown."""
        observation = self._cameras.rename(observation)
        if self._probe == NO_PROBE:
            return observation
        return PROBES[self._probe](observation, ProbeContext(episode.seed, step, self._instructions))

    def _end(self, episode, success):
        record = EpisodeRecord(
            task=episode.task,
            instruction=episode.instruction,
            seed=episode.seed,
            success=success,
            steps=episode.steps,
            predictions=len(episode.latency_ms),
            latency_ms=[round(each, 3) for each in episode.latency_ms],
            wall_s=round(time.perf_counter() - episode.begun_at, 4),
            restarts=episode.restarts,
            probe=self._probe,
        )
        if episode.filmed:
            episode.film.finish(self._video(episode.task, episode.seed, ENDS[success]))
        if (episode.task, episode.seed) not in self._done:
            self._writer.add(record)
            self._on_episode(record)
