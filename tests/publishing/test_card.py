"""Model cards: what they say is what the checkpoint says, their code runs, and what a person wrote stays."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from hf_vla.cli.main import app
from hf_vla.evaluation.protocol import weights_sha256
from hf_vla.evaluation.records import write_whole
from hf_vla.hub.card import PART, environment, write_card
from hf_vla.hub.facts import base_models, checkpoint_facts
from hf_vla.hub.push import push_checkpoint
from hf_vla.models.auto import FAMILIES
from hf_vla.policy import Policy
from hf_vla.training.recipe import load_recipe
from hf_vla.training.run import train

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "spaces" / "action_demo" / "checkpoints"
RECIPES = ROOT / "scripts" / "recipes"
PARTS = ["summary", "usage", "robot", "representation", "training", "size", "limits", "licence"]
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
# the worst of metadata, Markdown, comments and Python in one name
ODD = '|`a``b`| *ü* "q" <!-- end robot --> [x](y): {{ 7 * 7 }} \\'


@pytest.fixture(scope="module")
def robots(sawyer, tmp_path_factory):
    """A saved checkpoint of every family."""
    folders = {}
    for family in FAMILIES:
        model, processor = sawyer(family)
        folders[family] = tmp_path_factory.mktemp("robots") / family
        model.save_pretrained(folders[family])
        processor.save_pretrained(folders[family])
    return folders


@pytest.fixture
def robot(robots, tmp_path):
    """Copy one of them: `robot(family)`."""
    return lambda family="tinyvla": shutil.copytree(robots[family], tmp_path / family)


def part(text, name):
    return next(match[0] for match in PART.finditer(text) if match[1] == name)


def run_code(card, cwd):
    """Execute the code of a card, in a folder, and return its names."""
    (code,) = CODE.findall(card.read_text() if isinstance(card, Path) else card)
    names = {}
    with contextlib.chdir(cwd):
        exec(compile(code, "card", "exec"), names)
    return names


def test_a_family_has_a_card_that_runs(robot, family, tmp_path):
    folder = robot(family)
    path = write_card(folder)
    text = path.read_text()
    assert [match[1] for match in PART.finditer(text)] == PARTS
    names = run_code(path, tmp_path)
    assert names["action"].shape == (4,) and np.isfinite(names["action"]).all()
    assert ("words" in names) == (family == "divla")
    policy = Policy.from_pretrained(folder)
    for name in policy.action_spec.names:
        assert f"`{name}`" in part(text, "robot")
    assert "`corner4` | 48 x 48 | 41.6, 41.6, 24, 24 | no |" in text and "-1 open, +1 closed" in text
    model = AutoModel.from_pretrained(folder)
    count = sum(each.numel() for each in model.parameters())
    assert f"| all | {count:,} |" in text and f"in memory {4 * count / 1e6:.3g} MB in float32" in text
    data = ModelCard.load(path).data
    assert (data.library_name, data.pipeline_tag) == ("hf_vla", "robotics") and family in data.tags
    assert data.base_model is None and data.license is None and data.datasets is None
    for unknown in (
        "how it was trained is not known",
        "no `training.json`",
        "Latency: not measured",
        "not stated; ask",
    ):
        assert unknown in text
    assert str(tmp_path) not in text


def test_the_code_of_a_pushed_card_pulls_it(hub, robots, tmp_path, monkeypatch):
    """In a process that knows the repository's name alone."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    push_checkpoint(robots["divla"], "somebody/robot", code=False)
    card = hub.read("somebody/robot", "README.md", kind="model").decode()
    assert "from the folder" not in card
    code = CODE.findall(card)[0] + "print(action.tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copytree(robots["divla"], tmp_path / "local")
    names = run_code(write_card(tmp_path / "local"), tmp_path)
    assert json.loads(done.stdout) == names["action"].tolist()


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.iterdir()))
def test_a_shipped_card_is_up_to_date_and_runs(name, tmp_path):
    folder = shutil.copytree(SHIPPED / name, tmp_path / name)
    before = (folder / "README.md").read_bytes()
    assert write_card(folder).read_bytes() == before
    assert np.isfinite(run_code(folder / "README.md", tmp_path)["action"]).all()
    card = ModelCard.load(folder / "README.md")
    report = json.loads((folder / "eval" / "report.json").read_text())
    (result,) = card.data.eval_results
    assert result.metric_value == round(100 * report["overall"]["mean_over_tasks"]["estimate"], 2)
    assert result.metric_args["confidence_interval_95"][0] < result.metric_value
    assert f"{report['overall']['episodes']} episodes" in card.text and card.data.license == "apache-2.0"
    assert card.data.base_model is None  # they began with folders
    training = json.loads((folder / "training.json").read_text())
    assert f"{training['steps']:,} steps" in part(card.text, "training")
    assert all(f"\n- {text}\n" in card.text for text in training["instructions"])
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1]) == training["recipe"]


