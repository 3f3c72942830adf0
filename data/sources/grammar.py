r"""A context-free grammar with variables: samples, parses, and exact probabilities from one table of rules.

The storybook (storybook.py) is such a table. A `Grammar` is read from the text of a table, and offers:

1. `Grammar.sample`: a number in [0, 1) -> a text, as an arithmetic decoder does.
2. `Grammar.parse`: a text -> the number of its derivations and their summed probability.
3. `Grammar.texts`: all texts of a small grammar.

Both `parse` and `texts` call `Grammar.derive`, which follows all derivations together from left to right (dynamic
programming).

Notation of a table
-------------------
A rule has a name and alternatives, one of which is drawn at random. After `name:`, the alternatives follow on indented
lines, or are separated by bars:

    end:
        They ran home.
        Then {Hero.he} sat by the [landmark]. *2
    landmark: tree *4 | log *4 | pond

An alternative is a text that may contain:

    [landmark]     a draw from the rule `landmark`, independent of all other draws
    {place}        the value of the variable `place`: drawn from the rule `place` at its first mention in a story, and
                   the same value at all later mentions
    {hero.his}     another form of the same value (see below)
    [Then]         the same as [then], but the text starts with a capital letter
    {Hero.he}      the same as {hero.he}, but with a capital letter
    \n             a newline
    *2             at its end: this alternative is twice as likely as one without a number

A variable draws from the rule of its own name, unless a line before the rules names another:

    {hero} {friend} = name

Both variables draw from the rule `name`. Variables that draw from the same rule always have different values.

A rule can have several forms, separated by slashes in the rule's name and in each alternative. Here `{hero}` may be
Mia, and then `{hero.he}` is she and `{hero.his}` is her:

    name/he/his: Mia/she/her | Tom/he/his

No rule may start with itself, because a derivation would never end.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, Union

Part = Union[str, "Draw"]
Parts = tuple[str, *tuple[Part, ...]]  # of an alternative: a literal, which may be empty, then any parts
Key = TypeVar("Key")
Position = TypeVar("Position")  # how far a derivation has come: an offset into a text, or the text so far
Values = tuple[
    int, ...
]  # for each variable the index of the alternative that is its value; -1 before its first mention
Mass = tuple[int, float]  # of a set of derivations: their number, and the sum of their probabilities
States = dict[tuple[Position, Values], Mass]

PLAIN = ""  # the form of a rule that has no name
CAPITAL = "^"  # before a form: the same with a capital letter
SENTENCE = ""  # the rule for any one sentence of the table

BITS = 512  # of the number for a story, which uses about 220 and at most about 320: choices are fair to 2**-190
FRACTION_MASK = (1 << BITS) - 1
SENTENCE_GAP = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]"))[ \n](?!\[?[a-z])""")  # there is none in: "Yes!" said Tom.
END_MARK = re.compile(r"""[.!?]"?\Z""")


class Alternative(NamedTuple):
    """An alternative of a rule as the table has it."""

    weight: int
    texts: dict[str, str]  # by form


class Option(NamedTuple):
    """An alternative of a choice, prepared for parsing."""

    alternative: int  # its index
    weight: int
    first_literal: str
    other_parts: tuple[Part, ...]


class Choice:
    """The alternatives of a rule, in one of its forms."""

    def __init__(self) -> None:
        self.weights: list[int] = []
        self.parts: list[Parts] = []
        self.reversed_parts: list[tuple[Part, ...]] = []  # without empty literals
        self.weighted_indices: list[int] = []  # the index of each alternative, as many times as its weight
        self.options: dict[str, list[Option]] = {}  # by the first letter of a text; "" is any letter

    def add(self, weight: int, parts: Parts) -> None:
        index = len(self.weights)
        self.weights.append(weight)
        self.parts.append(parts)
        self.reversed_parts.append(tuple(part for part in reversed(parts) if part))
        self.weighted_indices += [index] * weight

    def index_options(self) -> None:
        """Fills `options`, after all choices of the grammar have their alternatives."""
        for index, parts in enumerate(self.parts):
            option = Option(index, self.weights[index], parts[0], parts[1:])
            for letter in {"", *_first_letters(parts)}:
                self.options.setdefault(letter, []).append(option)


class Draw(NamedTuple):
    """A part of an alternative that is drawn from a choice, or is the value of a variable."""

    choice: Choice
    variable: int | None  # its number; None if the draw is independent


