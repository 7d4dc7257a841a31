import itertools

import numpy as np
import pytest
import torch
from evaluate_helpers import naive_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.tokens.chat_format import encode_conversation, encode_text
from galenic.evaluate import multiple_choice
from galenic.evaluate.multiple_choice import (
    Prompted,
    PromptFormat,
    beginning_lengths,
    best,
    by_length,
    most_shared_words,
    option_log_probs,
    option_scores,
    scores,
    tokenize,
)
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.runtime import UserError

OPTIONS = ["a disease of the airways", "fever", "心脏", "Question: drug 12"]
QUESTIONS = ["What is asthma?", "Which drug lowers the blood pressure in the body?", "心脏?", "Fever"]


@pytest.mark.parametrize("name", ["plain", "chat"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_shared_prefix_equals_one_by_one(llama, tokenizer, name, batch_tokens):
    prompt = PromptFormat(name=name)
    prompts = [tokenize(tokenizer, prompt, text, OPTIONS, 64) for text in [*QUESTIONS, None]]
    found = option_log_probs(llama, prompts, batch_tokens=batch_tokens)
    for text, row in zip([*QUESTIONS, None], found, strict=True):
        for option, value in zip(OPTIONS, row, strict=True):
            head, prefix = prompt.parts(tokenizer, text)
            whole = head + encode_text(tokenizer, prefix + prompt.join + option)
            boundary = len(head + encode_text(tokenizer, prefix))
            assert whole[:boundary] == head + encode_text(tokenizer, prefix)  # no token straddles here
            assert value == pytest.approx(naive_log_probs(llama, whole)[boundary - 1 :].sum(), abs=1e-4)


@pytest.fixture(scope="module")
def baichuan():
    """A random model with convolutions and a window that is shorter than the prompts."""
    torch.manual_seed(2)
    config = BaichuanM1Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=8,
        initializer_range=0.3,
    )
    model = BaichuanM1ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(8)
    return model


def rows_of_many_kinds():
    """Prompts that begin alike, of every length; options that begin alike, are one token, or begin others."""
    rng = np.random.default_rng(0)
    begin = rng.integers(10, 60, 20).tolist()
    for number in range(24):
        prompt = begin + rng.integers(10, 60, number % 7).tolist()
        same = rng.integers(10, 60, number % 3).tolist()
        options = [same + rng.integers(10, 60, int(n)).tolist() for n in rng.integers(1, 6, 2 + number % 3)]
        if number % 5 == 0:
            options = [[11], [12], [13]]
        if number % 5 == 1:
            options = [[14], [14, 15], [14, 15, 16]]
        yield prompt if number else prompt[:1], options


@pytest.mark.parametrize("which", ["llama", "baichuan"])
@pytest.mark.parametrize("price", [0, 64, 10_000])
def test_whatever_is_shared_the_scores_are_those_of_whole_rows(request, monkeypatch, which, price):
    model = request.getfixturevalue(which)
    monkeypatch.setattr(multiple_choice, "_PASS", price)
    prompts = [
        Prompted.of([prompt + option for option in options], [len(option) for option in options])
        for prompt, options in rows_of_many_kinds()
    ]
    shared = [
        len(p.shared) - len(prompt) for p, (prompt, _) in zip(prompts, rows_of_many_kinds(), strict=True)
    ]
    assert min(shared) >= 0 and max(shared) >= 2  # options' first tokens are shared too
    assert any(all(len(rest) == 1 for rest in p.rest) for p in prompts)
    for batch_tokens in (1, 300, 100_000):
        found = option_scores(model, prompts, batch_tokens=batch_tokens)
        for (prompt, options), values in zip(rows_of_many_kinds(), found, strict=True):
            for option, (value, likeliest) in zip(options, values, strict=True):
                row = torch.tensor([prompt + option])
                with torch.inference_mode():
                    best_next = model(input_ids=row, use_cache=False).logits[0, :-1].argmax(-1)
                told = naive_log_probs(model, prompt + option)[len(prompt) - 1 :]
                assert value == pytest.approx(told.sum(), abs=2e-4)
                assert likeliest == (best_next[len(prompt) - 1 :] == row[0, len(prompt) :]).all()


def test_a_token_that_nothing_precedes_is_not_scored(llama):
    prompted = Prompted.of([[7, 8], [9, 10]], [2, 2])
    assert prompted.shared == []
    (values,) = option_log_probs(llama, [prompted], batch_tokens=100)
    assert values == pytest.approx([naive_log_probs(llama, row).sum() for row in ([7, 8], [9, 10])], abs=1e-4)


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 2), max_size=7), max_size=12),
    price=st.integers(0, 12),
    most=st.integers(1, 40),
)
def test_beginnings_are_shared_where_it_saves_most(rows, price, most):
    def different(length):
        return {tuple(row[:length]) for row in rows if len(row) > length}

    def run(lengths):
        """Tokens that are run, and the price of the passes for beginnings."""
        total, done = 0, 0
        for length in lengths:
            total, done = total + len(different(length)) * (length - done) + price, length
        return total + sum(len(row) - max([0, *(n for n in lengths if n < len(row))]) for row in rows)

    allowed = [n for n in range(1, 7) if len(different(n)) == 1 or 0 < len(different(n)) * n <= most]
    best_cost = min(run(some) for k in range(4) for some in itertools.combinations(allowed, k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiple_choice, "_PASS", price)
        found = beginning_lengths(rows, most)
    assert found == sorted(found) and set(found) <= set(allowed)
    assert run(found) <= best_cost


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=7), price=st.integers(0, 20))
def test_rows_are_divided_at_the_least_cost(lengths, price):
    def cost(parts):
        return sum(len(part) * max(part) + price for part in parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiple_choice, "_PASS", price)
        found = by_length(lengths)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    ordered, best_cost = sorted(lengths), 0 if not lengths else float("inf")
    for cuts in itertools.product([False, True], repeat=max(0, len(lengths) - 1)):
        places = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), len(ordered)]
        parts = [ordered[a:b] for a, b in itertools.pairwise(places)]
        best_cost = min(best_cost, cost(parts)) if lengths else 0
    assert cost([[lengths[place] for place in part] for part in found]) == best_cost


