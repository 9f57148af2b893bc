"""Checks against recorded episodes: is this the robot, are these the numbers, does the policy do what was done?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla.actions.statistics import ActionStatistics
from hf_vla.actions.values import is_constant
from hf_vla.data.schema import ACTION, IMAGES, PAD_SUFFIX, STATE, TASK, flat_names
from hf_vla.evaluation.examination.patient import FAIL, PASS, UNNAMED, WARN, Patient, Unavailable, Verdict
from hf_vla.evaluation.plots import plot_open_loop
from hf_vla.evaluation.probes import history, observation_of

EPISODES, FRAMES = 4, 12  # that are predicted on, in full where they are shorter
# Healthy checkpoints are behind the mean action in about half of the instructions that somebody else demonstrated, and
# in all of two or three of them: only all of four, by chance one time in sixteen, is a failure.
FEWEST = 4  # instructions
AGAINST = -0.5  # correlation from which on two grippers move against each other
NEAR_END = 0.25  # of the way between open and closed
OPENINGS = ("opening", "width")  # names of a state that grows as the gripper opens
# Against the checkpoint's: standard deviations that differ tenfold upwards (a policy never saw such motion) or a
# hundredfold downwards are other units; twofold, or means a spread apart, are other behaviour.
WIDER, NARROWER, OTHER = 10.0, 0.01, 2.0
SHIFT, FAR_SHIFT = 1.0, 5.0  # spreads
STRANGE, MOSTLY_STRANGE = 0.05, 0.5  # share of rows outside the checkpoint's min..max, give or take a hundredth
RATE = 1e-3  # by which rates may differ


def dataset_contract(patient: Patient) -> Iterator[Verdict]:
    """The dataset is of the checkpoint's robot: dimensions, names, rate, cameras, state."""
    try:
        info = patient.recorded.info
    except Unavailable as error:
        yield Verdict(FAIL, f"The dataset does not open: {error}")
        return
    codec, wrong, doubtful = patient.processor.action_codec, [], []
    action, state = codec.specs(patient.key)
    wanted = {ACTION: (action, patient.normalizer.action_dim)}
    if codec.takes_state:
        wanted[STATE] = (state, codec.state_normalizer(patient.key).action_dim)
    for key, (spec, dim) in wanted.items():
        if key not in info.features:
            wrong.append(f"it has no {key!r}, only {sorted(info.features)}")
            continue
        own, names = int(np.prod(info.features[key]["shape"])), flat_names(info.features[key].get("names"))
        if own != dim:
            wrong.append(f"{key} has {own} numbers {names or ''}, the checkpoint's {dim}")
        elif spec is not None and names and [*map(str, names)] != [*spec.names]:
            doubtful.append(f"{key} is {names} in the dataset and {[*spec.names]} in the checkpoint")
    if action is not None and action.control_hz and abs(info.fps / action.control_hz - 1) > RATE:
        wrong.append(f"it has {info.fps:g} rows per second, the checkpoint acts {action.control_hz:g} times")
    cameras = {key.removeprefix(IMAGES): info.features[key] for key in info.camera_keys}
    for camera in patient.processor.camera_specs(patient.key):
        name = patient.camera_in_dataset(camera.name or UNNAMED)
        if camera.name is not None and name not in cameras:
            wrong.append(f"it has no camera {name!r}, only {sorted(cameras)} (say which: --camera {camera.name}=NAME)")
        elif name in cameras and sorted(cameras[name]["shape"]) != sorted([camera.height, camera.width, 3]):
            doubtful.append(
                f"pictures of {name!r} have the shape {cameras[name]['shape']}, not {camera.height} x {camera.width}"
            )
    wrong += _gripper_ends(patient.recorded, action)
    title = f"{patient.recorded.name} ({info.robot_type or 'robot not named'}, {info.fps:g} rows per second)"
    if wrong:
        yield Verdict(
            FAIL,
            f"{title} is not of this checkpoint's robot: {'; '.join(wrong)}. Take a checkpoint made for it, or "
            "convert the data.",
            {"differences": wrong},
        )
    if doubtful:
        yield Verdict(WARN, f"{title}: {'; '.join(doubtful)}. See that they mean the same.", {"differences": doubtful})
    if not wrong and not doubtful:
        yield Verdict(PASS, f"{title} is of this checkpoint's robot: names, rate and cameras are the same.")


