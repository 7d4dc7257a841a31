"""What a document is scored and classified by.

The report names a "World Knowledge Classification System" of 27 classes (section 2.1.5) without listing them; the list
here is ours. So are the content types. The departments are those the readers know (`readers/departments.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from galenic.corpus.readers.departments import DEPARTMENTS
from galenic.runtime import UserError, nearest


@dataclass(frozen=True)
class GeneralClass:
    """One of the 27 classes of world knowledge."""

    name: str
    definition: str
    sampling: Literal["up", "same", "down"] = "same"
    """What the report does with such classes."""


GENERAL_CLASSES: tuple[GeneralClass, ...] = (
    GeneralClass("mathematics", "numbers, proofs, statistics, worked calculations", "up"),
    GeneralClass("physics and astronomy", "matter, forces, energy, stars and planets", "up"),
    GeneralClass("chemistry and materials", "elements, compounds, reactions, minerals, metals", "up"),
    GeneralClass("earth science", "rocks, oceans, weather, climate", "up"),
    GeneralClass("biology", "living things, cells, evolution, ecology", "up"),
    GeneralClass("medicine", "diseases, drugs, examinations, care of patients, public health", "up"),
    GeneralClass("engineering", "machines, vehicles, buildings, energy supply, manufacturing", "up"),
    GeneralClass("technology", "computers, networks, electronics, how to use them", "up"),
    GeneralClass("programming", "source code and its documentation", "up"),
    GeneralClass("food and agriculture", "crops, animals kept, cooking, drinks"),
    GeneralClass("psychology", "mind, behaviour, emotions, as a science"),
    GeneralClass("economics and finance", "trade, money, companies, work"),
    GeneralClass("law", "statutes, courts, crime, rights"),
    GeneralClass("politics and military", "states, parties, diplomacy, wars as such, weapons, armed forces"),
    GeneralClass("history", "events, periods and peoples of the past"),
    GeneralClass("geography", "places: countries, cities, rivers, regions, travel"),
    GeneralClass("philosophy and religion", "ideas, beliefs, myths, scriptures"),
    GeneralClass("language", "grammar, vocabulary, translation, writing systems"),
    GeneralClass("literature and arts", "books, painting, sculpture, classical music, architecture as art"),
    GeneralClass("society and education", "schools, customs, families, social groups, media as a subject"),
    GeneralClass("biography", "lives of persons"),
    GeneralClass("sports", "games of skill and strength, athletes' contests, teams"),
    GeneralClass("everyday life", "household, clothing, hobbies, advice for daily life"),
    GeneralClass("entertainment", "films, series, popular music, video games, celebrities", "down"),
    GeneralClass("e-commerce", "offers, product pages, advertisements", "down"),
    GeneralClass("news", "reports of the day's events", "down"),
    GeneralClass("social media", "posts, comments, small talk", "down"),
)
"""Ours; 27 as in the report."""

GENERAL: tuple[str, ...] = tuple(c.name for c in GENERAL_CLASSES)
MEDICAL: tuple[str, ...] = ("other", "medical")
CONTENT: dict[str, str] = {
    "encyclopedia entry": "prose that explains one subject",
    "guideline": "recommendations for diagnosis and treatment, differentials, dosing rules",
    "terminology entry": "a term of a vocabulary with codes, synonyms, definition, relatives",
    "dictionary entry": "words or sentences with translation or meaning",
    "research abstract": "aim, methods, results and conclusion of a study",
    "clinical note": "history, findings and plan of one patient",
    "question and answer": "a question, options perhaps, and its answer",
    "dialogue": "turns of a conversation",
    "documentation": "how a program, language or device is used",
    "code": "source code",
    "mathematics": "calculations and proofs",
    "advertisement": "text that sells",
}
"""Content type -> what it is."""

CLASSES: dict[str, tuple[str, ...]] = {
    "general": GENERAL,
    "medical": MEDICAL,
    "content": tuple(CONTENT),
    "department": DEPARTMENTS,
}
"""Classification -> its labels; a document has one of each."""

SCORES: dict[str, str] = {
    "quality": "well-formed text: whole sentences, in order, no noise, no heaps of repetition, no boilerplate",
    "educational": "a learner would learn from it",
    "reasoning": "share of the text that derives, compares, decides or computes",
    "knowledge": "facts for its length",
    "medical_quality": "sound and well-formed medical text; 0 outside medicine",
    "medical_value": "use for medicine: how far its origin is trusted and how much it tells; 0 outside medicine",
}
"""Score in [0, 1] -> what it means."""

HEADS: tuple[str, ...] = (*SCORES, *CLASSES)

_FACTORS = {"up": 1.5, "same": 1.0, "down": 0.5}
PREFERENCES: dict[str, float] = {c.name: _FACTORS[c.sampling] for c in GENERAL_CLASSES}
"""General class -> how much oftener than its share it is drawn. The directions are the report's, the sizes ours."""


