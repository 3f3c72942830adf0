"""The storybook: every story has one derivation and an exact probability, and keeps its names and things."""

import functools
import io
import itertools
import math
import re
from collections import Counter

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources import grammar, storybook
from data.sources.grammar import Choice, Draw, Grammar, Parts
from data.sources.storybook import STORYBOOK, derivable_sentences, derivations, log_prob, story

SMALL = r"""
tale:
    {hero} had {thing.a}. [then] {Hero.he} gave {friend} the {thing}.
    A [size] {hero.child}, {hero}, saw {friend}!\n"Is it {hero.his} {thing}?" asked {friend}. *2
    [Then] [two cats] and [two cats] ran. *3
then: then, | soon,
two cats:
    a cat
    [size] cats *2
size: big | small *3
{hero} {friend} = name
name/he/his/child: Ann/she/her/girl | Pam/she/her/girl | Tom/he/his/boy *2
thing/a: ball/a ball | egg/an egg *4
"""

GOLDEN = (
    "A shy, kind girl named Pia had a soft white ram. She felt cold by the lake with no one but an old "
    "pink dog. Then she saw a calm boy with an odd black bell.\n"
    "He was Tom and had five tarts and a fat gold duck. They ate ten fine buns and saw a tiny rat beside "
    "the big tan tree. Now Pia was not cold but warm and gave Tom five green hams. Pia and Tom hopped "
    "with the bell behind the pink log every night, so warm."
)
GOLDEN_FAR = (
    "Mia was a sweet girl who had a big gray fox. She had a party at the park with a wet black cow and a "
    "wet blue hen. But Mia sat beside the warm blue log with a dry pink cow, mad.\n"
    "Then Kim hopped in with an odd black dog and ten fine buns. She gave Mia a soft red car and two soft "
    "green nuts. Then Mia was not mad but warm and gave Kim six hams. They ran home from the park with "
    "the car and two fat tan eggs, so warm."
)


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return [story(7, index) for index in range(300)]


@pytest.fixture(scope="module")
def small() -> Grammar:
    return Grammar(SMALL)


def number(index: int) -> int:
    return storybook._number(3, index)


def words(rule: str) -> list[str]:
    return [parts[0] for parts in STORYBOOK.choices[rule, ""].parts]


def occurrences(rule: str, text: str) -> Counter[str]:
    """How often each word of a rule occurs in a text, in the order of their first occurrence."""
    return Counter(re.findall(rf"\b(?:{'|'.join(words(rule))})\b", text))


# --- one derivation, exact probability ---


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**grammar.BITS - 1))
def test_a_story_has_one_derivation_and_its_own_probability(drawn: int) -> None:
    text, probability = STORYBOOK.sample(drawn)
    assert derivations(text) == 1
    assert log_prob(text) == pytest.approx(math.log(probability), rel=1e-13)


def test_no_two_alternatives_can_start_the_same_text() -> None:
    """For any values of the variables; so no text has two derivations."""

    # The other forms (she, a girl) are not tested: they follow a name, or a name follows them.
    tested = {id(choice): choice for (rule, form), choice in STORYBOOK.choices.items() if rule and form in ("", "^")}

    @functools.cache
    def can_start_equally(one: Parts, other: Parts) -> bool:
        if not one or not other:
            return True  # one is the start of the other
        if isinstance(one[0], Draw):
            if isinstance(other[0], Draw) and one[0].choice is other[0].choice and id(one[0].choice) in tested:
                return can_start_equally(one[1:], other[1:])  # its alternatives differ, so both must have the same one
            return any(can_start_equally((*parts, *one[1:]), other) for parts in one[0].choice.parts)
        if isinstance(other[0], Draw):
            return can_start_equally(other, one)
        short, long = sorted((one, other), key=lambda parts: len(parts[0]))
        if not long[0].startswith(short[0]):
            return False
        remainder = long[0][len(short[0]) :]
        return can_start_equally(short[1:], (remainder, *long[1:]) if remainder else long[1:])

    for choice in tested.values():
        assert not [pair for pair in itertools.combinations(choice.parts, 2) if can_start_equally(*pair)]


