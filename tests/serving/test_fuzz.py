"""Whatever is sent to a server, it goes on answering others, and rightly, and keeps nothing of it."""

import os
import socket
import struct

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from hf_vla.policy import predict_chunks

LIMIT = 2**20  # bytes of a message
HELD = 8  # connections that are left half open
BURST = 20


def array(shape=(2, 3), dtype="<f4", data=None):
    size = int(np.prod(shape, dtype=np.int64)) * 4
    return {b"__ndarray__": True, b"data": bytes(size) if data is None else data, b"dtype": dtype, b"shape": shape}


def nest(rng, depth):
    value = 1
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return value


def random_value(rng, depth=0):
    kinds = [
        lambda: None,
        lambda: bool(rng.integers(2)),
        lambda: int(rng.integers(-(2**63), 2**63 - 1)),
        lambda: float(rng.normal() * 10.0 ** rng.integers(-300, 300)),
        lambda: float(rng.choice([np.nan, np.inf, -np.inf])),
        lambda: "x" * int(rng.integers(0, 5000)),
        lambda: rng.bytes(int(rng.integers(0, 50))),
        lambda: array(tuple(int(size) for size in rng.integers(0, 5, rng.integers(0, 5)))),
        lambda: msgpack.ExtType(int(rng.integers(0, 127)), rng.bytes(8)),
        lambda: [random_value(rng, depth + 1) for _ in range(rng.integers(0, 4))] if depth < 3 else [],
        lambda: {str(key): random_value(rng, depth + 1) for key in range(rng.integers(0, 4))} if depth < 3 else {},
    ]
    return kinds[rng.integers(len(kinds))]()


KEYS = ("observation.images.corner4", "observation/image", "observation.state", "state", "task", "prompt", "reset")
KEYS += ("predict", "adapter", "reasoning", "images", "observation")


def messages(good):
    """Kind -> what makes a message of it from random numbers; all but those of `flipped` are certainly malformed."""
    raw = msgpack.packb(good)
    state = "observation.state"
    dtypes = ["|O", "O", "<U4", "|S9", "|V8", "<c8", "<M8[s]", "f4,f4", "<f16", "<f3", "()", "", "x" * 1000, 3, None]
    shapes = [[2**31 - 1] * 8, [-1, 6], [2**62, 2**62], [1] * 40, [6.0], ["6"], "six", None, [0, 2**63 - 1]]
    claims = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
    claims += [b"\xc9\xff\xff\xff\xff\x01", b"\xdc\x04\x00" * 900, b"\xdc\x04\x00" * 3000]

    def flipped(rng):
        changed = bytearray(raw)
        for place in rng.integers(0, 60, rng.integers(1, 4)):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    return {
        "random": lambda rng: rng.bytes(int(rng.integers(0, 2000))),
        "truncated": lambda rng: raw[: rng.integers(0, len(raw))],
        "flipped": flipped,
        "claims": lambda rng: b"\x81\xa1x" * rng.integers(0, 2) + claims[rng.integers(len(claims))],
        "dtypes": lambda rng: msgpack.packb({**good, state: array((4,), dtypes[rng.integers(len(dtypes))])}),
        "shapes": lambda rng: msgpack.packb({**good, state: array((4,)) | {b"shape": shapes[rng.integers(9)]}}),
        "nested": lambda rng: msgpack.packb({"observation": nest(rng, int(rng.integers(5, 400)))}),
        "too_deep": lambda rng: b"\x91" * int(rng.integers(1024, 200_000)),
        "types": lambda rng: msgpack.packb({**good, KEYS[rng.integers(len(KEYS))]: random_value(rng), "unknown": 1}),
        "numbers": lambda rng: msgpack.packb({**good, state: float_array(rng)}),
        "many": lambda rng: msgpack.packb({"x": [[0] * 1000] * int(rng.integers(20, 500))}),
        "long": lambda rng: msgpack.packb({**good, "task": "a" * int(rng.integers(5000, 500_000))}),
        "text": lambda rng: "".join(map(chr, rng.integers(1, 0xD7FF, rng.integers(0, 500)))),
    }


