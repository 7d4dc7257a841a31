import bz2
import gzip
import json
import pickle

import pytest

from galenic.corpus.readers import departments, documents_of_lines
from galenic.corpus.readers.abbreviations import abbreviation_documents
from galenic.corpus.readers.cedict import MEDICAL, cedict_lines
from galenic.corpus.readers.dialogues import dialogues
from galenic.corpus.readers.dictionaries import drug_entities, mesh_entities, unpickle
from galenic.corpus.readers.disease_tables import disease_entities, diseases, literal
from galenic.corpus.readers.guidelines import (
    differential_documents,
    dosing_documents,
    guideline_documents,
    linearise,
)
from galenic.corpus.readers.hsk import hsk_lines
from galenic.corpus.readers.icd10cm import icd10cm_entities
from galenic.corpus.readers.obo import hpo_entities, quoted, reference, stanzas
from galenic.corpus.readers.python_source import code_documents, library_modules, topic_documents
from galenic.corpus.readers.radiology import FILES, radiology_documents, radiology_entities
from galenic.corpus.readers.wikipedia import wikipedia_documents
from galenic.runtime import UserError


class Drops(list):
    def __call__(self, *row):
        self.append(row)


@pytest.fixture
def drops():
    return Drops()


def dumps(value):
    return json.dumps(value).encode()


# ---------------------------------------------------------------------------- OBO

OBO = r"""format-version: 1.2
ontology: tiny

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0000707
name: Abnormality of the nervous system
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0001250
name: Seizure
alt_id: HP:0001275
def: "An \"event\" of the brain." [PMID:1]
comment: Not every one is epilepsy.
synonym: "Epileptic seizure" EXACT []
synonym: "Fits" EXACT layperson [ORCID:1]
synonym: "Epilepsy" RELATED layperson []
synonym: "EXACT match" NARROW []
is_a: HP:0000707 {source="x"} ! Abnormality of the nervous system

[Term]
id: HP:0000006
name: Autosomal dominant inheritance

[Term]
id: HP:0000002
name: Old
is_obsolete: true
is_a: HP:0000118

[Typedef]
id: part_of
name: part of
"""


def test_hpo_terms_become_entities(drops):
    entities = {e.id: e for e in hpo_entities(OBO.encode(), "hp.obo", drops)}
    assert list(entities) == ["HP:0000707", "HP:0001250"]
    seizure = entities["HP:0001250"]
    assert seizure.definition == 'An "event" of the brain.'
    assert seizure.synonyms == ("Epileptic seizure", "Fits")
    assert seizure.codes == ("HP:0001250", "HP:0001275")
    assert seizure.parents == ("HP:0000707",)
    assert seizure.related == (("lay term", "Fits"),)
    assert seizure.department == "neurology"
    assert entities["HP:0000707"].parents == ()
    assert drops == []


def test_a_malformed_term_is_dropped_not_the_file(drops):
    text = OBO.replace('synonym: "Fits" EXACT', "synonym: Fits EXACT")
    entities = hpo_entities(text.encode(), "hp.obo", drops)
    assert [e.id for e in entities] == ["HP:0000707"]
    [(key, source, reason, detail, name)] = drops
    assert (key, source, reason, name) == ("hpo/HP:0001250", "hpo", "malformed record", "Seizure")
    assert detail == "hp.obo:13: synonym is not a quoted string"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[Term]\nid: X:1\n", "hp.obo:1: not an OBO file"),
        (
            "format-version: 1.2\n\n[Term]\nid: X:1\nthis is no tag\n",
            "hp.obo:5: malformed line 'this is no tag'",
        ),
        ("format-version: 1.2\n\n[Term\nid: X:1\n", "hp.obo:3: malformed stanza header"),
        (
            "format-version: 1.2\n\n[Term]\nname: x\n\n[Term]\nid: X:1\n",
            r"hp.obo:3: \[Term\] stanza without an id",
        ),
    ],
)
def test_malformed_obo_is_refused_with_its_line(text, message):
    with pytest.raises(UserError, match=message):
        list(stanzas(text, "hp.obo"))


def test_obo_cycle_and_encoding(drops):
    text = OBO.replace("is_a: HP:0000118 !", "is_a: HP:0001250 !")
    with pytest.raises(UserError, match="form a cycle"):
        hpo_entities(text.encode(), "hp.obo", drops)
    with pytest.raises(UserError, match=r"hp\.obo: not UTF-8 at byte 19"):
        hpo_entities(b"format-version: 1.2\xff", "hp.obo", drops)


