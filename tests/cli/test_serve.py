import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

from hf_vla.cli.main import app
from hf_vla.cli.serve import check_exposure, make_context, parse_key, parse_pairs, read_token
from hf_vla.serving.client import PolicyClient

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "spaces" / "action_demo" / "checkpoints" / "tinyvla_metaworld"
COMMAND = [sys.executable, "-c", "from hf_vla.cli.main import app; app()"]
TOKEN = "a-token-of-some-length"
ASK = ["--image", str(CHECKPOINT / "frame_corner4.png"), "--text", "Press a button from the top"]
ASK += ["--state", "0.013 0.682 0.429 0.297"]


@pytest.fixture
def served(pem, tmp_path):
    """Address of a server with a token and TLS, in a process of its own; it ends with exit code 0."""
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    options = ["--port", "0", "--seed", "0", "--device", "cpu", "--token-file", str(token), "--host", "localhost"]
    options += ["--tls-certificate", str(pem), "--tls-key", str(pem), "--log-level", "debug"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [*COMMAND, "serve", str(CHECKPOINT), *options], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )
    try:
        (line,) = [process.stdout.readline()]
        assert line.startswith("Serving tinyvla_metaworld at wss://localhost:"), line
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
        process.stdout.close()
    log.seek(0)
    said = log.read()
    log.close()
    assert code == 0 and "event=stopped" in said and "event=answered client=" in said
    assert TOKEN not in said and "Traceback" not in said


def test_a_server_is_tried_with_the_client(served, pem, tmp_path, monkeypatch):
    ask = ["client", served, *ASK, "--tls-certificate", str(pem)]
    result = CliRunner().invoke(app, ask)
    assert result.exit_code == 1 and "refuses (401): Give this server's token." in result.stderr
    monkeypatch.setenv("HF_VLA_SERVE_TOKEN", TOKEN)
    result = CliRunner().invoke(app, [*ask, "--repeat", "3", "--contract"])
    assert result.exit_code == 0, result.stderr
    assert '"unnorm_key": "push"' in result.stdout and "gripper -1 open, +1 closed" in result.stdout
    assert "3 answers: p50 " in result.stdout
    shown = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(shown) == 16
    one = CliRunner().invoke(app, ask)
    assert "unnorm_key" not in one.stdout
    direct = CliRunner().invoke(app, ["predict", "--model", str(CHECKPOINT), *ASK, "--seed", "0", "--device", "cpu"])
    rows = [[line for line in each.stdout.splitlines() if line.startswith("│")] for each in (one, direct)]
    assert rows[0] == rows[1]
    result = CliRunner().invoke(app, [*ask[:-4], "--adapter", "pick", "--tls-certificate", str(pem)])
    assert result.exit_code == 1


def test_what_cannot_predict_is_one_sentence():
    result = CliRunner().invoke(app, ["serve", str(CHECKPOINT), "--num-inference-steps", "0", "--device", "cpu"])
    assert result.exit_code == 1 and "The checkpoint cannot predict" in result.stderr


@pytest.mark.parametrize("package", ["msgpack", "prometheus_client", "websockets"])
def test_what_to_install_is_said(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith("hf_vla.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    result = CliRunner().invoke(app, ["serve", str(CHECKPOINT)])
    said = f"This command needs {package}: pip install 'hf-vla[serve]', in a clone pip install -e '.[serve]'."
    assert result.exit_code == 1 and result.stderr == f"Error: {said}\n"


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    options = ["--port", "0", "--device", "cpu", "--batch-size", "2", "--batch-window-ms", "60000"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(CHECKPOINT), *options], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        url = process.stdout.readline().split()[-1]
        ask = [*COMMAND, "client", url, *ASK]
        with PolicyClient(url), subprocess.Popen(ask, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as waits:
            metrics = url.replace("ws:", "http:") + "/metrics"
            wait_until(lambda: "hf_vla_queue_length 1.0" in urlopen(metrics).read().decode())
            process.send_signal(signal.SIGINT)
            wait_until(lambda: "event=stopping in_flight=1" in (tmp_path / "log").read_text())
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == -signal.SIGINT
            assert waits.wait(30) == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_is_no_state_is_said_before_anybody_is_asked():
    result = CliRunner().invoke(app, ["client", "ws://127.0.0.1:9", *ASK[:-1], "0.1 zwei"])
    assert result.exit_code == 1 and "Expected --state to be numbers" in result.stderr


def test_a_camera_that_is_not_there_is_said_before_a_robot_asks():
    rename = "cam=observation.images.front"
    result = CliRunner().invoke(app, ["serve", str(CHECKPOINT), "--rename", rename, "--device", "cpu"])
    assert result.exit_code == 1 and "there is no camera 'front', only corner4" in result.stderr


def test_nobody_there_is_one_sentence():
    result = CliRunner().invoke(app, ["client", "ws://127.0.0.1:9", *ASK])
    assert result.exit_code == 1 and "Error: No policy server answers at ws://127.0.0.1:9" in result.stderr


def test_an_open_robot_is_refused():
    for host in ("0.0.0.0", "::", "192.168.1.5", "robot.example"):
        with pytest.raises(ValueError, match="could drive the robot: give --token-file"):
            check_exposure(host, None, False)
        check_exposure(host, TOKEN, False)
        check_exposure(host, None, True)
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_exposure(host, None, False)
    result = CliRunner().invoke(app, ["serve", str(CHECKPOINT), "--host", "0.0.0.0"])
    assert result.exit_code == 1 and "--insecure-no-token" in result.stderr


def test_tokens_are_read_and_checked(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_VLA_SERVE_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("HF_VLA_SERVE_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    path = tmp_path / "token"
    for text in ("", "short", "two words of some length", "ä" * 20):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="Expected a token of one word of 16 ASCII characters") as error:
            read_token(path)
        assert not text or text not in str(error.value)
    monkeypatch.setenv("HF_VLA_SERVE_TOKEN", "")
    with pytest.raises(ValueError, match="Expected a token"):
        read_token(None)


def test_certificates_are_checked(pem, tmp_path):
    assert make_context(None, None) is None
    with pytest.raises(ValueError, match="Give both"):
        make_context(pem, None)
    nonsense = tmp_path / "x.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(ValueError, match="are no certificate with its key"):
        make_context(nonsense, nonsense)


def test_pairs_are_read():
    assert parse_pairs(["a=b", "c=", "d=e=f"], "--rename") == {"a": "b", "c": "", "d": "e=f"}
    for wrong in (["a"], ["=b"], ["a=b", "a=c"]):
        with pytest.raises(Exception, match="each name once"):
            parse_pairs(wrong, "--rename")
    assert parse_key("push") == (None, "push") and parse_key("pick=push") == ("pick", "push")
