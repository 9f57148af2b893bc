import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import compare_representations as script
import numpy as np
import pytest
import representation_measures as measures
import representation_report as report

from hf_vla.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "scripts" / "recipes" / "compare").glob("*.yaml"))


def test_recipes_differ_in_their_models_alone():
    """And in the words that DiVLA learns to say."""
    first = load_recipe(RECIPES[0])
    assert len(RECIPES) == 12
    for path in RECIPES:
        recipe = load_recipe(path, {"training.output_dir": first.training.output_dir})
        words = "subtask" if path.stem == "divla" else None
        assert recipe.data.reasoning == words
        recipe.data.reasoning = None
        assert recipe.data == first.data, path.stem
        kept = {name: value for name, value in recipe.training.to_dict().items() if name != "logging_dir"}
        assert kept == {name: first.training.to_dict()[name] for name in kept}, path.stem


def test_recipes_share_their_vision_tower():
    configs = [load_recipe(path).model.config for path in RECIPES if load_recipe(path).model.backbone is None]
    assert len(configs) == 6 and len({json.dumps(config["vision_config"], sort_keys=True) for config in configs}) == 1
    assert not any(config["use_vision_zoe"] or config["use_ego3d"] for config in configs)


def test_recipes_have_the_budgets_steps():
    for path in RECIPES:
        training = load_recipe(path).training
        assert (training.max_steps, training.per_device_train_batch_size) == (script.Budget.steps, 32), path.stem


def test_one_at_a_time(tmp_path):
    with script.turn(tmp_path, "fast") as ours, script.turn(tmp_path, "rt1", wait=False) as another:
        with script.turn(tmp_path, "fast", wait=False) as same:
            assert ours and another and not same
    with pytest.raises(KeyboardInterrupt), script.turn(tmp_path, "fast", wait=False):
        raise KeyboardInterrupt
    with script.turn(tmp_path, "fast", wait=False) as ours:
        assert ours


def test_another_protocol_needs_another_folder(tmp_path):
    for _ in range(2):
        script.settle(tmp_path, script.Budget(steps=3))
    with pytest.raises(SystemExit, match="holds a comparison of another protocol"):
        script.settle(tmp_path, script.Budget(steps=4))


def test_measures_are_taken_again_for_another_selection(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(script, "recipe_of", lambda *_: None)
    monkeypatch.setattr(script, "measure", lambda folders, _: taken.append([*folders]) or dict.fromkeys(folders, {}))
    (tmp_path / "results").mkdir()
    seen = []
    monkeypatch.setattr(script, "solved", lambda folder: seen.append(folder) or {"a": [1]})
    for name in ("fast", "fast", "rt1", "rt1"):
        script.result_file(tmp_path, name).write_text(json.dumps({"name": name}))
        results = script.results(tmp_path, script.Budget())
    assert taken == [["fast"], ["rt1", "fast"]] and tmp_path / "results" / "rt1" in seen
    assert results == {name: {"name": name, "solved": {"a": [1]}} for name in ("rt1", "fast")}


def test_what_was_solved_is_read_from_the_records(monkeypatch):
    records = [SimpleNamespace(task=task, seed=seed, success=seed < 2) for task in "ab" for seed in (2, 1, 0)]
    monkeypatch.setattr(script, "read_records", lambda folder: (records, {}))
    assert script.solved(Path("x")) == {"a": [0, 1], "b": [0, 1]}


def measured(left, right, lost, none):
    counts = {"left": left, "right": right, "left, lost": lost, "right, lost": 0, "none": none}
    return {
        "metaworld": {"a": [1, 4], "b": [4, 4]},
        "solved": {"a": [2], "b": [0, 1, 2, 3]},
        "two_ways": {"usual": {"episodes": counts, "starts": [counts]}},
        "action_error": 0.25,
        "round_trip_worst": [0.1, 0.4, 0.2, 9.0],
        "round_trip_mean": [0.1, 0.2, 0.1, 9.0],
        "tokens_per_action": 4.0,
        "tokens_per_action_of_seven": 7.0,
        "tokens_per_chunk": 64.0,
        "passes": {"language": 64, "head": 0},
        "ms_per_chunk": 32.0,
        "ms_per_action": 2.0,
        "parameters": {"backbone": 900_000, "rest": 1_200_000},
        "samples_per_second": 80.4,
    }


def test_the_table_says_what_was_measured():
    assert set(report.TITLES) == {path.stem for path in RECIPES}
    drawn = measured(1, 1, 0, 8)["two_ways"]["usual"]
    results = measured(3, 2, 1, 4)
    results["two_ways"]["sampled"] = {"episodes": drawn["episodes"], "starts": [drawn["episodes"]] * 2}
    line = report.as_table({"openvla": results}).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1].startswith("62.5 %") and cells.pop(2) == "the best"
    assert cells[2].startswith("50.0 %")  # 5 of 8; 5 of 10 arrived
    # who was lost behind the obstacle went by the left, too
    assert cells[3].startswith("60.0 %") and cells[3].endswith("; 4 : 2")
    assert cells[4].startswith("20.0 %") and cells[4].endswith("; 1 : 1") and cells[5] == "1 : 1, 1 : 1"
    assert cells[6:] == ["0.250", "4 (2)", "4 (7)", "64", "64 + 0", "32", "2", "1.20 M", "80"]


