"""TDPO: losses and gradients against float64 written out and the published code's numbers; the verb on small models."""

import math
from functools import partial

import pytest
import torch
from pair_helpers import drawn_pairs, write_pairs
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from align_helpers import files, our_folder, ours, rows
from galenic.align import policy, tdpo
from galenic.align.config import LimitsConfig, LoraConfig, ReferenceConfig, TdpoConfig
from galenic.align.pairs import collate_pairs
from galenic.align.token_statistics import token_statistics
from galenic.model import load
from galenic.model.foreign import load_any
from galenic.pretrain.config import OptimConfig
from galenic.runtime import UserError

METHODS = [("tdpo1", 0.5), ("tdpo2", 0.5), ("tdpo2", 0.0), ("tdpo2", 1.7)]


def config(**changes) -> TdpoConfig:
    return TdpoConfig(**({"out": "o", "model": "m", "pairs": "p", "beta": 0.3} | changes))


def written_out(policy_logits, reference_logits, part, beta, alpha, method):
    """The losses of pairs in float64, token by token, from the full logits of both models."""
    losses = []
    for first in range(0, len(part["input_ids"]), 2):
        ratio, divergence = [], []
        for row in (first, first + 1):
            sums = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
            for place in range(part["input_ids"].shape[1]):
                if not part["answers"][row, place]:
                    continue
                token = part["input_ids"][row, place]
                p, q = (logits[row, place - 1].double() for logits in (policy_logits, reference_logits))
                p, q = p - p.logsumexp(0), q - q.logsumexp(0)
                sums[0] = sums[0] + p[token] - q[token]
                sums[1] = sums[1] + sum(q[v].exp() * (q[v] - p[v]) for v in range(len(p)))
            ratio.append(sums[0])
            divergence.append(sums[1])
        u = beta * ratio[0] - beta * ratio[1]
        if method == "tdpo1":
            total = u - (beta * divergence[1] - beta * divergence[0])
        else:
            total = u - alpha * (beta * divergence[1] - (beta * divergence[0]).detach())
        losses.append(torch.log1p(torch.exp(-total)))
    return torch.stack(losses)


