"""Reports, comparisons and model cards of records that are written here by hand."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from hf_vla.evaluation.comparison import compare
from hf_vla.evaluation.intervals import compare_pairs, mean_over_tasks, paired_difference, wilson
from hf_vla.evaluation.model_card import add_to_model_card
from hf_vla.evaluation.plots import plot_success
from hf_vla.evaluation.records import EpisodeRecord, RecordWriter
from hf_vla.evaluation.report import write_report

TASKS = ["reach-v3", "push-v3", "door-open-v3"]
PROTOCOL = {
    "env": "metaworld",
    "selection": "three",
    "tasks": TASKS,
    "episodes": 10,
    "seed": 0,
    "horizon": 500,
    "n_action_steps": 4,
    "ensemble_coefficient": None,
    "cameras": {"corner4": {"width": 128, "height": 96}},
    "weights_sha256": "ab" * 32,
    "versions": {"metaworld": "3.1.1", "torch": "2.13.0"},
    "machine": "Zx81, 2 cores",
    "device": "cpu",
    "command": "hf-vla eval --model m --env metaworld --tasks three --episodes 10",
}
SOLVED = {"reach-v3": 10, "push-v3": 4, "door-open-v3": 7}  # of the first seeds


def record(task, seed, success, probe="none"):
    steps = 100 + seed if success else 500
    return EpisodeRecord(task, f"do {task}", seed, success, steps, 3, [10.0, 10.0, 30.0], 2.0, 0, probe)


def score(solved=SOLVED, probe="none"):
    return [record(task, seed, seed < solved[task], probe) for task in TASKS for seed in range(10)]


@pytest.fixture
def write(tmp_path):
    """Write an evaluation's folder."""

    def write(records, name="run", **protocol):
        with RecordWriter(tmp_path / name, {**PROTOCOL, **protocol}) as writer:
            for each in records:
                writer.add(each)
        return tmp_path / name

    return write


def report_of(folder):
    text = write_report(folder).read_text()
    return json.loads((folder / "report.json").read_text()), text


def test_success_by_task_and_over_all(write):
    report, text = report_of(write(score()))
    overall = report["overall"]
    assert {task: rates["successes"] for task, rates in report["tasks"].items()} == SOLVED
    assert report["tasks"]["push-v3"]["success"] == wilson(4, 10)._asdict()
    assert report["tasks"]["push-v3"]["mean_steps_of_successes"] == 101.5
    assert overall["mean_over_tasks"] == mean_over_tasks([(10, 10), (4, 10), (7, 10)])._asdict()
    assert overall["success"] == wilson(21, 30)._asdict()
    assert "| `push-v3` | 40.0 % (16.8 to 68.7) | 4 of 10 | 101.5 |" in text
    assert "**Success 70.0 % (52.1 to 83.3)**, mean over 3 tasks, 30 episodes" in text
    assert "all episodes together" not in text and "Not finished" not in text and "Probes" not in text


def test_an_unfinished_evaluation_says_so(write):
    unfinished = [each for each in score() if (each.task, each.seed) != ("push-v3", 9)]
    report, text = report_of(write(unfinished))
    assert "**Not finished: 29 of 30 episodes.**" in text and "| all episodes together | 72.4 %" in text
    assert report["overall"]["mean_over_tasks"]["estimate"] == pytest.approx((1 + 4 / 9 + 0.7) / 3)


def test_a_task_without_success_has_no_mean_steps(write):
    assert "| `push-v3` | 0.0 % (0.0 to 27.8) | 0 of 10 | - |" in report_of(write(score({**SOLVED, "push-v3": 0})))[1]


def test_the_protocol_is_whole(write):
    text = report_of(write(score(), seed=5))[1]
    for name, value in {
        "seeds": "5 to 14 of each task",
        "horizon": 500,
        "ensemble_coefficient": "none",
        "cameras.corner4.width": 128,
        "weights_sha256": "ab" * 32,
        "versions.metaworld": "3.1.1",
        "tasks": "reach-v3, push-v3, door-open-v3",
    }.items():
        assert f"| `{name}` | {value} |" in text
    assert f"```bash\n{PROTOCOL['command']}\n```" in text


