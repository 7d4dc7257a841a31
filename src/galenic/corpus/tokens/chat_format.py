"""The report's chat format: `<B_SYS>{system}<C_Q>{user}<C_A>{assistant}</s>`, no spaces between, no `<s>`.

Source: two independent ports of Baichuan-M1 agree on the markers; the end-of-turn token is not published, ours is
the end-of-document token.
"""

from typing import Any

SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<B_SYS>",
    "<B_USYS>",
    "<C_Q>",
    "<C_A>",
    "<B_FUNC>",
    "<B_CODE>",
)
"""In the order of their ids, from 0."""

BOS, EOS, PAD = 1, 2, 3
MARKERS = {"system": 4, "user": 6, "assistant": 7}
"""Role -> id of the marker that opens its turn."""

SYSTEM_PROMPT = "You are a helpful assistant."


def chat_template(system_prompt: str = SYSTEM_PROMPT) -> str:
    """Returns the Jinja chat template with `{% generation %}` around what the model says."""
    return (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{{- '<B_SYS>' + messages[0]['content'] -}}{%- set rest = messages[1:] -%}"
        "{%- else -%}"
        f"{{{{- '<B_SYS>{system_prompt}' -}}}}{{%- set rest = messages -%}}"
        "{%- endif -%}"
        "{%- for message in rest -%}"
        "{%- if message['role'] == 'user' -%}{{- '<C_Q>' + message['content'] -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- '<C_A>' -}}{%- generation -%}{{- message['content'] + '</s>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- raise_exception('roles are system, user and assistant') -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<C_A>' -}}{%- endif -%}"
    )


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text: markers written in the text are spelled out, never taken as special tokens."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_conversation(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Encodes a conversation; returns (token ids, which tokens are the assistant's, its `</s>` included).

    A conversation without a system message gets the default one, as in the chat template. If the last message is
    the user's, the ids end with `<C_A>`: the model's turn.

    Raises:
        ValueError: no messages, roles out of order, or an unknown role.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    ids: list[int] = []
    answers: list[bool] = []
    for position, message in enumerate(messages):
        role = message["role"]
        expected = "system" if position == 0 else ("user" if position % 2 else "assistant")
        if role != expected:
            raise ValueError(f"message {position} is of role '{role}', expected '{expected}'")
        turn = encode_text(tokenizer, message["content"])
        if role == "assistant":
            turn = [*turn, EOS]
        ids += [MARKERS[role], *turn]
        answers += [False] + [role == "assistant"] * len(turn)
    if messages[-1]["role"] == "user":
        ids.append(MARKERS["assistant"])
        answers.append(False)
    return ids, answers
