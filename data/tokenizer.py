"""Text <-> tokens: trains and loads sentencepiece BPE models that lose nothing.

1. `train` cuts stories into short pieces, samples them evenly, and lets sentencepiece merge. What the pieces leave
   rare becomes bytes, so every text has an encoding and decodes to itself: no normalization, no blanks added or
   dropped, newlines kept (they take part in merges: `."` and a blank line may be one token).
2. `Tokenizer` encodes and decodes with a model of ours or of others. No text yields a control id, whatever it spells.
3. `Words` encodes many texts several times as fast, and checks that they come back, where a model has no piece that
   spans two words: ours.
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

PAD, BOS, EOS, UNK = 0, 1, 2, 3  # in the models we train
SAMPLE_BYTES = 20_000_000  # of text that a training looks at, at most; takes about 5 times that in memory

BLANK_MARK = "\u2581"  # stands for a blank inside sentencepiece, which therefore decodes it to one
UNTRAINABLE = "\0\u2581\u2585"  # a sentence with U+2585 is skipped in training, the others are taken for something else
PIECE = re.compile(f"[^{UNTRAINABLE}]{{1,1000}}(?=[ {UNTRAINABLE}]|\\Z)|[^{UNTRAINABLE}]{{1,1000}}")


def pieces(text: str) -> list[str]:
    """`text` in parts of at most 1,000 characters (4,000 bytes), cut before a blank where there is one.

    Sentencepiece skips longer lines in training. Joined they are the text again, but for the UNTRAINABLE characters.
    """
    return PIECE.findall(text)


def sample(parts: Iterable[str], limit: int = SAMPLE_BYTES) -> list[str]:
    """Every 2^k-th part, for the smallest k that keeps them within `limit` bytes: spread evenly, same every time."""
    kept: list[str] = []
    size, stride = 0, 1
    for number, part in enumerate(parts):
        if number % stride == 0:
            kept.append(part)
            size += len(part.encode())
            while size > limit and len(kept) > 1:
                kept = kept[::2]
                size, stride = sum(len(p.encode()) for p in kept), 2 * stride
    return kept


def train(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Writes a model of exactly `vocab_size` pieces to `path`: same texts and size, same bytes.

    Raises UserError when there is no text, or when it cannot give that many pieces or so few.
    """
    import sentencepiece

    sentences = sample(part for text in texts for part in pieces(text))
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
            required_chars=BLANK_MARK,  # a blank made of bytes would come back as U+2581
            num_threads=1,  # stands in the model, so it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from None
    write_atomic(path, model.getvalue())


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """What sentencepiece says about a vocabulary that cannot be, for the user."""
    setting = f"data.vocab_size={vocab_size}: the corpus"
    if most := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", str(error)):
        return UserError(f"{setting} yields at most {most[1]} pieces; use data.vocab_size={most[1]} or more text")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(f"{setting} needs {least[1]} for its characters alone; use data.vocab_size={least[1]} or more")
    return error


