"""lm-evaluation-harness' `hf` model on an exported folder: its likelihoods and texts are ours."""

import json

import numpy as np
import pytest
import torch
import yaml
from parity_helpers import ANSWERS, drive

from galenic.model import load, load_tokenizer

pytestmark = pytest.mark.parity
FRAME = "<B_SYS>You are a helpful assistant.<C_Q>{}<C_A>"


def write_tasks(folder) -> None:
    folder.mkdir()
    rows = [
        {"text": FRAME.format(question), "options": list(ANSWERS.values()), "gold": index}
        for index, question in enumerate(ANSWERS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
    }
    choices = {"task": "choices", "output_type": "multiple_choice", "doc_to_choice": "options"}
    choices |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}]}
    answers = {"task": "answers", "output_type": "generate_until", "doc_to_target": "{{options[gold]}}"}
    answers |= {"generation_kwargs": {"until": ["</s>"], "max_gen_toks": 24, "do_sample": False}}
    answers |= {"metric_list": [{"metric": "exact_match"}]}
    for task in (choices, answers):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))


@torch.no_grad()
def our_score(model, tokenizer, context: str, continuation: str) -> float:
    given, whole = (
        tokenizer.encode(text, add_special_tokens=False) for text in (context, context + continuation)
    )
    assert whole[: len(given)] == given and len(whole) > len(given)
    scores = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    return sum(scores[i - 1, whole[i]].item() for i in range(len(given), len(whole)))


def test_likelihoods_and_texts_are_ours(chat_folder, tmp_path):
    write_tasks(tmp_path / "tasks")
    job = {"folder": chat_folder, "tasks": tmp_path / "tasks", "batch": 4}
    theirs = drive("newest", "with_lm_eval", tmp_path / "lm_eval", **job)
    model, tokenizer = load(chat_folder), load_tokenizer(chat_folder)
    assert theirs["scores"].shape == (9,)
    ours = [our_score(model, tokenizer, *pair) for pair in theirs["asked"].tolist()]
    difference = np.abs(theirs["scores"] - ours).max()
    print(f"log-likelihoods {theirs['scores'].round(3).tolist()}, largest difference {difference:.1e}")
    assert difference < 1e-4 and theirs["accuracy"] == 1
    written = dict(theirs["written"].tolist())
    assert written == {FRAME.format(question): answer for question, answer in ANSWERS.items()}
