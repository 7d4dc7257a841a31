"""What a model is flattened on: batches of packed text, of documents one by one, or of labelled pictures."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from galenic.corpus.tokens.chat_format import PAD
from galenic.flatten import documents, images
from galenic.flatten.config import FlattenConfig
from galenic.flatten.packed import Row, conversation_rows, document_rows, shard_rows, source_tokens
from galenic.model import load_tokenizer
from galenic.model.foreign import Kind, folder_kind, kind_of
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.runtime import UserError, human


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A few rows of packed documents, documents of their own, or pictures."""

    inputs: dict[str, Any]
    """The model's keywords; tensors have a row of the batch in each row."""
    labels: Tensor
    """int64. Next or masked tokens: (rows, tokens), the tokens themselves, -100 where nothing is predicted. Classes:
    (rows,)."""
    mask: Tensor | None
    """(rows, tokens) bool: True on tokens of documents, False on the filling at a row's end. None for pictures."""
    task: Literal["next token", "masked token", "class"] = "next token"
    """What is predicted."""

    def take(self, rows: Tensor) -> "Batch":
        """Returns some of its rows, by their (n,) indices."""
        inputs = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, inputs=inputs, labels=self.labels[rows], mask=mask)

    @property
    def tokens(self) -> int:
        """Tokens of documents, or samples that have a class."""
        if self.task == "class" or self.mask is None:
            return len(self.labels)
        return int(self.mask.sum())


# ---------------------------------------------------------------------------- losses


