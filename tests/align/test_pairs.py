"""Preference pairs: what a line becomes, what is refused, and batches that follow from their step alone."""

import json

import numpy as np
import pytest
import torch
from pair_helpers import drawn_pairs, question, write_pairs

from galenic.align.pairs import (
    Pairs,
    collate_pairs,
    encode_answered,
    in_order,
    in_turn,
    read_pairs,
    set_aside,
)
from galenic.model import load_tokenizer
from galenic.runtime import UserError


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_line_becomes_two_texts_that_share_their_prompt(tokenizer_step, tmp_path):
    tokenizer = load_tokenizer(tokenizer_step)
    messages = [{"role": "user", "content": "fever"}, {"role": "assistant", "content": "cough"}]
    messages += [{"role": "user", "content": "asthma?"}]
    path = written(
        tmp_path / "pairs.jsonl",
        {"prompt": "fever?", "chosen": "mild.", "rejected": "severe."},
        {"prompt": messages, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b", "margin": 2},
    )
    (one, two), dropped = read_pairs(path, tokenizer, 64)
    assert dropped == {} and (one.id, two.id) == ("pairs.jsonl:1", "pairs.jsonl:2")
    assert one.chosen[: one.prompt] == one.rejected[: one.prompt]
    assert tokenizer.decode(one.chosen[one.prompt :]) == "mild.</s>"
    assert tokenizer.decode(one.rejected[one.prompt :]) == "severe.</s>"
    assert (one.margin, two.margin) == (0.0, 2.0)
    assert tokenizer.decode(two.chosen[: two.prompt]).endswith("<C_Q>fever<C_A>cough</s><C_Q>asthma?<C_A>")


def test_an_answer_ends_with_its_turn_whatever_a_template_puts_behind_it(llama_folder, tmp_path):
    tokenizer = load_tokenizer(llama_folder)
    path = written(tmp_path / "p.jsonl", {"prompt": "fever?", "chosen": "mild.", "rejected": "severe."})
    (pair,), _ = read_pairs(path, tokenizer, 128)
    assert tokenizer.decode(pair.chosen[pair.prompt :]) == "mild.<|im_end|>"  # no line break
    with pytest.raises(ValueError, match="the last message is not the assistant's"):
        encode_answered(tokenizer, [{"role": "user", "content": "fever?"}])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": " a\n"}, "chosen and rejected are the same"),
        ({"prompt": "x", "chosen": "a"}, "no rejected"),
        ({"prompt": "x", "chosen": "  ", "rejected": "b"}, "no chosen"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "x", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "of role 'user'"),
        ({"prompt": "x", "chosen": [], "rejected": "b"}, "no chosen"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"},
            "roles are assistant",
        ),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "not a message"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": "wide"}, "margin 'wide' is not a number"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": float("nan")}, "margin nan"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "margin": True}, "margin True"),
    ],
)
def test_what_is_no_pair_is_named_by_its_line(tokenizer_step, tmp_path, row, says):
    good = {"prompt": "fever?", "chosen": "a", "rejected": "b"}
    path = written(tmp_path / "bad.jsonl", good, row)
    with pytest.raises(UserError, match=f"bad.jsonl:2: not a pair .*{says}") as error:
        read_pairs(path, load_tokenizer(tokenizer_step), 64)
    assert "\n" not in str(error.value)


def test_longer_pairs_are_counted(tokenizer_step, tmp_path):
    tokenizer = load_tokenizer(tokenizer_step)
    long = {"prompt": "fever?", "chosen": "mild", "rejected": "cough " * 60}
    path = written(tmp_path / "p.jsonl", long, {"prompt": "x", "chosen": "a", "rejected": "b"})
    pairs, dropped = read_pairs(path, tokenizer, 64)
    assert [pair.id for pair in pairs] == ["p.jsonl:2"] and dropped == {"longer than context": 1}
    with pytest.raises(UserError, match="no pair fits 64 tokens"):
        read_pairs(written(tmp_path / "q.jsonl", long), tokenizer, 64)