def float_array(rng):
    values = rng.normal(size=int(rng.integers(0, 3000))) * 1e300
    values[: values.size // 2] = np.nan
    return array(values.shape, "<f8", values.tobytes())


def frame(opcode, payload, masked=True, fin=True, rsv=0, length=None):
    head = bytes([fin << 7 | rsv << 4 | opcode])
    length = len(payload) if length is None else length
    size = bytes([masked << 7 | 127]) + struct.pack("!Q", length)
    return head + size + bytes(4) * masked + payload


def frames(rng):
    """What breaks the rules of a websocket."""
    payload = rng.bytes(int(rng.integers(0, 200)))
    kinds = [
        lambda: rng.bytes(int(rng.integers(1, 3000))),
        lambda: frame(2, payload, masked=False),
        lambda: frame(int(rng.choice([3, 4, 5, 6, 7, 11, 12, 13, 14, 15])), payload),
        lambda: frame(2, payload, rsv=int(rng.integers(1, 8))),
        lambda: frame(0, payload),  # goes on with nothing
        lambda: frame(2, payload, fin=False) + frame(2, payload),
        lambda: frame(1, b"\xff\xfe\xfd"),
        lambda: frame(9, bytes(126)),
        lambda: frame(8, b"\x00"),
        lambda: frame(8, struct.pack("!H", int(rng.integers(0, 999)))),
        lambda: frame(2, b"", length=2**63),
        lambda: frame(2, b"", length=LIMIT + 1),
        lambda: frame(2, bytes(LIMIT // 2), fin=False) + frame(0, bytes(LIMIT // 2 + 2)),
        lambda: frame(2, payload, length=len(payload) + 1000),  # and leaves
    ]
    return kinds[rng.integers(len(kinds))]()


def garbage(rng):
    """What is no websocket at all."""
    kinds = [
        lambda: rng.bytes(int(rng.integers(1, 3000))),
        lambda: b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * int(rng.integers(1, 500)) + b"\r\n",
        lambda: b"POST /healthz HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + bytes(1000),
        lambda: b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00" + rng.bytes(500),  # TLS
        lambda: b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        lambda: b"",
    ]
    return kinds[rng.integers(len(kinds))]()


def converse(plain, running, client, kinds, rng):
    """Send a burst of malformed messages, and read that every single one was refused; counts them."""
    burst = [sorted(kinds)[rng.integers(len(kinds))] for _ in range(BURST)]
    try:
        for kind in burst:
            client.send(kinds[kind](rng))
        for kind in burst:
            answer = client.receive()
            assert isinstance(answer, str) or kind == "flipped", kind
            assert isinstance(answer, dict) or not answer.startswith("internal"), (kind, answer)
    except ConnectionClosed as error:
        raise AssertionError(f"{error} after {burst}") from error
    return BURST


def misbehave(connection, data):
    """Send it, and leave, sometimes before anything is answered."""
    with connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:  # it hung up
            pass


def attack(running, plain, raw, good, count, rng):
    kinds, done, client = messages(good), 0, plain(running.url)
    while done < count:
        done += converse(plain, running, client, kinds, rng)
        misbehave(raw(running.port), frames(rng))
        misbehave(socket.create_connection(("127.0.0.1", running.port), 30), garbage(rng))
        done += 2
    big = plain(running.url)
    with pytest.raises(ConnectionClosed):
        big.send(bytes(LIMIT + 1))
        big.receive()


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_messages_change_nothing(count, shipped, process, plain, raw):
    each, rng = shipped("tinyvla_metaworld"), np.random.default_rng(int(os.environ.get("FUZZ_SEED", 0)))
    running = process(each.folder, "--seed", 0, "--max-payload-mb", LIMIT / 2**20, "--batch-size", 2)
    good = {name: array_of(value) for name, value in each.observation.items()}
    wanted = each.models.policy()
    bystander, halves = plain(running.url), [raw(running.port) for _ in range(HELD)]
    for half in halves:  # a frame that never ends
        half.sendall(frame(2, b"\x81", length=1000))
    attack(running, plain, raw, good, count // 10, rng)  # after which all that is kept for good is there
    before = running.memory
    for _ in range(3):
        (chunk,) = predict_chunks([wanted], [each.observation], None, 2)
        assert np.array_equal(bystander.ask(each.observation)["actions"], chunk)
        attack(running, plain, raw, good, 3 * count // 10, rng)
    (chunk,) = predict_chunks([wanted], [each.observation], None, 2)
    assert np.array_equal(bystander.ask(each.observation)["actions"], chunk)
    # a fraction of what was sent; the heap itself moves up and down by 20 MB
    assert running.memory - before < 48 * 2**20
    newcomer = plain(running.url).ask(each.observation)["actions"]
    assert np.array_equal(newcomer, predict_chunks([each.models.policy()], [each.observation], None, 2)[0])
    assert running.stop() == 0
    log = "".join(running.log)
    assert "Traceback" not in log and "event=stopped" in log


def array_of(value):
    return value if isinstance(value, str) else array(value.shape, value.dtype.str, value.tobytes())
