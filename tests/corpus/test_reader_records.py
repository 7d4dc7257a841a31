"""MEDLINE citations and FHIR resources."""

import base64
import gzip
import json
import random
import zipfile

import pytest
from reader_helpers import memory_within, read, reasons, source, texts

from galenic.corpus.units import plan_units

# ---------------------------------------------------------------------------- MEDLINE

HEAD = (
    '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January '
    '2025//EN" "https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">\n<PubmedArticleSet>\n'
)


def article(
    pmid, title="A <i>trial</i> of H<sub>2</sub>O.", abstract="", language="eng", extra="", kinds=(), mesh=()
):
    abstract = (
        f"<Abstract>{abstract}<CopyrightInformation>Copyright X</CopyrightInformation></Abstract>"
        if abstract
        else ""
    )
    kinds = "".join(f'<PublicationType UI="D">{kind}</PublicationType>' for kind in kinds)
    mesh = "".join(
        f'<MeshHeading><DescriptorName UI="D">{name}</DescriptorName></MeshHeading>' for name in mesh
    )
    return (
        f'<PubmedArticle><MedlineCitation Status="MEDLINE"><PMID Version="1">{pmid}</PMID><Article>'
        f"<ArticleTitle>{title}</ArticleTitle>{abstract}<Language>{language}</Language>"
        f"<PublicationTypeList>{kinds}</PublicationTypeList></Article>"
        f"<MeshHeadingList>{mesh}</MeshHeadingList>{extra}</MedlineCitation>"
        "<PubmedData><ArticleIdList><ArticleId>1</ArticleId></ArticleIdList></PubmedData></PubmedArticle>\n"
    )


SECTIONS = (
    '<AbstractText Label="BACKGROUND" NlmCategory="BACKGROUND">Why &amp; what.</AbstractText>'
    '<AbstractText Label="UNLABELLED">Plain.</AbstractText><AbstractText Label="RESULTS">p &lt; 0.05.</AbstractText>'
)
OTHER = (
    '<OtherAbstract Type="Publisher" Language="chi"><AbstractText>中文摘要。</AbstractText></OtherAbstract>'
)


def medline(*articles):
    return (
        HEAD + "".join(articles) + "<DeleteCitation><PMID>9</PMID></DeleteCitation></PubmedArticleSet>"
    ).encode()


def test_citations(tmp_path):
    data = medline(
        article(1, abstract=SECTIONS, kinds=["Journal Article", "Review"], mesh=["Asthma", "Lung"]),
        article(
            2,
            title="[Eine Studie].",
            abstract="<AbstractText>Text.</AbstractText>",
            language="ger",
            extra=OTHER,
        ),
        article(3, title="No abstract"),
        article(4, abstract=SECTIONS, kinds=["Retracted Publication"]),
        article("", abstract=SECTIONS),
        article(6, title="", abstract="<AbstractText>Alone.</AbstractText>"),
    )
    (tmp_path / "pubmed25n0001.xml.gz").write_bytes(gzip.compress(data))
    rows, drops = read(tmp_path, "medline")
    assert rows[0] == {
        "id": "s/1",
        "text": "# A trial of H2O.\n\nBACKGROUND: Why & what.\n\nPlain.\n\nRESULTS: p < 0.05.",
        "language": "en",
        "category": "review",
        "department": "pulmonology",
    }
    assert [(row["id"], row["text"], row["language"]) for row in rows[1:]] == [
        ("s/2", "# Eine Studie.\n\nText.", ""),
        ("s/2:chi", "中文摘要。", "zh"),
        ("s/6", "Alone.", "en"),
    ]
    assert rows[1]["category"] == "research article" and rows[1]["department"] == ""
    assert reasons(drops) == [("s/3", "empty"), ("s/4", "retracted"), ("s/record 5", "malformed record")]


def test_a_citation_file_that_ends_early_keeps_its_beginning(tmp_path):
    data = medline(*(article(i, abstract=SECTIONS) for i in range(1, 5000)))
    (tmp_path / "a.xml").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.xml").write_bytes(medline(article(7777, abstract=SECTIONS)))
    rows, drops = read(tmp_path, "medline")
    assert len(rows) > 2000 and rows[-1]["id"] == "s/7777"
    assert reasons(drops) == [("s/a.xml", "unreadable file")] and "no element found" in drops[0][2]


