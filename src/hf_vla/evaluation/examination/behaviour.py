"""Checks of what the policy does when it is shown something else, asked again, or asked with others.

Distances are in spreads of the recorded actions, so that one threshold serves metres, radians and grippers. Noise
starts from one seed everywhere: only what is shown makes a difference.
"""

from collections.abc import Iterator

import numpy as np

from hf_vla.evaluation.examination.patient import FAIL, PASS, SEED, WARN, Patient, Unavailable, Verdict
from hf_vla.evaluation.probes import PROBES, ProbeContext
from hf_vla.policy import IMAGES, TASK, predict_chunks

# Below a thousandth of the recorded spread lies rounding, and what no controller resolves: what was changed is
# ignored. Below a twentieth it is hardly used: predictions for two frames at random lie about one spread apart.
IGNORED, WEAK = 1e-3, 0.05
SAME = 1e-4  # what adding float32 numbers in another order, as in a larger batch, makes of a prediction
OTHERS_ANSWER_FOR = ("processor", "model", "normalizer", "state_normalizer", "recorded", "episodes")  # parts
OTHERS = 3  # instructions that each moment is tried with
ROUNDING = 1e-3  # ranges of the recorded actions
OUTSIDE, FAR_OUTSIDE = 0.1, 1.0  # likewise: a head may overshoot a little, never by a whole range


def predicts(patient: Patient) -> Iterator[Verdict]:
    """The policy answers what it is shown with finite actions."""
    try:
        chunks = patient.chunks
    except Unavailable as error:
        if error.part in OTHERS_ANSWER_FOR:
            raise
        yield Verdict(FAIL, f"It cannot predict: {error}")
        return
    if not all(np.isfinite(chunk).all() for chunk in chunks):
        yield Verdict(FAIL, "Predicted actions are NaN or infinite; see the weights and the statistics.")
    else:
        shown = "recorded frames" if patient.dataset is not None else "pictures"
        size, dim = chunks[0].shape
        yield Verdict(PASS, f"Predicts {size} actions of {dim} numbers for each of {len(chunks)} {shown}.")


def looks(patient: Patient) -> Iterator[Verdict]:
    """The action changes when a camera's picture turns black or white: one line for each camera.

    A policy may live without one of several cameras, so a camera that is ignored fails only where it is the only one;
    a line for all of them together says whether it looks at all.
    """
    cameras = [key for key in patient.moments[0][-1] if key.startswith(IMAGES)]
    groups = [[key] for key in cameras] + [cameras] * (len(cameras) > 1)
    for keys in groups:
        name = keys[0].removeprefix(IMAGES) if len(keys) == 1 else f"all {len(keys)} cameras"
        moved = {
            color: [
                patient.moved(patient.predict([_painted(seen, keys, value) for seen in moment]), chunk)
                for moment, chunk in zip(patient.moments, patient.chunks, strict=True)
            ]
            for color, value in (("black", 0), ("white", 255))
        }
        black, white = (np.mean(moved[color]) for color in ("black", "white"))
        most = max(map(max, moved.values()))
        measured = {"camera": name, "black": float(black), "white": float(white), "most": most}
        found = f"With {name} black the action moves by {black:.2g} spreads of the recorded actions, white {white:.2g}"
        if most < IGNORED:
            one_of_several = len(keys) < len(cameras)
            yield Verdict(
                WARN if one_of_several else FAIL,
                f"{found}: the policy ignores {'this camera' if one_of_several else 'what it sees'}. See that the "
                "pictures reach the network (projector, image tokens), and that it was trained with them.",
                measured,
            )
        elif max(black, white) < WEAK:
            yield Verdict(
                WARN,
                f"{found}: it hardly looks. Probe it in rollouts (`hf-vla eval --probe blank`); train longer or with "
                "more varied starts.",
                measured,
            )
        else:
            yield Verdict(PASS, f"{found}: it looks.", measured)


