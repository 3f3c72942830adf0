"""The storybook: every story has one derivation and an exact probability, and carries its names and things along."""

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


def held(rule: str, text: str) -> Counter[str]:
    """How often the words of a rule stand in a text, in the order in which they come."""
    return Counter(re.findall(rf"\b(?:{'|'.join(words(rule))})\b", text))


# --- one derivation, exact probability ---


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**grammar.BITS - 1))
def test_a_sampled_story_has_one_derivation_of_the_probability_it_was_drawn_with(drawn: int) -> None:
    text, probability = STORYBOOK.sample(drawn)
    assert derivations(text) == 1
    assert log_prob(text) == pytest.approx(math.log(probability), rel=1e-13)


def test_each_choice_is_settled_by_the_letters_that_follow() -> None:
    """No two alternatives can begin one text, whatever their variables hold: so no text has two derivations."""

    # The other forms (she, a girl) are not judged: they stand where a name is known, or about to follow.
    judged = {id(choice): choice for (rule, form), choice in STORYBOOK.choices.items() if rule and form in ("", "^")}

    @functools.cache
    def clash(one: Parts, other: Parts) -> bool:
        if not one or not other:
            return True  # one is the beginning of the other
        if isinstance(one[0], Draw):
            if isinstance(other[0], Draw) and one[0].choice is other[0].choice and id(one[0].choice) in judged:
                return clash(one[1:], other[1:])  # two alternatives of it do not clash, so it must be the same one
            return any(clash((*parts, *one[1:]), other) for parts in one[0].choice.parts)
        if isinstance(other[0], Draw):
            return clash(other, one)
        short, long = sorted((one, other), key=lambda parts: len(parts[0]))
        rest = long[0][len(short[0]) :]
        return long[0].startswith(short[0]) and clash(short[1:], (rest, *long[1:]) if rest else long[1:])

    for choice in judged.values():
        assert not [pair for pair in itertools.combinations(choice.parts, 2) if clash(*pair)]


def test_the_texts_of_a_small_grammar_have_the_probability_one(small: Grammar) -> None:
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
def test_the_phrases_of_the_storybook_have_the_probability_one(rule: str) -> None:
    start = Draw(STORYBOOK.choices[rule, ""], None)
    texts = STORYBOOK.texts(start)
    assert math.fsum(mass for _, mass in texts.values()) == pytest.approx(1, abs=1e-12)
    assert {ways for ways, _ in texts.values()} == {1}
    for text in list(texts)[::50]:
        assert STORYBOOK.parse(text, start) == (1, pytest.approx(texts[text][1], rel=1e-13))


def test_an_ambiguous_grammar_is_counted_as_such() -> None:
    grammar = Grammar("ab:\n    [x][y]\nx: a | ab | abb\ny: c | bc *2 | bbc\n")
    assert grammar.parse("abbc") == (3, pytest.approx((1 + 2 + 1) / 12))
    assert grammar.texts()["abbc"] == (3, pytest.approx((1 + 2 + 1) / 12))
    assert grammar.parse("ac") == (1, pytest.approx(1 / 12))
    assert math.fsum(mass for _, mass in grammar.texts().values()) == pytest.approx(1, abs=1e-12)


def test_samples_come_as_often_as_their_probability_says(small: Grammar) -> None:
    texts, draws = small.texts(), 20_000
    seen = Counter(small.sample(number(index))[0] for index in range(draws))
    assert seen.keys() <= texts.keys()
    chi_square = sum((seen[text] - draws * mass) ** 2 / (draws * mass) for text, (_, mass) in texts.items())
    freedom = len(texts) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_the_number_zero_takes_every_first_alternative(small: Grammar) -> None:
    assert small.sample(0) == ("Ann had a ball. then, She gave Pam the ball.", pytest.approx(1 / 6 / 4 / 5 / 2 / 3))


# --- the grammar keeps out what is none of its stories ---


