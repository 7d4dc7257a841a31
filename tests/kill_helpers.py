"""Pre-training killed with SIGKILL, again and again, until it ends: for the tests of faults and benchmarks/kills.py."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

CALL = "galenic.cli:main"
WHERE = ("step", "while writing", "before the rename", "phase end", "any time")


def write_config(path, tokenizer, **more):
    """Writes the config of a small run of two phases that writes a checkpoint after each step."""
    phases = [
        {"name": "phase-1", "tokens": 1200, "mixture": {"general": 1.0}, "context": 32, "rows": 2},
        {
            "name": "phase-2",
            "tokens": 1600,
            "mixture": {"general": 1.0, "medical": 3.0},
            "context": 64,
            "rows": 2,
            "rope_theta": 1e6,
            "final_lr": 1e-4,
        },
    ]
    config = {
        "tokenizer": str(tokenizer),
        "phases": phases,
        "architecture": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "num_swa_attention_heads": 2,
            "num_swa_key_value_heads": 1,
            "sliding_window": 8,
        },
        "optim": {"lr": 1e-2, "warmup_steps": 4},
        "guard": {"history": 5},
        "heldout_tokens": 200,
        "checkpoints": {"seconds": 0.0},
        **more,
    }
    path.write_text(json.dumps(config))  # JSON is YAML
    return str(path)


def words(config, out):
    return ["pretrain", "--config", config, "--out", str(out)]


def steps(out):
    metrics = Path(out) / "metrics.jsonl"
    return metrics.read_bytes().count(b'"train"') if metrics.exists() else 0


def losses(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def models(out):
    """The bytes of the weights that a finished run leaves."""
    return {path.parent.name: path.read_bytes() for path in sorted(Path(out).glob("phase-*/*.safetensors"))}


def _reached(where, out, step, phases, deadline):
    """Whether a run is where it shall be killed."""
    if where == "step":
        return steps(out) >= step
    if where == "while writing":  # a save whose tensors are on their way
        return steps(out) >= step and any(out.glob(".checkpoint-*.partial/*/*"))
    if where == "before the rename":  # or just after it
        return steps(out) >= step and any(out.glob(".checkpoint-*.partial/run.json"))
    if where == "phase end":  # its model folder on the way, or there
        return any(out.glob(".phase-*.partial")) or len(models(out)) > phases
    return time.monotonic() >= deadline


def _end_others(job, victims, seconds=30):
    """Ends processes that wait for one that never came to the start, as a launcher does at once."""
    end = time.monotonic() + seconds
    while not job.ended() and time.monotonic() < end:
        time.sleep(0.01)
    for pid in set(job.pids) - set(victims) if not job.ended() else ():
        os.kill(pid, signal.SIGKILL)


def kill_until_done(ranks, count, config, out, kills, seed, total, wheres=WHERE):
    """Starts the run, kills it at a place drawn from `seed`, starts it again, and lets it end after so many kills.

    Args:
        ranks: where processes come from.
        count: processes of the run.
        config: its file.
        out: its folder.
        kills: how many.
        seed: of places and victims.
        total: steps of the whole run.
        wheres: places, in turn.

    Returns:
        How often it was killed at which place, and how the processes that outlived a killed one ended.
    """
    draw, out = random.Random(seed), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    places, ends = Counter(), Counter()
    for kill in range(kills):
        where = wheres[kill % len(wheres)]
        # Forward on the whole, so that the last kills are near the end.
        step = min(total - 1, int(total * (kill + draw.random()) / kills))
        if where == "phase end" and len(models(out)) == 2:
            where = "any time"
        phases = len(models(out))
        job = ranks.start(count, CALL, words(config, out))
        deadline = time.monotonic() + draw.uniform(0.1, 3.0)
        victims = job.pids if draw.random() < 0.5 else [draw.choice(job.pids)]
        while not job.ended():
            if _reached(where, out, step, phases, deadline):
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                _end_others(job, victims)
                break
            time.sleep(0.0005)
        codes = job.wait()
        killed = codes.count(-signal.SIGKILL)
        if killed:
            places[where] += 1
            ends.update(code for code in codes if code != -signal.SIGKILL)
        assert all(code in (0, 2, -signal.SIGKILL) for code in codes), job.stderr()
        if len(models(out)) == 2 and not killed:
            break
    codes, told = ranks.run(count, CALL, words(config, out))
    assert codes == [0] * count, told
    return places, ends


def kill_runs(ranks, count, config, folder, kills, seed, total, wheres=WHERE):
    """Kills one run after another until so many kills are counted: a run may be through before its last one.

    Returns:
        As `kill_until_done`, of all runs together, and the runs' folders.
    """
    places, ends, outs = Counter(), Counter(), []
    while sum(places.values()) < kills and len(outs) < kills:
        outs.append(Path(folder) / f"run-{len(outs)}")
        left = kills - sum(places.values())
        found = kill_until_done(ranks, count, config, outs[-1], left, seed + 1000 * len(outs), total, wheres)
        places, ends = places + found[0], ends + found[1]
    return places, ends, outs
