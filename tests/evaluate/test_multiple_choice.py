import pytest
from evaluate_helpers import naive_log_probs
from hypothesis import given, settings
from hypothesis import strategies as st

from galenic.corpus.tokens.chat_format import encode_conversation, encode_text
from galenic.evaluate.multiple_choice import (
    PromptFormat,
    best,
    most_shared_words,
    option_log_probs,
    scores,
    tokenize,
)
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
