"""What a phase reads, step by step: a function of the seed alone."""

from collections.abc import Sequence
from typing import Any

from galenic.corpus.tokens.shards import Shard, read_meta, special_tokens
from galenic.pretrain.config import PhaseConfig, PretrainConfig
from galenic.pretrain.packing import collate, phase_rows


class PhaseBatches:
    """The packed rows of a phase in training order."""

    def __init__(self, config: PretrainConfig, phase: PhaseConfig, shards: dict[str, Shard]) -> None:
        self.phase, self.shards, self.seed = phase, shards, config.seed
        self.packed = phase_rows(
            shards,
            phase.mixture,
            tokens=phase.tokens,
            context=phase.context,
            seed=config.seed,
            name=phase.name,
        )
        self.steps, self.rows, self.context = len(self.packed) // phase.rows, phase.rows, phase.context
        self.domains = list(self.packed.sources)
        self.pad = special_tokens(read_meta(config.tokenizer))["pad"]

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, Any]:
        """Returns these rows of a step's batch."""
        import torch

        laid = []
        domains = torch.full((len(rows), self.context), -1)
        for place, number in enumerate(rows):
            documents, start = [], 0
            for piece in self.packed[step * self.rows + number]:
                ids = self.shards[piece.source].document(piece.document)
                ids = ids[piece.start : piece.start + piece.length]
                documents.append((ids, ids))
                domains[place, start : start + len(ids)] = self.domains.index(piece.source)
                start += len(ids)
            laid.append(documents)
        return {**collate(laid, self.context, self.pad), "domains": domains}

    def documents(self, step: int) -> list[str]:
        """Names the documents of a step's batch."""
        found = self.packed[step * self.rows : (step + 1) * self.rows]
        return list(dict.fromkeys(f"{p.source}:{p.document}" for row in found for p in row))

    def state(self, step: int) -> dict[str, Any]:
        """What the reader is at after so many steps."""
        return {"phase": self.phase.name, "row": step * self.rows, "seed": self.seed}
