r"""A context-free grammar with memory: sampling, parsing and exact probabilities from one table of rules.

1. A table of rules is read into a `Grammar`: context-free, with a memory for the names and things that recur.
2. `Grammar.sample` unfolds one number in [0, 1) into a text, as an arithmetic decoder does.
3. `Grammar.derive` follows all derivations at once, left to right (a dynamic program). Parsing a text, listing all
   texts and judging single sentences are this one walk over the same table.

How to read the table. `name:` opens a rule; its alternatives stand on the indented lines below, or between bars.
    [hot]          a draw from the rule `hot`, anew each time
    {place}        a draw from the rule `place` where a story first mentions it, from then on a copy
    {hero}         the same, drawn from `name`: `{hero} {friend} = name` says so; variables of one rule always differ
    {hero.his}     another form of the same value: `name/he/him/his` names the forms, `Mia/she/her/her` lists them
    [Then] {Hero.he}   the same with a capital
    hot *2         an alternative twice as likely as one without a star
    \n             a new paragraph
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, Union

Part = Union[str, "Draw"]
Parts = tuple[str, *tuple[Part, ...]]  # a literal first, be it empty
Option = tuple[int, int, str, tuple[Part, ...]]  # of an alternative: number, weight, first literal, other parts
Key = TypeVar("Key")
Place = TypeVar("Place")  # how far a derivation has come: an offset into a text, or the text so far
Bound = tuple[int, ...]  # for each variable the alternative it holds, -1 before its first mention
Weight = tuple[int, float]  # of some derivations: their number, their summed probability
States = dict[tuple[Place, Bound], Weight]

BITS = 512  # of the number behind a story: it uses up 220, at most some 320, so all choices are fair to 2**-190
FRACTION = (1 << BITS) - 1
SENTENCE_GAP = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]"))[ \n](?!\[?[a-z])""")  # none in: "Yes!" said Tom.
END_MARK = re.compile(r"""[.!?]"?\Z""")


class Choice:
    """The alternatives of a rule, in one of its forms."""

    def __init__(self) -> None:
        self.weights: list[int] = []
        self.parts: list[Parts] = []
        self.stacked: list[tuple[Part, ...]] = []  # the parts, last first
        self.wheel: list[int] = []  # each alternative as often as it weighs
        self.openings: dict[str, list[Option]] = {}  # those that can begin with a letter; "": all

    def add(self, weight: int, parts: Parts) -> None:
        self.wheel += [len(self.weights)] * weight
        self.weights.append(weight)
        self.parts.append(parts)
        self.stacked.append(tuple(filter(None, reversed(parts))))


class Draw(NamedTuple):
    choice: Choice
    variable: int | None  # that remembers what was drawn


