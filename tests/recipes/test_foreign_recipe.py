"""The chain of recipes/smollm2 on a toy Llama: experts (whole and LoRA), merges, flattening, evaluation, report."""

import json
from pathlib import Path

import pytest
import yaml

from galenic import build
from galenic.model.foreign import load_any
from galenic.runtime import read_json

ROOT = Path(__file__).parents[2]
KINDS = ("recall", "transfer", "translation", "arithmetic", "code")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def question(kind, number):
    return {
        "id": f"{kind}-{number}",
        "question": f"What follows {kind} {number}?",
        "options": [f"fever {number}", "cough", "pain in the lung", "a drug"],
        "answer": number % 4,
    }


@pytest.fixture
def corpus(tmp_path):
    """What the chain reads of a corpus step: conversations and questions."""
    folder = tmp_path / "corpus"
    for task in ("medical", "dialogue", "reasoning"):
        talks = [
            {
                "messages": [
                    {"role": "user", "content": f"{task} {n % 7}?"},
                    {"role": "assistant", "content": f"{'cough' if n % 2 else 'fever'} {task}."},
                ]
            }
            for n in range(30)
        ]
        write_rows(folder / "sft" / f"{task}.train.jsonl", talks)
        write_rows(folder / "sft" / f"{task}.heldout.jsonl", talks[:8])
    for kind in KINDS:
        write_rows(folder / "questions" / f"{kind}.jsonl", [question(kind, n) for n in range(4)])
    return folder


def tiny(values, corpus, llama_folder):
    """Puts the toy's places and budgets into a step of the real recipe."""
    text = json.dumps(values).replace("RUN/10-corpus", str(corpus))
    values = json.loads(text.replace("RUN/20-convert/model", str(llama_folder)))
    budgets = {
        "tokens": 1280,
        "context": 128,
        "rows": 2,
        "train_tokens": 512,
        "heldout_tokens": 256,
        "row_length": 64,
        "probes": 2,
        "trace_rows": 1,
    }
    # What is a token budget in one step is a folder in another.
    values |= {key: value for key, value in budgets.items() if isinstance(values.get(key), int)}
    if "layers" in values:
        values["layers"] = ["*.0.mlp.*", "*.1.mlp.*"]  # the last two of the toy
    if "optim" in values:
        values["optim"]["lr"] = 3e-3
    return values


@pytest.fixture
def recipe(tmp_path, corpus, llama_folder):
    folder = tmp_path / "smollm2"
    folder.mkdir()
    for file in sorted((ROOT / "recipes" / "smollm2").glob("[4-8]*.yaml")):
        values = tiny(yaml.safe_load(file.read_text()), corpus, llama_folder)
        if file.stem == "80-report":
            del values["corpus"]
            values["recipe"] = str(folder)
        (folder / file.name).write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


def test_the_whole_chain(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    build.build(recipe, run)
    assert (run / "43-sft-reasoning" / "model" / "adapter_model.safetensors").exists()
    norms = read_json(run / "50-merge-metagpt" / "merge.json")["norms"]
    assert len(norms) == 3 and all(norm > 0 for norm in norms.values())
    flat = read_json(run / "60-flatten" / "flatten.json")
    assert len(flat["layers"]) == 6 and flat["trace"]["before"]["probes"] == 2
    results = read_json(run / "70-evaluate" / "results.json")
    assert next(iter(results["models"])) == "base" and len(results["models"]) == 11
    for model in results["models"].values():
        assert set(model["answers"]) == {"medical", "dialogue", "reasoning"}
        assert set(model["accuracy"]) == set(KINDS)
    base, reasoning = (results["models"][n]["answers"]["reasoning"] for n in ("base", "reasoning"))
    assert reasoning["bits_per_byte"] < base["bits_per_byte"]  # the adapter is on
    page = (run / "80-report" / "report.html").read_text()
    assert "Galenic on SmolLM2" in page and "reasoning" in page
    load_any(run / "60-flatten" / "model")
    before = (run / "80-report" / "report.html").stat().st_mtime_ns
    build.build(recipe, run)  # nothing is done twice
    assert (run / "80-report" / "report.html").stat().st_mtime_ns == before


def test_the_recipe_itself_is_well_formed(tmp_path):
    steps = build.read_recipe(ROOT / "recipes" / "smollm2", tmp_path / "run")
    assert [step.name for step in steps][:2] == ["10-corpus", "20-convert"]
    lora = {step.name: step.config.lora for step in steps if step.verb == "sft"}
    assert [name for name, value in lora.items() if value] == ["43-sft-reasoning"]
    evaluate = next(step.config for step in steps if step.verb == "evaluate")
    adapter = f"{tmp_path}/run/20-convert/model+{tmp_path}/run/43-sft-reasoning/model"
    assert evaluate.models["reasoning"] == adapter