def test_obo_values():
    assert quoted(r'"a \"b\" c" EXACT []') == 'a "b" c'
    assert quoted("a") is None
    assert reference('HP:1 {x="y"} ! name') == "HP:1"


# ---------------------------------------------------------------------------- ICD-10-CM

ICD = """<?xml version="1.0"?><ICD10CM.tabular><version>2026</version><chapter><name>10</name>
<desc>Diseases of the respiratory system (J00-J99)</desc>
<section id="J40-J4A"><desc>Chronic lower respiratory diseases (J40-J4A)</desc>
<diag><name>J45</name><desc>Asthma</desc><includes><note>allergic asthma</note></includes>
 <excludes1><note>detergent asthma (J69.8)</note></excludes1>
 <diag><name>J45.9</name><desc>Other asthma</desc><inclusionTerm><note>Late onset  asthma</note></inclusionTerm>
  <diag><name>J45.90</name><desc>Unspecified asthma</desc></diag></diag>
 <diag placeholder="true"><name>J45.X</name><desc>Asthma</desc></diag>
 <diag><name>J45.2</name><desc>Mild asthma</desc><inclusionTerm><note>Mild asthma NOS</note></inclusionTerm></diag>
 <diag><name>J45.3</name></diag>
</diag></section></chapter></ICD10CM.tabular>"""


def test_icd_categories_become_entities(drops):
    entities = {e.id: e for e in icd10cm_entities(ICD.encode(), "icd.xml", drops)}
    assert list(entities) == [
        "ICD10CM:chapter 10",
        "ICD10CM:section J40-J4A",
        "ICD10CM:J45",
        "ICD10CM:J45.9",
        "ICD10CM:J45.2",
    ]
    assert entities["ICD10CM:chapter 10"].name == "Diseases of the respiratory system"
    assert entities["ICD10CM:section J40-J4A"].parents == ("ICD10CM:chapter 10",)
    asthma = entities["ICD10CM:J45"]
    assert asthma.department == "pulmonology" and asthma.parents == ("ICD10CM:section J40-J4A",)
    assert asthma.related == (("includes", "allergic asthma"), ("excludes", "detergent asthma (J69.8)"))
    assert asthma.codes == ("J45", "J45.90")
    assert entities["ICD10CM:J45.9"].related == (("includes", "Late onset asthma"),)
    assert entities["ICD10CM:J45.2"].synonyms == ("Mild asthma NOS",)
    assert [(d[0], d[3]) for d in drops] == [
        ("icd10cm/ICD10CM:J45.3", "icd.xml: category without a description")
    ]


def test_malformed_xml_is_refused_with_its_line(drops):
    with pytest.raises(UserError, match=r"icd\.xml:11:\d+: malformed XML \(mismatched tag\)"):
        icd10cm_entities(ICD.replace("</section>", "</sektion>").encode(), "icd.xml", drops)
    with pytest.raises(UserError, match=r"malformed XML \(no element found\)"):
        icd10cm_entities(b"", "icd.xml", drops)
    with pytest.raises(UserError, match=r"expected the element 'ICD10CM\.tabular' at the top, got 'html'"):
        icd10cm_entities(b"<html/>", "icd.xml", drops)


@pytest.mark.parametrize(
    ("code", "department"),
    [
        ("A00", "infectious diseases"),
        ("D49.9", "oncology"),
        ("D50", "hematology"),
        ("I63.9", "neurology"),
        ("J45.9", "pulmonology"),
        ("K08", "dentistry"),
        ("O9A", "obstetrics and gynecology"),
        ("Z99", "public health"),
        ("U07.1", "general medicine"),
    ],
)
def test_icd_departments(code, department):
    assert departments.of_icd(code) == department
    assert department in departments.DEPARTMENTS


def test_every_mapping_names_a_department():
    for names in (departments.HPO_BRANCHES.values(), departments._MESH_TREES.values(), departments._STEMS):
        assert set(names) <= set(departments.DEPARTMENTS)
    assert departments.of_text("The heart pumps; coronary arteries feed the heart.") == "cardiology"
    assert departments.of_text("A heart of gold.") == "general medicine"


# ---------------------------------------------------------------------------- JSON and text sources