def preference(general: str, preferences: Mapping[str, float] = PREFERENCES) -> float:
    """Returns the factor by which sampling favours a general class.

    >>> preference("mathematics"), preference("news")
    (1.5, 0.5)
    """
    try:
        return preferences[general]
    except KeyError:
        raise UserError(
            f"no general class '{general}'{nearest(general, GENERAL)}; they are {', '.join(GENERAL)}"
        ) from None


def label_number(head: str, value: object) -> int:
    """Returns the number of a label of a classification; `medical` may also be true or false.

    Raises:
        UserError: there is no such label.
    """
    if head == "medical" and (isinstance(value, bool) or value in (0, 1)):
        return int(bool(value))
    labels = CLASSES[head]
    if not isinstance(value, str) or value not in labels:
        hint = nearest(value, labels) if isinstance(value, str) else ""
        raise UserError(f"{head}: no label {value!r}{hint}; they are {', '.join(labels)}")
    return labels.index(value)


# ---------------------------------------------------------------------------- Wikipedia's vital articles

VITAL_TOPICS: dict[str, str] = {
    "people": "biography",
    "geography": "geography",
    "history": "history",
    "philosophy and religion": "philosophy and religion",
    "mathematics": "mathematics",
}
"""Topic of the vital articles -> general class, where one topic is one class."""

VITAL_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "biology and health sciences": (
        (
            "medicine",
            "disease disorder syndrome symptom infection medical medicine medication drug surgery therapy treatment "
            "patient hospital health vaccine injury cancer pain diagnosis physician",
        ),
        (
            "biology",
            "species genus family order animal animals plant plants bird birds fish mammal insect cell cells organism "
            "organisms protein biology tree bacteria evolution dinosaur breed ecology biological organ muscle gene",
        ),
    ),
    "physical sciences": (
        (
            "physics and astronomy",
            "star stars planet galaxy galaxies moon orbit constellation astronomy astronomical telescope universe "
            "particle particles quantum physics force energy light electric magnetic wave motion mechanics",
        ),
        (
            "chemistry and materials",
            "chemical chemistry element compound acid metal mineral alloy molecule molecules reaction ion salt oxide "
            "polymer isotope solvent gas",
        ),
        (
            "earth science",
            "rock rocks climate weather ocean volcano geology geological earthquake atmosphere cyclone soil tectonic "
            "erosion glacier precipitation wind",
        ),
    ),
    "technology": (
        ("programming", "programming software compiler algorithm"),
        (
            "technology",
            "computer computers computing internet network digital electronic telephone data television radio camera "
            "semiconductor",
        ),
        ("food and agriculture", "agriculture crop crops farming livestock plough cultivation irrigation"),
        ("politics and military", "weapon weapons military warfare gun missile bomb"),
        (
            "engineering",
            "engine machine vehicle vehicles aircraft ship ships building bridge construction steel manufacturing "
            "engineering power train rail tool mechanical furnace material",
        ),
    ),
    "society and social sciences": (
        (
            "language",
            "language languages dialect grammar alphabet linguistics speech writing word verb script",
        ),
        ("law", "law legal court crime criminal rights justice judge punishment"),
        (
            "economics and finance",
            "economic economics trade money market company bank finance tax business goods",
        ),
        (
            "politics and military",
            "political politics government state party election military army democracy parliament diplomacy "
            "organization treaty",
        ),
        ("psychology", "psychology mental emotion emotions mind behavior cognitive feeling personality"),
        ("society and education", "education school university social society people group culture ethnic"),
    ),
    "everyday life": (
        (
            "sports",
            "sport sports game team athlete athletics championship olympic ball football tournament race",
        ),
        (
            "food and agriculture",
            "food cooking drink dish cuisine fruit vegetable meat beverage bread milk wine beer",
        ),
        ("entertainment", "toy video entertainment board card cards puzzle"),
        (
            "everyday life",
            "clothing garment household furniture family sexual worn human room tool jewelry hair",
        ),
    ),
    "arts": (
        (
            "entertainment",
            "film films television comic video album band rock pop series animated anime franchise",
        ),
        (
            "literature and arts",
            "novel poem painting literature sculpture play artist art music opera symphony architecture theatre dance "
            "poetry musical instrument epic book temple museum",
        ),
    ),
}
"""Topic -> (class, words that speak for it in the first 40 words of the text), for topics that hold several classes.
The class named most often wins, of equals the first; a text with none of the words has no label."""


def vital_class(topic: str, text: str) -> str:
    """Returns the general class of a vital article, or an empty string where the map cannot tell.

    >>> vital_class("arts", "Alien is a 1979 science fiction horror film directed by Ridley Scott.")
    'entertainment'
    """
    if topic in VITAL_TOPICS:
        return VITAL_TOPICS[topic]
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()[:40]
    counts = [
        (sum(word in stems for word in words), name)
        for name, stems in ((name, set(line.split())) for name, line in VITAL_WORDS.get(topic, ()))
    ]
    best = max((count for count, _ in counts), default=0)
    return next(name for count, name in counts if count == best) if best else ""
