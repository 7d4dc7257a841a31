"""PPO as a verb: what it learns, that it repeats its bytes, what it writes, what it refuses."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from galenic.align import ppo
from galenic.align.config import LimitsConfig, LoraConfig, PpoConfig, ReferenceConfig, SamplingConfig
from galenic.align.experience import Experiences, collate_answers, experience, fitting
from galenic.align.policy import Reference, head_is_product
from galenic.align.tasks import read_tasks
from galenic.align.values import ValueHead, value_head_for, with_values
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, load, load_tokenizer, save
from galenic.model.foreign import load_any
from galenic.pretrain.config import CheckpointConfig, OptimConfig, ParallelConfig
from galenic.runtime import UserError, read_json

from test_ppo_losses import make_answer

WORDS = "fever cough asthma lung heart pain drug dose".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_step):
    torch.manual_seed(0)
    model = BaichuanM1ForCausalLM(
        BaichuanM1Config(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_swa_attention_heads=2,
            num_swa_key_value_heads=1,
            sliding_window=8,
            sliding_window_layers=[1],
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    )
    folder = tmp_path_factory.mktemp("base") / "model"
    save(model, folder, tokenizer=tokenizer_step, provenance={"verb": "test"})
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    rows = [{"prompt": f"What follows {word}?", "answer": "a"} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Letters:
    """A reward that each token changes a little: the share of early letters."""

    def __init__(self, *_, **__):
        pass

    def ready(self, tasks):
        pass

    def __call__(self, tasks, texts, ended):
        assert len(tasks) == len(texts) == len(ended)
        return [sum(letter in "abcdefgh" for letter in text) / max(1, len(text)) for text in texts]


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr("galenic.align.rewards.rewards.Rewards", Letters)


def make_config(out, base, tasks, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    values = {
        "out": str(out),
        "model": str(base),
        "tasks": str(tasks),
        "rollouts": 2,
        "rows": 8,
        "context": 64,
        "sampling": SamplingConfig(max_new_tokens=6),
        "optim": OptimConfig(lr=1e-2, warmup_steps=1),
    }
    return PpoConfig(**{**values, **changes})


def rows_of(folder, kind="train"):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second", "memory_gb")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows if row["kind"] == kind]


def same_model(one, two):
    tensors = [load_file(next(Path(folder).glob("model/*.safetensors"))) for folder in (one, two)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items()
    )


# ---------------------------------------------------------------------------- one step


def test_values_are_those_of_the_states_that_tokens_are_predicted_from(base, llama_folder):
    torch.manual_seed(1)
    for folder in (base, llama_folder):
        model = load_any(folder)
        model.value_head = value_head_for(model)
        torch.nn.init.normal_(model.value_head.weight)
        torch.nn.init.normal_(model.value_head.bias)
        ids = torch.randint(10, 300, (3, 7))
        answers = torch.zeros(3, 7, dtype=torch.bool)
        answers[0, 3:5] = answers[1, 1:] = True
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state
            wanted = [
                float(hidden[row, place - 1] @ model.value_head.weight + model.value_head.bias)
                for row, place in answers.nonzero().tolist()
            ]
        for product in (True, False):
            _, values = with_values(model, ids, answers, product=product, temperature=1.0)
            assert values.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_values_under_an_adapter_are_the_policys_and_not_its_bases(llama_folder):
    from galenic.align.lora import add_adapter

    model = add_adapter(load_any(llama_folder), LoraConfig(rank=2), 0)
    reference = Reference(model, ReferenceConfig(), base=str(llama_folder))
    model.value_head = value_head_for(model)
    torch.nn.init.normal_(model.value_head.weight)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids, answers = torch.arange(10, 16)[None], torch.tensor([[False, False, True, True, True, True]])
    given = {"product": True, "temperature": 1.0}
    with torch.no_grad():
        found, values = with_values(model, ids, answers, reference=reference, **given)
        _, alone = with_values(model, ids, answers, **given)
        with model.disable_adapter():
            other, bases = with_values(model, ids, answers, **given)
    assert torch.equal(values, alone)
    assert not torch.allclose(values, bases, atol=1e-3)
    torch.testing.assert_close(found.reference_log_probs, other.log_probs)


def naive(model, part, config):
    """The same loss from all logits, token by token, in Python."""
    logits = model(input_ids=part["input_ids"]).logits / config.sampling.temperature
    hidden = model.model(input_ids=part["input_ids"]).last_hidden_state
    total, count = 0, 0
    for row, place in part["answers"].nonzero().tolist():
        log_p = logits[row, place - 1].double().log_softmax(-1)
        value = (hidden[row, place - 1] @ model.value_head.weight + model.value_head.bias).squeeze()
        ratio = (log_p[part["input_ids"][row, place]] - part["log_probs"][row, place]).exp()
        gain, old, aim = (part[name][row, place] for name in ("advantages", "values", "returns"))
        policy = -torch.min(ratio * gain, ratio.clamp(1 - config.clip, 1 + config.clip) * gain)
        near = old + (value - old).clamp(-config.value_clip, config.value_clip)
        total = total + policy + config.value_weight * torch.max((value - aim) ** 2, (near - aim) ** 2) / 2
        total = total + config.entropy_weight * (log_p.exp() * log_p).sum()
        count += 1
    return total / count


def test_loss_and_gradient_equal_the_naive_ones_and_do_not_depend_on_the_cut(base, tasks, tmp_path):
    config = make_config(
        tmp_path, base, tasks, entropy_weight=0.3, value_weight=0.7,
        sampling=SamplingConfig(max_new_tokens=6, temperature=0.7),
    )  # fmt: skip
    torch.manual_seed(2)
    answers = []
    for length, prompt in ((3, (5, 6)), (6, (5,)), (1, (5, 8, 9)), (2, (4, 4))):
        numbers = torch.randn(3, length).double()
        answers.append(
            make_answer(
                prompt=prompt,
                length=length,
                reward=float(torch.randn(())),
                log_probs=(numbers[0] * 0.3 - 6.2).tolist(),  # about those of the model: some are clipped, some not
                log_ratios=numbers[1].tolist(),
                values=numbers[2].tolist(),
            )
        )
    found = experience(answers, config, config.kl)
    model = load(base).double()
    model.value_head = value_head_for(model)
    model.value_head.double()
    torch.nn.init.normal_(model.value_head.weight, std=0.3)
    objective = ppo.PpoObjective(config, product=head_is_product(model))

    def loss_and_gradients(chosen):
        model.zero_grad()
        sums = {}
        units = sum(objective.units(collate_answers(found, own)) for own in chosen)
        assert units == 12
        total = 0.0
        for own in chosen:
            loss, told = objective(model, collate_answers(found, own), units)
            loss.backward()
            total += float(loss)
            for name, (number, count) in told.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = before[0] + number, before[1] + count
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return total, gradients, {name: number / count for name, (number, count) in sums.items()}

    whole, gradients, told = loss_and_gradients([[0, 1, 2, 3]])
    model.zero_grad()
    wanted = naive(model, collate_answers(found, [0, 1, 2, 3]), config)
    wanted.backward()
    assert whole == pytest.approx(float(wanted), rel=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-9, rtol=1e-6)
    assert 0 < told["clipped"] < 1
    assert "stale" not in told and told["reward"] == pytest.approx(found.told["reward"])
    parts, cut, also_told = loss_and_gradients([[2], [0, 3], [1]])
    assert parts == pytest.approx(whole, rel=1e-9) and also_told == pytest.approx(told)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut[name], gradient, atol=1e-9, rtol=1e-6)


def test_a_value_head_is_spared_from_decay_and_matrices_ways(base):
    from galenic.pretrain.optimizers import trained_parameters

    model = load(base)
    model.value_head = value_head_for(model)
    others = [id(parameter) for parameter in trained_parameters(model)[1]]
    assert {id(model.value_head.weight), id(model.value_head.bias)} <= set(others)
    assert ValueHead(4)(torch.ones(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.float32


# ---------------------------------------------------------------------------- the verb


def test_rewards_rise(base, tasks, tmp_path, letters):
    config = make_config(tmp_path / "a", base, tasks, rollouts=12, rows=32, kl=0.0, heldout=str(tasks))
    ppo.run(config)
    rewards = [row["reward"] for row in rows_of(tmp_path / "a")]
    assert rewards[-1] > rewards[0] + 0.2
    before, after = rows_of(tmp_path / "a", "heldout")
    assert after["reward"] > before["reward"] + 0.2
    assert (before["step"], after["step"]) == (0, 12 * 4)
    assert set(before) == {"kind", "step", "reward", "length", "ended"}
    row = rows_of(tmp_path / "a")[0]
    names = "reward reward_deviation kl kl_weight length ended entropy clipped policy_loss value_loss kl_step"
    assert set(names.split()) < set(row)
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["kl_step"] == pytest.approx(0, abs=1e-6)


def test_a_penalty_keeps_the_policy_near_its_reference(base, tasks, tmp_path, letters):
    for name, kl in (("free", 0.0), ("held", 1.0)):
        ppo.run(make_config(tmp_path / name, base, tasks, rollouts=6, rows=16, kl=kl))
    free, held = (rows_of(tmp_path / name)[-1]["kl"] for name in ("free", "held"))
    assert held < 0.5 * free


def test_steps_of_a_rollout_share_answers_and_each_is_read_once_an_epoch(base, tasks, tmp_path, letters, monkeypatch):
    seen = []
    plain = Experiences.batch

    def batch(self, step, rows):
        part = plain(self, step, rows)
        seen.append((step, part["input_ids"].tolist()))
        return part

    monkeypatch.setattr(Experiences, "batch", batch)
    ppo.run(make_config(tmp_path / "a", base, tasks))

    def answers(*steps):
        ids = [[i for i in row if i != 3] for step, rows in seen if step in steps for row in rows]
        return sorted(ids)

    assert len(answers(0, 1)) == 8
    assert answers(0, 1) == answers(2, 3) and answers(4, 5) == answers(6, 7)
    assert answers(0, 1) != answers(4, 5)
    assert answers(0) != answers(2)  # cut anew


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "changes", [{"kl_target": 0.5}, {"lora": LoraConfig(rank=2), "kl_target": 0.5}], ids=["full", "lora"]
)
def test_a_run_that_was_cut_ends_with_the_same_bytes(llama_folder, tasks, tmp_path, letters, monkeypatch, changes):
    config = {"rollouts": 3, "checkpoints": CheckpointConfig(seconds=0, asynchronous=False), **changes}
    ppo.run(make_config(tmp_path / "whole", llama_folder, tasks, **config))
    plain, calls = ppo.PpoObjective.__call__, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 7:  # in the second rollout
            raise Killed
        return plain(self, *arguments)

    monkeypatch.setattr(ppo.PpoObjective, "__call__", dies)
    cut = make_config(tmp_path / "cut", llama_folder, tasks, **config)
    with pytest.raises(Killed):
        ppo.run(cut)
    assert [folder.name for folder in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-00000004"]
    calls.extend([1] * 9)
    ppo.run(cut)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert same_model(tmp_path / "cut", tmp_path / "whole")
    weights = [row["kl_weight"] for row in rows_of(tmp_path / "whole")]
    assert weights[0] == 0.05 and len(set(weights)) == 3


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_the_value_head_is_not_in_what_is_written(base, llama_folder, tasks, tmp_path, letters, lora):
    for name, folder in (("ours", base), ("llama", llama_folder)):
        ppo.run(make_config(tmp_path / name, folder, tasks, rollouts=1, lora=lora))
        written = load_file(next((tmp_path / name / "model").glob("*.safetensors")))
        assert not any("value_head" in tensor for tensor in written)
        if lora is None:
            assert written.keys() == load_file(folder / "model.safetensors").keys()
            load_any(tmp_path / name / "model")
        made = read_json(tmp_path / name / "model" / "galenic.json")
        assert (made["verb"], made["steps"], made["tasks"]) == ("ppo", 4, "words.jsonl")


def test_accumulated_gradients_are_those_of_a_whole_minibatch(base, tasks, tmp_path, letters):
    for name, micro_rows in (("whole", 0), ("cut", 1)):
        changes = {"rollouts": 1, "parallel": ParallelConfig(micro_rows=micro_rows)}
        ppo.run(make_config(tmp_path / name, base, tasks, **changes))
    whole, cut = (rows_of(tmp_path / name) for name in ("whole", "cut"))
    for one, other in zip(whole, cut, strict=True):
        assert {n: pytest.approx(v, rel=1e-3, abs=1e-5) for n, v in one.items()} == other


def test_a_finished_run_does_nothing_more(base, tasks, tmp_path, letters, monkeypatch):
    config = make_config(tmp_path / "a", base, tasks, rollouts=1)
    ppo.run(config)
    monkeypatch.setattr(ppo, "read_tasks", None)
    ppo.run(config)


def test_the_plan_says_what_would_be_done(base, tasks, tmp_path):
    told = ppo.plan(make_config(tmp_path / "a", base, tasks, kl_target=6.0))
    assert told.facts["training"].startswith("2 rollouts of 8 answers, 4 steps on each (2 x 2)")
    assert told.facts["objective"] == "clip 0.2, KL penalty 0.05, adapted to 6 nats an answer"
    assert told.facts["rewards"] == "rules for 8 tasks"


# ---------------------------------------------------------------------------- what goes wrong


def test_prompts_without_room_are_left_out_and_counted(base, tasks, tmp_path, letters):
    path = tmp_path / "tasks.jsonl"
    path.write_text(tasks.read_text() + json.dumps({"prompt": "fever " * 80, "answer": "a"}) + "\n")
    ppo.run(make_config(tmp_path / "a", base, path, rollouts=1))
    found = read_json(tmp_path / "a" / "data.json")
    assert (found["tasks"], found["dropped"]) == (8, {"longer than context": 1})
    with pytest.raises(UserError, match="no prompt of 9 has 4 tokens at most"):
        fitting(read_tasks(str(path)), load_tokenizer(base), 4)


def test_a_prompt_that_a_tokenizer_cannot_write_is_named(llama_folder, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "a <|im_end|> inside", "answer": "a"}\n')
    with pytest.raises(UserError, match=r"tasks.jsonl:1: .*<\|im_end\|>"):
        fitting(read_tasks(str(path)), load_tokenizer(llama_folder), 64)


@pytest.mark.parametrize(
    ("rewards", "limits", "says"),
    [
        ([0.5] * 8, LimitsConfig(constant=3), "all rewards of 3 steps in a row are the same"),
        ([0.1 * i for i in range(8)], LimitsConfig(length=0.9, steps=2), "answers no longer end"),
        ([0.1 * i for i in range(8)], LimitsConfig(kl=1e-6, steps=5), "nats a token from its reference"),
        ([float("nan")] * 8, LimitsConfig(), "is not finite"),
    ],
)
def test_a_run_gone_astray_stops_and_keeps_its_checkpoint(base, tasks, tmp_path, monkeypatch, rewards, limits, says):
    class Fixed(Letters):
        def __call__(self, *_):
            return rewards

    monkeypatch.setattr("galenic.align.rewards.rewards.Rewards", Fixed)
    config = make_config(
        tmp_path / "a", base, tasks, rollouts=4, limits=limits, checkpoints=CheckpointConfig(seconds=0, asynchronous=False)
    )  # fmt: skip
    with pytest.raises(UserError, match=says):
        ppo.run(config)
    assert not (tmp_path / "a" / "model").exists()
    if "kl" in says or "nats" in says:
        assert (tmp_path / "a" / "checkpoint-00000004").is_dir()


def test_a_reference_of_another_vocabulary_is_refused(base, llama_folder, tasks, tmp_path, letters):
    other = ReferenceConfig(model=str(llama_folder))
    with pytest.raises(UserError, match="has .* tokens, .* has 512"):
        ppo.run(make_config(tmp_path / "a", base, tasks, reference=other))


def test_another_reference_is_measured_against(base, tasks, tmp_path, letters):
    other = load(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    save(copy.deepcopy(other), tmp_path / "other", tokenizer=base, provenance={"verb": "test"})
    config = make_config(tmp_path / "a", base, tasks, rollouts=1, reference=ReferenceConfig(model=str(tmp_path / "other")))
    ppo.run(config)
    assert abs(rows_of(tmp_path / "a")[0]["kl"]) > 1e-3
