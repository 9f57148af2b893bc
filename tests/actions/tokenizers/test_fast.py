"""FAST: ids of a published processor exactly, decoded chunks to 1e-12; and never an invented action."""

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.fft import dct
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, trainers

from hf_vla.actions.tokenizers.fast import PAD_ID, FastTokenizer, _Automaton, _CharacterStream

NAME, HORIZON, DIMS = "h16d7_v512_s10", 16, 7
REVERSED = "reversed"  # a permutation of whole tokens is a chunk too: nothing can tell it from a wanted one


@pytest.fixture(scope="module")
def published(goldens):
    return FastTokenizer.from_pretrained(goldens / "fast" / NAME, action_dim=DIMS, horizon=HORIZON)


@pytest.fixture(scope="module")
def recorded(goldens):
    return load_file(goldens / "fast" / f"{NAME}.safetensors")


@pytest.fixture(scope="module")
def rows(recorded):
    return np.split(recorded["h16d7/tokens"], np.cumsum(recorded["h16d7/lengths"])[:-1])


@pytest.fixture(scope="module")
def base(published, recorded):
    """The ids that the malformed sequences were made from: the reference drops the unknown id from this one."""
    return published.encode(recorded["malformed/id_99999_appended/decoded"])


def smooth_chunks(count, seed, horizon=HORIZON, dims=DIMS):
    phase, rate = np.random.default_rng(seed).uniform(0, 2 * np.pi, (2, count, 1, dims))
    return np.sin(rate * np.linspace(0, 1, horizon)[:, None] + phase)


@pytest.fixture(scope="module")
def wide():
    """A byte-level tokenizer as the published `fit` makes them, with an alphabet of 451 characters.

    Most characters take two bytes, tokens may start or end in half a character, and the alphabet leaves ids behind
    that stand for a lone byte or for nothing.
    """
    chunks = smooth_chunks(300, seed=0, horizon=8, dims=3) * 1.5
    coefficients = FastTokenizer.fit(chunks, 4096, 50.0)
    size = 1 - 2 * coefficients.min_token
    texts = [coefficients._bpe.decode(ids[ids >= 0].tolist()) for ids in coefficients.encode(chunks)]
    bpe = ByteLevelBPETokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=2, show_progress=False, special_tokens=[], max_token_length=10000,
        initial_alphabet=[chr(code) for code in range(size)],
    )  # fmt: skip
    bpe._tokenizer.train_from_iterator(texts, trainer)
    return FastTokenizer(json.loads(bpe.to_str()), 3, 8, 50.0, coefficients.min_token), chunks


# parity -------------------------------------------------------------------------------------------------------------


def test_ids_of_every_lossless_chunk_equal_the_recorded(published, recorded, rows):
    lossless = np.flatnonzero(recorded["h16d7/lossless"])
    assert len(lossless) == 39
    ids = published.encode(recorded["h16d7/chunk"][lossless])
    for got, row in zip(ids, lossless, strict=True):
        np.testing.assert_array_equal(got[got != PAD_ID], rows[row])
        np.testing.assert_array_equal(published.encode(recorded["h16d7/chunk"][row]), rows[row])


def test_decoded_chunks_equal_the_recorded(published, recorded, rows):
    lossless = recorded["h16d7/lossless"]
    ids = np.full((lossless.sum(), recorded["h16d7/lengths"].max()), PAD_ID)
    for i, row in enumerate(np.flatnonzero(lossless)):
        ids[i, : len(rows[row])] = rows[row]
    np.testing.assert_allclose(published.decode(ids), recorded["h16d7/decoded"][lossless], rtol=0, atol=1e-12)


def test_chunks_that_the_reference_distorts_are_refused(published, recorded):
    """It raises coefficients below the lowest to the lowest and turns unseen characters into U+FFFD."""
    (row,) = np.flatnonzero(~recorded["h16d7/lossless"])
    message = (
        r"actions\[1\] have DCT coefficient 69 at frequency 1 of dimension 0; .* for 81 coefficients from -40 to 40"
    )
    with pytest.raises(ValueError, match=message):
        published.encode(recorded["h16d7/chunk"][[0, row]])
    with pytest.raises(ValueError, match="DCT coefficient -41 at frequency 0 of dimension 3"):
        published.encode(np.where(np.arange(DIMS) == 3, -1.025, 0.0) * np.ones((HORIZON, 1)))
    with pytest.raises(ValueError, match="DCT coefficient 4000000000000000.* at frequency 0"):
        published.encode(np.full((HORIZON, DIMS), 1e30))


