import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.cleaning import clean as rules
from galenic.corpus.records import Document

SENTENCE = "The patient is given fluids and the pressure rises to a safe level. "


def document(text, source="wikipedia-health", department="cardiology"):
    return Document(
        id=f"{source}/x",
        text=text,
        source=source,
        licence="",
        language="en",
        category="",
        department=department,
    )


def test_repair():
    assert rules.repair("\ufeffa\r\nb\rc \t\n\n\n\n\nd\x00\u200b\n") == "a\nb\nc\n\n\nd"
    assert rules.repair("    indented\n\tcode") == "    indented\n\tcode"
    assert rules.repair("é e\u0301 ﬁ") == "é e\u0301 ﬁ"  # nothing is normalised


@given(st.text())
@settings(deadline=None, max_examples=30)
def test_repair_settles(text):
    once = rules.repair(text)
    assert rules.repair(once) == once


@pytest.mark.parametrize(
    ("text", "source", "reason"),
    [
        ("short", "hpo", "too short"),
        ("x" * 20_001, "hpo", "too long"),
        (SENTENCE + "\ufffd", "hpo", "broken encoding"),
        (SENTENCE + "CafÃ© dÃ©jÃ ", "hpo", "broken encoding"),
        (SENTENCE + "\ud800", "hpo", "broken encoding"),
        ("same line here\n" * 10, "hpo", "repetition"),
        ("Pneumonoultramicroscopic " * 10, "wikipedia", "word length"),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y", "wikipedia", "word length"),
        ("Blood, heart, liver, lungs, brain, spleen, kidneys; " * 6, "wikipedia", "not running text"),
        ("The number of 1234 1235 1236 1237 1238 1239 1240 and more", "wikipedia", "symbols"),
        (SENTENCE * 12, "wikipedia", "repetition"),
    ],
)
def test_each_rule_drops_with_its_reason(text, source, reason):
    kept, found, detail = rules.clean(document(text, source))
    assert kept is None and found == reason and detail


def test_good_text_is_kept_labelled_and_scored():
    kept, reason, _ = rules.clean(document(SENTENCE * 2))
    assert reason == "" and kept is not None
    assert kept.text == (SENTENCE * 2).rstrip() and kept.language == "en"
    assert 0 < kept.quality < 1 and kept.value == 0.6
    assert rules.clean(document(SENTENCE, department=""))[0].value == 0


def test_listings_and_code_are_not_judged_as_prose():
    listing = "# Aspirin\n\n- Type: drug\n- Code: DB00945\n- Molecular formula: C9H8O4"
    assert rules.clean(document(listing, "drugs"))[0] is not None
    code = "def f(x):\n" + "    x += 1\n" * 10
    assert rules.clean(document(code, "python-code"))[0].language == "code"


def test_language_by_script():
    assert rules.language("Asthma is a disease.") == "en"
    assert rules.language("哮喘是一种慢性气道疾病（asthma）。") == "zh"
    assert rules.language("你好，很高兴认识你。\nHello, nice to meet you.") == "en-zh"
    assert rules.han_share("123 !?") == 0.0


def test_ngram_share_by_hand():
    # 'a b' covers 3 * 2 of 7 characters, each word being one character long.
    assert rules.top_ngram_share("a b a b a b c".split(), 2) == pytest.approx(6 / 7)
    assert rules.top_ngram_share("a b c".split(), 2) == 0.0
    assert rules.repeated_line_share("a\na\n\nb\na") == 0.5


def test_quality_prefers_fuller_text():
    assert rules.quality(SENTENCE * 6, "listing") > rules.quality(SENTENCE, "listing")