def test_pairs_of_one_prompt_stay_together_when_some_are_set_aside(tokenizer_step, tmp_path):
    rows = [{"prompt": question(i // 3), "chosen": "a", "rejected": f"b{i}"} for i in range(90)]
    pairs, _ = read_pairs(written(tmp_path / "p.jsonl", *rows), load_tokenizer(tokenizer_step), 64)
    kept, held = set_aside(pairs, 0.3, seed=1)
    assert len(kept) + len(held) == 90 and 9 <= len(held) <= 54

    def prompts(some):
        return {tuple(pair.chosen[: pair.prompt]) for pair in some}

    assert not prompts(kept) & prompts(held)
    assert set_aside(pairs, 0.3, seed=1) == (kept, held) != set_aside(pairs, 0.3, seed=2)
    with pytest.raises(UserError, match="2 pairs are too few to set 1% aside"):
        set_aside(pairs[:2], 0.01, seed=0)


def test_a_batch_marks_the_answers_and_follows_from_its_step():
    pairs = drawn_pairs(11, 100)
    batches = Pairs(pairs, rows=4, epochs=2, context=16, seed=3, pad=2)
    assert batches.steps == 5
    seen = []
    for step in range(5):
        names = batches.documents(step)
        batch = batches.batch(step, range(4))
        for row, name in enumerate(names):
            pair = pairs[int(name.removeprefix("drawn:"))]
            for place, ids in enumerate((pair.chosen, pair.rejected)):
                line, answer = batch["input_ids"][2 * row + place], batch["answers"][2 * row + place]
                assert line.tolist() == ids + [2] * (len(line) - len(ids))
                assert line[answer].tolist() == ids[pair.prompt :]
            assert batch["margins"][row] == np.float32(pair.margin)
        seen += names
    assert sorted(seen[:11]) == sorted(pair.id for pair in pairs)  # each once before any again
    assert seen[:9] != seen[11:]
    again = Pairs(pairs, rows=4, epochs=2, context=16, seed=3)
    assert again.documents(3) == batches.documents(3) and again.state(3) == {"pair": 12}
    assert again.batch(3, [2])["input_ids"].shape[0] == 2
    with pytest.raises(UserError, match=r"11 pairs, read 0.5 times, are fewer than a batch of 8"):
        Pairs(pairs, rows=8, epochs=0.5, context=16, seed=3)


class Processes:
    def __init__(self, data_rank, data_ranks):
        self.data_rank, self.data_ranks = data_rank, data_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_processes_share_pairs_and_take_as_many_turns(ranks):
    pairs = drawn_pairs(10, 50)
    turns = [list(in_turn(pairs, 3, Processes(rank, ranks))) for rank in range(ranks)]
    assert len({len(turn) for turn in turns}) == 1
    counted = [pair.id for turn in turns for some, counts in turn if counts for pair in pairs[some]]
    assert sorted(counted) == sorted(pair.id for pair in pairs)
    assert all(pairs[some] for turn in turns for some, _ in turn)


def test_a_tie_is_half_in_order():
    assert in_order(torch.tensor([2.0, -1.0, 0.0, 1e-9])) == 2.5


def test_collating_one_pair_alone_changes_its_padding_only():
    pairs = drawn_pairs(4, 50)
    whole, alone = collate_pairs(pairs), collate_pairs(pairs[2:3])
    width = alone["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][4:6, :width], alone["input_ids"])
    assert torch.equal(whole["answers"][4:6, :width], alone["answers"])
    assert not whole["answers"][4:6, width:].any()


def test_a_file_of_pairs_is_read_whole(tokenizer_step, tmp_path):
    pairs, _ = read_pairs(str(write_pairs(tmp_path / "p.jsonl", 7)), load_tokenizer(tokenizer_step), 64)
    assert len(pairs) == 7
