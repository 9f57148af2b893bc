"""FAST: a DCT over time, rounded, its coefficients as characters, compressed by byte-pair encoding.

Source: https://huggingface.co/papers/2501.09747
"""

import itertools
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, trainers

from hf_vla.actions.tokenizers.base import ActionTokenizer, TokenStream, check_actions, integer_ids, positive

PAD_ID = -100  # the label value that losses ignore
SURROGATES = 0xD800  # characters up to here are whole numbers without holes


class FastTokenizer(ActionTokenizer):
    """Chunks of any length as few ids; the number of ids depends on the chunk.

    Coefficient c becomes character `chr(c - min_token)`; the chunk is the string of all coefficients, lowest
    frequency first and every dimension of it, and BPE ids are the tokens of that string. Two kinds of BPE are read:
    over characters (what `fit` makes) and over UTF-8 bytes (ByteLevel, the published ones), where a token may hold
    half a character.

    Ids that no encoding contains (byte-level files hold some, left over from their alphabet) count as undecodable.

    Args:
        bpe (`dict`): content of a `tokenizer.json`.
        action_dim (`int`): dimensions of an action.
        horizon (`int`, *optional*): actions of a chunk where `decode` is told nothing else.
        scale (`float`, defaults to 10.0): coefficients are multiplied by it before rounding.
        min_token (`int`, defaults to 0): the coefficient of character 0.
    """

    type = "fast"

    def __init__(
        self, bpe: dict[str, Any], action_dim: int, horizon: int | None = None, scale: float = 10.0, min_token: int = 0
    ):
        try:
            self._bpe = Tokenizer.from_str(json.dumps(bpe))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"Expected the content of a tokenizer.json as bpe; {error}.") from None
        if action_dim < 1 or not 0 < scale < math.inf:
            raise ValueError(f"Expected action_dim >= 1 and scale > 0; got {action_dim} and {scale}.")
        self._bpe.no_padding()
        self._bpe.no_truncation()
        self.bpe, self.action_dim, self.horizon = bpe, action_dim, horizon
        self.scale, self.min_token = float(scale), int(min_token)
        self.vocab_size = self._bpe.get_vocab_size()
        self._token_bytes, self._characters = _read_vocabulary(self._bpe, bpe.get("decoder"))

        # Two more rows than ids: nothing, for padding, and a separator that ends a chunk, so that decoding is one
        # gather of bytes and one UTF-8 decode for a whole batch and no character can reach across chunks.
        rows = [*self._token_bytes, b"", b"\0"]
        self._data = np.frombuffer(b"".join(rows), dtype=np.uint8)
        self._sizes = np.array([len(row) for row in rows])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._begun = np.array([sum(byte & 0xC0 != 0x80 for byte in row) for row in rows])  # characters that begin

    @classmethod
    def fit(cls, chunks: np.ndarray, vocab_size: int = 1024, scale: float = 10.0) -> "FastTokenizer":
        """Learn the BPE from chunks.

        The alphabet holds every coefficient that a chunk of this length in [-1, 1] can have, |c| <= scale * sqrt(T),
        and all that these chunks have beyond, so no such chunk is ever refused.

        Args:
            chunks (`np.ndarray` of shape `(..., T, D)`): normalised.
            vocab_size (`int`, defaults to 1024): ids at most, alphabet included; fewer where no pair repeats.
            scale (`float`, defaults to 10.0): more keeps finer detail in more ids.

        Raises:
            ValueError: NaN or infinity, another shape, or an alphabet larger than `vocab_size`.
        """
        chunks = check_actions(chunks)
        horizon, action_dim = chunks.shape[-2:]
        coefficients = _coefficients(chunks, scale)
        limit = max(math.ceil(scale * math.sqrt(horizon)), int(np.abs(coefficients).max(initial=0)))
        size = 2 * limit + 1
        if not size <= min(vocab_size, SURROGATES):
            raise ValueError(
                f"Coefficients from {-limit} to {limit} need an alphabet of {size} ids; got vocab_size {vocab_size}. "
                "Raise vocab_size or lower scale."
            )
        bpe = Tokenizer(models.BPE())
        bpe.decoder = decoders.Fuse()
        alphabet = [chr(code) for code in range(size)]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        bpe.train_from_iterator(_texts(coefficients + limit, horizon * action_dim), trainer)
        return cls(json.loads(bpe.to_str()), action_dim, horizon, scale, -limit)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, action_dim: int | None = None, horizon: int | None = None
    ) -> "FastTokenizer":
        """Load the files of a published FAST processor: `tokenizer.json` and `processor_config.json`.

        Args:
            path (`str` or `Path`): a folder, or a name on the Hub such as `"physical-intelligence/fast"`.
            action_dim, horizon (`int`, *optional*): where the file leaves them null, as the published ones do.

        Raises:
            ValueError: a file is missing, or `action_dim` is neither given nor in the file.
        """
        names = ["tokenizer.json", "processor_config.json"]
        folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), allow_patterns=names))
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"Expected a FAST processor's files; {str(path)!r} has no {' and no '.join(missing)}.")
        bpe, config = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        action_dim = action_dim or config.get("action_dim")
        if action_dim is None:
            raise ValueError(f"{str(files[1])!r} leaves action_dim open; give action_dim=.")
        return cls(bpe, action_dim, horizon or config.get("time_horizon"), config["scale"], config["min_token"])

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Compress chunks.

        Args:
            actions (`np.ndarray` of shape `(..., T, action_dim)`): normalised; not clipped. The DCT is computed in
                their own precision, as the published processor does.

        Returns:
            `np.ndarray` of shape `(..., N)`: ids; N is the longest chunk's, shorter ones end in `PAD_ID` (-100).

        Raises:
            ValueError: NaN or infinity, another shape, or a coefficient for which the vocabulary has no character.
        """
        actions = check_actions(actions, self.action_dim)
        codes = _coefficients(actions, self.scale) - self.min_token
        known = self._known(codes)
        if not known.all():
            *chunk, frequency, dim = np.argwhere(~known)[0].tolist()
            coefficients = np.flatnonzero(self._characters) + self.min_token
            raise ValueError(
                f"actions{chunk} have DCT coefficient {codes[~known][0] + self.min_token:.0f} at frequency "
                f"{frequency} of dimension {dim}; this vocabulary has characters for {coefficients.size} "
                f"coefficients from {coefficients[0]} to {coefficients[-1]}. Clip the actions to [-1, 1], or fit on "
                "such chunks too."
            )
        texts = _texts(codes, codes.shape[-2] * codes.shape[-1])
        rows = [encoding.ids for encoding in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        ids = np.full((len(rows), lengths.max(initial=0)), PAD_ID, dtype=np.int64)
        ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
        return ids.reshape(*actions.shape[:-2], ids.shape[1])

    def decode(self, ids: np.ndarray, horizon: int | None = None) -> np.ndarray:
        """Restore chunks; nothing is ever repaired, dropped or filled in.

        Args:
            ids (`np.ndarray` of shape `(..., N)`): rows may end in `PAD_ID`.
            horizon (`int`, *optional*): actions of every chunk; the tokenizer's own by default.

        Returns:
            `np.ndarray` of shape `(..., horizon, action_dim)`, float64.

        Raises:
            ValueError: no horizon is known; ids that are no integers, unknown or never produced by an encoding;
                padding before an id; half a character; or another number of coefficients than the chunk has.
        """
        horizon, ids = self._horizon(horizon), integer_ids(ids)
        padding = ids == PAD_ID
        self._check_ids(ids, padding)
        tokens = np.full((*ids.shape[:-1], ids.shape[-1] + 1), self.vocab_size + 1)
        tokens[..., :-1] = np.where(padding, self.vocab_size, ids)

        sizes = self._sizes[tokens].ravel()
        ends = np.cumsum(sizes)
        data = self._data[np.arange(sizes.sum()) + np.repeat(self._starts[tokens].ravel() - ends + sizes, sizes)]
        try:
            codes = np.frombuffer(data.tobytes().decode("utf-8").encode("utf-32-le"), dtype="<u4").astype(np.int64)
        except UnicodeDecodeError as error:
            token = int(np.searchsorted(ends, error.start, side="right"))
            raise ValueError(
                f"ids{_place(token, tokens.shape)} leaves a character incomplete ({error.reason}); the sequence is "
                "cut or out of order. Generate with stream() and every chunk decodes."
            ) from None
        counts, wanted = self._begun[tokens].sum(axis=-1) - 1, horizon * self.action_dim
        if (counts != wanted).any():
            row = int(np.argmax(counts != wanted))
            raise ValueError(
                f"ids{_place(row, counts.shape)} hold {counts.flat[row]} coefficients; expected {horizon} actions of "
                f"{self.action_dim} dimensions, {wanted}. Ids are missing or too many; generate with stream()."
            )
        codes = codes.reshape(*counts.shape, wanted + 1)[..., :-1]
        known = self._known(codes)
        if not known.all():
            raise ValueError(
                f"ids{_place(int(np.argmax(~known.all(axis=-1))), counts.shape)} form the character "
                f"{codes[~known][0]:#x}, which no encoding contains; generate with stream()."
            )
        coefficients = (codes + self.min_token).reshape(*counts.shape, horizon, self.action_dim)
        return idct(coefficients / self.scale, axis=-2, norm="ortho")

    def resolution(self, horizon: int | None = None) -> np.ndarray:
        """Return the error if every coefficient is half a step off, all adding up, shape `(action_dim,)`."""
        basis = idct(np.eye(self._horizon(horizon)), axis=0, norm="ortho")
        return np.full(self.action_dim, np.abs(basis).sum(axis=1).max() * 0.5 / self.scale)

    def stream(self, horizon: int | None = None) -> TokenStream:
        """Return the state of generating one chunk of `horizon` actions id by id.

        Raises:
            ValueError: no sequence of this vocabulary has exactly the coefficients of such a chunk.
        """
        return _CharacterStream(self._automaton, self._horizon(horizon) * self.action_dim)

    @cached_property
    def _automaton(self) -> "_Automaton":
        return _Automaton(self._token_bytes, self._characters)

    def to_dict(self) -> dict[str, Any]:
        """Return the options, JSON-safe, with the whole BPE as the content of its `tokenizer.json`."""
        return {
            "type": self.type,
            "bpe": self.bpe,
            "action_dim": self.action_dim,
            "horizon": self.horizon,
            "scale": self.scale,
            "min_token": self.min_token,
        }

    def _horizon(self, horizon: int | None) -> int:
        horizon = self.horizon if horizon is None else horizon
        if horizon is None:
            raise ValueError("Expected the number of actions of a chunk; this tokenizer has none. Give horizon=.")
        return positive(horizon)

    def _known(self, codes: np.ndarray) -> np.ndarray:
        """Return where there is a character for a code."""
        inside = (codes >= 0) & (codes < self._characters.size)
        return inside & self._characters[np.where(inside, codes, 0).astype(np.int64)]

    def _check_ids(self, ids: np.ndarray, padding: np.ndarray) -> None:
        unknown = ~padding & ((ids < 0) | (ids >= self.vocab_size))
        if unknown.any():
            place = np.argwhere(unknown)[0].tolist()
            raise ValueError(f"ids{place} is {ids[tuple(place)]}; expected ids in [0, {self.vocab_size}).")
        dead = ~padding & (self._sizes[np.where(padding, 0, ids)] == 0)
        if dead.any():
            place = np.argwhere(dead)[0].tolist()
            raise ValueError(
                f"ids{place} is {ids[tuple(place)]}, which no encoding contains and which stands for no coefficient; "
                "generate with stream()."
            )
        early = padding[..., :-1] & ~padding[..., 1:]
        if early.any():
            raise ValueError(f"ids{np.argwhere(early)[0].tolist()} is padding ({PAD_ID}); expected no id after it.")


class _CharacterStream(TokenStream):
    """Counts characters down to none left; `state` is the part of a character that the last id left over."""

    def __init__(self, automaton: "_Automaton", characters: int):
        super().__init__(automaton.count.shape[1])
        self.automaton, self.remaining, self.state = automaton, characters, 0
        self.reachable = automaton.reachable(characters)
        if not self.reachable[characters, 0]:
            raise ValueError(f"No sequence of this vocabulary's ids has exactly {characters} coefficients.")

    @property
    def complete(self) -> bool:
        return self.remaining == 0

    def allowed(self) -> np.ndarray:
        return self.automaton.allowed(self.reachable, self.remaining, self.state)

    def _advance(self, token_id: int) -> None:
        self.remaining -= self.automaton.count[self.state, token_id]
        self.state = self.automaton.target[self.state, token_id]


class _Automaton:
    """What each id does to a sequence that so far ends in state s, a proper prefix of a character's UTF-8 bytes.

    `count[s, id]` is how many characters the id completes (a huge number where it breaks UTF-8 or makes an unknown
    character) and `target[s, id]` the state after it. State 0 is the empty prefix.
    """

    def __init__(self, token_bytes: list[bytes], characters: np.ndarray):
        whole = {chr(code).encode("utf-8") for code in np.flatnonzero(characters)}
        self.prefixes = sorted({text[:i] for text in whole for i in range(len(text))}, key=len)
        index = {prefix: state for state, prefix in enumerate(self.prefixes)}
        self.count = np.full((len(self.prefixes), len(token_bytes)), np.iinfo(np.int64).max)
        self.target = np.zeros_like(self.count)
        for (prefix, state), (token_id, data) in itertools.product(index.items(), enumerate(token_bytes)):
            done, rest = 0, prefix
            for byte in data:
                rest += bytes([byte])
                if rest in whole:
                    done, rest = done + 1, b""
                elif rest not in index:
                    break
            else:
                if data:
                    self.count[state, token_id], self.target[state, token_id] = done, index[rest]

    def allowed(self, reachable: np.ndarray, remaining: int, state: int) -> np.ndarray:
        """Return the ids after which the chunk can still be completed exactly."""
        count = self.count[state]
        fits = count <= remaining
        return fits & reachable[np.where(fits, remaining - count, 0), self.target[state]]

    def reachable(self, characters: int) -> np.ndarray:
        """Return `(characters + 1, states)`: whether so many characters can be completed from a state."""
        reachable = np.zeros((characters + 1, len(self.prefixes)), dtype=bool)
        reachable[0, 0] = True
        for remaining in range(characters + 1):
            for state in reversed(range(remaining == 0, len(self.prefixes))):  # an id may only lengthen the prefix
                reachable[remaining, state] = self.allowed(reachable, remaining, state).any()
        return reachable


def _coefficients(actions: np.ndarray, scale: float) -> np.ndarray:
    """Return the rounded DCT-II over time, whole numbers as floats."""
    return np.rint(dct(actions, axis=-2, norm="ortho") * scale)


def _texts(codes: np.ndarray, length: int) -> list[str]:
    """Return each chunk's codes as a string of `length` characters."""
    text = codes.astype("<u4").tobytes().decode("utf-32-le")
    return [text[start : start + length] for start in range(0, len(text), length)]


