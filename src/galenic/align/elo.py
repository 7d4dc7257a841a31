"""Verb `elo`: Exploratory Log-likelihood Optimization. Chains of thought are learnt from true answers alone.

    r(c)     = log p(A | Q, c)                                        c: a chain of thought, A: the true answer
    L_upper  = -E_{c ~ p(.|Q)} r(c)   >=   L_ELO = -log E_{c ~ p(.|Q)} p(A | Q, c)
    gradient = -E_{c ~ p(.|Q)} (r(c) - b(Q, A)) grad log p(c | Q)     as printed, eq. 3
               -E_{c ~ p(.|Q)} grad r(c)                              `answer_term`: the rest of the derivative

There is no reward model. K chains are sampled for each question, and the baseline of each is the mean reward of the
others, so that the estimate has no bias. The probability of a chain is that of all tokens that were sampled, also of
those that ended it (`chains.py` says what a chain is and how the answer follows). With `kl`, KL(p || q) of chains from
the reference is held down too: its exact gradient is that of a penalty log p(c|Q) - log q(c|Q) in the reward.

The printed gradient looks at the chain only. Chain and answer share their weights, so that following it may also lower
the likelihood of answers; the whole derivative cannot, to first order.

Source: Baichuan-M1 report, section 5.3, eq. 1-3. It names neither b, K, nor whether the answer's log-likelihood is a
sum or a mean over tokens (`reduction`). Leave-one-out: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for
free!".
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galenic.align.config import EloConfig
from galenic.align.training import opened, planned
from galenic.runtime import Plan, human, read_jsonl

if TYPE_CHECKING:
    import torch

    from galenic.align.policy import Reference
    from galenic.align.rollouts.chains import Question
    from galenic.align.training import Run


def leave_one_out(rewards: "torch.Tensor") -> "torch.Tensor":
    """Returns each reward minus the mean of the others of its question: (questions, samples), at least two samples."""
    samples = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)


def elo_loss(
    rewards: "torch.Tensor",
    log_probs: "torch.Tensor",
    *,
    answer_term: bool,
    penalties: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """Computes the loss of each question: its value estimates L_upper, its gradient estimates eq. 3.

    Args:
        rewards: (questions, samples) r(c), nats, with gradient.
        log_probs: (questions, samples) log p(c|Q), nats, with gradient.
        answer_term: whether r's own gradient counts, which eq. 3 leaves out.
        penalties: (questions, samples) taken off the rewards that chains are learnt from, nats.

    Returns:
        (questions,) losses, nats.
    """
    worth = rewards.detach() if penalties is None else rewards.detach() - penalties.detach()
    score = leave_one_out(worth) * (log_probs - log_probs.detach())  # zero, but for its gradient
    return -(score + (rewards if answer_term else rewards.detach())).mean(1)


class EloObjective:
    """The loss of a batch of `Questions` (`galenic.pretrain.loop.Objective`); a unit is a question with its chains.

    Measures: `reward` (r), `reward_deviation` (of a question's chains; 0: all are the same), `accuracy` (the mean of
    p(A|Q,c): how often an answer sampled after the chain would be exactly the true one), `kl` (an estimate of
    KL(p || q), nats a token), `entropy` (nats a token), `length` of chains (tokens), `ended` (share that came to an end
    by itself), `empty` (share without a thought), `stale` (how far the sampler's log-probabilities are from the
    policy's, nats a token).
    """

    measures = (
        "reward",
        "reward_deviation",
        "accuracy",
        "kl",
        "entropy",
        "length",
        "ended",
        "empty",
        "stale",
    )

    def __init__(self, config: EloConfig, reference: "Reference", *, product: bool) -> None:
        self.config, self.reference, self.product = config, reference, product

    def units(self, part: Mapping[str, Any]) -> float:
        """Counts questions."""
        return len(part["row"]) // self.config.samples

    def __call__(
        self, model: Any, part: Mapping[str, Any], units: float
    ) -> tuple["torch.Tensor", dict[str, tuple[float, float]]]:
        """Computes loss and measures of a part."""
        from galenic.align.policy import before, per_row, states
        from galenic.align.token_statistics import token_statistics

        config, samples = self.config, self.config.samples
        inputs, chains, row = {"input_ids": part["input_ids"]}, part["chains"], part["row"]
        other = before(self.reference.states(inputs), chains)
        policy = states(model, inputs, product=self.product)
        chain = token_statistics(
            before(policy, chains),
            part["targets"][chains],
            reference=other,
            temperature=config.sampling.temperature,
        )
        answers = answer_log_probs(policy, part)
        assert chain.reference_log_probs is not None

        def of_chains(values: "torch.Tensor", wanted: "torch.Tensor" = chains) -> "torch.Tensor":
            """Sums tokens' values by row, and gives each chain those of its row."""
            return per_row(values, wanted)[row]

        log_probs = of_chains(chain.log_probs)
        log_ratios = of_chains((chain.log_probs - chain.reference_log_probs).detach())
        sums = of_chains(answers, part["answers"])
        rewards = sums if config.reduction == "sum" else sums / part["answers"].sum(1)[row]
        losses = elo_loss(
            rewards.view(-1, samples),
            log_probs.view(-1, samples),
            answer_term=config.answer_term,
            penalties=config.kl * log_ratios.view(-1, samples) if config.kl else None,
        )
        count, tokens = len(row), int(chains.sum(1)[row].sum())
        worth = rewards.detach().double()
        told = part["told"][chains]
        known = ~told.isnan()
        stale = (chain.log_probs.detach() - told).abs().double().where(known, 0.0)
        return losses.sum() / units, {
            "reward": (float(worth.sum()), count),
            "reward_deviation": (float(_deviations(worth.view(-1, samples)).sum()), count // samples),
            "accuracy": (float(sums.detach().double().exp().sum()), count),
            "kl": (float(log_ratios.double().sum()), tokens),
            "entropy": (float(of_chains(chain.entropy.detach().double()).sum()), tokens),
            "length": (float(tokens), count),
            "ended": (float(part["ended"][row].sum()), count),
            "empty": (float(part["empty"][row].sum()), count),
            "stale": (float(of_chains(stale).sum()), int(of_chains(known.double()).sum())),
        }


def answer_log_probs(policy: Any, part: Mapping[str, Any]) -> "torch.Tensor":
    """Returns log p of the answers' tokens, (part["answers"].sum(),), at temperature 1: the model's own likelihood.

    Args:
        policy: hidden states (rows, length, width) of the part, and the head.
        part: what `collate_chains` made.
    """
    from galenic.align.policy import before
    from galenic.align.token_statistics import token_statistics

    answers = part["answers"]
    return token_statistics(before(policy, answers), part["input_ids"][answers]).log_probs


def _deviations(rewards: "torch.Tensor") -> "torch.Tensor":
    """Standard deviation of each question's rewards; of the same chains it is 0, whatever was rounded."""
    found = rewards.std(1, correction=0)
    return found.where(found > 1e-5 * rewards.abs().amax(1), 0.0)


def plan(config: EloConfig) -> Plan:
    """What the verb would do."""
    count = sum(1 for _ in read_jsonl(config.tasks))
    answers = ", and answers from their own likelihood" if config.answer_term else ""
    held = f", KL held down with weight {config.kl:g}" if config.kl else ""
    facts = {
        "questions": human(count),
        "objective": f"ELO: chains are learnt from the {config.reduction} of the answer's log-likelihood"
        f"{answers}{held}",
    }
    length = (
        f"{config.steps} steps of {config.rows} questions x {config.samples} chains of at most "
        f"{config.sampling.max_new_tokens} tokens"
    )
    return planned(config, facts, length=length)


def run(config: EloConfig) -> None:
    """Trains; continues where a killed run stopped, to the same bytes."""
    from galenic.align.health import watchdog
    from galenic.align.policy import Reference
    from galenic.align.rollouts.chains import Questions, read_questions
    from galenic.align.rollouts.sampling import Sampler

    with opened("elo", config) as run:
        if run is None:
            return
        run.check_context(config.context)

        def read(path: str, limit: int | None = None) -> "tuple[list[Question], dict[str, int]]":
            return read_questions(
                path,
                run.tokenizer,
                marker=config.marker,
                room=config.sampling.max_new_tokens,
                context=config.context,
                limit=limit,
            )

        questions, dropped = read(config.tasks)
        heldout = read(config.heldout, config.heldout_tasks)[0] if config.heldout else []
        sampler = Sampler(run, config.sampling)
        reference = Reference(run.model, config.reference, base=config.model, parallel=run.parallel)
        run.fit(
            Questions(questions, sampler, config, run.parallel.rows(config.rows)),
            EloObjective(config, reference, product=run.product),
            steps=config.steps,
            score=(lambda: answered(run, config, heldout)) if heldout else None,
            check=watchdog(config.limits, longest=config.sampling.max_new_tokens),
        )
        run.write(
            {"questions": len(questions), "heldout": len(heldout), "dropped": dropped},
            tasks=Path(config.tasks).name,
            samples=config.samples,
            answer_term=config.answer_term,
            reduction=config.reduction,
            kl=config.kl,
        )


def answered(run: "Run", config: EloConfig, questions: "Sequence[Question]") -> dict[str, float]:
    """Lets the model answer held-out questions greedily, thought and all; each process takes its share.

    Returns:
        `accuracy` by the tasks' rules; `log_likelihood` of the true answers after the chains that were written, nats
        an answer; `log_likelihood_token`, nats a token; `ended`, share of turns that ended; `length`, tokens a turn.
    """
    import torch

    from galenic.align.config import RewardsConfig
    from galenic.align.data.order import own_share
    from galenic.align.policy import per_row, states
    from galenic.align.rewards.rules import check
    from galenic.align.rollouts.chains import chain_row, collate_chains
    from galenic.align.rollouts.sampling import Sampler

    parallel, device = run.parallel, run.trainer.device
    share = own_share(len(questions), parallel)
    places, turns = [place for place, _ in share], len(share)
    own = [questions[place] for place in places]
    counted = torch.tensor([counts for _, counts in share], dtype=torch.float64)

    room = config.sampling.max_new_tokens  # of a chain; the answer has to follow
    most = room + max(len(question.marker) + len(question.answer) for question in questions)
    most = min(most, config.context - max(len(question.prompt) for question in questions))
    sampler = Sampler(run, replace(config.sampling, max_new_tokens=most, endpoint=None))
    found = sampler(
        [question.task.messages for question in own], step=run.trainer.step, numbers=places, greedy=True
    )
    columns = torch.zeros(turns, 5, dtype=torch.float64)  # right, log p, tokens of the answer, ended, length
    rows = []
    for turn, (question, [rollout]) in enumerate(zip(own, found, strict=True)):
        text = sampler.text(rollout)
        said = text.partition(config.marker)[2] or text
        columns[turn, 0] = check(question.task, said, RewardsConfig())
        columns[turn, 3], columns[turn, 4] = rollout.ended, len(rollout.ids)
        chain = replace(rollout, ids=rollout.ids[:room])
        rows.append(chain_row(question, chain, run.tokenizer, marker=config.marker, ends=sampler.end))
    size = config.rows * config.samples
    for start in range(0, turns, size):
        part = {name: t.to(device) for name, t in collate_chains(rows[start : start + size]).items()}
        with torch.no_grad():
            policy = states(run.model, {"input_ids": part["input_ids"]}, product=run.product)
            sums = per_row(answer_log_probs(policy, part), part["answers"])
        columns[start : start + size, 1] = sums[part["row"]].cpu()
        columns[start : start + size, 2] = part["answers"].sum(1)[part["row"]].cpu()
    right, log_likelihood, tokens, ended, length = parallel.added(counted @ columns).tolist()
    return {
        "accuracy": right / len(questions),
        "log_likelihood": log_likelihood / len(questions),
        "log_likelihood_token": log_likelihood / tokens,
        "ended": ended / len(questions),
        "length": length / len(questions),
    }