def malformed(row, vocab_size):
    row = row.tolist()
    return {
        "all_id_5": ([5] * 112, "is 5, which no encoding contains and which stands for no coefficient"),
        "all_zero_ids": ([0] * 112, r"ids\[0\] is 0, which no encoding contains"),
        "append_one": ([*row, row[0]], r"hold 1\d\d coefficients; expected 16 actions of 7 dimensions, 112"),
        "doubled": (row * 2, "ids.. hold 224 coefficients; expected 16 actions of 7 dimensions, 112"),
        "drop_last": (row[:-1], r"hold \d+ coefficients; expected .* Ids are missing or too many"),
        "empty": ([], "ids.. hold 0 coefficients; expected 16 actions"),
        "floats": ([float(i) for i in row], r"Expected integer ids of shape \(\.\.\., N\); got float64"),
        "id_99999": ([99999], r"ids\[0\] is 99999; expected ids in \[0, 512\)"),
        "id_99999_appended": ([*row, 99999], rf"ids\[{len(row)}\] is 99999; expected ids in \[0, 512\)"),
        "id_eq_vocab_len": ([vocab_size, *row[1:]], r"ids\[0\] is 512; expected ids in \[0, 512\)"),
        "negative_id": ([*row[:-1], -1], rf"ids\[{len(row) - 1}\] is -1; expected ids in \[0, 512\)"),
        "single": (row[:1], r"hold \d+ coefficients; expected 16 actions"),
        "truncated_half": (row[: len(row) // 2], r"hold \d+ coefficients; expected 16 actions"),
    }


def test_every_recorded_malformed_sequence_raises(published, recorded, base):
    cases = malformed(base, published.vocab_size)
    names = {name.split("/")[1] for name in recorded if name.startswith("malformed/")}
    assert names == {*cases, REVERSED}
    for ids, message in cases.values():
        with pytest.raises(ValueError, match=message):
            published.decode(ids)
    for name in ("id_99999", "truncated_half", "floats"):  # what the reference makes of them
        assert not recorded[f"malformed/{name}/decoded"].any()


def test_reversed_ids_are_a_chunk_and_decode_as_such(published, recorded, base):
    decoded = published.decode(base[::-1])
    np.testing.assert_allclose(decoded, recorded[f"malformed/{REVERSED}/decoded"], rtol=0, atol=1e-12)


def test_malformed_rows_of_a_batch_are_located(published, rows):
    ids = np.full((2, 2, 30), PAD_ID)
    for place in np.ndindex(2, 2):
        ids[place][: len(rows[0])] = rows[0]
    ids[1, 0, len(rows[0]) - 1] = PAD_ID
    with pytest.raises(ValueError, match=r"ids\[1, 0\] hold \d+ coefficients"):
        published.decode(ids)
    ids[1, 1, 3] = PAD_ID
    with pytest.raises(ValueError, match=r"ids\[1, 1, 3\] is padding \(-100\); expected no id after it"):
        published.decode(ids)


# characters of two bytes --------------------------------------------------------------------------------------------


def test_half_characters_decode_as_the_library_decodes_them(wide):
    tokenizer, chunks = wide
    table = enumerate(tokenizer._token_bytes)
    halves = [token for token, text in table if text and (text[0] & 0xC0 == 0x80 or text[-1] >= 0xC0)]
    assert len(halves) > 20
    ids = tokenizer.encode(chunks)
    assert np.isin(halves, ids).any()
    decoded = tokenizer.decode(ids)
    assert np.abs(decoded - chunks).max() <= tokenizer.resolution().max()
    for row, chunk in zip(ids[:50], decoded, strict=False):
        text = tokenizer._bpe.decode(row[row >= 0].tolist())
        coefficients = np.reshape([ord(character) for character in text], (8, 3)) + tokenizer.min_token
        np.testing.assert_array_equal(np.rint(dct(chunk, axis=0, norm="ortho") * tokenizer.scale), coefficients)


def test_cut_characters_raise_and_are_located(wide):
    tokenizer, chunks = wide
    lead = next(i for i, text in enumerate(tokenizer._token_bytes) if text == b"\xc3")
    rest = next(i for i, text in enumerate(tokenizer._token_bytes) if text == b"\xa9")
    whole = tokenizer.encode(chunks[:2])
    ids = np.full((2, whole.shape[1] + 1), PAD_ID)
    ids[:, :-1] = whole
    end = int((ids[0] >= 0).sum())
    for wrong, place in ((lead, end), (rest, end)):
        ids[0, end] = wrong
        with pytest.raises(ValueError, match=rf"ids\[0, {place}\] leaves a character incomplete"):
            tokenizer.decode(ids)


def test_characters_never_reach_across_chunks(wide):
    """The first row ends in the first half of a character, the second row starts with the other half."""
    tokenizer, _ = wide
    table = tokenizer._token_bytes
    lead, rest = table.index(b"\xc3"), table.index(b"\xa9")
    one = table.index(b"P")
    with pytest.raises(ValueError, match=r"ids\[0, 24\] leaves a character incomplete"):
        tokenizer.decode([[one] * 24 + [lead], [rest] + [one] * 24])


def test_leftover_bytes_of_longer_characters_are_never_allowed(wide):
    tokenizer, _ = wide
    leftovers = [token for token, text in enumerate(tokenizer._token_bytes) if text and text[0] >= 0xE0]
    assert leftovers
    assert not tokenizer.stream(8).allowed()[leftovers].any()
    table = tokenizer._token_bytes
    three = [table.index(text) for text in (b"\xe1", b"\xa9", b"\xa9")]  # forms U+1A69: coefficient 6000 and more
    with pytest.raises(ValueError, match=r"ids.. form the character 0x1a69, which no encoding contains"):
        tokenizer.decode(three + [table.index(b"P")] * 23)


# streams ------------------------------------------------------------------------------------------------------------


def test_random_walks_over_allowed_ids_always_decode(published, wide):
    fitted = FastTokenizer.fit(smooth_chunks(100, 0), 256)
    generator = np.random.default_rng(0)
    for tokenizer, horizon, long in itertools.product((published, wide[0], fitted), (1, 2, 5, 16), (False, True)):
        stream, ids = tokenizer.stream(horizon), []
        while not stream.complete:
            choices = np.flatnonzero(stream.allowed())
            longest = choices[np.argmax(tokenizer._sizes[choices])]
            ids.append(longest if long and generator.random() < 0.5 else generator.choice(choices))
            stream.push(ids[-1])
        decoded = tokenizer.decode(ids, horizon)
        assert decoded.shape == (horizon, tokenizer.action_dim)


def completions(token_bytes, characters, prefix, wanted):
    """Whether some sequence of tokens after these bytes makes exactly `wanted` known characters; by trying all."""
    try:
        text = prefix.decode()
        if len(text) == wanted and set(text) <= characters:
            return True
    except UnicodeDecodeError:
        pass
    text = prefix.decode(errors="ignore")
    if len(prefix) > 2 * wanted or not set(text) <= characters or len(text) > wanted:
        return False
    valid = prefix.decode(errors="replace").rstrip("\ufffd") == text  # only the end may be incomplete
    return valid and any(completions(token_bytes, characters, prefix + data, wanted) for data in token_bytes if data)


@pytest.mark.parametrize(
    "token_bytes",
    [
        [b"aa", b"aaa", b""],  # one character alone cannot be made
        [b"a", b"\xc3", b"\xa9", b"\xc3\xa9a\xc3", b"\xa9\xa9", b"\xe1"],  # half characters on either side
        [b"\xc3", b"\xa9"],  # every character takes two ids
        [b"aaa\xc3", b"\xa9a", b"\xc3\xa9"],  # after some halves no length fits
    ],
)
def test_an_id_is_allowed_exactly_where_a_completion_exists(token_bytes):
    characters = np.zeros(256, dtype=bool)
    characters[[ord("a"), ord("é")]] = True
    automaton = _Automaton(token_bytes, characters)
    for wanted in range(1, 6):
        possible = completions(token_bytes, {"a", "é"}, b"", wanted)
        if not possible:
            with pytest.raises(ValueError, match=f"No sequence of this vocabulary's ids has exactly {wanted} coeff"):
                _CharacterStream(automaton, wanted)
            continue
        generator = np.random.default_rng(wanted)
        for _ in range(5):
            stream, prefix = _CharacterStream(automaton, wanted), b""
            while not stream.complete:
                expected = [bool(d) and completions(token_bytes, {"a", "é"}, prefix + d, wanted) for d in token_bytes]
                np.testing.assert_array_equal(stream.allowed(), expected)
                token = generator.choice(np.flatnonzero(expected))
                stream.push(token)
                prefix += token_bytes[token]
            assert len(prefix.decode()) == wanted


def test_a_stream_refuses_ids_that_overshoot(published, rows):
    stream = published.stream(1)
    longest = int(np.argmax(published._sizes[: published.vocab_size]))
    assert not stream.allowed()[longest]
    with pytest.raises(ValueError, match=rf"Id {longest} cannot come at position 0; expected one of the \d+ ids"):
        stream.push(longest)


# fitting and files --------------------------------------------------------------------------------------------------


def test_fitting_shortens_what_it_was_fitted_on():
    tokenizer = FastTokenizer.fit(smooth_chunks(500, seed=0), vocab_size=512)
    assert tokenizer.vocab_size == 512 and (tokenizer.action_dim, tokenizer.horizon) == (DIMS, HORIZON)
    ids = tokenizer.encode(smooth_chunks(100, seed=1))
    assert (ids >= 0).sum(axis=1).mean() < 40  # of 112 coefficients


def test_no_chunk_in_range_is_refused_whatever_the_fit_saw():
    tokenizer = FastTokenizer.fit(np.zeros((3, HORIZON, DIMS)), vocab_size=128)
    generator = np.random.default_rng(0)
    extremes = generator.choice([-1.0, 1.0], (500, HORIZON, DIMS))
    extremes[:2] = [[[-1.0]], [[1.0]]]
    error = np.abs(tokenizer.decode(tokenizer.encode(extremes)) - extremes)
    assert error.max() <= tokenizer.resolution().max()


def test_chunks_beyond_the_range_widen_the_alphabet_of_their_fit():
    chunks = np.full((2, HORIZON, DIMS), 1.5)
    tokenizer = FastTokenizer.fit(chunks, vocab_size=128)
    assert tokenizer.min_token == -60
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(chunks)), chunks, atol=1e-12)
    with pytest.raises(
        ValueError, match="have DCT coefficient 64 .* 121 coefficients from -60 to 60. Clip the actions"
    ):
        tokenizer.encode(chunks / 1.5 * 1.6)


