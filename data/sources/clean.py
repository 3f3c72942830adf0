"""On the way out of a source, by data.clean: texts -> the same texts without the damage that TinyStories is known for.

1. Mojibake, that is UTF-8 once read as cp1252 or Latin-1: `â€œ` is “, `â€™` is ’, `Ã©` is é. cp1252 has no character
   for the last byte of ”, which was lost on the way, so a bare `â€` is ”.
2. `<|endoftext|>` inside a text: two stories in one, which are split there, as a .txt file is.

Text that is fine must stay: «CAFÉ» and «IRMÃ» hold pairs that would be UTF-8 too. So only sequences that no language
writes are repaired, and those that begin with a capital Ã or Â only where no capital letter of a word can stand.
"""

import re
from collections.abc import Iterable, Iterator

SEPARATOR = "<|endoftext|>"  # a line of its own in a .txt file, between two stories

_BYTES = {chr(byte): byte for byte in range(0x80, 0x100)}  # as Latin-1 reads them, then as cp1252 does
_BYTES |= {char: byte for byte in range(0x80, 0xA0) if (char := bytes([byte]).decode("cp1252", "ignore"))}


def _read_as(*these: int) -> str:
    """A class of a regular expression: the characters that these bytes were read as."""
    return "[" + "".join(char for char, byte in _BYTES.items() if byte in these) + "]"


_CONTINUATION = _read_as(*range(0x80, 0xC0))
_EURO, _E2 = _read_as(0x80), "â"
_PUNCTUATION = _read_as(0x8B, 0x93, 0x94, 0x98, 0x99, 0x9A, 0x9C, 0x9D, 0x9E, 0xA2, 0xA6)  # – — ‘ ’ ‚ “ ” „ • … and
_DAMAGE = re.compile(
    "|".join(
        [
            f"{_E2}{_EURO}{_PUNCTUATION}",  # the zero-width space
            f"{_E2}€",  # ” without its last byte
            f"{_E2}{_read_as(0x84)}¢|{_E2}{_read_as(0x82)}¬",  # ™ and €
            f"ð{_read_as(0x9F)}{_CONTINUATION}{{2}}",  # emoji
            f"(?<=[a-z])(?:Ã{_CONTINUATION})+",  # À to ÿ after a small letter
            rf"(?<!\w)(?:Ã{_CONTINUATION})+(?=[a-z])",  # or at the beginning of a word
            "(?<![A-ZÀ-Þ])Â[¡¢£¥§©®°±²³´·¼½¾¿]",  # signs
            "(?<=[a-z.,;:!?])Â\xa0",  # the no-break space
        ]
    )
)


def repair(text: str) -> tuple[str, int]:
    """The text without mojibake, and how many sequences were repaired."""
    return _DAMAGE.subn(_repaired, text)


def _repaired(match: re.Match[str]) -> str:
    damaged = match.group()
    return "”" if damaged == "â€" else bytes(_BYTES[char] for char in damaged).decode()


class Cleaner:
    """Repairs texts as they pass, and counts what it did."""

    def __init__(self) -> None:
        self.sequences = self.repaired = self.split = 0

    def __call__(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            text, sequences = repair(text)
            self.sequences += sequences
            self.repaired += sequences > 0
            if SEPARATOR not in text:
                yield text
                continue
            self.split += 1
            parts = [part.strip("\r\n") for part in text.split(SEPARATOR)]
            yield from [part for part in parts if part.strip()] or [""]  # blank as a whole: the source counts it

    def add(self, other: "Cleaner") -> None:
        self.sequences += other.sequences
        self.repaired += other.repaired
        self.split += other.split

    def __str__(self) -> str:
        return (
            f"{self.sequences:,} sequences of mojibake repaired in {self.repaired:,} texts, "
            f"{self.split:,} texts split at {SEPARATOR}"
        )