def test_wikipedia(drops):
    data = dumps(
        {
            "Asthma": {
                "title": "Asthma",
                "extract": "A lung disease. The lung wheezes.",
                "topic": "Biology and health sciences",
            },
            "Bach": {"title": "Bach", "extract": "A composer."},
            "Bad": {"title": "Bad", "extract": 3},
            "Worse": "text",
        }
    )
    health, general = wikipedia_documents(data, "w.json", drops)
    assert (health.id, health.source, health.department) == (
        "wikipedia-health/Asthma",
        "wikipedia-health",
        "pulmonology",
    )
    assert health.text == "# Asthma\n\nA lung disease. The lung wheezes."
    assert (general.source, general.category, general.department) == ("wikipedia", "uncategorized", "")
    assert [d[0] for d in drops] == ["wikipedia/Bad", "wikipedia/Worse"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": ', r"w\.json:1:7: not valid JSON"),
        (b"[]", r"w\.json: expected an object at the top, got list"),
        (b"\xff", r"w\.json: not UTF-8 at byte 0"),
    ],
)
def test_malformed_json_file(data, message, drops):
    with pytest.raises(UserError, match=message):
        wikipedia_documents(data, "w.json", drops)


def test_hsk_lines_and_their_documents(drops):
    rows = [
        {
            "id": f"h{i}",
            "hsk_level": 1 + i // 3,
            "chinese": f"你好{i}。",
            "translation": {"en": f"Hello {i}."},
        }
        for i in range(5)
    ]
    lines = hsk_lines(dumps([*rows, {"id": "bad", "chinese": "好"}, 7]), "s.json", drops)
    assert [line.pair.zh for line in lines] == [f"你好{i}。" for i in range(5)]
    documents = documents_of_lines(lines, per_document=2, separator="\n\n")
    assert [d.id for d in documents] == ["hsk/HSK 1/00000", "hsk/HSK 1/00001", "hsk/HSK 2/00000"]
    assert documents[0].text == "你好0。\nHello 0.\n\n你好1。\nHello 1."
    assert [(d[0], d[3]) for d in drops] == [
        ("hsk/bad", "s.json: no English text"),
        ("hsk/record 6", "s.json: no Chinese text"),
    ]


def test_cedict_lines(drops):
    text = (
        "# comment\n"
        "肺炎 肺炎 [fei4 yan2] /pneumonia/inflammation of the lungs/\n"
        "書 书 [shu1] /book (compare 書本|书本[shu1 ben3])/CL:本[ben3]/\n"
        "干 乾 [gan1] /old variant of 幹|干[gan4]/\n"
        "broken line\n"
    )
    pneumonia, book = cedict_lines(gzip.compress(text.encode()), "c.gz", drops)
    assert pneumonia.group == MEDICAL and pneumonia.pair.department
    assert pneumonia.text == "肺炎 [fei4 yan2]: pneumonia; inflammation of the lungs"
    assert book.group == "dictionary" and book.text == "书 [shu1]: book (compare 书本); CL:本"
    assert [(d[0], d[4]) for d in drops] == [("cedict/line 5", "broken line")]
    with pytest.raises(UserError, match="not a whole gzip file"):
        cedict_lines(gzip.compress(text.encode())[:-9], "c.gz", drops)


def test_abbreviations(drops):
    data = gzip.compress(
        dumps({"MI": ["myocardial infarction", "mitral insufficiency"], "X": [], "_version": "1"})
    )
    [document] = abbreviation_documents(data, "a.gz", drops)
    assert document.text == "MI stands for myocardial infarction or mitral insufficiency."
    assert [d[0] for d in drops] == ["abbreviations/X"]
    with pytest.raises(UserError, match="not a whole gzip file"):
        abbreviation_documents(b"plain", "a.gz", drops)


# ---------------------------------------------------------------------------- dictionaries


class Exploit:
    def __reduce__(self):
        return (print, ("owned",))


def pickled(value):
    return bz2.compress(pickle.dumps(value))


def test_unpickler_refuses_whatever_would_import(capsys):
    assert unpickle(pickled({"a": ["b", 1.5, None]}), "p") == {"a": ["b", 1.5, None]}
    with pytest.raises(UserError, match=r"refused, .*it wants to load builtins\.print"):
        unpickle(pickled({"a": Exploit()}), "p")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="refused"):
        unpickle(b"no bzip2", "p")
    with pytest.raises(UserError, match="refused"):
        unpickle(bz2.compress(b"no pickle"), "p")
    with pytest.raises(UserError, match="expected a dict, got list"):
        unpickle(pickled([]), "p")


