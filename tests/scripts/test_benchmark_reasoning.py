import re
import sys

import benchmark_reasoning as benchmark
import pytest
import torch

TOKENS = 16


def rows(output):
    cells = ([cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line)
    return {name: values for name, *values in cells}


def test_a_quick_run_tells_what_reasoning_costs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_reasoning.py", "--quick"])
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 0.0)
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert f"torch {torch.__version__}" in output and f"57 prompt tokens, {TOKENS} reasoning tokens" in output
    floor = re.search(
        r"prompt ([\d.]+) ms, with a reasoning ([\d.]+) ms, a step ([\d.]+) ms, head ([\d.]+) ms", output
    )
    prompt, recalled, step, head = map(float, floor.groups())
    table = rows(output)
    shares = {"chunk": 1, "2nd": 1 / 2, "4th": 1 / 4, "8th": 1 / 8}
    floors = {
        f"before every {name}": (prompt + TOKENS * step) * share + recalled * (1 - share) + head
        for name, share in shares.items()
    }
    floors |= {"never: it is given": recalled + head, "never: there is none": prompt + head}
    assert {name: float(table[name][2]) for name in floors} == pytest.approx(floors, abs=0.2)
    seconds, ratio, floor, of_floor = map(float, table["never: there is none"])
    assert ratio == pytest.approx(seconds / float(table["before every chunk"][0]), abs=0.01)
    assert of_floor == pytest.approx(seconds / floor, abs=0.01)
    assert [table[name][2] for name in ("generate", "without a cache")] == ["True", "True"]


@pytest.fixture(scope="module")
def built():
    return benchmark.build("tiny", TOKENS, "cpu")


def test_every_way_reasons_as_often_as_its_name_says(built, monkeypatch):
    model, reason, lengths = built[0], built[0].reason, []

    def counted(*args, **kwargs):
        encoding, ids = reason(*args, **kwargs)
        lengths.append(ids.shape[1])
        return encoding, ids

    monkeypatch.setattr(model, "reason", counted)
    for name, (act, count, reasoned, recalled) in benchmark.ways_to_act(*built).items():
        lengths.clear()
        act()
        said = [length for length in lengths if length]
        assert said == [TOKENS] * reasoned and len(lengths) == count - recalled, name
        assert count == 1 or name.startswith(f"before every {count}")


def test_a_given_reasoning_is_as_long_as_the_models_own(built, monkeypatch):
    model, encode, labels = built[0], built[0].encode, []
    monkeypatch.setattr(model, "encode", lambda *args, **others: labels.append(args[3]) or encode(*args, **others))
    benchmark.ways_to_act(*built)["never: it is given"][0]()
    assert [int((label >= 0).sum()) for label in labels] == [TOKENS]


@pytest.mark.slow
def test_reasoning_rarely_saves_time():
    """Measured 0.45 of every chunk's time at an interval of 8; the cache saves three quarters. CPU seconds."""
    model, processor, observation = benchmark.build("tiny", 32, "cpu")
    ways = benchmark.ways_to_act(model, processor, observation)
    chosen = ways["before every chunk"], ways["before every 8th"]
    (always, rarely), _ = benchmark.best_seconds([way.act for way in chosen], 3, "cpu")
    assert rarely / 8 < 0.65 * always