class Grammar:
    """The rules of a table (notation: top of this file); its first rule derives whole texts.

    Raises ValueError if an alternative does not have all forms of its rule, or if a name in brackets or braces is not a
    rule or form of the table.
    """

    def __init__(self, table: str) -> None:
        rules, self._rule_of_variable = _read_table(table)
        rules[SENTENCE] = _sentences(rules)
        self.choices: dict[tuple[str, str], Choice] = {}  # by rule and form
        for rule, alternatives in rules.items():
            for alternative in alternatives:
                for form in alternative.texts:
                    self.choices.setdefault((rule, form), Choice())
        self._variables: dict[str, str] = {}  # in the order of their numbers, each with its rule
        for rule, alternatives in rules.items():
            for alternative in alternatives:
                for form, text in alternative.texts.items():
                    self.choices[rule, form].add(alternative.weight, self._parse_alternative(text))
        for choice in self.choices.values():
            choice.index_options()

        self.start = Draw(next(iter(self.choices.values())), None)
        self.sentence = Draw(self.choices.get((SENTENCE, PLAIN), Choice()), None)
        self._no_values: Values = (-1,) * len(self._variables)
        self._others_of_rule: list[list[int]] = []  # for each variable, the others that draw from the same rule
        variable_rules = list(self._variables.values())
        for variable, rule in enumerate(variable_rules):
            same_rule = [other for other, other_rule in enumerate(variable_rules) if other_rule == rule]
            self._others_of_rule.append([other for other in same_rule if other != variable])

    def _parse_alternative(self, text: str) -> Parts:
        first_literal, *others = re.split(r"(\[.+?]|{.+?})", text)
        parts = [part if part[0] not in "[{" else self._parse_draw(part) for part in others if part]
        return first_literal, *parts

    def _parse_draw(self, text: str) -> Draw:
        """`[rule]`, `{variable}` or `{variable.form}`, each maybe with a capital letter."""
        is_variable = text[0] == "{"
        name, _, form = text[1:-1].partition(".")
        if name[0].isupper():
            name = name[0].lower() + name[1:]
            form = CAPITAL + form
        rule = self._rule_of_variable.get(name, name) if is_variable else name
        if (rule, form) not in self.choices:
            raise ValueError(f"{text} is not a rule or form of the table")
        if not is_variable:
            return Draw(self.choices[rule, form], None)
        self._variables.setdefault(name, rule)
        return Draw(self.choices[rule, form], list(self._variables).index(name))

    def _excluded(self, variable: int | None, values: Sequence[int]) -> Sequence[int]:
        """The alternatives that `variable` cannot have, because they are values of other variables of its rule."""
        if variable is None:
            return ()
        return [values[other] for other in self._others_of_rule[variable] if values[other] >= 0]

    def sample(self, number: int) -> tuple[str, float]:
        """The text for a uniform random number from 0 to 2**BITS - 1, and the probability of its derivation."""
        values = list(self._no_values)
        text: list[str] = []
        probability = 1.0
        stack: list[Part] = [self.start]  # the parts that follow, last first
        while stack:
            part = stack.pop()
            if isinstance(part, str):
                text.append(part)
                continue
            choice, variable = part
            index = -1 if variable is None else values[variable]
            if index < 0:
                candidates, excluded = choice.weighted_indices, self._excluded(variable, values)
                if excluded:
                    candidates = [i for i in candidates if i not in excluded]
                # [0, 1) is cut into equal intervals, one for each candidate. The interval with the number gives the
                # choice; the position of the number within the interval is the number for the next choice.
                number *= len(candidates)
                index = candidates[number >> BITS]
                number &= FRACTION_MASK
                probability *= choice.weights[index] / len(candidates)
                if variable is not None:
                    values[variable] = index
            stack += choice.reversed_parts[index]
        return "".join(text), probability

    def derive(
        self,
        start: Draw,
        position: Position,
        peek: Callable[[Position], str],
        extend: Callable[[Position, str], Position | None],
    ) -> States[Position]:
        """The states that derivations of `start` reach from `position`, with their number and probability.

        `peek` returns the letter that must follow at a position ("": any letter); `extend` returns the position after a
        literal, or None if the literal cannot follow.
        """

        @functools.cache  # all derivations that reach a state share its continuation
        def expand(draw: Draw, position: Position, values: Values) -> States[Position]:
            choice, variable = draw
            if variable is not None and values[variable] >= 0:
                return follow(choice.parts[values[variable]], {(position, values): (1, 1.0)})
            ends: States[Position] = {}
            new_values, excluded = values, self._excluded(variable, values)
            total_weight = len(choice.weighted_indices) - sum([choice.weights[i] for i in excluded])
            for index, weight, first_literal, other_parts in choice.options.get(peek(position), ()):
                reached = extend(position, first_literal)
                if reached is not None and index not in excluded:
                    if variable is not None:
                        new_values = (*values[:variable], index, *values[variable + 1 :])
                    found = follow(other_parts, {(reached, new_values): (1, weight / total_weight)})
                    ends = _add(ends, found) if ends else found
            return ends

        def follow(parts: Sequence[Part], states: States[Position]) -> States[Position]:
            for part in parts:
                next_states: States[Position] = {}
                for (position, values), mass in states.items():
                    if not isinstance(part, str):
                        _add(next_states, expand(part, position, values), mass)
                    elif (reached := extend(position, part)) is not None:
                        next_states[reached, values] = mass
                states = next_states
            return states

        return expand(start, position, self._no_values)

    def parse(self, text: str, start: Draw | None = None) -> Mass:
        """The derivations of a text from `start` (default: as a whole text): their number and summed probability."""
        ends = self.derive(
            start or self.start,
            0,
            lambda position: text[position : position + 1] or "\0",
            lambda position, literal: position + len(literal) if text.startswith(literal, position) else None,
        )
        complete = [mass for (position, _), mass in ends.items() if position == len(text)]
        return sum(number for number, _ in complete), math.fsum(probability for _, probability in complete)

    def texts(self, start: Draw | None = None) -> dict[str, Mass]:
        """All texts (of a small grammar, or from `start`), each with its derivations as in `parse`."""
        found: dict[str, Mass] = {}
        for (text, _), mass in self.derive(start or self.start, "", lambda _: "", operator.add).items():
            _add(found, {text: mass})
        return found


