"""Results of evaluations in a checkpoint's model card: a section for readers, a model index for the Hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from hf_vla.evaluation.records import write_whole
from hf_vla.evaluation.report import DATA, headline, probe_sections, protocol_section, results_table, title
from hf_vla.models.conversion import read_json

METADATA = re.compile(r"\A---[ \t]*\n(.*?)^(?:---|\.\.\.(?:[ \t]*\n---)?)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
SECTION = re.compile(
    r"\n*^<!-- begin evaluation (\S+) (.+) -->$.*?^<!-- end evaluation \1 \2 -->$", re.DOTALL | re.MULTILINE
)
WEIGHTS = re.compile(r"^\| `weights_sha256` \| (\w+) \|$", re.MULTILINE)
DEFAULTS = {"library_name": "hf_vla", "pipeline_tag": "robotics"}


def model_card_section(report: dict[str, Any]) -> str:
    """Write the section of a model card that tells an evaluation.

    Args:
        report (`dict`): report.json, see [`~hf_vla.evaluation.report.summarize`].

    Returns:
        `str`: Markdown.
    """
    parts = [
        f"## Evaluation on {title(report)}",
        headline(report),
        results_table(report),
        *(part.replace("## ", "### ", 1) if part.startswith("## ") else part for part in probe_sections(report)),
        f"<details><summary>Protocol</summary>\n\n{protocol_section(report)}\n\n</details>",
    ]
    return "\n\n".join(parts)


def eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """Give the success rates as the Hub's model index has them: the mean over tasks, in percent."""
    overall, env = report["overall"], report["protocol"]["env"]
    percent = {name: round(100 * value, 2) for name, value in overall["mean_over_tasks"].items()}
    return [
        EvalResult(
            task_type="robotics",
            task_name="Robotics",
            dataset_type=env,
            dataset_name=title(report),
            dataset_config=_identity(report),
            metric_type="success_rate",
            metric_name=f"success rate in %, mean over {len(report['tasks'])} tasks, {overall['episodes']} episodes",
            metric_value=percent["estimate"],
            metric_args={"confidence_interval_95": [percent["low"], percent["high"]]},
        )
    ]


