"""The 22 rows of the report's table: what each one is, and the numbers that were published. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MODELS = (
    "Baichuan-M1-14B-Instruct",
    "Qwen2.5-14B-Instruct",
    "Qwen2.5-72B-Instruct",
    "claude-3.5-sonnet-20241022",
    "gpt-4o-2024-05-13",
)
"""Whose numbers were published, in the order of the table."""
AVERAGE = (72.23, 65.39, 70.51, 74.85, 75.00)
"""Published averages; the plain means of the rows are within 0.01 of them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table."""

    metric: Literal["option", "label", "number", "diagnosis", "judge"]
    """How answers are scored: see `scoring`; `judge`: by a model only."""
    language: Literal["en", "zh"]
    """Of the prompt."""
    published: tuple[float, float, float, float, float]
    """Scores in percent of `MODELS`, as the report prints them."""
    size: int | None
    """Items: the smallest number of which all five published scores are shares, where it agrees with what the data set
    has or could have; the report does not say it."""
    source: str
    """Where the data lies."""
    licence: str
    """Of the data, as their authors state it."""
    task: str | None = None
    """lm-eval's own task on the same data, scored by likelihood."""
    judge: str | None = None
    """Judge's prompt; a row with a rule is judged only if there is a judge."""


_MMLU = "MMLU, github.com/hendrycks/test"
_CHINESE = "collected by the report's authors, not published; any file in CMB-Exam's or CMExam's schema"

ROWS: Mapping[str, Row] = {
    "CMBClin": Row(
        metric="judge",
        language="zh",
        published=(77.40, 71.51, 75.36, 78.37, 75.36),
        size=208,  # 832 = 4 x 208: points from 0 to 4
        source="CMB-Clin, github.com/FreedomIntelligence/CMB",
        licence="not checked",
        judge="cmb-clin",
    ),
    "ClinicalBench-Diagnosis": Row(
        metric="diagnosis",
        language="zh",
        published=(70.90, 68.85, 72.23, 75.00, 73.05),
        size=None,
        source="ClinicalBench, github.com/WeixiangYAN/ClinicalLab (on application)",
        licence="its own agreement",
        judge="diagnosis",
    ),
    "ClinicalBench-Department": Row(
        metric="label",
        language="zh",
        published=(70.05, 68.83, 70.53, 65.58, 69.38),
        size=None,
        source="ClinicalBench",
        licence="its own agreement",
    ),
    "ClinicalBench-Treatment": Row(
        metric="judge",
        language="zh",
        published=(56.38, 55.03, 57.30, 64.03, 59.35),
        size=None,
        source="ClinicalBench",
        licence="its own agreement",
        judge="cmb-clin",
    ),
    "RareArena-rdc": Row(
        metric="diagnosis",
        language="en",
        published=(81.80, 66.40, 76.20, 89.60, 88.40),
        size=500,
        source="RareArena RDC.json, github.com/zhao-zy15/RareArena",
        licence="CC BY-NC-SA 4.0",
        judge="diagnosis",
    ),
    "RareArena-rds": Row(
        metric="diagnosis",
        language="en",
        published=(54.00, 42.60, 49.80, 59.80, 57.20),
        size=500,
        source="RareArena RDS.json",
        licence="CC BY-NC-SA 4.0",
        judge="diagnosis",
    ),
    "RareBench": Row(
        metric="diagnosis",
        language="en",
        published=(59.60, 52.80, 60.60, 65.30, 62.80),
        size=1000,
        source="RareBench, huggingface.co/datasets/chenxz/RareBench",
        licence="Apache-2.0",
        judge="diagnosis",
    ),
    "NEJMQA": Row(
        metric="diagnosis",
        language="en",
        published=(49.75, 45.69, 50.76, 69.54, 54.31),
        size=197,
        source="made by the report's authors of NEJM's case challenges, not published",
        licence="NEJM's copyright",
        judge="diagnosis",
    ),
    "CMExam": Row(
        metric="option",
        language="zh",
        published=(80.10, 77.70, 82.70, 77.50, 78.00),
        size=1000,
        source="CMExam, github.com/williamliujl/CMExam",
        licence="not checked",
    ),
    "Erke": Row(
        metric="option",
        language="zh",
        published=(78.48, 74.68, 84.81, 76.58, 78.48),
        size=158,
        source=_CHINESE,
        licence="unknown",
    ),
    "Neike": Row(
        metric="option",
        language="zh",
        published=(83.42, 86.10, 87.17, 87.70, 83.42),
        size=187,
        source=_CHINESE,
        licence="unknown",
    ),
    "Quanke": Row(
        metric="option",
        language="zh",
        published=(87.07, 88.44, 88.44, 81.63, 84.35),
        size=147,
        source=_CHINESE,
        licence="unknown",
    ),
    "USMLE": Row(
        metric="option",
        language="en",
        published=(78.00, 67.20, 76.70, 85.90, 87.10),
        size=1000,
        source="MedQA (US), github.com/jind11/MedQA",
        licence="MIT",
        task="medqa_4options",
    ),
    "MedBullets": Row(
        metric="option",
        language="en",
        published=(66.88, 54.22, 64.29, 72.40, 75.97),
        size=308,
        source="medbullets_op4.csv or _op5.csv, github.com/HanjieChen/ChallengeClinicalQA",
        licence="none stated",
    ),
    "MediQ": Row(
        metric="option",
        language="en",
        published=(83.40, 66.80, 79.90, 88.80, 90.20),
        size=1000,
        source="MediQ (iMedQA), github.com/stellalisy/mediQ",
        licence="not checked",
    ),
    "PubMedQA": Row(
        metric="label",
        language="en",
        published=(75.20, 76.40, 75.60, 77.00, 77.60),
        size=500,
        source="PubMedQA PQA-L, github.com/pubmedqa/pubmedqa",
        licence="MIT",
        task="pubmedqa",
    ),
    "ReDis-QA": Row(
        metric="option",
        language="en",
        published=(74.50, 69.70, 75.00, 83.20, 82.80),
        size=1000,
        source="ReDis-QA, huggingface.co/datasets/guan-wang/ReDis-QA",
        licence="Apache-2.0",
    ),
    "MedNLI-Dis": Row(
        metric="label",
        language="en",
        published=(80.40, 68.90, 74.90, 58.30, 79.80),
        size=1000,
        source="MedNLI mli_test_v1.jsonl, physionet.org/content/mednli",
        licence="PhysioNet credentialed access",
    ),
    "MedCalc": Row(
        metric="number",
        language="en",
        published=(56.00, 31.40, 37.90, 52.60, 49.00),
        size=1000,
        source="MedCalc-Bench test_data.csv, github.com/ncbi-nlp/MedCalc-Bench",
        licence="CC BY-SA 4.0",
    ),
    "MMLU-anatomy": Row(
        metric="option",
        language="en",
        published=(80.00, 67.41, 71.11, 86.67, 91.11),
        size=135,
        source=_MMLU,
        licence="MIT",
        task="mmlu_anatomy",
    ),
    "MMLU-virology": Row(
        metric="option",
        language="en",
        published=(54.82, 56.02, 53.01, 54.22, 57.23),
        size=166,
        source=_MMLU,
        licence="MIT",
        task="mmlu_virology",
    ),
    "MMLU-genetics": Row(
        metric="option",
        language="en",
        published=(91.00, 82.00, 87.00, 97.00, 95.00),
        size=100,
        source=_MMLU,
        licence="MIT",
        task="mmlu_medical_genetics",
    ),
}
"""Name -> row, in the order of the table."""
