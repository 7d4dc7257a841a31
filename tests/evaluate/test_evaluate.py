import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_helpers import TEXTS, naive_log_probs, question, write_rows

from galenic import model as model_room
from galenic.corpus.tokens.chat_format import encode_conversation, encode_text
from galenic.evaluate import evaluate
from galenic.evaluate.config import EvaluateConfig
from galenic.evaluate.inputs import read_questions, sample
from galenic.evaluate.statistics import wilson
from galenic.runtime import UserError
from network_helpers import fresh_model

CONVERSATIONS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:9]}]}
    for text in TEXTS
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokens_folder, tokenizer):
    """Two model folders, questions and conversations."""
    root = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("one", "two")):
        model = fresh_model(len(tokenizer), seed)
        model_room.save(model, root / name, tokenizer=tokens_folder, provenance={"verb": "pretrain"})
    write_rows(root / "questions/recall.jsonl", [question(i) for i in range(7)])
    write_rows(root / "questions/code.jsonl", [question(i, "code") for i in range(5)])
    write_rows(root / "sft/medical.heldout.jsonl", CONVERSATIONS)
    write_rows(root / "sft/medical.train.jsonl", CONVERSATIONS[:1])
    return root


def config_of(folders, tokens_folder, out, **changes):
    values = {
        "out": str(out),
        "models": {"one": str(folders / "one"), "two": str(folders / "two")},
        "groups": {"one": "base", "two": "expert"},
        "tokens": str(tokens_folder),
        "questions": str(folders / "questions"),
        "conversations": str(folders / "sft"),
        "experts": {"recall": "two", "code": "one"},
        "batch_tokens": 300,
        "shown": 5,
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def evaluated(folders, tokens_folder, tmp_path_factory):
    config = config_of(folders, tokens_folder, tmp_path_factory.mktemp("out"))
    evaluate.run(config)
    return config


def read(config, name):
    with open(f"{config.out}/{name}", encoding="utf-8") as file:
        return [json.loads(line) for line in file] if name.endswith(".jsonl") else json.load(file)


def test_results_equal_a_naive_evaluation(evaluated, folders, tokenizer):
    results = read(evaluated, "results.json")
    assert list(results["models"]) == ["one", "two"]
    for name in ("one", "two"):
        model = model_room.load(folders / name)
        found = results["models"][name]
        rows = {row["id"]: row for row in read(evaluated, f"items/{name}.jsonl")}
        assert found["parameters"] == sum(p.numel() for p in model.parameters())

        # ---- bits per byte
        ids = [[1, *encode_text(tokenizer, text), 2] for text in TEXTS]
        nats = -sum(naive_log_probs(model, row)[:-1].sum() for row in ids)
        size = sum(len(text.encode()) for text in TEXTS)
        assert found["bits_per_byte"]["wikipedia"]["bytes"] == size
        assert found["bits_per_byte"]["wikipedia"]["value"] == pytest.approx(
            nats / math.log(2) / size, rel=1e-4
        )
        assert list(found["bits_per_byte"]) == ["hpo", "wikipedia"]

        # ---- answers
        nats, size = 0.0, 0
        for conversation in CONVERSATIONS:
            tokens, answers = encode_conversation(tokenizer, conversation["messages"])
            nats -= naive_log_probs(model, tokens)[np.array(answers[1:])].sum()
            size += len(conversation["messages"][1]["content"].encode())
        assert found["answers"]["medical"]["bytes"] == size
        assert found["answers"]["medical"]["bits_per_byte"] == pytest.approx(
            nats / math.log(2) / size, rel=1e-4
        )

        # ---- questions
        for kind, count in (("recall", 7), ("code", 5)):
            right = 0
            for asked in (question(i, kind) for i in range(count)):
                row = rows[asked["id"]]
                prefix = f"Question: {asked['question']}\nAnswer:"
                start = len([1, *encode_text(tokenizer, prefix)])
                bare = len([1, *encode_text(tokenizer, "Answer:")])
                for index, option in enumerate(asked["options"]):
                    whole = [1, *encode_text(tokenizer, f"{prefix} {option}")]
                    alone = [1, *encode_text(tokenizer, f"Answer: {option}")]
                    total = naive_log_probs(model, whole)[start - 1 :].sum()
                    prior = naive_log_probs(model, alone)[bare - 1 :].sum()
                    assert row["total"][index] == pytest.approx(total, abs=1e-4)
                    assert row["per_byte"][index] == pytest.approx(total / len(option.encode()), abs=1e-4)
                    assert row["pmi"][index] == pytest.approx(total - prior, abs=2e-4)
                for scoring in ("total", "per_byte", "pmi"):
                    assert row["picks"][scoring] == int(np.argmax(row[scoring]))
                right += row["picks"]["per_byte"] == asked["answer"]
            accuracy = found["accuracy"][kind]
            assert (accuracy["value"], accuracy["n"], accuracy["chance"]) == (right / count, count, 0.25)
            assert (accuracy["low"], accuracy["high"]) == wilson(right, count)
            assert accuracy["scorings"]["per_byte"] == accuracy["value"]
            assert accuracy["truncated"] == 0


def test_normalised_average_and_shown_questions(evaluated):
    results = read(evaluated, "results.json")
    one, two = (results["models"][name]["accuracy"] for name in ("one", "two"))
    base = [two["recall"]["value"], one["code"]["value"]]
    for name, scores in (("one", one), ("two", two)):
        found = results["models"][name]["normalised_average"]
        if 0 in base:
            assert found is None
        else:
            ratios = [scores["recall"]["value"] / base[0], scores["code"]["value"] / base[1]]
            assert found == pytest.approx(sum(ratios) / 2)
    assert [row["kind"] for row in results["shown"]] == ["code", "recall", "code", "recall", "code"]
    items = {name: read(evaluated, f"items/{name}.jsonl") for name in ("one", "two")}
    texts = {question(i, kind)["question"]: f"{kind}-{i}" for kind in ("recall", "code") for i in range(7)}
    for row in results["shown"]:
        for name, rows in items.items():
            (item,) = [item for item in rows if item["id"] == texts[row["question"]]]
            assert row["picks"][name] == item["picks"]["per_byte"]
    assert results["protocol"]["prompt"] == "<s>Question: {question}\nAnswer: {option}"
    assert "<s>Answer: {option}" in results["protocol"]["pmi"]


def test_a_killed_run_keeps_finished_models_and_ends_with_the_same_bytes(
    evaluated, folders, tokens_folder, tmp_path, monkeypatch
):
    config = config_of(folders, tokens_folder, tmp_path)
    loaded, real = [], evaluate.open_model

    def load(path):
        loaded.append(path)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(evaluate, "open_model", load)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config)
    assert sorted(path.name for path in (tmp_path / "items").iterdir()) == ["one.json", "one.jsonl"]
    assert not (tmp_path / "results.json").exists()
    evaluate.run(config)
    assert loaded[2:] == [str(folders / "two")]
    for name in ("results.json", "items/one.jsonl", "items/two.jsonl", "items/two.json"):
        with open(f"{evaluated.out}/{name}", "rb") as file:
            assert (tmp_path / name).read_bytes() == file.read()


