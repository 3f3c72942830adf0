"""A source of generated stories from a built-in grammar, with the exact probability of every story.

`story(seed, index)` is story `index` of an endless, reproducible sequence. Each story has exactly one derivation in the
grammar below, so `log_prob` is exact, and the mean of -log_prob is the cross-entropy that no model can go below: the
floor of every learning curve. grammar.py explains the notation of the table. `StorybookSource` is the source that
`data.source=storybook` selects.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np

from data.config import DataConfig
from data.sources.base import TRAIN, VALIDATION, Document, split_of
from data.sources.clean import Cleaner
from data.sources.grammar import BITS, END_MARK, SENTENCE_GAP, Grammar
from data.splitmix import INCREMENT, MASK, mix64

STORYBOOK_SEED = 0

STORYBOOK = Grammar(r"""
story:
    [who] [lost start] [lost gone]\n[lost look] [lost found] [joy] [end]
    [who] [meet start] [meet see]\n[meet hello] [meet play] [joy] [end]
    [who] [share start] [share want]\n[share no] [share give] [joy] [end]
    [who] [rain start] [rain falls]\n[rain hide] [rain over] [joy] [end]
    [who] [party start] [party alone]\n[party guest] [party gift] [joy] [end]
    [who] [care start] [care sees]\n[care food] [care play] [joy] [end]

who:
    {hero} was a {kind}, {nature} {hero.child}.
    {hero} was a {kind} {hero.child} who had [a cat].
    {hero}, a {kind} {hero.child}, had [a cat] and [a cat].
    {hero} loved to {fun} and {play} [by a log].
    {hero} loved [a cat], [a cat] and [figs].
    {hero} lived with {hero.his} {kind} {elder} [by a log].
    A {kind}, {nature} {hero.child} named {hero} had [a cat].
    Once a {kind} {hero.child} named {hero} lived [by a log].

lost start:
    [One day] {hero.he} [ran] to the {place} with {look.a} {hue} {thing}.
    [One day] {hero.he} took {look.a} {hue} {thing} to the {place}.
    {Hero.his} {elder} gave {hero.him} {look.a} {hue} {thing} {place.at}.
    {Hero.he} had {look.a} {hue} {thing} and {fun.past} {place.at}.
    {Hero.he} {fun.past} {place.at} with {look.a} {hue} {thing}.
lost gone:
    But it fell [by a log], and {hero.he} [felt] {trouble}.
    But {hero.he} lost it [by a log] and [felt] {trouble}.
    [Then] it was gone, so {hero} sat [by a log], {trouble}.
    [Then] [a cat] hid it [by a log], and {hero} [felt] {trouble}.
    [A cat] ran to [a log] with it, and {hero} [felt] {trouble}.
lost look:
    {Hero.he} looked [by a log] and [by a log].
    {Hero.he} [ran] to [a log] and then to [a log].
    {Hero.he} asked [a cat] and looked [by a log].
    "Where is it?" asked {hero} [by a log] and [by a log].
    {Hero.his} {elder} looked [by a log] and [by a log].
lost found:
    [Then] {friend}, a {manner} {friend.child}, saw it [by a log].
    [Then] {friend} came by with [a cat] and saw it [by a log].
    At last {friend} and [a cat] found the {thing} [by a log].
    "Here it is!" [said] {friend}, who had [a cat] and the {thing}.
    "I see it!" [said] {friend} [by a log] with [a cat].
    {friend} gave [figs] to [a cat] and got the {thing}!

meet start:
    [One day] {hero.he} sat [by a log] {place.at} and [felt] {trouble}.
    {Hero.he} sat {place.at} with [a cat] and [a cat], {trouble}.
    {Hero.he} [felt] {trouble} {place.at} with no one but [a cat].
    {Hero.he} sat [by a log] {place.at} with [a cat] and [felt] {trouble}.
meet see:
    [Then] {hero.he} saw a {manner} {friend.child} with {look.a} {hue} {thing}.
    [Then] a {manner} {friend.child} came with [a cat] and {look.a} {hue} {thing}.
    A {manner} {friend.child} [ran] [by a log] with {look.a} {hue} {thing}.
    [By a log] sat a {manner} {friend.child} with {look.a} {hue} {thing}.
meet hello:
    "I am {friend}," [said] the {friend.child}, who had [figs].
    "I am {friend}," [said] the {friend.child} and gave {hero.him} [figs].
    {Friend.he} was {friend} and had [figs] and [a cat].
    {Friend.he} was {friend}, who loved [a cat] and [a cat].
