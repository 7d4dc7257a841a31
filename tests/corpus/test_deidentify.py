"""De-identification: every category in both languages, what must stay, names met again, lists and models."""

import re
import sys
import time
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.privacy.deidentify import CATEGORIES, Deidentification, Deidentifier, deidentify_table
from galenic.corpus.privacy.identifiers import luhn, resident_id
from galenic.runtime import UserError

RULES = Deidentifier()

ENGLISH = {
    "NAME": [
        "Seen by Dr. «Oyelaran».",
        "Patient: «OKAFOR, NNEKA M»\nMRN",
        "Signed, «Agnieszka Zielinska», MD",
        "his wife, «Xiomara», agrees",
        "Discussed with «Thaddeus Quill» today",
        "«Marisol Etxeberria» is a 44-year-old",
        "Drs «Abara» ",
        "dr «okafor» notified",
        "cc: «T. van der Berg»",
    ],
    "DATE": [
        "on «03/12/2021».",
        "on «3-12-21»",
        "«2021-03-12»",
        "«March 12, 2021»",
        "«12 Mar 2021»",
        "in «March 2021»",
        "since «3/12»",
        "«4th of July»",
    ],
    "AGE": ["a «93-year-old» man", "aged «101»", "«90 yo» male"],
    "PHONE": ["(call «(617) 555-0123»)", "fax «617.555.0123»", "«+44 20 7946 0958»", "pager: «12345»"],
    "EMAIL": ["«j.doe+x@mail.example.org»,"],
    "URL": ["see «https://portal.example.org/u/1»"],
    "IP": ["from «192.168.10.201»", "«2001:0db8:0000:0000:0000:ff00:0042:8329»"],
    "ADDRESS": [
        "at «12 Elm Street, Springfield, MA 01101».",
        "lives in «Chattanooga».",
        "«P.O. Box 12»",
        "of «Fargo, ND»",
    ],
    "HOSPITAL": ["at «St. Mary's Hospital» for", "the «Riverside Medical Center»"],
    "ID": [
        "MRN: «H0012345»",
        "SSN «123-45-6789»",
        "Acct # «9912-33»",
        "member ID «XK99812»",
        "card «4111 1111 1111 1111»",
        "ref «90210042»",
    ],
    "DEVICE": ["pacemaker serial number «PL1234567»", "mac «00:1B:44:11:3A:B7»"],
    "VEHICLE": ["license plate: «ABC-1234»"],
}
CHINESE = {
    "NAME": [
        "姓名：«欧阳子涵» 性别",
        "患者«戚秀英»，女",
        "«缪国栋»，男，",
        "请«柴»主任会诊",
        "其女儿«单丽华»（",
        "签名：«骆明»\n",
        "患者«李某某»诉",
    ],
    "DATE": ["于«2021年3月5日»入院", "«3月5日»复查", "«二〇二三年三月五日»", "«2021年3月»", "于«3-5»手术"],
    "AGE": ["«93岁»", "年龄：«95»"],
    "PHONE": ["电话：«13812345678»", "«010-62345678»", "手机«138-1234-5678»"],
    "EMAIL": ["邮箱«li.wei@example.com»。"],
    "ADDRESS": [
        "现住址：«北京市海淀区中关村大街27号院3号楼402室»。",
        "家住«如皋市白蒲镇»，",
        "«湖北省武汉市洪山区珞喻路1037号»",
    ],
    "HOSPITAL": ["于«北京协和医院»就诊", "转«白蒲镇中心卫生院»治疗"],
    "ID": ["住院号：«ZY0012345»", "身份证«11010519491231002X»", "医保卡号：«99812234»"],
    "DEVICE": ["起搏器序列号：«PSL1234567»"],
    "VEHICLE": ["车牌«京A12345»"],
}
STAYS = [
    "Blood pressure 120/80, strength 4/5, temperature 38.1, Foley catheter, Parkinson disease, Glasgow Coma Scale 15.",
    "Platelets 250000, viral load 12000000 copies/mL, ratio 1.25, 89-year-old woman, grade 3/6 murmur.",
    "Discussed with Cardiology. Admission Date of Discharge. The Emergency Department called Radiology.",
    "Take amoxicillin 500 mg three times daily for 7 days; follow up in 2 weeks. Hodgkin lymphoma, stage II.",
    "Changes seen in Alzheimer's disease; pain similar to Crohn disease.",
    "患者高热，伴黄疸，于今日行CT检查，白细胞12.3×10^9/L，血压130/80mmHg，予头孢曲松2.0g静滴，每日3次。",
    "曾于外院就诊，当地医院予以抗感染治疗，我院急诊以肺炎收住。家属表示理解。89岁。",
    "高年资医师查房后指示继续治疗。何时手术待定。马上行急诊手术。常规消毒，方案同前。",
]


