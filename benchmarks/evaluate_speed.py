"""Questions a second of multiple choice: our scorer against lm-evaluation-harness' own `hf` model, the same answers.

    python benchmarks/evaluate_speed.py MODEL QUESTIONS [--per-kind 300] [--turns 7] [--batches 8 32 128]
        [--tokens 8192] [--threads 1] [--out FILE.json]

MODEL is a model folder, QUESTIONS a folder of <kind>.jsonl files such as RUN/10-corpus/questions. Both answer the same
requests of lm-eval (`Question: ...` newline `Answer:` and each option) through the same function of its interface, from
text to log-likelihoods, in turns within one process. `hf` is given several batch sizes; the fastest counts. Both have
to give the same log-likelihoods (largest relative difference 1e-4) and pick the same options, by the sum and by its
quotient with the option's length, or nothing is printed.

Needs lm-eval beside what Galenic needs: pip install 'galenic[eval]'.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from time import perf_counter

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from timing import median_interval, processor, ratios, take_turns

from galenic.evaluate.benchmarks.lm import GalenicLM
from galenic.evaluate.inputs import read_questions, sample
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any


def load(folder: Path, per_kind: int) -> dict[str, list[dict]]:
    kinds = {file.stem: read_questions(file) for file in sorted(folder.glob("*.jsonl"))}
    return {kind: sample(rows, [row["id"] for row in rows], per_kind, 0) for kind, rows in kinds.items()}


def requests(questions: list[dict]) -> list[Instance]:
    return [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(f"Question: {row['question']}\nAnswer:", f" {option}"),
            idx=place,
        )
        for row in questions
        for place, option in enumerate(row["options"])
    ]


def picks(scores: list[tuple[float, bool]], questions: list[dict]) -> list[tuple[int, int]]:
    """The options picked by log-likelihood and by log-likelihood a byte."""
    found, place = [], 0
    for row in questions:
        options = row["options"]
        values = [value for value, _ in scores[place : place + len(options)]]
        place += len(options)
        each = [value / len(option.encode()) for value, option in zip(values, options, strict=True)]
        found.append((values.index(max(values)), each.index(max(each))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--per-kind", type=int, default=300)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--tokens", type=int, default=8192, help="of one pass of ours")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    kinds = load(args.questions, args.per_kind)
    questions = [row for rows in kinds.values() for row in rows]
    asked = requests(questions)
    model, tokenizer = load_any(args.model), load_tokenizer(args.model)
    lms: dict = {"galenic": GalenicLM(model, tokenizer, add_bos=False, batch_tokens=args.tokens)}
    theirs = HFLM(pretrained=args.model, trust_remote_code=True, dtype="float32", device="cpu", batch_size=1)
    lms |= {f"hf, batch {size}": theirs for size in args.batches}
    scores: dict[str, list[tuple[float, bool]]] = {}

    def contender(name: str):
        def work() -> float:
            if name != "galenic":
                theirs.batch_size_per_gpu = int(name.split()[-1])
            start = perf_counter()
            scores[name] = lms[name].loglikelihood(asked, disable_tqdm=True)
            return perf_counter() - start

        return work

    times = take_turns({name: contender(name) for name in lms}, args.turns)
    ours, largest = scores["galenic"], 0.0
    for name in lms:
        largest = max(
            largest,
            *(abs(a - b) / max(1.0, abs(b)) for (a, _), (b, _) in zip(ours, scores[name], strict=True)),
        )
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in scores[name]], name
        assert picks(ours, questions) == picks(scores[name], questions), f"{name} picks other options"
    assert largest < 1e-4, f"log-likelihoods differ by {largest:.1e}"

    fastest = min((name for name in lms if name != "galenic"), key=lambda n: median_interval(times[n]).median)
    print(f"{processor()}, {args.threads} thread(s), torch {torch.__version__}, {date.today()}")
    told = ", ".join(f"{len(rows)} {kind}" for kind, rows in kinds.items())
    print(
        f"{len(questions)} questions ({told}), {args.turns} turns; same picks, largest difference {largest:.1e}\n"
    )
    print("| scorer | questions a second | 95% interval |\n|---|---|---|")
    rows = {}
    for name, seconds in times.items():
        found = median_interval([len(questions) / second for second in seconds])
        rows[name] = found._asdict()
        print(f"| {name} | {found.median:.1f} | {found.low:.1f} to {found.high:.1f} |")
    gain = ratios(times[fastest], times["galenic"])
    print(f"\ngalenic is {gain.median:.2f} times as fast as {fastest} ({gain.low:.2f} to {gain.high:.2f})")
    if args.out:
        result = {"rows": rows, "gain": gain._asdict(), "over": fastest, "questions": len(questions)}
        Path(args.out).write_text(json.dumps(result | {"times": times}, indent=1))


if __name__ == "__main__":
    main()