def listens(patient: Patient) -> Iterator[Verdict]:
    """The action changes with the instruction: to the dataset's others, or to some that any robot might hear.

    A policy that was trained with one instruction has nothing to learn from it. Where the dataset has one, that is
    known and ignoring it is no failure.
    """
    known = patient.instructions
    several = len(known) > 1
    texts = known if several else (*known, "do something else")
    moved = []
    for moment, chunk in zip(patient.moments, patient.chunks, strict=True):
        for other in [text for text in texts if text != moment[-1][TASK]][:OTHERS]:
            moved.append(patient.moved(patient.predict([{**seen, TASK: other} for seen in moment]), chunk))
    mean, most = float(np.mean(moved)), max(moved)
    measured = {"mean": mean, "most": most, "instructions": len(texts)}
    found = f"Under another instruction the action moves by {mean:.2g} spreads of the recorded actions"
    if most < IGNORED and several:
        yield Verdict(
            FAIL,
            f"{found}: the policy ignores what it is told. See that the text reaches the network, and that it was "
            "trained with several tasks whose pictures do not give them away. (Where it knows one task alone, give "
            "its --dataset, which shows that.)",
            measured,
        )
    elif mean < WEAK and not several:
        yield Verdict(WARN, f"{found}: the dataset has one, so there was nothing to learn from it.", measured)
    elif mean < WEAK:
        yield Verdict(
            WARN, f"{found}: it hardly listens. Probe it in rollouts (`hf-vla eval --probe swap`).", measured
        )
    else:
        yield Verdict(PASS, f"{found}: it listens.", measured)


def repeatable(patient: Patient) -> Iterator[Verdict]:
    """The same seed gives the same action; what another seed makes of it is said."""
    moment, chunk = patient.moments[0], patient.chunks[0]
    again = patient.moved(patient.predict(moment, patient.new_policy(SEED)), chunk)
    other = patient.moved(patient.predict(moment, patient.new_policy(SEED + 1)), chunk)
    measured = {"same_seed": again, "other_seed": other}
    if again > SAME:
        yield Verdict(
            FAIL,
            f"Asked twice with one seed, the action moves by {again:.2g} spreads of the recorded actions: something "
            "draws random numbers of its own (dropout?), so no run can be repeated.",
            measured,
        )
    else:
        drawn = f"another seed moves it by {other:.2g} spreads" if other else "it draws no noise at all"
        yield Verdict(PASS, f"One seed gives one action; {drawn}.", measured)


def batch_independent(patient: Patient) -> Iterator[Verdict]:
    """Two robots that ask at once get what each would get alone."""
    alone = [patient.chunks[0], patient.chunks[-1]]
    moments = [patient.moments[0], patient.moments[-1]]
    policies = [patient.new_policy(SEED) for _ in moments]
    for policy, moment in zip(policies, moments, strict=True):
        for observation in moment[:-1]:
            policy.remember(observation)
    together = predict_chunks(policies, [moment[-1] for moment in moments])
    moved = max(patient.moved(chunk, own) for chunk, own in zip(together, alone, strict=True))
    if moved > SAME:
        yield Verdict(
            FAIL,
            f"In a batch of two, the action moves by {moved:.2g} spreads of the recorded actions: robots would share "
            "what they see. Ask one at a time.",
            {"moved": moved},
        )
    else:
        yield Verdict(PASS, f"Two robots in one batch get what each gets alone (moved by {moved:.1g} spreads).")


def inside_range(patient: Patient) -> Iterator[Verdict]:
    """Predictions lie within the range of the recorded actions, or not far outside."""
    statistics = patient.processor.action_codec.statistics[patient.key]["action"]
    pairs = [
        pair for pair in (("min", "max"), ("q01", "q99")) if all(statistics.get(name) is not None for name in pair)
    ]
    if not pairs:
        yield Verdict(WARN, "The statistics have no range (min and max), so predictions cannot be compared with it.")
        return
    low, high = (np.asarray(statistics[name], np.float64) for name in pairs[0])
    chunks = np.concatenate(patient.chunks)
    span = np.where(patient.normalizer.constant, 1.0, np.maximum(high - low, 1e-12))
    beyond = np.maximum(low - chunks.min(axis=0), chunks.max(axis=0) - high) / span
    worst = int(beyond.argmax())
    spec, _ = patient.processor.action_codec.specs(patient.key)
    name = spec.names[worst] if spec is not None else str(worst)
    measured = {"beyond": np.maximum(beyond, 0.0).tolist()}
    if beyond[worst] <= ROUNDING:
        yield Verdict(
            PASS, f"All predictions lie within {pairs[0][0]}..{pairs[0][1]} of the recorded actions.", measured
        )
        return
    found = f"Predictions leave {pairs[0][0]}..{pairs[0][1]} of the recorded actions by {beyond[worst]:.1%} in {name}"
    level = FAIL if beyond[worst] > FAR_OUTSIDE else WARN if beyond[worst] > OUTSIDE else PASS
    mend = "" if level == PASS else "; keep the robot's own limits in place, and see statistics and normalisation"
    yield Verdict(level, f"{found}{mend}.", measured)


def _painted(observation, keys, value):
    if value == 0 and len(keys) == sum(key.startswith(IMAGES) for key in observation):
        return PROBES["blank"](observation, ProbeContext(SEED, 0, ()))  # depth flat as well
    return {**observation, **{key: np.full_like(np.asarray(observation[key]), value) for key in keys}}