def _read_table(table: str) -> tuple[dict[str, list[Alternative]], dict[str, str]]:
    """The alternatives of each rule, and the rule of each variable that draws from a rule of another name."""
    rules: dict[str, list[Alternative]] = {}
    rule_of_variable: dict[str, str] = {}
    for line in table.splitlines():
        if not line.strip():
            continue
        if line.startswith("{"):
            variables, _, rule = line.partition(" = ")
            for variable in re.findall(r"{(\w+)}", variables):
                rule_of_variable[variable] = rule.strip()
            continue
        if not line[0].isspace():
            head, _, line = line.partition(":")
            name, *forms = head.split("/")
            rules[name] = []
        for cell in line.split("|"):
            if cell.strip():
                rules[name].append(_read_alternative(cell.strip(), head, forms))
    return rules, rule_of_variable


def _read_alternative(cell: str, head: str, forms: list[str]) -> Alternative:
    text, _, weight = cell.replace("\\n", "\n").partition(" *")
    texts = text.split("/")
    if len(texts) != 1 + len(forms) or not all(texts):
        raise ValueError(f"{cell!r} does not fill the forms of {head!r}")
    return Alternative(int(weight or 1), _with_capitals(dict(zip([PLAIN, *forms], texts, strict=True))))


def _with_capitals(texts: dict[str, str]) -> dict[str, str]:
    """The forms, and each of them again with a capital letter."""
    capitals = {}
    for form, text in texts.items():
        capitals[CAPITAL + form] = re.sub("[A-Za-z]", lambda letter: letter[0].upper(), text, count=1)
    return texts | capitals


def _sentences(rules: dict[str, list[Alternative]]) -> list[Alternative]:
    """All sentences in the alternatives of all rules, as alternatives of equal weight."""
    sentences = []
    for alternatives in rules.values():
        for alternative in alternatives:
            for sentence in SENTENCE_GAP.split(alternative.texts[PLAIN]):
                if END_MARK.search(sentence):
                    sentences.append(Alternative(1, _with_capitals({PLAIN: sentence})))
    return sentences


def _first_letters(parts: Sequence[Part]) -> set[str]:
    """The letters that a text of these parts can start with."""
    first_literal = parts[0]
    if first_literal:
        assert isinstance(first_literal, str)
        return {first_literal[0]}
    draw = parts[1]
    assert isinstance(draw, Draw)
    letters = set()
    for alternative in draw.choice.parts:
        letters |= _first_letters(alternative)
    return letters


def _add(masses: dict[Key, Mass], more: dict[Key, Mass], factor: Mass = (1, 1.0)) -> dict[Key, Mass]:
    """Adds `more`, times `factor`, to `masses` in place."""
    for key, (number, probability) in more.items():
        old_number, old_probability = masses.get(key, (0, 0.0))
        masses[key] = old_number + factor[0] * number, old_probability + factor[1] * probability
    return masses
