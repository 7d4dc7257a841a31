"""How packed documents are laid into tensors."""

from typing import Any

import numpy as np

IGNORE = -100
"""Label of tokens that carry no loss."""


def collate(rows: list[list[tuple[np.ndarray, np.ndarray]]], context: int, pad: int) -> dict[str, Any]:
    """Lays packed documents into tensors.

    Args:
        rows: for each row its documents as (token ids, labels), both (length,) int64.
        context: tokens in a row.
        pad: id that fills a row's end, which is a document of its own without labels.

    Returns:
        {"input_ids", "position_ids", "labels"}, each (rows, context) int64 tensors. Positions restart at 0 with
        each document; the first token of a document is never a label, so that none is predicted from another's.
    """
    import torch

    shape = (len(rows), context)
    ids = np.full(shape, pad, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for row, documents in enumerate(rows):
        start = 0
        for tokens, targets in documents:
            end = start + len(tokens)
            ids[row, start:end] = tokens
            positions[row, start:end] = np.arange(len(tokens))
            labels[row, start + 1 : end] = targets[1:]
            start = end
        positions[row, start:] = np.arange(context - start)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
    }
