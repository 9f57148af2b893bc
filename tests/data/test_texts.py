"""Texts beside the instruction: what each row says, and where it comes from."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vla.data.lerobot import LeRobotEpisodes

SUBTASKS = ["reach for it", "take it", "let it go"]
VERSIONS = ["v30_video_av1", "v21_video"]


def write_subtasks(root, texts=SUBTASKS, numbers=None, name="subtask"):
    """As LeRobot's annotation tools do."""
    numbers = range(len(texts)) if numbers is None else numbers
    pd.DataFrame({"subtask_index": numbers}, index=pd.Index(texts, name=name)).to_parquet(
        root / "meta/subtasks.parquet"
    )


def thirds(rows):
    return pa.array([row % 3 for row in rows])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("name", VERSIONS)
def test_a_column_of_text_may_have_nulls(copy, add, name, kind):
    root = copy(name)
    said = {0: None, 1: "", 2: "row 2 é"}
    add(root, "reasoning", "string", lambda rows: pa.array([said.get(row, f"row {row}") for row in rows], kind))
    dataset = LeRobotEpisodes(root, cameras=[])
    assert dataset.text_columns == ["reasoning", "task"]
    assert [dataset[row]["reasoning"] for row in range(4)] == [None, "", "row 2 é", "row 3"]
    assert dataset.texts("reasoning").tolist() == [item["reasoning"] for item in dataset]
    assert dataset.texts("task").tolist() == [item["task"] for item in dataset]
    one = LeRobotEpisodes(root, episodes=[2], cameras=[])
    assert one.texts("reasoning")[0] == one[0]["reasoning"] == f"row {int(one[0]['index'])}"


def test_a_column_without_a_single_text_is_none_throughout(copy, add):
    root = copy()
    add(root, "reasoning", "string", lambda rows: pa.nulls(len(rows)))
    dataset = LeRobotEpisodes(root, cameras=[])
    assert dataset[3]["reasoning"] is None and set(dataset.texts("reasoning")) == {None}


@pytest.mark.parametrize("index", ["subtask", None])
@pytest.mark.parametrize("name", VERSIONS)
def test_subtasks_are_read_as_lerobot_reads_them(copy, add, name, index):
    root = copy(name)
    add(root, "subtask_index", "int64", thirds)
    write_subtasks(root, name=index)
    dataset = LeRobotEpisodes(root, {"action": [0.0, 0.1]}, episodes=[1, 3], cameras=[])
    item = dataset[-1]
    assert [*item][-2:] == ["task", "subtask"] and dataset.text_columns == ["task", "subtask"]
    assert item["subtask"] == SUBTASKS[item["subtask_index"]]  # subtasks.iloc[subtask_index].name
    expected = [SUBTASKS[number] for number in dataset.column("index") % 3]
    assert dataset.texts("subtask").tolist() == [item["subtask"] for item in dataset] == expected


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.float64()])  # the last is what pandas makes of nulls
@pytest.mark.parametrize("number", [lambda row: -1 if row < 2 else 1, lambda row: None if row < 2 else 1])
def test_rows_that_are_not_annotated_have_no_subtask(copy, add, number, kind):
    """Their number is -1, which LeRobot reads as the last subtask, or null."""
    root = copy()
    add(root, "subtask_index", "int64", lambda rows: pa.array([number(row) for row in rows], kind))
    write_subtasks(root)
    dataset = LeRobotEpisodes(root, cameras=[])
    assert dataset.texts("subtask").tolist()[:3] == [None, None, "take it"]
    assert dataset[1]["subtask"] is None and dataset[2]["subtask"] == "take it"
    assert dataset.column("subtask_index").dtype == np.int64 and dataset[1]["subtask_index"] == -1


def test_a_dataset_may_have_no_subtask_yet(copy, add):
    root = copy()
    add(root, "subtask_index", "int64", lambda rows: pa.nulls(len(rows)))
    write_subtasks(root)
    assert set(LeRobotEpisodes(root, cameras=[]).texts("subtask")) == {None}


@pytest.mark.parametrize("number", ["one", 1.5])
def test_what_numbers_no_subtask_is_refused(copy, add, number):
    root = copy()
    add(root, "subtask_index", "int64", lambda rows: pa.array([number] * len(rows)))
    write_subtasks(root)
    with pytest.raises(ValueError, match=f"subtask_index {number} of episode 0, frame 0 is none of the"):
        LeRobotEpisodes(root, cameras=[])