def test_limits_sample_the_same_items_whatever_the_order(folders, tokens_folder, tmp_path):
    rows = [question(i) for i in range(7)]
    write_rows(tmp_path / "questions/recall.jsonl", rows[::-1])
    changes = {"questions_per_kind": 3, "experts": {}, "models": {"one": str(folders / "one")}, "groups": {}}
    first = config_of(folders, tokens_folder, tmp_path / "a", heldout_tokens=1, **changes)
    second = config_of(
        folders, tokens_folder, tmp_path / "b", **{**changes, "questions": str(tmp_path / "questions")},
        kind_limits={"recall": 3}, heldout_tokens=1, conversations=None,
    )  # fmt: skip
    for config in (first, second):
        evaluate.run(config)
    a = [row for row in read(first, "items/one.jsonl") if row["kind"] == "recall"]
    b = read(second, "items/one.jsonl")
    assert len(a) == 3
    assert sorted(row["id"] for row in a) == sorted(row["id"] for row in b)
    assert read(second, "results.json")["models"]["one"]["answers"] == {}
    assert read(second, "results.json")["models"]["one"]["group"] == "other"
    assert read(second, "results.json")["models"]["one"]["normalised_average"] is None
    # one held-out token: one whole document
    assert read(first, "results.json")["models"]["one"]["bits_per_byte"]["wikipedia"]["bytes"] in [
        len(text.encode()) for text in TEXTS
    ]