@pytest.mark.parametrize(
    ("category", "marked"),
    [(c, t) for cases in (ENGLISH, CHINESE) for c, texts in cases.items() for t in texts],
)
def test_identifiers_of_every_category(category, marked):
    before, identifier, after = re.split("[«»]", marked)
    text = before + identifier + after
    finds = RULES.find(text)
    assert [(text[f.start : f.stop].rstrip("."), f.category) for f in finds] == [
        (identifier.rstrip("."), category)
    ]
    assert RULES.replace(text)[1] == {category: 1}


def test_every_category_is_tried_in_a_language():
    assert set(ENGLISH) == set(CATEGORIES) and set(CHINESE) >= set(CATEGORIES) - {"URL", "IP"}


@pytest.mark.parametrize("text", STAYS)
def test_medicine_stays(text):
    assert RULES.replace(text) == (text, {})


def test_a_name_met_again_goes_too():
    text = "Dr. Ngozi Abara saw him. Later ABARA called; Abara's plan stands. Ngozi agreed. Abaracor was stopped."
    assert RULES.replace(text)[0] == (
        "Dr. [NAME] saw him. Later [NAME] called; [NAME]'s plan stands. [NAME] agreed. Abaracor was stopped."
    )
    assert RULES.replace("患者缪国栋，男。今缪国栋诉头痛。")[0] == "患者[NAME]，男。今[NAME]诉头痛。"


def test_years_stay_if_asked_for_but_not_of_birth():
    years = Deidentifier(Deidentification(dates="year"))
    text = (
        "DOB: 03/12/1931. Admitted March 5, 2021; seen 3/5/21. 出生日期：1931年3月5日，于2021年3月5日入院。"
    )
    assert years.replace(text)[0] == (
        "DOB: [DATE]. Admitted [DATE 2021]; seen [DATE]. 出生日期：[DATE]，于[DATE 2021]入院。"
    )


def test_kept_categories_stay():
    text = "Dr. Abara, 03/12/2021"
    assert Deidentifier(Deidentification(keep=("NAME",))).replace(text)[0] == "Dr. Abara, [DATE]"


def test_what_overlaps_is_one_and_the_longest_names_it():
    text = "Address: 12 Elm Street, Springfield, MA 01101, phone (617) 555-0123"
    assert RULES.replace(text) == ("Address: [ADDRESS]", {"ADDRESS": 1})


def test_a_list_of_names_is_found_in_any_case_but_only_as_words(tmp_path):
    (tmp_path / "staff.txt").write_text("Ola Nord\nBjørg\n李雷\nÖz\n", encoding="utf-8")
    known = Deidentifier(Deidentification(names=(str(tmp_path / "staff.txt"),)))
    text = "ola nord and BJØRG met 李雷today; Bjørgs and Gola Nord and özel not. İ OLA NORD"
    assert known.replace(text) == (
        "[NAME] and [NAME] met [NAME]today; Bjørgs and Gola Nord and özel not. İ [NAME]",
        {"NAME": 4},
    )


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"\n x\n", "no names"), (b"\xff\xfe", "not UTF-8")]
)
def test_bad_lists_are_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Deidentifier(Deidentification(names=(str(path),)))


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="unknown category 'NAMES'"):
        Deidentification(keep=("NAMES",))
    with pytest.raises(UserError, match="dates: 'shift'"):
        Deidentification(dates="shift")  # pyrefly: ignore


def test_tables_are_counted_and_keep_their_columns():
    table = pa.table({"id": ["a", "b"], "text": ["Dr. Abara, 03/12/2021", "Nothing here."], "n": [1, 2]})
    out, counts = deidentify_table(table, RULES)
    assert out.column_names == ["id", "text", "n"] and counts == {"NAME": 1, "DATE": 1}
    assert out["text"].to_pylist() == ["Dr. [NAME], [DATE]", "Nothing here."]
    assert len(deidentify_table(table.slice(0, 0), RULES)[0]) == 0