meet play:
    They {fun.past} and {play.past} with the {thing} [by a log].
    They took the {thing} to [a log] and saw [a cat].
    They gave [figs] to [a cat] [by a log].
    They ate [figs] and saw [a cat] [by a log].
    They put the {thing} [by a log] and ate [figs].
    {hero} and {friend} {fun.past} [by a log] and [by a log].
    {Hero.his} {elder} came with [figs] and [figs].
    [A cat] and [a cat] came to play too.

share start:
    [One day] {hero.he} met {friend} {place.at} and had {look.a} {hue} {thing}.
    {Hero.he} had {look.a} {hue} {thing} and [ran] to the {place} with {friend}.
    {Hero.he} and {friend} {fun.past} {place.at} with {look.a} {hue} {thing}.
    {Hero.his} {elder} gave {hero.him} and {friend} {look.a} {hue} {thing} {place.at}.
share want:
    "May I hold it?" [said] {friend}, who had [figs] and [a cat].
    "I want it too," [said] {friend} [by a log].
    {friend} wanted it and gave {hero} [figs] and [figs].
    {friend} came [by a log] with [a cat] to ask for it.
share no:
    "It is mine!" [said] {hero} [by a log], and {friend} [felt] {trouble}.
    But {hero} hid it [by a log], and {friend} [felt] {trouble}.
    {hero} said no to {friend}, who sat [by a log], {trouble}.
    So {friend} sat [by a log] with [a cat], {trouble}.
share give:
    "Please share," [said] {hero.his} {elder}, so they {fun.past} with it [by a log].
    [Then] {hero} saw [a cat] share [figs] with [a cat].
    [Then] {hero} [ran] to {friend} with it, [figs] and [a cat].
    So {hero} gave {friend} the {thing}, [figs] and [figs].
    So they {fun.past} with the {thing} [by a log].
    {hero} put the {thing} [by a log] for {friend} and [a cat].

rain start:
    [One day] {hero.he} and {friend} took {look.a} {hue} {thing} to the {place}.
    [One day] {hero.he} and {friend} [ran] to the {place} with {look.a} {hue} {thing}.
    {Hero.he} and {friend} had {look.a} {hue} {thing} and {fun.past} {place.at}.
    {Hero.he} and {friend} sat [by a log] {place.at} with {look.a} {hue} {thing}.
rain falls:
    [Then] [hot] rain fell on [a log], and {friend} [felt] {trouble}.
    [Then] [a cat] hid, for rain fell on [a log], and {friend} [felt] {trouble}.
    But rain fell on [a cat] and [a log], and {hero} [felt] {trouble}.
rain hide:
    They [ran] to [a log] and hid with [a cat].
    They hid [by a log] with [a cat] and [a cat].
    They ate [figs] and [figs] [by a log].
    They saw [a cat] and gave it [figs].
    {friend} hid [by a log] and {hero} [by a log].
    {hero} told of [a cat] who had [figs].
rain over:
    [Then] the sun came out, and [a cat] [sang] [by a log].
    [Then] they [ran] to [a log] with the {hue} {thing}.
    [Then] it was [hot], and they {fun.past} [by a log].
    "The sun!" [said] {friend}, and they {fun.past} [by a log].

party start:
    [One day] {hero.he} had a party [by a log] {place.at}.
    {Hero.he} had a party {place.at} with [a cat] and [a cat].
    {Hero.he} had [figs] and [figs] for a party {place.at}.
    {Hero.his} {elder} made {hero.him} a party {place.at} with [figs].
party alone:
    But no one came but [a cat], and {hero} [felt] {trouble}.
    But {hero} sat [by a log] with [a cat], {trouble}.
    But {hero.he} ate [figs] and [figs] all alone and [felt] {trouble}.
    {hero} looked [by a log] and [by a log] and [felt] {trouble}.
party guest:
    [Then] {friend} [ran] in with [a cat] and [figs].
    [Then] {friend}, a {manner} {friend.child}, came with [figs].
    At last {friend} came [by a log] with [a cat].
    "I am here!" [said] {friend}, who had [figs] and [a cat].
party gift:
    "It is {look.a} {hue} {thing}!" [said] {hero} to [a cat].
    {Friend.he} gave {hero} {look.a} {hue} {thing} and [figs].
    {Friend.he} had {look.a} {hue} {thing} for {hero} [by a log].
    So {hero} got {look.a} {hue} {thing} and [a cat].