def test_what_a_person_wrote_stays(robot):
    folder = robot()
    path = write_card(folder, license="mit")
    text = path.read_text()
    mine = text.replace("# tinyvla\n", "# My robot\n\nHello.\n").replace(
        "<!-- begin robot -->", "Between.\n\n<!-- begin robot -->"
    )
    mine = mine.replace("license: mit\n", "license: mit  # as agreed\nlanguage: en\n") + "\nAt the end.\n"
    stale = mine.replace("48 x 48", "1 x 1").replace("A TinyVLA of", "A giant of")
    assert stale != mine
    path.write_text(stale)
    assert write_card(folder).read_text() == mine
    path.write_bytes(stale.replace("\n", "\r\n").encode())
    assert write_card(folder).read_bytes() == mine.replace("\n", "\r\n").encode()


def test_a_part_that_is_missing_comes_back_to_its_place(robot):
    folder = robot()
    path = write_card(folder)
    text = path.read_text()
    for name in PARTS:
        path.write_text(text.replace(part(text, name) + "\n\n", "").replace("\n\n" + part(text, name), ""))
        assert [match[1] for match in PART.finditer(write_card(folder).read_text())] == PARTS
    path.write_text("# Mine\n\nNo parts yet.")
    text = write_card(folder).read_text()
    assert "# Mine\n\nNo parts yet.\n\n<!-- begin summary -->" in text and text.startswith("---\n")
    assert [match[1] for match in PART.finditer(text)] == PARTS


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- end robot -->", "", "expected <!-- begin robot --> and then <!-- end robot -->"),
        ("<!-- begin robot -->", "<!-- begin robot -->\n<!-- begin robot -->", "each once and on a line"),
        ("license: mit", "license: [", "metadata cannot be read"),
        ("license: mit", "license: apache-2.0", "says license: 'apache-2.0', asked for was 'mit'"),
    ],
)
def test_broken_cards_are_named_and_left_as_they_are(robot, old, new, message):
    path = write_card(robot(), license="mit")
    path.write_text(path.read_text().replace(old, new, 1))
    broken = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)):
        write_card(path.parent, license="mit")
    assert path.read_bytes() == broken


def test_drafts_that_nobody_filled_in_are_replaced(robot):
    """What transformers and peft draft: their text goes, what somebody says in the metadata stays."""
    folder = robot()
    path = folder / "README.md"
    for library, line in (("transformers", ""), ("peft", "\n### Framework versions\n\n- PEFT 0.21.0\n")):
        about = {"library_name": library, "license": "cc-by-nc-4.0", "datasets": ["me/data"], "tags": []}
        about["base_model"] = "/tmp/model"
        drafted = "This is the model card of a 🤗 transformers model. It has been automatically generated."
        draft = ModelCard.from_template(ModelCardData(**about), model_description=drafted).content + line
        path.write_text(draft)
        card = ModelCard.load(write_card(folder))
        assert "More Information" not in card.text and card.text.lstrip().startswith("# tinyvla\n")
        data = card.data
        assert (data.library_name, data.license, data.datasets) == ("hf_vla", "cc-by-nc-4.0", ["me/data"])
        assert "tinyvla" in data.tags and data.base_model is None
        path.write_text(draft.replace("- **Developed by:** [More Information Needed]", "- **Developed by:** Me"))
        text = write_card(folder).read_text()
        assert "- **Developed by:** Me" in text and "[More Information Needed]" in text
        assert "license: cc-by-nc-4.0" in text and [match[1] for match in PART.finditer(text)] == PARTS
    path.write_text("# Mine\n\nLicense: [More Information Needed]\n")
    assert "[More Information Needed]" in write_card(folder).read_text()


