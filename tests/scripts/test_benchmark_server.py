import json

import pytest
from benchmark_server import main


@pytest.mark.slow
def test_64_clients_lose_nothing_and_get_their_own_answers(monkeypatch, capsys):
    arguments = ["--clients", "64", "--requests", "3", "--processes", "4", "--batch-sizes", "1", "8"]
    monkeypatch.setattr("sys.argv", ["benchmark_server.py", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code is False
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["answers"], row["lost"], row["wrong"]) for row in rows] == [(192, 0, 0)] * 2
    assert rows[0]["requests_per_call"] == 1 and rows[1]["requests_per_call"] > 6
