"""Fixtures of every row: where they lie, and for each item an answer that is right.

All items were written for these tests; only their schemas are the data sets'.
"""

from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"

PLACES = {
    "CMBClin": "cmb_clin.json",
    "ClinicalBench-Diagnosis": "clinicalbench.json",
    "ClinicalBench-Department": "clinicalbench.json",
    "ClinicalBench-Treatment": "clinicalbench.json",
    "RareArena-rdc": "RDC.json",
    "RareArena-rds": "RDS.json",
    "RareBench": "rarebench",
    "NEJMQA": "nejmqa.jsonl",
    "CMExam": "cmexam_test.csv",
    "Erke": "erke.json",
    "Neike": "neike.json",
    "Quanke": "quanke.json",
    "USMLE": "medqa.jsonl",
    "MedBullets": "medbullets_op4.csv",
    "MediQ": "mediq.jsonl",
    "PubMedQA": "ori_pqal.json",
    "ReDis-QA": "redis_qa.jsonl",
    "MedNLI-Dis": "mli_test_v1.jsonl",
    "MedCalc": "medcalc_test.csv",
    "MMLU-anatomy": "mmlu_anatomy_test.csv",
    "MMLU-virology": "mmlu_virology.jsonl",
    "MMLU-genetics": "mmlu_genetics.jsonl",
}
ANSWERS = {
    "ClinicalBench-Diagnosis": ["急性胃炎", "诊断：支气管哮喘", "肺炎"],
    "ClinicalBench-Department": ["消化内科", "应去儿科就诊。", "答案：内科"],
    "RareArena-rdc": ["1. Wilson disease\n2. Hepatitis", "1. Homocystinuria\n2. Marfan syndrome"],
    "RareArena-rds": ["1. Hepatitis\n2. Wilson's disease (rare)\n3. Wilson disease", "1. Marfan's syndrome"],
    "RareBench": ["1. Hepatolenticular degeneration", "1. Stickler syndrome\n2. Marfan syndrome"],
    "NEJMQA": ["1. Pericarditis\n2. Infarction, myocardial", "1. Bacterial meningitis\n2. Sepsis"],
    "CMExam": ["坏血病由维生素C缺乏引起。\n答案：A", "答案：ABC"],
    "Erke": ["答案：C", "D. 36.5℃"],
    "Neike": ["正确答案是A。", "答案：D"],
    "Quanke": ["故选B。", "答案：D"],
    "USMLE": ["Salbutamol widens the airways.\nThe answer is B", "The answer is (C).", "**D**"],
    "MedBullets": ["The answer is A", "Croup."],
    "MediQ": ["The answer is A", "Answer: C"],
    "PubMedQA": ["The pressure was lower.\nThe answer is yes", "No."],
    "ReDis-QA": ["The answer is A", "The answer is D"],
    "MedNLI-Dis": ["entailment", "Contradiction", "The answer is neutral"],
    "MedCalc": [
        "80 / 4 = 20\nThe final answer is: 20",
        "The final answer is: 4",
        "The final answer is: 10/08/2021",
        "The final answer is: 17 weeks, 4 days",
    ],
    "MMLU-anatomy": ["The answer is B", "The answer is C"],
    "MMLU-virology": ["The answer is A", "The answer is D"],
    "MMLU-genetics": ["The answer is B", "The answer is C"],
}
"""Right answers to the items of each fixture, in their order; rows that only a judge scores have none."""


def place(row: str) -> str:
    return str(FIXTURES / PLACES[row])
