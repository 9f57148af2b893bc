"""A robot's side: it is told in a sentence what is wrong, and soon."""

import signal
import socket
import ssl
import threading
import time

import numpy as np
import pytest
from websockets.sync.server import serve as serve_websockets

from hf_vla.serving.client import PolicyClient
from hf_vla.serving.protocol import RefusedRequest, pack, unpack

NAME = "tinyvla_metaworld"
TOKEN = "a-token-of-some-length"


def test_it_predicts_as_a_policy_does(shipped, serve):
    each = shipped(NAME)
    policy = each.models.policy()
    first, second = (policy.predict_chunk(each.observation) for _ in range(2))
    with PolicyClient(serve(each.models).url) as client:
        assert client.metadata["model"] == NAME
        assert np.array_equal(client.predict_chunk(each.observation), first)
        assert np.array_equal(client.predict_chunk(each.observation), second)
        assert np.array_equal(client.predict_chunk(each.observation, reset=True), first)
        client.reset()
        assert np.array_equal(client.predict_chunk(each.observation), first)
        with pytest.raises(RefusedRequest, match="needs the robot's state") as error:
            client.predict_chunk({k: v for k, v in each.observation.items() if k != "observation.state"})
        assert error.value.kind == "observation" and isinstance(error.value, ValueError)
        assert np.array_equal(client.predict_chunk(each.observation), second)


def test_a_control_loop_learns_at_once_that_the_server_is_dead(shipped, process):
    each = shipped(NAME)
    running = process(each.folder)
    with PolicyClient(running.url, timeout=20.0) as client:
        chunks = [client.predict_chunk(each.observation) for _ in range(3)]
        assert len({chunk.tobytes() for chunk in chunks}) == 3
        running.stop(signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=f"The connection to {running.url} is lost"):
            client.predict_chunk(each.observation)
        assert time.monotonic() - begun < 5
    with pytest.raises(ConnectionError, match=f"No policy server answers at {running.url}"):
        PolicyClient(running.url, timeout=1.0)


def test_a_late_answer_is_never_taken_for_another(shipped, serve, gate):
    each = shipped(NAME)
    running, held = serve(each.models), gate(each.models.policy().model)
    client = PolicyClient(running.url, timeout=0.3)
    with pytest.raises(ConnectionError, match="gave no answer within 0.3 s"):
        client.predict_chunk(each.observation)
    held.open()
    with pytest.raises(ConnectionError, match="is lost"):
        client.predict_chunk(each.observation)


@pytest.mark.parametrize("side", [96, 2200])  # of a picture: 14 MB are more than a socket's memory, and not sent
def test_a_server_that_is_held_costs_the_timeout_and_no_more(side, shipped, process):
    each = shipped(NAME)
    running = process(each.folder)
    seen = {**each.observation, "observation.images.corner4": np.zeros((side, side, 3), np.uint8)}
    client = PolicyClient(running.url, timeout=0.5)
    running.process.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        with client, pytest.raises(ConnectionError, match="gave no answer within 0.5 s"):
            client.predict_chunk(seen)
        assert 0.5 <= time.monotonic() - begun < 2
    finally:
        running.process.send_signal(signal.SIGCONT)


def test_goodbye_to_a_server_that_is_held_takes_a_second(shipped, process):
    running = process(shipped(NAME).folder)
    client = PolicyClient(running.url, timeout=30.0)
    running.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    client.close()
    assert time.monotonic() - begun < 5
    running.process.send_signal(signal.SIGCONT)


def test_who_is_interrupted_asks_no_more(shipped, serve, gate, monkeypatch):
    each = shipped(NAME)
    running, held = serve(each.models), gate(each.models.policy().model)
    client = PolicyClient(running.url)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as of Ctrl-C
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        client.predict_chunk(each.observation)
    signal.signal(signal.SIGALRM, before)
    held.open()
    with pytest.raises(ConnectionError, match="is lost"):
        client.predict_chunk(each.observation)


def stand_in(first, answer=lambda connection, message: None):
    """A websocket server that says `first`, and answers what comes."""

    def handle(connection):
        connection.send(first)
        for message in connection:
            answer(connection, message)
        left.set()

    left, server = threading.Event(), serve_websockets(handle, "127.0.0.1", 0, compression=None)
    threading.Thread(target=server.serve_forever).start()
    return server, f"ws://127.0.0.1:{server.socket.getsockname()[1]}", left


def test_openpis_servers_are_sent_the_observation_alone():
    came = []

    def answer(connection, message):
        came.append(unpack(message))
        connection.send(pack({"actions": np.ones((2, 7), np.float32)}))

    server, url, _ = stand_in(pack({}), answer)
    with server, PolicyClient(url) as client:
        client.reset()
        chunk = client.predict_chunk({"observation/state": np.zeros(7), "prompt": "push"}, reset=True)
    assert chunk.shape == (2, 7) and [each.keys() for each in came] == [{"observation/state", "prompt"}]


@pytest.mark.parametrize("first", [b"\xc1", "internal: no model"])
def test_who_is_not_understood_at_first_is_left(first):
    server, url, left = stand_in(first)
    with server:
        with pytest.raises(ValueError):
            PolicyClient(url)
        assert left.wait(5)


def test_a_server_that_stops_says_so(shipped, serve):
    each = shipped(NAME)
    running = serve(each.models)
    with PolicyClient(running.url) as client:
        running.stop()
        with pytest.raises(ConnectionError, match="is lost. It said: 1001"):
            client.predict_chunk(each.observation)


def test_tokens(shipped, serve):
    running = serve(shipped(NAME).models, token=TOKEN)
    with PolicyClient(running.url, token=TOKEN) as client:
        assert "actions" in client.infer(shipped(NAME).observation)
    with pytest.raises(ConnectionError, match=r"refuses \(401\): Give this server's token.$"):
        PolicyClient(running.url, token=TOKEN + "x")


def test_encrypted(shipped, serve, pem):
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(pem)
    running = serve(shipped(NAME).models, ssl=ours)
    theirs, url = ssl.create_default_context(cafile=pem), f"wss://127.0.0.1:{running.port}"
    with PolicyClient(url, ssl=theirs) as client:
        chunk = client.predict_chunk(shipped(NAME).observation)
    assert np.array_equal(chunk, shipped(NAME).models.policy().predict_chunk(shipped(NAME).observation))
    with pytest.raises(ConnectionError, match="certificate"):
        PolicyClient(url)
    with pytest.raises(ConnectionError):
        PolicyClient(running.url)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1", "ws://", "file:///etc/passwd"])
def test_what_is_no_address_is_an_error(url):
    with pytest.raises(ValueError, match="Expected an address like ws://127.0.0.1:8000"):
        PolicyClient(url)


def test_who_speaks_another_language_is_no_server():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"ws://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"No policy server answers at {url}"):
            PolicyClient(url, timeout=10.0)
        thread.join()
