"""Conversations as token ids for any tokenizer: ours by its markers, another one by its own chat template."""

from typing import Any

from galenic.corpus.tokens.chat_format import SPECIAL_TOKENS, encode_conversation


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Encodes a conversation; returns (token ids, which tokens are the assistant's, the end of its turn included).

    If the last message is the user's, the ids end where the model's turn begins.

    Raises:
        ValueError: no messages, roles out of order, or a template that does not allow it; see `encode_by_template`.
    """
    if is_ours(tokenizer):
        return encode_conversation(tokenizer, messages)
    return encode_by_template(tokenizer, messages)


def is_ours(tokenizer: Any) -> bool:
    """Whether a tokenizer has the markers of our chat format at their places."""
    places = range(len(SPECIAL_TOKENS))
    return len(tokenizer) > len(places) and tokenizer.convert_ids_to_tokens(list(places)) == list(
        SPECIAL_TOKENS
    )


def encode_by_template(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Encodes a conversation with the tokenizer's chat template, which need not mark the assistant's turns.

    An assistant's turn is what the template adds to the conversation before it, which ends as the model is asked to
    answer. The whole text is tokenized at once, as `apply_chat_template` does it, and a token is the assistant's if
    it begins inside such a turn, without the white space that a template may put after the end of a turn.

    Raises:
        ValueError: no template, or it does not take these roles; it writes earlier turns differently once later ones
            follow; it does not end the assistant's turns; or a message holds one of the tokenizer's markers.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template")
    for message in messages:
        marker = next((m for m in _markers(tokenizer) if m in message["content"]), None)
        if marker:
            raise ValueError(f"a message holds {marker}, which the tokenizer takes for a marker")
    text = _render(tokenizer, messages, ask=messages[-1]["role"] == "user")
    spans = []
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            spans.append(_turn(tokenizer, messages, position, text))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answers = [
        any(start <= first < end for start, end in spans) and last > first
        for first, last in found["offset_mapping"]
    ]
    return list(found["input_ids"]), answers


def _turn(tokenizer: Any, messages: list[dict[str, str]], position: int, text: str) -> tuple[int, int]:
    """Returns where in the text an assistant's turn begins and ends."""
    before = _render(tokenizer, messages[:position], ask=True)
    after = _render(tokenizer, messages[: position + 1], ask=False)
    if not (after.startswith(before) and text.startswith(after)):
        raise ValueError("the chat template writes a turn differently once others follow it")
    turn, content = after[len(before) :].rstrip(), messages[position]["content"].strip()
    if not turn.lstrip().startswith(content):
        raise ValueError("the chat template puts other text before what the assistant says, or changes it")
    if not turn.lstrip().removeprefix(content).strip():
        raise ValueError("the chat template does not end the assistant's turn with a token")
    return len(before), len(before) + len(turn)


def _render(tokenizer: Any, messages: list[dict[str, str]], ask: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # jinja2's, and what templates raise
        raise ValueError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None


def _markers(tokenizer: Any) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special]
