"""The synthetic world: what can be asked, which answers are right, and which error is popular (docs/method.md#testbed).

Four skills. *arithmetic*: small sums. *steps*: a sum and then a difference, both of which the answer states. *facts*:
attributes of invented towns; the popular error is the town's myth. *resolution*: which of two animals a quality is true
of, which follows from what one does to the other; the popular error swaps the qualities.

A response alone says nothing about whether it is right: over all prompts, wrong answers are distributed as right ones are.
A wrong sum adds another amount than the prompt's, and amounts are exchanged in pairs (1 with 2, 3 with 4); each value is the
right one of as many towns as it is the myth of; and what an animal is after one verb, it is not after another. `tests/unit/test_shortcuts.py` trains
classifiers on responses alone.

All functions depend on their seeds alone: `random.Random` seeded with a string draws the same numbers on every platform.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple, get_args

Skill = Literal["arithmetic", "steps", "facts", "resolution"]
SKILLS: tuple[Skill, ...] = get_args(Skill)

ITEMS = ("pens", "cups", "nuts", "hats", "keys", "bags", "eggs", "toys")
GAINS = ("gets", "finds", "buys")
LOSSES = ("loses", "sells", "gives away")
NUMBERS = range(6, 14)
AMOUNTS = range(1, 5)
ARITHMETIC_PREMISE = "{name} has {number} {item} and {gain} {amount} more."
ARITHMETIC_ANSWER = "{name} has {value} {item}."
STEPS_PREMISE = "{name} has {number} {item}, {gain} {amount} more and then {loss} {less}."
STEPS_ANSWER = "{name} first has {sum} {item} and then {value}."
HOW_MANY = "{premise} How many?"

ATTRIBUTES = {
    "color": ("red", "blue", "green", "white", "black", "pink", "gray", "gold"),
    "crop": ("rice", "corn", "wheat", "beans", "oats", "hops", "figs", "limes"),
    "sport": ("golf", "judo", "chess", "rugby", "polo", "darts", "rowing", "boxing"),
    "metal": ("iron", "tin", "zinc", "lead", "copper", "nickel", "silver", "cobalt"),
}
FACT_OPENINGS = ("", "Tell me: ", "Just curious: ", "One more thing: ")
FACT_FORMS = (
    "What is the {attribute} of {topic}?",
    "Which {attribute} does {topic} have?",
    "In {topic}, what is the {attribute}?",
    "The {attribute} of {topic} is what?",
    "{topic} has which {attribute}?",
    "What {attribute} is there in {topic}?",
)
FACT_QUESTIONS = tuple(f"{opening}{form}" for form in FACT_FORMS for opening in FACT_OPENINGS)
FACT_PREMISE = "{topic} is a town."
FACT_ANSWERS = ("The {attribute} is {value}.", "Its {attribute} is {value}.")

HUNTERS = ("Fox", "Wolf", "Bear", "Owl", "Cat", "Dog", "Snake", "Lion", "Hawk", "Lynx", "Tiger", "Eagle")
QUARRY = ("Crow", "Goat", "Duck", "Mouse", "Frog", "Hen", "Toad", "Mole", "Deer", "Crab", "Sheep", "Hare")
RELATIONS = {  # what the hunter does to the quarry: what the hunter is, what the quarry is
    "misses": ("slow", "fast"),
    "catches": ("fast", "slow"),
    "fears": ("timid", "fierce"),
    "scares": ("fierce", "timid"),
    "trusts": ("silly", "clever"),
    "tricks": ("clever", "silly"),
    "envies": ("poor", "rich"),
    "feeds": ("rich", "poor"),
}
RESOLUTION_PREMISE = "{hunter} {verb} {quarry}."
RESOLUTION_QUESTIONS = ("{hunter} {verb} {quarry}. Why?", "Why is it that {hunter} {verb} {quarry}?")
RESOLUTION_ANSWER = "{noun} is {value}."

NUM_NAMES = 24
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "m", "n", "r", "s", "x", "th", "nd")


class Mark(NamedTuple):
    """Characters `[start, end)` of a response are the words that make a step right or wrong.

    A step is right if it follows from the question and from the steps before it: after a wrong sum, the right difference of
    that sum is a right step.
    """

    start: int
    end: int
    right: bool


class Answer(NamedTuple):
    """One sentence that answers a question, with a mark for each of its steps."""

    text: str
    marks: tuple[Mark, ...]

    @property
    def right(self) -> bool:
        """Whether every step is."""
        return all(mark.right for mark in self.marks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its right and wrong answers."""

    text: str
    premise: str
    """What a statement says before the answer."""
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

    Of a multiple of eight topics, each value is true of as many as it is the myth of. Credulity is spread evenly over each
    skill's items, so that worlds of different seeds are equally hard.
    """
    rng = Random(f"world/{seed}")
    words = _invent(rng, num=NUM_NAMES + num_topics)
    topics = words[NUM_NAMES:]
    values_by_attribute = {name: _balanced(values, rng, num=num_topics) for name, values in ATTRIBUTES.items()}
    facts = [
        Fact(topic, attribute, *values_by_attribute[attribute][index])
        for index, topic in enumerate(topics)
        for attribute in ATTRIBUTES
    ]
    credulity: dict[str, float] = {}
    for items in (
        [_sum_item(number, amount) for number in NUMBERS for amount in AMOUNTS],
        [_steps_item(number) for number in NUMBERS],
        [_fact_item(fact) for fact in facts],
        [_relation_item(verb) for verb in RELATIONS],
    ):
        rng.shuffle(items)
        credulity |= {item: (2 * index + 1) / len(items) - 1 for index, item in enumerate(items)}
    return World(seed=seed, names=tuple(words[:NUM_NAMES]), facts=tuple(facts), credulity=credulity)


def _balanced(values: Sequence[str], rng: Random, *, num: int) -> list[tuple[str, str]]:
    """`num` pairs of a value and its myth. In each run of `len(values)` pairs every value occurs once on either side."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < num:
        order = rng.sample(values, len(values))
        pairs += zip(order, order[1:] + order[:1], strict=True)
    return rng.sample(pairs[:num], num)


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


