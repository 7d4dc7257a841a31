"""Models of different vocabularies: rows of embeddings and heads are matched by token, not by number.

Row i of an embedding belongs to the token whose id is i. Fine-tuning adds tokens, and ids move; merging row i
with row i then mixes different tokens. By default such models are refused (`difference` says where they
differ). A recipe may ask for rows to be matched by the token's string instead:

    tokenizer: {source: base}      the output has the base's tokens
    tokenizer: {source: union}     the output has the base's tokens, then those that only experts have

Nothing is copied: `align` wraps each model in a view (`RowMapped`) that gathers rows while it is read, so
that all models have the same tensors, row for row, and every method merges them as if they always had.

    tokenizer.json --read_tokens--> token -> row --align--> views of one shape --> statistics, methods
                                                     |
                                                     +--> new tokens --write_union_tokenizer--> tokenizer.json

An embedding may be taller than its tokenizer. Rows that no token names are called padding here.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from galenic.merge.io import TensorInfo, Weights, is_there
from galenic.runtime import UserError, read_json, write_json

EMBEDDINGS = (
    "embed_tokens",
    "embed_tokens_per_layer",
    "word_embeddings",
    "tok_embeddings",
    "wte",
    "embed_in",
)
"""Modules that hold a row per token, wherever they stand (prediction layers have embeddings of their own)."""
HEADS = (
    "lm_head",
    "embed_out",
    "output_layer",
    "shared_head.head",
    "lm_head.decoder",
    "cls.predictions",
    "cls.predictions.decoder",
    "vocab_projector",
)
"""Modules that hold an output row per token, wherever they stand."""
COMMON_EMBEDDINGS = ("embeddings", "embedding", "shared", "emb")
"""Embeddings with names that layers use for other things too: they count outside numbered layers only."""
COMMON_HEADS = ("output", "head", "decoder")
"""Heads with names that layers use for other things too: they count outside numbered layers only."""

PIECE, LOOKED_AT = 32768, 256
"""Elements of a tied head that are compared with its embedding at a time, and how many times at most (about)."""

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
"""What `tokenizer.json` says of an added token besides its id and string."""


# ---------------------------------------------------------------------------- vocabularies


def read_tokens(folder: str | Path) -> dict[str, int]:
    """Reads which row of the embedding each token has, from a model folder's `tokenizer.json`.

    The vocabulary of any model of the tokenizers library is understood: token -> row (BPE, WordPiece,
    WordLevel) or [token, score] in the order of rows (Unigram), together with the added tokens. An added
    token that the vocabulary holds too has the vocabulary's row, as in that library.

    Returns:
        Token -> row; empty if the folder has no `tokenizer.json`.

    Raises:
        UserError: the file is not JSON, holds no vocabulary, or a row is not a number from 0 up.
    """
    path = Path(folder) / "tokenizer.json"
    if not is_there(path):
        return {}
    values = read_json(path)
    try:
        vocabulary = values["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {token: row for row, (token, _) in enumerate(vocabulary)}
        added = {entry["content"]: entry["id"] for entry in values.get("added_tokens") or []}
        tokens: dict[str, int] = {**added, **vocabulary}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: not a tokenizer: expected model.vocab (token -> row, or a list of [token, score]) and "
            "added_tokens with content and id; save the tokenizer again with save_pretrained"
        ) from None
    for token, row in tokens.items():
        if not isinstance(token, str) or type(row) is not int or not 0 <= row < 2**31:
            raise UserError(
                f"{path}: token {token!r} has row {row!r}; tokens are strings and rows count from 0"
            )
    return tokens


def difference(base: Mapping[str, int], other: Mapping[str, int]) -> str:
    """Says in words how a vocabulary differs from the base's, and the way out.

    Args:
        base: token -> row of the base.
        other: token -> row of another model.

    Returns:
        Half a sentence without a subject file, to stand behind a path; empty if the two are equal.
    """
    moved = sorted(
        (token for token in base if other.get(token, base[token]) != base[token]), key=base.__getitem__
    )
    added = sorted(set(other) - set(base), key=other.__getitem__)
    missing = sorted(set(base) - set(other), key=base.__getitem__)
    parts = []
    if moved:
        first = moved[0]
        parts.append(
            f"{_count(moved)} at another row ({_ranges([base[token] for token in moved])} of the base: "
            f"{first!r} is row {base[first]} there and row {other[first]} here)"
        )
    if added:
        parts.append(f"{_count(added)} the base lacks ({_ranges([other[t] for t in added])}: {_few(added)})")
    if missing:
        parts.append(
            f"{_count(missing)} only the base has ({_ranges([base[t] for t in missing])}: {_few(missing)})"
        )
    if not parts:
        return ""
    return (
        f"its vocabulary is not the base's: {'; '.join(parts)}; rows of the embedding would mix different "
        "tokens, so write `tokenizer: {source: base}` to match rows by token, or `tokenizer: {source: "
        "union}` to keep new tokens too"
    )


def _count(tokens: Sequence[str]) -> str:
    return "1 token" if len(tokens) == 1 else f"{len(tokens)} tokens"


def _few(names: Sequence[str]) -> str:
    # repr: tokens hold line breaks and control characters, and a message is one line.
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _ranges(rows: Sequence[int]) -> str:
    """Writes ascending rows as ranges, the first three of them: `rows 3, 5 to 9, 11 and 2 more ranges`."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    shown = ", ".join(f"{low} to {high}" if low < high else f"{low}" for low, high in ranges[:3])
    more = f" and {len(ranges) - 3} more ranges" if len(ranges) > 3 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


