"""Repairs the damage that TinyStories is known for in the texts of a source, if `data.clean` is set.

It runs as the last stage of a source, before a text becomes a document.

1. Mojibake, that is UTF-8 that was decoded as cp1252 or Latin-1: `â€œ` becomes “, `â€™` becomes ’, `Ã©` becomes é. The
   last byte of ” has no character in cp1252 and was lost, so `â€` without another character becomes ”.
2. `<|endoftext|>` inside a text: two stories in one text, which are split there, as in a .txt file.

Text without damage must not change: «CAFÉ» and «IRMÃ» contain pairs of characters that would be valid UTF-8, too. So
only sequences that no language uses are repaired, and those that start with a capital Ã or Â only at places where no
capital letter of a word can be.

The package ftfy is not used: its `fix_encoding` (6.3.1) turns `â€œhiâ€ and` into `“hi†and`, and the undamaged `MAÇÃ”`
into `MAÇÔ`. In 2,000 stories of TinyStories it left damage in 56 of the 79 damaged ones; `repair` left none.
"""

import re
from collections.abc import Iterable, Iterator

SEPARATOR = "<|endoftext|>"  # in a .txt file it is a separate line between two stories


def _bytes_of_characters() -> dict[str, int]:
    """The byte from which Latin-1 or cp1252 decoded a character."""
    byte_of = {chr(byte): byte for byte in range(0x80, 0x100)}  # Latin-1
    for byte in range(0x80, 0xA0):
        character = bytes([byte]).decode("cp1252", "ignore")
        if character:  # cp1252 has none for five bytes
            byte_of[character] = byte
    return byte_of


_BYTE_OF = _bytes_of_characters()


def _characters_of(*encoded: int) -> str:
    """A class of a regular expression: the characters that these bytes were decoded to."""
    return "[" + "".join(character for character, byte in _BYTE_OF.items() if byte in encoded) + "]"


_CONTINUATION = _characters_of(*range(0x80, 0xC0))
# The characters that one byte was decoded to; its number is the name
_80, _82, _84, _9F = _characters_of(0x80), _characters_of(0x82), _characters_of(0x84), _characters_of(0x9F)
# The third byte of – — ‘ ’ ‚ “ ” „ • … and of the zero-width space
_PUNCTUATION = _characters_of(0x8B, 0x93, 0x94, 0x98, 0x99, 0x9A, 0x9C, 0x9D, 0x9E, 0xA2, 0xA6)
_DAMAGE = re.compile(
    "|".join(
        [
            f"â{_80}{_PUNCTUATION}",
            "â€",  # ” without its last byte
            f"â{_84}¢|â{_82}¬",  # ™ and €
            f"ð{_9F}{_CONTINUATION}{{2}}",  # emoji
            f"(?<=[a-z])(?:Ã{_CONTINUATION})+",  # À to ÿ after a small letter
            rf"(?<!\w)(?:Ã{_CONTINUATION})+(?=[a-z])",  # À to ÿ at the beginning of a word
            "(?<![A-ZÀ-Þ])Â[¡¢£¥§©®°±²³´·¼½¾¿]",  # signs
            "(?<=[a-z.,;:!?])Â\xa0",  # the no-break space
        ]
    )
)


def repair(text: str) -> tuple[str, int]:
    """The text without mojibake, and the number of repaired sequences."""
    return _DAMAGE.subn(_repair_match, text)


def _repair_match(match: re.Match[str]) -> str:
    damaged = match.group()
    return "”" if damaged == "â€" else bytes(_BYTE_OF[character] for character in damaged).decode()


class Cleaner:
    """Repairs and splits the texts that are passed through it, and counts what it did."""

    def __init__(self) -> None:
        self.repaired_sequences = self.repaired_texts = self.split_texts = 0

    def __call__(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            text, sequences = repair(text)
            self.repaired_sequences += sequences
            self.repaired_texts += sequences > 0
            if SEPARATOR not in text:
                yield text
                continue
            self.split_texts += 1
            parts = [part.strip("\r\n") for part in text.split(SEPARATOR)]
            stories = [part for part in parts if part.strip()]
            yield from stories or [""]  # the source counts a text without any story as empty

    def add(self, other: "Cleaner") -> None:
        """Adds the counts of another cleaner."""
        self.repaired_sequences += other.repaired_sequences
        self.repaired_texts += other.repaired_texts
        self.split_texts += other.split_texts

    def __str__(self) -> str:
        return (
            f"{self.repaired_sequences:,} sequences of mojibake repaired in {self.repaired_texts:,} texts, "
            f"{self.split_texts:,} texts split at {SEPARATOR}"
        )