def moved(model, seed=5):
    """Puts a model away from where it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def both(vocabulary=24, **changes):
    """A policy in float64, and its reference from before it moved."""
    model = ours(vocab_size=vocabulary, **changes).double()
    reference = policy.Reference(model, ReferenceConfig(), base="m")
    return moved(model), reference


@pytest.mark.parametrize(("method", "alpha"), METHODS)
def test_loss_and_every_gradient_equal_float64_written_out(method, alpha, monkeypatch):
    model, reference = both()
    assert reference.product
    monkeypatch.setattr(policy, "token_statistics", partial(token_statistics, chunk_elements=7 * 24))
    part = collate_pairs(drawn_pairs(4, 24))
    objective = tdpo.TdpoObjective(config(method=method, alpha=alpha), reference, product=True)
    loss, told = objective(model, part, 5)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        reference_logits = reference.model(part["input_ids"]).logits
    losses = written_out(model(part["input_ids"]).logits, reference_logits, part, 0.3, alpha, method)
    theirs = torch.autograd.grad(losses.sum() / 5, list(model.parameters()))
    torch.testing.assert_close(loss, losses.sum() / 5, rtol=1e-12, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert told["accuracy"] == ((losses < math.log(2)).sum().item(), 4)


def test_parts_of_a_batch_add_up_to_it():
    model, reference = both()
    pairs = drawn_pairs(6, 24)
    objective = tdpo.TdpoObjective(config(), reference, product=True)
    whole, told = objective(model, collate_pairs(pairs), 6)
    parts = [objective(model, collate_pairs(pairs[i : i + 2]), 6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=0)
    for name in objective.measures:
        assert [sum(x) for x in zip(*(t[name] for _, t in parts), strict=True)] == pytest.approx(told[name])


def test_measures_are_what_they_say():
    model, reference = both()
    pairs = drawn_pairs(3, 24)
    objective = tdpo.TdpoObjective(config(method="tdpo1", beta=0.5), reference, product=True)
    _, told = objective(model, collate_pairs(pairs), 3)
    rewards, divergences, preferred = [], [], 0
    for pair in pairs:
        sides = []
        for ids in (pair.chosen, pair.rejected):
            row = torch.tensor([ids])
            with torch.no_grad():
                p, q = (m(row).logits[0].log_softmax(-1) for m in (model, reference.model))
            places = range(pair.prompt, len(ids))
            likelihood = float(sum(p[i - 1, ids[i]] for i in places))
            ratio = float(sum(p[i - 1, ids[i]] - q[i - 1, ids[i]] for i in places))
            divergence = float(sum((q[i - 1].exp() * (q[i - 1] - p[i - 1])).sum() for i in places))
            sides.append((0.5 * (ratio + divergence), likelihood, divergence))
        rewards.append([side[0] for side in sides])
        divergences.append([side[2] for side in sides])
        preferred += sides[0][1] > sides[1][1]
    tokens = sum(len(ids) - pair.prompt for pair in pairs for ids in (pair.chosen, pair.rejected))
    assert told["reward"] == pytest.approx((sum(r[0] for r in rewards), 3))
    assert told["reward_margin"] == pytest.approx((sum(r[0] - r[1] for r in rewards), 3))
    assert told["preferred"] == (preferred, 3)
    assert told["kl"] == pytest.approx((sum(map(sum, divergences)), tokens))
    assert told["kl_rejected"] == pytest.approx((sum(d[1] for d in divergences), 3))
    assert told["length"] == (tokens, 6)


# ---------------------------------------------------------------------------- what is known beforehand

FIXED = torch.arange(4)[:, None, None], torch.arange(6)[None, :, None], torch.arange(9)[None, None, :]
"""Two pairs, chosen before rejected, six tokens, nine words."""
LABELS = torch.tensor([[0, 0, 3, 5, 1, 8], [0, 0, 0, 2, 7, 0], [0, 0, 4, 4, 6, 0], [0, 0, 0, 1, 3, 5]])
WANTED = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]).bool()
"""Rows as ours: chosen, rejected, chosen, rejected."""


def fixed_logits():
    row, place, word = (part.double() for part in FIXED)
    return 2 * torch.sin(3 * row + 2 * place + word), torch.cos(row - place + 2 * word)


def fixed_losses(beta, alpha, method):
    logits, reference = fixed_logits()
    logits.requires_grad_()
    before = WANTED.roll(-1, 1)
    found = token_statistics((logits[before], None), LABELS[WANTED], reference=(reference[before], None))
    ratios = policy.per_row(found.log_probs - found.reference_log_probs, WANTED).view(-1, 2)
    kl = policy.per_row(found.kl, WANTED).view(-1, 2)
    losses = tdpo.tdpo_loss(ratios, kl, beta=beta, alpha=alpha, method=method)
    return losses, torch.autograd.grad(losses.mean(), logits)[0]


PUBLISHED = {
    (0.1, 0.5, "tdpo2"): (
        [0.8187599477509185, 0.74124071569061],
        0.09347270339443493,
        [-0.003971853762140901, -0.00577074250826565, 0.02633606999052594],
    ),
    (0.1, 0.5, "tdpo1"): (
        [0.7610858895330386, 0.7394832655188056],
        0.08887588012387465,
        [-0.003938931722877622, -0.003938931722877623, 0.02578938876860629],
    ),
    (0.5, 1.0, "tdpo2"): (
        [1.075166858347906, 0.9451427068637503],
        0.5470984351413025,
        [-0.024348790957810094, -0.024348790957810097, 0.1594189694655947],
    ),
    (0.3, 0.0, "tdpo2"): (
        [1.334174571898738, 0.8497786006490875],
        0.35032682573326107,
        [-0.015066240388187456, -0.029288642144730814, 0.10126126604450873],
    ),
}
"""(beta, alpha, method) -> losses of both pairs; norm and some entries of the gradient of their mean by the logits.