def test_mesh_diseases(drops):
    data = {
        "arthritis": {"name": "Arthritis", "mesh_id": "D001168", "mesh_tree": ["C05.550.114"]},
        "arthritis, psoriatic": {
            "name": "Arthritis, Psoriatic",
            "mesh_id": "D015535",
            "mesh_tree": ["C05.550.114.145", "1.6"],
        },
        "twin a": {"name": "Twin A", "mesh_id": "D1", "mesh_tree": ["F01.145"]},
        "twin b": {"name": "Twin B", "mesh_id": "D1", "mesh_tree": []},
        "nameless": {"mesh_id": "D2"},
    }
    variants = {
        "psoriatic arthritis": ["arthritis, psoriatic"],
        "arthritis, psoriatic": ["arthritis, psoriatic"],
        "psoriatic arthropathy": ["arthritis, psoriatic"],
    }
    tables = {"disease_canonical_to_data": data, "disease_variant_to_canonical": variants}
    entities = {e.id: e for e in mesh_entities(pickled(tables), "m", drops)}
    psoriatic = entities["MESH:arthritis, psoriatic"]
    assert psoriatic.name == "Psoriatic Arthritis" and psoriatic.synonyms == ("psoriatic arthropathy",)
    assert psoriatic.parents == ("MESH:arthritis",) and psoriatic.codes == ("D015535",)
    assert psoriatic.department == "orthopedics and rheumatology"
    assert entities["MESH:twin a"].codes == ()  # an identifier of two names identifies neither
    assert entities["MESH:twin a"].kind == "behavior or mental process"
    assert entities["MESH:twin b"].kind == "medical concept"
    assert [d[0] for d in drops] == ["mesh/MESH:nameless"]
    with pytest.raises(UserError, match="m: no table 'disease_canonical_to_data'"):
        mesh_entities(pickled({}), "m", drops)


def test_drugs(drops):
    tables = {
        "drug_canonical_to_data": {
            "brexpiprazole": {"name": "Brexpiprazole", "drugbank_id": "DB1", "formula": "C25H27N3O2S"},
            "water": {"name": "Water", "mesh_id": "D014867"},
        },
        "drug_variant_to_canonical": {"rexulti": ["brexpiprazole"], "brexpiprazole": ["brexpiprazole"]},
        "drug_variant_to_variant_data": {"rexulti": {"is_brand": True}},
    }
    drug, water = drug_entities(pickled(tables), "d", drops)
    assert drug.related == (("brand name", "rexulti"), ("molecular formula", "C25H27N3O2S"))
    assert drug.kind == "drug" and water.kind == "chemical substance"


TABLE = """from .types import X
DISEASE_CORRELATIONS: dict[str, X] = {
    %r: {"icd10": "J45.9", "symptoms": [%r], "medications": [%r], "medical_specialty": %r},
}
"""


def test_disease_tables_are_parsed_never_run(drops):
    english = (TABLE % ("Asthma", "Cough", "Albuterol", "Pulmonology")).encode()
    chinese = (TABLE % ("哮喘", "咳嗽", "沙丁胺醇", "呼吸内科")).encode()
    [disease] = diseases(english, chinese, "t", drops)
    assert disease.name_zh == "哮喘" and disease.department == "pulmonology"
    en, zh = disease_entities(disease, translated=True)
    assert ("Chinese name", "哮喘") in en.related and ("英文名", "Asthma") in zh.related
    en, zh = disease_entities(disease, translated=False)
    assert "哮喘" not in str(en) and "Asthma" not in str(zh)
    assert diseases(english, chinese.replace(b"J45.9", b"J45.8"), "t", drops) == []
    assert drops[0][0] == "disease-tables/DISEASE:001"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"T = __import__('os').system('true')", "t:1: T is not a plain literal"),
        (b"T = [1]", "t:1: T is not a dict"),
        (b"T = {", "t:1: not valid Python"),
        (b"U = {}", "t: no variable T"),
    ],
)
def test_tables_that_are_no_literals(code, message):
    with pytest.raises(UserError, match=message):
        literal(code, "T", "t")


# ---------------------------------------------------------------------------- guidelines, radiology, dialogues, Python

MARKDOWN = """# Sepsis — SSC

## Doses

| Drug | Dose |
|---|---|
| **A** | 1 g |
| B | |

## Algorithm

```
Patient
  |
  +--> Shock?
        → YES → Fluids
```

> **Calculator:** `x` available
"""


def test_tables_and_trees_are_linearised():
    text = linearise(MARKDOWN)
    assert "- Drug: A; Dose: 1 g\n- Drug: B\n" in text
    assert "- Patient\n  - Shock?\n    - YES → Fluids" in text
    assert not set("|`*") & set(text) and "Calculator" not in text


