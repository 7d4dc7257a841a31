import random

import pytest

from galenic.corpus.readers.departments import DEPARTMENTS
from galenic.corpus.scores import taxonomy
from galenic.corpus.scores.corruptions import CORRUPTIONS
from galenic.runtime import UserError


def test_the_taxonomy_is_what_the_report_counts():
    assert len(taxonomy.GENERAL) == len(set(taxonomy.GENERAL)) == 27
    assert len(DEPARTMENTS) >= 20 and taxonomy.CLASSES["department"] == DEPARTMENTS
    down = {c.name for c in taxonomy.GENERAL_CLASSES if c.sampling == "down"}
    assert down == {"entertainment", "e-commerce", "news", "social media"}
    up = {c.name for c in taxonomy.GENERAL_CLASSES if c.sampling == "up"}
    assert {"mathematics", "technology", "engineering", "biology", "physics and astronomy"} <= up
    assert all(c.definition for c in taxonomy.GENERAL_CLASSES)


def test_preferences_have_the_reports_directions():
    assert taxonomy.preference("engineering") > 1 > taxonomy.preference("news")
    assert taxonomy.preference("history") == 1
    assert taxonomy.preference("history", {"history": 3.0}) == 3
    with pytest.raises(UserError, match=r"no general class 'histroy' \(did you mean 'history'\?\)"):
        taxonomy.preference("histroy")


def test_labels_have_numbers():
    assert taxonomy.label_number("medical", True) == taxonomy.label_number("medical", "medical") == 1
    assert taxonomy.label_number("medical", 0) == 0
    assert taxonomy.label_number("department", "cardiology") == DEPARTMENTS.index("cardiology")
    for value in ("cardiolgy", None, 3, True, [], ""):
        with pytest.raises(UserError, match="department: no label"):
            taxonomy.label_number("department", value)
    with pytest.raises(UserError, match="medical: no label 2"):
        taxonomy.label_number("medical", 2)


@pytest.mark.parametrize(
    ("topic", "text", "expected"),
    [
        ("people", "Ada Lovelace was ...", "biography"),
        ("physical sciences", "Iron is a chemical element, a metal.", "chemistry and materials"),
        ("physical sciences", "Sirius is the brightest star in the night sky.", "physics and astronomy"),
        ("biology and health sciences", "Pneumonia is a disease of the lung.", "medicine"),
        ("biology and health sciences", "The muskox is an animal of the family Bovidae.", "biology"),
        ("everyday life", "Biathlon is a winter sport.", "sports"),
        ("everyday life", "Something else.", ""),
        ("uncategorized", "Iron is a metal.", ""),
    ],
)
def test_vital_topics_are_split_by_words(topic, text, expected):
    assert taxonomy.vital_class(topic, text) == expected


def test_vital_map_names_only_classes_that_there_are():
    named = {
        *taxonomy.VITAL_TOPICS.values(),
        *(name for pairs in taxonomy.VITAL_WORDS.values() for name, _ in pairs),
    }
    assert named <= set(taxonomy.GENERAL)


TEXTS = [
    "Asthma is a chronic disease of the airways. It causes wheezing and cough, mostly at night or in cold air.",
    "哮喘是一种常见的慢性气道疾病。患者常有喘息、咳嗽和胸闷，夜间加重。治疗以吸入药物为主，应避免接触过敏原。",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_change_the_text_the_same_way_each_time(name, text):
    function, left = CORRUPTIONS[name]
    bad = function(text, random.Random(3))
    assert bad and bad != text and bad == function(text, random.Random(3))
    assert 0 <= left < 1
    if name == "shuffled":
        assert sorted(bad.replace(" ", "")) == sorted(text.replace(" ", ""))
    if name == "cut":
        assert bad in text
