"""Text <-> tokens: trains and loads lossless sentencepiece BPE models.

`data.prepare` uses it between reading stories and writing shards; generation uses it to turn tokens back into text.

1. `train` splits stories into short parts, takes an even sample of them, and trains sentencepiece on it. Characters
   that are too rare for a piece become bytes, so every text has an encoding and decodes to itself. There is no
   normalization, no space is added or dropped, and newlines are kept (they take part in merges: `."` and an empty line
   may be one token).
2. `Tokenizer` encodes and decodes, with our models or with those of others. No text is encoded to a control id, even if
   it spells one.
3. `CachedEncoder` encodes many texts several times as fast as `Tokenizer` and checks that they decode to themselves. It
   caches words, which needs a model without pieces that span two words; ours have none.
4. `StreamDecoder` turns ids into text one by one and never shows half a character.
"""

import codecs
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.settings import UserError

PAD, BOS, EOS, UNK = 0, 1, 2, 3  # in the models that we train
MAX_SAMPLE_BYTES = 20_000_000  # of text to train on; training uses about 5 times as much memory

SPACE_SYMBOL = "\u2581"  # replaces a space inside sentencepiece, which therefore decodes U+2581 to a space
UNTRAINABLE = "\0\u2581\u2585"  # sentencepiece skips a sentence with U+2585 in training, and misreads the other two
MAX_PART_CHARS = 1000  # at most 4,000 bytes: sentencepiece skips sentences of more than 4,192 bytes in training
TEXT_PART = re.compile(
    f"[^{UNTRAINABLE}]{{1,{MAX_PART_CHARS}}}(?=[ {UNTRAINABLE}]|\\Z)|[^{UNTRAINABLE}]{{1,{MAX_PART_CHARS}}}"
)


def split_text(text: str) -> list[str]:
    """`text` in parts of at most MAX_PART_CHARS characters, each cut before a space if there is one.

    Joined, the parts are the text without the UNTRAINABLE characters.
    """
    return TEXT_PART.findall(text)


def sample(parts: Iterable[str], max_bytes: int = MAX_SAMPLE_BYTES) -> list[str]:
    """Every 2^k-th part, with the smallest k for which they have at most `max_bytes` bytes: even and deterministic."""
    kept: list[str] = []
    size, stride = 0, 1
    for number, part in enumerate(parts):
        if number % stride == 0:
            kept.append(part)
            size += len(part.encode())
            while size > max_bytes and len(kept) > 1:
                kept = kept[::2]
                size, stride = sum(len(p.encode()) for p in kept), 2 * stride
    return kept