def _gripper_ends(recorded, spec) -> list[str]:
    """Say so where the recorded gripper opens as the spec closes it: known where a state measures the opening."""
    info = recorded.info
    names = flat_names(info.features.get(STATE, {}).get("names")) or []
    openings = [place for place, name in enumerate(names) if any(word in str(name).lower() for word in OPENINGS)]
    if spec is None or spec.gripper is None or len(openings) != 1 or ACTION not in info.features:
        return []
    commanded = recorded.column(ACTION).reshape(len(recorded), -1)
    if commanded.shape[1] != len(spec.names):
        return []
    opened = np.sign(spec.gripper.open - spec.gripper.closed) * commanded[:, spec.gripper.index]
    correlation = _correlation(opened, recorded.column(STATE).reshape(len(recorded), -1)[:, openings[0]])
    if correlation > AGAINST:
        return []
    return [
        f"its {names[openings[0]]!r} shrinks where the checkpoint's ActionSpec means open (gripper open "
        f"{spec.gripper.open:+g} closed {spec.gripper.closed:+g}, correlation {correlation:.2f}): they are exchanged"
    ]


def drift(patient: Patient) -> Iterator[Verdict]:
    """What the dataset holds is distributed as the checkpoint's statistics say."""
    codec, found = patient.processor.action_codec, False
    for what, key in (("action", ACTION), ("state", STATE)):
        if what == "state" and not codec.takes_state:
            continue
        known = codec.statistics[patient.key][what]
        if any(known.get(name) is None for name in ("mean", "std", "min", "max")):
            found = True
            yield Verdict(WARN, f"The checkpoint's {what} statistics lack mean, std, min or max: no comparison.")
            continue
        rows = patient.recorded.column(key).reshape(len(patient.recorded), -1).astype(np.float64)
        if rows.shape[1] != len(known["mean"]):
            raise Unavailable("recorded", "the dataset is of another robot")
        for level, sentence, measured in _drifted(rows, known, codec.specs(patient.key)[what == "state"], what):
            found = True
            yield Verdict(level, sentence, measured)
    if not found:
        yield Verdict(
            PASS, f"{len(patient.recorded):,} recorded rows are distributed as the checkpoint's statistics say."
        )


def _drifted(rows: np.ndarray, known: dict[str, Any], spec, what: str) -> Iterator[tuple[str, str, dict]]:
    statistics = ActionStatistics()
    statistics.update(rows)
    own = statistics.summary()
    mean, std, low, high = (np.asarray(known[name], np.float64) for name in ("mean", "std", "min", "max"))
    still, constant = is_constant(own["min"], own["max"]), is_constant(low, high)
    safe = np.where(std > 0, std, 1.0)
    ratio, shift = own["std"] / safe, np.abs(own["mean"] - mean) / safe
    margin = 0.01 * np.maximum(high - low, 1e-9)
    outside = ((rows < low - margin) | (rows > high + margin)).mean(axis=0)
    names = spec.names if spec is not None else [str(place) for place in range(len(mean))]
    failed = (ratio > WIDER) | (shift > FAR_SHIFT) | (outside > MOSTLY_STRANGE)
    narrow = (ratio < NARROWER) & ~still
    # a gripper that stays open, or a hand that never turns, is another task; other units are seen in most dimensions
    if narrow[~constant].mean() > 0.5:
        failed |= narrow
    failed = np.where(constant, outside > STRANGE, failed)
    warned = (ratio > OTHER) | (ratio < 1 / OTHER) | (shift > SHIFT) | (outside > STRANGE)
    for level, marks, meaning in (
        (FAIL, failed, "they are in other units, or of another robot: convert the data or take another checkpoint"),
        (WARN, warned & ~failed & ~constant, "the policy knows such rows less than its own; true of other tasks"),
    ):
        if marks.any():
            listed = "; ".join(
                f"{names[place]}: mean {own['mean'][place]:.3g}, std {own['std'][place]:.3g} against "
                f"{mean[place]:.3g}, {std[place]:.3g}, {outside[place]:.0%} of rows outside its range"
                for place in np.flatnonzero(marks)
            )
            measured = {"ratio": ratio.tolist(), "shift": shift.tolist(), "outside": outside.tolist()}
            yield (
                level,
                f"The dataset's {what}s differ from the checkpoint's statistics in {listed}; {meaning}.",
                measured,
            )


@dataclass(frozen=True)
class Replay:
    """What the policy predicts along a recorded episode.

    Args:
        episode (`int`): its number.
        task (`str`): its instruction.
        frames (`np.ndarray` of shape `(n,)`): at which it was asked.
        recorded (`np.ndarray` of shape `(length, action_dim)`): robot units.
        chunks (`np.ndarray` of shape `(n, chunk_size, action_dim)`): robot units.
        done, expected (`np.ndarray` of shape `(n_actions, action_dim)`): the recorded actions that the chunks are
            of, one after the other, and what was predicted for them.
        errors (`dict[str, np.ndarray]`): mean squared error per dimension of the policy, of always the mean action
            and of holding the last action, over the same actions.
    """

    episode: int
    task: str
    frames: np.ndarray
    recorded: np.ndarray
    chunks: np.ndarray
    done: np.ndarray
    expected: np.ndarray
    errors: dict[str, np.ndarray]


