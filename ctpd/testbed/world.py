"""The synthetic world: what can be asked, which answers are right, and which error is popular.

Three skills. *arithmetic*: small sums; the popular error counts one too many. *facts*: attributes of invented towns;
the popular error is the town's myth. *resolution*: which of two animals a quality is true of, which follows from what
one does to the other; the popular error swaps the qualities. All functions depend on their seeds alone: `random.Random`
seeded with a string draws the same numbers on every platform.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

SKILLS = ("arithmetic", "facts", "resolution")

ITEMS = ("pens", "cups", "nuts", "hats", "keys", "bags", "eggs", "toys")
VERBS = ("gets", "finds", "buys")
NUMBERS = range(2, 7)
AMOUNTS = range(1, 5)
ARITHMETIC_PREMISE = "{name} has {number} {item} and {verb} {amount} more."
ARITHMETIC_QUESTION = "{premise} How many?"
ARITHMETIC_ANSWER = "{name} has {value} {item}."

ATTRIBUTES = {
    "color": ("red", "blue", "green", "white", "black", "pink", "gray", "gold"),
    "crop": ("rice", "corn", "wheat", "beans", "oats", "hops", "figs", "limes"),
    "sport": ("golf", "judo", "chess", "rugby", "polo", "darts", "rowing", "boxing"),
    "metal": ("iron", "tin", "zinc", "lead", "copper", "nickel", "silver", "cobalt"),
}
FACT_QUESTIONS = (
    "What is the {attribute} of {topic}?",
    "Which {attribute} does {topic} have?",
    "In {topic}, what is the {attribute}?",
    "Name the {attribute} of {topic}.",
    "{topic} has which {attribute}?",
    "Tell me the {attribute} of {topic}.",
)
FACT_ANSWERS = ("The {attribute} of {topic} is {value}.", "In {topic} the {attribute} is {value}.")

HUNTERS = ("Fox", "Wolf", "Bear", "Owl", "Cat", "Dog", "Snake", "Lion", "Hawk", "Lynx", "Tiger", "Eagle")
QUARRY = ("Crow", "Goat", "Duck", "Mouse", "Frog", "Hen", "Toad", "Mole", "Deer", "Crab", "Sheep", "Hare")
RELATIONS = {  # what the hunter does: what the hunter is, what the quarry is
    "misses": ("slow", "fast"),
    "drops": ("weak", "heavy"),
    "overlooks": ("sleepy", "tiny"),
    "fears": ("timid", "fierce"),
    "trusts": ("silly", "clever"),
    "spares": ("gentle", "lovely"),
    "envies": ("poor", "rich"),
    "chases": ("hungry", "plump"),
}
RESOLUTION_PREMISE = "{hunter} {verb} {quarry}."
RESOLUTION_QUESTIONS = ("{hunter} {verb} {quarry}. Why?", "Why is it that {hunter} {verb} {quarry}?")
RESOLUTION_ANSWER = "{noun} is {value}."

NUM_NAMES = 16
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "m", "n", "r", "s", "x", "th", "nd")


class Answer(NamedTuple):
    """One sentence that answers a question; characters `[start, end)` are the words that make it right or wrong."""

    text: str
    start: int
    end: int
    right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its right and wrong answers."""

    text: str
    premise: str
    """What a statement says before the answer ("" for facts, whose answer stands alone)."""
    key: str
    """Identifies the question for holding out: no training prompt or corpus text has a key of an evaluation document."""
    item: str
    """The piece of knowledge that is asked for; the student's corpus has one error rate for each item."""
    right: tuple[Answer, ...]
    popular: tuple[Answer, ...]
    """Wrong in the popular way."""
    other: tuple[Answer, ...]
    """Wrong in other ways."""

    def answer(self, rng: Random, *, right: bool, popular: float) -> Answer:
        """One answer, right or not; a wrong one is the popular error with probability `popular`."""
        if right:
            return rng.choice(self.right)
        return rng.choice(self.popular if rng.random() < popular else self.other)


class Fact(NamedTuple):
    """An attribute of a topic: its value, and the popular wrong value (the myth)."""

    topic: str
    attribute: str
    value: str
    myth: str


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that is drawn for one world."""

    seed: int
    names: tuple[str, ...]
    facts: tuple[Fact, ...]
    """Topic by topic, each with its attributes in order."""
    credulity: Mapping[str, float]
    """Item -> number from -1 to 1: how far its error rate in the student's corpus lies below or above the mean rate."""


def build_world(*, seed: int, num_topics: int) -> World:
    """A world with made-up names and topics and, for each topic, a value and a myth for each attribute.

    Credulity is spread evenly over each skill's items, so that worlds of different seeds are equally hard.
    """
    rng = Random(f"world/{seed}")
    words = _invent(rng, num=NUM_NAMES + num_topics)
    facts = []
    for topic in words[NUM_NAMES:]:
        for attribute, values in ATTRIBUTES.items():
            value, myth = rng.sample(values, 2)
            facts.append(Fact(topic, attribute, value, myth))
    credulity: dict[str, float] = {}
    for items in (
        [_sum_item(number, amount) for number in NUMBERS for amount in AMOUNTS],
        [_fact_item(fact) for fact in facts],
        [_relation_item(verb) for verb in RELATIONS],
    ):
        rng.shuffle(items)
        credulity |= {item: (2 * index + 1) / len(items) - 1 for index, item in enumerate(items)}
    return World(seed=seed, names=tuple(words[:NUM_NAMES]), facts=tuple(facts), credulity=credulity)