care start:
    [One day] {hero.he} saw [big.a] [hue] {animal} [by a log] {place.at}.
    [One day] {hero.he} [ran] to the {place} and found [big.a] [hue] {animal}.
    {Hero.he} found [big.a] [hue] {animal} [by a log] {place.at}.
    {Hero.he} and {hero.his} {elder} saw [big.a] [hue] {animal} {place.at}.
care sees:
    It [felt] {trouble} and sat [by a log].
    It [felt] {trouble} and hid [by a log].
    The {animal} hid [by a log] and [by a log], {trouble}.
    The {animal} [felt] {trouble} and did not {fun} [by a log].
care food:
    {hero} gave it [figs] and [figs].
    {hero} [ran] home and got it [figs] and [figs].
    {hero} sat [by a log] with the {animal} and [figs].
    {Hero.his} {elder} had [figs] for it [by a log].
care play:
    [Then] {friend} [ran] by and gave it {look.a} {hue} {thing}.
    [Then] {friend} came with [a cat] and {look.a} {hue} {thing}.
    {friend}, a {manner} {friend.child}, had {look.a} {hue} {thing} for it.
    {hero} and {friend} gave it {look.a} {hue} {thing} and [figs].

joy:
    [Then] {hero} was not {trouble} but {feeling} and gave {friend} [figs].
    "I am [so] {feeling}," [said] {hero} to {friend} and [a cat].
    "Thank you," [said] {hero} to {friend} [by a log], [so] {feeling}.
    {hero} gave {friend} [figs] and [felt] {feeling}.
    {hero} {fun.past} and {friend} {play.past} [by a log], [so] {feeling}.
    So {hero} ate [figs] with {friend} and [felt] {feeling}.
end:
    That [day] {hero} [ran] home with the {thing} and [a cat], [so] {feeling}.
    {hero} [ran] home [by a log] with the {hue} {thing} and [a cat], [so] {feeling}.
    {hero} and {friend} {fun.past} with the {thing} [by a log] every [day], [so] {feeling}.
    They [ran] home from the {place} with the {thing} and [figs], [so] {feeling}.

a cat:
    a [animal]
    [big.a] [animal]
    a [hue] [animal]
    [big.a] [hue] [animal] *6
a log:
    the [landmark]
    the [big] [landmark]
    the [hue] [landmark]
    the [big] [hue] [landmark] *6
figs:
    [two] [food]
    [two] [big] [food]
    [two] [hue] [food]
    [two] [big] [hue] [food] *4
by a log: [by] [a log]
one day: one [hot] [day], | on a [hot] [day],

{hero} {friend} = name
name/he/him/his/child:
    Mia/she/her/her/girl | Pia/she/her/her/girl | Kim/she/her/her/girl | Pam/she/her/her/girl
    Jan/she/her/her/girl | Ann/she/her/her/girl | Tim/he/him/his/boy | Jim/he/him/his/boy
    Tom/he/him/his/boy | Sam/he/him/his/boy | Ben/he/him/his/boy | Dan/he/him/his/boy

{kind} {nature} {manner} = trait
trait: kind | shy | bold | calm | wise | nice | neat | tall | sweet | fun
elder: mom *4 | dad *4 | aunt | gran

{fun} {play} = action
action/past:
    run/ran *2 | hop/hopped *2 | play/played *2 | dance/danced *2 | sing/sang | dig/dug | spin/spun
    jump/jumped | hum/hummed | skip/skipped | read/read | draw/drew

{look} = big
big/a:
    big/a big | small/a small | tiny/a tiny | old/an old | new/a new | fat/a fat | thin/a thin | wet/a wet | dry/a dry
    soft/a soft | hard/a hard | flat/a flat | long/a long | fine/a fine | warm/a warm | odd/an odd
hue: red | blue | green | pink | tan | gray | gold | brown | white | black | dark | pale
thing:
    bat *3 | cap *3 | cup *3 | fan *3 | hat *3 | pot *3 | ball *3 | bell *3
    boat | book | car | doll | drum | flag | kite | map | net | top | van
place/at:
    park/at the park *3 | farm/on the farm *3 | hill/on the hill *3 | lake/by the lake *3
    barn/in the barn | yard/in the yard | zoo/at the zoo | camp/at the camp
    dock/at the dock | mill/at the mill | shop/at the shop | fair/at the fair
