"""Bits per byte on held-out documents of every source."""

from typing import Any

from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.pretrain.config import PretrainConfig
from galenic.runtime import progress


def heldout_bits(model: Any, config: PretrainConfig, context: int) -> dict[str, float]:
    """Scores held-out documents of every source, at most `heldout_tokens` each."""
    from galenic.evaluate.bits_per_byte import bits_per_byte, document

    scores = {}
    sources = read_meta(config.tokenizer)["sources"]
    with progress(len(sources), "held-out bits per byte", "sources") as bar:
        for source in sources:
            shard = read_shard(config.tokenizer, source, "heldout")
            texts, tokens = [], 0
            for index in range(len(shard)):
                ids = shard.document(index)
                tokens += len(ids)
                if texts and tokens > config.heldout_tokens:
                    break
                texts.append(document(ids, int(shard.bytes[index])))
            if texts:
                scores[source], _ = bits_per_byte(model, texts, context=context, batch_tokens=8192)
            bar.update(1)
    return scores