# ---------------------------------------------------------------------------- which tensors


def vocabulary_tensors(weights: Weights, config: Mapping[str, Any]) -> list[str]:
    """Finds the tensors whose first dimension counts the rows of the vocabulary.

    The number of rows is config.json's `vocab_size` (or `text_config.vocab_size`) where an embedding has that
    many, else the embedding's own. A tensor belongs to the vocabulary if it has that many rows, is
    floating-point, is a `weight` or `bias`, and its module has the name of an embedding or a head
    (`EMBEDDINGS`, `HEADS`; and outside numbered layers `COMMON_EMBEDDINGS`, `COMMON_HEADS`). The name is
    asked for because a hidden size may happen to equal the number of rows; a classifier (`score`) has a row
    per class and is none of them.

    Args:
        weights: a model.
        config: its config.json; may be empty.

    Returns:
        Names in the model's order, at least one.

    Raises:
        UserError: the model has no embedding, or several of different height and the config does not say
        which.
    """
    heights = {
        info.shape[0]
        for name, info in weights.tensors.items()
        if len(info.shape) == 2 and _is_module(name, EMBEDDINGS, COMMON_EMBEDDINGS)
    }
    text_config = config.get("text_config")
    nested = text_config.get("vocab_size") if isinstance(text_config, Mapping) else None
    told = [size for size in (config.get("vocab_size"), nested) if isinstance(size, int) and size in heights]
    if not told and len(heights) != 1:
        found = f"embeddings of {sorted(heights)} rows" if heights else "no embedding"
        raise UserError(
            f"{weights.label}: {found} among its tensors (looked for "
            f"{', '.join(EMBEDDINGS + COMMON_EMBEDDINGS)}), so rows cannot be matched by token; set "
            "vocab_size in its config.json, or leave out `tokenizer`"
        )
    rows = told[0] if told else heights.pop()
    return [
        name
        for name, info in weights.tensors.items()
        if info.shape[:1] == (rows,) and info.dtype.is_floating_point and is_vocabulary(name)
    ]


