"""The verb `chat`: talk to one model in the terminal, answers appear as they are written.

On a terminal it reads questions at a prompt; from a pipe it reads one question a line and writes answers only.
`/reset` forgets the conversation, `/quit` or Ctrl-D ends it, Ctrl-C stops an answer.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from galenic.corpus.tokens.chat_template import encode_chat
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any
from galenic.runtime import Plan, UserError, human, torch_setup

from .config import ChatConfig

NOTICE = "Answers come from a small language model. They are not medical advice."


def plan(config: ChatConfig) -> Plan:
    """Checks that the folder holds a model.

    Raises:
        UserError: it does not.
    """
    weights = _weights(config.model)
    size = human(sum(file.stat().st_size for file in weights))
    return Plan(reads=config.reads(), writes=[], facts={"weights": f"{size}B", "notice": NOTICE})


def run(config: ChatConfig) -> None:
    """Answers questions until they end.

    Raises:
        UserError: the folder holds no model.
    """
    _weights(config.model)
    torch_setup(config.seed)
    model, tokenizer = load_any(config.model), load_tokenizer(config.model)
    print(NOTICE, file=sys.stderr, flush=True)
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # input() then edits lines and remembers them

        print(
            "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer",
            file=sys.stderr,
        )
    history = _start(config)
    while (question := _ask(terminal)) is not None:
        if question == "/quit":
            break
        if question == "/reset":
            history = _start(config)
        elif question:
            _turn(model, tokenizer, history, question, config)


def _weights(path: str) -> list[Path]:
    files = sorted(Path(path).glob("*.safetensors"))
    if not (Path(path) / "config.json").is_file() or not files:
        raise UserError(f"{path}: is not a model folder (config.json and *.safetensors expected)")
    return files


def _start(config: ChatConfig) -> list[dict[str, str]]:
    return [] if config.system is None else [{"role": "system", "content": config.system}]


def _ask(terminal: bool) -> str | None:
    """Returns the next question without surrounding space; none at the end of the input."""
    if not terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _turn(
    model: Any, tokenizer: Any, history: list[dict[str, str]], question: str, config: ChatConfig
) -> None:
    """Answers one question and adds both to the history; what no longer fits is dropped, oldest first."""
    context = int(model.config.max_position_embeddings)
    length = min(config.max_new_tokens, context // 2)
    history.append({"role": "user", "content": question})
    try:
        ids, dropped = fit(tokenizer, history, context - length)
    except ValueError as error:  # a template that takes no such conversation, or a marker in the question
        history.pop()
        print(f"[{error}]", file=sys.stderr, flush=True)
        return
    if not ids:
        history.pop()
        print(f"[too long: the model reads at most {context - length} tokens]", file=sys.stderr, flush=True)
        return
    if dropped:
        print(f"[forgot the oldest {dropped} turns to make room]", file=sys.stderr, flush=True)
    writer = _Writer(tokenizer)
    sampling = config.temperature > 0
    generation = GenerationConfig(
        max_new_tokens=length,
        do_sample=sampling,
        **({"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if sampling else {}),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    prompt = torch.tensor([ids])
    try:
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=generation, streamer=writer
        )
    except KeyboardInterrupt:
        writer.end()
    history.append({"role": "assistant", "content": writer.text})


def fit(tokenizer: Any, history: list[dict[str, str]], room: int) -> tuple[list[int], int]:
    """Encodes the conversation in at most `room` tokens; removes the oldest turns from `history` until it fits.

    Returns:
        (token ids, turns removed); no ids when the last question alone does not fit, and then nothing is removed.
    """
    first = 1 if history[0]["role"] == "system" else 0
    kept = list(history)
    while len(ids := encode_chat(tokenizer, kept)[0]) > room:
        if len(kept) - first < 2:
            return [], 0
        del kept[first : first + 2]
    dropped = (len(history) - len(kept)) // 2
    history[:] = kept
    return ids, dropped


class _Writer(TextStreamer):
    """Writes the answer as it comes and keeps it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, flush=True, end="\n" if stream_end else "")