def test_a_changed_story_is_no_story(stories: list[str]) -> None:
    for at, text in enumerate(stories[:60]):
        parts = re.split(r"(\W+)", text)
        word = 2 * (at * 7 % (len(parts) // 2))
        names = held("name", text)
        hero, stranger = next(iter(names)), next(name for name in words("name") if name not in names)
        thing = next(iter(held("thing", text)))
        other = next(word for word in words("thing") if word != thing)
        before, _, after = text.rpartition(hero)
        first, mark, rest = text.partition(thing)
        changed = [
            "".join([*parts[:word], "zebra", *parts[word + 1 :]]),
            before + stranger + after,
            first + mark + rest.replace(thing, other),
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
            with pytest.raises(ValueError, match="no story of the storybook"):
                log_prob(wrong)
    assert derivations("") == 0


def test_the_pronoun_follows_the_name(stories: list[str]) -> None:
    with_pronoun = [text for text in stories if re.search(r"\b[Hh]e had\b", text)]
    assert with_pronoun
    for text in with_pronoun:
        assert (
            derivations(re.sub(r"\b([Hh])e had\b", lambda found: {"H": "She", "h": "she"}[found[1]] + " had", text))
            == 0
        )


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


def test_golden_stories() -> None:
    assert story(0, 0) == GOLDEN
    assert story(2**63 + 5, 1_999_999) == GOLDEN_FAR
    assert log_prob(GOLDEN) == pytest.approx(-120.5764631677, abs=1e-9)


def test_seed_and_index_both_matter() -> None:
    assert len({story(seed, index) for seed in range(40) for index in range(40)}) == 1600
    assert story(-1, 0) == story(2**64 - 1, 0)
    assert story(0, -1) == story(0, 2**64 - 1)


def test_two_million_stories_hardly_repeat() -> None:
    assert len({story(1, index) for index in range(20_000)}) == 20_000

    def collision(choice: Choice) -> float:
        """At least the probability that two expansions are equal: what variables hold is taken to be equal anyway."""
        total = sum(choice.weights)
        return sum(
            (weight / total) ** 2
            * math.prod(collision(p.choice) for p in parts if isinstance(p, Draw) and p.variable is None)
            for weight, parts in zip(choice.weights, choice.parts, strict=True)
        )

    assert 2_000_000**2 / 2 * collision(STORYBOOK.start.choice) < 1e-6


# --- what a reader, and a model, find in it ---


def test_hero_thing_and_feeling_are_carried_through(stories: list[str]) -> None:
    for text in stories:
        names, things = held("name", text), held("thing", text)
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
def test_length_and_entropy_in_tokens(vocab_size: int) -> None:
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


# --- sentences of a model's output ---


def test_all_sentences_of_stories_are_derivable(stories: list[str]) -> None:
    for text in stories[:60]:
        found, total = derivable_sentences(text)
        assert found == total == 7


def test_sentences_are_judged_one_by_one() -> None:
    assert derivable_sentences("Colorless green ideas sleep. The cat sat! Is it?\nYes, it is.") == (0, 4)
    assert derivable_sentences("") == derivable_sentences("They ate two figs and") == (0, 0)
    assert derivable_sentences('"Here it is!" cried Tom, who had a cat and the bat. Colorless ideas.') == (1, 2)
    assert derivable_sentences("So Mia ate two figs with Tom and felt glad. So Mia ate") == (1, 1)
    assert derivable_sentences("So Mia ate two figs with Tom and felt glad.  So Mia ate two figs.") == (1, 2)


def test_fillers_agree_within_a_sentence_and_not_across() -> None:
    assert derivable_sentences("So Mia ate two figs with Mia and felt glad.") == (0, 1)
    assert derivable_sentences('"I am Tom," said the boy, who had two figs.') == (1, 1)
    assert derivable_sentences('"I am Tom," said the girl, who had two figs.') == (0, 1)
    assert derivable_sentences("Tom was a kind, tall boy. Then she saw a shy boy with a big red cap.") == (2, 2)
