"""Bits per byte on held-out documents of every source, scored with the model as it trains: sharded, split, anywhere.

The number is that of `evaluate.bits_per_byte`: documents longer than the context are scored in the same overlapping
windows. Here the windows are packed into rows as training documents are, so a forward pass has training's shape and
whatever spreads the work of a step spreads this. All processes make the same number of calls.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from galenic.corpus.tokens.shards import read_meta, read_shard, special_tokens
from galenic.pretrain.config import PhaseConfig, PretrainConfig
from galenic.pretrain.data.collate import IGNORE, collate
from galenic.pretrain.data.packing import best_fit

if TYPE_CHECKING:
    from galenic.evaluate.bits_per_byte import Scored
    from galenic.pretrain.parallelism.parallel import Parallel
    from galenic.pretrain.watching.watch import Watch

BATCH_TOKENS = 8192
"""Tokens of a forward pass in each process, about."""


def heldout_texts(tokenizer: str, source: str, tokens: int) -> list["Scored"]:
    """Returns the first held-out documents of a source: as many as fit `tokens`, and at least one if there is one."""
    from galenic.evaluate.bits_per_byte import document

    shard = read_shard(tokenizer, source, "heldout")
    texts, count = [], 0
    for index in range(len(shard)):
        ids = shard.document(index)
        count += len(ids)
        if texts and count > tokens:
            break
        texts.append(document(ids, int(shard.bytes[index])))
    return texts


def pieces(text: "Scored", context: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts a text into the windows it is scored in: (token ids, labels), both (length,) int64.

    Each counted token is the label of one window, the others are context.
    """
    from galenic.evaluate.likelihood import windows

    wanted = np.where(text.counted, text.ids, IGNORE)
    found = []
    for start, end, first in windows(len(text.ids), context):
        labels = np.full(end - start, IGNORE, dtype=np.int64)
        labels[first - start :] = wanted[first:end]
        found.append((text.ids[start:end], labels))
    return found


def heldout_bits(model: Any, config: PretrainConfig, context: int, parallel: "Parallel") -> dict[str, float]:
    """Scores held-out documents of every source, at most `heldout_tokens` each. All processes call it together.

    Args:
        model: the network as it trains; it is left in training mode.
        config: names the shards and `heldout_tokens`.
        context: most tokens the model takes at once.
        parallel: how the work is spread.

    Returns:
        {source: bits per byte}, the same in every process; sources without held-out documents are left out.
    """
    import torch

    meta = read_meta(config.tokenizer)
    texts = {s: heldout_texts(config.tokenizer, s, config.heldout_tokens) for s in meta["sources"]}
    texts = {source: found for source, found in texts.items() if found}
    parts = [
        (number, piece)
        for number, found in enumerate(texts.values())
        for text in found
        for piece in pieces(text, context)
    ]
    packed = best_fit([len(ids) for _, (ids, _) in parts], context) if parts else []
    most = parallel.data_ranks * max(1, BATCH_TOKENS // context)
    calls = math.ceil(len(packed) / most)
    # Rows of one call, of all processes together. Some may be padding: no process makes a call less than another.
    size = parallel.data_ranks * math.ceil(len(packed) / max(1, calls) / parallel.data_ranks)
    pad = special_tokens(meta)["pad"]
    device = next(model.parameters()).device
    sums = torch.zeros(len(texts), dtype=torch.float64, device=device)
    model.train()  # context parallelism splits rows in this mode only; the network draws nothing in it
    with torch.no_grad():
        for call in range(calls):
            rows = packed[call * size : (call + 1) * size]
            rows += [[]] * (size - len(rows))
            batch = _laid([[parts[i] for i in rows[row]] for row in parallel.rows(size)], context, pad)
            batch = {name: tensor.to(device) for name, tensor in parallel.local(batch).items()}
            domains = batch.pop("domains").flatten()
            losses = model(**batch, num_items_in_batch=1, skip_logits=True, use_cache=False).token_losses
            known = domains >= 0
            sums.index_add_(0, domains[known], losses.flatten()[known].double())
    nats = parallel.added(sums).tolist()
    sizes = [sum(text.bytes for text in found) for found in texts.values()]
    return {
        source: loss / math.log(2) / size
        for source, loss, size in zip(texts, nats, sizes, strict=True)
        if size
    }


def _laid(
    rows: list[list[tuple[int, tuple[np.ndarray, np.ndarray]]]], context: int, pad: int
) -> dict[str, Any]:
    """Lays numbered pieces into tensors as `collate` does, with `domains`: the number of each token's source, or -1."""
    import torch

    domains = torch.full((len(rows), context), -1, dtype=torch.int64)
    for row, found in enumerate(rows):
        start = 0
        for number, (ids, _) in found:
            domains[row, start : start + len(ids)] = number
            start += len(ids)
    return {**collate([[piece for _, piece in found] for found in rows], context, pad), "domains": domains}


def scorer(
    model: Any,
    config: PretrainConfig,
    phase: PhaseConfig,
    last: int,
    watch: "Watch",
    parallel: "Parallel",
) -> Callable[[int], None]:
    """Returns what is called after each step of a phase: it scores every `heldout_steps` and at the phase's end.

    A step that was scored before, in a run that this one goes on from, is not scored again.

    Args:
        model: the network.
        config: of the run.
        phase: the phase.
        last: the run's step at the phase's end.
        watch: who is told.
        parallel: how the work is spread.
    """

    def score(step: int) -> None:
        every = config.watch.heldout_steps
        if step in watch.scored or not (step == last or (every and step % every == 0)):
            return
        bits = heldout_bits(model, config, phase.context, parallel)
        watch.row({"kind": "heldout", "phase": phase.name, "step": step, "bits_per_byte": bits})

    return score
