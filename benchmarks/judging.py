"""How far a judge can be trusted on answers of which it is known what they say.

    python benchmarks/judging.py --base-url http://127.0.0.1:8000/v1 --model NAME [--json plain] [--out runs/judging]

Forty answers to questions with options (a letter, an option's text, a choice that takes another one back, or none) go
to the prompt `mcq`, forty to questions with a known answer (its words, its words in a sentence, another one, none) to
`correct`. The task needs no medicine: a judge that fails here reads badly or cannot keep to a form. Prints the table of
docs/evaluation-judge.md.
"""

import argparse
from typing import Any

from galenic.corpus.synthesis.synthesise_config import EndpointConfig
from galenic.evaluate.judging import Judge, JudgeConfig, summary
from galenic.runtime import UserError

DRUGS = "aspirin heparin warfarin metformin insulin digoxin furosemide amoxicillin".split()
REASONS = (
    "a stent,a swollen leg,palpitations,diabetes,oedema,a sore throat,dyspnoea,fever,thirst,a clot".split(",")
)


def chosen(n: int) -> dict[str, Any]:
    """Returns an answer to a question with options, and which it chose."""
    options, place = [DRUGS[(n + i) % len(DRUGS)] for i in range(4)], n * 7 % 4
    letter, text, other = "ABCD"[place], options[place], options[(place + 1) % 4]
    answer = (
        f"The answer is {letter}.",
        f"I would give {text}.",
        f"At first I thought of {other}, but no: {letter}, {text}.",
        "I do not know.",
    )[n % 4]
    question = f"Which drug for {REASONS[n % len(REASONS)]}?"
    rule = None if n % 4 == 3 else letter
    return {
        "prompt": "mcq",
        "question": question,
        "options": options,
        "answer": answer,
        "truth": letter,
        "rule": rule,
    }


def answered(n: int) -> dict[str, Any]:
    """Returns an answer to a question, and whether it says the right thing."""
    right, wrong = DRUGS[n % len(DRUGS)], DRUGS[(n + 3) % len(DRUGS)]
    answer = (right, f"That would be {right}, I think.", f"It was {wrong}.", "I do not know.")[n % 4]
    question = f"What was patient {n} given for {REASONS[n % len(REASONS)]}?"
    return {
        "prompt": "correct",
        "question": question,
        "answer": answer,
        "truth": right,
        "rule": int(n % 4 < 2),
    }


def shown(found: dict[str, Any] | None) -> str:
    """Writes a share with its interval."""
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else "-"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key-env", default="")
    parser.add_argument("--json", default="find-out", choices=["find-out", "schema", "object", "plain"])
    parser.add_argument("--out", default="runs/judging")
    given = parser.parse_args()
    endpoint = EndpointConfig(
        base_url=given.base_url,
        model=given.model,
        api_key_env=given.api_key_env,
        max_tokens=256,
        concurrency=4,
    )
    print("| prompt | unusable | agreement with what is known | kappa | with itself in another order |")
    print("|---|---|---|---|---|")
    for make in (chosen, answered):
        items = [{"id": str(n), **make(n)} for n in range(40)]
        config = JudgeConfig(endpoint=endpoint, json=given.json, swapped_share=0.5)
        name = items[0]["prompt"]
        try:
            found = summary(items, Judge(config, f"{given.out}/{given.json}").judge(items))[name]
        except UserError as error:
            print(f"| `{name}` | {error} | | | |")
            continue
        columns = (found["unusable"], found["rule"], found["rule"] and found["rule"]["kappa"], found["order"])
        print(f"| `{name}` | {' | '.join(map(shown, columns))} |")
        print(f"    {found['rule'] and found['rule']['confusion']}, unusable: {found['unusable']['reasons']}")


if __name__ == "__main__":
    main()
