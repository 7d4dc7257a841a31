"""The batches of a phase: its sources' documents, drawn and packed block by block, laid into tensors.

    stage (easy ... hard) --> block --draw: shares of the mixture--> documents --pack--> rows --lay out--> batch

A block is what is packed together, `BLOCK_ROWS` rows or the whole stage. Only two blocks, and the next one, which is
made while this one trains, are in memory. The stream of each source goes on from block to block, so that no document
is lost or read twice at a block's edge. All follows from configuration and seed; a reader's state only spares a
resumed run the blocks before.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from galenic.corpus.mixtures.mixture_tree import check_repeats, held, tree
from galenic.corpus.tokens.integrity import check_shards
from galenic.corpus.tokens.shards import Shard, read_meta, read_shard, special_tokens
from galenic.pretrain.config import PhaseConfig, PretrainConfig
from galenic.pretrain.data.collate import collate
from galenic.pretrain.data.drawing import Cursor, Stream
from galenic.pretrain.data.packing import PackingReport, Rows, pack, packing_report
from galenic.pretrain.data.stages import stages_of
from galenic.runtime import UserError

BLOCK_ROWS = 2**18
"""Rows packed together: at about ten documents a row, some hundred megabytes."""


def open_shards(config: PretrainConfig) -> dict[str, Shard]:
    """Opens the training shards of all phases, once they are known to be whole and large enough.

    Raises:
        UserError: an unknown source, a damaged shard, or a source that would be read too often.
    """
    meta = read_meta(config.tokenizer)
    names = sorted({s for phase in config.phases for s, share in phase.mixture.items() if share})
    shards = {name: read_shard(config.tokenizer, name, "train") for name in names}
    check_repeats(tree(held(meta), config.phases), config.most_repeats)
    check_shards(config.tokenizer, names)
    # Those that are scored at a phase's end: better to know now.
    check_shards(
        config.tokenizer, [s for s, parts in meta["sources"].items() if "heldout" in parts], "heldout"
    )
    return shards


# ---------------------------------------------------------------------------- blocks


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a block begins."""

    stage: int = 0
    block: int = 0
    """Of the stage."""
    row: int = 0
    """Of the phase."""
    cursors: dict[str, Cursor] = field(default_factory=dict)
    """Source -> place in its stream; those not named stand at the beginning."""


