"""Kills pre-training with SIGKILL, again and again, and compares what it ends with to a run that nobody disturbed.

    PYTHONPATH=src python benchmarks/kills.py [--kills 40] [--seed 0]

The run is that of the tests (tests/kill_helpers.py): a network of two layers, two phases, a checkpoint after each step,
written in the background. Places of the kills: after a step, while a checkpoint is written, just before or after its
rename, at the end of a phase, and at any time; with two processes, all are killed or one of them.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import make_tokenizer_step
from kill_helpers import CALL, WHERE, kill_runs, losses, models, steps, words, write_config
from rank_helpers import Ranks


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40, help="of one process and of two together")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    config = write_config(root / "pretrain.yaml", make_tokenizer_step(root))
    ranks = Ranks("galenic.cli", "galenic.pretrain.loop", "galenic.pretrain.checkpoints.export")
    head = (
        "processes",
        "runs",
        "kills",
        *WHERE,
        "survivors' exit codes",
        "same weights",
        "same losses",
        "minutes",
    )
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for count, kills in ((1, asked.kills - asked.kills // 2), (2, asked.kills // 2)):
        whole, killed = root / f"whole-{count}", root / f"killed-{count}"
        codes, told = ranks.run(count, CALL, words(config, whole))
        assert codes == [0] * count, told
        began = time.monotonic()
        places, ends, outs = kill_runs(ranks, count, config, killed, kills, asked.seed, steps(whole))
        minutes = (time.monotonic() - began) / 60
        each = " | ".join(str(places[where]) for where in WHERE)
        left = ", ".join(f"{code}: {times}" for code, times in sorted(ends.items())) or "-"
        same = [all(of(out) == of(whole) for out in outs) for of in (models, losses)]
        told = " | ".join("yes" if one else "NO" for one in same)
        print(
            f"| {count} | {len(outs)} | {sum(places.values())} | {each} | {left} | {told} | {minutes:.1f} |",
            flush=True,
        )
    ranks.close()


if __name__ == "__main__":
    main()