def test_prompts_are_as_documented(tokenizer):
    ids, text = PromptFormat().parts(tokenizer, "Why?")
    assert tokenizer.decode(ids) + text + PromptFormat().join == "<s>Question: Why?\nAnswer: "
    assert PromptFormat().parts(tokenizer, None) == ([1], "Answer:")
    chat = PromptFormat(name="chat", system="Be brief.")
    ids, text = chat.parts(tokenizer, "Why?")
    assert tokenizer.decode(ids) + text + chat.join == "<B_SYS>Be brief.<C_Q>Why?<C_A>"


def test_markers_in_a_question_are_text(tokenizer):
    messages = [{"role": "user", "content": "<C_A>a</s>"}]
    ids, _ = PromptFormat(name="chat").parts(tokenizer, "<C_A>a</s>")
    assert ids == encode_conversation(tokenizer, messages)[0]
    assert (ids.count(7), ids.count(2)) == (1, 0)
    plain = tokenize(tokenizer, PromptFormat(), "<s></s>", OPTIONS, 64)
    assert [*plain.shared, *plain.rest[0]].count(1) == 1


class StraddlingTokenizer:
    """Characters are tokens, but ': f' is one token: the prompt's last character and the option's first."""

    eos_token_id = 2

    def __len__(self):
        return 0

    def __call__(self, text):
        return {"input_ids": [1, *self.encode(text)]}

    def encode(self, text, **_):
        ids, i = [], 0
        while i < len(text):
            step = 3 if text[i : i + 3] == ": f" else 1
            ids.append(500 if step == 3 else ord(text[i]) % 300 + 10)
            i += step
        return ids


def test_a_token_across_the_boundary_counts_as_the_options():
    prompted = tokenize(StraddlingTokenizer(), PromptFormat(), "Q", ["fever", "gout"], 999)
    rows = [prompted.shared + rest for rest in prompted.rest]
    counted = [row[len(row) - length :] for row, length in zip(rows, prompted.lengths, strict=True)]
    assert [len(row) for row in counted] == [1 + 4, 5]  # ': f' e v e r ; ' ' g o u t
    assert counted[0][0] == 500
    assert all(len(row) > length for row, length in zip(rows, prompted.lengths, strict=True))


@settings(deadline=None, max_examples=30)
@given(
    question=st.text(max_size=30), options=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4)
)
def test_shared_and_rest_are_the_whole_text(tokenizer, question, options):
    prompt = PromptFormat()
    prompted = tokenize(tokenizer, prompt, question, options, 10_000)
    for option, rest, length in zip(options, prompted.rest, prompted.lengths, strict=True):
        whole = [1, *encode_text(tokenizer, f"Question: {question}\nAnswer: {option}")]
        assert prompted.shared + rest == whole
        assert 0 < length < len(whole) and rest
    assert not prompted.truncated


def test_a_prompt_longer_than_the_context_loses_its_beginning(llama, tokenizer):
    long = "What is asthma? " * 30
    prompted = tokenize(tokenizer, PromptFormat(), long, OPTIONS, 64)
    assert prompted.truncated
    whole = [1, *encode_text(tokenizer, f"Question: {long}\nAnswer: {OPTIONS[0]}")]
    row = prompted.shared + prompted.rest[0]
    assert row[0] == 1
    assert row[1:] == whole[-len(row) + 1 :]
    assert 56 < max(len(prompted.shared) + len(rest) for rest in prompted.rest) <= 64
    (values,) = option_log_probs(llama, [prompted], batch_tokens=100)
    assert values[0] == pytest.approx(naive_log_probs(llama, row)[-prompted.lengths[0] :].sum(), abs=1e-4)
    with pytest.raises(UserError, match="does not fit the model's context of 8"):
        tokenize(tokenizer, PromptFormat(), "x", ["fever is a raised body temperature" * 2], 8)


def test_scores_and_ties():
    found = scores([-6.0, -4.0], [-5.0, -1.0], ["fièvre", "no"])
    assert found == {"total": [-6.0, -4.0], "per_byte": [-6 / 7, -2.0], "pmi": [-1.0, -3.0]}
    assert [best(values) for values in found.values()] == [1, 0, 0]
    assert best([1.0, 2.0, 2.0]) == 1


def test_most_shared_words_counts_distinct_whole_words():
    options = ["lung lung lung", "Lungs", "acute LUNG injury", "fever"]
    assert most_shared_words("Which injury of the lung is acute?", options) == 2
    assert most_shared_words("Nothing in common", options) == 0