def test_latency_names_the_machine_and_restarts_are_named(write):
    records = score()
    records[3] = replace(records[3], latency_ms=[50.0], restarts=2)
    report, text = report_of(write(records))
    assert report["latency_ms"] == {"p50": 10.0, "p95": 30.0, "calls": 88}
    assert "p50 10.0 ms, p95 30.0 ms" in text and "Machine: Zx81, 2 cores, cpu." in text
    assert report["restarted"] == ["reach-v3, seed 3: 2"] and "hung: reach-v3, seed 3: 2." in text
    assert "hung: none." in report_of(write(score(), "calm"))[1]


def test_an_episode_that_never_asked_the_model_has_no_latency(write):
    report, text = report_of(write([replace(each, latency_ms=[]) for each in score()]))
    assert report["latency_ms"] is None and "p50" not in text and "2.0 s (median)" in text


def test_probes_stand_beside_the_score(write):
    blank, swap = score({**SOLVED, "reach-v3": 0, "push-v3": 0}, "blank"), score(probe="swap")[:-1]
    report, text = report_of(write([*score(), *blank, *swap]))
    assert report["overall"]["episodes"] == 30 and [*report["probes"]] == ["blank", "swap"]
    found = report["probes"]["blank"]
    assert found["success"] == wilson(7, 30)._asdict()
    assert found["difference"] == paired_difference(7, 14, 0, 9)._asdict()
    assert found["p_value"] == compare_pairs([(True, False)] * 14).p_value and found["verdict"] == "worse"
    assert "real" not in text and "Success without looking (every picture black" in text
    assert "23.3 %. The policy looks." in text
    assert "does not show that the policy listens" in text and "difference: door-open-v3, seed 9." in text
    assert "| Solved, by task | none | `blank` | `swap` |" in text
    assert "| `push-v3` | 4 of 10 | 0 of 10 | 4 of 10 |" in text and "| 7 of 10 | 7 of 10 | 7 of 9 |" in text
    one_task = [each for each in [*score(), *blank] if each.task == "reach-v3"]
    assert "Solved, by task" not in report_of(write(one_task, "one", tasks=TASKS[:1]))[1]


def test_a_probe_that_helps_is_told(write):
    text = report_of(write([*score({**SOLVED, "push-v3": 0}), *score({**SOLVED, "push-v3": 10}, "noise")]))[1]
    assert "It succeeds more often so." in text


def test_open_loop_is_reported_where_it_was_measured(write):
    folder = write(score())
    changes = {"blank": {"rmse": [0.3, 0.0], "relative": 1.25}, "noise": {"rmse": [0.0, 0.0], "relative": None}}
    result = {"dataset": "demos", "episodes": 3, "frames": 50, "dimensions": ["x", "y"], "rmse": [0.25, 0.5]}
    result |= {"variance_explained": [0.75, None], "spread": [0.2, 0.1], "changes": changes}
    (folder / "open_loop.json").write_text(json.dumps(result))
    report, text = report_of(folder)
    assert report["open_loop"] == result
    assert "| `x` | 0.25 | 0.75 | 0.2 | 0.3 | 0 |" in text and "| `y` | 0.5 | - | 0.1 | 0 | 0 |" in text
    assert "in spreads: blank 1.25, noise -." in text


def test_the_picture_shows_every_task(write):
    folder = write(score())
    write_report(folder)
    with Image.open(folder / "report.png") as few:
        few = few.size
    many = [f"task-{number}" for number in range(50)]
    folder = write([record(task, 0, True) for task in many], "many", tasks=many, episodes=1)
    write_report(folder)
    with Image.open(folder / "report.png") as picture:
        assert picture.width == few[0] and picture.height - few[1] == pytest.approx(47 * 0.24 * 120, abs=2)