def open_loop(patient: Patient) -> Iterator[Verdict]:
    """Predictions on recorded episodes are nearer to what was done than simple guesses are.

    Open loop: the policy sees the recorded frames, whatever it would have done. One number per instruction, the root
    of the mean squared error over the dimensions that vary, in spreads of the dataset's actions, of the mean of
    several samples. The guesses: always the dataset's mean action, the last action held (strong at high rates).
    Where several ways are right, a policy that takes one of them is further off than their mean, though it may act
    better; so only what is behind the mean in all of [`FEWEST`] instructions fails. The gripper is judged by itself.
    """
    actions = patient.episodes.column(ACTION).reshape(len(patient.episodes), -1).astype(np.float64)
    replays = [_replay(patient, place, actions) for place in _spread_over_tasks(patient.episodes)]
    scores = _scores(replays, actions)
    measured = {"scores": scores, "episodes": [replay.episode for replay in replays], "plots": _plot(patient, replays)}
    listed = "; ".join(
        f"{task!r} {each['policy']:.2f} (last action {each['last']:.2f}, mean action {each['mean']:.2f})"
        for task, each in scores.items()
    )
    found = f"Open-loop error in spreads of the dataset's actions, {len(replays)} episode(s): {listed}"
    behind = {
        guess: [task for task, each in scores.items() if each["policy"] >= each[guess]] for guess in ("mean", "last")
    }
    if len(behind["mean"]) == len(scores) >= FEWEST:
        yield Verdict(
            FAIL,
            f"{found}. Further off than always the mean action at every instruction: it does not know these tasks, or "
            "sees them otherwise (cameras, colours, units, words).",
            measured,
        )
    elif behind["mean"]:
        yield Verdict(
            WARN,
            f"{found}. Further off than always the mean action at {_quoted(behind['mean'])}: it knows other ways, "
            "other words, or not this task. Look at the plots (--out), and let it act.",
            measured,
        )
    elif behind["last"]:
        yield Verdict(
            WARN,
            f"{found}. Better than always the mean action, but not than holding the last one at "
            f"{_quoted(behind['last'])}: right on the whole, late or noisy in detail.",
            measured,
        )
    else:
        yield Verdict(PASS, f"{found}. Better than both guesses.", measured)
    yield from _gripper(patient, replays)


def _gripper(patient: Patient, replays: list[Replay]) -> Iterator[Verdict]:
    """Whether the gripper goes as the recorded one did; without a word where that cannot be told.

    Some robots hold it at one value for a whole task. So it is judged where one episode has both ends, or where the
    episodes of [`FEWEST`] instructions have them.
    """
    spec, _ = patient.processor.action_codec.specs(patient.key)
    if spec is None or spec.gripper is None:
        return
    place, ends = spec.gripper.index, np.array([spec.gripper.open, spec.gripper.closed])

    def has_both(done):
        return (np.abs(done[:, place, None] - ends) < NEAR_END * abs(ends[0] - ends[1])).any(axis=0).all()

    done, expected = (np.concatenate([getattr(replay, name) for replay in replays]) for name in ("done", "expected"))
    several = len({replay.task for replay in replays}) >= FEWEST and has_both(done)
    if not several and not any(has_both(replay.done) for replay in replays):
        return
    correlation = _correlation(done[:, place], expected[:, place])
    error, guess = (
        float(np.mean((done[:, place] - each) ** 2)) for each in (expected[:, place], done[:, place].mean())
    )
    measured = {"correlation": correlation, "error": error, "mean": guess}
    found = f"The predicted {spec.names[place]!r} goes with the recorded one by a correlation of {correlation:.2f}"
    if correlation < AGAINST:
        yield Verdict(
            FAIL,
            f"{found}: it opens where the demonstrations close. See which number means open, in the data it was "
            "trained with and in the ActionSpec.",
            measured,
        )
    elif error >= guess:
        yield Verdict(
            WARN, f"{found}, further off than always its mean: it may grasp at other times, or not at all.", measured
        )
    else:
        yield Verdict(PASS, f"{found}.", measured)