def test_probabilities_of_a_small_grammar_sum_to_one(small: Grammar) -> None:
    texts = small.texts()
    assert len(texts) == 2 * 6 * 2 + 2 * 6 * 2 + 2 * 3 * 3
    assert math.fsum(mass for _, mass in texts.values()) == pytest.approx(1, abs=1e-12)
    assert {ways for ways, _ in texts.values()} == {1}
    for text, (_, mass) in texts.items():
        assert small.parse(text) == (1, pytest.approx(mass, rel=1e-13))
    assert 'A small girl, Pam, saw Tom!\n"Is it her egg?" asked Tom.' in texts
    # tale 2/6, small 3/4, Pam 1/4, Tom 2 of the 3 that are left, egg 4/5
    assert texts['A small girl, Pam, saw Tom!\n"Is it her egg?" asked Tom.'][1] == pytest.approx(1 / 30, rel=1e-13)
    assert texts["Ann had an egg. soon, She gave Tom the egg."][1] == pytest.approx(1 / 6 / 4 * 2 / 3 * 4 / 5 / 2)


@pytest.mark.parametrize("rule", ["a cat", "a log", "figs", "one day", "by", "name", "action", "by a log"])
def test_probabilities_of_the_phrases_sum_to_one(rule: str) -> None:
    start = Draw(STORYBOOK.choices[rule, ""], None)
    texts = STORYBOOK.texts(start)
    assert math.fsum(mass for _, mass in texts.values()) == pytest.approx(1, abs=1e-12)
    assert {ways for ways, _ in texts.values()} == {1}
    for text in list(texts)[::50]:
        assert STORYBOOK.parse(text, start) == (1, pytest.approx(texts[text][1], rel=1e-13))


def test_derivations_of_an_ambiguous_text_are_counted() -> None:
    grammar = Grammar("ab:\n    [x][y]\nx: a | ab | abb\ny: c | bc *2 | bbc\n")
    assert grammar.parse("abbc") == (3, pytest.approx((1 + 2 + 1) / 12))
    assert grammar.texts()["abbc"] == (3, pytest.approx((1 + 2 + 1) / 12))
    assert grammar.parse("ac") == (1, pytest.approx(1 / 12))
    assert math.fsum(mass for _, mass in grammar.texts().values()) == pytest.approx(1, abs=1e-12)


def test_samples_are_as_frequent_as_their_probability(small: Grammar) -> None:
    texts, draws = small.texts(), 20_000
    seen = Counter(small.sample(number(index))[0] for index in range(draws))
    assert seen.keys() <= texts.keys()
    chi_square = sum((seen[text] - draws * mass) ** 2 / (draws * mass) for text, (_, mass) in texts.items())
    freedom = len(texts) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_the_number_zero_draws_every_first_alternative(small: Grammar) -> None:
    assert small.sample(0) == ("Ann had a ball. then, She gave Pam the ball.", pytest.approx(1 / 6 / 4 / 5 / 2 / 3))


# --- other texts are not derived ---


