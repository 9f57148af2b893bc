"""Examines a checkpoint before a robot moves: every line is a pass, a warning or a failure, with a sentence.

A check is a function that takes a [`Patient`] and yields [`Verdict`]s, and one line in [`CHECKS`].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_vla.evaluation.examination import behaviour, codec, contract, files, recorded, statistics
from hf_vla.evaluation.examination.patient import FAIL, PASS, WARN, Patient, Unavailable, Verdict

LEVELS = (PASS, WARN, FAIL)

# In the order in which they are shown. Those of a dataset are left out where none is given.
CHECKS: dict[str, Callable[[Patient], Iterator[Verdict]]] = {
    "files": files.safetensors_only,
    "weights": files.weights_finite,
    "loads": files.loads,
    "agreement": files.parts_agree,
    "actions": contract.action_contract,
    "state": contract.state_contract,
    "cameras": contract.camera_contract,
    "statistics": statistics.statistics_sane,
    "frame": statistics.frame_inside,
    "round trip": codec.round_trip,
    "ids": codec.ids_decode,
    "predicts": behaviour.predicts,
    "imitates": recorded.imitates,
    "looks": behaviour.looks,
    "listens": behaviour.listens,
    "repeatable": behaviour.repeatable,
    "batch": behaviour.batch_independent,
    "range": behaviour.inside_range,
    "merge": files.merge_equal,
}
DATASET_CHECKS: dict[str, Callable[[Patient], Iterator[Verdict]]] = {
    "dataset": recorded.dataset_contract,
    "drift": recorded.drift,
    "open loop": recorded.open_loop,
}


@dataclass(frozen=True)
class Line:
    """A verdict, and the check that it is of.

    Args:
        check (`str`): see [`CHECKS`].
        verdict ([`Verdict`]): level, sentence, numbers.
    """

    check: str
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        return {"check": self.check, **vars(self.verdict)}


@dataclass(frozen=True)
class Examination:
    """What was found.

    Args:
        checkpoint (`str`): as it was given.
        dataset (`str`, *optional*): likewise.
        lines (`list[Line]`): in the order of [`CHECKS`].
        unexamined (`dict[str, str]`): checks that could not be made, and why; a line of another check fails then.
    """

    checkpoint: str
    dataset: str | None
    lines: list[Line]
    unexamined: dict[str, str]

    def count(self, level: str) -> int:
        """Return how many lines are of a level."""
        return sum(line.verdict.level == level for line in self.lines)

    def healthy(self, strict: bool = False) -> bool:
        """Return whether nothing failed; with `strict`, whether nothing is doubtful either."""
        return not self.count(FAIL) and not (strict and self.count(WARN))

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-safe."""
        return {
            "checkpoint": self.checkpoint,
            "dataset": self.dataset,
            "counts": {level: self.count(level) for level in LEVELS},
            "lines": [line.to_dict() for line in self.lines],
            "unexamined": self.unexamined,
        }

    def to_markdown(self) -> str:
        """Return it as a page, with the pictures that were written."""
        of = f" on `{self.dataset}`" if self.dataset else ""
        rows = [f"# Examination of `{self.checkpoint}`{of}", "", "| Check | | Found |", "|---|---|---|"]
        for line in self.lines:
            message = " ".join(line.verdict.message.split()).replace("|", "\\|")
            rows.append(f"| {line.check} | {line.verdict.level} | {message} |")
        rows += ["", self.summary()]
        for line in self.lines:
            rows += [f"\n![{line.check}]({file})" for file in line.verdict.measured.get("plots", [])]
        return "\n".join(rows) + "\n"

    def summary(self) -> str:
        """Return one sentence."""
        counts = ", ".join(f"{self.count(level)} {level}" for level in LEVELS)
        left = f"; not examined, since they need what failed: {', '.join(self.unexamined)}" if self.unexamined else ""
        return f"{self.checkpoint}: {counts}{left}."


def examine(
    checkpoint: str | Path,
    dataset: str | Path | None = None,
    unnorm_key: str | None = None,
    camera_map: dict[str, str] | None = None,
    episodes: list[int] | None = None,
    device: str | None = None,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda check: None,
) -> Examination:
    """Make every check; one that breaks is a failure, and the others go on.

    Args:
        checkpoint (`str` or `Path`): folder or Hub name.
        dataset (`str` or `Path`, *optional*): LeRobot dataset to examine it on: a folder or Hub name.
        unnorm_key (`str`, *optional*): dataset whose robot is driven; may be left out where the checkpoint knows one.
        camera_map (`dict[str, str]`, *optional*): the checkpoint's name of a camera -> the dataset's.
        episodes (`list[int]`, *optional*): of the dataset, such as those held out of training; all by default.
        device (`str`, *optional*): default the accelerator where there is one, else the CPU.
        out (`Path`, *optional*): existing folder for pictures.
        progress (`Callable`): gets the name of every check that begins.

    Returns:
        [`Examination`]

    Raises:
        FileNotFoundError: there is no such checkpoint.
        OSError: the Hub refuses it, or cannot be reached.
        ValueError: there is no such device; the checkpoint knows no such dataset or camera.
    """
    patient = Patient(checkpoint, dataset, unnorm_key, camera_map, episodes, device, out)
    lines: list[Line] = []
    unexamined: dict[str, str] = {}
    for name, check in {**CHECKS, **(DATASET_CHECKS if dataset is not None else {})}.items():
        progress(name)
        try:
            lines += [Line(name, verdict) for verdict in check(patient)]
        except Unavailable as error:
            unexamined[name] = str(error)
        except Exception as error:  # a broken checkpoint breaks anything, and the other lines are wanted all the more
            text = " ".join(str(error).split())
            lines.append(Line(name, Verdict(FAIL, f"This could not be examined: {type(error).__name__}: {text}")))
    if unexamined and not any(line.verdict.level == FAIL for line in lines):
        lines += [Line(name, Verdict(FAIL, f"This could not be examined: {why}")) for name, why in unexamined.items()]
    return Examination(patient.name, None if dataset is None else str(dataset), lines, unexamined)