def test_memory_stays_flat_over_a_large_file(tmp_path):
    part = "".join(article(i, abstract=SECTIONS * 5) for i in range(1, 1001))
    with gzip.open(tmp_path / "a.xml.gz", "wt", 1) as file:
        file.write(HEAD)
        for _ in range(12):
            file.write(part)
        file.write("</PubmedArticleSet>")
    config = source(tmp_path, "medline")
    from galenic.corpus.units import read_unit

    with memory_within(60 * 2**20):  # the citations are 40 times as much as a table of them
        count = sum(
            table.num_rows for table in read_unit(plan_units([config], 2**30)[0], config, lambda *_: None)
        )
    assert count == 12_000


def test_a_record_without_end_is_refused(tmp_path):
    with gzip.open(tmp_path / "a.xml.gz", "wb", 1) as file:
        rng = random.Random(0)
        file.write(HEAD.encode() + b"<PubmedArticle><PMID>")
        for _ in range(80):
            file.write(rng.randbytes(2**16).hex().encode() * 8)
    rows, drops = read(tmp_path, "medline")
    assert not rows and reasons(drops) == [("s/a.xml.gz", "unreadable file")]
    assert "a record of more than" in drops[0][2]


# ---------------------------------------------------------------------------- FHIR


def b64(text, encoding="utf-8"):
    return base64.b64encode(text.encode(encoding)).decode()


def code(display, value="1"):
    return {"coding": [{"system": "http://snomed.info/sct", "code": value, "display": display}]}


def document(key, *attachments, **more):
    content = [{"attachment": attachment} for attachment in attachments]
    return {
        "resourceType": "DocumentReference",
        "id": key,
        "type": {"text": "Discharge summary"},
        "content": content,
        **more,
    }