def test_success_rates_of_other_weights_are_not_claimed(hub, tmp_path, monkeypatch):
    folder = shutil.copytree(SHIPPED / "spatialvla_robosuite", tmp_path / "robot")
    rate = ModelCard.load(folder / "README.md").data.eval_results[0].metric_value
    path = folder / "README.md"
    other = {"dataset": {"type": "calvin", "name": "C"}, "task": {"type": "robotics"}}
    other["metrics"] = [{"type": "length", "value": 3.5}]
    values = metadata_load(path)
    values["model-index"][0]["results"].append(other)
    path.write_text(f"---\n{yaml.safe_dump(values)}---\n{ModelCard.load(path).text}\nMy words.\n")
    assert {each.metric_value for each in ModelCard.load(write_card(folder)).data.eval_results} == {rate, 3.5}
    monkeypatch.setenv("HF_TOKEN", hub.token)
    push_checkpoint(folder, "somebody/robot", code=False)
    assert str(rate) in hub.read("somebody/robot", "README.md", kind="model").decode()
    weights = load_file(folder / "model.safetensors")
    name = next(name for name, value in weights.items() if value.is_floating_point())
    save_file(weights | {name: weights[name] * 1.25}, folder / "model.safetensors", metadata={"format": "pt"})
    card = ModelCard.load(write_card(folder))
    assert [each.metric_value for each in card.data.eval_results] == [3.5]
    assert "Evaluation on robosuite" not in card.text and "My words." in card.text
    assert "No success rate is known" in card.text and "is of others, and is not told" in card.text
    shutil.rmtree(folder / "eval")
    path.unlink()
    push_checkpoint(folder, "somebody/robot", code=False)  # whose card has them
    said = hub.read("somebody/robot", "README.md", kind="model").decode()
    assert "My words." in said and str(rate) not in said and "Evaluation on robosuite" not in said


