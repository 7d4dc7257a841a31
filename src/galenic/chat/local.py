"""A model folder that answers in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from galenic.chat.config import Sampling
from galenic.chat.endpoint import Failed
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.model import load_tokenizer
from galenic.model.export.quantize import is_quantized, load_quantized
from galenic.model.foreign import load_any
from galenic.runtime import UserError

Messages = list[dict[str, str]]


class Local:
    """A loaded model.

    Args:
        folder: of the model.

    Raises:
        UserError: the folder holds no model, or one without a chat format.
    """

    def __init__(self, folder: str) -> None:
        self.tokenizer = talking_tokenizer(folder)
        self.model = load_quantized(folder) if is_quantized(folder) else load_any(folder)
        self.context = int(getattr(self.model.config, "max_position_embeddings", 4096))

    def answer(
        self, history: Messages, sampling: Sampling, write: Callable[[str], None], note: Callable[[str], None]
    ) -> tuple[str, str]:
        """Answers the last message; drops the oldest turns that do not fit from `history`.

        Args:
            history: the conversation, the user's question last.
            sampling: how to draw.
            write: gets the answer piece by piece, and the end of its line.
            note: gets what there is to say about it.

        Returns:
            (answer, why it ended: `stop`, `length` or `interrupted`).

        Raises:
            Failed: the conversation cannot be put to the model.
        """
        length = min(sampling.max_new_tokens, self.context // 2)
        try:
            ids, dropped = fit(self.tokenizer, history, self.context - length)
        except ValueError as error:  # a template that takes no such conversation, or a marker in the question
            raise Failed(str(error)) from None
        if not ids:
            raise Failed(f"too long: the model reads at most {self.context - length} tokens")
        if dropped:
            note(f"[forgot the oldest {dropped} turns to make room]")
        writer = _Writer(self.tokenizer, write)
        prompt = torch.tensor([ids])
        try:
            made = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=_generation(self.tokenizer, sampling, length),
                streamer=writer,
            )
        except KeyboardInterrupt:
            writer.end()
            return writer.text, "interrupted"
        ended = made.shape[1] - len(ids) < length or int(made[0, -1]) == self.tokenizer.eos_token_id
        return writer.text, "stop" if ended else "length"


def weights(path: str) -> list[Path]:
    """Returns a model folder's weight files.

    Raises:
        UserError: it holds no model.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not (Path(path) / "config.json").is_file() or not files:
        raise UserError(f"{path}: is not a model folder (config.json and *.safetensors expected)")
    return files


def talking_tokenizer(folder: str) -> Any:
    """Loads the tokenizer of a model folder.

    Raises:
        UserError: there is none, or it has no chat format.
    """
    weights(folder)
    tokenizer = load_tokenizer(folder)
    try:
        encode_chat(tokenizer, [{"role": "user", "content": "?"}])
    except ValueError as error:
        raise UserError(
            f"{folder}: one cannot talk to this model: {error}; `galenic sft` makes one that answers"
        ) from None
    return tokenizer


def _generation(tokenizer: Any, sampling: Sampling, length: int) -> GenerationConfig:
    drawn = {
        "temperature": float(sampling.temperature),  # transformers takes no whole number
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k,
    }
    return GenerationConfig(
        max_new_tokens=length,
        do_sample=sampling.temperature > 0,
        **(drawn if sampling.temperature > 0 else {}),
        repetition_penalty=float(sampling.repetition_penalty),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def fit(tokenizer: Any, history: Messages, room: int) -> tuple[list[int], int]:
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
    """Hands the answer on as it comes and keeps it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._write = "", write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._write(text + "\n" if stream_end else text)