What `_tdpo_get_batch_logps` and `tdpo_loss` of Vance0124/Token-level-Direct-Preference-Optimization (commit 2a736ec)
give in float64 for these logits and labels.
"""


@pytest.mark.parametrize("case", PUBLISHED)
def test_losses_and_gradients_are_those_of_the_published_code(case):
    beta, alpha, method = case
    losses, gradient = fixed_losses(beta, alpha, method)
    expected, size, some = PUBLISHED[case]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    assert gradient.square().sum().sqrt().item() == pytest.approx(size, abs=1e-12)
    assert gradient[1, 2, :3].tolist() == pytest.approx(some, abs=1e-12)


@pytest.mark.parametrize(("method", "alpha"), METHODS)
def test_a_policy_that_is_its_reference_loses_log_2_and_moves_as_dpo_would(method, alpha):
    model = ours(vocab_size=24).double()
    reference = policy.Reference(model, ReferenceConfig(), base="m")
    part = collate_pairs(drawn_pairs(4, 24))
    found = {}
    for way in ((method, alpha), ("tdpo2", 0.0)):
        objective = tdpo.TdpoObjective(config(method=way[0], alpha=way[1]), reference, product=True)
        loss, told = objective(model, part, 4)
        assert loss.item() == math.log(2) and told["kl"][0] == 0 and told["accuracy"] == (2.0, 4)
        found[way] = torch.autograd.grad(loss, list(model.parameters()))
    # A divergence is least where both agree, so that only the likelihoods pull.
    for one, other in zip(found[method, alpha], found["tdpo2", 0.0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("method", "alpha"), METHODS)
def test_where_gradients_stop(method, alpha):
    ratios = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    kl = torch.tensor([[0.4, 0.9]], dtype=torch.float64, requires_grad=True)
    tdpo.tdpo_loss(ratios, kl, beta=0.7, alpha=alpha, method=method).sum().backward()
    weight = 1.0 if method == "tdpo1" else alpha
    slope = 0.7 * torch.sigmoid(torch.tensor(-0.7 * (0.5 - weight * 0.5), dtype=torch.float64))
    chosen = -slope if method == "tdpo1" else 0.0
    torch.testing.assert_close(kl.grad, torch.tensor([[chosen, weight * slope]], dtype=torch.float64))


class Largest(TorchDispatchMode):
    """Notes how many entries the largest tensor made has."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize("head", ["ours", "another's"])