@pytest.mark.parametrize(("number", "said"), [(3, "3"), (-2, "-2")])
@pytest.mark.parametrize("name", VERSIONS)
def test_a_wrong_number_of_a_subtask_is_an_error_that_names_the_row(copy, add, name, number, said):
    root = copy(name)
    starts = LeRobotEpisodes(root, cameras=[]).episode_starts
    add(root, "subtask_index", "int64", lambda rows: pa.array([number if r == starts[1] + 5 else 0 for r in rows]))
    write_subtasks(root)
    message = rf"{name}: subtask_index {said}(\.0)? of episode 1, frame 5 is none of the dataset's 3 subtask\(s\); add"
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(root)
    assert set(LeRobotEpisodes(root, episodes=[0, 2], cameras=[]).texts("subtask")) == {"reach for it"}


def test_a_table_of_subtasks_that_cannot_be_read_is_an_error(copy, add):
    root = copy()
    write_subtasks(root, numbers=[1, 0, 2])
    assert LeRobotEpisodes(root, cameras=[]).text_columns == ["task"]  # no row refers to it
    add(root, "subtask_index", "int64", thirds)
    with pytest.raises(ValueError, match=r"subtasks.parquet: .* order of their subtask_index, came \[1, 0, 2\]; sort"):
        LeRobotEpisodes(root)
    pq.write_table(pa.table({"subtask_index": [0, 1, 2]}), root / "meta/subtasks.parquet")
    with pytest.raises(ValueError, match=r"subtasks.parquet: expected a column 'subtask', came \['subtask_index'\]"):
        LeRobotEpisodes(root)


@pytest.mark.parametrize("name", ["subtasks", "tasks"])
def test_numbers_are_no_texts(copy, add, name):
    root = copy()
    add(root, "subtask_index", "int64", thirds)
    write_subtasks(root)
    column = name.removesuffix("s")
    pq.write_table(pa.table({column: [10, 11, 12], f"{column}_index": [0, 1, 2]}), root / f"meta/{name}.parquet")
    with pytest.raises(ValueError, match=rf"meta/{name}.parquet: expected texts in the column '{column}', came 10"):
        LeRobotEpisodes(root)


@pytest.mark.parametrize("values", [range(99), [None, 1.5] * 99, [b"left"] * 99, [True] * 99])
def test_a_column_of_text_that_holds_something_else_is_an_error(copy, add, values):
    root = copy()
    add(root, "reasoning", "string", lambda rows: pa.array([*values][: len(rows)]))
    message = r"file-000.parquet: meta/info.json declares column 'reasoning' as text, but it holds .*; write its"
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(root)


def test_subtasks_without_their_table_stay_numbers(copy, add):
    root = copy()
    add(root, "subtask_index", "int64", thirds)
    dataset = LeRobotEpisodes(root, cameras=[])
    assert "subtask" not in dataset[0] and dataset[4]["subtask_index"] == 1
    for key in ("subtask", "subtask_index"):
        with pytest.raises(ValueError, match=rf"no text '{key}'; it has \['task'\]. Subtasks are .*subtasks.parquet"):
            dataset.texts(key)


@pytest.mark.parametrize("name", VERSIONS)
def test_annotations_of_groot_number_the_tasks(copy, add, name):
    root = copy(name)
    for key in ("annotation.human.coarse_action", "annotation.human.validity", "annotation.score"):
        add(root, key, "int64", thirds)
    add(root, "annotation.human.note", "string", lambda rows: pa.array([f"note {row}" for row in rows]))
    names = {"human.coarse_action": {}, "human.validity": None, "human.note": {}, "human.absent": {}}
    declared = {"annotation": names | {"human.task": {"original_key": "task_index"}}}
    (root / "meta/modality.json").write_text(json.dumps(declared))
    dataset = LeRobotEpisodes(root, cameras=[])
    item = dataset[4]
    assert item["annotation.human.coarse_action"] == item["annotation.human.validity"] == dataset.tasks[1]
    assert dataset.column("annotation.human.coarse_action")[4] == 1  # the column itself is as it was
    assert item["annotation.human.note"] == "note 4" and item["annotation.human.task"] == item["task"]
    assert item["annotation.score"] == 1  # not declared: a number
    texts = ["coarse_action", "validity", "task"]
    assert dataset.text_columns == ["annotation.human.note", "task", *(f"annotation.human.{text}" for text in texts)]
    with pytest.raises(ValueError, match="no column 'annotation.human.validity' to take a window of"):
        LeRobotEpisodes(root, {"annotation.human.validity": [0.0, 0.1]})
    (root / "meta/modality.json").write_text(json.dumps({"annotation": {"score": {}}}))
    add(root, "annotation.wrong", "int64", lambda rows: pa.array([9] * len(rows)))
    assert LeRobotEpisodes(root, cameras=[])[4]["annotation.score"] == dataset.tasks[1]
    (root / "meta/modality.json").write_text(json.dumps({"annotation": {"wrong": {}}}))
    message = r"annotation.wrong 9 of episode 0, frame 0 is none of the dataset's 3 task\(s\); add it to meta/tasks"
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(root)