def tied_heads(tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the output heads that a model's config says are its input embedding under another name.

    Some tools write such a copy; whoever loads the model does not look at it.

    Returns:
        Head -> the embeddings of its shape, of which it should be a copy (`check_tied` looks).
    """
    inner = settings.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    if not settings.get("tie_word_embeddings", inner.get("tie_word_embeddings")):
        return {}
    embeddings: dict[tuple[int, ...], list[str]] = {}
    for name, info in tensors.items():
        if name.endswith(".weight") and _is_module(name, EMBEDDINGS, COMMON_EMBEDDINGS):
            embeddings.setdefault(info.shape, []).append(name)
    return {
        name: embeddings[info.shape]
        for name, info in tensors.items()
        if name.endswith(".weight") and info.shape in embeddings and _is_module(name, HEADS, COMMON_HEADS)
    }


def check_tied(model: Weights, heads: Mapping[str, Sequence[str]]) -> None:
    """Compares heads that would be left out with the embedding they should be a copy of.

    Up to `LOOKED_AT` pieces spread over the tensor are read, all of a tensor of 8 million elements: training that a
    config does not know of changes a head everywhere, and this must not cost a pass.

    Args:
        model: holds the heads still.
        heads: of `tied_heads`.

    Raises:
        UserError: a head is another matrix than any embedding of its shape.
    """
    for head, embeddings in heads.items():
        size = model.tensors[head].numel
        starts = range(0, size, PIECE)
        for start in [*starts[:: len(starts) // LOOKED_AT + 1], *starts[-1:]]:
            stop = min(start + PIECE, size)
            own = model.read(head, start, stop).double()
            others = {name: model.read(name, start, stop).double() for name in embeddings}
            embeddings = [name for name, other in others.items() if own.equal(other)]
            if not embeddings:
                raise UserError(
                    f"{model.label}: '{head}' is no copy of the input embedding, though tie_word_embeddings is set "
                    "in config.json; set it to false in every model to merge the heads too, or remove the tensor"
                )


def is_vocabulary(name: str) -> bool:
    """Tells by its name whether a tensor holds a row per token."""
    return _is_module(name, EMBEDDINGS + HEADS, COMMON_EMBEDDINGS + COMMON_HEADS)


def _is_module(name: str, anywhere: Sequence[str], outside_layers: Sequence[str]) -> bool:
    """Tells whether a tensor is the weight or bias of a module of one of these names."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return False
    if any(f".{module}".endswith(f".{word}") for word in anywhere):
        return True
    path = module.split(".")
    return path[-1] in outside_layers and not any(part.isdigit() for part in path)


# ---------------------------------------------------------------------------- views


class RowMapped:
    """A view of a model with the rows of its vocabulary tensors rearranged; other tensors are the model's.

    With the model's tensor W of shape (rows_in, ...), the row map m and the fallback's tensor F:

        row i of the view = W[m_i]  where m_i >= 0,   F[i]  where m_i = -1             i = 0 .. rows_out - 1

    Values are never rounded: where rows of both are used, the view has the wider of their data types.

    The map is kept as runs of consecutive rows. Reading a range costs one read for each run it touches, so an
    unchanged vocabulary is as cheap to read as the model itself. Nothing changes after construction: reading
    is as thread-safe as it is in the models underneath.

    Args:
        weights: the model.
        names: its vocabulary tensors, all of the same height rows_in.
        rows: (rows_out,) int64, the row map; -1 takes the fallback's row.
        fallback: has these tensors with rows_out rows; looked at only if the map holds -1.

    Raises:
        UserError: a tensor is missing, its height differs from the others', the map points outside it, or the
            fallback's rows are of another shape.
    """

    def __init__(self, weights: Weights, names: Sequence[str], rows: Tensor, fallback: Weights) -> None:
        self.label = weights.label
        self._weights = weights
        self._names = frozenset(names)
        height = _height(weights, names)
        if len(rows) and not -1 <= int(rows.min()) <= int(rows.max()) < height:
            raise UserError(
                f"{weights.label}: the row map points at rows {int(rows.min())} to {int(rows.max())}; the "
                f"tensors of the vocabulary have rows 0 to {height - 1}, and -1 stands for the fallback's"
            )
        tensors = dict(weights.tensors)
        for name in names:
            info = tensors[name]
            shape, dtype = (len(rows), *info.shape[1:]), info.dtype
            if (rows == -1).any():
                other = fallback.tensors.get(name)
                if other is None or other.shape != shape:
                    found = f"is of shape {list(other.shape)}" if other else "is missing"
                    raise UserError(
                        f"{fallback.label}: '{name}' {found}; to take rows from it for {weights.label}, "
                        f"shape {list(shape)} is needed"
                    )
                dtype = torch.promote_types(dtype, other.dtype)
            tensors[name] = TensorInfo(dtype=dtype, shape=shape)
        self.tensors: Mapping[str, TensorInfo] = tensors
        # One number says where an output row comes from: the model's rows first, a gap, then the fallback's.
        # Runs are where it counts on.
        origin = torch.where(rows >= 0, rows, torch.arange(len(rows)) + height + 1)
        starts = torch.nonzero(origin.diff(prepend=torch.tensor([-2])) != 1).flatten()
        self._starts: list[int] = starts.tolist()
        self._ends: list[int] = [*self._starts[1:], len(rows)]
        self._runs: list[tuple[Weights, int]] = [
            (weights, row) if row < height else (fallback, row - height - 1)
            for row in origin[starts].tolist()
        ]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor, in the view's dtype."""
        if name not in self._names:
            return self._weights.read(name, start, stop)
        info = self.tensors[name]
        if start == stop:
            return torch.empty(0, dtype=info.dtype)
        width = math.prod(info.shape[1:])
        run = bisect_right(self._starts, start // width) - 1
        parts, position = [], start
        while position < stop:
            model, row = self._runs[run]
            end = min(stop, self._ends[run] * width)
            shift = (row - self._starts[run]) * width
            parts.append(model.read(name, position + shift, end + shift).to(info.dtype))
            position, run = end, run + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _height(weights: Weights, names: Sequence[str]) -> int:
    """Returns the common number of rows of the vocabulary tensors."""
    missing = [name for name in names if name not in weights.tensors]
    if missing or not names:
        raise UserError(f"{weights.label}: lacks {_few(missing) or 'tensors of a vocabulary'}")
    heights = {weights.tensors[name].shape[:1] for name in names}
    if len(heights) > 1 or heights == {()}:
        raise UserError(f"{weights.label}: {_few(list(names))} differ in their number of rows")
    return heights.pop()[0]


class _MeanRows:
    """Rows of tokens that the base lacks: the mean of the rows of the models that have them.

    Only rows that have an owner can be read. One owner: its row, bit for bit. Several:

        x_1 + sum_k (x_k - x_1) / n                                                              in float64,

    which is exactly x_1 where all agree. The data type holds this without rounding: float64 if any row has
    several owners, else the widest among the owners'.

    Args:
        names: vocabulary tensors.
        rows: how many rows the view has.
        owners: row -> the models that have it, each with its own row.
    """

    label = "mean of new tokens"

    def __init__(
        self, names: Sequence[str], rows: int, owners: Mapping[int, Sequence[tuple[Weights, int]]]
    ) -> None:
        self._owners = owners
        alone = all(len(models) == 1 for models in owners.values())
        tensors = {}
        for name in names:
            infos = {id(model): model.tensors[name] for models in owners.values() for model, _ in models}
            dtype = reduce(torch.promote_types, [info.dtype for info in infos.values()])
            shape = (rows, *next(iter(infos.values())).shape[1:])
            tensors[name] = TensorInfo(dtype=dtype if alone else torch.float64, shape=shape)
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the flattened elements [start, stop) of a tensor; every row in the range has an owner."""
        info = self.tensors[name]
        width = math.prod(info.shape[1:])
        parts = []
        for row in range(start // width, -(-stop // width)):
            low, high = max(start - row * width, 0), min(stop - row * width, width)
            first, *others = [
                model.read(name, own * width + low, own * width + high).to(info.dtype)
                for model, own in self._owners[row]
            ]
            mean = first
            for other in others:
                mean = mean + (other - first) / (1 + len(others))
            parts.append(mean)
        return torch.cat(parts)


# ---------------------------------------------------------------------------- alignment


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """Models whose vocabulary tensors agree row by row."""

    base: Weights
    """The base. In a union its vocabulary tensors may be of a wider dtype than its own (means need float64):
    the dtype of the merged model, where the recipe names none, is that of the base before alignment."""
    experts: list[Weights]
    """The experts, in the given order."""
    rows: int
    """Rows of the vocabulary tensors: the `vocab_size` of the merged model."""
    new_tokens: list[str]
    """Tokens the base lacks, in the order of their rows, behind the base's last token; none for `base`."""
    notes: list[str]
    """What was matched, missing, dropped and added, a sentence for each model."""


def align(
    source: Literal["base", "union"],
    base: Weights,
    base_tokens: Mapping[str, int],
    experts: Sequence[Weights],
    expert_tokens: Sequence[Mapping[str, int]],
    base_config: Mapping[str, Any],
    expert_configs: Sequence[Mapping[str, Any]],
) -> Aligned:
    """Makes views of models whose vocabulary tensors agree row by row.

    Rows of the output:

    * `base`: those of the base. Tokens that only experts have are dropped and counted.
    * `union`: those of the base, then a row for each token that only experts have, in the order of the
      experts and of their rows. New rows start right behind the base's last token, so they use up its padding
      before the embedding grows: ids follow each other, as the tokenizers library numbers them. The base's
      row of a new token is the mean of the rows of the experts that have it.

    An expert's row of the output is its row of the same token. Where it lacks the token it takes the base's
    row (for a new token: the mean), so its task vector is zero there. A token that one expert alone has is
    then equal in all models: it counts in no norm, and keeps that expert's row under every method that adds
    task vectors or averages models with weights that sum to 1. Padding is matched by row number where the row
    is padding in the expert too, since growing an embedding leaves its rows where they were; else it is the
    base's.

    Values are never rounded. Tied weights need nothing special: they are one tensor in every model, or two.

    Args:
        source: whose tokens the output has.
        base: the base model.
        base_tokens: its tokens (`read_tokens`).
        experts: T models.
        expert_tokens: T times their tokens.
        base_config: config.json of the base; may be empty.
        expert_configs: T times that of the experts.

    Raises:
        UserError: a model without tokens, a row that two tokens share, a row outside the embedding, a
            vocabulary tensor that is missing or of another width.
    """
    names = vocabulary_tensors(base, base_config)
    base_rows = _height(base, names)
    _check_tokens(base, base_tokens, base_rows)
    heights = []
    for expert, tokens, config in zip(experts, expert_tokens, expert_configs, strict=True):
        heights.append(_expert_height(expert, config, base, names))
        _check_tokens(expert, tokens, heights[-1])

    # ---- the output's tokens
    output = dict(base_tokens)
    first = 1 + max(base_tokens.values())
    for tokens in expert_tokens if source == "union" else []:
        for token in sorted(tokens, key=tokens.__getitem__):
            output.setdefault(token, first + len(output) - len(base_tokens))
    new_tokens = list(output)[len(base_tokens) :]
    rows = max(base_rows, first + len(new_tokens))

    # ---- views
    aligned_base = base
    if new_tokens:
        owners = {
            output[token]: [
                (expert, tokens[token])
                for expert, tokens in zip(experts, expert_tokens, strict=True)
                if token in tokens
            ]
            for token in new_tokens
        }
        kept = torch.arange(rows)
        kept[list(owners)] = -1
        aligned_base = RowMapped(base, names, kept, _MeanRows(names, rows, owners))
    views: list[Weights] = [
        RowMapped(expert, names, _row_map(output, rows, tokens, height), aligned_base)
        for expert, tokens, height in zip(experts, expert_tokens, heights, strict=True)
    ]

    # ---- notes
    notes = []
    for expert, tokens in zip(experts, expert_tokens, strict=True):
        shared = [token for token in tokens if token in base_tokens]
        moved = sum(tokens[token] != base_tokens[token] for token in shared)
        fate = "dropped" if source == "base" else "in the union"
        notes.append(
            f"{expert.label}: {len(shared)} tokens matched with the base's, {moved} of them from another "
            f"row; {len(base_tokens) - len(shared)} missing, which keep the base's rows; "
            f"{len(tokens) - len(shared)} that the base lacks, {fate}"
        )
    if new_tokens:
        notes.append(
            f"{_count(new_tokens)} added to the base's vocabulary "
            f"({_ranges(range(first, first + len(new_tokens)))}); the embedding has {rows} rows, the base's "
            f"{base_rows}"
        )
    alike = [
        name
        for name, info in base.tensors.items()
        if info.shape[:1] == (base_rows,) and info.dtype.is_floating_point and name not in names
    ]
    if alike:
        notes.append(
            f"{_few(alike)}: as many rows as the vocabulary, but not the name of an embedding or a head; "
            "taken for something else and left as it is"
        )
    return Aligned(base=aligned_base, experts=views, rows=rows, new_tokens=new_tokens, notes=notes)


def _check_tokens(model: Weights, tokens: Mapping[str, int], rows: int) -> None:
    """Refuses vocabularies that do not name rows of the embedding one to one."""
    if not tokens:
        raise UserError(
            f"{model.label}: has no tokenizer.json, without which its rows cannot be matched by token; add "
            "it, or leave out `tokenizer` if its vocabulary is known to be the base's"
        )
    owner: dict[int, str] = {}
    for token, row in tokens.items():
        if row in owner:
            raise UserError(
                f"{model.label}: its tokenizer gives row {row} to both {owner[row]!r} and {token!r}; mend "
                "its tokenizer.json"
            )
        if row >= rows:
            raise UserError(
                f"{model.label}: token {token!r} has row {row}, but the embedding has {rows} rows; resize "
                "the embedding or remove the token from tokenizer.json"
            )
        owner[row] = token


def _expert_height(expert: Weights, config: Mapping[str, Any], base: Weights, names: Sequence[str]) -> int:
    """Returns the rows of an expert's vocabulary tensors, which must be the base's by name and width."""
    found = vocabulary_tensors(expert, config)
    rows = expert.tensors[found[0]].shape[0]
    for name in names:
        if name not in found:
            state = f"is not of {rows} rows" if name in expert.tensors else "is missing"
            raise UserError(
                f"{expert.label}: '{name}' {state}, though it belongs to the vocabulary in {base.label}; "
                "tied weights must be stored alike in all models"
            )
        if expert.tensors[name].shape[1:] != base.tensors[name].shape[1:]:
            raise UserError(
                f"{expert.label}: '{name}' has rows of shape {list(expert.tensors[name].shape[1:])}, in "
                f"{base.label} {list(base.tensors[name].shape[1:])}; only models of one width can be merged"
            )
    return rows


def _row_map(output: Mapping[str, int], rows: int, tokens: Mapping[str, int], height: int) -> Tensor:
    """Returns where the output's rows lie in a model of `height` rows, -1 for nowhere: (rows,) int64."""
    row_map = torch.full((rows,), -1)
    shared = [token for token in output if token in tokens]
    row_map[[output[token] for token in shared]] = torch.tensor(
        [tokens[token] for token in shared], dtype=torch.int64
    )
    named = set(output.values()) | set(tokens.values())
    padding = [row for row in range(min(rows, height)) if row not in named]
    row_map[padding] = torch.tensor(padding, dtype=torch.int64)
    return row_map


# ---------------------------------------------------------------------------- the union's tokenizer


def write_union_tokenizer(
    base_folder: str | Path,
    expert_folders: Sequence[str | Path],
    new_tokens: Sequence[str],
    out_folder: str | Path,
) -> int:
    """Writes the tokenizer of a union: the base's, with the new tokens as added tokens.

    New tokens get the ids behind the base's last one, in the given order: the rows `align` gave them. Their
    flags are those of the first expert that lists them as added tokens. What is an ordinary entry of an
    expert's vocabulary becomes a plain added token in the spelling of that vocabulary: texts in which the
    string stands literally are split at it, all others are encoded as the base encodes them. (An entry of a
    byte-level vocabulary is not spelled as text is: it is decoded properly, but encoding hardly ever makes
    use of it.)

    `tokenizer.json` is written, and `tokenizer_config.json` if the base's lists its added tokens.

    Args:
        base_folder: the base.
        expert_folders: the experts, in the recipe's order.
        new_tokens: `Aligned.new_tokens`.
        out_folder: exists; files in it are replaced.

    Returns:
        The highest id plus 1. The embedding has as many rows or more (`Aligned.rows`).

    Raises:
        UserError: the base has no tokenizer.json, a file is malformed, or the tokenizers library would not
            give a new token the id of its row (it ignores the ids in the file and counts on: gaps confuse
            it).
    """
    from tokenizers import Tokenizer

    path = Path(base_folder) / "tokenizer.json"
    values = read_json(path)
    first = 1 + max(read_tokens(base_folder).values(), default=-1)
    listed: dict[str, dict[str, Any]] = {}
    for folder in reversed(expert_folders):
        if read_tokens(folder):  # checked, so that its added tokens can be relied on
            entries = read_json(Path(folder) / "tokenizer.json").get("added_tokens") or []
            listed |= {entry["content"]: entry for entry in entries}
    added = {
        row: {"content": token} | {flag: bool(listed.get(token, {}).get(flag)) for flag in FLAGS}
        for row, token in enumerate(new_tokens, start=first)
    }
    values["added_tokens"] = [
        *(values.get("added_tokens") or []),
        *({"id": row} | entry for row, entry in added.items()),
    ]
    try:
        loaded = Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the tokenizers library cannot load it ({reason})") from None
    for row, token in enumerate(new_tokens, start=first):
        if (found := loaded.token_to_id(token)) != row:
            raise UserError(
                f"{path}: the new token {token!r} would get id {found} instead of {row}, as the base's ids "
                "have gaps; write `tokenizer: {source: base}`"
            )
    write_json(Path(out_folder) / "tokenizer.json", values)

    path = Path(base_folder) / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    decoder = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
    if isinstance(decoder, dict):
        decoder |= {str(row): entry for row, entry in added.items()}
        write_json(Path(out_folder) / "tokenizer_config.json", settings)
    return first + len(added)