def test_a_scale_too_fine_for_the_vocabulary_raises():
    with pytest.raises(ValueError, match="from -400 to 400 need an alphabet of 801 ids; got vocab_size 512. Raise"):
        FastTokenizer.fit(np.zeros((3, HORIZON, DIMS)), vocab_size=512, scale=100.0)


def test_another_horizon_than_the_fitted_one():
    tokenizer = FastTokenizer.fit(smooth_chunks(50, seed=0), vocab_size=256)
    short = smooth_chunks(3, seed=1, horizon=5)
    decoded = tokenizer.decode(tokenizer.encode(short), horizon=5)
    assert np.abs(decoded - short).max() <= tokenizer.resolution(5).max() < tokenizer.resolution().max()


def test_files_and_dictionary_hold_the_same_tokenizer(published, goldens, recorded):
    again = FastTokenizer.from_dict(json.loads(json.dumps(published.to_dict())))
    chunk = recorded["h16d7/chunk"][:5]
    np.testing.assert_array_equal(again.encode(chunk), published.encode(chunk))
    assert published.bpe == json.loads((goldens / "fast" / NAME / "tokenizer.json").read_text())


def test_what_files_leave_open_must_be_given(goldens, tmp_path):
    folder = goldens / "fast" / NAME
    with pytest.raises(ValueError, match="processor_config.json' leaves action_dim open; give action_dim="):
        FastTokenizer.from_pretrained(folder)
    open_ended = FastTokenizer.from_pretrained(folder, action_dim=DIMS)
    for call in (lambda: open_ended.decode([3]), open_ended.resolution, lambda: open_ended.stream(None)):
        with pytest.raises(ValueError, match="Expected the number of actions of a chunk; .* Give horizon="):
            call()
    with pytest.raises(ValueError, match="has no tokenizer.json and no processor_config.json"):
        FastTokenizer.from_pretrained(tmp_path, action_dim=DIMS)


def test_bad_options_raise(published):
    with pytest.raises(ValueError, match="Expected the content of a tokenizer.json as bpe"):
        FastTokenizer({"model": "x"}, DIMS)
    for options in ({"action_dim": 0}, {"action_dim": 7, "scale": 0.0}, {"action_dim": 7, "scale": float("nan")}):
        with pytest.raises(ValueError, match=r"Expected action_dim >= 1 and scale > 0; got \d and"):
            FastTokenizer(published.bpe, **options)
    plain = Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(
        ValueError, match=r"Expected a BPE with a ByteLevel \(published FAST\) or Fuse decoder; got None"
    ):
        FastTokenizer(json.loads(plain.to_str()), DIMS)