def _place(index: int, shape: tuple[int, ...]) -> list[int]:
    return [int(i) for i in np.unravel_index(index, shape)] if shape else []


def _read_vocabulary(bpe: Tokenizer, decoder: dict[str, Any] | None) -> tuple[list[bytes], np.ndarray]:
    """Return the UTF-8 bytes of each id (none: no encoding contains it), and which characters can be encoded."""
    vocab = bpe.get_vocab(with_added_tokens=False)
    token_bytes = [b""] * bpe.get_vocab_size()
    kind = decoder and decoder.get("type")
    if kind == "ByteLevel":
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves
        letters = {chr(byte): byte for byte in visible}
        letters |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}
        for token, token_id in vocab.items():
            if all(letter in letters for letter in token):
                token_bytes[token_id] = bytes(letters[letter] for letter in token)
        single = {data[0] for data in token_bytes if len(data) == 1}
        # Two bytes are enough for 2048 coefficients; longer characters can only come from leftover alphabet ids.
        return token_bytes, np.array([single.issuperset(chr(code).encode("utf-8")) for code in range(0x800)])
    if kind == "Fuse":
        for token, token_id in vocab.items():
            token_bytes[token_id] = token.encode("utf-8")
        codes = [ord(token) for token in vocab if len(token) == 1]
        return token_bytes, np.isin(np.arange(max(codes) + 1), codes)
    raise ValueError(f"Expected a BPE with a ByteLevel (published FAST) or Fuse decoder; got {decoder}.")