def test_adapters_and_what_was_retrained_are_told_apart(robots, tmp_path, hub):
    """Also that an evaluation of them is told; and no adapter's card stops half-way."""
    model = AutoModel.from_pretrained(robots["tinyvla"])
    targets = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, modules_to_save=["action_head"]))
    folder = tmp_path / "adapters"
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(robots["tinyvla"]).save_pretrained(folder)
    shutil.copytree(robots["tinyvla"], folder / "base")
    assert not (folder / "config.json").exists()
    trained = {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    added = sum(count for name, count in trained.items() if "lora_" in name)
    facts = checkpoint_facts(folder)["adapter"]
    assert (facts["parameters"], facts["retrained"]) == (added, sum(trained.values()) - added)
    report = json.loads((SHIPPED / "tinyvla_metaworld" / "eval" / "report.json").read_text())
    report["protocol"]["weights_sha256"] = weights_sha256(Policy.from_pretrained(str(folder)).model)
    (folder / "eval").mkdir()
    (folder / "eval" / "report.json").write_text(json.dumps(report))
    text = write_card(folder).read_text()
    assert f"of {added:,} parameters more and {facts['retrained']:,} retrained ones that replace the base's:" in text
    assert f"| retrained, in place of some of these | {facts['retrained']:,} |" in text
    assert "## Evaluation on metaworld: easy" in text and "value: 55.71" in text


def test_what_was_generated_of_another_model_is_not_kept(hub, robot, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    here = {"name": "mine", "on_hub": False}
    summary = {"steps": 5, "instructions": [], "num_instructions": 0, "action_error": None}
    summary |= {"trainable_parameters": None, "recipe": {}}

    def origins(model, data):
        sources = [{"name": name, "on_hub": True} if name else here for name in (model, data)]
        return {"started_from": {"path": sources[0]}, "datasets": {"a": sources[1] | {"held_out_episodes": 0}}}

    def push(folder, *names):
        (folder / "training.json").write_text(json.dumps(summary | origins(*names)))
        push_checkpoint(folder, "somebody/robot", code=False)
        return yaml.safe_load(hub.read("somebody/robot", "README.md", kind="model").decode().split("---\n")[1])

    first = push(robot("spatialvla"), "owner/model_", "owner/data")
    assert (first["base_model"], first["datasets"]) == ("owner/model_", ["owner/data"])
    second = push(robot("tinyvla"), "owner/other", "owner/more")
    assert second["tags"] == ["robotics", "vision-language-action", "tinyvla"]
    assert (second["base_model"], second["datasets"]) == ("owner/other", ["owner/more"])
    assert not {"base_model", "base_model_relation", "datasets"} & push(robot("divla"), None, None).keys()
    folder = robot("pi0_vla")
    mine = "tags: [robotics, mine]\nbase_model: me/base\nbase_model_relation: merge\ndatasets: [me/data]  # mine\n"
    (folder / "README.md").write_text(f"---\n{mine}---\n")
    push(folder, "owner/model", "owner/data")
    (folder / "README.md").write_bytes(hub.read("somebody/robot", "README.md", kind="model"))
    push(folder, "owner/other", "owner/more")
    assert mine in hub.read("somebody/robot", "README.md", kind="model").decode()


def test_the_name_that_a_card_has_is_kept(robot, tmp_path):
    folder = robot()
    write_card(folder)
    for repo_id in ("somebody/robot", None):
        text = write_card(folder, repo_id).read_text()
        assert 'Policy.from_pretrained("somebody/robot", seed' in text and "from the folder" not in text
        assert "\n# robot\n" in text and "# tinyvla" not in text
    (folder / "README.md").write_text(text.replace("# robot\n", "# My robot\n"))
    text = write_card(folder, "somebody/other").read_text()
    assert "\n# My robot\n" in text and 'Policy.from_pretrained("somebody/other", seed' in text


@pytest.mark.parametrize(
    "front",
    [
        "\ufeff---\nlicense: mit\n---\n",
        "--- \nlicense: mit\n---\t\n",
        "---\nlicense: mit\n...\n---\n",
        "---\nlicense: mit\n...\n",
        "---\n{license: mit}\n---\n",
    ],
)
def test_every_way_to_write_metadata_is_read(robot, front):
    folder = robot()
    (folder / "README.md").write_text(front + "# Mine\n", encoding="utf-8")
    path = write_card(folder, license="mit")
    text = path.read_text()
    assert metadata_load(path)["license"] == "mit" and metadata_load(path)["library_name"] == "hf_vla"
    assert text.startswith("---\n") and len(re.findall(r"^---", text, re.MULTILINE)) == 2 and "license: mit" in text
    assert text.count("license") == 1 + part(text, "licence").count("license") and "# Mine\n" in text
    assert write_card(folder).read_text() == text


def test_broken_files_beside_the_weights_are_named(robot):
    folder = robot()
    (folder / "README.md").write_text("# Mine\n")
    for name in ("training.json", "latency.json"):
        for text in ("{", "[]", "{}"):
            (folder / name).write_text(text)
            with pytest.raises(ValueError, match=re.escape(name)):
                write_card(folder)
        (folder / name).unlink()
    (folder / "eval").mkdir()
    (folder / "eval" / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"report\.json: expected overall, which it lacks"):
        write_card(folder)
    assert (folder / "README.md").read_text() == "# Mine\n" and not (folder / "README.md.part").exists()
    with pytest.raises(UnicodeEncodeError):
        write_whole(folder / "README.md", "\ud800")
    assert (folder / "README.md").read_text() == "# Mine\n" and not (folder / "README.md.part").exists()


def test_names_can_neither_format_nor_break_a_card(robot, tmp_path):
    folder = robot()
    path = folder / "processor_config.json"
    saved = json.loads(path.read_text())
    specs = saved["action_config"]["specs"]["metaworld"]
    specs["action"]["names"], specs["state"]["names"] = [ODD, "y", "z|w", "gripper"], [ODD, "y", "z", "w"]
    saved["camera_config"]["metaworld"][0]["name"] = ODD
    for values in (saved["action_config"]["specs"], saved["camera_config"], saved["statistics"]):
        values[ODD] = values["plain"] = values.pop("metaworld")
    path.write_text(json.dumps(saved))
    odd = {"name": ODD, "on_hub": False}
    summary = {"started_from": {"path": odd}, "datasets": {ODD: odd | {"held_out_episodes": 1}}, "steps": 3}
    summary |= {"instructions": [ODD, "```\n<!-- end training -->"], "num_instructions": 2, "action_error": None}
    summary |= {
        "trainable_parameters": 5,
        "recipe": {"model": {"path": ODD, "text": "a\n```\n<!-- end training -->\n"}},
    }
    (folder / "training.json").write_text(json.dumps(summary))
    path = write_card(folder, license="öffentlich: #1 [x]")
    text = path.read_text()
    assert [match[1] for match in PART.finditer(text)] == PARTS
    assert write_card(folder).read_text() == text
    assert metadata_load(path)["license"] == "öffentlich: #1 [x]"
    assert "49" not in part(text, "robot") and "{{ 7 * 7 }}" in text
    for row in part(text, "robot").splitlines():
        if row.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", row)) in (9, 6)
    names = run_code(path, tmp_path)
    assert names["policy"].unnorm_key == sorted([ODD, "plain"])[0] and names["action"].shape == (4,)
    assert f"observation.images.{ODD}" in names["observation"]
    (recipe,) = re.findall(r"^(`{4,})yaml\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(recipe[1]) == summary["recipe"]


def test_resolution_is_what_tokens_lose(robot):
    """Of actions all over the range, none comes back farther off than the card says, and some come close."""
    folder = robot("spatialvla")
    path = folder / "processor_config.json"
    saved = json.loads(path.read_text())
    low, high = np.array([-0.02, -1.0, 3.0, 0.0]), np.array([0.06, 1.0, 5.0, 1.0])
    saved["statistics"]["metaworld"]["action"] = {
        name: values.tolist() for name, values in {"q01": low, "q99": high, "min": low, "max": high}.items()
    }
    path.write_text(json.dumps(saved))
    codec = AutoProcessor.from_pretrained(folder).action_codec
    facts = checkpoint_facts(folder)
    said = np.array([row["rounding"] for row in facts["datasets"][0]["dimensions"]])
    random = np.random.default_rng(0)
    actions = random.uniform(low, high, (4000, codec.chunk_size, 4))
    worst = np.abs(codec.decode(codec.encode(actions)) - actions).max(axis=(0, 1))
    assert (worst[:3] <= said[:3] + 1e-6).all() and (worst[:3] > 0.6 * said[:3]).all()
    text = write_card(folder).read_text()
    assert f"| {said[0]:.4g} |" in text and "| open or closed |" in text


def test_bins_of_a_head_round_too(sawyer, tmp_path):
    model, processor = sawyer("tinyvla", head_config={"type": "classification", "num_bins": 50})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert "50 bins of each number (argmax)" in text and "| 0.02 |" in text and "are samples" not in text


def test_what_a_training_saved_is_told(robots, tmp_path, monkeypatch):
    """Adapters of a folder, trained from a recipe."""
    monkeypatch.chdir(ROOT)
    changes = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    recipe = load_recipe(RECIPES / "tinyvla_tiny.yaml", {f"training.{name}": value for name, value in changes.items()})
    train(recipe)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    summary = json.loads((folder / "training.json").read_text())
    model = AutoModel.from_pretrained(folder)
    assert summary["trainable_parameters"] == sum(each.numel() for each in model.parameters())
    assert summary["steps"] == 1 and summary["started_from"] == {}
    assert summary["datasets"]["robosuite_demos"]["held_out_episodes"] == len(recipe.data.datasets[0].eval_episodes)
    assert summary["instructions"] == sorted(summary["instructions"]) and summary["num_instructions"] >= 1
    assert str(tmp_path) not in (folder / "training.json").read_text()
    text = write_card(folder).read_text()
    assert "began with random weights and was trained for 1 steps" in text
    assert f'"task": "{summary["instructions"][0]}"' in text and "robosuite_demos`, not on the Hub" in text
    assert f"| trained in the last training | {summary['trainable_parameters']:,} |" in text
    assert "learning_rate" in text and str(ROOT) not in text and str(tmp_path) not in text
    run_code(folder / "README.md", tmp_path)


def test_adapters_name_their_model_where_the_hub_has_it(hub, robots, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    push_checkpoint(robots["tinyvla"], "somebody/base", code=False)
    torch.manual_seed(0)
    names = (name for name, _ in AutoModel.from_pretrained(robots["tinyvla"]).named_modules())
    targets = [name for name in names if name.endswith("q_proj")]
    for base, known in (("somebody/base", True), (str(robots["tinyvla"]), False), ("outputs/model", False)):
        folder = tmp_path / base.replace("/", "_")
        model = AutoModel.from_pretrained(robots["tinyvla"])
        model.add_adapter(LoraConfig(r=2, target_modules=targets))
        model.save_pretrained(folder)
        AutoProcessor.from_pretrained(robots["tinyvla"]).save_pretrained(folder)
        shutil.copy(robots["tinyvla"] / "config.json", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (folder / "adapter_config.json").write_text(json.dumps(config))
        data = ModelCard.load(write_card(folder)).data
        assert data.base_model == ("somebody/base" if known else None)
        assert data.to_dict().get("base_model_relation") == ("adapter" if known else None)
        text = (folder / "README.md").read_text()
        assert (
            "with adapters (LORA, rank 2) of " in text
            and "retrained ones" not in text
            and "adapters, beside these" in text
        )


def test_a_model_s_origins_are_metadata_only_where_they_are_on_the_hub(robot):
    folder = robot()
    here, there = {"name": "mine", "on_hub": False}, {"name": "owner/model", "on_hub": True}
    assert base_models(folder, {"started_from": {"path": here}}) == []
    data = {"a": {"name": "owner/data", "on_hub": True, "held_out_episodes": 0}, "b": here | {"held_out_episodes": 1}}
    summary = {"started_from": {"backbone": there, "vision_model": here}, "datasets": data, "steps": 5}
    summary |= {"instructions": [], "num_instructions": 0, "action_error": 0.125, "trainable_parameters": None}
    (folder / "training.json").write_text(json.dumps(summary | {"recipe": {}}))
    card = ModelCard.load(write_card(folder))
    assert card.data.base_model == "owner/model" and card.data.datasets == ["owner/data"]
    assert metadata_load(folder / "README.md")["base_model_relation"] == "finetune"
    assert "started from `owner/model` and `mine`" in card.text and "error is 0.125 robot units" in card.text


def test_latency_is_measured_when_asked_for_alone(robot):
    folder = robot()
    result = CliRunner().invoke(app, ["card", str(folder), "--device", "cpu"])
    assert result.exit_code == 1 and "give --measure-latency" in " ".join(result.output.split())
    path = folder / "processor_config.json"
    saved = json.loads(path.read_text())
    for values in (saved["action_config"]["specs"], saved["camera_config"], saved["statistics"]):
        values["two"] = values["metaworld"]
    path.write_text(json.dumps(saved))
    command = ["card", str(folder), "--measure-latency", "--device", "cpu", "--license", "mit"]
    for options, key in ((["--unnorm-key", "two"], "two"), ([], "metaworld")):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.output
        measured = json.loads((folder / "latency.json").read_text())
        assert measured["unnorm_key"] == key
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    assert 0 < measured["p50_ms"] <= measured["p95_ms"] and measured["device"] == f"cpu, {threads}"
    text = (folder / "README.md").read_text()
    assert f"p50 {measured['p50_ms']} ms, p95 {measured['p95_ms']} ms (20 predictions" in text
    assert "cores of" in part(text, "size") and "Licence of these weights: mit." in text


@pytest.mark.parametrize("what", ["no folder", "no checkpoint", "another family", "no processor"])
def test_what_is_no_checkpoint_of_ours_gets_no_card(robot, tmp_path, what):
    folder, error = robot(), ValueError
    if what == "no folder":
        folder, error, message = tmp_path / "nothing", FileNotFoundError, "no such folder"
    elif what == "no checkpoint":
        (folder / "config.json").unlink()
        error, message = FileNotFoundError, "it has no config.json"
    elif what == "another family":
        (folder / "config.json").write_text('{"model_type": "bert"}')
        message = "Expected a checkpoint of .* came model_type 'bert'"
    else:
        (folder / "processor_config.json").unlink()
        message = "saved without its processor"
    with pytest.raises(error, match=message):
        write_card(folder)
    assert not (folder / "README.md").exists()


def test_the_hub_s_own_check_takes_every_card(hub, robots, tmp_path):
    for folder in [*robots.values(), *SHIPPED.iterdir()]:
        copy = shutil.copytree(folder, tmp_path / folder.name)
        ModelCard.load(write_card(copy)).validate(repo_type="model")
    assert len(hub.requests("/api/validate-yaml")) == len(robots) + len([*SHIPPED.iterdir()])
    with pytest.raises(ValueError, match="base_model"):
        ModelCard("---\nbase_model: /tmp/somewhere\n---\n").validate(repo_type="model")


def test_every_family_has_a_template():
    names = {path.stem for path in (ROOT / "model_cards").glob("*.md")}
    assert names >= FAMILIES.keys() and all(environment().get_template(f"{name}.md") for name in names)