VISIT = {"encounter": {"reference": "urn:uuid:visit-1"}, "subject": {"reference": "Patient/p"}}
RESOURCES = [
    {"resourceType": "Patient", "id": "p", "name": [{"family": "Secret"}]},
    {"resourceType": "Encounter", "id": "visit-1", "type": [code("Emergency visit", "50849002")]},
    {"resourceType": "Condition", "id": "c1", "code": code("Asthma", "195967001"), **VISIT},
    {"resourceType": "Condition", "id": "c2", "code": code("Asthma", "195967001"), **VISIT},
    {
        "resourceType": "Condition",
        "id": "c3",
        "code": code("Copd"),
        "verificationStatus": {"coding": [{"code": "refuted"}]},
        **VISIT,
    },
    {
        "resourceType": "Observation",
        "id": "o1",
        "code": code("Blood pressure", "85354-9"),
        "component": [
            {"code": {"text": "systolic"}, "valueQuantity": {"value": 120, "unit": "mmHg"}},
            {"code": {"text": "diastolic"}, "valueQuantity": {"value": 80.5, "unit": "mmHg"}},
        ],
        **VISIT,
    },
    {
        "resourceType": "Observation",
        "id": "o2",
        "code": code("Weight"),
        "valueQuantity": {"value": 70, "code": "kg"},
        **VISIT,
    },
    {"resourceType": "Observation", "id": "o3", "code": code("Nothing measured"), **VISIT},
    {
        "resourceType": "MedicationRequest",
        "id": "m1",
        "medicationCodeableConcept": {"text": "Salbutamol"},
        "dosageInstruction": [{"text": "2 puffs as needed"}],
        **VISIT,
    },
    {
        "resourceType": "MedicationRequest",
        "id": "m2",
        "medication": {"concept": code("Aspirin", "2")},
        **VISIT,
    },
    {
        "resourceType": "Condition",
        "id": "c4",
        "code": {"text": "高血压"},
        "subject": {"reference": "Patient/p"},
    },
    document("d1", {"contentType": "text/plain", "data": b64("Patient did well.")}),
    document(
        "d2", {"contentType": "text/html", "data": b64("<html><body><p>Seen <b>again</b>.</p></body></html>")}
    ),
    document(
        "d3", {"contentType": "text/plain; charset=GBK", "data": b64("好转出院。", "gbk")}, language="zh-CN"
    ),
    document("d4", {"contentType": "application/pdf", "data": b64("%PDF")}),
    document("d10", {"contentType": "text/rtf", "data": b64(r"{\rtf1 x}")}),
    document("d11", {"contentType": "text/html", "data": b64("<nav>menu</nav>")}),
    document("d5", {"contentType": "text/plain", "url": "Binary/1"}),
    document("d6", {"contentType": "text/plain", "data": "no base64!"}),
    document("d7", {"contentType": "text/plain", "data": b64("Wrong patient")}, status="entered-in-error"),
    document("d8", {"contentType": "text/plain", "data": base64.b64encode(b"\xff\xfa\xfb").decode()}),
    document("d9", {"data": b64("part one")}, {"data": b64("part two")}),
    {
        "resourceType": "DiagnosticReport",
        "id": "r1",
        "code": {"text": "Chest X-ray"},
        "conclusion": "No infiltrate.",
        "presentedForm": [{"contentType": "application/pdf", "data": b64("%PDF")}],
    },
    {"resourceType": "DiagnosticReport", "id": "r2", "code": {"text": "Blood count"}},
]
ENCOUNTER = """# Encounter: Emergency visit (50849002)

## Problems

- Asthma (195967001)

## Observations

- Blood pressure (85354-9): systolic 120 mmHg; diastolic 80.5 mmHg
- Weight (1): 70 kg

## Medications

- Salbutamol: 2 puffs as needed
- Aspirin (2)"""
NOTES = {
    "s/DocumentReference/d1": "# Discharge summary\n\nPatient did well.",
    "s/DocumentReference/d2": "# Discharge summary\n\nSeen again.",
    "s/DocumentReference/d3": "# Discharge summary\n\n好转出院。",
    "s/DocumentReference/d9/0": "# Discharge summary\n\npart one",
    "s/DocumentReference/d9/1": "# Discharge summary\n\npart two",
    "s/DiagnosticReport/r1": "# Chest X-ray\n\nNo infiltrate.",
    "s/Encounter/visit-1": ENCOUNTER,
    "s/Patient/p": "## 诊断\n\n- 高血压",
}
DROPS = [
    ("s/Condition/c3", "refuted"),
    ("s/DiagnosticReport/r2", "empty"),
    ("s/DocumentReference/d10", "not text"),
    ("s/DocumentReference/d11", "empty"),
    ("s/DocumentReference/d4", "not text"),
    ("s/DocumentReference/d5", "empty"),
    ("s/DocumentReference/d6", "malformed record"),
    ("s/DocumentReference/d7", "entered in error"),
    ("s/DocumentReference/d8", "broken encoding"),
    ("s/Observation/o3", "empty"),
]


def bundle(resources):
    return {
        "resourceType": "Bundle",
        "type": "collection",
        "entry": [{"fullUrl": "urn:x", "resource": r} for r in resources],
    }


def test_a_bundle(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(bundle(RESOURCES), indent=1))
    rows, drops = read(tmp_path, "fhir")
    assert texts(rows) == NOTES and sorted(reasons(drops)) == DROPS
    assert "Secret" not in str(rows)
    assert {row["id"]: row["language"] for row in rows}["s/DocumentReference/d3"] == "zh"


def test_a_bulk_export_joins_encounters_over_its_files(tmp_path):
    for kind in {resource["resourceType"] for resource in RESOURCES}:
        lines = [json.dumps(r) for r in RESOURCES if r["resourceType"] == kind]
        (tmp_path / f"{kind}.ndjson").write_text("\n".join([*lines, ""]))
    assert len(plan_units([source(tmp_path, "fhir")], 100)) == 1
    rows, drops = read(tmp_path, "fhir", 100)
    assert texts(rows) == NOTES and sorted(reasons(drops)) == DROPS