def test_the_gap_to_the_best_is_of_pairs():
    counts = {"metaworld": {"a": [6, 8]}, "solved": {"a": [0, 1, 2, 3, 4, 5]}}
    others = {
        "rt1": {"metaworld": {"a": [0, 8]}, "solved": {}},
        "fast": {"metaworld": {"a": [1, 8]}, "solved": {"a": [7]}},
    }
    gaps = report.to_the_best({"openvla": counts, **others})
    # exact McNemar: 6 of 6 differ, p 2 / 2^6; 6 of 7, p 16 / 2^7; Holm doubles the smaller, and the larger stays
    assert gaps == {"openvla": "the best", "rt1": "-75.0 (0.062)", "fast": "-62.5 (0.12)"}


def test_the_page_keeps_its_words(tmp_path):
    page = tmp_path / "representations.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nbehind <!-- here: x -->\n")
    results = {"protocol": {"steps": 2}, "representations": {"fast": measured(1, 1, 0, 0)}}
    for _ in range(2):
        report.write_report(tmp_path, results)
    text = page.read_text()
    assert re.fullmatch(r"before\n<!-- results -->\n\|.*\n<!-- /results -->\nbehind <!-- here: x -->\n", text, re.S)
    assert "old" not in text and text.count("FAST") == 1
    assert json.loads((tmp_path / "representations.json").read_text()) == results
    assert (tmp_path / "representations.png").stat().st_size > 10_000


@pytest.mark.sim
def test_who_goes_left_is_counted_as_left():
    from hf_vla.evaluation.envs.experts.two_ways import TwoWaysExpert
    from hf_vla.evaluation.envs.two_ways import TwoWaysTask

    def controller(observations, generator):
        """Chunks of an expert that always goes left, from the first episode's start; other episodes stay."""
        env = TwoWaysTask("reach-behind")
        env.restart(0)
        expert = TwoWaysExpert(env)
        expert.reset()
        expert.side, actions = "left", []
        while not any(env.advance(expert.act())):
            actions.append(expert.act())
        chunks = np.zeros((len(observations), 60, 4))
        chunks[0, : len(actions)] = actions
        return chunks

    envs = measures._drive(controller, [0, 3], executed=60)
    counts = measures._counts(envs)
    assert sum(counts.values()) == 2 and counts["none"] == 1 and envs[0].side == "left"


@pytest.mark.slow
@pytest.mark.sim
def test_quick_run_compares_everything_and_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "compare_representations.py", "--quick", "--out", tmp_path]
    for names in (["ddim", "fast"], ["regression"]):
        done = subprocess.run([*command, "--only", *names], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    assert "ddim" not in done.stdout and "fast" not in done.stdout  # they were finished
    results = json.loads((tmp_path / "representations.json").read_text())["representations"]
    assert [*results] == ["regression", "fast", "ddim"]
    backbones = {each["parameters"]["backbone"] for each in results.values()}
    assert len(backbones) == 1
    assert results["regression"]["passes"] == {"language": 1, "head": 1}
    assert results["ddim"]["passes"] == {"language": 1, "head": 10}
    assert results["regression"]["tokens_per_chunk"] == 0 and results["fast"]["tokens_per_chunk"] > 0
    assert "sampled" in results["fast"]["two_ways"] and "sampled" not in results["ddim"]["two_ways"]
    assert (tmp_path / "metaworld-ddim" / "model.safetensors").read_bytes() == (
        tmp_path / "metaworld-ddpm" / "model.safetensors"
    ).read_bytes()
    text = (tmp_path / "representations.md").read_text()
    assert text.count("\n| ") == 5 and (tmp_path / "representations.png").is_file()
