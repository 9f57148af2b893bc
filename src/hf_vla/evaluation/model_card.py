"""Results of evaluations in a checkpoint's model card: a section for readers, a model index for the Hub."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from hf_vla.evaluation.records import write_whole
from hf_vla.evaluation.report import DATA, headline, probe_sections, protocol_section, results_table, title

METADATA = re.compile(r"\A---\n(.*?)^---(?:\n|\Z)", re.DOTALL | re.MULTILINE)
MODEL_INDEX = re.compile(r"^model-index:.*\n(?:[ \t-].*\n|\n)*", re.MULTILINE)
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
    checkpoint, source = Path(checkpoint_folder), Path(report_folder) / DATA
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint}: no checkpoint in this folder, it has no config.json.")
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; `hf-vla eval` writes it at its end.")
    report = json.loads(source.read_text(encoding="utf-8"))
    path = checkpoint / "README.md"
    name = checkpoint.resolve().name
    text = path.read_bytes().decode() if path.exists() else f"# {name}\n"
    newline = "\r\n" if "\r\n" in text else "\n"
    text = _with_section(path, _with_metadata(path, text.replace("\r\n", "\n"), name, report), report)
    write_whole(path, text.replace("\n", newline))
    return path


def _identity(report):
    """One evaluation's name in the card: another one of the same tasks takes its place."""
    return report["protocol"].get("selection") or ",".join(report["protocol"]["tasks"])


def _with_metadata(path, text, name, report):
    found = METADATA.match(text)
    metadata, body = (found[1], text[found.end() :]) if found else ("", "\n" + text)
    try:
        card = ModelCard(f"---\n{metadata}---\n{body}").data if metadata else None
    except Exception as error:  # whatever YAML finds wrong
        raise ValueError(
            f"{path}: its metadata cannot be read ({error}); mend what stands between the ---."
        ) from error
    new = eval_results(report)
    kept = [old for old in (card and card.eval_results) or [] if old.unique_identifier != new[0].unique_identifier]
    index = {"model-index": eval_results_to_model_index(getattr(card, "model_name", None) or name, [*kept, *new])}
    for key, value in DEFAULTS.items():
        if getattr(card, key, None) is None:
            metadata += f"{key}: {value}\n"
    block = yaml_dump(index)
    if MODEL_INDEX.search(metadata):
        metadata = MODEL_INDEX.sub(lambda _: block, metadata, count=1)
    else:
        metadata += block
    return f"---\n{metadata}---\n{body}"


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
