import json
from dataclasses import replace

import pytest

from hf_vla.evaluation.records import EPISODES, PROTOCOL, EpisodeRecord, RecordWriter, read_records

RECORD = EpisodeRecord("reach-v3", "Erreiche den Würfel", 0, True, 12, 3, [4.5, 4.0, 4.1], 0.25)
PROTOCOL_NOW = {"env": "metaworld", "tasks": ["reach-v3"], "horizon": 30}


def records(count):
    return [replace(RECORD, seed=seed, success=seed % 2 == 0) for seed in range(count)]


def write(folder, episodes, protocol=PROTOCOL_NOW):
    with RecordWriter(folder, protocol) as writer:
        for record in episodes:
            writer.add(record)
    return writer.records


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "new" / "folder", records(3))
    assert read_records(tmp_path / "new" / "folder") == (records(3), PROTOCOL_NOW)
    lines = (tmp_path / "new" / "folder" / EPISODES).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and json.loads(lines[1])["seed"] == 1


def test_a_record_is_on_the_disk_before_the_writer_is_closed(tmp_path):
    with RecordWriter(tmp_path, PROTOCOL_NOW) as writer:
        writer.add(RECORD)
        assert read_records(tmp_path)[0] == [RECORD]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_that_was_cut_off_is_dropped_and_written_anew(tmp_path, cut):
    """Also where the cut goes through a letter of several bytes."""
    write(tmp_path, records(3))
    file = tmp_path / EPISODES
    whole = file.read_bytes()
    for end in (cut, len(whole.splitlines()[-1]) - whole.splitlines()[-1].index("ü".encode())):
        file.write_bytes(whole[:-end])
        assert read_records(tmp_path)[0] == records(2)
        assert write(tmp_path, records(3)[2:]) == records(3)
        assert file.read_bytes() == whole


def test_records_of_another_protocol_are_not_mixed(tmp_path):
    write(tmp_path, records(1))
    with pytest.raises(
        ValueError, match=r"differs in horizon: then 30, now 40; seed: then None, now 1\. Give another"
    ):
        RecordWriter(tmp_path, {**PROTOCOL_NOW, "horizon": 40, "seed": 1})
    assert write(tmp_path, records(2)[1:], {**PROTOCOL_NOW, "tasks": ("reach-v3",)}) == records(2)


def test_one_writer_at_a_time(tmp_path):
    with RecordWriter(tmp_path, PROTOCOL_NOW):
        with pytest.raises(BlockingIOError, match="another evaluation is writing here"):
            RecordWriter(tmp_path, PROTOCOL_NOW)
    RecordWriter(tmp_path, PROTOCOL_NOW).close()
    with pytest.raises(ValueError, match="another protocol"):
        RecordWriter(tmp_path, {})
    RecordWriter(tmp_path, PROTOCOL_NOW).close()  # the refusal let it go


@pytest.mark.parametrize("line", ["[1]", "{}", "no json", '{"task": "a"}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    write(tmp_path, records(1))
    with (tmp_path / EPISODES).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="line 2 is no record"):
        read_records(tmp_path)


def test_a_folder_without_an_evaluation(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"it has no {PROTOCOL}"):
        read_records(tmp_path)
    RecordWriter(tmp_path, PROTOCOL_NOW).close()
    assert read_records(tmp_path) == ([], PROTOCOL_NOW)