def _aligned(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns (N, K) logits and the (N,) targets that they predict, -100 among them."""
    if batch.task == "class":
        return logits, batch.labels
    if batch.task == "masked token":
        return logits.flatten(0, 1), batch.labels.flatten()
    return logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()


def summed_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Returns the summed cross-entropy (nats) of what is predicted, and how much that is."""
    rows, targets = _aligned(logits, batch)
    loss = F.cross_entropy(rows, targets, ignore_index=IGNORE, reduction="sum")
    return loss, int((targets != IGNORE).sum())


def flat_logits(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the (n, K) logits that predict something and their (n,) targets."""
    rows, targets = _aligned(logits, batch)
    counts = targets != IGNORE
    return rows[counts], targets[counts]


def correct(logits: Tensor, batch: Batch) -> Tensor | None:
    """Returns which classes are predicted right, (rows,) bool; None where tokens are predicted."""
    return logits.argmax(-1) == batch.labels if batch.task == "class" else None


def first_rows(batches: list[Batch], count: int) -> list[Batch]:
    """Returns the first so many rows, in the given batches (the last one cut)."""
    chosen = []
    for batch in batches:
        if count <= 0:
            break
        chosen.append(batch.take(torch.arange(min(count, len(batch.labels)))))
        count -= len(batch.labels)
    return chosen


# ---------------------------------------------------------------------------- any data


def read_batches(config: FlattenConfig, split: str, model: Any, alone: bool = False) -> list[Batch]:
    """Reads the data of a split, chosen by the config's seed: as much as the config says, or all there is.

    Args:
        config: names the data.
        split: `train` or `heldout`.
        model: whose data it is.
        alone: one document or conversation a row, for causal language models that would mix packed ones.

    Raises:
        UserError: data that is missing or damaged, or not what the model reads.
    """
    kind = kind_of(type(model).__name__)
    assert kind, "load_any opens models of known kinds"
    refuse_other_data(config, kind)
    tokens = config.train_tokens if split == "train" else config.heldout_tokens
    if kind == "image classifier":
        return list(_pictures(config, split, model))
    if kind == "text classifier":
        return list(_classified(config, split, model))
    if kind == "masked language model":
        return list(_masked(config, split, tokens, model))
    if config.documents:
        return _collated(config, document_rows(config, split, tokens, model, alone))
    return read_rows(config, split, tokens, alone)


def refuse_other_data(config: FlattenConfig, kind: Kind) -> None:
    """Raises a UserError if the data is of another kind than a model reads."""
    allowed = {
        "causal language model": ["tokens", "conversations", "documents"],
        "masked language model": ["documents"],
        "text classifier": ["documents"],
        "image classifier": ["images"],
    }[kind]
    given = next(name for name in ("tokens", "conversations", "documents", "images") if getattr(config, name))
    if given not in allowed:
        raise UserError(f"{given}: {config.model} is of kind {kind}, which reads {' or '.join(allowed)}")


def describe(config: FlattenConfig, split: str) -> str:
    """Says how much data a split has, without a model; what is missing or misshaped is found here.

    Raises:
        UserError: see `read_batches`.
    """
    kind = folder_kind(config.model)
    refuse_other_data(config, kind)
    tokens, samples, files = _wanted(config, split)
    if config.tokens:
        return f"{human(sum(source_tokens(config, split, tokens).values()))} tokens"
    if config.conversations:
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"{file}: no such file")
        return f"{human(tokens)} tokens"
    if config.images:
        found = len(images.list_pictures(files, config.image_column, config.label_column))
        return f"{min(samples, found)} of {found} pictures"
    found = documents.count_documents(files, _columns(config, kind))
    if kind == "text classifier":
        return f"{min(samples, found)} of {found} documents"
    return f"{human(tokens)} tokens of {found} documents"


def _wanted(config: FlattenConfig, split: str) -> tuple[int, int, list[str]]:
    """Returns tokens, samples and files of a split."""
    if split == "train":
        files = config.conversations or config.documents or config.images
        return config.train_tokens, config.train_samples, files
    return config.heldout_tokens, config.heldout_samples, config.heldout


def _columns(config: FlattenConfig, kind: Kind) -> list[str]:
    return [config.text_column, *([config.label_column] if kind == "text classifier" else [])]


# ---------------------------------------------------------------------------- packed text


def read_rows(config: FlattenConfig, split: str, tokens: int, alone: bool = False) -> list[Batch]:
    """Packs about so many tokens of a split into rows, chosen by the config's seed, and batches them.

    Args:
        config: names the text.
        split: `train` or `heldout`.
        tokens: filling included.
        alone: one conversation a row, for models that would mix packed ones.
    """
    laid = (
        conversation_rows(config, split, tokens, alone)
        if config.conversations
        else shard_rows(config, split, tokens)
    )
    return _collated(config, laid)


def _collated(config: FlattenConfig, laid: list[Row]) -> list[Batch]:
    """Lays rows of packed documents into batches."""
    batches = []
    for start in range(0, len(laid), config.batch_rows):
        rows = laid[start : start + config.batch_rows]
        batch = collate(rows, config.row_length, PAD)
        lengths = torch.tensor([sum(len(text) for text, _ in row) for row in rows])
        batches.append(
            Batch(
                labels=batch.pop("labels"),
                mask=torch.arange(config.row_length) < lengths[:, None],
                inputs=batch | {"use_cache": False},
            )
        )
    return batches


# ---------------------------------------------------------------------------- encoders and classifiers


def _masked(config: FlattenConfig, split: str, tokens: int, model: Any) -> Iterator[Batch]:
    """Draws documents of files, a document a row, and hides some of their tokens."""
    tokenizer = load_tokenizer(config.model)
    if tokenizer.mask_token_id is None:
        raise UserError(f"{config.model}: its tokenizer has no mask token, which an encoder's loss needs")
    _refuse_long_rows(config, model)
    found = documents.read_documents(_wanted(config, split)[2], [config.text_column])
    order, generator = documents.shuffled(len(found), config.seed, split)
    rows, drawn = [], 0
    for index in order:
        if drawn >= tokens:
            break
        place, (text,) = found[index]
        ids, own = documents.encode(tokenizer, text, place, config.row_length)
        rows.append(documents.hide(ids, own, tokenizer, generator))
        drawn += len(ids)
    for start in range(0, len(rows), config.batch_rows):
        seen, labels = zip(*rows[start : start + config.batch_rows], strict=True)
        inputs, mask = _padded(list(seen), _filling(model, tokenizer))
        targets = torch.from_numpy(documents.padded(list(labels), IGNORE))
        yield Batch(inputs=inputs, labels=targets, mask=mask, task="masked token")


def _classified(config: FlattenConfig, split: str, model: Any) -> Iterator[Batch]:
    """Draws labelled documents of files."""
    tokenizer = load_tokenizer(config.model)
    _refuse_no_classes(config, model)
    _refuse_long_rows(config, model)
    if model.config.pad_token_id is None:
        raise UserError(
            f"{config.model}/config.json: no pad_token_id, by which {type(model).__name__} finds where a document "
            "ends; add it"
        )
    _, samples, files = _wanted(config, split)
    found = documents.read_documents(files, _columns(config, "text classifier"))
    order, _ = documents.shuffled(len(found), config.seed, split)
    order = order[:samples]
    for start in range(0, len(order), config.batch_rows):
        rows, labels = [], []
        for place, (text, label) in (found[i] for i in order[start : start + config.batch_rows]):
            rows.append(documents.encode(tokenizer, text, place, config.row_length)[0])
            labels.append(documents.class_number(label, place, model.config))
        inputs, mask = _padded(rows, model.config.pad_token_id)
        yield Batch(inputs=inputs, labels=torch.tensor(labels), mask=mask, task="class")


def _pictures(config: FlattenConfig, split: str, model: Any) -> Iterator[Batch]:
    """Draws labelled pictures."""
    processor = images.load_processor(config.model)
    _refuse_no_classes(config, model)
    _, samples, places = _wanted(config, split)
    found = images.list_pictures(places, config.image_column, config.label_column)
    order, _ = documents.shuffled(len(found), config.seed, split)
    order = order[:samples]
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    for start in range(0, len(order), config.batch_rows):
        chosen = [found[i] for i in order[start : start + config.batch_rows]]
        labels = [
            documents.class_number(picture[2], images.where(picture), model.config) for picture in chosen
        ]
        pictures = list(images.open_pictures(chosen, config.image_column, mode))
        try:
            inputs = dict(processor(pictures, return_tensors="pt"))
            batch = Batch(inputs=inputs, labels=torch.tensor(labels), mask=None, task="class")
            if not start:
                with torch.no_grad():
                    model(**first_rows([batch], 1)[0].inputs)
        except (RuntimeError, TypeError, ValueError) as error:
            words = " ".join(str(error).split())[:300]
            raise UserError(
                f"{config.model}/preprocessor_config.json: makes pictures that do not fit the model ({words})"
            ) from None
        yield batch


def _padded(rows: list[np.ndarray], filling: int) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs of rows of different lengths, and which of their tokens are of documents."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.from_numpy(documents.padded(rows, filling))
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}, mask


def _filling(model: Any, tokenizer: Any) -> int:
    """Returns the token that fills rows; none of it is looked at."""
    own = model.config.pad_token_id
    return own if own is not None else tokenizer.pad_token_id or 0


def _refuse_long_rows(config: FlattenConfig, model: Any) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.row_length > limit:
        raise UserError(
            f"row_length: {config.row_length} is more than the {limit} positions of {config.model}"
        )


def _refuse_no_classes(config: FlattenConfig, model: Any) -> None:
    problem = getattr(model.config, "problem_type", None) or "single_label_classification"
    if problem != "single_label_classification" or model.config.num_labels < 2:
        raise UserError(
            f"{config.model}: does not choose one of several classes (problem_type {problem}, "
            f"{model.config.num_labels} labels); only classifiers that do can be flattened"
        )
