"""A checkpoint's model card: README.md, filled from the checkpoint itself by the templates in `model_cards/`.

What is generated stands between comments, `<!-- begin robot -->` and `<!-- end robot -->` for example, and is written
anew each time; whatever a person wrote outside of them stays. So do entries of the metadata that are there already.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_vla.evaluation.model_card import (
    DEFAULTS,
    SECTION,
    read_card,
    read_report,
    split_metadata,
    with_entry,
    with_evaluation,
    without_evaluations_of_others,
)
from hf_vla.evaluation.protocol import weights_sha256
from hf_vla.evaluation.records import write_whole
from hf_vla.evaluation.report import DATA as REPORT
from hf_vla.hub.facts import checkpoint_facts
from hf_vla.models.auto import FAMILIES, family_class
from hf_vla.training.summary import is_hub_name

CARD = "README.md"
PART = re.compile(r"^<!-- begin (\w+) -->\n.*?^<!-- end \1 -->$", re.DOTALL | re.MULTILINE)
UNFILLED = "[More Information Needed]"  # in the drafts that transformers' and peft's push_to_hub write
DRAFTED = re.compile(r"This is the model card of a .* automatically generated\.|### Framework versions|- PEFT \S+|")
RELATIONS = ("adapter", "finetune")
# in the parts of a card that was generated before
LOCAL = "from the folder in which this one lies"
SOURCE = re.compile(r'^policy = Policy\.from_pretrained\(("(?:[^"\\]|\\.)*")', re.MULTILINE)
MODEL = re.compile(r"\(https://huggingface\.co/(?!datasets/)([^)]+)\)")
DATASET = re.compile(r"\(https://huggingface\.co/datasets/([^)]+)\)")
FACTS = {"base_model": "base_models", "datasets": "hub_datasets"}
SPECIAL = re.compile(r"[\\`*\[\]<>|~#$&{}]|(?<![^\W_])_|_(?![^\W_])")


def write_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> Path:
    """Write a checkpoint's model card, or refresh what is generated of it.

    Evaluations in `eval/` (report.json, what `hf-vla eval` writes) get their sections, too, where they are of these
    weights; what the card has of others is taken out.

    Args:
        folder (`str` or `Path`): of the checkpoint.
        repo_id (`str`, *optional*): the repository's name on the Hub, which the card's code then loads; else the
            one that the card names already, or the folder's, as seen from beside it.
        license (`str`, *optional*): as the Hub names it, such as apache-2.0; by default what the card says already,
            or nothing.

    Returns:
        `Path`: the README.md.

    Raises:
        FileNotFoundError: this is no folder of a checkpoint.
        ValueError: it is of no family of this library, or the card's metadata or comments are broken.
    """
    folder = Path(folder)
    facts, path = checkpoint_facts(folder), folder / CARD
    old, newline = read_card(path)
    metadata, body = split_metadata(path, old)
    if is_untouched_draft(metadata, body):
        metadata, body = without_drafted(metadata), ""
    named = repo_id or named_repository(body)
    source = named or folder.resolve().name
    if before := shown_source(body):  # of which a title of ours is, too
        body = re.sub(
            f"^{re.escape(title_of(before))}$", lambda _: title_of(source), body, count=1, flags=re.MULTILINE
        )
    metadata = refreshed(metadata, body, facts)
    metadata = with_defaults(path, metadata, card_metadata(facts, license))
    own = cache(lambda: weights_sha256(family_class(facts["family"], "modeling").from_pretrained(folder)))
    found = [read_report(each.parent) for each in sorted(folder.glob(f"eval*/**/{REPORT}"))]
    reports = [each for each in found if each["protocol"].get("weights_sha256") == own()]
    text = without_evaluations_of_others(path, f"---\n{metadata}---\n{body}", own)
    metadata, body = split_metadata(path, text)
    known = {
        "name": source.rpartition("/")[2],
        "source": source,
        "on_hub": named is not None,
        "license": yaml.safe_load(metadata).get("license"),
        "is_evaluated": bool(reports) or SECTION.search(body) is not None,
        "is_evaluated_elsewhere": len(found) > len(reports),
    }
    new = environment().get_template(f"{facts['family']}.md").render(facts | known)
    text = f"---\n{metadata}---\n{merged(path, body, new)}"
    for report in reports:
        text = with_evaluation(path, text, folder.resolve().name, report)
    write_whole(path, text.replace("\n", newline))
    return path


def title_of(source: str) -> str:
    """A card's first line, by what its code loads."""
    return f"# {as_text(source.rpartition('/')[2])}"


