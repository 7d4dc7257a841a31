"""Functions compiled by numba, remembered from run to run."""

from typing import Any

from numba import njit


def compiled(function: Any) -> Any:
    """Compiles a function on first use; the result is remembered beside its file, or in the user's cache.

    What is remembered is forgotten when the function's own file changes, not when another does: what it calls should
    stand in the same file. It runs without the interpreter's lock, and divides as NumPy does.
    """
    words: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(function, cache=True, **words)
    except RuntimeError:  # neither place can be written
        return njit(function, **words)