def add_to_model_card(checkpoint_folder: str | Path, report_folder: str | Path) -> Path:
    """Put an evaluation into a checkpoint's README.md, in place of an earlier one of the same tasks.

    Nothing else of the file changes: the section stands between two comments, and of the metadata only the model
    index is written, beside the library's name and the pipeline where they are missing.

    Args:
        checkpoint_folder (`str` or `Path`): gets a README.md if it has none.
        report_folder (`str` or `Path`): with report.json.

    Returns:
        `Path`: the README.md.

    Raises:
        FileNotFoundError: there is no such checkpoint or report.
        ValueError: the README.md's metadata or comments are broken.
    """
    checkpoint, path = Path(checkpoint_folder), Path(checkpoint_folder, "README.md")
    if not any((checkpoint / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"{checkpoint}: no checkpoint in this folder, it has no config.json.")
    name = checkpoint.resolve().name
    text, newline = read_card(path)
    text = with_evaluation(path, text or f"# {name}\n", name, read_report(report_folder))
    write_whole(path, text.replace("\n", newline))
    return path


def read_report(folder: str | Path) -> dict[str, Any]:
    """Read an evaluation's report.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken.
    """
    source = Path(folder, DATA)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; `hf-vla eval` writes it at its end.")
    report = read_json(source)
    if missing := {"protocol", "overall", "tasks", "probes"} - report.keys():
        raise ValueError(f"{source}: expected {min(missing)}, which it lacks; let `hf-vla eval` write it again.")
    return report


def read_card(path: Path) -> tuple[str, str]:
    """Return a card's text, empty where there is none, with plain ends of lines, and what they were."""
    text = path.read_bytes().decode("utf-8-sig") if path.exists() else ""
    return text.replace("\r\n", "\n"), "\r\n" if "\r\n" in text else "\n"


def split_metadata(path: Path, text: str) -> tuple[str, str]:
    """Part a card into its metadata, YAML to which lines can be added, and its text.

    Raises:
        ValueError: the metadata are no YAML, or nothing that the Hub would take.
    """
    found = METADATA.match(text)
    if not found:
        return "", text
    metadata, body = found[1], text[found.end() :]
    try:
        if not (values := yaml.safe_load(metadata)):
            return "", body
        ModelCard(f"---\n{metadata}---\n")
    except Exception as error:  # whatever YAML finds wrong
        raise ValueError(
            f"{path}: its metadata cannot be read ({error}); mend what stands between the ---."
        ) from error
    return yaml_dump(values) if metadata.lstrip().startswith("{") else metadata, body


def with_entry(metadata: str, name: str, value: Any) -> str:
    """Write an entry of a card's metadata anew, or remove it where the value is None; other lines stay."""
    block = "" if value is None else yaml_dump({name: value})
    entry = re.compile(rf"^{name}:.*\n(?:[ \t-].*\n|\n)*", re.MULTILINE)
    return entry.sub(lambda _: block, metadata, count=1) if entry.search(metadata) else metadata + block


def with_evaluation(path: Path, text: str, name: str, report: dict[str, Any]) -> str:
    """Put an evaluation into a card's text, see [`add_to_model_card`].

    Args:
        path (`Path`): to name in errors.
        text (`str`): of the card.
        name (`str`): of the model, where the card gives it none.
        report (`dict`): report.json.

    Returns:
        `str`

    Raises:
        ValueError: the card's metadata or comments are broken.
    """
    return _with_section(path, _with_metadata(path, text, name, report), report)


def without_evaluations_of_others(path: Path, text: str, weights: Callable[[], str]) -> str:
    """Take evaluations of other weights out of a card: their sections, and their entries in the model index.

    Args:
        path (`Path`): to name in errors.
        text (`str`): of the card.
        weights (`Callable`): SHA-256 of these weights; called where there is an evaluation.

    Returns:
        `str`

    Raises:
        ValueError: the card's metadata are broken.
    """
    others = [each for each in SECTION.finditer(text) if weights() not in WEIGHTS.findall(each[0])]
    if not others:
        return text
    for each in others:
        text = text.replace(each[0], "")
    metadata, body = split_metadata(path, text)
    if not metadata:
        return text
    card = ModelCard(f"---\n{metadata}---\n").data
    gone = {(each[1], each[2]) for each in others}
    kept = [each for each in card.eval_results or [] if (each.dataset_type, each.dataset_config) not in gone]
    index = eval_results_to_model_index(card.model_name, kept) if kept else None
    return f"---\n{with_entry(metadata, 'model-index', index)}---\n{body}"


def _identity(report):
    """One evaluation's name in the card: another one of the same tasks takes its place."""
    return report["protocol"].get("selection") or ",".join(report["protocol"]["tasks"])


def _with_metadata(path, text, name, report):
    metadata, body = split_metadata(path, text)
    card = ModelCard(f"---\n{metadata}---\n").data if metadata else None
    new = eval_results(report)
    kept = [old for old in (card and card.eval_results) or [] if old.unique_identifier != new[0].unique_identifier]
    for key, value in DEFAULTS.items():
        if getattr(card, key, None) is None:
            metadata += f"{key}: {value}\n"
    index = eval_results_to_model_index(getattr(card, "model_name", None) or name, [*kept, *new])
    gap = "" if METADATA.match(text) else "\n"
    return f"---\n{with_entry(metadata, 'model-index', index)}---\n{gap}{body}"


def _with_section(path, text, report):
    mark = f"evaluation {report['protocol']['env']} {_identity(report)}"
    begin, end = f"<!-- begin {mark} -->", f"<!-- end {mark} -->"
    section = f"{begin}\n{model_card_section(report)}\n{end}"
    if (text.count(begin), text.count(end)) == (0, 0):
        return f"{text.rstrip()}\n\n{section}\n"
    before, _, rest = text.partition(begin)
    _, ending, after = rest.partition(end)
    if text.count(begin) != 1 or not ending:
        raise ValueError(f"{path}: expected {begin} and then {end}, each once; remove what is left of them.")
    return before + section + after
