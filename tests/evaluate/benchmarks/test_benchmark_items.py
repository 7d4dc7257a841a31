"""Items of every row from its fixture, in the data set's own schema; what is wrong is told by file and line."""

import json
import re
import shutil

import pytest
from benchmark_helpers import ANSWERS, FIXTURES, PLACES, place

from galenic.evaluate.benchmarks import items
from galenic.evaluate.benchmarks.rows import AVERAGE, MODELS, ROWS
from galenic.runtime import UserError


def test_the_table_is_the_reports():
    assert list(PLACES) == list(ROWS) and len(ROWS) == 22
    for column in range(len(MODELS)):
        mean = sum(row.published[column] for row in ROWS.values()) / 22
        assert abs(mean - AVERAGE[column]) < 0.011


def test_sizes_explain_the_published_numbers():
    for name, row in ROWS.items():
        if row.size is not None:
            parts = row.size * (4 if name == "CMBClin" else 1)
            for published in row.published:
                assert any(
                    abs(100 * count / parts - published) < 0.0051
                    for count in (int(published * parts / 100), int(published * parts / 100) + 1)
                ), name


@pytest.mark.parametrize("row", PLACES)
def test_right_answers_are_right_and_others_are_wrong(row):
    found = items.load(row, place(row))
    assert len({item.id for item in found}) == len(found) >= 2
    for number, item in enumerate(found):
        assert item.question and not re.search(r"\{[a-z_]+\}", item.prompt), item.prompt
        if ROWS[row].metric == "judge":
            assert item.kind == "judge" and item.answer[0]
            with pytest.raises(ValueError, match="no rule"):
                items.score(item, "anything")
            continue
        assert items.score(item, ANSWERS[row][number]).right == 1.0, (item, ANSWERS[row][number])
        assert items.score(item, ANSWERS[row][number - 1]).right == 0.0
        assert items.score(item, "I cannot tell.\n\n我不知道。").right == 0.0
        assert not any(answer in item.prompt for answer in item.answer if item.kind == "diagnosis")


def test_prompts_show_what_the_row_is_about():
    def first(row):
        return items.load(row, place(row))[0].prompt

    assert "Which drug relieves it at once?\nA. Ramipril\nB. Salbutamol\n" in first("USMLE")
    assert "itching eyes every May. He sneezes a lot. He has no fever.\nWhich" in first("MediQ")
    assert "消化内科" in first("ClinicalBench-Department") and "轻压痛" not in first(
        "ClinicalBench-Department"
    )
    assert "轻压痛" in first("ClinicalBench-Diagnosis") and "急性胃炎" not in first("ClinicalBench-Diagnosis")
    assert "ceruloplasmin" in first("RareArena-rdc") and "ceruloplasmin" not in first("RareArena-rds")
    assert "Tremor; Jaundice" in first("RareBench") and "rare diseases only" in first("RareBench")
    assert "rare" not in first("NEJMQA")
    assert "yes, no or maybe" in first("PubMedQA") and "lower pressure" in first("PubMedQA")
    assert "The final answer is: " in first("MedCalc")
    several = items.load("CMExam", place("CMExam"))
    assert "唯一正确选项" in several[0].prompt and "所有正确选项" in several[1].prompt
    clinical = items.load("CMBClin", place("CMBClin"))
    assert [item.id for item in clinical] == ["0/0", "0/1", "1/0"]
    assert "转移性右下腹痛12小时" in clinical[1].prompt and "简述治疗原则" in clinical[1].prompt