def write_atomic(path: Path, content: bytes) -> None:
    """A file appears under its name only when it is whole and on disk."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Tokenizer:
    """A sentencepiece model: `vocab_size`, the ids `bos`, `eos`, `pad`, `unk`, and `hash`, sha256 of the file."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError when the file is missing, is no sentencepiece model, or has no bos or eos of its own."""
        import sentencepiece

        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: no tokenizer can be read there ({error.strerror})") from None
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.load_from_serialized_proto(model)
        except RuntimeError:
            raise UserError(f"{path}: not a sentencepiece model") from None
        self.hash = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._sp.vocab_size()
        self.bos, self.eos, self.unk = self._sp.bos_id(), self._sp.eos_id(), self._sp.unk_id()
        if min(self.bos, self.eos) < 0 or self.bos == self.eos:
            lacks = "bos" if self.bos < 0 else "eos"
            raise UserError(
                f"{path}: the model has no {lacks} of its own, and stories are stored between bos and eos; "
                "give a model that has both, or data.tokenizer=train"
            )
        self.pad: int = self._sp.pad_id() if self._sp.pad_id() >= 0 else self.eos
        spelled = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte = {id: byte for byte, id in enumerate(spelled) if self._sp.is_byte(id)}
        self._blank_mark = [spelled[byte] for byte in BLANK_MARK.encode()] if len(self._byte) == 256 else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos and eos. Raises UserError on text that is not Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("a text is not Unicode: it holds a lone surrogate, which has no UTF-8") from None
        if BLANK_MARK not in text or not self._blank_mark:
            return self._sp.encode(text)
        first, *others = (self._sp.encode(part) for part in text.split(BLANK_MARK))
        return first + [id for other in others for id in self._blank_mark + other]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control ids give nothing, bytes that are no UTF-8 give U+FFFD each."""
        return self._sp.decode(list(ids))

    def byte(self, id: int) -> int | None:
        """The byte that a byte piece stands for, None for all other ids."""
        return self._byte.get(id)

    @functools.cached_property
    def _unk_text(self) -> str:
        return self.decode([self.unk])

    def piece(self, id: int) -> str:
        """The piece as the model spells it."""
        return self._sp.id_to_piece(id)

    def inner(self, id: int) -> str:
        """Text of an id that is no byte, after other text: some models drop a blank at the very start."""
        return self.decode([self.unk, id])[len(self._unk_text) :]


class Words:
    """Encodes word by word and remembers: no piece has a blank but at its start, so no merge reaches across words.

    A word is decoded again when it is learnt. As long as each came back, so does any text made of them.
    Models of others that do it otherwise, or treat blanks in a way of their own, are asked text by text.
    """

    MOST, LONGEST = 1 << 17, 64  # words remembered at a time, some 30 MB; characters of one

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._first: dict[str, bytes] = {}  # a word at the start of a text -> its ids as uint32
        self._later: dict[str, bytes] = {}  # one that follows a blank
        self._lossy = False  # some word did not come back
        shown = (tokenizer.piece(id) for id in range(tokenizer.vocab_size))
        probes = ["", " ", "a b", "  a   b ", "e\u0301 \u2167 \ufb01", "\n x\t\n", "A B\u3000C\xa0D", "The  end. "]
        self.fits = all(BLANK_MARK not in piece[1:] for piece in shown) and all(
            self._joined(probe) == _packed(tokenizer.encode(probe)) for probe in probes
        )

    def encode(self, text: str) -> tuple[bytes, bool]:
        """The ids as `Tokenizer.encode` gives them, in uint32, and whether they decode to the text.

        Raises UserError as it does.
        """
        if BLANK_MARK in text or not self.fits:
            ids = self.tokenizer.encode(text)
            return _packed(ids), self.tokenizer.decode(ids) == text
        joined = self._joined(text)
        return joined, not self._lossy or self.tokenizer.decode(np.frombuffer(joined, np.uint32).tolist()) == text

    def _joined(self, text: str) -> bytes:
        first, *words = text.split(" ")
        try:
            return b"".join([self._first[first], *map(self._later.__getitem__, words)])
        except KeyError:
            start = self._first.get(first) or self._learn(self._first, first, first)
            rest = [self._later.get(word) or self._learn(self._later, word, " " + word) for word in words]
            return b"".join([start, *rest])

    def _learn(self, known: dict[str, bytes], word: str, text: str) -> bytes:
        ids = self.tokenizer.encode(text)
        self._lossy = self._lossy or self.tokenizer.decode(ids) != text
        packed = _packed(ids)
        if len(word) <= self.LONGEST:
            if len(known) >= self.MOST:
                known.clear()
            known[word] = packed
        return packed


def _packed(ids: list[int]) -> bytes:
    return np.array(ids, np.uint32).tobytes()


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    """As sentencepiece does: one U+FFFD for each wrong byte (Python's own `replace` writes one for several)."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("replace-each", _replace_each)
Utf8 = codecs.getincrementaldecoder("utf-8")


class StreamDecoder:
    """Ids in, one by one; out comes the text that later ids cannot change. All of it joined is `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = Utf8("replace-each")
        self._start: list[int] | None = []  # ids that gave no text yet; None as soon as there is some

    def add(self, id: int) -> str:
        """The text that has become certain, often none while the bytes of a character come in."""
        byte = self._tokenizer.byte(id)
        if byte is not None:
            self._start = None
            return self._utf8.decode(bytes([byte]))
        if self._start is None:
            return self.flush() + self._tokenizer.inner(id)
        text = self._tokenizer.decode([*self._start, id])
        self._start = None if text else [*self._start, id]
        return text

    def flush(self) -> str:
        """What was held back, U+FFFD for each byte of it, since the rest of that character never came."""
        return self._utf8.decode(b"", final=True)