def is_untouched_draft(metadata: str, body: str) -> bool:
    """Whether a card's text is one that transformers or peft drafted, and nobody wrote a line of."""
    values = yaml.safe_load(metadata) or {}
    drafts = [{}, {name: values.get(name) for name in ("license", "language", "base_model")}]
    known = {line for said in drafts for line in ModelCard.from_template(ModelCardData(), **said).text.splitlines()}
    return UNFILLED in body and all(DRAFTED.fullmatch(line) for line in set(body.splitlines()) - known)


def without_drafted(metadata: str) -> str:
    """Leave out of a draft's metadata what the library that drafted it said of itself, and a base that is a folder."""
    values = yaml.safe_load(metadata) or {}
    if values.get("library_name") in ("transformers", "peft"):
        metadata = with_entry(metadata, "library_name", None)
    base = values.get("base_model")
    return metadata if not isinstance(base, str) or is_hub_name(base) else with_entry(metadata, "base_model", None)


def shown_source(body: str) -> str | None:
    """What the code of a card that was generated before loads."""
    found = SOURCE.search(own_part(body, "usage"))
    return found and json.loads(found[1])


def named_repository(body: str) -> str | None:
    """Name on the Hub for which a card was generated before; None where it was for a folder, or there is no card."""
    return None if LOCAL in own_part(body, "usage") else shown_source(body)


def own_part(body: str, name: str) -> str:
    """A part of a card that was generated before; empty where there is none."""
    return next((part[0] for part in PART.finditer(body) if part[1] == name), "")


def refreshed(metadata: str, body: str, facts: dict[str, Any]) -> str:
    """Take out of a card's metadata what was generated of another model; what a person wrote stays.

    That is other families' tags, and the base models and datasets that the card's own last part named.
    """
    values, origin = yaml.safe_load(metadata) or {}, re.sub(r"\\(.)", r"\1", own_part(body, "licence"))
    tags = values.get("tags")
    if isinstance(tags, list) and (others := FAMILIES.keys() - {facts["family"]}) & {str(tag) for tag in tags}:
        kept = [tag for tag in tags if tag not in others]
        metadata = with_entry(metadata, "tags", [*kept, *{facts["family"]} - set(kept)])
    for name, pattern in (("base_model", MODEL), ("datasets", DATASET)):
        there = values.get(name)
        there = [there] if isinstance(there, str) else there
        if there and there == pattern.findall(origin) and there != facts[FACTS[name]]:
            metadata = with_entry(metadata, name, None)
            if name == "base_model" and values.get("base_model_relation") in RELATIONS:
                metadata = with_entry(metadata, "base_model_relation", None)
    return metadata


def card_metadata(facts: dict[str, Any], license: str | None = None) -> dict[str, Any]:
    """Say what the Hub is told of a checkpoint, but for evaluations.

    Args:
        facts (`dict`): see [`~hf_vla.hub.facts.checkpoint_facts`].
        license (`str`, *optional*): as the Hub names it.

    Returns:
        `dict`: what is not known is missing.
    """
    base = facts["base_models"]
    found = {
        "license": license,
        **DEFAULTS,
        "tags": ["robotics", "vision-language-action", facts["family"]],
        "base_model": base[0] if len(base) == 1 else base,
        "base_model_relation": RELATIONS[facts["adapter"] is None] if base else None,
        "datasets": facts["hub_datasets"],
    }
    return {name: value for name, value in found.items() if value}