def test_guideline_sections_keep_their_title():
    long = "## One\n\n" + "Give fluids. " * 40 + "\n\n## Two\n\nShort."
    first, second = guideline_documents(f"# Sepsis\n\n{long}".encode(), "g.md", key="ssc/doses")
    assert first.text.startswith("# Sepsis\n\n## One") and second.text == "# Sepsis\n\n## Two\n\nShort."
    assert [d.id for d in (first, second)] == ["guidelines/ssc/doses/00", "guidelines/ssc/doses/01"]


def test_differentials_and_dosing(drops):
    table = {
        "differential_id": "fever",
        "title": "Fever",
        "diagnoses": [
            {
                "name": "Sepsis",
                "key_features": ["Tachycardia"],
                "recommended_tests": ["Lactate", "calculate_x"],
            },
            {"name": "Nothing"},
        ],
    }
    [document] = differential_documents(dumps(table), "f.json", drops)
    assert document.text == "# Fever: Sepsis\n\nKey features:\n- Tachycardia\n\nRecommended tests:\n- Lactate"
    drug = {
        "drug_name": "x",
        "drug_class": "antibiotic",
        "route": "IV",
        "normal_dose": "1 g",
        "tiers": [{"min": 50, "max": None, "dose": "1 g"}],
    }
    [document] = dosing_documents(dumps({"x": drug, "y": {}}), "r.json", drops)
    assert "- Creatinine clearance of 50 mL/min or more: 1 g." in document.text
    assert [d[0] for d in drops] == ["guidelines/differential/fever/01", "guidelines/dosing/y"]


def test_radiology(drops):
    files = {name: b"[]" for name in FILES} | {"imaging_signs": b"{}"}
    files["medical_concepts"] = dumps(
        [
            {
                "name": "AAA",
                "concept_type": "pathology",
                "definition": "Wide aorta.",
                "body_system": "Vascular",
            },
            {"name": "aaa"},
        ]
    )
    files["imaging_findings"] = dumps(
        [
            {"name": ">3 cm", "pathology_name": "aaa", "modality": "CT", "description": ""},
            {"name": "Edema", "pathology_name": "New", "modality": "MRI", "description": "Bright."},
            {"name": "x", "pathology_name": None},
        ]
    )
    files["mnemonics"] = dumps([{"mnemonic": "AB", "expansion": "Air, Blood", "topic": "Lung"}])
    known, new = radiology_entities(files, drops)
    assert known.department == "cardiology" and known.related == (("finding on CT", ">3 cm"),)
    assert new.name == "New" and new.related == (("finding on MRI", "Edema: Bright."),)
    assert [d[3] for d in drops] == ["imaging_findings.json: no pathology_name", "the same concept twice"]
    [document] = radiology_documents(files, drops)
    assert document.text == "# Lung\n\nMnemonic AB: Air, Blood"


def test_dialogues():
    data = "categories: [x]\nconversations:\n- - Hi\n  - Hello\n  - Other answer\n- - 12\n  - x\n- - alone\n"
    [found] = dialogues(data.encode(), "d.yml", language="en", topic="greetings")
    assert found.turns == ("Hi", "Hello")
    with pytest.raises(UserError, match="expected a list under the key 'conversations'"):
        dialogues(b"a: 1", "d.yml", language="en", topic="greetings")
    with pytest.raises(UserError, match=r"d\.yml:\d: not valid YAML"):
        dialogues(b"a: [", "d.yml", language="en", topic="greetings")


def test_python_library(tmp_path, drops):
    function = "@decorator\ndef f():\n" + "".join(f"    x{i} = {i}\n" for i in range(40))
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(f"import os\n\n{function}\ny = 1\n")
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text(function)
    modules = library_modules(drops, library=str(tmp_path))
    assert list(modules) == ["pkg"]
    [document] = code_documents(modules)
    assert document.id == "python-code/pkg:f:3" and document.text == f"# pkg\n{function}"
    assert [d[0] for d in drops] == ["python-code/bad.py"]
    with pytest.raises(UserError, match="no Python library there"):
        library_modules(drops, library=str(tmp_path / "none"))


def test_python_topics(tmp_path, drops):
    (tmp_path / "t.py").write_text("topics = {'a': 'One.\\n\\n' + 'x', 'b': 1}".replace(" + 'x'", ""))
    [document] = topic_documents(drops, file=str(tmp_path / "t.py"))
    assert document.id == "python-docs/a/00" and document.text.strip() == "One."
    assert [d[0] for d in drops] == ["python-docs/b"]
    with pytest.raises(UserError, match="comes without its help topics"):
        topic_documents(drops, file=str(tmp_path / "none.py"))