def test_chat_prompt_runs_and_is_described(folders, tokens_folder, tmp_path):
    config = config_of(
        folders, tokens_folder, tmp_path, prompt="chat", system="Be brief.", models={"one": str(folders / "one")},
        groups={}, experts={}, conversations=None, scoring="pmi",
    )  # fmt: skip
    evaluate.run(config)
    protocol = read(config, "results.json")["protocol"]
    assert protocol["prompt"] == "<B_SYS>Be brief.<C_Q>{question}<C_A>{option}"
    assert "<B_SYS>Be brief.<C_Q>Answer:<C_A>{option}" in protocol["pmi"]


def test_plan_counts_and_writes_nothing(folders, tokens_folder, tmp_path):
    plan = evaluate.plan(config_of(folders, tokens_folder, tmp_path / "out"))
    assert plan.facts["questions"] == "5 code, 7 recall"
    assert plan.facts["conversations"] == "4 medical"
    assert plan.facts["options scored"] == "96"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["a", "b", "c"]}, "a question has 4 options, this one has 3"),
        ({"options": ["a", "b", "c", "c"]}, "two options are the same"),
        ({"options": ["a", "b", "c", " "]}, "'options' must be a list of texts"),
        ({"options": "abcd"}, "'options' must be a list of texts"),
        ({"answer": 4}, "'answer' must be the index of the right option, 0 to 3, got 4"),
        ({"answer": -1}, "'answer' must be the index"),
        ({"answer": "A"}, "'answer' must be the index"),
        ({"answer": True}, "'answer' must be the index"),
        ({"question": ""}, "'question' must be a text"),
        ({"id": None}, "'id' must be a text"),
        ({"id": "recall-0"}, "the same id as line 1"),
        ({**question(0), "id": "new"}, "the same question as line 1"),
    ],
)
def test_bad_questions_name_file_and_line(tmp_path, change, message):
    write_rows(tmp_path / "recall.jsonl", [question(0), question(1), {**question(2), **change}])
    text = (tmp_path / "recall.jsonl").read_text().replace("\n", "\n\n", 1)  # a blank line counts
    (tmp_path / "recall.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"recall.jsonl:4: .*{message}"):
        read_questions(tmp_path / "recall.jsonl")


def test_other_bad_inputs(folders, tokens_folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            evaluate.plan(config_of(folders, tokens_folder, tmp_path / "out", **changes))

    refused("models.one: .*nowhere is not a folder", models={"one": str(tmp_path / "nowhere"), "two": "x"})
    (tmp_path / "empty").mkdir()
    refused("is not a model folder", models={"one": str(tmp_path / "empty"), "two": "x"})
    refused("holds no <kind>.jsonl file", questions=str(tmp_path / "empty"), experts={})
    refused("holds no <set>.heldout.jsonl file", conversations=str(tmp_path / "empty"))
    refused("no token shards", tokens=str(tmp_path / "empty"))
    refused(r"no questions of kind 'recal'.*did you mean 'recall'", experts={"recal": "one"})
    refused("kind_limits: no questions of kind 'x'", kind_limits={"x": 3})
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions/recall.jsonl").write_text("")
    refused("recall.jsonl: no questions in it", questions=str(tmp_path / "questions"), experts={})
    (tmp_path / "questions/recall.jsonl").write_text('{"id": "a"\n')
    refused("recall.jsonl:1: not valid JSON", questions=str(tmp_path / "questions"), experts={})
    for bad in (
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": 1}]},
    ):
        write_rows(tmp_path / "sft/a.heldout.jsonl", [CONVERSATIONS[0], bad])
        refused("a.heldout.jsonl:2: ", conversations=str(tmp_path / "sft"))


def test_a_model_of_another_tokenizer_is_refused(folders, tokens_folder, tokenizer, tmp_path):
    shutil.copytree(folders / "one", tmp_path / "one")
    text = (tmp_path / "one/tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "one/tokenizer.json").write_text(text.replace("<B_CODE>", "<B_CODY>"), encoding="utf-8")
    other = model_room.load_tokenizer(tmp_path / "one")
    assert other.get_vocab() != tokenizer.get_vocab()
    config = config_of(
        folders, tokens_folder, tmp_path / "out", models={"one": str(tmp_path / "one")}, groups={}, experts={}
    )
    with pytest.raises(UserError, match="has another tokenizer"):
        evaluate.run(config)
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {}}, "name at least one model folder"),
        ({"models": {"a/b": "x"}}, "'a/b' names a file"),
        ({"models": {"sft-medical": "x"}, "experts": {"recall": "sft-medicl"}}, "did you mean 'sft-medical'"),
        ({"groups": {"bas": "base"}}, "no model is called 'bas' .did you mean 'base'"),
        ({"questions": None, "experts": {"recall": "base"}}, "experts needs questions"),
        ({"system": "x"}, "system is used by prompt=chat only"),
        ({"questions_per_kind": 0}, "questions_per_kind is 0; it must be at least 1"),
        ({"kind_limits": {"code": -1}}, "kind_limits.code is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"shown": -1}, "shown is -1"),
    ],
)
def test_config_refuses_contradictions(changes, message):
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**{"out": "o", "models": {"base": "m"}, "tokens": "t", "questions": "q", **changes})


