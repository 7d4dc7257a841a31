"""How hard a text is for a given language model: bits per byte, the curriculum's perplexity.

The report picks "easy" samples for the first stage by quality and by the perplexity of an earlier model of the same
data (section 4.2). Bits per byte are the logarithm of perplexity, taken per byte, so that models with different
tokenizers compare. Only the beginning of a long text is read.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galenic.runtime import UserError, device, duration, human

CHARACTERS = 16
"""Most characters read for each token allowed: no text is tokenized further than that."""
FLOPS = 2e10
"""Of one core, guessed low, for the plan's time."""


class Difficulty:
    """Scores batches of texts with one model.

    Attributes:
        most_tokens: of a text; what follows is not read.
    """

    def __init__(self, folder: str, *, most_tokens: int = 1024, batch_tokens: int = 8192) -> None:
        """Loads the model.

        Args:
            folder: of a causal language model, ours or another that transformers knows, with its tokenizer.
            most_tokens: of a text.
            batch_tokens: of one forward pass, padding included.

        Raises:
            UserError: a limit is below 1, or the folder is not such a model.
        """
        from galenic.evaluate.models import open_model
        from galenic.model.folder import load_tokenizer

        if most_tokens < 1 or batch_tokens < 1:
            raise UserError(
                f"difficulty: most_tokens {most_tokens} and batch_tokens {batch_tokens} must be above 0"
            )
        self.tokenizer: Any = load_tokenizer(folder.split("+")[0])
        self.model = open_model(folder).to(device())
        self.most_tokens, self._batch_tokens = most_tokens, batch_tokens
        self._context = int(self.model.config.max_position_embeddings)
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        if start is None:
            raise UserError(f"{folder}: its tokenizer has no token that begins or ends a text")
        self._start = int(start)

    def _encoded(self, text: str) -> tuple[np.ndarray, int]:
        """Returns the ids with the start token, and how many bytes of text they stand for."""
        encoded = self.tokenizer(
            text[: CHARACTERS * self.most_tokens],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            split_special_tokens=True,
            verbose=False,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        cut = min(len(ids), self.most_tokens)
        # Not between the bytes of one character.
        while 0 < cut < len(ids) and offsets[cut][0] < offsets[cut - 1][1]:
            cut -= 1
        size = len(text[: offsets[cut - 1][1]].encode()) if cut else 0
        return np.array([self._start, *ids[:cut]], dtype=np.int64), size

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the bits per byte of each text, float64; NaN for a text without a byte.

        The same texts in one batch give the same bits; another batch may differ in the last digits.

        Args:
            texts: in any order; texts of like length share a forward pass.
        """
        from galenic.evaluate.likelihood import token_log_probs

        encoded = [self._encoded(text) for text in texts]
        scores = token_log_probs(
            self.model, [ids for ids, _ in encoded], context=self._context, batch_tokens=self._batch_tokens
        )
        return np.array(
            [
                -math.fsum(score) / math.log(2) / size if size else math.nan
                for score, (_, size) in zip(scores, encoded, strict=True)
            ]
        )


def plan_facts(folder: str, *, documents: int, size: int, most_tokens: int, cores: int = 1) -> dict[str, str]:
    """Returns what scoring would take, for a plan; reads headers only.

    Args:
        folder: of the model.
        documents: how many.
        size: their bytes.
        most_tokens: of a text.
        cores: that work at once.
    """
    from safetensors import safe_open

    from galenic.evaluate.models import weight_files

    parameters = 0
    for file in weight_files("difficulty", folder):
        with safe_open(str(Path(file)), framework="numpy") as opened:
            for name in opened.keys():
                parameters += math.prod(opened.get_slice(name).get_shape())
    tokens = min(size / 3.5, documents * most_tokens)  # bytes of a token, of our tokenizer's texts
    seconds = 2 * parameters * tokens / (FLOPS * cores)
    return {
        "difficulty model": f"{human(parameters)} parameters",
        "difficulty tokens": f"about {human(tokens)}",
        "difficulty time": f"about {duration(seconds)} on {cores} cores at {human(FLOPS)} operations a second each",
    }