def test_a_changed_story_has_no_derivation(stories: list[str]) -> None:
    for at, text in enumerate(stories[:60]):
        parts = re.split(r"(\W+)", text)
        word = 2 * (at * 7 % (len(parts) // 2))
        names = occurrences("name", text)
        hero, stranger = next(iter(names)), next(name for name in words("name") if name not in names)
        thing = next(iter(occurrences("thing", text)))
        other = next(noun for noun in words("thing") if noun != thing)
        before_hero, _, after_hero = text.rpartition(hero)
        until_thing = text.index(thing) + len(thing)
        changed = [
            "".join([*parts[:word], "zebra", *parts[word + 1 :]]),
            before_hero + stranger + after_hero,
            text[:until_thing] + text[until_thing:].replace(thing, other),
            text[:-1],
            text[: text.rindex(" ")],
            text[: text.index("\n")],
            text + "\n",
            text + " " + text,
            " " + text,
            text.replace("\n", " "),
            text.lower(),
        ]
        for wrong in changed:
            assert wrong != text
            assert derivations(wrong) == 0, wrong
            with pytest.raises(ValueError, match="not a story of the storybook"):
                log_prob(wrong)
    assert derivations("") == 0


def test_the_pronoun_follows_the_name(stories: list[str]) -> None:
    with_pronoun = [text for text in stories if re.search(r"\b[Hh]e had\b", text)]
    assert with_pronoun
    for text in with_pronoun:
        changed = re.sub(r"\bHe had\b", "She had", re.sub(r"\bhe had\b", "she had", text))
        assert derivations(changed) == 0


@pytest.mark.parametrize(
    "table, message",
    [
        ("a:\n    [b]\n", r"\[b\]"),
        ("a:\n    {b}\n", r"{b}"),
        ("a:\n    {b.c}\nb/d: x/y\n", r"{b.c}"),
        ("a/b: x\n", "'x' does not fill the forms of 'a/b'"),
        ("a/b: x/y/z\n", "'x/y/z' does not fill"),
        ("a/b: x/ | y/z\n", "'x/' does not fill"),
        ("{c} = d\na:\n    {c}\n", r"{c}"),
    ],
)
def test_a_faulty_table_is_refused(table: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grammar(table)


# --- a story is a function of (seed, index) ---


def test_stories_do_not_change_between_versions() -> None:
    assert story(0, 0) == GOLDEN
    assert story(2**63 + 5, 1_999_999) == GOLDEN_FAR
    assert log_prob(GOLDEN) == pytest.approx(-120.5764631677, abs=1e-9)


def test_stories_depend_on_seed_and_index() -> None:
    assert len({story(seed, index) for seed in range(40) for index in range(40)}) == 1600
    assert story(-1, 0) == story(2**64 - 1, 0)
    assert story(0, -1) == story(0, 2**64 - 1)


def test_two_million_stories_rarely_repeat() -> None:
    assert len({story(1, index) for index in range(20_000)}) == 20_000

    def collision(choice: Choice) -> float:
        """An upper limit of the probability that two expansions are equal: it assumes equal values of all variables."""
        total = sum(choice.weights)
        return sum(
            (weight / total) ** 2
            * math.prod(collision(p.choice) for p in parts if isinstance(p, Draw) and p.variable is None)
            for weight, parts in zip(choice.weights, choice.parts, strict=True)
        )

    assert 2_000_000**2 / 2 * collision(STORYBOOK.start.choice) < 1e-6


# --- the content of stories ---


def test_hero_thing_and_feeling_recur_in_each_story(stories: list[str]) -> None:
    for text in stories:
        names, things = occurrences("name", text), occurrences("thing", text)
        hero, _ = names
        assert names[hero] >= 2
        assert len(things) == 1 and things.total() >= 2
        feeling = text.split()[-1].strip(".")
        assert feeling in words("feeling") and len(re.findall(rf"\b{feeling}\b", text)) >= 2


def test_stories_are_well_formed(stories: list[str]) -> None:
    assert 200 <= len({word.lower() for text in stories for word in re.findall(r"[A-Za-z]+", text)}) <= 350
    for text in stories:
        assert text == text.strip() and text.count("\n") == 1 and text.isascii()
        assert re.search(r'[.!?]"?$', text)
        assert not re.search(r"\b(?:a [aeiou]|an [^aeiou])", text), text
        for sentence in re.split(r'(?:(?<=[.!?])|(?<=[.!?]"))[ \n](?![a-z])', text):
            assert re.match(r'"?[A-Z]', sentence), sentence
            assert sentence.count('"') % 2 == 0
    names = words("name")
    assert not [(a, b) for a in names for b in names if a != b and a.startswith(b)]


@pytest.mark.parametrize("vocab_size", [512, 1024])
def test_stories_have_a_suitable_length_and_entropy(vocab_size: int) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(story(11, index) for index in range(3000)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    drawn = [STORYBOOK.sample(number(index)) for index in range(1000)]
    lengths = [len(tokens) for tokens in tokenizer.encode([text for text, _ in drawn])]
    assert 60 <= min(lengths) and max(lengths) + 2 <= 200  # with bos and eos
    nats_per_token = -sum(math.log(mass) for _, mass in drawn) / sum(length + 1 for length in lengths)  # eos counts
    assert 0.7 < nats_per_token < 1.5


# --- sentences of generated text ---


def test_all_sentences_of_stories_are_derivable(stories: list[str]) -> None:
    for text in stories[:60]:
        found, total = derivable_sentences(text)
        assert found == total == 7


def test_each_sentence_is_tested_by_itself() -> None:
    assert derivable_sentences("Colorless green ideas sleep. The cat sat! Is it?\nYes, it is.") == (0, 4)
    assert derivable_sentences("") == derivable_sentences("They ate two figs and") == (0, 0)
    assert derivable_sentences('"Here it is!" cried Tom, who had a cat and the bat. Colorless ideas.') == (1, 2)
    assert derivable_sentences("So Mia ate two figs with Tom and felt glad. So Mia ate") == (1, 1)
    assert derivable_sentences("So Mia ate two figs with Tom and felt glad.  So Mia ate two figs.") == (1, 2)


def test_names_must_agree_only_within_a_sentence() -> None:
    assert derivable_sentences("So Mia ate two figs with Mia and felt glad.") == (0, 1)
    assert derivable_sentences('"I am Tom," said the boy, who had two figs.') == (1, 1)
    assert derivable_sentences('"I am Tom," said the girl, who had two figs.') == (0, 1)
    assert derivable_sentences("Tom was a kind, tall boy. Then she saw a shy boy with a big red cap.") == (2, 2)
