"""Documents as token ids, and the two tasks of encoders: filling in masked tokens, and naming the class."""

from typing import Any

import numpy as np

from galenic.corpus.tokens.chat_format import BOS, EOS
from galenic.flatten.tables import count_rows, read_columns
from galenic.model import BaichuanM1ForCausalLM
from galenic.pretrain.data.collate import IGNORE
from galenic.runtime import UserError, nearest

MASKED = 0.15
"""Share of an encoder's tokens that it has to fill in."""


def shuffled(count: int, seed: int, split: str) -> tuple[list[int], np.random.Generator]:
    """Returns all numbers below `count` in an order of the seed and the split, and the generator that goes on."""
    generator = np.random.Generator(np.random.Philox(key=[seed, split == "train"]))
    return generator.permutation(count).tolist(), generator


def count_documents(files: list[str], columns: list[str]) -> int:
    """Returns how many documents files hold together; see `count_rows`."""
    return sum(count_rows(file, columns) for file in files)


def read_documents(files: list[str], columns: list[str]) -> list[tuple[str, list[Any]]]:
    """Reads all documents of files as (where it stands, its columns' values).

    Raises:
        UserError: see `read_columns`; a text that is none.
    """
    documents = []
    for file in files:
        for row, values in enumerate(zip(*read_columns(file, columns), strict=True), start=1):
            if not isinstance(values[0], str):
                raise UserError(
                    f"{file}: row {row}: column '{columns[0]}' holds {type(values[0]).__name__}, not text"
                )
            documents.append((f"{file}: row {row}", list(values)))
    return documents


# ---------------------------------------------------------------------------- tokens


def encode(tokenizer: Any, text: str, place: str, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a document as the tokenizer does for its model; a marker written in a document is text.

    Args:
        tokenizer: the model's.
        text: of the document.
        place: where it stands, for errors.
        length: at most so many tokens, what the tokenizer puts around them included.

    Returns:
        Its ids and whether each is of the text itself, (tokens,) int64 and bool.

    Raises:
        UserError: there is no token of the text.
    """
    found = tokenizer(
        text,
        truncation=length is not None,
        max_length=length,
        return_special_tokens_mask=True,
        split_special_tokens=True,
        verbose=False,
    )
    own = ~np.array(found["special_tokens_mask"], dtype=bool)
    if not own.any():
        raise UserError(f"{place}: a text of zero tokens; take it out")
    return np.array(found["input_ids"], dtype=np.int64), own


def encode_for(model: Any, tokenizer: Any, text: str, place: str) -> np.ndarray:
    """Encodes a document for a causal language model: ours has a token at each end, others what theirs does."""
    ids, own = encode(tokenizer, text, place)
    return np.array([BOS, *ids[own], EOS]) if isinstance(model, BaichuanM1ForCausalLM) else ids


def hide(
    ids: np.ndarray, own: np.ndarray, tokenizer: Any, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hides 15% of a document's tokens, at least one: 80% of them become the mask, 10% another token, 10% stay.

    Source: BERT, arXiv 1810.04805, section 3.1.

    Args:
        ids: (tokens,) of the document.
        own: (tokens,) True where a token is the document's own.
        tokenizer: has a mask token.
        generator: of the choice.

    Returns:
        (what the model sees, the labels: hidden tokens and -100 elsewhere), both (tokens,) int64.
    """
    places = np.flatnonzero(own)
    chosen = generator.permutation(places)[: max(1, round(MASKED * len(places)))]
    labels = np.full_like(ids, IGNORE)
    labels[chosen] = ids[chosen]
    seen, fate = ids.copy(), generator.random(len(chosen))
    seen[chosen[fate < 0.8]] = tokenizer.mask_token_id
    other = chosen[fate >= 0.9]
    seen[other] = generator.integers(0, len(tokenizer), len(other))
    return seen, labels


def padded(rows: list[np.ndarray], filling: int) -> np.ndarray:
    """Lays rows of different lengths into one array, (rows, longest) int64."""
    laid = np.full((len(rows), max(map(len, rows))), filling, dtype=np.int64)
    for place, row in zip(laid, rows, strict=True):
        place[: len(row)] = row
    return laid


# ---------------------------------------------------------------------------- classes


def class_number(label: Any, place: str, config: Any) -> int:
    """Returns the number of a class, given by the name it has in the model's config or by its number.

    Raises:
        UserError: the model does not know it.
    """
    names: dict[str, int] = {name: int(number) for number, name in config.id2label.items()}
    names |= config.label2id or {}  # a config may name its classes in one direction only
    if isinstance(label, str) and label in names:
        return names[label]
    number = int(label) if isinstance(label, int) or (isinstance(label, str) and label.isdecimal()) else -1
    if 0 <= number < config.num_labels:
        return number
    listed = ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
    hint = nearest(label, names) if isinstance(label, str) else ""
    raise UserError(
        f"{place}: label {label!r} is none of the model's {config.num_labels} classes{hint}: {listed}, or their "
        f"numbers from 0 to {config.num_labels - 1}"
    )