@pytest.mark.parametrize(
    "content",
    ['["annotation"]', '{"annotation": ["score"]}', '{"annotation": "score"}', "{}", "null", '{"annotation": {', "4"],
)
def test_a_declaration_of_another_form_declares_nothing(copy, add, content):
    """And stops nobody who does not ask for its texts."""
    root = copy()
    add(root, "annotation.score", "int64", thirds)
    (root / "meta/modality.json").write_text(content)
    dataset = LeRobotEpisodes(root, cameras=[])
    assert dataset[4]["annotation.score"] == 1
    with pytest.raises(ValueError, match=r"no text 'annotation.score'; it has \['task'\]. GR00T's .*modality.json"):
        dataset.texts("annotation.score")


@pytest.mark.parametrize("entry", ["score", ["score"], {"original_key": ["score"]}, {"original_key": 3}])
def test_an_annotation_of_another_form_is_its_own_column(copy, add, entry):
    root = copy()
    add(root, "annotation.score", "int64", thirds)
    (root / "meta/modality.json").write_text(json.dumps({"annotation": {"score": entry}}))
    dataset = LeRobotEpisodes(root, cameras=[])
    assert dataset[4]["annotation.score"] == dataset.tasks[1]


def test_language_messages_are_refused_where_they_are_asked_for(copy, add):
    root = copy()
    message = {"role": "assistant", "content": "take it", "style": "subtask", "timestamp": 0.0, "camera": None}
    add(root, "language_persistent", "language", lambda rows: pa.array([[message, message]] * len(rows)))
    dataset = LeRobotEpisodes(root, cameras=[])
    assert "language_persistent" not in dataset[0] and "language_persistent" not in dataset.features
    with pytest.raises(ValueError, match=r"no text 'language_persistent'; it has \['task'\]. LeRobot's messages are"):
        dataset.texts("language_persistent")


@pytest.mark.parametrize(("dtype", "values"), [("string", ["left", "right"]), ("int64", [0, 1])])
def test_several_texts_or_numbers_in_a_row_are_no_text(copy, add, edit, dtype, values):
    root = copy()
    add(root, "annotation.hands", dtype, lambda rows: pa.array([values] * len(rows)))

    def shape(info):
        info["features"]["annotation.hands"]["shape"] = [2]
        return info

    edit(root / "meta/info.json", shape)
    (root / "meta/modality.json").write_text(json.dumps({"annotation": {"hands": {}}}))
    dataset = LeRobotEpisodes(root, cameras=[])
    assert dataset.text_columns == ["task"] and dataset[0]["annotation.hands"].tolist() == values


@pytest.mark.parametrize("key", ["action", "reasons", "observation.images.top"])
def test_other_names_are_errors_that_name_the_texts(copy, add, key):
    root = copy()
    add(root, "reasoning", "string", lambda rows: pa.array([str(row) for row in rows]))
    with pytest.raises(ValueError, match=rf"v30_video_av1: no text '{key}'; it has \['reasoning', 'task'\]\.$"):
        LeRobotEpisodes(root).texts(key)


def test_the_example_data_says_what_the_robot_does(demos):
    dataset = LeRobotEpisodes(demos, cameras=[])
    assert dataset.text_columns == ["task", "subtask"]
    cans = dataset.column("task_index") == 2
    texts, tasks = dataset.texts("subtask"), dataset.texts("task")
    assert all(text.endswith("the can" if can else "the red cube") for text, can in zip(texts, cans, strict=True))
    assert max(map(len, texts)) <= 24
    assert np.unique(texts[tasks == "pick up the red cube"]).tolist() == [
        "grasp the red cube",
        "lift the red cube",
        "reach for the red cube",
    ]
