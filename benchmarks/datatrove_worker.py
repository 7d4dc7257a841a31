"""datatrove on a folder of Parquet files: Gopher's filters, MinHash deduplication, Parquet out.

    .venvs/datatrove/bin/python datatrove_worker.py INPUT OUTPUT WORKERS

Runs in an environment of its own; prints the number of documents that stay as its last line.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from loguru import logger
from pyarrow import parquet


def main() -> None:
    source, out, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    logger.remove()
    config = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8)
    tasks = len(list(Path(source).glob("*.parquet")))

    def execute(name: str, count: int, *steps: object) -> None:
        LocalPipelineExecutor(
            pipeline=list(steps), tasks=count, workers=workers, logging_dir=str(out / "logs" / name)
        ).run()

    execute(
        "filter",
        tasks,
        ParquetReader(source, read_metadata=False),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        ParquetWriter(str(out / "filtered")),
    )
    execute(
        "signatures",
        tasks,
        ParquetReader(str(out / "filtered"), read_metadata=False),
        MinhashDedupSignature(output_folder=str(out / "signatures"), config=config),
    )
    execute(
        "buckets",
        config.num_buckets,
        MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config),
    )
    execute("clusters", 1, MinhashDedupCluster(str(out / "buckets"), str(out / "remove"), config=config))
    execute(
        "write",
        tasks,
        ParquetReader(str(out / "filtered"), read_metadata=False),
        MinhashDedupFilter(str(out / "remove")),
        ParquetWriter(str(out / "documents")),
    )
    print(sum(parquet.read_metadata(path).num_rows for path in (out / "documents").glob("*.parquet")))


if __name__ == "__main__":
    main()
