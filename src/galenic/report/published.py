"""The 22 rows of the Baichuan-M1 report and the numbers it publishes for them (arXiv 2502.12671, tables 3 to 5).

They are its authors' own: at most 1,000 sampled questions a row, free text scored by a language model. What is measured
here, with another sample and other judges, stands beside them and is not ranked against them.
"""

MODELS = (
    "Baichuan-M1-14B-Instruct",
    "Qwen2.5-14B-Instruct",
    "Qwen2.5-72B-Instruct",
    "claude-3.5-sonnet-20241022",
    "gpt-4o-2024-05-13",
)
"""Whose numbers were published, in the order of the tables."""
AVERAGE = (72.23, 65.39, 70.51, 74.85, 75.00)
"""As printed; the plain means of the rows are within 0.01 of them."""

ROWS: dict[str, tuple[float, ...]] = {
    "CMBClin": (77.40, 71.51, 75.36, 78.37, 75.36),
    "ClinicalBench-Diagnosis": (70.90, 68.85, 72.23, 75.00, 73.05),
    "ClinicalBench-Department": (70.05, 68.83, 70.53, 65.58, 69.38),
    "ClinicalBench-Treatment": (56.38, 55.03, 57.30, 64.03, 59.35),
    "RareArena-rdc": (81.80, 66.40, 76.20, 89.60, 88.40),
    "RareArena-rds": (54.00, 42.60, 49.80, 59.80, 57.20),
    "RareBench": (59.60, 52.80, 60.60, 65.30, 62.80),
    "NEJMQA": (49.75, 45.69, 50.76, 69.54, 54.31),
    "CMExam": (80.10, 77.70, 82.70, 77.50, 78.00),
    "Erke": (78.48, 74.68, 84.81, 76.58, 78.48),
    "Neike": (83.42, 86.10, 87.17, 87.70, 83.42),
    "Quanke": (87.07, 88.44, 88.44, 81.63, 84.35),
    "USMLE": (78.00, 67.20, 76.70, 85.90, 87.10),
    "MedBullets": (66.88, 54.22, 64.29, 72.40, 75.97),
    "MediQ": (83.40, 66.80, 79.90, 88.80, 90.20),
    "PubMedQA": (75.20, 76.40, 75.60, 77.00, 77.60),
    "ReDis-QA": (74.50, 69.70, 75.00, 83.20, 82.80),
    "MedNLI-Dis": (80.40, 68.90, 74.90, 58.30, 79.80),
    "MedCalc": (56.00, 31.40, 37.90, 52.60, 49.00),
    "MMLU-anatomy": (80.00, 67.41, 71.11, 86.67, 91.11),
    "MMLU-virology": (54.82, 56.02, 53.01, 54.22, 57.23),
    "MMLU-genetics": (91.00, 82.00, 87.00, 97.00, 95.00),
}
"""Row -> one score a model, in percent."""
