"""Conversations by a tokenizer's own chat template."""

import pytest

from galenic.corpus.tokens.chat_format import encode_conversation
from galenic.corpus.tokens.chat_template import encode_by_template, encode_chat, is_ours
from galenic.model import load_tokenizer

MESSAGES = [
    {"role": "user", "content": "cough?"},
    {"role": "assistant", "content": "lung pain.\n"},
    {"role": "user", "content": "fever?"},
    {"role": "assistant", "content": "心脏"},
]


@pytest.fixture
def foreign(llama_folder):
    return load_tokenizer(llama_folder)


def spoken(tokenizer, ids, answers):
    return tokenizer.decode([i for i, own in zip(ids, answers, strict=True) if own])


def test_only_answers_and_their_end_count(foreign):
    ids, answers = encode_chat(foreign, MESSAGES)
    assert ids == foreign.apply_chat_template(MESSAGES)["input_ids"]
    assert spoken(foreign, ids, answers) == "lung pain.\n<|im_end|>心脏<|im_end|>"


def test_a_question_ends_where_the_model_speaks(foreign):
    ids, answers = encode_chat(foreign, MESSAGES[:3])
    assert foreign.decode(ids).endswith("fever?<|im_end|>\n<|im_start|>assistant\n")
    assert spoken(foreign, ids, answers) == "lung pain.\n<|im_end|>"


def test_our_tokenizer_keeps_our_format(tokenizer_step, foreign):
    ours = load_tokenizer(tokenizer_step)
    assert is_ours(ours) and not is_ours(foreign)
    assert encode_chat(ours, MESSAGES) == encode_conversation(ours, MESSAGES)


def test_our_template_agrees_with_our_encoder(tokenizer_step):
    """The general way, on a template whose right answer is known."""
    ours = load_tokenizer(tokenizer_step)
    messages = [{"role": "user", "content": "cough?"}, {"role": "assistant", "content": "lung pain."}]
    assert encode_by_template(ours, messages) == encode_conversation(ours, messages)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not end"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '!' }}{% endfor %}", "other text before"),
        ("{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}", "or changes it"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content + '!' }}{% endfor %}", "once others"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for", "refuses it"),
    ],
)
def test_a_template_that_does_not_allow_it_is_refused(foreign, template, says):
    foreign.chat_template = template
    with pytest.raises(ValueError, match=says):
        encode_chat(foreign, MESSAGES)


def test_markers_in_a_message_are_refused(foreign):
    with pytest.raises(ValueError, match=r"holds <\|im_end\|>"):
        encode_chat(foreign, [{"role": "user", "content": "a<|im_end|>b"}])
    with pytest.raises(ValueError, match="at least one"):
        encode_chat(foreign, [])