def test_other_forms_of_the_same_data(tmp_path):
    plain = items.load("USMLE", place("USMLE"))
    rows = [json.loads(line) for line in open(place("USMLE"))]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert items.load("USMLE", str(tmp_path / "list.json")) == plain
    (tmp_path / "parts").mkdir()
    for number, row in enumerate(rows):
        (tmp_path / "parts" / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    assert items.load("USMLE", str(tmp_path / "parts")) == plain
    import pyarrow as pa
    import pyarrow.parquet as parquet

    hub = [
        {
            "pubid": 7,
            "question": "Is it so?",
            "context": {"contexts": ["It is.", "Very."], "labels": ["A", "B"]},
            "long_answer": "Yes.",
            "final_decision": "yes",
        }
    ]
    parquet.write_table(pa.Table.from_pylist(hub), tmp_path / "hub.parquet")
    (item,) = items.load("PubMedQA", str(tmp_path / "hub.parquet"))
    assert item.id == "7" and "It is.\nVery." in item.prompt and item.answer == ("yes",)
    with_header = tmp_path / "header.csv"
    with_header.write_text("question,A,B,C,D,answer\n" + (FIXTURES / "mmlu_anatomy_test.csv").read_text())
    assert [i.prompt for i in items.load("MMLU-anatomy", str(with_header))] == [
        i.prompt for i in items.load("MMLU-anatomy", place("MMLU-anatomy"))
    ]


BROKEN = [
    ("USMLE", "answer_idx", "E", r"medqa.jsonl:2: 'answer_idx' must be of the options A, B, C, D, got 'E'"),
    ("USMLE", "question", None, r"medqa.jsonl:2: 'question' is missing or empty; there are: "),
    ("USMLE", "options", "A or B", r"medqa.jsonl:2: 'options' must be an object"),
    ("ReDis-QA", "cop", 4, r"redis_qa.jsonl:2: 'cop' must be the index of the right option, 0 to 3, got 4"),
    ("MMLU-virology", "answer", -1, r"mmlu_virology.jsonl:2: 'answer' must be the index"),
    ("MMLU-virology", "answer", True, r"mmlu_virology.jsonl:2: 'answer' must be the index"),
    ("MedNLI-Dis", "gold_label", "-", r"mli_test_v1.jsonl:2: 'gold_label' must be entailment, contradiction"),
    ("MediQ", "context", 3, r"mediq.jsonl:2: 'context' must be a list of sentences"),
    ("RareArena-rdc", "test_results", "", r"RDC.json:2: 'test_results' is missing or empty"),
    ("NEJMQA", "answer", " ", r"nejmqa.jsonl:2: 'answer' is missing or empty"),
]


@pytest.mark.parametrize("row, column, value, said", BROKEN)
def test_what_is_wrong_is_told_by_file_and_line(row, column, value, said, tmp_path):
    file = tmp_path / PLACES[row]
    rows = [json.loads(line) for line in open(place(row))]
    rows[1][column] = value
    file.write_text("".join(json.dumps(line) + "\n" for line in rows))
    with pytest.raises(UserError, match=said):
        items.load(row, str(file))


def test_tables_with_mistakes(tmp_path):
    text = (FIXTURES / "medcalc_test.csv").read_text()
    for old, new, said in (
        (
            "20.0,19.0,21.0",
            "20.0,21.0,22.0",
            r"file.csv:2: the answer 20.0 is not inside its limits \[21, 22\]",
        ),
        ("20.0,19.0,21.0", "many,19.0,21.0", r"file.csv:2: answer and limits must be numbers, got 'many'"),
        ("10/08/2021,10/08", "soon,10/08", r"file.csv:4: 'Ground Truth Answer' must be a date, got 'soon'"),
        ("Patient Note", "Note", r"file.csv:2: 'Patient Note' is missing or empty"),
        ("20.0,19.0,21.0", "20.0,19.0", r"file.csv:2: 13 columns, not 14"),
    ):
        assert old in text
        (tmp_path / "file.csv").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=said):
            items.load("MedCalc", str(tmp_path / "file.csv"))
    text = (FIXTURES / "medbullets_op4.csv").read_text().replace(",B,Croup", ",F,Croup")
    (tmp_path / "file.csv").write_text(text)
    with pytest.raises(
        UserError, match=r"file.csv:6: 'answer_idx' must be of the options"
    ):  # a cell has lines
        items.load("MedBullets", str(tmp_path / "file.csv"))


def test_files_that_cannot_be_read(tmp_path):
    def refused(said, row="USMLE", name=None, text=None):
        file = tmp_path / (name or "none.jsonl")
        if text is not None:
            file.write_text(text)
        with pytest.raises(UserError, match=said):
            items.load(row, str(file), f"benchmarks.rows.{row}")

    refused("benchmarks.rows.USMLE: .*none.jsonl is no file and no folder of")
    refused("benchmarks.rows.USMLE: there are no items in .*empty.jsonl", name="empty.jsonl", text="\n\n")
    refused("there are no items in", name="empty.json", text="[]")
    refused("empty.csv", name="empty.csv", text="")
    refused("broken.jsonl:1: not valid JSON", name="broken.jsonl", text="{")
    refused("list.jsonl:1: expected a JSON object, got list", name="list.jsonl", text="[]\n")
    refused("list.json: item 2 is no JSON object but a int", name="list.json", text="[{}, 3]")
    refused("table.xlsx does not end in", name="table.xlsx", text="x")
    refused("there are no items of this row", "ClinicalBench-Diagnosis", "en.json", '[{"language": "en"}]')
    shutil.copy(FIXTURES / "rarebench" / "HMS.jsonl", tmp_path / "HMS.jsonl")
    refused("RareBench's codes need its mapping/phenotype_mapping.json", "RareBench", "HMS.jsonl")
