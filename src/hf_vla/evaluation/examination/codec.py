"""Checks of the way from robot units to the model's targets and back."""

from collections.abc import Iterator

import numpy as np

from hf_vla.actions.normalization import MODES
from hf_vla.evaluation.examination.patient import FAIL, PASS, WARN, Patient, Verdict

CHUNKS = 64
STDS = 2.0  # what is not bounded by its normalisation is tried so far around the mean
ROUNDING = 1e-5  # of the range: float32 there and back
COARSE = 1.0  # spreads: an error as large as the recorded motion itself


def round_trip(patient: Patient) -> Iterator[Verdict]:
    """Actions survive encoding and decoding: to rounding without a tokenizer, else to what it promises.

    Tried on smooth chunks that fill the range of the normalisation. An error above [`COARSE`] spreads in another
    dimension than the gripper, which many grids only open or close, is a warning: the grid is too coarse to follow.
    """
    codec, normalizer = patient.processor.action_codec, patient.normalizer
    actions = smooth_chunks(normalizer, codec.chunk_size)
    ends = {"terminate": np.zeros(actions.shape[:2], bool)} if codec.terminates else {}
    decoded = codec.decode(codec.encode(actions, patient.key, **ends), patient.key).astype(np.float64)
    error = np.abs(decoded - actions).max(axis=(0, 1))
    unit = np.abs(normalizer.unnormalize(np.ones(len(error))) - normalizer.unnormalize(np.zeros(len(error))))
    promised = 0.0 if codec.tokenizer is None else codec.tokenizer.resolution() * unit
    allowed = promised + ROUNDING * np.maximum(1.0, np.abs(actions).max(axis=(0, 1)))
    spec, _ = codec.specs(patient.key)
    names = spec.names if spec is not None else [str(place) for place in range(len(error))]
    listed = ", ".join(f"{name} {value:.2g}" for name, value in zip(names, error, strict=True))
    measured = {"error": error.tolist(), "allowed": np.broadcast_to(allowed, error.shape).tolist()}
    coarse = error / patient.spread > COARSE
    if spec is not None and spec.gripper is not None:
        coarse[spec.gripper.index] = False
    if (error > allowed).any():
        wrong = ", ".join(
            f"{names[place]} (at most {allowed[place]:.2g})" for place in np.flatnonzero(error > allowed)
        )
        yield Verdict(
            FAIL,
            f"Encoding and decoding changes actions by up to {listed} in robot units, more than expected in {wrong}: "
            "tokenizer, normalisation and statistics do not belong together.",
            measured,
        )
    elif coarse.any():
        wrong = ", ".join(names[place] for place in np.flatnonzero(coarse))
        yield Verdict(
            WARN,
            f"Encoding and decoding changes actions by up to {listed} in robot units, in {wrong} by more than the "
            "spread of what was recorded: give the tokenizer more bins.",
            measured,
        )
    else:
        how = "the normalisation" if codec.tokenizer is None else f"the {codec.tokenizer.type} tokenizer"
        yield Verdict(PASS, f"Actions come back from {how} to within {listed} in robot units.", measured)


def ids_decode(patient: Patient) -> Iterator[Verdict]:
    """Whatever ids the model may generate decode to an action, and ids that are none raise."""
    codec = patient.processor.action_codec
    if codec.tokenizer is None:
        yield Verdict(PASS, "The model predicts numbers, no ids: nothing is undecodable.")
        return
    _ = patient.normalizer  # broken statistics are another line's
    rng, tokenizer = np.random.default_rng(0), codec.tokenizer
    for _ in range(CHUNKS):
        stream, ids = tokenizer.stream(codec.chunk_size), []
        while not stream.complete:
            ids.append(int(rng.choice(np.flatnonzero(stream.allowed()))))
            stream.push(ids[-1])
        codec.decode(np.array(ids)[None], patient.key)
    try:
        codec.decode(np.full((1, len(ids)), tokenizer.vocab_size), patient.key)
    except ValueError:
        yield Verdict(
            PASS, f"{CHUNKS} random sequences of its {tokenizer.vocab_size} action tokens decode, others raise."
        )
    else:
        yield Verdict(
            FAIL, f"The id {tokenizer.vocab_size}, which is no action, decodes to one; this tokenizer hides errors."
        )


def smooth_chunks(normalizer, chunk_size: int) -> np.ndarray:
    """Chunks that swing through a normalisation's whole range: `(CHUNKS, chunk_size, action_dim)`, robot units."""
    bounds = np.array([MODES[mode][1] or (-STDS, STDS) for mode in normalizer.mode])
    rng = np.random.default_rng(0)
    phase, rate = rng.uniform(0, 2 * np.pi, (2, CHUNKS, 1, len(bounds)))
    swing = np.sin(rate * np.linspace(0, 1, chunk_size)[:, None] + phase)
    return normalizer.unnormalize(bounds.mean(axis=1) + swing * np.diff(bounds).T[0] / 2)