class Curriculum:
    """The blocks of one phase, one after another.

    Args:
        phase: what is drawn, how it is packed, in which order.
        shards: source -> training shard.
        seed: of the run.
        block_rows: rows packed together.
    """

    def __init__(
        self, phase: PhaseConfig, shards: Mapping[str, Shard], seed: int, block_rows: int = BLOCK_ROWS
    ) -> None:
        self.phase, self.seed = phase, seed
        self.sources = [source for source in sorted(phase.mixture) if phase.mixture[source]]
        self._shards = {source: shards[source] for source in self.sources}
        self._stages = phase.stages if phase.order == "easy-to-hard" else 1
        self._blocks = -(-phase.tokens // (self._stages * block_rows * phase.context))  # of a stage
        self.small = phase.tokens <= block_rows * phase.context
        self._members: dict[str, list[np.ndarray]] = {}
        if phase.order == "easy-to-hard":
            self._members = {s: stages_of(self._shards[s], s, self._stages, seed) for s in self.sources}
        self._stage, self._streams = -1, {}

    def block(self, place: Place) -> tuple[Rows, Place]:
        """Draws and packs the block that begins at a place; returns its rows and where the next one begins."""
        name, total = self._name(place.stage), sum(self.phase.mixture.values())
        drawn, cursors = {}, {}
        for source, stream in self._stage_streams(place.stage).items():
            budget = self.phase.tokens * self.phase.mixture[source] / total
            until = budget / self._stages * (place.block + 1) / self._blocks
            start = place.cursors.get(source, Cursor())
            drawn[source], cursors[source] = stream.draw(start, until)
        key = f"{name}/{place.block}" if place.block else name
        rows = pack(self._shards, drawn, context=self.phase.context, seed=self.seed, name=key)
        row, last = place.row + len(rows), place.block + 1 == self._blocks
        if last:
            return rows, Place(stage=place.stage + 1, row=row)
        return rows, Place(stage=place.stage, block=place.block + 1, row=row, cursors=cursors)

    def is_end(self, place: Place) -> bool:
        """Whether no block begins here."""
        return place.stage >= self._stages

    def blocks(self) -> Iterator[Rows]:
        """Yields the rows of all blocks, in order."""
        place = Place()
        while not self.is_end(place):
            rows, place = self.block(place)
            yield rows

    def steps(self) -> int:
        """Returns how many whole batches there are.

        A phase of one block is packed, and every row counts. More are not packed beforehand: the phase ends with its
        tokens, padding included; the padding's share of the last rows is not read.
        """
        if self.small:
            return sum(len(rows) for rows in self.blocks()) // self.phase.rows
        return self.phase.tokens // (self.phase.rows * self.phase.context)

    def packed(self) -> tuple[int, PackingReport]:
        """Packs as training will, a larger phase's first block only; returns the steps and what packing costs."""
        blocks = self.blocks()
        first = next(blocks)
        steps = (len(first) + sum(map(len, blocks))) // self.phase.rows if self.small else self.steps()
        return steps, packing_report(first, self.phase.context)

    def _name(self, stage: int) -> str:
        return self.phase.name if self._stages == 1 else f"{self.phase.name}/stage-{stage}"

    def _stage_streams(self, stage: int) -> dict[str, Stream]:
        if self._stage != stage:
            self._streams = {
                source: Stream(
                    self._shards[source],
                    seed=self.seed,
                    key=f"{self._name(stage)}/{source}",
                    members=self._members[source][stage] if self._members else None,
                )
                for source in self.sources
            }
            self._stage = stage
        return self._streams


# ---------------------------------------------------------------------------- batches


@dataclass(frozen=True, kw_only=True)
class _Block:
    place: Place
    rows: Rows
    after: Place


class PhaseBatches:
    """What the training loop reads in one phase: any row of any step, on every rank the same.

    Args:
        config: of the run: seed and shards' folder.
        phase: one of its phases.
        shards: source -> training shard.
        block_rows: rows packed together.

    Attributes:
        steps: batches of the phase.
        rows: in a batch, of all ranks together.
        context: tokens in a row.
        domains: sources; the numbers of `domains` in a batch point to them.
    """

    def __init__(
        self,
        config: PretrainConfig,
        phase: PhaseConfig,
        shards: Mapping[str, Shard],
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        meta = read_meta(config.tokenizer)
        self._pad, self._vocabulary = special_tokens(meta)["pad"], meta["vocab_size"]
        self._folder, self._shards = config.tokenizer, shards
        self._curriculum = Curriculum(phase, shards, config.seed, block_rows)
        self._phase, self._seed = phase.name, config.seed
        self.rows, self.context, self.domains = phase.rows, phase.context, self._curriculum.sources
        self._held: deque[_Block] = deque(maxlen=2)  # a batch may lie across an edge
        self._next: Place = Place()
        self._ahead: Future[tuple[Rows, Place]] | None = None
        self._worker = ThreadPoolExecutor(1)
        if self._curriculum.small:
            self._advance()
            alone = self._curriculum.is_end(self._next)
            self.steps = len(self._held[0].rows) // self.rows if alone else self._curriculum.steps()
        else:
            self.steps = self._curriculum.steps()

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, Any]:
        """Lays rows of a step's batch into tensors.

        Args:
            step: of the phase, from 0.
            rows: which of the batch's rows, each in [0, self.rows).

        Returns:
            {"input_ids", "position_ids", "labels", "domains"}, each (len(rows), context) int64; `domains` is -1 where
            the row is filled up.

        Raises:
            UserError: a token that the vocabulary does not have, naming file and document.
        """
        import torch

        laid, domains = [], np.full((len(rows), self.context), -1, dtype=np.int64)
        for place, (block, row) in enumerate(map(self._find, (step * self.rows + row for row in rows))):
            found = block.rows
            first, last = int(found.bounds[row]), int(found.bounds[row + 1])
            documents = []
            for source, document, start, length in zip(
                found.source[first:last].tolist(),
                found.document[first:last].tolist(),
                found.start[first:last].tolist(),
                found.length[first:last].tolist(),
                strict=True,
            ):
                ids = self._tokens(self.domains[source], document, start, length)
                documents.append((ids, ids))
            laid.append(documents)
            filled = np.repeat(found.source[first:last], found.length[first:last])
            domains[place, : len(filled)] = filled
        return {**collate(laid, self.context, self._pad), "domains": torch.from_numpy(domains)}

    def documents(self, step: int) -> list[str]:
        """Names the documents of a step's whole batch, each once: `source:number`; see `corpus/tokens/lookup.py`."""
        names: dict[str, None] = {}
        for row in range(step * self.rows, (step + 1) * self.rows):
            block, place = self._find(row)
            names.update(dict.fromkeys(f"{p.source}:{p.document}" for p in block.rows[place]))
        return list(names)

    def _tokens(self, source: str, document: int, start: int, length: int) -> np.ndarray:
        shard = self._shards[source]
        first = int(shard.offsets[document]) + start
        ids = shard.tokens[first : first + length].astype(np.int64)
        if len(ids) and int(ids.max()) >= self._vocabulary:
            raise UserError(
                f"{self._folder}/tokens/{source}.train.tokens.npy: damaged shard, document {document} holds token "
                f"{int(ids.max())} of a vocabulary of {self._vocabulary}; run the tokenizer step again"
            )
        return ids

    # ------------------------------------------------------------------------ blocks

    def _find(self, row: int) -> tuple[_Block, int]:
        """Returns the block that holds a row of the phase, and the row's place in it."""
        first = self._held[0].place.row if self._held else self._next.row
        if row < first:
            self._seek(Place())
        while row >= self._next.row:
            self._advance()
        block = next(block for block in self._held if row < block.place.row + len(block.rows))
        return block, row - block.place.row

    def _advance(self) -> None:
        if self._curriculum.is_end(self._next):
            raise IndexError(f"phase '{self._phase}' has no row {self._next.row}")
        made = self._ahead.result() if self._ahead else self._curriculum.block(self._next)
        self._held.append(_Block(place=self._next, rows=made[0], after=made[1]))
        self._next, self._ahead = made[1], None
        if not self._curriculum.is_end(self._next):
            self._ahead = self._worker.submit(self._curriculum.block, self._next)

    def _seek(self, place: Place) -> None:
        if self._ahead is not None:
            self._ahead.result()  # one at a time
        self._held.clear()
        self._next, self._ahead = place, None

    def release(self) -> None:
        """Lets go of the blocks, once the phase is over; whoever reads on has them packed anew."""
        self._seek(Place())

    # ------------------------------------------------------------------------ state

    def state(self, step: int) -> dict[str, Any]:
        """Returns the few numbers from which a reader goes on at a step: a block's beginning, as JSON values."""
        places = [block.place for block in self._held] + [self._next]
        place = max((p for p in places if p.row <= step * self.rows), key=lambda p: p.row, default=Place())
        row = step * self.rows
        return {"phase": self._phase, "seed": self._seed, "row": row, "place": asdict(place)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where another reader of this phase was; a state of another phase or seed is passed over."""
        if (state.get("phase"), state.get("seed")) != (self._phase, self._seed):
            return
        saved = state["place"]
        cursors = {source: Cursor(**cursor) for source, cursor in saved["cursors"].items()}
        place = Place(stage=saved["stage"], block=saved["block"], row=saved["row"], cursors=cursors)
        if place.row != self._next.row and all(place.row != block.place.row for block in self._held):
            self._seek(place)