def with_defaults(path: Path, metadata: str, values: dict[str, Any]) -> str:
    """Add to a card's metadata what they lack; every line that is there stays as it is.

    A licence that is given replaces none: it must be the one that is there.

    Raises:
        ValueError: the card names another licence.
    """
    there = yaml.safe_load(metadata) or {}
    wanted = values.get("license")
    if wanted is not None and there.get("license") not in (None, wanted):
        raise ValueError(
            f"{path} says license: {there['license']!r}, asked for was {wanted!r}: change it there, or leave it out."
        )
    missing = {name: value for name, value in values.items() if there.get(name) in (None, [])}
    for name in set(missing) & set(there):  # `license:` and nothing behind it
        metadata = with_entry(metadata, name, None)
    return metadata + (yaml_dump(missing) if missing else "")


def merged(path: Path, old: str, new: str) -> str:
    """Put the generated parts of a new card into an old one; a part that it lacks comes behind the one before it.

    Args:
        path (`Path`): to name in errors.
        old (`str`): a card without its metadata, perhaps by a person, perhaps empty.
        new (`str`): as rendered.

    Returns:
        `str`

    Raises:
        ValueError: the old card has a beginning without its end.
    """
    if not old.strip():
        return f"\n{new.strip()}\n"
    place = None
    for part in PART.finditer(new):
        name, found = part[1], [match for match in PART.finditer(old) if match[1] == part[1]]
        marks = [len(re.findall(rf"^<!-- {mark} {name} -->$", old, re.MULTILINE)) for mark in ("begin", "end")]
        if marks != [len(found)] * 2 or len(found) > 1:
            raise ValueError(
                f"{path}: expected <!-- begin {name} --> and then <!-- end {name} -->, each once and on a line of its "
                "own; remove what is left of them."
            )
        if found:
            old = old[: found[0].start()] + part[0] + old[found[0].end() :]
            place = found[0].start() + len(part[0])
            continue
        following = next(iter(PART.finditer(old)), None)
        if place is None and following is not None:
            place = following.start()
            old = f"{old[:place]}{part[0]}\n\n{old[place:]}"
            place += len(part[0])
            continue
        if place is None:
            old = old.rstrip() + "\n"
            place = len(old)
        ahead = "\n" if old[:place].endswith("\n") else "\n\n"
        old = f"{old[:place]}{ahead}{part[0]}{old[place:]}"
        place += len(ahead) + len(part[0])
    return old.rstrip() + "\n"


def templates() -> Path:
    """Folder of the templates: beside this file where the package was installed, else at the repository's top."""
    installed = Path(__file__).parent / "model_cards"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "model_cards"


def environment() -> Environment:
    """Make the templates' environment, in which a value is text: it can neither format nor end what it stands in."""
    made = Environment(
        loader=FileSystemLoader(templates()),
        autoescape=True,
        finalize=as_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"code": as_code, "python": as_python, "fenced": fenced, "number": number, "size": size}
    return made


def as_text(value: Any) -> Markup:
    """Escape what Markdown or HTML would take for more than text."""
    if isinstance(value, Markup):
        return value
    return Markup(SPECIAL.sub(r"\\\g<0>", re.sub(r"\s+", " ", str(value))))


def as_code(value: Any) -> Markup:
    """Put a value between as many backticks as it takes; fit for a table."""
    text = re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    quotes, space = "`" * (longest + 1), " " * (longest > 0 or not text)
    return Markup(f"{quotes}{space}{text}{space}{quotes}")


def as_python(value: Any) -> Markup:
    """Write a text as Python does, with double quotes."""
    return Markup(json.dumps(value, ensure_ascii=False))


def fenced(value: Any, language: str = "yaml") -> Markup:
    """Write a value as a block of YAML, in a fence that nothing in it closes."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}{fence}")


def number(value: float | None) -> str:
    """Write a figure with four digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.4g}"


def size(count: float) -> str:
    """Write a number of bytes."""
    return next((f"{count / unit:.3g} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), "< 1 MB")