def test_long_names_leave_room_for_the_bars(write):
    name = "LIVING_ROOM_SCENE5_" + "put_the_mug_on_the_left_plate_and_" * 2 + "the_pudding_on_the_right"
    names = [f"{name}_{number}" for number in range(3)]
    report, _ = report_of(write([record(task, 0, True) for task in names], "libero", tasks=names, episodes=1))
    figure = plot_success(report, "libero")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert axis.get_position().width * figure.get_figwidth() > 3  # inches
    assert axis.get_yticklabels()[0].get_text() == f"{names[0]}  1/1"


def test_nothing_to_report(write):
    with pytest.raises(ValueError, match="one episode without a probe"):
        write_report(write(score(probe="blank")))
    with pytest.raises(ValueError, match=r"seed 0 of reach-v3 twice"):
        write_report(write([*score(), record("reach-v3", 0, True)], "twice"))
    with pytest.raises(ValueError, match="No probe is called blnk; there are"):
        write_report(write([*score(), record("reach-v3", 0, True, "blnk")], "misspelt"))


def test_a_significant_difference(write):
    a, b = write(score({**SOLVED, "reach-v3": 2}), "a"), write(score({**SOLVED, "push-v3": 5}), "b")
    text, data = compare(a, b)
    assert data["significant"] and "**B is significantly better than A**: 73.3 % against 43.3 %" in text
    assert data["overall"]["difference"] == paired_difference(13, 0, 9, 8)._asdict()
    assert data["overall"]["p_value"] == pytest.approx(2 / 2**9)
    assert data["tasks"]["reach-v3"]["p_value"] == pytest.approx(2 / 2**8)
    assert data["tasks"]["reach-v3"]["p_holm"] == pytest.approx(3 * 2 / 2**8)
    assert "corrected for there being 3: reach-v3." in text
    assert "**B is significantly worse than A**" in compare(b, a)[0]
    assert json.loads(json.dumps(data)) == data


def test_no_significant_difference(write):
    text, data = compare(write(score(), "a"), write(score({**SOLVED, "push-v3": 5}), "b"))
    assert not data["significant"] and "is not significant**" in text and "being 3: none." in text
    assert data["differs"] == {} and data["unpaired"] == [] and "Left out" not in text and "else differs" not in text


def test_unpaired_episodes_are_named_and_left_out(write):
    a, b = score(), [*score({**SOLVED, "push-v3": 5}), *score(probe="blank")]
    del a[0], b[11]  # reach-v3 seed 0; push-v3 seed 1
    text, data = compare(write(a, "a"), write(b, "b"))
    assert data["unpaired"] == ["push-v3, seed 1", "reach-v3, seed 0"] and data["overall"]["pairs"] == 28
    assert "(2): push-v3, seed 1; reach-v3, seed 0." in text
    with pytest.raises(ValueError, match="no episode in common"):
        compare(write(score()[:3], "first"), write(score()[3:], "rest"))


@pytest.mark.parametrize(
    "other",
    [{"env": "libero"}, {"tasks": ["push-v3"]}, {"seed": 1}, {"episodes": 9}, {"horizon": 400}, {"horizon": {"a": 1}}],
)
def test_other_episodes_are_not_compared(write, other):
    with pytest.raises(ValueError, match=f"the same episodes, came {next(iter(other))}"):
        compare(write(score(), "a"), write(score(), "b", **other))