landmark:
    tree *4 | log *4 | rock *4 | hut *4 | wall *4 | bin *4 | gate *3 | well *3 | tent *3
    pond | post | dam | path | nest | cot | bush
by: by *2 | near | behind | beside

animal:
    cat *4 | dog *4 | pig *4 | hen *4 | rat *4 | cow *4 | hog *4 | ram *3 | bee *3
    fox | cub | pup | duck | frog | goat | bear | crab
two: two *3 | six *2 | ten *2 | three | four | five
food:
    figs *4 | nuts *4 | hams *4 | buns *3 | pies *3 | cakes *3
    eggs | plums | pears | beans | rolls | tarts | peas | dates

feeling: glad *3 | fine *3 | calm *3 | warm *3 | happy | proud | merry | safe
trouble: sad *3 | mad *3 | cold *3 | cross | hurt | upset | tired | scared | sorry

hot: hot *2 | wet *2 | cold *2 | dry *2 | warm *2 | fine *2 | sunny | windy | foggy
day: day *3 | night *2 | noon | evening

then: then *2 | soon | now
so: so *2 | very | ever so
felt: felt | was

ran: ran *2 | walked | skipped | hopped | raced | danced | went | rode
said: said *4 | cried | called | yelled | sang
sang: sang | ran | danced | jumped | hopped | hummed | spun | dug
""")


def story(seed: int, index: int) -> str:
    """Story `index` of the sequence `seed` (both modulo 2**64), the same on every machine and Python version."""
    return STORYBOOK.sample(_number(seed, index))[0]


def log_prob(text: str) -> float:
    """The natural logarithm of the probability that a story is exactly `text`.

    Raises ValueError if the grammar has no such story.
    """
    count, probability = STORYBOOK.parse(text)
    if not count:
        raise ValueError(f"not a story of the storybook: {text[:60]!r}")
    return math.log(probability)


def derivations(text: str) -> int:
    """In how many ways the grammar derives `text`: 1 for each of its stories, 0 for any other text."""
    return STORYBOOK.parse(text)[0]


def derivable_sentences(text: str) -> tuple[int, int]:
    """How many of the sentences of any text could be in some story, and how many there are in total.

    Names and things must agree within a sentence, not across sentences. Text after the last end mark is not counted,
    because that sentence is not complete.
    """
    sentences = [sentence for sentence in SENTENCE_GAP.split(text) if END_MARK.search(sentence)]
    derivable = [sentence for sentence in sentences if STORYBOOK.parse(sentence, STORYBOOK.sentence)[0] > 0]
    return len(derivable), len(sentences)


def _number(seed: int, index: int) -> int:
    """A random number below 2**BITS for (seed, index), from BITS / 64 outputs of splitmix64."""

    def mix(words: np.ndarray) -> np.ndarray:
        return mix64(words * np.uint64(INCREMENT))

    state = mix(mix(np.array([seed & MASK], np.uint64)) + np.uint64(index & MASK))
    words = mix(state + np.arange(BITS // 64, dtype=np.uint64))
    return int.from_bytes(words.astype("<u8").tobytes(), "little")


class StorybookSource:
    """Stories 0 to data.stories - 1 of the built-in grammar; those of the validation split have their log-probability.

    `total` and `position` count stories.
    """

    unit = " stories"

    def __init__(self, config: DataConfig) -> None:
        assert config.held_out is not None  # DataConfig ensures it
        self.total, self.held_out = config.stories, config.held_out
        self.position = self.empty = 0
        self.cleaner = Cleaner()  # unused: there is nothing to repair

    def fingerprint(self) -> dict[str, str]:
        """The number of stories, and a hash of the first hundred, which changes with the grammar."""
        first_stories = "\0".join(story(STORYBOOK_SEED, index) for index in range(100))
        digest = hashlib.sha256(first_stories.encode()).hexdigest()
        return {"storybook": f"{self.total} stories, seed {STORYBOOK_SEED}, sha256 {digest}"}

    def training_texts(self) -> Iterator[str]:
        """The training stories among the first 10,000, which represent all, since all come from one distribution."""
        texts = (story(STORYBOOK_SEED, index) for index in range(min(self.total, 10_000)))
        return (text for text in texts if split_of(text, self.held_out) == TRAIN)

    def __iter__(self) -> Iterator[Document]:
        """All stories."""
        for index in range(self.total):
            text = story(STORYBOOK_SEED, index)
            split = split_of(text, self.held_out)
            self.position = index + 1
            yield Document(split, text, log_prob(text) if split == VALIDATION else None)
