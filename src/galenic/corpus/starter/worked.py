"""Synthetic reasoning as text, for annealing: calculations of several steps, and choices by elimination.

    operands that belong to training --scenario--> question, steps, answer
    phenotypes that belong to training --template--> question with options, what speaks for and against each, answer

Source: Baichuan-M1 report, section 4.2 (synthetic STEM, mathematics and code data in the last phase). The scenarios are
ours. No step uses operands that questions may ask for; no text tells of an entity that is held out, for questions or,
as far as can be known before the split, for losses.
"""

import random
from collections.abc import Callable, Iterable
from fractions import Fraction

from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document, Entity
from galenic.corpus.starter.facts import Tree
from galenic.corpus.starter.holdout import stable_key, stable_shuffle
from galenic.corpus.starter.reasoning import Problem, quantity
from galenic.corpus.starter.selection import document_id

SOURCE = "reasoning"
CALCULATIONS_EACH = 4
"""Calculations in one document."""
ELIMINATED = "hpo"
"""The source whose entities are chosen among: it defines most of them."""
SPARED = 0.3
"""Least share of the entities left out because their documents may be held out for losses: far more than are."""

Worked = tuple[str, list[str], str]
"""Question, steps, answer."""


def reasoning_documents(
    entities: Iterable[Entity], *, count: int, heldout_share: float, seed: int
) -> list[Document]:
    """Writes documents of source `reasoning`: half of them calculations, half choices, as far as entities suffice.

    Args:
        entities: pruned entities that training may see.
        count: how many at most.
        heldout_share: share of each source's documents that will be set aside for losses.
        seed: of every choice.
    """
    trained = surely_trained([e for e in entities if e.source == ELIMINATED], heldout_share, seed)
    choices = eliminations(trained, count=count // 2, seed=seed)
    return choices + calculations(count - count // 2, seed)


def _document(key: str, text: str, licence: str, category: str, department: str) -> Document:
    return Document(
        id=f"{SOURCE}/{key}",
        text=text,
        source=SOURCE,
        licence=licence,
        language="en",
        category=category,
        department=department,
    )


# ---------------------------------------------------------------------------- choices


def eliminations(entities: Iterable[Entity], *, count: int, seed: int) -> list[Document]:
    """Writes questions with four options and what speaks for and against each."""
    from galenic.corpus.synthesis.templates import offline

    tree = Tree(entities)
    documents: list[Document] = []
    for key in stable_shuffle(tree.entities, str, seed, "eliminations"):
        if len(documents) == count:
            break
        draft = offline(tree, key, "choice", "en", seed)
        if draft is not None:
            entity = tree.entities[key]
            text = f"{draft.question}\n\n{draft.answer}"
            licence = SOURCES[ELIMINATED].licence
            documents.append(_document(f"choice/{key}", text, licence, "question", entity.department))
    return documents


def surely_trained(entities: list[Entity], heldout_share: float, seed: int) -> list[Entity]:
    """Leaves out the entities whose documents come first when some are held out for losses (`heldout_groups`)."""
    ordered = sorted(entities, key=lambda entity: stable_key(seed, "heldout", document_id(entity)))
    return ordered[int(max(SPARED, 1.5 * heldout_share) * len(ordered)) :]


# ---------------------------------------------------------------------------- calculations


def calculations(count: int, seed: int) -> list[Document]:
    """Writes documents of calculations, each scenario in turn."""
    draw = random.Random(stable_key(seed, "calculations"))
    documents = []
    number = 0
    for index in range(count):
        blocks = []
        for _ in range(CALCULATIONS_EACH):
            scenario = SCENARIOS[number % len(SCENARIOS)]
            number += 1
            worked = scenario(draw)
            while worked is None:
                worked = scenario(draw)
            question, steps, answer = worked
            told = "\n".join(f"{place}. {step}" for place, step in enumerate(steps, start=1))
            blocks.append(f"{question}\n{told}\nAnswer: {answer}")
        text = "\n\n".join(blocks)
        documents.append(_document(f"calculation/{index:05d}", text, "Apache-2.0", "mathematics", ""))
    return documents


def asked(kind: str, *operands: int) -> bool:
    """Whether a calculation's operands belong to questions; see `Problem`."""
    return Problem(kind, operands, (), "", Fraction(0)).for_questions


def _product_asked(a: int, b: int) -> bool:
    """Whether any kind of question multiplies these numbers."""
    low, high = sorted((a, b))
    return any(
        asked(kind, *pair)
        for kind in ("multiply", "daily dose", "dose")
        for pair in ((low, high), (high, low))
    )


def _sum_asked(a: int, b: int) -> bool:
    return asked("add", *sorted((a, b)))


def _syrup(draw: random.Random) -> Worked | None:
    per_kg, weight, times = draw.choice((2, 4, 5, 8, 10, 15, 20)), draw.randint(5, 60), draw.choice((2, 3, 4))
    strength = draw.choice((10, 20, 25, 40, 50))
    dose = per_kg * weight
    daily = dose * times
    volume = Fraction(daily, strength)
    if 2 % volume.denominator or volume > 100:
        return None
    if (
        _product_asked(per_kg, weight)
        or _product_asked(dose, times)
        or asked("volume", strength, int(2 * volume))
    ):
        return None
    question = draw.choice(
        (
            f"A child of {weight} kg is to get {per_kg} mg/kg of a medicine {times} times a day. Its syrup has "
            f"{strength} mg/mL. Find the volume for one day.",
            f"Prescribed: {per_kg} mg/kg, {times} times a day, to a child of {weight} kg, as a syrup of {strength} "
            "mg/mL. Work out the mL needed each day.",
        )
    )
    steps = [
        f"One dose is {per_kg} mg/kg * {weight} kg = {dose} mg.",
        f"{times} doses are {dose} mg * {times} = {daily} mg.",
        f"In syrup that is {daily} mg / {strength} mg/mL = {quantity(volume, 'mL')}.",
    ]
    return question, steps, f"{quantity(volume, 'mL')} a day."


def _course(draw: random.Random) -> Worked | None:
    tablet, times, days = 50 * draw.randint(1, 16), draw.choice((2, 3, 4)), draw.randint(3, 14)
    daily = tablet * times
    total = daily * days
    amount = Fraction(total, 1000)
    if _product_asked(tablet, times) or _product_asked(daily, days):
        return None
    if 2 % amount.denominator == 0 and asked("convert", 0, int(2 * amount)):
        return None
    question = draw.choice(
        (
            f"A course of treatment is {days} days, with one tablet of {tablet} mg {times} times a day. Find the whole "
            "amount in g.",
            f"One tablet has {tablet} mg. It is taken {times} times a day for {days} days. Find the sum in g.",
        )
    )
    steps = [
        f"Each day: {tablet} mg * {times} = {daily} mg.",
        f"In {days} days: {daily} mg * {days} = {total} mg.",
        f"1000 mg are 1 g, so it is {quantity(amount, 'g')}.",
    ]
    return question, steps, f"{quantity(amount, 'g')}."


def _balance(draw: random.Random) -> Worked | None:
    drunk, infused, urine, other = (
        draw.randint(*span) for span in ((40, 199), (20, 199), (30, 150), (5, 60))
    )
    gained, lost = drunk + infused, urine + other
    low, high = sorted((gained, lost))
    if _sum_asked(drunk, infused) or _sum_asked(urine, other) or asked("subtract", high, low):
        return None
    question = draw.choice(
        (
            f"In one hour a patient drinks {drunk} mL and is infused {infused} mL; {urine} mL of urine and {other} mL "
            "of other losses are measured. Find the fluid balance.",
            f"In: {drunk} mL by mouth, {infused} mL by vein. Out: {urine} mL of urine, {other} mL otherwise. Find the "
            "balance.",
        )
    )
    steps = [
        f"In: {drunk} mL + {infused} mL = {gained} mL.",
        f"Out: {urine} mL + {other} mL = {lost} mL.",
        f"The larger less the smaller: {high} mL - {low} mL = {high - low} mL.",
    ]
    if gained == lost:
        return question, steps, "the balance is even."
    sign = "more in than out" if gained > lost else "more out than in"
    return question, steps, f"{high - low} mL {sign}."


def _drip(draw: random.Random) -> Worked | None:
    rate, hours = 3 * draw.randint(4, 50), draw.randint(2, 12)
    volume, drops = rate * hours, rate * 20
    if _product_asked(rate, hours) or _product_asked(rate, 20):
        return None
    question = draw.choice(
        (
            f"{volume} mL are to run in over {hours} hours through a set of 20 drops/mL. Find the drops per minute.",
            f"Infuse {volume} mL in {hours} hours; 20 drops make 1 mL. Find the drops a minute.",
        )
    )
    steps = [
        f"Each hour: {volume} mL / {hours} = {rate} mL.",
        f"In drops: {rate} mL * 20 drops/mL = {drops} drops an hour.",
        f"An hour has 60 minutes: {drops} / 60 = {drops // 60} drops a minute.",
    ]
    return question, steps, f"{drops // 60} drops a minute."


def _check(draw: random.Random) -> Worked | None:
    """Another's result is gone over, tens and ones apart; every second one is wrong."""
    factor, number = draw.randint(3, 12), draw.randint(13, 98)
    tens, ones = 10 * (number // 10), number % 10
    if ones == 0 or any(_product_asked(factor, part) for part in (number, tens, ones)):
        return None
    result = factor * number
    claimed = result if draw.random() < 0.5 else result + draw.choice((-10, -factor, factor, 10, 100))
    if _sum_asked(factor * tens, factor * ones):
        return None
    question = draw.choice(
        (
            f"A note says that {factor} doses of {number} mg come to {claimed} mg. Go over it.",
            f"Somebody multiplied {factor} by {number} and got {claimed}. Go over it.",
        )
    )
    steps = [
        f"{number} is {tens} and {ones}.",
        f"{factor} * {tens} = {factor * tens}, and {factor} * {ones} = {factor * ones}.",
        f"Together: {factor * tens} + {factor * ones} = {result}.",
        f"Given was {claimed}, which is {'the same' if claimed == result else 'something else'}.",
    ]
    return question, steps, "it is right." if claimed == result else f"it is wrong; {result} is right."


def _compare(draw: random.Random) -> Worked | None:
    bottles = [(draw.choice((2, 4, 5, 10, 20, 25)), draw.randint(2, 40)) for _ in range(2)]
    amounts = [strength * volume for strength, volume in bottles]
    high, low = max(amounts), min(amounts)
    if high == low or asked("subtract", high, low):
        return None
    if any(asked("volume", s, 2 * v) or _product_asked(s, v) for s, v in bottles):
        return None
    told = " ".join(f"{name} has {v} mL of {s} mg/mL." for name, (s, v) in zip("AB", bottles, strict=True))
    question = draw.choice(
        (f"Two vials: {told} Which has more of the medicine?", f"{told} Compare the two vials.")
    )
    steps = [f"{name}: {s} mg/mL * {v} mL = {s * v} mg." for name, (s, v) in zip("AB", bottles, strict=True)]
    steps.append(f"The difference is {high} mg - {low} mg = {high - low} mg.")
    return question, steps, f"{'AB'[amounts.index(high)]}, by {high - low} mg."


def _weeks(draw: random.Random) -> Worked | None:
    weeks, days = draw.randint(3, 40), draw.randint(2, 6)
    whole = 7 * weeks
    if asked("convert", 7, 2 * weeks) or _product_asked(7, weeks) or _sum_asked(whole, days):
        return None
    question = draw.choice(
        (
            f"A pregnancy is {weeks} weeks and {days} days along. Find the days in all.",
            f"A wound was closed {weeks} weeks and {days} days ago. Find the days since then.",
        )
    )
    steps = [
        f"{weeks} weeks are 7 * {weeks} = {whole} days.",
        f"With the rest: {whole} + {days} = {whole + days}.",
    ]
    return question, steps, f"{whole + days} days."


SCENARIOS: tuple[Callable[[random.Random], Worked | None], ...] = (
    _syrup,
    _course,
    _balance,
    _drip,
    _check,
    _compare,
    _weeks,
)
