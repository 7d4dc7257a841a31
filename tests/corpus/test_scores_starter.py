import pytest

from galenic.corpus.readers import Line
from galenic.corpus.readers.collect import Raw
from galenic.corpus.records import Document, Entity
from galenic.corpus.scores import scorer, starter
from galenic.corpus.scores.labels import part
from galenic.corpus.scores.scorer_config import ScorerConfig
from galenic.corpus.scores.taxonomy import CLASSES
from galenic.corpus.starter.conversations import Dialogue, Disease
from galenic.corpus.starter.holdout import Pair
from galenic.corpus.texts import column

pytest.importorskip("pyarrow")

NAMES = [
    "肺炎",
    "哮喘",
    "糖尿病",
    "高血压",
    "胃炎",
    "肝炎",
    "肾炎",
    "贫血",
    "偏头痛",
    "湿疹",
    "结膜炎",
    "中耳炎",
]
SYMPTOMS = ["咳嗽", "发热", "喘息", "口渴", "头痛", "腹痛", "恶心", "水肿", "乏力", "瘙痒", "流泪", "耳鸣"]
DAILY = ["公园", "朋友", "天气", "学校", "电影", "火车", "晚饭", "周末", "音乐", "商店", "飞机", "工作"]


def document(source, key, text, department="", category=""):
    return Document(
        id=f"{source}/{key}",
        text=text,
        source=source,
        licence="x",
        language="en",
        category=category,
        department=department,
    )


@pytest.fixture(scope="module")
def raw():
    raw = Raw()
    prose = "It is known in many countries and people have written a lot about {} over the years."
    for i in range(40):
        raw.documents.append(
            document(
                "wikipedia",
                f"p{i}",
                f"# Person {i}\n\nPerson {i} was a writer. {prose.format(i)}",
                "",
                "people",
            )
        )
        raw.documents.append(
            document(
                "wikipedia-health",
                f"h{i}",
                f"# Ill {i}\n\nIll {i} is a disease with symptoms. Patients need treatment in hospital number {i}.",
                "cardiology",
                "biology and health sciences",
            )
        )
        text = f"# Sepsis {i}\n\nGive antibiotics within {i} hours. Measure lactate in all patients with shock {i}."
        raw.documents.append(document("guidelines", f"g{i}/all/00", text, "infectious diseases", "guideline"))
    for i, department in enumerate(CLASSES["department"] * 3):
        raw.entities.append(
            Entity(
                id=f"HP:{i}",
                source="hpo",
                name=f"Abnormal {department} finding {i}",
                kind="phenotypic abnormality",
                department=department,
                definition=f"Any change seen in {department} that is beyond the usual range of grade {i}.",
                parents=(f"HP:{i // 3}",),
            )
        )
    for i, name in enumerate(NAMES):
        raw.diseases.append(
            Disease(
                id=f"DISEASE:{i:03d}",
                name=f"Illness {i}",
                name_zh=name,
                code=f"J{i:02d}",
                symptoms=("Cough", "Fever"),
                symptoms_zh=(SYMPTOMS[i], SYMPTOMS[(i + 1) % 12]),
                drugs=("Aspirin",),
                drugs_zh=("阿司匹林",),
                department="pulmonology",
                department_zh="呼吸内科",
            )
        )
    for i in range(120):
        word = f"{DAILY[i % 12]}和{DAILY[i // 12]}"
        pair = Pair(id=f"hsk/{i}", source="hsk", zh=f"我们今天去{word}了。", en=f"We went there {i} times.")
        raw.lines.append(Line(pair=pair, text=f"{pair.zh}\n{pair.en}", group="HSK 1"))
        raw.dialogues.append(
            Dialogue(
                id=f"en/{i}", language="en", category="greetings", turns=(f"Hi {i}, how are you?", "Fine.")
            )
        )
    raw.modules = {f"m{i}": f'def f{i}(x):\n    """Adds {i}."""\n    return x + {i}\n' for i in range(4)}
    return raw


@pytest.fixture(scope="module")
def rows(raw):
    return starter.labels_of(raw, 400, seed=1)


def test_labels_say_what_the_source_says(rows):
    by = {}
    for row in rows:
        by.setdefault(row.origin, []).append(row)
    names = {head: CLASSES[head] for head in CLASSES}
    guideline = by["guidelines"][0]
    assert names["content"][guideline.labels["content"]] == "guideline" and guideline.labels["medical"] == 1
    assert guideline.scores["medical_value"] == 1 and guideline.scores["quality"] == 1
    person = by["wikipedia"][0]
    assert names["general"][person.labels["general"]] == "biography" and person.labels["medical"] == 0
    assert person.scores["medical_value"] == 0 and "department" not in person.labels
    assert {names["department"][row.labels["department"]] for row in by["disease-tables"]} == {"pulmonology"}
    advertisement = by["made: health-advertisement"][0]
    assert names["content"][advertisement.labels["content"]] == "advertisement"
    assert advertisement.scores["medical_value"] < 0.1 and advertisement.labels["medical"] == 1
    assert all(0 <= value <= 1 for row in rows for value in row.scores.values())
    assert all(0 <= label < len(CLASSES[head]) for row in rows for head, label in row.labels.items())
    assert all("content" not in row.labels for row in rows if row.origin.startswith("passage: "))


def test_no_text_tells_its_own_department(rows):
    tables = [row for row in rows if row.origin == "disease-tables"]
    assert tables and not any("Department:" in row.text or "科室" in row.text for row in tables)


def test_corruptions_and_passages_go_where_their_text_goes(rows):
    whole = {row.group for row in rows if not row.origin.startswith(("corrupted", "passage"))}
    worse = [row for row in rows if row.origin.startswith("corrupted: ")]
    assert {row.origin for row in worse} >= {"corrupted: shuffled", "corrupted: mashed", "corrupted: cut"}
    assert {row.group for row in worse} <= whole
    assert all(row.scores["quality"] < 0.7 for row in worse)


def test_made_texts_never_mix_the_wordings_of_two_parts(rows):
    for file in ("news", "note.en"):
        for number, template in enumerate(starter.templates(file)):
            first = template.split("{")[0][:25]
            if len(first) < 25:
                continue
            place = part(f"made/{file}/{number}", 1)
            found = {
                part(row.group, 1) for row in rows if first in row.text and row.origin.startswith("made")
            }
            assert found <= {place}


def test_the_same_labels_again(raw, rows):
    assert starter.labels_of(raw, 400, seed=1) == rows
    assert starter.labels_of(raw, 400, seed=2) != rows


def test_chinese_medical_text_is_medical(rows):
    config = ScorerConfig(out="x", labels=["given"], bits=14, epochs=8)
    score = scorer.train_scorer(rows, config)
    found = score(
        column(
            [
                "患者因发热、咳嗽三天就诊，诊断为肺炎，给予阿司匹林治疗。",
                "哮喘的常见症状包括喘息和咳嗽，常用的治疗药物有阿司匹林。",
                "我们今天去公园和学校了。",
                "我们周末和朋友去商店了。",
            ]
        )
    )
    assert found["medical"].tolist() == [1, 1, 0, 0]
    assert (found["medical_value"][:2] > found["medical_value"][2:].max()).all()
    figures = score.facts["heldout"]
    assert figures["medical"]["accuracy"] > 0.8 and figures["medical (Chinese)"]["n"] > 10
    assert figures["quality"]["origins"]["corrupted: mashed"]["score"] < 0.3
    assert figures["quality"]["origins"]["guidelines"]["score"] > 0.6