def train(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Writes a model of exactly `vocab_size` pieces to `path`. The same texts and size give the same bytes.

    Raises UserError if there is no text, or if `vocab_size` is too large or too small for the texts.
    """
    import sentencepiece

    sentences = sample(part for text in texts for part in split_text(text))
    if not any(part.strip("\r\n") for part in sentences):
        raise UserError("data.source: there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            required_chars=SPACE_SYMBOL,  # a space encoded as bytes would decode to U+2581
            num_threads=1,  # is stored in the model, so it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _user_error(error, vocab_size) from None
    write_atomic(path, model.getvalue())


def _user_error(error: RuntimeError, vocab_size: int) -> Exception:
    """A UserError if sentencepiece rejected the size of the vocabulary; else the error itself."""
    setting = f"data.vocab_size={vocab_size}: the corpus"
    if largest := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", str(error)):
        return UserError(f"{setting} yields at most {largest[1]} pieces; use data.vocab_size={largest[1]} or more text")
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        size = smallest[1]
        return UserError(f"{setting} needs {size} pieces for its characters alone; use data.vocab_size={size} or more")
    return error


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that its name always refers to complete content: it is renamed once it is on disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Tokenizer:
    """A sentencepiece model: `vocab_size`, the ids `bos`, `eos`, `pad`, `unk`, and `hash`, sha256 of the file."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError if the file is no readable sentencepiece model, or if bos or eos has no separate id."""
        import sentencepiece

        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.load_from_serialized_proto(model)
        except RuntimeError:
            raise UserError(f"{path}: not a sentencepiece model") from None
        self.hash = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.vocab_size()
        self.bos, self.eos, self.unk = self._sp.bos_id(), self._sp.eos_id(), self._sp.unk_id()
        if min(self.bos, self.eos) < 0 or self.bos == self.eos:
            missing = "bos" if self.bos < 0 else "eos"
            raise UserError(
                f"{path}: the model has no separate {missing} id, but stories are stored between bos and eos; "
                "give a model that has both, or data.tokenizer=train"
            )
        self.pad: int = self._sp.pad_id() if self._sp.pad_id() >= 0 else self.eos
        byte_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_of_id = {id: byte for byte, id in enumerate(byte_ids) if self._sp.is_byte(id)}
        self._space_symbol_ids: list[int] | None = None  # of U+2581 in a text, as bytes
        if len(self._byte_of_id) == 256:
            self._space_symbol_ids = [byte_ids[byte] for byte in SPACE_SYMBOL.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos. Raises UserError if it contains a lone surrogate (invalid Unicode)."""
        try:
            text.encode()
        except UnicodeEncodeError:
            message = "a text is not valid Unicode: it contains a lone surrogate, which cannot be encoded as UTF-8"
            raise UserError(message) from None
        if SPACE_SYMBOL not in text or not self._space_symbol_ids:
            return self._sp.encode(text)
        first, *others = text.split(SPACE_SYMBOL)
        ids = self._sp.encode(first)
        for other in others:
            ids += self._space_symbol_ids + self._sp.encode(other)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Control ids decode to nothing, and each byte that is not valid UTF-8 to U+FFFD."""
        return self._sp.decode(list(ids))

    def byte(self, id: int) -> int | None:
        """The byte that a byte piece represents; None for any other id."""
        return self._byte_of_id.get(id)

    @functools.cached_property
    def _unk_text(self) -> str:
        return self.decode([self.unk])

    def piece(self, id: int) -> str:
        """The piece as the model spells it."""
        return self._sp.id_to_piece(id)

    def decode_next(self, id: int) -> str:
        """Text of an id (not of a byte piece) that follows other text: some models drop a space at the very start."""
        return self.decode([self.unk, id])[len(self._unk_text) :]


class CachedEncoder:
    """Encodes texts word by word, with a cache of words, and checks that each text decodes to itself.

    In our models a space occurs only at the start of a piece, so no merge spans two words, and the ids of a text are
    the ids of its words. A word is decoded when it enters the cache: as long as every word decodes to itself, every
    text made of them does. Texts of other models, which lack this property, are encoded and decoded as a whole.
    """

    MAX_CACHED_WORDS = 1 << 17  # about 30 MB
    MAX_WORD_CHARS = 64  # longer words are not cached

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._first_words: dict[str, bytes] = {}  # a word at the start of a text -> its ids as uint32
        self._next_words: dict[str, bytes] = {}  # a word that follows a space -> the ids of both
        self._is_lossy = False  # some word did not decode to itself
        self.is_word_based = self._check_word_based()

    def _check_word_based(self) -> bool:
        """Whether encoding word by word gives the ids of the whole text, by the model's pieces and some examples."""
        pieces = (self.tokenizer.piece(id) for id in range(self.tokenizer.vocab_size))
        if any(SPACE_SYMBOL in piece[1:] for piece in pieces):
            return False
        examples = ["", " ", "a b", "  a   b ", "e\u0301 \u2167 \ufb01", "\n x\t\n", "A B\u3000C\xa0D", "The  end. "]
        return all(self._encode_words(text) == _as_bytes(self.tokenizer.encode(text)) for text in examples)

    def encode(self, text: str) -> tuple[bytes, bool]:
        """The ids of `Tokenizer.encode` as uint32, and whether they decode to the text. Raises UserError as it does."""
        if SPACE_SYMBOL in text or not self.is_word_based:
            ids = self.tokenizer.encode(text)
            return _as_bytes(ids), self.tokenizer.decode(ids) == text
        encoded = self._encode_words(text)
        if not self._is_lossy:
            return encoded, True
        return encoded, self.tokenizer.decode(np.frombuffer(encoded, np.uint32).tolist()) == text

    def _encode_words(self, text: str) -> bytes:
        first, *words = text.split(" ")
        try:  # the fast path: all words are in the cache
            return b"".join([self._first_words[first], *map(self._next_words.__getitem__, words)])
        except KeyError:
            parts = [self._first_words.get(first) or self._encode_word(self._first_words, first, first)]
            for word in words:
                parts.append(self._next_words.get(word) or self._encode_word(self._next_words, word, " " + word))
            return b"".join(parts)

    def _encode_word(self, cache: dict[str, bytes], word: str, text: str) -> bytes:
        """The ids of `text`, which is `word` with or without a space before it; adds them to the cache."""
        ids = self.tokenizer.encode(text)
        self._is_lossy = self._is_lossy or self.tokenizer.decode(ids) != text
        encoded = _as_bytes(ids)
        if len(word) <= self.MAX_WORD_CHARS:
            if len(cache) >= self.MAX_CACHED_WORDS:
                cache.clear()
            cache[word] = encoded
        return encoded


def _as_bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.uint32).tobytes()


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    """One U+FFFD for each invalid byte, as sentencepiece does (Python's own `replace` writes one for several)."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("replace-each", _replace_each)
Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Decodes ids one by one. All texts that it returns, joined, are `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = Utf8Decoder("replace-each")
        self._ids_at_start: list[int] | None = []  # ids without text so far; None once there is some text

    def add(self, id: int) -> str:
        """The text that later ids can no longer change; empty while the bytes of a character are incomplete."""
        byte = self._tokenizer.byte(id)
        if byte is not None:
            self._ids_at_start = None
            return self._utf8.decode(bytes([byte]))
        if self._ids_at_start is None:
            return self.flush() + self._tokenizer.decode_next(id)
        ids = [*self._ids_at_start, id]
        text = self._tokenizer.decode(ids)
        self._ids_at_start = None if text else ids
        return text

    def flush(self) -> str:
        """U+FFFD for each byte of a character that remained incomplete."""
        return self._utf8.decode(b"", final=True)