def test_sample_ignores_order_and_keeps_it():
    keys = [str(i) for i in range(50)]
    chosen = sample(keys, keys, 10, seed=3)
    assert chosen == sorted(chosen, key=int)
    assert sorted(sample(keys[::-1], keys[::-1], 10, seed=3)) == sorted(chosen)
    assert sample(keys, keys, 10, seed=4) != chosen
    assert sample(keys, keys, 99, seed=4) == keys


@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_models_write_answers_of_their_own(folders, tokens_folder, tmp_path, tokenizer, prompt):
    config = config_of(
        folders, tokens_folder, tmp_path, prompt=prompt, written_tokens=6, questions_per_kind=3
    )
    evaluate.run(config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["kind"] for row in results["shown"]] == ["code", "recall", "code", "recall", "code"]
    for name in config.models:
        model = model_room.load(config.models[name])
        for row in results["shown"]:
            if prompt == "chat":
                ids = encode_conversation(tokenizer, [{"role": "user", "content": row["question"]}])[0]
            else:
                ids = [1, *encode_text(tokenizer, f"Question: {row['question']}\nAnswer:")]
            given = torch.tensor([ids])
            written = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False, eos_token_id=2,
                pad_token_id=3,
            )[0, len(ids) :]  # fmt: skip
            assert row["said"][name] == tokenizer.decode(written, skip_special_tokens=True).strip()
    assert "at most 6" in results["protocol"]["said"] and "{question}" in results["protocol"]["said"]


def test_answers_are_written_only_if_asked_for(evaluated):
    results = json.loads((Path(evaluated.out) / "results.json").read_text())
    assert all("said" not in row for row in results["shown"]) and "said" not in results["protocol"]


def test_a_long_question_loses_its_beginning_and_a_wish_too_long_is_refused(folders, tokens_folder, tmp_path):
    evaluate.run(config_of(folders, tokens_folder, tmp_path / "a", written_tokens=90))  # of 96 tokens
    shown = json.loads((tmp_path / "a/results.json").read_text())["shown"]
    assert all(set(row["said"]) == {"one", "two"} for row in shown)
    with pytest.raises(UserError, match="leave no room for a question"):
        evaluate.run(config_of(folders, tokens_folder, tmp_path / "b", written_tokens=95))
    with pytest.raises(UserError, match="must be 0 or more"):
        config_of(folders, tokens_folder, tmp_path, written_tokens=-1)