def imitates(patient: Patient) -> Iterator[Verdict]:
    """Shown the recorded frame beside the checkpoint, it predicts what was done: nearer than the mean action.

    One frame is no evidence that it is broken, since other ways may be right; hence a warning. But it needs no
    dataset, and much that is coded otherwise than in training shows.
    """
    known = patient.processor.action_codec.statistics[patient.key][ACTION]
    done = patient.frame and patient.frame["actions"]
    if done is None or "mean" not in known:
        lacks = "recorded actions (frame.json) beside the checkpoint" if done is None else "mean action"
        yield Verdict(PASS, f"No {lacks} to compare with.")
        return
    done = np.array(done, np.float64)
    chunk = patient.expect(patient.frame_moment)[: len(done)]
    done = done[: len(chunk)]
    # as far as `moved` over a chunk, but over all dimensions at once, as along recorded episodes
    error, guess = (
        float(np.sqrt(np.nanmean(((each - done) / patient.spread) ** 2))) for each in (chunk, np.array(known["mean"]))
    )
    found = f"Shown its own recorded frame, it is {error:.2f} spreads from what was done (mean action {guess:.2f})"
    measured = {"error": error, "mean": guess}
    if error < guess:
        yield Verdict(PASS, f"{found}.", measured)
    else:
        yield Verdict(
            WARN,
            f"{found}: no nearer than always the mean action. It may know another way; or pictures, words or actions "
            "are coded otherwise than in its training. Give it a --dataset.",
            measured,
        )


def _correlation(values: np.ndarray, others: np.ndarray) -> float:
    """Of Pearson; 0 where either does not vary."""
    if is_constant(values.min(), values.max()) or is_constant(others.min(), others.max()):
        return 0.0
    return float(np.corrcoef(values, others)[0, 1])


def _scores(replays: list[Replay], actions: np.ndarray) -> dict[str, dict[str, float]]:
    """Root of the mean squared errors by instruction, in spreads of the dataset's actions."""
    variance = actions.var(axis=0)
    moving = ~is_constant(actions.min(axis=0), actions.max(axis=0))
    scores = {}
    for task in dict.fromkeys(replay.task for replay in replays):
        own = [replay.errors for replay in replays if replay.task == task]
        squared = {name: np.mean([errors[name] for errors in own], axis=0)[moving] for name in own[0]}
        scores[task] = {name: float(np.sqrt((each / variance[moving]).mean())) for name, each in squared.items()}
    return scores


def _spread_over_tasks(episodes) -> list[int]:
    """Places of up to [`EPISODES`] episodes: of every instruction the first, then the next of each."""
    texts = episodes.texts(TASK)[episodes.episode_starts[:-1]]
    turns = [int((texts[:place] == text).sum()) for place, text in enumerate(texts)]
    return sorted(sorted(range(len(texts)), key=lambda place: (turns[place], place))[:EPISODES])


def _replay(patient: Patient, place: int, actions: np.ndarray) -> Replay:
    episodes = patient.episodes
    start, end = episodes.episode_starts[place : place + 2].tolist()
    # the second row on, since the first has no last action to hold
    rows = np.unique(np.linspace(min(start + 1, end - 1), end - 1, FRAMES + 1).round().astype(int))[:FRAMES].tolist()
    chunks, done, squared = [], [], {"policy": [], "mean": [], "last": []}
    for row in rows:
        items = history(patient.policy, episodes, row)
        chunks.append(patient.expect([observation_of(episodes, item) for item in items]))
        real = ~items[-1][ACTION + PAD_SUFFIX].numpy()
        done.append(items[-1][ACTION].numpy().reshape(len(real), -1)[real])
        guesses = {
            "policy": chunks[-1][: len(done[-1])],
            "mean": actions.mean(axis=0),
            "last": actions[max(row - 1, start)],
        }
        for name, guess in guesses.items():
            squared[name].append((done[-1] - guess) ** 2)
    return Replay(
        episodes.episodes[place].index,
        episodes.texts(TASK)[start],
        np.array(rows) - start,
        actions[start:end],
        np.stack(chunks),
        np.concatenate(done),
        np.concatenate([chunk[: len(each)] for chunk, each in zip(chunks, done, strict=True)]),
        {name: np.concatenate(each).mean(axis=0) for name, each in squared.items()},
    )


def _plot(patient: Patient, replays: list[Replay]) -> list[str]:
    """Write a picture of every episode where there is a folder for it; return their names."""
    if patient.out is None:
        return []
    spec, _ = patient.processor.action_codec.specs(patient.key)
    files = []
    for replay in replays:
        names = spec.names if spec is not None else [str(place) for place in range(replay.recorded.shape[1])]
        title = f'episode {replay.episode}: "{replay.task}"'
        files.append(f"open_loop_{replay.episode:03d}.png")
        plot_open_loop(replay.recorded, replay.frames, replay.chunks, names, title).savefig(patient.out / files[-1])
    return files


def _quoted(texts: list[str]) -> str:
    return ", ".join(map(repr, texts))
