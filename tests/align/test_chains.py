"""How a question, a chain and an answer become one row, with real tokenizers."""

import json
from types import SimpleNamespace

import pytest
import torch

from galenic.align.config import EloConfig
from galenic.align.data.tasks import Task
from galenic.align.rollouts.chains import (
    Questions,
    chain_row,
    collate_chains,
    decode,
    encode_question,
    read_questions,
)
from galenic.align.rollouts.sampling import Rollout, end_tokens
from galenic.corpus.tokens.chat_format import encode_text
from galenic.model import load_tokenizer
from galenic.runtime import UserError

MARKER = "\nAnswer:"
TASK = Task(id="t", messages=[{"role": "user", "content": "What of the lung?"}], answer=" mild pain ")


@pytest.fixture(scope="module", params=["ours", "byte-level"])
def tokenizer(request, tokenizer_step, llama_folder):
    return load_tokenizer(tokenizer_step if request.param == "ours" else llama_folder)


@pytest.fixture(scope="module")
def question(tokenizer):
    return encode_question(TASK, tokenizer, MARKER)


def ends(tokenizer):
    model = SimpleNamespace(generation_config=None)
    return end_tokens(tokenizer, model)


def row(question, tokenizer, ids, log_probs=()):
    rollout = Rollout(ids=list(ids), log_probs=list(log_probs))
    return chain_row(question, rollout, tokenizer, marker=MARKER, ends=ends(tokenizer))


def test_a_question_is_its_conversation_in_pieces(question, tokenizer):
    assert decode(tokenizer, question.marker) == MARKER
    assert decode(tokenizer, question.answer).strip() == "mild pain"
    assert question.answer[-1] in ends(tokenizer)


def test_a_chain_with_the_marker_is_followed_by_the_answer(question, tokenizer):
    said = encode_text(tokenizer, "chronic cough\nAnswer:")
    chain = row(question, tokenizer, said)
    assert chain.ids == question.prompt + said + question.answer
    assert chain.sampled == said and chain.ended and not chain.empty
    assert decode(tokenizer, chain.ids).count("Answer:") == 1


def test_what_follows_the_marker_is_cut(question, tokenizer):
    said = encode_text(tokenizer, "chronic cough\nAnswer:")
    more = [*said, *encode_text(tokenizer, " severe fever"), question.answer[-1]]
    chain = row(question, tokenizer, more, log_probs=[-float(i) for i in range(len(more))])
    assert chain.ids == question.prompt + said + question.answer
    assert list(chain.log_probs) == [-float(i) for i in range(len(said))]


def test_a_chain_without_the_marker_gets_it(question, tokenizer):
    said = encode_text(tokenizer, "chronic cough")
    chain = row(question, tokenizer, said)
    assert chain.ids == question.prompt + said + question.marker + question.answer
    assert chain.sampled == said and not chain.ended


def test_a_turn_that_ended_is_scored_and_taken_out(question, tokenizer):
    end = question.answer[-1]
    said = encode_text(tokenizer, "chronic cough")
    chain = row(question, tokenizer, [*said, end])
    assert chain.ids == question.prompt + said + question.marker + question.answer
    assert chain.sampled == [*said, end] and chain.ended
    part = collate_chains([chain, row(question, tokenizer, said)])
    place = len(question.prompt) + len(said)
    assert part["targets"][0, place] == end and part["input_ids"][0, place] == question.marker[0]
    assert part["chains"][0].nonzero()[:, 0].tolist() == list(range(len(question.prompt), place + 1))
    assert part["chains"][1].nonzero()[:, 0].tolist() == list(range(len(question.prompt), place))
    for number in range(2):
        assert part["input_ids"][number][part["answers"][number]].tolist() == question.answer
    assert not (part["chains"] & part["answers"]).any()


@pytest.mark.parametrize("text", ["", "  \n", "\nAnswer:"])
def test_an_empty_chain_is_a_chain_and_told(question, tokenizer, text):
    chain = row(question, tokenizer, encode_text(tokenizer, text))
    assert chain.empty
    assert chain.ids[-len(question.answer) :] == question.answer
    assert MARKER in decode(tokenizer, chain.ids)
    part = collate_chains([row(question, tokenizer, []), row(question, tokenizer, [question.answer[-1]])])
    assert part["chains"].sum(1).tolist() == [0, 1] and part["empty"].all()


