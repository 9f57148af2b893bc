"""A server as its clients meet it: over sockets, some of them with bad manners."""

import re
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hf_vla.policy import Policy, predict_chunks
from hf_vla.serving.models import contract

NAME = "tinyvla_metaworld"
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="session")
def tiny(shipped):
    return shipped(NAME)


def http(running, path, **headers):
    with urlopen(Request(f"http://127.0.0.1:{running.port}{path}", headers=headers), timeout=10) as answer:
        return answer.read().decode()


def count(running, name):
    """Value of a metric."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", http(running, "/metrics"), re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["tinyvla_metaworld", "divla_metaworld", "spatialvla_metaworld"])
def test_a_client_gets_what_a_policy_predicts(name, shipped, serve, plain):
    each = shipped(name)
    client, policy = plain(serve(each.models).url), Policy.from_pretrained(each.folder, seed=0, device="cpu")
    known = contract(policy)
    assert {key: client.metadata[key] for key in known} == known
    assert client.metadata["server"] == "hf_vla" and client.metadata["model"] == name
    for _ in range(3):
        answer = client.ask(each.observation)
        assert answer["actions"].dtype == np.float32
        assert np.array_equal(answer["actions"], policy.predict_chunk(each.observation))
        assert answer.get("reasoning") == policy.reasoning and answer["server_timing"]["infer_ms"] > 0


def test_what_openpis_robots_send_is_understood(tiny, serve, plain):
    client, seen = plain(serve(tiny.models).url), tiny.observation
    picture, state = seen["observation.images.corner4"], seen["observation.state"].astype(np.float64)
    wanted = tiny.models.policy().predict_chunk(seen)
    for message in (
        {"observation/image": picture, "observation/state": state, "prompt": seen["task"]},
        {"images": {"corner4": picture}, "state": state.tolist(), "prompt": seen["task"], "reset": True},
        {"images": {"corner4": picture.transpose(2, 0, 1)}, "state": state, "prompt": seen["task"], "reset": True},
    ):
        assert np.array_equal(client.ask(message)["actions"], wanted)


def test_reset_starts_anew(tiny, serve, plain):
    client, seen = plain(serve(tiny.models).url), tiny.observation
    first, second = client.ask(seen)["actions"], client.ask(seen)["actions"]
    assert not np.array_equal(first, second)
    assert np.array_equal(client.ask({**seen, "reset": True})["actions"], first)
    assert np.array_equal(client.ask({**seen, "reset": False})["actions"], second)
    assert client.ask({"reset": True}) == {}
    assert np.array_equal(client.ask(seen)["actions"], first)


def test_given_words_are_acted_under(shipped, serve, plain):
    each = shipped("divla_metaworld")
    client, policy = plain(serve(each.models).url), each.models.policy()
    answer = client.ask({**each.observation, "reasoning": "reach for the button"})
    assert answer["reasoning"] == "reach for the button"
    assert np.array_equal(answer["actions"], policy.predict_chunk(each.observation, "reach for the button"))


def test_history_needs_every_control_step(sawyer, serve, plain, tmp_path):
    from hf_vla.serving.models import ServedModels

    model, processor = sawyer("tinyvla", n_obs_steps=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    models = ServedModels(str(tmp_path), seed=0)
    client, rng = plain(serve(models).url), np.random.default_rng(0)
    seen = [
        {
            "observation.images.corner4": rng.integers(0, 256, (48, 48, 3), np.uint8),
            "observation.state": rng.normal(size=4).astype(np.float32),
            "task": "push",
        }
        for _ in range(3)
    ]
    assert "sees the last 2 control steps" in client.ask(seen[0])
    policy = models.policy()
    policy.remember(seen[0])
    assert client.ask({**seen[0], "predict": False}) == {}
    for each in seen[1:]:
        wanted = policy.predict_chunk(each)
        assert np.array_equal(client.ask({**each, "predict": True})["actions"], wanted)
    blind = models.policy().predict_chunk(seen[2])
    assert not np.array_equal(wanted, blind)
    assert np.array_equal(client.ask({**seen[2], "predict": True, "reset": True})["actions"], blind)


@pytest.mark.parametrize("refused", ["deadline", "overloaded"])
def test_a_control_step_counts_though_nobody_has_answered(refused, sawyer, serve, plain, gate, tmp_path):
    from hf_vla.serving.models import ServedModels

    model, processor = sawyer("tinyvla", n_obs_steps=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    models, rng = ServedModels(str(tmp_path), seed=0), np.random.default_rng(0)
    options = {"deadline_s": 0.3} if refused == "deadline" else {"max_queue": 1}
    running, held = serve(models, **options), gate(models.policy().model)
    seen = [
        {
            "observation.images.corner4": rng.integers(0, 256, (48, 48, 3), np.uint8),
            "observation.state": rng.normal(size=4).astype(np.float32),
            "task": "push",
        }
        for _ in range(4)
    ]
    others, client, policy = [plain(running.url) for _ in range(2)], plain(running.url), models.policy()
    client.ask({**seen[0], "predict": False})
    others[0].send({**seen[0], "predict": True})
    assert held.reached.wait(30)
    if refused == "overloaded":
        others[1].send({**seen[0], "predict": True})
        wait_until(lambda: count(running, "hf_vla_queue_length") == 1)
    assert client.ask({**seen[1], "predict": True, "reset": True}).startswith(f"{refused}: ")
    assert client.ask({**seen[2], "predict": True}).startswith(f"{refused}: ")
    held.open()
    others[0].receive()
    policy.remember(seen[2])
    wanted = policy.predict_chunk(seen[3])
    assert np.array_equal(client.ask({**seen[3], "predict": True})["actions"], wanted)


def test_an_error_is_a_text_and_the_connection_goes_on(tiny, serve, plain):
    running = serve(tiny.models)
    client, seen = plain(running.url), tiny.observation
    assert client.ask("hello").startswith("malformed: Expected a binary message")
    assert client.ask(b"\xc1").startswith("malformed: ")
    assert client.ask({}).startswith("observation: Expected an instruction under 'task'")
    assert "needs the camera 'corner4'" in client.ask({"task": "x", "state": np.zeros(4)})
    assert "needs the robot's state" in client.ask({k: v for k, v in seen.items() if k != "observation.state"})
    assert "4 finite numbers" in client.ask({**seen, "observation.state": np.full(4, np.nan)})
    assert "Expected 4" in client.ask({**seen, "observation.state": np.zeros(5)})
    assert "no adapter 'pick'" in client.ask({**seen, "adapter": "pick"})
    assert "does not reason" in client.ask({**seen, "reasoning": "slowly"})
    assert count(running, 'hf_vla_errors_total{kind="malformed"}') == 2
    assert count(running, 'hf_vla_errors_total{kind="observation"}') == 7
    wanted = tiny.models.policy().predict_chunk(seen)  # none of them has counted
    assert np.array_equal(client.ask(seen)["actions"], wanted)


def test_clients_share_batches_and_nothing_else(tiny, serve, plain, vary):
    count_of, running = 64, serve(tiny.models, batch_size=4, window_s=0.02)
    clients = [plain(running.url) for _ in range(count_of)]
    policies = [tiny.models.policy() for _ in clients]
    seen = [[vary(tiny.observation, count_of * step + place) for place in range(count_of)] for step in range(2)]
    wanted = [predict_chunks(policies, step, None, 4) for step in seen]
    with ThreadPoolExecutor(count_of) as pool:
        for step, chunks in zip(seen, wanted, strict=True):
            answers = list(pool.map(lambda client, each: client.ask(each), clients, step))
            assert all(np.array_equal(a["actions"], chunk) for a, chunk in zip(answers, chunks, strict=True))
    assert count(running, "hf_vla_batch_requests_sum") == 2 * count_of
    assert count(running, "hf_vla_batch_requests_count") < count_of
    assert count(running, "hf_vla_requests_total") == 2 * count_of
    assert count(running, "hf_vla_connections") == count_of


def test_health_and_metrics(tiny, serve, plain):
    running = serve(tiny.models)
    assert http(running, "/healthz") == "OK\n"
    plain(running.url).ask(tiny.observation)
    text = http(running, "/metrics")
    for name in ("hf_vla_request_seconds_count 1.0", "hf_vla_inference_seconds_count 1.0", "hf_vla_queue_length 0.0"):
        assert name in text
    with pytest.raises(HTTPError, match="426|404"):
        http(running, "/")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Api-Key"])
def test_who_has_the_token_may_connect(scheme, tiny, serve, plain):
    running = serve(tiny.models, token=TOKEN)
    client = plain(running.url, additional_headers={"Authorization": f"{scheme} {TOKEN}"})
    assert "actions" in client.ask(tiny.observation)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer \u00e4"},
        {"Authorization": "Bearer "},
        [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer wrong")],
    ],
)
def test_nobody_else_may(headers, tiny, serve, plain, caplog):
    caplog.set_level("DEBUG")
    caplog.set_level("INFO", "websockets.client")  # ours, which shows what it sends
    running = serve(tiny.models, token=TOKEN)
    with pytest.raises(InvalidStatus) as error:
        plain(running.url, additional_headers=headers)
    assert error.value.response.status_code == 401
    with pytest.raises(HTTPError, match="401"):
        http(running, "/metrics")
    assert http(running, "/healthz") == "OK\n"
    assert count_with_token(running, 'hf_vla_errors_total{kind="unauthorized"}') == 2
    assert TOKEN not in caplog.text and TOKEN not in repr(running.server.options)


def count_with_token(running, name):
    text = http(running, "/metrics", Authorization=f"Bearer {TOKEN}")
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def test_web_pages_may_not(tiny, serve, plain):
    running = serve(tiny.models)
    with pytest.raises(InvalidStatus) as error:
        plain(running.url, origin="http://evil.example")
    assert error.value.response.status_code == 403


def test_one_client_too_many_is_told_so(tiny, serve, plain):
    running = serve(tiny.models, max_connections=2)
    clients = [plain(running.url) for _ in range(2)]
    with pytest.raises(InvalidStatus) as error:
        plain(running.url)
    assert error.value.response.status_code == 503
    assert error.value.response.body == b"2 clients are connected already.\n"
    clients[0].connection.close()
    wait_until(lambda: count(running, "hf_vla_connections") == 1)
    assert "actions" in plain(running.url).ask(tiny.observation)


def test_too_many_silent_connections_are_hung_up(tiny, serve, plain):
    running = serve(tiny.models, max_connections=2)
    silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(80)]
    try:
        wait_until(lambda: sum(is_closed(each) for each in silent) >= 80 - 66)
        silent.pop(next(place for place, each in enumerate(silent) if not is_closed(each))).close()
        wait_until(lambda: opens(running))
        assert "actions" in plain(running.url).ask(tiny.observation)
    finally:
        for each in silent:
            each.close()


def opens(running):
    try:
        return http(running, "/healthz") == "OK\n"
    except OSError:
        return False


def is_closed(connection):
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_connection_that_does_not_open_is_closed(tiny, serve, plain):
    running = serve(tiny.models, open_s=0.3)
    with socket.create_connection(("127.0.0.1", running.port)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        slow.settimeout(20)
        assert slow.recv(100) == b""
    assert "actions" in plain(running.url).ask(tiny.observation)


def test_a_handshake_that_does_not_begin_is_given_up(tiny, serve, pem):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    running = serve(tiny.models, ssl=context, open_s=60.0)  # which is not meant for this
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as silent:
        assert silent.recv(1) == b""


def test_who_answers_no_ping_is_gone(tiny, serve, plain, raw):
    running = serve(tiny.models, ping_s=0.2)
    half_open, good = raw(running.port), plain(running.url)
    wait_until(lambda: count(running, "hf_vla_connections") == 2)
    wait_until(lambda: count(running, "hf_vla_connections") == 1)
    assert "actions" in good.ask(tiny.observation)
    half_open.close()


def test_who_does_not_read_is_hung_up(tiny, serve, plain, raw):
    running = serve(tiny.models, ping_s=0.5)
    asks, good = raw(running.port), plain(running.url)
    asks.settimeout(0.2)
    unknown = msgpack.packb({"x" * 40: 1})
    frame = bytes([0x82, 0x80 | len(unknown), 0, 0, 0, 0]) + unknown
    with pytest.raises(OSError):  # nobody takes any more, or it is hung up
        while True:
            asks.sendall(frame * 1000)
    wait_until(lambda: count(running, 'hf_vla_errors_total{kind="slow"}') == 1)
    wait_until(lambda: count(running, "hf_vla_connections") == 1)
    assert "actions" in good.ask(tiny.observation)


def test_too_much_closes_that_connection_alone(tiny, serve, plain):
    running = serve(tiny.models, max_payload=100_000)
    big, good = plain(running.url), plain(running.url)
    big.send(b"\0" * 100_001)
    with pytest.raises(ConnectionClosed) as error:
        big.receive()
    assert error.value.rcvd.code == 1009
    wait_until(lambda: count(running, 'hf_vla_errors_total{kind="oversized"}') == 1)
    assert "actions" in good.ask(tiny.observation)


def test_a_message_in_pieces_is_one_message(tiny, serve, plain):
    from hf_vla.serving.protocol import pack

    running = serve(tiny.models)
    client, raw = plain(running.url), pack(tiny.observation)
    client.connection.send(raw[place : place + 1000] for place in range(0, len(raw), 1000))
    wanted = tiny.models.policy().predict_chunk(tiny.observation)
    assert np.array_equal(client.receive()["actions"], wanted)
    with pytest.raises(ConnectionClosed) as error:
        client.connection.send(b"" for _ in range(10_000))  # nothing, in many pieces
        client.receive()
    assert error.value.rcvd.code == 1009


def test_who_has_waited_too_long_is_told_so(tiny, serve, plain, gate):
    running, held = serve(tiny.models, deadline_s=0.3), gate(tiny.models.policy().model)
    first, late = plain(running.url), plain(running.url)
    first.send(tiny.observation)
    assert held.reached.wait(30)
    begun = time.monotonic()
    said = late.ask(tiny.observation)
    assert said == "deadline: It waited 300 ms for the model; no prediction was made."
    assert time.monotonic() - begun < 5  # at once, not when its turn would have come
    held.open()
    assert "actions" in first.receive() and held.calls == 1  # the model's own time is not waiting
    assert "actions" in late.ask(tiny.observation)


def test_too_many_requests_are_refused(tiny, serve, plain, gate):
    running, held = serve(tiny.models, max_queue=1), gate(tiny.models.policy().model)
    clients = [plain(running.url) for _ in range(3)]
    clients[0].send(tiny.observation)
    assert held.reached.wait(30)
    clients[1].send(tiny.observation)
    wait_until(lambda: count(running, "hf_vla_queue_length") == 1)
    assert clients[2].ask(tiny.observation).startswith("overloaded: 1 requests are waiting already")
    held.open()
    assert all("actions" in client.receive() for client in clients[:2])


def test_nothing_is_predicted_for_who_has_left(tiny, serve, plain, gate):
    running, held = serve(tiny.models), gate(tiny.models.policy().model)
    first, gone = plain(running.url), plain(running.url)
    first.send(tiny.observation)
    assert held.reached.wait(30)
    gone.send(tiny.observation)
    wait_until(lambda: count(running, "hf_vla_queue_length") == 1)
    gone.connection.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: count(running, "hf_vla_connections") == 1)
    held.open()
    assert "actions" in first.receive() and "actions" in first.ask(tiny.observation)
    assert held.calls == 2 and count(running, 'hf_vla_errors_total{kind="left"}') == 1


def test_stopping_finishes_what_is_under_way(tiny, serve, plain, gate):
    running, held = serve(tiny.models), gate(tiny.models.policy().model)
    busy, idle = plain(running.url), plain(running.url)
    busy.send(tiny.observation)
    assert held.reached.wait(30)
    running.begin_to_stop()
    wait_until(lambda: idle.ask(tiny.observation) == "stopping: The server is stopping.")
    with pytest.raises(InvalidStatus) as error:
        plain(running.url)
    assert error.value.response.status_code == 503
    with pytest.raises(HTTPError, match="503"):
        http(running, "/healthz")
    held.open()
    wanted = tiny.models.policy().predict_chunk(tiny.observation)
    assert np.array_equal(busy.receive()["actions"], wanted)
    for client in (busy, idle):
        with pytest.raises(ConnectionClosed) as error:
            client.receive()
        assert error.value.rcvd.code == 1001
    running.stop()
    assert not running.server.engine.alive
    with pytest.raises(OSError):
        plain(running.url)


def test_a_port_in_use_is_an_error(tiny, serve):
    import asyncio

    from hf_vla.serving.server import PolicyServer, ServerOptions

    running = serve(tiny.models)

    async def again():
        await PolicyServer(tiny.models, ServerOptions(port=running.port)).run(asyncio.Event())

    with pytest.raises(OSError, match="Cannot listen at .*address already in use"):
        asyncio.run(again())
