"""ELO against the exact gradient: all chains of a toy vocabulary are enumerated, in float64."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from galenic.align import elo
from galenic.align.config import EloConfig, LimitsConfig, LoraConfig, ReferenceConfig, SamplingConfig
from galenic.align.data.tasks import Task
from galenic.align.elo import EloObjective, elo_loss, leave_one_out
from galenic.align.policy import Reference
from galenic.align.rollouts.chains import Question, chain_row, collate_chains
from galenic.align.rollouts.sampling import Rollout, sample
from galenic.model.head import head_is_product
from galenic.pretrain.config import CheckpointConfig, OptimConfig
from galenic.runtime import UserError

# ------------------------------------------------------------------------ a toy: five tokens, chains of two at most

END, MARKER, LONGEST = 0, 1, 2


class Letters:
    """A tokenizer of five tokens: the end, the marker and three letters."""

    def decode(self, ids, **_):
        return "".join(("", "M", "a", "b", "c")[index] for index in ids)


QUESTION = Question(
    task=Task(id="toy", messages=[{"role": "user", "content": "b"}], answer="ca"),
    prompt=[3],
    marker=[MARKER],
    answer=[4, 2, END],
)


def chains():
    """All that can be sampled: a turn that ends, a marker, or two tokens."""
    yield (END,)
    yield (MARKER,)
    yield from itertools.product((2, 3, 4), range(5))


def toy(seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=5,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def pair():
    """A policy and the reference that it has moved away from."""
    policy, reference = toy(0), Reference(toy(1), ReferenceConfig(), base="")
    return policy, reference


def make_config(**changes):
    values = {"out": "x", "model": "x", "tasks": "x", "samples": 2, "marker": "M"}
    return EloConfig(**{**values, **changes})


def laid(*sampled):
    return collate_chains(
        [chain_row(QUESTION, Rollout(ids=list(ids)), Letters(), marker="M", ends={END}) for ids in sampled]
    )


def dense_log_prob(model, before, after, temperature=1.0):
    """log p(after | before), by the whole logits of each step."""
    total, ids = 0.0, list(before)
    for token in after:
        logits = model(torch.tensor([ids])).logits[0, -1] / temperature
        total = total + logits.log_softmax(-1)[token]
        ids.append(token)
    return total


def dense_reward(model, chain, reduction):
    """log p(A | Q, c), written out: what ends a turn is taken away, a missing marker is put."""
    kept = [token for token in chain if token != END]
    kept += [] if kept and kept[-1] == MARKER else [MARKER]
    found = dense_log_prob(model, [*QUESTION.prompt, *kept], QUESTION.answer)
    return found if reduction == "sum" else found / len(QUESTION.answer)


def gradient(value, model):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def exact(policy, reference, config):
    """The exact value of L_upper and the exact gradient, of the printed formula or of all of it."""
    value = total = 0.0
    temperature = config.sampling.temperature
    for chain in chains():
        log_p = dense_log_prob(policy, QUESTION.prompt, chain, temperature)
        reward = dense_reward(policy, chain, config.reduction)
        value = value - (log_p.exp() * reward).detach()
        total = total - log_p.exp() * (reward if config.answer_term else reward.detach())
        with torch.no_grad():
            log_q = dense_log_prob(reference.model, QUESTION.prompt, chain, temperature)
        total = total + config.kl * log_p.exp() * (log_p - log_q)
    return float(value), gradient(total, policy)


def expected(policy, reference, config):
    """Loss, gradient and measures of the objective over all pairs of chains, each by its probability."""
    objective = EloObjective(config, reference, product=head_is_product(policy))
    everything = list(chains())
    with torch.no_grad():
        probability = {
            chain: float(dense_log_prob(policy, QUESTION.prompt, chain, config.sampling.temperature).exp())
            for chain in everything
        }
    assert sum(probability.values()) == pytest.approx(1, abs=1e-12)
    value, total = 0.0, 0.0
    for one, two in itertools.combinations_with_replacement(everything, 2):
        weight = probability[one] * probability[two] * (1 if one == two else 2)
        loss, _ = objective(policy, laid(one, two), 1)
        total = total + weight * gradient(loss, policy)
        value += weight * float(loss.detach())
    return value, total


@pytest.mark.parametrize(
    ("answer_term", "reduction", "kl", "temperature"),
    [
        (False, "sum", 0.0, 1.0),
        (True, "sum", 0.0, 1.0),
        (False, "mean", 0.7, 1.0),
        (True, "mean", 0.7, 1.3),
    ],
)
def test_the_expected_gradient_is_the_exact_one(pair, answer_term, reduction, kl, temperature):
    policy, reference = pair
    config = make_config(
        answer_term=answer_term,
        reduction=reduction,
        kl=kl,
        sampling=SamplingConfig(temperature=temperature),
    )
    value, wanted = exact(policy, reference, config)
    found_value, found = expected(policy, reference, config)
    assert found_value == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert wanted.norm() > 0.01


def test_the_answer_term_is_what_the_printed_formula_leaves_out(pair):
    policy, reference = pair
    _, printed = exact(policy, reference, make_config())
    _, whole = exact(policy, reference, make_config(answer_term=True))
    supervised = 0.0
    for chain in chains():
        with torch.no_grad():
            probability = dense_log_prob(policy, QUESTION.prompt, chain).exp()
        supervised = supervised - probability * dense_reward(policy, chain, "sum")
    torch.testing.assert_close(whole - printed, gradient(supervised, policy), rtol=1e-9, atol=1e-12)
    assert (whole - printed).norm() > 0.1 * whole.norm()


def test_the_bound_of_the_report_holds(pair):
    policy, reference = pair
    upper, _ = exact(policy, reference, make_config())
    with torch.no_grad():
        likelihood = sum(
            dense_log_prob(policy, QUESTION.prompt, chain).exp() * dense_reward(policy, chain, "sum").exp()
            for chain in chains()
        )
    assert upper > -math.log(float(likelihood))


@pytest.mark.parametrize("answer_term", [False, True])
def test_real_samples_are_unbiased(pair, answer_term):
    """Chains of the real sampler: their frequencies, and the mean of many gradients within its own error."""
    policy, reference = pair
    config, many = make_config(answer_term=answer_term), 4000
    rollouts = sample(
        policy,
        [QUESTION.prompt] * many,
        keys=[(7, number) for number in range(many)],
        max_new_tokens=LONGEST,
        end={END},
        stop=lambda ids: MARKER in ids,
        batch=1000,
    )
    drawn = [tuple(rollout.ids) for rollout in rollouts]
    for chain in chains():
        with torch.no_grad():
            p = float(dense_log_prob(policy, QUESTION.prompt, chain).exp())
        assert abs(drawn.count(chain) - many * p) <= 4.5 * math.sqrt(many * p * (1 - p)) + 1, chain
    objective = EloObjective(config, reference, product=head_is_product(policy))
    _, wanted = exact(policy, reference, config)
    known = {}
    found = []
    for pair_of in zip(drawn[::2], drawn[1::2], strict=True):
        key = tuple(sorted(pair_of))
        if key not in known:
            known[key] = gradient(objective(policy, laid(*key), 1)[0], policy)
        found.append(known[key])
    found = torch.stack(found)
    directions = torch.nn.functional.normalize(
        torch.cat([wanted[None], torch.randn(20, len(wanted), dtype=torch.float64)]), dim=1
    )
    projected = found @ directions.T
    error = projected.std(0) / math.sqrt(len(found))
    assert ((projected.mean(0) - directions @ wanted).abs() < 4 * error).all()
    # It can fail: without a gradient, and with the other formula's, the test would notice.
    _, other = exact(policy, reference, make_config(answer_term=not answer_term))
    assert not ((projected.mean(0) - directions @ other).abs() < 4 * error).all()


def test_the_baseline_is_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert leave_one_out(rewards).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_the_loss_by_hand():
    rewards = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    log_probs = torch.tensor([[-2.0, -5.0]], requires_grad=True)
    for answer_term in (False, True):
        loss = elo_loss(rewards, log_probs, answer_term=answer_term)
        assert loss.tolist() == [2.0]
        of_rewards, of_chains = torch.autograd.grad(loss.sum(), [rewards, log_probs], allow_unused=True)
        assert of_chains.tolist() == [[-1.0, 1.0]]  # the advantages are 2 and -2, of two chains
        assert (of_rewards is not None) == answer_term
        if answer_term:
            assert of_rewards.tolist() == [[-0.5, -0.5]]
    penalised = elo_loss(rewards, log_probs, answer_term=False, penalties=torch.tensor([[3.0, 0.0]]))
    assert torch.autograd.grad(penalised.sum(), log_probs)[0].tolist() == [[0.5, -0.5]]


def test_a_batch_in_parts_is_the_whole(pair):
    policy, reference = pair
    config = make_config(kl=0.3, answer_term=True)
    objective = EloObjective(config, reference, product=head_is_product(policy))
    rows = [(END,), (2, MARKER), (3, 4), (MARKER,), (4, END), (2, 2)]
    loss, told = objective(policy, laid(*rows), 3)
    whole = gradient(loss, policy)
    parts = [objective(policy, laid(*rows[first : first + 2]), 3) for first in (0, 2, 4)]
    torch.testing.assert_close(gradient(sum(loss for loss, _ in parts), policy), whole, rtol=1e-9, atol=1e-12)
    for name in objective.measures:
        summed = [sum(part[name][i] for _, part in parts) for i in range(2)]
        assert summed == pytest.approx(list(told[name]), rel=1e-6), name


def test_measures_by_hand(pair):
    policy, reference = pair
    objective = EloObjective(make_config(), reference, product=head_is_product(policy))
    rows = [(END,), (2, MARKER), (3, 4), (3, 4)]
    _, told = objective(policy, laid(*rows), 2)
    mean = {name: total / count for name, (total, count) in told.items() if count}
    with torch.no_grad():
        rewards = [float(dense_reward(policy, row, "sum")) for row in rows]
        ratios = [
            float(
                dense_log_prob(policy, QUESTION.prompt, row)
                - dense_log_prob(reference.model, QUESTION.prompt, row)
            )
            for row in rows
        ]
    assert mean["reward"] == pytest.approx(sum(rewards) / 4, rel=1e-9)
    assert mean["reward_deviation"] == pytest.approx(abs(rewards[0] - rewards[1]) / 2 / 2, rel=1e-9)
    assert mean["accuracy"] == pytest.approx(sum(map(math.exp, rewards)) / 4, rel=1e-9)
    assert mean["kl"] == pytest.approx(sum(ratios) / 7, rel=1e-9)
    assert (mean["length"], mean["ended"], mean["empty"]) == (7 / 4, 0.5, 0.25)
    assert told["stale"] == (0, 0)


def test_chains_that_are_all_the_same_deviate_by_nothing(pair):
    policy, reference = pair
    objective = EloObjective(make_config(samples=3), reference, product=head_is_product(policy))
    _, told = objective(policy.float(), laid((3, 4), (3, 4), (3, 4)), 1)
    policy.double()
    assert told["reward_deviation"] == (0.0, 1)


@pytest.mark.parametrize("answer_term", [True, False])
def test_where_weights_are_shared_the_whole_gradient_is_needed(answer_term):
    """From sampled chains; what counts is the exact L_upper, which the printed gradient raises here."""
    policy = toy(5)
    reference = Reference(policy, ReferenceConfig(), base="")
    config = make_config(samples=8, answer_term=answer_term)
    objective = EloObjective(config, reference, product=head_is_product(policy))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    before, _ = exact(policy, reference, config)
    for step in range(20):
        rollouts = sample(
            policy,
            [QUESTION.prompt] * 8,
            keys=[(step, number) for number in range(8)],
            max_new_tokens=LONGEST,
            end={END},
            stop=lambda ids: MARKER in ids,
        )
        gradient(objective(policy, laid(*(r.ids for r in rollouts)), 1)[0], policy)
        optimizer.step()
    after, _ = exact(policy, reference, config)
    assert after < before / 2 if answer_term else after > before


def test_the_printed_gradient_finds_the_best_chain():
    """Where chains have weights of their own: a table of six chains, whose rewards nothing else can change."""
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([-9.0, -4.0, -1.0, -6.0, -3.0, -8.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        log_probs = logits.log_softmax(-1)
        drawn = torch.multinomial(log_probs.detach().exp(), 8, replacement=True, generator=generator)[None]
        loss = elo_loss(rewards[drawn], log_probs[drawn], answer_term=False).sum()
        with torch.no_grad():
            logits -= 0.1 * torch.autograd.grad(loss, logits)[0]
    assert logits.softmax(-1)[2] > 0.9


# ------------------------------------------------------------------------ the verb, on real folders


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("elo") / "tasks.jsonl"
    lines = [
        {"prompt": f"What follows {word}?", "answer": word} for word in ("lung", "heart", "pain", "drug")
    ]
    lines.append({"question": "Which?", "options": ["fever", "cough"], "answer": 1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def verb_config(out, model, tasks, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    values = {
        "out": str(out),
        "model": str(model),
        "tasks": str(tasks),
        "heldout": str(tasks),
        "steps": 4,
        "rows": 2,
        "samples": 3,
        "context": 128,
        "optim": OptimConfig(lr=1e-2, warmup_steps=1),
        "sampling": SamplingConfig(max_new_tokens=6),
    }
    return EloConfig(**{**values, **changes})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_the_verb_tells_its_health_and_reruns_to_the_same_bytes(llama_folder, tasks, tmp_path, lora):
    for name in ("a", "b"):
        elo.run(verb_config(tmp_path / name, llama_folder, tasks, lora=lora))
    rows = rows_of(tmp_path / "a")
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 3, 4]
    for row in train:
        assert row["loss"] == pytest.approx(-row["reward"], rel=1e-6)
        assert 0 < row["length"] <= 6 and 0 <= row["ended"] <= 1 and row["stale"] < 1e-4
    assert train[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert train[-1]["kl"] != pytest.approx(0, abs=1e-5)
    held = [row for row in rows if row["kind"] == "heldout"]
    assert [row["step"] for row in held] == [0, 4]
    assert held[0]["log_likelihood"] < held[0]["log_likelihood_token"] < 0
    files = sorted(file.name for file in (tmp_path / "a" / "model").iterdir())
    for file in files:
        assert (tmp_path / "a" / "model" / file).read_bytes() == (
            tmp_path / "b" / "model" / file
        ).read_bytes()


def test_a_run_that_was_stopped_ends_with_the_same_bytes(llama_folder, tasks, tmp_path, monkeypatch):
    settings = {"checkpoints": CheckpointConfig(asynchronous=False, seconds=0)}
    elo.run(verb_config(tmp_path / "whole", llama_folder, tasks, **settings))

    def stops(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("galenic.align.health.watchdog", lambda *_, **__: stops)
        with pytest.raises(KeyboardInterrupt):
            elo.run(verb_config(tmp_path / "cut", llama_folder, tasks, **settings))
    assert not (tmp_path / "cut" / "model").exists()
    elo.run(verb_config(tmp_path / "cut", llama_folder, tasks, **settings))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)

    one, two = (
        [row["reward"] for row in rows_of(tmp_path / name) if row["kind"] == "train"]
        for name in ("whole", "cut")
    )
    assert one == two and len(one) == 4


def test_chains_that_never_end_stop_the_run_with_advice(llama_folder, tasks, tmp_path):
    config = verb_config(
        tmp_path / "a", llama_folder, tasks, heldout=None, limits=LimitsConfig(length=0.01, steps=2)
    )
    with pytest.raises(UserError, match=r"limits.length 0.01: answers no longer end"):
        elo.run(config)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "x"}, "no answer"),
        ({"prompt": "", "answer": "y"}, "the prompt is empty"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "y"}, "the user last"),
        ({"question": "x", "options": ["a"], "answer": 3}, "not the index"),
    ],
)
def test_a_bad_line_is_named(llama_folder, tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=f"bad.jsonl:2: .*{says}"):
        elo.run(verb_config(tmp_path / "x", llama_folder, path))


def test_settings_that_mean_nothing_are_refused(llama_folder, tasks, tmp_path):
    with pytest.raises(UserError, match="samples: 1 is below 2"):
        make_config(samples=1)
    with pytest.raises(UserError, match="marker: is empty"):
        make_config(marker="")
    with pytest.raises(UserError, match="ends in white space"):
        make_config(marker="Answer: ")
    with pytest.raises(UserError, match=r"no question is left \(5: longer than context"):
        elo.run(verb_config(tmp_path / "x", llama_folder, tasks, sampling=SamplingConfig(max_new_tokens=120)))