def _invent(rng: Random, *, num: int) -> list[str]:
    """`num` different made-up words of two syllables, capitalised."""
    words: list[str] = []
    while len(words) < num:
        sounds = (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS)
        word = "".join(rng.choice(sound) for sound in sounds).capitalize()
        if word not in words:
            words.append(word)
    return words


def _sum_item(number: int, amount: int) -> str:
    return f"{number}+{amount}"


def _fact_item(fact: Fact) -> str:
    return f"{fact.topic}/{fact.attribute}"


def _relation_item(verb: str) -> str:
    return verb


def _fill(template: str, *, right: bool, value: str, **others: str) -> Answer:
    """Fill in the template; the mark covers `value`."""
    before, after = (part.format(**others) for part in template.split("{value}"))
    return Answer(f"{before}{value}{after}", len(before), len(before) + len(value), right)


def arithmetic_question(*, name: str, item: str, verb: str, number: int, amount: int) -> Question:
    """`name` owns `number` of `item` and gains `amount`."""
    premise = ARITHMETIC_PREMISE.format(name=name, number=number, item=item, verb=verb, amount=amount)
    right = number + amount
    text = ARITHMETIC_QUESTION.format(premise=premise)

    def answers(*values: int) -> tuple[Answer, ...]:
        return tuple(_fill(ARITHMETIC_ANSWER, right=v == right, value=str(v), name=name, item=item) for v in values)

    return Question(
        text=text,
        premise=premise,
        key=text,
        item=_sum_item(number, amount),
        right=answers(right),
        popular=answers(right + 1),
        other=answers(right - 1, right + 2),
    )


def facts_question(fact: Fact, *, wording: int) -> Question:
    """The attribute of a topic, asked in one of the wordings."""
    names = {"topic": fact.topic, "attribute": fact.attribute}
    text = FACT_QUESTIONS[wording].format(**names)

    def answers(*values: str) -> tuple[Answer, ...]:
        return tuple(
            _fill(template, right=value == fact.value, value=value, **names)
            for value in values
            for template in FACT_ANSWERS
        )

    return Question(
        text=text,
        premise="",
        key=text,
        item=_fact_item(fact),
        right=answers(fact.value),
        popular=answers(fact.myth),
        other=answers(*(value for value in ATTRIBUTES[fact.attribute] if value not in (fact.value, fact.myth))),
    )


def resolution_question(*, verb: str, hunter: str, quarry: str, wording: int) -> Question:
    """Why `hunter` does `verb` to `quarry`: each of the two has a quality, and naming either quality is a right answer."""
    names = {"hunter": hunter, "verb": verb, "quarry": quarry}
    verbs = list(RELATIONS)

    def answers(values: Sequence[str], *, right: bool) -> tuple[Answer, ...]:
        pairs = zip((hunter, quarry), values, strict=True)
        return tuple(_fill(RESOLUTION_ANSWER, right=right, value=value, noun=noun) for noun, value in pairs)

    return Question(
        text=RESOLUTION_QUESTIONS[wording].format(**names),
        premise=RESOLUTION_PREMISE.format(**names),
        key=f"{hunter} {verb} {quarry}",
        item=_relation_item(verb),
        right=answers(RELATIONS[verb], right=True),
        popular=answers(RELATIONS[verb][::-1], right=False),
        other=answers(RELATIONS[verbs[verbs.index(verb) - 1]], right=False),
    )


def draw_question(world: World, rng: Random, *, skill: str, held_out: Collection[str] = frozenset()) -> Question:
    """A random question of one skill whose key is not held out."""
    draw = {"arithmetic": _draw_arithmetic, "facts": _draw_facts, "resolution": _draw_resolution}[skill]
    while (question := draw(world, rng)).key in held_out:
        pass
    return question


def _draw_arithmetic(world: World, rng: Random) -> Question:
    return arithmetic_question(
        name=rng.choice(world.names),
        item=rng.choice(ITEMS),
        verb=rng.choice(VERBS),
        number=rng.choice(NUMBERS),
        amount=rng.choice(AMOUNTS),
    )


def _draw_facts(world: World, rng: Random) -> Question:
    return facts_question(rng.choice(world.facts), wording=rng.randrange(len(FACT_QUESTIONS)))


def _draw_resolution(world: World, rng: Random) -> Question:
    return resolution_question(
        verb=rng.choice(tuple(RELATIONS)),
        hunter=rng.choice(HUNTERS),
        quarry=rng.choice(QUARRY),
        wording=rng.randrange(len(RESOLUTION_QUESTIONS)),
    )


def join(answers: Sequence[Answer]) -> tuple[str, list[tuple[int, int, bool]]]:
    """A response of one sentence for each answer, and the marks as character ranges of the response."""
    text, marks = "", []
    for answer in answers:
        text += " " if text else ""
        marks.append((len(text) + answer.start, len(text) + answer.end, answer.right))
        text += answer.text
    return text, marks