def test_what_a_bundle_says_does_not_depend_on_the_plan(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(bundle(RESOURCES)))
    rows, drops = read(tmp_path, "fhir", 100)
    assert read(tmp_path, "fhir", 2**30) == (rows, drops) and len(rows) == 2 * len(NOTES)


def test_other_shapes(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(RESOURCES[11:12]))
    (tmp_path / "one.json").write_text(json.dumps(RESOURCES[12]))
    (tmp_path / "inner.json").write_text(json.dumps(bundle([bundle(RESOURCES[13:14])])))
    nameless = [{"resource": document(None, {"data": b64("uuid")}), "fullUrl": "urn:uuid:77"}]
    (tmp_path / "order.json").write_text(json.dumps({"entry": nameless, "resourceType": "Bundle"}))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("p/a.json", json.dumps(bundle(RESOURCES)))
    rows, _ = read(tmp_path, "fhir")
    expected = NOTES | {"s/DocumentReference/77": "# Discharge summary\n\nuuid"}
    assert texts(rows) == expected and len(rows) == len(NOTES) + 4


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_a_bundle_in_pieces(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr("galenic.corpus.readers.fhir._CHUNK", chunk)
    small = bundle(RESOURCES[:4] + RESOURCES[11:14]) | {"total": 12345, "extra": [1, -2.5e3, "€\u4f60", None]}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(small, ensure_ascii=False))
    rows, drops = read(tmp_path, "fhir")
    assert (
        set(texts(rows)) == {f"s/DocumentReference/d{i}" for i in (1, 2, 3)} | {"s/Encounter/visit-1"}
        and not drops
    )


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "not valid JSON"),
        (b"plain", "not valid JSON"),
        (b'{"a" 1}', "not valid JSON"),
        (b"{}", "an empty object"),
        (json.dumps(bundle(RESOURCES)).encode()[:-50], "cut short"),
        (json.dumps(bundle(RESOURCES)).encode() + b"x", "something follows"),
        (b'{"entry": [' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_what_is_no_whole_bundle_is_one_drop(tmp_path, data, detail):
    (tmp_path / "a.json").write_bytes(data)
    (tmp_path / "b.json").write_text(json.dumps(RESOURCES[11]))
    rows, drops = read(tmp_path, "fhir")
    assert "s/DocumentReference/d1" in texts(rows)
    [(key, _, told, _)] = [drop for drop in drops if drop[1] == "unreadable file"]
    assert key == "s/a.json" and detail in told


def test_bad_lines_of_an_export(tmp_path):
    lines = [b"{bad", b"[1]", b'{"id": "x"}', b'"\xff"', json.dumps(RESOURCES[11]).encode()]
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    rows, drops = read(tmp_path, "fhir")
    assert list(texts(rows)) == ["s/DocumentReference/d1"]
    assert reasons(drops) == [
        ("s/a.ndjson.gz:1", "malformed record"),
        ("s/a.ndjson.gz:2", "malformed record"),
        ("s/a.ndjson.gz:3", "malformed record"),
        ("s/a.ndjson.gz:4", "broken encoding"),
    ]


def test_odd_values_do_no_harm(tmp_path):
    """Whatever stands in the place of an object, a list or a text, is passed over."""
    odd = [
        "\ud800",
        {"text": "\udc00"},
        {"reference": "\ud800"},
        None,
        1,
        "x",
        [],
        {},
        [None],
        ["x"],
        {"coding": 5},
        {"coding": ["x"]},
        {"text": 7},
        True,
    ]
    rng = random.Random(0)
    resources = []
    for _ in range(2000):
        resource = dict(rng.choice(RESOURCES))
        for key in rng.sample(list(resource), k=min(2, len(resource))):
            resource[key] = rng.choice(odd)
        resources.append(resource)
    (tmp_path / "a.json").write_text(json.dumps(bundle(resources)))
    rows, drops = read(tmp_path, "fhir")
    assert rows and "broken encoding" in {drop[1] for drop in drops}
    assert json.dumps(drops, ensure_ascii=False).encode()  # the ledger can be written
