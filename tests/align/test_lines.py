"""Lines of tasks and pairs are named by their place in the file, blank lines included."""

import json

import pytest

from galenic.align.pairs import read_pairs
from galenic.align.tasks import read_tasks
from galenic.model import load_tokenizer
from galenic.runtime import UserError

TASK = {"prompt": "What follows fever?", "answer": "cough"}
PAIR = {"prompt": "What follows fever?", "chosen": "cough", "rejected": "pain"}


@pytest.mark.parametrize("bad", ["{", "[1]", "{}"])
def test_a_bad_line_has_its_number_in_the_file(tokenizer_step, tmp_path, bad):
    tokenizer, path = load_tokenizer(tokenizer_step), tmp_path / "x.jsonl"
    for row, read in ((TASK, read_tasks), (PAIR, lambda path: read_pairs(path, tokenizer, 64))):
        path.write_text(f"\n{json.dumps(row)}\n\n  \n{bad}\n")
        with pytest.raises(UserError, match=r"x.jsonl:5: "):
            read(str(path))


def test_a_task_is_named_by_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"\n{json.dumps(TASK)}\n\n{json.dumps(TASK)}\n")
    assert [task.id for task in read_tasks(str(path))] == ["x.jsonl:2", "x.jsonl:4"]
