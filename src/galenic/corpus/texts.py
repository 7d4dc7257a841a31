"""Texts as Arrow columns: what the kernels of this room read without copying."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def column(texts: Iterable[str | None]) -> Any:
    """Returns texts as an Arrow column of 64-bit offsets (`pyarrow.LargeStringArray`); lone surrogates must be gone."""
    import pyarrow

    return pyarrow.array(list(texts), type=pyarrow.large_string())


def buffers(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the UTF-8 bytes of a text column and where each text starts, without copying.

    Args:
        texts: a `pyarrow.LargeStringArray` (or a chunked one, which is joined) without nulls.

    Returns:
        (uint8 (bytes,), int64 (n + 1,)): text i is `data[offsets[i] : offsets[i + 1]]`.

    Raises:
        ValueError: another type, or nulls.
    """
    import pyarrow

    if isinstance(texts, pyarrow.ChunkedArray):
        texts = texts.combine_chunks()
    if texts.type != pyarrow.large_string() or texts.null_count:
        raise ValueError(f"expected large_string without nulls, got {texts.type}, {texts.null_count} nulls")
    _, offsets, data = texts.buffers()
    starts = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if data is None:
        return np.zeros(0, dtype=np.uint8), np.zeros(len(texts) + 1, dtype=np.int64)
    return np.frombuffer(data, dtype=np.uint8), starts