def test_the_logits_of_a_batch_are_never_held(head, monkeypatch, llama_folder):
    model = ours(vocab_size=3000) if head == "ours" else load_any(llama_folder)
    vocabulary = model.config.vocab_size
    chunk = 20 * vocabulary
    reference = policy.Reference(model, ReferenceConfig(), base="m")
    moved(model)
    monkeypatch.setattr(policy, "token_statistics", partial(token_statistics, chunk_elements=chunk))
    part = collate_pairs(drawn_pairs(24, 300))
    objective = tdpo.TdpoObjective(config(), reference, product=reference.product)
    with Largest() as largest:
        loss, _ = objective(model, part, 24)
        loss.backward()
    answers, positions = int(part["answers"].sum()), part["answers"].numel()
    weights = max(parameter.numel() for parameter in model.parameters())
    widths = [m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    allowed = max(chunk, weights, positions * max(w for w in widths if w != vocabulary))
    assert answers * vocabulary > 1.3 * allowed  # holding them would be noticed
    assert largest.entries <= allowed


# ---------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_step):
    return our_folder(tmp_path_factory.mktemp("base") / "model", tokenizer_step)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def run(out, model, pairs, **changes):
    out.mkdir(parents=True, exist_ok=True)
    values = {"out": str(out), "model": str(model), "pairs": str(pairs), "rows": 4, "epochs": 2.0}
    values |= {"context": 128, "heldout_share": 0.2, "optim": OptimConfig(lr=3e-3, warmup_steps=1)}
    tdpo.run(TdpoConfig(**(values | changes)))


@pytest.mark.parametrize("changes", [{}, {"method": "tdpo1"}, {"lora": LoraConfig(rank=4)}])
def test_preferences_are_learnt_and_a_rerun_gives_the_same_bytes(base, pairs, tmp_path, changes):
    for name in ("a", "b"):
        run(tmp_path / name, base, pairs, **changes)
    before, after = rows(tmp_path / "a", "heldout")
    assert before["loss"] == pytest.approx(math.log(2), rel=1e-7) and (before["accuracy"], before["kl"]) == (
        0.5,
        0,
    )
    assert after["accuracy"] > 0.9 and after["loss"] < 0.6 and after["kl"] > 0
    assert after["preferred"] > 0.9 and after["reward_margin"] > 0.2
    trained = rows(tmp_path / "a", "train")
    assert trained[-1]["accuracy"] > 0.9 and trained[0]["loss"] == pytest.approx(math.log(2))
    assert files(tmp_path / "a" / "model") == files(tmp_path / "b" / "model")
    assert not list((tmp_path / "a").glob("checkpoint-*"))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_another_architecture_is_aligned_too(llama_folder, pairs, tmp_path, lora):
    run(tmp_path / "a", llama_folder, pairs, lora=lora)
    before, after = rows(tmp_path / "a", "heldout")
    assert before["loss"] == pytest.approx(math.log(2), rel=1e-7) and after["accuracy"] > 0.9


def test_another_reference_is_what_the_policy_is_held_against(base, pairs, tmp_path, tokenizer_step):
    run(tmp_path / "first", base, pairs, epochs=1.0)
    moved_on = tmp_path / "first" / "model"
    run(tmp_path / "second", moved_on, pairs, epochs=0.5, reference=ReferenceConfig(model=str(base)))
    one, two = rows(tmp_path / "first", "heldout")[1], rows(tmp_path / "second", "heldout")[0]
    for name in ("loss", "accuracy", "kl", "reward_margin"):  # it begins where the first one ended
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    other = ours(vocab_size=600)
    from galenic.model import save

    save(other, tmp_path / "other", tokenizer=tokenizer_step, provenance={})
    with pytest.raises(UserError, match=r"600 tokens, .* has 512: only a model with the same tokenizer"):
        run(tmp_path / "x", base, pairs, reference=ReferenceConfig(model=str(tmp_path / "other")))


def test_held_out_pairs_of_their_own(base, pairs, tmp_path):
    held = write_pairs(tmp_path / "held.jsonl", 9)
    run(tmp_path / "a", base, pairs, heldout=str(held), epochs=0.2)
    data = (tmp_path / "a" / "data.json").read_text()
    assert '"heldout": 9' in data and '"pairs": 60' in data
    run(tmp_path / "b", base, pairs, heldout=str(held), heldout_pairs=5, epochs=0.2)
    assert '"heldout": 5' in (tmp_path / "b" / "data.json").read_text()
    with pytest.raises(UserError, match="heldout_pairs: 0 is below 1"):
        config(heldout_pairs=0)


def test_a_policy_that_runs_away_is_stopped_with_advice(base, pairs, tmp_path):
    from galenic.pretrain.config import CheckpointConfig

    with pytest.raises(UserError, match=r"limits.kl 0.01: lower optim.lr"):
        run(
            tmp_path / "a",
            base,
            pairs,
            limits=LimitsConfig(kl=0.01, steps=2),
            checkpoints=CheckpointConfig(seconds=0, asynchronous=False),
        )
    assert list((tmp_path / "a").glob("checkpoint-*")) and not (tmp_path / "a" / "model").exists()


def test_a_run_that_was_cut_ends_with_the_same_bytes(base, pairs, tmp_path, monkeypatch):
    from galenic.pretrain.config import CheckpointConfig

    often = CheckpointConfig(seconds=0, asynchronous=False)
    run(tmp_path / "whole", base, pairs, epochs=1.0, checkpoints=often)
    real, calls = tdpo.TdpoObjective.__call__, []

    def cut(self, *arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(tdpo.TdpoObjective, "__call__", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", base, pairs, epochs=1.0, checkpoints=often)
    monkeypatch.undo()
    run(tmp_path / "cut", base, pairs, epochs=1.0, checkpoints=often)
    assert files(tmp_path / "cut" / "model") == files(tmp_path / "whole" / "model")
    told = [[(r["step"], r["loss"], r["kl"]) for r in rows(tmp_path / n, "train")] for n in ("cut", "whole")]
    assert told[0] == told[1]


def test_the_plan_says_which_loss(base, pairs):
    values = {"out": "o", "model": str(base), "pairs": str(pairs)}
    assert "TDPO2, alpha 0.5, beta 0.1" in tdpo.plan(TdpoConfig(**values)).facts["objective"]
    assert "TDPO1, beta 0.1" in tdpo.plan(TdpoConfig(**values, method="tdpo1")).facts["objective"]
    with pytest.raises(UserError, match="no such file"):
        tdpo.plan(TdpoConfig(**(values | {"pairs": "missing.jsonl"})))


def test_the_exported_policy_is_the_trained_one(base, pairs, tmp_path):
    run(tmp_path / "a", base, pairs, epochs=1.0)
    tensors = load_file(tmp_path / "a" / "model" / "model.safetensors")
    start = load_file(base / "model.safetensors")
    assert tensors.keys() == start.keys()
    assert any(not torch.equal(tensors[name], start[name]) for name in start)
    assert load(tmp_path / "a" / "model").config.vocab_size == 512