def test_what_else_differs_is_listed(write):
    versions = {"metaworld": "3.1.1", "torch": "2.14.0"}
    other = {"versions": versions, "n_action_steps": 8, "tasks": TASKS[::-1], "batch_size": 4}
    text, data = compare(write(score(), "a"), write(score(), "b", **other))
    assert data["differs"] == {
        "versions.torch": ["2.13.0", "2.14.0"],
        "n_action_steps": [4, 8],
        "batch_size": [None, 4],
    }
    assert "| `versions.torch` | 2.13.0 | 2.14.0 |" in text


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's folder, as far as a card goes."""
    folder = tmp_path / "my-policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_card_is_made_and_made_again(write, checkpoint):
    folder = write(score())
    write_report(folder)
    first = add_to_model_card(checkpoint, folder).read_bytes()
    assert add_to_model_card(checkpoint, folder).read_bytes() == first
    card = ModelCard.load(checkpoint / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.model_name) == (
        "hf_vla",
        "robotics",
        "my-policy",
    )
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("success_rate", 70.0, "metaworld")
    assert result.metric_args == {"confidence_interval_95": [52.12, 83.34]}
    assert "# my-policy" in card.text and "## Evaluation on metaworld: three" in card.text
    assert PROTOCOL["command"] in card.text and "`weights_sha256`" in card.text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_rest_of_a_card_stays_as_it_is(write, checkpoint, newline):
    head = "---\nlicense:   mit  # a comment\ntags: [a,  b]\nlibrary_name: other\n"
    body = "\n# Mine\n\n  Text with *marks*,\n---\nand a rule.\n\n\nEnd.\n"
    readme = checkpoint / "README.md"
    readme.write_bytes(f"{head}---\n{body}".replace("\n", newline).encode())
    folder = write(score())
    write_report(folder)
    add_to_model_card(checkpoint, folder)
    once = readme.read_bytes()
    text = once.decode().replace("\r\n", "\n")
    assert once.decode() == text.replace("\n", newline)
    assert text.startswith(f"{head}pipeline_tag: robotics\nmodel-index:\n") and f"---\n{body}\n<!-- begin" in text
    add_to_model_card(checkpoint, folder)
    assert readme.read_bytes() == once


def test_evaluations_of_other_tasks_stand_side_by_side_and_the_same_are_replaced(write, checkpoint):
    def add(name, solved, **protocol):
        folder = write(score(solved), name, **protocol)
        write_report(folder)
        add_to_model_card(checkpoint, folder)

    add("first", SOLVED)
    add("other", SOLVED, env="robosuite", selection="lift")
    readme = checkpoint / "README.md"
    readme.write_text(readme.read_text() + "\nLast words.\n")
    add("again", {**SOLVED, "push-v3": 10})
    card = ModelCard.load(readme)
    assert {r.dataset_type: r.metric_value for r in card.data.eval_results} == {"metaworld": 90.0, "robosuite": 70.0}
    assert card.text.count("## Evaluation on") == 2 and card.text.index("metaworld: three") < card.text.index("lift")
    assert "Success 90.0 %" in card.text and card.text.endswith("\nLast words.\n")


def test_what_others_say_in_the_metadata_is_kept(write, checkpoint):
    others = (
        "model-index:\n- name: theirs\n  results:\n  - task:\n      type: robotics\n    dataset:\n      type: calvin\n"
    )
    others += "      name: CALVIN\n    metrics:\n    - type: length\n      value: 3.5\nlicense: mit\n"
    (checkpoint / "README.md").write_text(f"---\n{others}---\n# Card")
    folder = write(score())
    write_report(folder)
    data = ModelCard.load(add_to_model_card(checkpoint, folder)).data
    assert [result.metric_value for result in data.eval_results] == [3.5, 70.0]
    assert (data.model_name, data.license) == ("theirs", "mit")


def test_cards_that_cannot_be_written(write, checkpoint, tmp_path):
    folder = write(score())
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        add_to_model_card(checkpoint, folder)
    write_report(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        add_to_model_card(tmp_path / "nothing", folder)
    readme = checkpoint / "README.md"
    for text, message in {
        "---\na: [\n---\n# Card\n": "metadata cannot be read",
        "# Card\n<!-- begin evaluation metaworld three -->\n": "each once",
    }.items():
        readme.write_text(text)
        with pytest.raises(ValueError, match=message):
            add_to_model_card(checkpoint, folder)
        assert readme.read_text() == text