def test_a_token_that_goes_on_behind_the_marker_gets_another():
    class Words:
        """A tokenizer in which a token holds the marker's end and more."""

        def decode(self, ids, **_):
            return "".join(("", "so", "\nAnswer", ": 4", MARKER, " 42")[index] for index in ids)

    question = SimpleNamespace(prompt=[9], marker=[4], answer=[5, 0])
    chain = chain_row(question, Rollout(ids=[1, 2, 3]), Words(), marker=MARKER, ends={0})
    assert chain.ids == [9, 1, 2, 3, 4, 5, 0]
    assert chain.sampled == [1, 2, 3] and chain.ended


def test_padding_and_what_the_sampler_told(question, tokenizer):
    said = encode_text(tokenizer, "chronic cough")
    part = collate_chains(
        [row(question, tokenizer, said, [-0.5] * len(said)), row(question, tokenizer, said[:1])]
    )
    told = part["told"][part["chains"]]
    assert told[: len(said)].tolist() == [-0.5] * len(said) and told[len(said) :].isnan().all()
    lengths = (part["answers"].long() * torch.arange(part["answers"].shape[1])).argmax(1)
    assert (part["input_ids"][1, lengths[1] + 1 :] == 3).all()


def test_the_same_chain_lies_in_one_row(question, tokenizer):
    said, end = encode_text(tokenizer, "chronic cough"), question.answer[-1]
    one, ended, other = (row(question, tokenizer, ids) for ids in (said, [*said, end], said[:1]))
    part = collate_chains([one, other, one, ended, one, other])
    assert one.ids == ended.ids  # but the end was sampled, and is scored
    assert part["row"].tolist() == [0, 1, 0, 2, 0, 1]
    apart = collate_chains([one, other, ended])
    assert apart["row"].tolist() == [0, 1, 2]
    for name in set(part) - {"row", "told"}:
        assert torch.equal(part[name], apart[name]), name


def test_a_wide_marker_is_followed_without_a_space(tokenizer):
    question = encode_question(TASK, tokenizer, "\n答案：")
    assert decode(tokenizer, question.marker) == "\n答案："
    assert not decode(tokenizer, question.answer).startswith(" ")


def test_the_first_name_of_a_diagnosis_is_the_answer(tokenizer):
    task = Task(id="d", messages=TASK.messages, answer="asthma|lung pain|J45", rule="diagnosis")
    question = encode_question(task, tokenizer, MARKER)
    assert decode(tokenizer, question.answer).strip() == "asthma"


def test_questions_without_room_are_counted(tokenizer, tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = [{"prompt": "lung?", "answer": "heart"}, {"prompt": "lung " * 60, "answer": "heart"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"marker": MARKER, "room": 8, "context": 100}
    questions, dropped = read_questions(str(path), tokenizer, **settings)
    assert len(questions) == 1 and list(dropped.values()) == [1]
    with pytest.raises(
        UserError, match=r"no question is left .2: longer than context with 90 tokens of chain"
    ):
        read_questions(str(path), tokenizer, **{**settings, "room": 90})


def test_batches_follow_from_the_seed_and_are_sampled_once(question, tokenizer):
    asked = []

    def laid_out(part):
        return part["input_ids"][part["row"]]

    class Sampler:
        run, end = SimpleNamespace(tokenizer=tokenizer), ends(tokenizer)

        def __call__(self, conversations, *, step, numbers, copies, stop):
            asked.append((step, list(numbers), copies, stop))
            texts = [[f"cough {number}" for _ in range(copies)] for number in numbers]
            return [[Rollout(ids=encode_text(tokenizer, t)) for t in row] for row in texts]

    questions = [
        SimpleNamespace(**{**vars(question), "task": Task(id=f"t{i}", messages=[], answer="x")})
        for i in range(5)
    ]
    config = EloConfig(out="x", model="x", tasks="x", steps=5, rows=4, samples=2)
    batches = Questions(questions, Sampler(), config, [2, 3])
    whole = batches.batch(3, [2, 3])
    parts = [laid_out(batches.batch(3, [row])) for row in (2, 3)]
    assert asked == [(3, [2, 3], 2, MARKER)]
    assert torch.equal(torch.cat(parts), laid_out(whole)) and len(laid_out(whole)) == 4
    assert batches.documents(3) == Questions(questions, Sampler(), config, [0]).documents(3)
    named = [name for step in range(5) for name in batches.documents(step)]
    for epoch in range(4):
        assert sorted(named[5 * epoch : 5 * epoch + 5]) == ["t0", "t1", "t2", "t3", "t4"]
    assert named[:5] != named[5:10]