def test_checks_of_numbers():
    assert resident_id("11010519491231002X") and not resident_id("110105194912310020")
    assert luhn("4111-1111-1111-1111") and not luhn("4111-1111-1111-1112")
    assert RULES.find("卡 4111 1111 1111 1112") == []


ALPHABET = st.sampled_from(
    [*"Aa1 .,:-/@\n年月日岁王李号院医市区某男，。", "Dr. ", "MRN: ", "患者", "电话", "555-0123"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ALPHABET, max_size=40).map("".join))
def test_finds_are_in_order_and_only_they_change(text):
    finds = RULES.find(text)
    edges = [edge for find in finds for edge in (find.start, find.stop)]
    assert edges == sorted(edges) and all(find.start < find.stop for find in finds)
    replaced, counts = RULES.replace(text)
    kept = re.split(r"\[(?:" + "|".join([*CATEGORIES, "AGE OVER 89"]) + r")\]", replaced)
    assert "".join(kept) == "".join(
        text[a:b] for a, b in zip([0, *edges[1::2]], [*edges[::2], len(text)], strict=True)
    )
    assert sum(counts.values()) == len(finds)


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "A",
        "Aa ",
        "9",
        "9 ",
        "区",
        "王",
        "1号",
        "a@",
        "a.",
        "(1",
        "A'",
        "MRN ",
        "姓名",
        "2021年",
        "\t",
        "Mc",
    ],
)
def test_no_text_takes_forever(piece):
    text = piece * (20_000 // len(piece))
    started = time.process_time()
    RULES.find(text)
    assert time.process_time() - started < 10


# ---------------------------------------------------------------------------- models


def fake_spacy(monkeypatch, lang, entities):
    def load(name, exclude):
        if name != "there":
            raise OSError(f"no {name}")

        def nlp(text):
            found = [
                SimpleNamespace(
                    text=e, label_=label, start_char=text.index(e), end_char=text.index(e) + len(e)
                )
                for e, label in entities
                if e in text
            ]
            return SimpleNamespace(ents=found)

        nlp.lang = lang
        return nlp

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))


def test_a_spacy_pipeline_adds_persons_and_places(monkeypatch):
    found = [
        ("Quill", "PERSON"),
        ("Foley", "PERSON"),
        ("Tulsa", "GPE"),
        ("Neurology", "PERSON"),
        ("Xerox", "ORG"),
    ]
    fake_spacy(monkeypatch, "en", found)
    model = Deidentifier(Deidentification(models=("there",)))
    text = "Yesterday Quill left Tulsa; Foley catheter by Neurology, Xerox. Quill again."
    assert model.replace(text)[0] == (
        "Yesterday [NAME] left [ADDRESS]; Foley catheter by Neurology, Xerox. [NAME] again."
    )
    chinese = "今日Quill查体未见异常，继续观察病情变化"
    assert model.replace(chinese)[0] == chinese  # an English pipeline does not judge Chinese


def test_missing_models_are_refused(monkeypatch):
    fake_spacy(monkeypatch, "en", [])
    with pytest.raises(UserError, match="knows no pipeline 'absent'"):
        Deidentifier(Deidentification(models=("absent",)))
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match="needs spaCy"):
        Deidentifier(Deidentification(models=("there",)))
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="'jieba' is not installed"):
        Deidentifier(Deidentification(models=("jieba",)))


def test_jieba_adds_names_with_a_surname(monkeypatch):
    words = [
        ("今", "t"),
        ("戚", "nr"),
        ("永福", "nz"),
        ("查体", "nr"),
        ("，", "x"),
        ("缪建国", "nr"),
        ("高", "a"),
        ("热", "a"),
    ]
    dictionary = SimpleNamespace(tmp_dir=None)

    def initialize():
        assert dictionary.tmp_dir and dictionary.tmp_dir != "/tmp"  # no cache that others may write

    module = SimpleNamespace(setLogLevel=lambda level: None, dt=dictionary, initialize=initialize)
    monkeypatch.setitem(sys.modules, "jieba", module)
    monkeypatch.setitem(sys.modules, "jieba.posseg", SimpleNamespace(cut=lambda text: words))
    model = Deidentifier(Deidentification(models=("jieba",)))
    assert model.replace("今戚永福查体，缪建国高热")[0] == "今[NAME]查体，[NAME]高热"
    assert model.replace("No Chinese here.")[0] == "No Chinese here."