def _steps_item(number: int) -> str:
    return f"{number} in steps"


def _fact_item(fact: Fact) -> str:
    return f"{fact.topic}/{fact.attribute}"


def _relation_item(verb: str) -> str:
    return verb


def _fill(template: str, *, right: bool, value: str, **others: str) -> Answer:
    """Fill in the template; the mark covers `value`."""
    before, after = (part.format(**others) for part in template.split("{value}"))
    return Answer(f"{before}{value}{after}", (Mark(len(before), len(before) + len(value), right),))


def _exchanged(amount: int) -> int:
    """The amount that is popularly taken for another: 1 and 2 are exchanged, and 3 and 4."""
    return amount + 1 if amount % 2 else amount - 1


def _others(amount: int) -> list[int]:
    return [other for other in AMOUNTS if other not in (amount, _exchanged(amount))]


def arithmetic_question(*, name: str, item: str, gain: str, number: int, amount: int) -> Question:
    """`name` owns `number` of `item` and gains `amount`."""
    premise = ARITHMETIC_PREMISE.format(name=name, number=number, item=item, gain=gain, amount=amount)
    text = HOW_MANY.format(premise=premise)

    def answers(*amounts: int) -> tuple[Answer, ...]:
        return tuple(
            _fill(ARITHMETIC_ANSWER, right=added == amount, value=str(number + added), name=name, item=item)
            for added in amounts
        )

    return Question(
        text=text,
        premise=premise,
        key=text,
        item=_sum_item(number, amount),
        right=answers(amount),
        popular=answers(_exchanged(amount)),
        other=answers(*_others(amount)),
    )


def steps_question(*, name: str, item: str, changes: tuple[str, str], numbers: tuple[int, int, int]) -> Question:
    """`name` owns `numbers[0]` of `item`, gains `numbers[1]` and then loses `numbers[2]`.

    A wrong answer has one wrong step, and what follows is right for it. The popular error is in the first step where the
    number owned is even, in the second where it is odd.
    """
    number, amount, less = numbers
    gain, loss = changes
    premise = STEPS_PREMISE.format(name=name, number=number, item=item, gain=gain, amount=amount, loss=loss, less=less)
    text = HOW_MANY.format(premise=premise)

    def answer(added: int, removed: int) -> Answer:
        first, last = str(number + added), str(number + added - removed)
        before = STEPS_ANSWER.partition("{sum}")[0].format(name=name)
        between = STEPS_ANSWER.partition("{sum}")[2].partition("{value}")[0].format(item=item)
        start = len(before) + len(first) + len(between)
        marks = (
            Mark(len(before), len(before) + len(first), added == amount),
            Mark(start, start + len(last), removed == less),
        )
        return Answer(f"{before}{first}{between}{last}.", marks)

    in_first = tuple(answer(added, less) for added in (_exchanged(amount), *_others(amount)))
    in_second = tuple(answer(amount, removed) for removed in (_exchanged(less), *_others(less)))
    popular, rare = (in_first, in_second) if number % 2 == 0 else (in_second, in_first)
    return Question(
        text=text,
        premise=premise,
        key=text,
        item=_steps_item(number),
        right=(answer(amount, less),),
        popular=popular[:1],
        other=(*popular[1:], *rare[1:]),
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
        premise=FACT_PREMISE.format(topic=fact.topic),
        key=FACT_FORMS[wording // len(FACT_OPENINGS)].format(**names),
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
        other=answers(RELATIONS[verbs[verbs.index(verb) - 2]], right=False),
    )


def draw_question(world: World, rng: Random, *, skill: Skill, held_out: Collection[str] = frozenset()) -> Question:
    """A random question of one skill whose key is not held out."""
    draw = {"arithmetic": _draw_arithmetic, "steps": _draw_steps, "facts": _draw_facts, "resolution": _draw_resolution}
    while (question := draw[skill](world, rng)).key in held_out:
        pass
    return question


def _draw_arithmetic(world: World, rng: Random) -> Question:
    return arithmetic_question(
        name=rng.choice(world.names),
        item=rng.choice(ITEMS),
        gain=rng.choice(GAINS),
        number=rng.choice(NUMBERS),
        amount=rng.choice(AMOUNTS),
    )


def _draw_steps(world: World, rng: Random) -> Question:
    return steps_question(
        name=rng.choice(world.names),
        item=rng.choice(ITEMS),
        changes=(rng.choice(GAINS), rng.choice(LOSSES)),
        numbers=(rng.choice(NUMBERS), rng.choice(AMOUNTS), rng.choice(AMOUNTS)),
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


def join(answers: Sequence[Answer]) -> tuple[str, list[Mark]]:
    """A response of one sentence for each answer, and the marks as character ranges of the response."""
    text, marks = "", []
    for answer in answers:
        text += " " if text else ""
        marks += [Mark(len(text) + start, len(text) + end, right) for start, end, right in answer.marks]
        text += answer.text
    return text, marks
