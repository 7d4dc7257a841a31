"""TRL's losses of preference pairs: DPO is TDPO2 with alpha = 0, and its reward loss is ours."""

import json

import pytest
import torch
from parity_helpers import drive, random_folder

from galenic.align import reward
from galenic.align.config import ReferenceConfig, TdpoConfig
from galenic.align.data.pairs import collate_pairs, read_pairs
from galenic.align.policy import Reference
from galenic.align.tdpo import TdpoObjective
from galenic.model import load_tokenizer, save
from galenic.model.folder import as_scorer
from galenic.model.foreign import load_scorer
from galenic.model.head import head_is_product

pytestmark = pytest.mark.parity

BETA, CENTRE = 0.02, 0.05
PAIRS = [
    ("What follows fever?", "cough.", "asthma chronic lung."),
    ("Which drug?", "drug dose daily child.", "none"),
    ("What is asthma?", "mild acute", "severe pain heart lung adult child dose"),
    ("And the heart?", "lung.", "pain."),
]


def their_rows(margins=()):
    rows = []
    for number, (prompt, chosen, rejected) in enumerate(PAIRS):
        row = {"prompt": [{"role": "user", "content": prompt}]}
        row |= {"chosen": [{"role": "assistant", "content": chosen}]}
        row |= {"rejected": [{"role": "assistant", "content": rejected}]}
        rows.append(row | ({"margin": margins[number]} if margins else {}))
    return rows


def our_part(tokenizer, tmp_path, theirs, rows):
    """Our batch, its pairs in the order of theirs; the tokens of both are the same."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, dropped = read_pairs(str(tmp_path / "pairs.jsonl"), tokenizer, 128)
    assert dropped == {}
    texts = [
        row[: int(mask.sum())].tolist()
        for row, mask in zip(theirs["input_ids"], theirs["attention_mask"], strict=True)
    ]
    chosen, rejected = texts[: len(pairs)], texts[len(pairs) :]
    ordered = [next(pair for pair in pairs if pair.chosen == ids) for ids in chosen]
    assert sorted(pair.id for pair in ordered) == sorted(pair.id for pair in pairs)
    assert [pair.rejected for pair in ordered] == rejected
    if "completion_mask" in theirs:
        answers = [len(pair.chosen) - pair.prompt for pair in ordered]
        assert theirs["completion_mask"][: len(pairs)].sum(1).tolist() == answers
    return collate_pairs(ordered)


def compare_gradients(model, theirs, without=()):
    compared = 0
    for name, parameter in model.named_parameters():
        if name in without:
            continue
        expected = theirs.get(f"gradient {name}")
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        expected = torch.from_numpy(expected)
        # Float32 on both sides, so the largest entry sets the scale.
        torch.testing.assert_close(
            parameter.grad, expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max()), msg=name
        )
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("norm_head", [False, True])
def test_dpo_is_tdpo2_without_its_divergences(norm_head, tokenizer_step, tmp_path):
    tokenizer = load_tokenizer(tokenizer_step)
    folders = {name: tmp_path / name for name in ("folder", "reference")}
    models = {
        name: random_folder(
            folder, tokenizer=tokenizer_step, seed=seed, vocab_size=len(tokenizer), norm_head=norm_head
        )
        for seed, (name, folder) in enumerate(folders.items())
    }
    rows = their_rows()
    theirs = drive(
        "newest",
        "with_trl_pairs",
        tmp_path / "trl",
        way="dpo",
        beta=BETA,
        pairs=rows,
        checkpoints=tmp_path / "checkpoints",
        **folders,
    )
    part = our_part(tokenizer, tmp_path, theirs, rows)
    policy = models["folder"]
    reference = Reference(
        policy, ReferenceConfig(model=str(folders["reference"])), base=str(folders["folder"])
    )
    config = TdpoConfig(out="o", model="m", pairs="p", beta=BETA, alpha=0.0)
    loss, told = TdpoObjective(config, reference, product=head_is_product(policy))(policy, part, len(PAIRS))
    loss.backward()
    assert loss.item() == pytest.approx(float(theirs["loss"]), abs=2e-6)
    # A plain head also learns how long its rows are.
    compare_gradients(policy, theirs, without=["lm_head.weight"] if norm_head else [])
    means = {name: total / count for name, (total, count) in told.items()}
    assert means["reward"] == pytest.approx(float(theirs["metric rewards/chosen"]), abs=1e-5)
    assert means["reward_margin"] == pytest.approx(float(theirs["metric rewards/margins"]), abs=1e-5)
    assert means["accuracy"] == float(theirs["metric rewards/accuracies"])
    assert means["entropy"] == pytest.approx(float(theirs["metric entropy"]), abs=1e-4)
    print(f"DPO, norm_head={norm_head}: loss {float(theirs['loss']):.6f}, ours {loss.item():.6f}")


@pytest.mark.parametrize("margins", [(), (0.0, 0.5, 2.0, 0.25)])
def test_the_reward_loss_is_theirs_on_our_own_folder(margins, tokenizer_step, tmp_path):
    tokenizer = load_tokenizer(tokenizer_step)
    language = random_folder(tmp_path / "language", tokenizer=tokenizer_step, vocab_size=len(tokenizer))
    model = as_scorer(language)
    torch.nn.init.normal_(model.score.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    save(model, tmp_path / "folder", tokenizer=tokenizer_step, provenance={"title": "Random"})
    rows = their_rows(margins)
    theirs = drive(
        "newest",
        "with_trl_pairs",
        tmp_path / "trl",
        way="reward",
        centre=CENTRE,
        pairs=rows,
        folder=tmp_path / "folder",
        checkpoints=tmp_path / "checkpoints",
    )
    part = our_part(tokenizer, tmp_path, theirs, rows)
    ours = load_scorer(tmp_path / "folder")
    loss, told = reward.RewardObjective(CENTRE)(ours, part, len(PAIRS))
    loss.backward()
    assert loss.item() == pytest.approx(float(theirs["loss"]), abs=2e-6)
    compare_gradients(ours, theirs)
    assert told["accuracy"][0] / len(PAIRS) == float(theirs["metric accuracy"])
    assert told["reward_margin"][0] / len(PAIRS) == pytest.approx(float(theirs["metric margin"]), abs=1e-5)
    print(f"reward, margins {margins}: loss {float(theirs['loss']):.6f}, ours {loss.item():.6f}")
