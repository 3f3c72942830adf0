import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources.clean import Cleaner, repair


@pytest.mark.parametrize(
    "damaged, expected, sequences",
    [
        ("He said, â€œWhy?â€ Granny said, â€œSo thatâ€™s itâ€.", "He said, “Why?” Granny said, “So that’s it”.", 5),
        ("strange â€“ surprisedâ€” he â€˜oâ€¦", "strange – surprised— he ‘o…", 4),
        ("\u00e2\u0080\u009cHi\u00e2\u0080\u009d, it\u00e2\u0080\u0099s", "“Hi”, it’s", 3),  # as Latin-1
        ("â€œHiâ€\u009d", "“Hi”", 2),
        ("cafÃ© Ã‰mile dÃ©jÃ\xa0 vu piÃ±ata crÃ©Ã©e", "café Émile déjà vu piñata créée", 6),
        ("Ã©tÃ©", "été", 2),
        ("Acmeâ„¢ 5 â‚¬ Â£5 20Â°C Hi.Â\xa0Yes", "Acme™ 5 € £5 20°C Hi.\xa0Yes", 5),
        ("ðŸ˜€ðŸ\x8eƒ", "😀🎃", 2),
    ],
)
def test_mojibake_is_repaired(damaged, expected, sequences):
    assert repair(damaged) == (expected, sequences)


@pytest.mark.parametrize(
    "text",
    [
        "«CAFÉ», «IRMÃ», “MAÇÃ”, IRMÃ—minha, MAÇÃ…",
        "20 °C, £5, 5€, «À la carte»",
        "il a mangé…» ðis",
        "ÂNGELO: Â, ROMÂ®",
        "ã é ’",
    ],
)
def test_undamaged_text_does_not_change(text):
    assert repair(text) == (text, 0)


ALPHABETS = [
    "abcdeéèêëàâùûüôöîïçœæÿ",
    "abcdäöüßéñ",
    "aeiouáéíóúüñbcd",
    "aeioãõáâàéêíóôúçbcdm",
    "aăâîșțbcd",
    "aðþæöáéíóúýbcd",
    "aáčďéěíňóřšťúůýžbc",
    "åäöøæabc",
    "aąćęłńóśźżbc",
    "абвгдеё",
    "αβγδέ",
    "漢字かな",
    "🎉😀é",
]


@st.composite
def undamaged_text(draw):
    """Words of one language each, in the usual upper and lower cases, with the usual signs next to them."""
    text = ""
    for _ in range(draw(st.integers(1, 12))):
        word = draw(st.text(draw(st.sampled_from(ALPHABETS)), min_size=2, max_size=8))
        word = draw(st.sampled_from([str.lower, str.upper, str.capitalize]))(word)
        before = draw(st.sampled_from(["", "", "“", "‘", "«", "« ", "„", "»", "(", "¿", "¡", "—", "£", "§", "5 "]))
        after = draw(st.sampled_from("|.|,|!|?|…|”|’|»|\xa0»|“|«|—|–|’s|™|)|…”|!»| 5 €|\xa0!|•".split("|")))
        text += before + word + after + draw(st.sampled_from([" ", "\n\n", " \t", "\xa0"]))
    return text


@settings(max_examples=300, deadline=None)
@given(undamaged_text())
def test_generated_undamaged_text_does_not_change(text):
    assert list(Cleaner()([text])) == [text]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("She said it is Tom’s … “Hello” café piñata naïve – — ‘so’ déjà".split()), min_size=1))
def test_any_damaged_text_is_restored(words):
    text = " ".join(words)
    as_latin_1 = text.encode().decode("latin-1")
    # cp1252 as browsers decode it: a byte without a character stays a control character, or is lost
    as_cp1252 = "".join(byte if ord(byte) < 0x80 else _cp1252(ord(byte)) for byte in as_latin_1)
    for damaged in (as_latin_1, as_cp1252, as_cp1252.replace("\x9d", "")):
        repaired, _ = repair(damaged)
        assert repaired == text and repair(repaired) == (text, 0)


def _cp1252(byte: int) -> str:
    return bytes([byte]).decode("cp1252", "ignore") or chr(byte)


def test_two_stories_in_one_text_are_split_and_counted():
    cleaner = Cleaner()
    assert list(cleaner(["One.\n<|endoftext|>\n Two.", "Three", "<|endoftext|>", "\nItâ€™s â€œ<|endoftext|>"])) == [
        "One.",
        " Two.",
        "Three",
        "",
        "It’s “",
    ]
    assert str(cleaner) == "2 sequences of mojibake repaired in 1 texts, 3 texts split at <|endoftext|>"
