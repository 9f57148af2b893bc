"""The wire format: openpi's bytes, and nothing that costs more than it is long."""

import tracemalloc

import msgpack
import numpy as np
import pytest

from hf_vla.serving.protocol import DTYPES, MAX_ITEMS, MAX_TOTAL_ITEMS, RefusedRequest, pack, unpack

ARRAY = {b"__ndarray__": True, b"data": b"\0" * 24, b"dtype": "<f4", b"shape": [2, 3]}
SCALAR = {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}


def test_openpis_client_is_understood(goldens):
    seen, rng = unpack((goldens / "openpi" / "observation.msgpack").read_bytes()), np.random.default_rng(0)
    np.testing.assert_array_equal(seen["observation/image"], rng.integers(0, 256, (4, 5, 3), np.uint8))
    np.testing.assert_array_equal(seen["observation/state"], rng.normal(size=4))
    assert seen["observation/image"].dtype == np.uint8 and seen["observation/state"].dtype == np.float64
    assert seen["images"]["wrist"].shape == (2, 2, 3)
    rest = {name: seen[name] for name in ("prompt", "gripper", "step", "done", "reset")}
    assert rest == {"prompt": "pick up the cube", "gripper": 0.5, "step": 7, "done": True, "reset": True}


def test_what_we_send_is_what_openpi_sends(goldens):
    answer = {"actions": np.arange(6, dtype=np.float32).reshape(2, 3), "server_timing": {"infer_ms": 1.5}}
    assert pack(answer) == (goldens / "openpi" / "answer.msgpack").read_bytes()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_arrays_keep_their_numbers(dtype):
    values = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    seen = unpack(pack({"x": values, "y": values[0, 1]}))
    np.testing.assert_array_equal(seen["x"], values)
    assert seen["x"].dtype == values.dtype.newbyteorder("=") and seen["x"].dtype.isnative
    assert seen["y"] == values[0, 1] and isinstance(seen["y"], (bool, int, float))


@pytest.mark.parametrize("dtype", [object, "U3", "S3", "M8[s]", "c16", "V4", "f16", [("a", "f4")]])
def test_other_arrays_are_not_sent(dtype):
    with pytest.raises(ValueError, match="Expected an array of numbers"):
        pack({"x": np.zeros(2, dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"dtype": "|O"}, "dtype of an array"),
        ({b"dtype": "O"}, "dtype of an array"),
        ({b"dtype": "<f4,<f4"}, "dtype of an array"),
        ({b"dtype": "1000000f4"}, "dtype of an array"),
        ({b"dtype": "<U6"}, "dtype of an array .* came '<U6'. A text is sent as such, not as an array of it"),
        ({b"dtype": "<c8"}, "dtype of an array"),
        ({b"dtype": "float32"}, "dtype of an array"),
        ({b"dtype": 4}, "dtype of an array"),
        ({b"dtype": ["<f4"]}, "dtype of an array"),
        ({b"shape": [2, 4]}, "does not have 24 bytes"),
        ({b"shape": [2**31 - 1] * 8}, "does not have 24 bytes"),
        ({b"shape": [0, 2**31 - 1]}, "does not have 24 bytes"),
        ({b"shape": [2**31, 0]}, "shape of an array"),
        ({b"shape": [-2, -3]}, "shape of an array"),
        ({b"shape": [2.0, 3]}, "shape of an array"),
        ({b"shape": [True, 6]}, "shape of an array"),
        ({b"shape": "23"}, "shape of an array"),
        ({b"shape": [1] * 9}, "shape of an array"),
        ({b"shape": 6}, "shape of an array"),
        ({b"data": "x" * 24}, "bytes of an array"),
        ({b"data": [0] * 24}, "bytes of an array"),
        ({b"data": b""}, "does not have 0 bytes"),
        ({b"more": 1}, "texts as keys"),
    ],
)
def test_an_array_is_what_it_says(change, message):
    with pytest.raises(ValueError, match=message):
        unpack(msgpack.packb({"x": ARRAY | change}))


def test_an_empty_array_costs_nothing():
    seen = unpack(msgpack.packb({"x": ARRAY | {b"data": b"", b"shape": [0, 2**31 - 1]}}))["x"]
    assert seen.shape == (0, 2**31 - 1)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (b"", "incomplete"),
        (b"\xc1", "msgpack"),
        (msgpack.packb([1]), "came list"),
        (msgpack.packb(1), "came int"),
        (msgpack.packb({"x": b"raw"}), "came bytes"),
        (msgpack.packb({"x": [b"raw"]}), "came bytes"),
        (msgpack.packb({b"x": 1}), "texts as keys"),
        (msgpack.packb({1: 1}), "msgpack"),
        (msgpack.packb({"x": SCALAR | {b"dtype": "|O"}}), "dtype of an array"),
        (msgpack.packb({"x": SCALAR | {b"data": "1"}}), "Expected a number"),
        (msgpack.packb({"x": msgpack.ExtType(5, b"1234")}), "msgpack"),
        (msgpack.packb({"x": msgpack.Timestamp(1)}), "msgpack"),
        (b"\x81\xa1x\xc7\x00\x05", "came ExtType"),
        (msgpack.packb({"x": 1}) + b"\0", "msgpack"),
        (msgpack.packb({"x": 1})[:-1], "incomplete"),
        (b"\x81\xa1x\xa2\xff\xfe", "msgpack"),  # no UTF-8
        (b"\x81\xa1x" + b"\x91" * 2000, "msgpack"),
        (b"\x81\xa1x" + b"\x81\xa1x" * 2000, "msgpack"),
        (b"\x81\xa1x\xdd\xff\xff\xff\xff", "msgpack"),
        (b"\xdf\xff\xff\xff\xff", "msgpack"),
        (b"\x81\xa1x\xc6\xff\xff\xff\xff", "msgpack"),
        (msgpack.packb({"x": [0] * (MAX_ITEMS + 1)}), "msgpack"),
        (msgpack.packb({"x": [[0] * MAX_ITEMS] * 20}), f"at most {MAX_TOTAL_ITEMS} items"),
    ],
)
def test_what_is_no_message_is_an_error(message, said):
    with pytest.raises(ValueError, match=said):
        unpack(message)


def test_a_claim_of_much_allocates_little():
    claims = [
        b"\x81\xa1x" + b"\xdd\xff\xff\xff\xff" * 500,
        b"\x81\xa1x" + b"\xdc\x04\x00" * 900,  # lists in lists, each of as many as are allowed
        b"\x81\xa1x" + b"\xc6\x7f\xff\xff\xff" + b"\0" * 1000,
        msgpack.packb({"x": [[[0] * MAX_ITEMS] * 100] * 10}),
    ]
    tracemalloc.start()
    try:
        for claim in claims:
            tracemalloc.reset_peak()
            with pytest.raises(ValueError):
                unpack(claim)
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_only_plain_things_are_sent():
    with pytest.raises(TypeError, match="came object"):
        pack({"x": object()})


def test_errors_keep_their_kind():
    there = RefusedRequest.from_text(RefusedRequest("observation", "It needs: a camera.").to_text())
    assert (there.kind, str(there)) == ("observation", "It needs: a camera.")
    assert RefusedRequest.from_text("Traceback (most recent call last): x").kind == "internal"
    assert len(RefusedRequest("observation", "x" * 10**6).to_text()) == 2000
