"""Our model for lm-evaluation-harness against its own `hf` model, and the report's rows as its tasks."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from parity_helpers import ANSWERS, ROOT, drive
from test_lm_eval import FRAME, write_tasks

from galenic.evaluate.benchmarks import items
from galenic.evaluate.benchmarks.rows import ROWS

pytestmark = pytest.mark.parity
sys.path.insert(0, str(ROOT / "tests" / "evaluate" / "benchmarks"))
from benchmark_helpers import ANSWERS as RIGHT  # noqa: E402
from benchmark_helpers import PLACES, place  # noqa: E402

WORDS = "fever cough asthma lung heart pain drug dose daily mild severe acute chronic child adult".split()


def pairs() -> list[list[str]]:
    """Prompts with options: of any length, with one token, with spaces at the end, too long, without a prompt."""
    rng = np.random.default_rng(3)
    found = []
    for number in range(12):
        prompt = " ".join(rng.choice(WORDS, int(rng.integers(1, 40)))) + " " * (number % 3 == 0)
        options = [" ".join(rng.choice(WORDS, int(rng.integers(1, 6)))) for _ in range(4)]
        found += [[prompt, option if prompt.endswith(" ") else " " + option] for option in options]
    found += [[" ".join(["lung"] * 700), " fever"], [" ".join(["lung"] * 700), " fever cough mild."]]
    found += [["", "fever cough"], ["What follows fever?", "A"], ["What follows fever?", "B"]]
    found += [[FRAME.format(question), answer] for question, answer in ANSWERS.items()]
    return found


@pytest.fixture(scope="module")
def found(chat_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    write_tasks(folder / "tasks")
    shared = yaml.safe_load((folder / "tasks" / "choices.yaml").read_text())
    no_mean = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    no_mean |= {"task": "perplexity", "metric_list": [{"metric": "bits_per_byte"}]}
    shared.pop("doc_to_choice")
    (folder / "tasks" / "perplexity.yaml").write_text(yaml.safe_dump(shared | no_mean))
    missing = shared | {
        "task": "missing",
        "dataset_kwargs": {"data_files": {"test": str(folder / "none.jsonl")}},
    }
    (folder / "tasks" / "missing.yaml").write_text(yaml.safe_dump(missing))
    rows = [row for row in PLACES if ROWS[row].metric != "judge"]
    written = [[FRAME.format(question), {"until": ["."], "max_gen_toks": 24}] for question in ANSWERS]
    written += [[FRAME.format(question), {"until": [], "max_gen_toks": 5}] for question in ANSWERS]
    model = folder / "model"  # as the chat model, but for a short context
    shutil.copytree(chat_folder, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 96}))
    out = drive(
        "newest",
        "with_galenic_lm",
        folder / "lm_eval",
        src=ROOT / "src",
        folder=model,
        batch=4,
        loglikelihood=pairs(),
        loglikelihood_rolling=[[" ".join(WORDS)], ["fever " * 700], ["cough"]],
        generate_until=written,
        tasks=folder / "tasks",
        rows=Path(items.__file__).parent / "tasks",
        row_tasks=[row.lower().replace("-", "_") for row in rows],
        places={row: place(row) for row in rows},
        answers={"galenic_" + row.lower().replace("-", "_"): RIGHT[row] for row in rows},
        new_tokens=8,
    )
    return out


def test_likelihoods_are_those_of_the_hf_model(found):
    theirs, ours = found["loglikelihood.theirs"], found["loglikelihood.ours"]
    assert theirs.shape == ours.shape == (len(pairs()), 2)
    difference = np.abs(theirs[:, 0] - ours[:, 0]) / np.maximum(1, np.abs(theirs[:, 0]))
    print(f"{len(ours)} log-likelihoods, largest relative difference {difference.max():.1e}")
    assert difference.max() < 1e-4
    assert (theirs[:, 1] == ours[:, 1]).all() and 0 < ours[:, 1].sum() < len(ours)


def test_whole_texts_score_as_with_the_hf_model(found):
    theirs, ours = found["loglikelihood_rolling.theirs"], found["loglikelihood_rolling.ours"]
    assert np.abs(theirs / ours - 1).max() < 1e-4


def test_texts_are_those_of_the_hf_model(found):
    ours = found["generate_until.ours"].tolist()
    assert ours == found["generate_until.theirs"].tolist()
    assert ours[:3] == [answer.removesuffix(".") for answer in ANSWERS.values()] and all(ours[3:])


def test_the_reports_rows_run_as_tasks(found):
    rows = json.loads(str(found["rows"]))
    assert len(rows) == 20 and all(len(lines) >= 2 for lines in rows.values())
    assert found["told"].tolist() == [1.0] * 20  # who says what is right has all the points


def test_tasks_run_through_measure(found):
    numbers, lines = json.loads(str(found["measured"]))
    assert set(numbers) == {"choices", "answers"}
    assert numbers["choices"]["n"] == 2 and numbers["choices"]["metric"] == "acc"
    assert (
        numbers["choices"]["value"] == sum(line["right"] for line in lines if line["kind"] == "choices") / 2
    )
    assert 0 <= numbers["answers"]["low"] <= numbers["answers"]["value"] <= numbers["answers"]["high"] <= 1
    assert len({(line["kind"], line["id"]) for line in lines}) == 4


def test_tasks_that_cannot_be_run_are_refused(found):
    unknown, no_mean, missing = found["refusals"].tolist()
    assert unknown.startswith(
        "UserError: benchmarks.tasks: lm-eval has no task 'choises' (did you mean 'choices'?)"
    )
    assert no_mean.startswith("UserError: benchmarks.tasks: perplexity has no score for each item")
    assert missing.startswith("UserError: benchmarks.tasks: missing cannot be loaded")
