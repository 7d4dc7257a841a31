"""Log-probabilities of tokens under a causal language model, in batches.

Padding is on the right and without an attention mask: a causal model cannot see what follows a token, so the padded
positions change nothing that is read, and the kernels stay on their fast unmasked path.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

Advance = Callable[[int], None]


def target_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns log p(target) in nats, float32.

    Args:
        logits: (..., vocabulary), any float dtype; reduced in float32.
        targets: (...) int64 token ids.
    """
    logits = logits.float()
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """Splits a sequence into windows (start, end, first target) that score every token but the first once.

    A sequence that fits is one window. A longer one advances by half a context, so that each later token is predicted
    from at least half a context of text.
    """
    spans = [(0, min(length, context), 1)]
    while spans[-1][1] < length:
        start, end, _ = spans[-1]
        start += max(1, context // 2)
        spans.append((start, min(length, start + context), end))
    return spans


@torch.inference_mode()
def token_log_probs(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int] | np.ndarray],
    *,
    context: int,
    batch_tokens: int,
    advance: Advance | None = None,
) -> list[np.ndarray]:
    """Scores every token of every sequence but the first, given the tokens before it.

    Args:
        model: a causal language model called as `model(input_ids=(rows, length))`, giving `.logits`.
        sequences: token ids.
        context: most tokens the model takes at once; longer sequences are scored in `windows`.
        batch_tokens: most tokens (padding included) of one forward pass; a single longer window goes alone.
        advance: called with the number of tokens after each batch.

    Returns:
        For each sequence, log p in nats of its tokens 1, 2, ...: float64, (length - 1).
    """
    scores = [np.zeros(max(0, len(sequence) - 1)) for sequence in sequences]
    jobs = [
        (end - start, index, start, end, first)
        for index, sequence in enumerate(sequences)
        for start, end, first in windows(len(sequence), context)
        if end > first
    ]
    # Longest first: padding is least, and memory that will not suffice fails at once.
    jobs.sort(key=lambda job: (-job[0], job[1], job[2]))
    while jobs:
        width = jobs[0][0]
        rows = max(1, batch_tokens // width)
        batch, jobs = jobs[:rows], jobs[rows:]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, (_, index, start, end, _) in enumerate(batch):
            ids[row, : end - start] = torch.as_tensor(np.asarray(sequences[index][start:end], dtype=np.int64))
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits
        log_probs = target_log_probs(logits[:, :-1], ids[:, 1:]).double().cpu().numpy()
        for row, (_, index, start, end, first) in enumerate(batch):
            scores[index][first - 1 : end - 1] = log_probs[row, first - 1 - start : end - 1 - start]
        if advance:
            advance(sum(end - first for _, _, _, end, first in batch))
    return scores