class Grammar:
    """The rules of a table (notation: top of this file); the first rule derives whole texts.

    No rule may begin with itself. Raises ValueError where a row lacks a form, or a name stands for no rule or form.
    """

    def __init__(self, table: str) -> None:
        self.choices: dict[tuple[str, str], Choice] = {}  # by rule and form; "" is the plain one, "^his" has a capital
        variables: dict[str, str] = {}  # each with the rule it draws from
        aliases: dict[str, str] = {}
        rows: dict[str, list[tuple[int, dict[str, str]]]] = {}
        for line in filter(str.strip, table.splitlines()):
            if line.startswith("{"):
                names, _, rule = line.partition(" = ")
                aliases |= dict.fromkeys(re.findall(r"{(\w+)}", names), rule.strip())
                continue
            if not line[0].isspace():
                head, _, line = line.partition(":")
                name, *forms = head.split("/")
                rows[name] = []
            for cell in filter(None, map(str.strip, line.split("|"))):
                written, _, weight = cell.replace("\\n", "\n").partition(" *")
                texts = written.split("/")
                if len(texts) != 1 + len(forms) or not all(texts):
                    raise ValueError(f"{cell!r} does not fill the forms of {head!r}")
                rows[name].append((int(weight or 1), dict(zip(["", *forms], texts, strict=True))))
        sentences = [s for cells in rows.values() for _, row in cells for s in SENTENCE_GAP.split(row[""])]
        rows[""] = [(1, {"": s}) for s in sentences if END_MARK.search(s)]  # a rule for any one sentence

        def read(source: str) -> Parts:
            lead, *tokens = re.split(r"(\[.+?]|{.+?})", source)
            return lead, *(token if token[0] not in "[{" else draw(token) for token in tokens if token)

        def draw(token: str) -> Draw:
            name, _, form = token[1:-1].partition(".")
            form = "^" + form if name[0].isupper() else form
            name = name[0].lower() + name[1:]
            rule = aliases.get(name, name) if token[0] == "{" else name
            if (rule, form) not in self.choices:
                raise ValueError(f"{token} stands for no rule or form of the table")
            if token[0] == "{":
                variables.setdefault(name, rule)
            return Draw(self.choices[rule, form], list(variables).index(name) if token[0] == "{" else None)

        def capital(source: str) -> str:
            return re.sub("[A-Za-z]", lambda letter: letter[0].upper(), source, count=1)

        def letters(parts: Parts) -> set[str]:
            if parts[0]:
                return {parts[0][0]}
            first = parts[1:][0]
            assert isinstance(first, Draw)
            return {letter for then in first.choice.parts for letter in letters(then)}

        for name, cells in rows.items():
            for _, row in cells:
                row |= {"^" + form: capital(source) for form, source in row.items()}
                self.choices |= {(name, form): Choice() for form in row}
        for name, cells in rows.items():
            for times, row in cells:
                for form, source in row.items():
                    self.choices[name, form].add(times, read(source))
        for choice in self.choices.values():
            for i, parts in enumerate(choice.parts):
                for letter in {"", *letters(parts)}:
                    choice.openings.setdefault(letter, []).append((i, choice.weights[i], parts[0], parts[1:]))
        self.start = Draw(next(iter(self.choices.values())), None)
        self.sentence = Draw(self.choices.get(("", ""), Choice()), None)
        kinds = list(variables.values())
        self._unbound: Bound = (-1,) * len(kinds)
        self._rivals = [[v for v, other in enumerate(kinds) if other == k and v != u] for u, k in enumerate(kinds)]

    def _taken(self, variable: int | None, bound: Sequence[int]) -> Sequence[int]:
        """The alternatives that other variables of the same rule hold."""
        return () if variable is None else [bound[i] for i in self._rivals[variable] if bound[i] >= 0]

    def sample(self, number: int) -> tuple[str, float]:
        """The text behind a uniform number from 0 to 2**BITS - 1, and its probability."""
        bound, text, probability = list(self._unbound), list[str](), 1.0
        stack: list[Part] = [self.start]
        while stack:
            part = stack.pop()
            if isinstance(part, str):
                text.append(part)
                continue
            choice, variable = part
            row = -1 if variable is None else bound[variable]
            if row < 0:
                wheel, taken = choice.wheel, self._taken(variable, bound)
                if taken:
                    wheel = [i for i in wheel if i not in taken]
                number *= len(wheel)
                row = wheel[number >> BITS]  # the part of [0, 1) that holds the number ...
                number &= FRACTION  # ... and where in it: the next number in [0, 1)
                probability *= choice.weights[row] / len(wheel)
                if variable is not None:
                    bound[variable] = row
            stack += choice.stacked[row]
        return "".join(text), probability

    def derive(
        self, start: Draw, place: Place, peek: Callable[[Place], str], extend: Callable[[Place, str], Place | None]
    ) -> States[Place]:
        """The states that `start` leads to from `place`.

        `peek` tells the letter that must come at a place ("": any), `extend` moves on by a literal, None: it fails.
        """

        @functools.cache  # what can follow from a place is derived once, whoever asks
        def expand(draw: Draw, place: Place, bound: Bound) -> States[Place]:
            choice, variable = draw
            if variable is not None and bound[variable] >= 0:
                return follow(choice.parts[bound[variable]], {(place, bound): (1, 1.0)})
            ends: States[Place] = {}
            then, taken = bound, self._taken(variable, bound)
            left = len(choice.wheel) - sum([choice.weights[i] for i in taken])
            for i, weight, lead, rest in choice.openings.get(peek(place), ()):
                reached = extend(place, lead)
                if reached is not None and i not in taken:
                    if variable is not None:
                        then = (*bound[:variable], i, *bound[variable + 1 :])
                    found = follow(rest, {(reached, then): (1, weight / left)})
                    ends = _add(ends, found) if ends else found
            return ends

        def follow(parts: Sequence[Part], states: States[Place]) -> States[Place]:
            for part in parts:
                after: States[Place] = {}
                for (place, bound), weight in states.items():
                    if not isinstance(part, str):
                        _add(after, expand(part, place, bound), weight)
                    elif (reached := extend(place, part)) is not None:
                        after[reached, bound] = weight
                states = after
            return states

        return expand(start, place, self._unbound)

    def parse(self, text: str, start: Draw | None = None) -> Weight:
        """The derivations of a text (from `start`, else as a whole text): their number and summed probability."""
        ends = self.derive(
            start or self.start,
            0,
            lambda place: text[place : place + 1] or "\0",
            lambda place, literal: place + len(literal) if text.startswith(literal, place) else None,
        )
        whole = [weight for (place, _), weight in ends.items() if place == len(text)]
        return sum(ways for ways, _ in whole), math.fsum(mass for _, mass in whole)

    def texts(self, start: Draw | None = None) -> dict[str, Weight]:
        """All texts (of a small grammar, or from `start`), with their derivations as in `parse`."""
        found: dict[str, Weight] = {}
        for (text, _), weight in self.derive(start or self.start, "", lambda _: "", operator.add).items():
            _add(found, {text: weight})
        return found


def _add(weights: dict[Key, Weight], more: dict[Key, Weight], factor: Weight = (1, 1.0)) -> dict[Key, Weight]:
    """Add `more`, times `factor`, to `weights` in place."""
    for key, (ways, mass) in more.items():
        old_ways, old_mass = weights.get(key, (0, 0.0))
        weights[key] = old_ways + factor[0] * ways, old_mass + factor[1] * mass
    return weights
