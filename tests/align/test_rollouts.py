"""Sampling against a naive loop: no batch, no padding, no cache, float64."""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from galenic.align.config import LoraConfig, SamplingConfig
from galenic.align.lora import add_adapter
from galenic.align.rollouts import (
    Rollout,
    Sampler,
    draw,
    end_tokens,
    ends_with,
    health,
    sample,
    stale,
    uniforms,
)
from galenic.corpus.tokens.chat_template import encode_chat
from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, load_tokenizer
from galenic.model.foreign import load_any
from galenic.runtime import UserError

VOCABULARY, END = 24, (2, 8, 13, 20)


def ours(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "num_swa_attention_heads": 6}
    window = {"num_swa_key_value_heads": 2, "sliding_window": 5}
    return spread(BaichuanM1ForCausalLM(BaichuanM1Config(**(sizes | heads | window | changes))))


def llama():
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    return spread(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)))


def gpt2():
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return spread(GPT2LMHeadModel(config))


def spread(model):
    """Makes the weights large, so that every mistake shows, and computes in float64."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.4)
    return model.double()


MODELS = {"ours": ours, "one-tap": lambda: ours(conv_window=1), "llama": llama, "gpt2": gpt2}
PROMPTS = [[5, 6, 7], [8], [5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17], [4, 5], [20, 21, 22, 23, 8, 9]]
KEYS = [(0, 1, number) for number in range(len(PROMPTS))]


@torch.no_grad()
def naive(model, prompt, key, most, temperature=1.0, end=END):
    """One prompt, everything computed again for each token; the inverse of the CDF by a plain loop."""
    model.eval()
    noise, ids, told = uniforms(key, most), [], []
    for place in range(most):
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1]
        log_p = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature:
            reached = list(itertools.accumulate(log_p.exp().tolist()))
            token = next(v for v, bound in enumerate(reached) if noise[place] < bound)
        else:
            token = int(log_p.argmax())
        ids.append(token)
        told.append(float(log_p[token]))
        if token in end:
            return ids, True, told
    return ids, False, told


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_a_naive_loop_in_any_batch(name, temperature):
    model = MODELS[name]()
    expected = [naive(model, p, k, 10, temperature) for p, k in zip(PROMPTS, KEYS, strict=True)]
    if temperature == 1.0:  # some end, some do not, and equal prompts go different ways
        assert len({len(ids) for ids, ended, _ in expected if ended}) > 1
        assert name == "gpt2" or not all(ended for _, ended, _ in expected)
        assert expected[0][0] != expected[2][0]
    for batch in (1, 2, 64):
        found = sample(
            model, PROMPTS, keys=KEYS, max_new_tokens=10, end=END, temperature=temperature, batch=batch
        )
        for rollout, (ids, ended, log_probs) in zip(found, expected, strict=True):
            assert (rollout.ids, rollout.ended) == (ids, ended)
            np.testing.assert_allclose(rollout.log_probs, log_probs, rtol=1e-9, atol=1e-9)


def test_neither_the_others_nor_the_order_matter():
    model = ours()
    whole = sample(model, PROMPTS, keys=KEYS, max_new_tokens=10, end=END)
    some = [4, 0, 3]
    part = sample(model, [PROMPTS[i] for i in some], keys=[KEYS[i] for i in some], max_new_tokens=10, end=END)
    assert [rollout.ids for rollout in part] == [whole[i].ids for i in some]
    shorter = sample(model, PROMPTS, keys=KEYS, max_new_tokens=4, end=END)
    assert [rollout.ids for rollout in shorter] == [rollout.ids[:4] for rollout in whole]
    again = sample(model, PROMPTS, keys=[(0, 2, key[2]) for key in KEYS], max_new_tokens=10, end=END)
    assert [rollout.ids for rollout in again] != [rollout.ids for rollout in whole]
    assert sample(model, [], keys=[], max_new_tokens=4, end=END) == []


def test_greedy_text_is_that_of_transformers():
    model = llama().eval()
    for prompt, rollout in zip(
        PROMPTS, sample(model, PROMPTS, keys=KEYS, max_new_tokens=9, end=END, temperature=0.0), strict=True
    ):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=list(END),
            pad_token_id=0,
        )  # fmt: skip
        assert rollout.ids == expected[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------------- draws


def test_a_draw_inverts_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0], dtype=torch.float64)
    places = torch.arange(4000, dtype=torch.float64) / 4000
    drawn = draw(probabilities.expand(4000, -1), places)
    assert torch.equal(drawn, drawn.sort().values)
    assert torch.equal(drawn.bincount(minlength=6), (probabilities * 4000).long())
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(2, -1), ends).tolist() == [1, 4]


def test_every_text_is_as_frequent_as_it_is_likely():
    model, count = ours(vocab_size=10), 4000
    found = sample(
        model, [[5, 6]] * count, keys=[(7, n) for n in range(count)], max_new_tokens=2, end=END, batch=500
    )
    seen = {}
    for rollout in found:
        seen[tuple(rollout.ids)] = seen.get(tuple(rollout.ids), 0) + 1
        probability = np.exp(sum(rollout.log_probs))
        seen[tuple(rollout.ids), "p"] = probability
    texts = [text for text in seen if (text, "p") in seen]
    expected = np.array([seen[text, "p"] for text in texts]) * count
    observed = np.array([seen[text] for text in texts])
    assert expected.sum() > 0.99 * count
    common = expected >= 5
    assert common.sum() >= 8
    square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum()
    assert square < freedom + 4 * np.sqrt(2 * freedom)


def test_keys_have_numbers_of_their_own():
    assert np.array_equal(uniforms((1, 2), 5), uniforms((1, 2), 9)[:5])
    keys = [(1, 2), (2, 1), (12,), (1, 2, 0), (0, 1, 2), (1, -2), (1, 2**32)]
    assert len({uniforms(key, 1)[0] for key in keys}) == len(keys)
    many = np.concatenate([uniforms((0, n), 100) for n in range(100)])
    assert abs(many.mean() - 0.5) < 0.01 and 0 <= many.min() and many.max() < 1


# ---------------------------------------------------------------------------- ends


def test_a_text_ends_where_stop_says_so():
    model = ours()
    free = sample(model, PROMPTS, keys=KEYS, max_new_tokens=12, end=set())
    assert all(len(rollout.ids) == 12 and not rollout.ended for rollout in free)
    stopped = sample(
        model,
        PROMPTS,
        keys=KEYS,
        max_new_tokens=12,
        end=set(),
        stop=lambda ids: len(ids) >= 3 and ids[-1] % 2 == 0,
    )
    for whole, rollout in zip(free, stopped, strict=True):
        cut = next((n for n in range(3, 13) if whole.ids[n - 1] % 2 == 0), None)
        assert rollout.ids == whole.ids[:cut] and rollout.ended == (cut is not None)
    assert any(rollout.ended for rollout in stopped)


def test_the_mode_is_left_as_it_was():
    model = ours().train()
    sample(model, PROMPTS, keys=KEYS, max_new_tokens=2, end=END)
    assert model.training and model.lm_head.training
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="not numbers"):
        sample(model, PROMPTS, keys=KEYS, max_new_tokens=2, end=END)
    assert model.training


def test_flexible_attention_rests_meanwhile():
    model = ours()
    expected = sample(model, PROMPTS, keys=KEYS, max_new_tokens=5, end=END)
    model.set_attn_implementation("flex_attention")
    assert sample(model, PROMPTS, keys=KEYS, max_new_tokens=5, end=END) == expected
    assert model.config._attn_implementation == "flex_attention"


def test_processes_take_equally_many_passes():
    model, told, passes = llama(), [], []
    model.register_forward_pre_hook(lambda *_: passes.append(len(told)))

    def together(done):
        told.append(done)
        return done and len(told) > 20  # another process needs 20 passes

    found = sample(model, PROMPTS[:2], keys=KEYS[:2], max_new_tokens=4, end=set(), together=together)
    assert [len(rollout.ids) for rollout in found] == [4, 4]
    assert told == [False] * 4 + [True] * 17
    assert passes == list(range(1, 21))


# ---------------------------------------------------------------------------- of a run


def run_of(model, tokenizer, tmp_path, seed=0):
    return SimpleNamespace(model=model, tokenizer=tokenizer, out=tmp_path, config=SimpleNamespace(seed=seed))


def ids_of(found):
    return [[rollout.ids for rollout in rollouts] for rollouts in found]


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def run(llama_folder, tmp_path):
    return run_of(load_any(llama_folder), load_tokenizer(llama_folder), tmp_path)


def test_a_turn_ends_as_the_chat_format_ends_it(tokenizer_step, llama_folder):
    none = SimpleNamespace(config=SimpleNamespace())
    assert end_tokens(load_tokenizer(tokenizer_step), none) == [2]
    tokenizer = load_tokenizer(llama_folder)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    more = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[0, turn]))
    assert end_tokens(tokenizer, none) == [turn]
    assert end_tokens(tokenizer, more) == [turn, 0]
    tokenizer.eos_token = "<|endoftext|>"  # a chat format need not end turns as documents end
    assert end_tokens(tokenizer, none)[0] == turn and len(end_tokens(tokenizer, none)) == 2
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        end_tokens(tokenizer, none)


def test_a_sampler_draws_by_step_number_and_copy(run):
    sampler = Sampler(run, SamplingConfig(max_new_tokens=8))
    questions = [ask("fever"), ask("what is a cough?")]
    found = sampler(questions, step=3, numbers=[0, 5], copies=3)
    assert [len(rollouts) for rollouts in found] == [3, 3]
    assert len({tuple(rollout.ids) for rollouts in found for rollout in rollouts}) == 6
    alone = sampler(questions[1:], step=3, numbers=[5], copies=3)
    assert ids_of(alone) == ids_of(found)[1:]
    assert sampler(questions, step=3, numbers=[0, 5], copies=3) == found
    assert ids_of(sampler(questions, step=4, numbers=[0, 5], copies=3)) != ids_of(found)
    other = Sampler(run_of(run.model, run.tokenizer, run.out, seed=1), sampler.config)
    assert ids_of(other(questions, step=3, numbers=[0, 5], copies=3)) != ids_of(found)
    prompt = encode_chat(run.tokenizer, questions[1])[0]
    expected = sample(
        run.model,
        [prompt],
        keys=[(0, 3, 5, 2)],
        max_new_tokens=8,
        end=set(end_tokens(run.tokenizer, run.model)),
    )
    assert found[1][2].ids == expected[0].ids
    greedy = sampler(questions, step=0, numbers=[0, 1], greedy=True)
    assert greedy == sampler(questions, step=9, numbers=[4, 7], greedy=True)
    assert sampler([], step=0, numbers=[]) == []


def test_a_marker_ends_a_chain_and_stays_in_it(run):
    sampler = Sampler(run, SamplingConfig(max_new_tokens=60))
    free = sampler([ask("fever")], step=0, numbers=[0])[0][0]
    text = sampler.text(Rollout(ids=free.ids[:20]))
    marker = re.findall(r"[ -~]{3,}", text)[-1][-3:]  # of what a random model says
    cut = sampler([ask("fever")], step=0, numbers=[0], stop=marker)[0][0]
    assert cut.ended and cut.ids == free.ids[: len(cut.ids)] and len(cut.ids) <= 20
    assert marker in sampler.text(cut) and marker not in sampler.text(Rollout(ids=cut.ids[:-1]))


def test_the_end_of_long_texts_is_looked_at_only(run):
    ids = run.tokenizer.encode("fever " * 50 + "心肺\nAnswer: b", add_special_tokens=False)
    stop = ends_with(run.tokenizer, "\nAnswer:")
    places = [n for n in range(1, len(ids) + 1) if stop(ids[:n])]
    assert run.tokenizer.decode(ids[: places[0]]).endswith("\nAnswer:")
    assert "\nAnswer" in run.tokenizer.decode(ids[: places[0] - 1])


def test_an_adapter_is_sampled_with(run):
    base = Sampler(run, SamplingConfig(max_new_tokens=8))([ask("fever")], step=0, numbers=[0])
    model = add_adapter(run.model, LoraConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = run_of(model, run.tokenizer, run.out)
    found = Sampler(adapted, SamplingConfig(max_new_tokens=8))([ask("fever")], step=0, numbers=[0])
    assert ids_of(found) != ids_of(base)
    with model.disable_adapter():
        bare = Sampler(adapted, SamplingConfig(max_new_tokens=8))([ask("fever")], step=0, numbers=[0])
    assert ids_of(bare) == ids_of(base)


def test_a_prompt_that_leaves_no_room_is_refused(run):
    sampler = Sampler(run, SamplingConfig(max_new_tokens=250))
    with pytest.raises(UserError, match="made for, 256"):
        sampler([ask("fever and cough")], step=0, numbers=[0])


def test_health_and_staleness_are_counted():
    rollouts = [Rollout(ids=[5, 6, 2], ended=True, log_probs=[-1.0, -2.0, float("nan")]), Rollout(ids=[7])]
    assert health(rollouts) == {"length": (4.0, 2), "ended": (1.0, 2)}
    assert stale(rollouts[0], [-1.5, -1.0, -9.0]) == (1.5, 2)
    assert stale(rollouts[1], [-3.0]) == (0.0, 0)
    json.dumps(health(rollouts))


@pytest.mark.slow
def test_processes_that_share_weights_sample_their_own(tmp_path):
    from rank_helpers import Ranks

    server = Ranks("rollouts_worker", folder="align")
    try:
        for count in (1, 2):
            codes, errors = server.run(count, "rollouts_worker:sampled", str(tmp_path))
            assert codes == [0] * count, errors
    finally:
        server.close()
    alone, *parts = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert [len(part) for part in parts] == [4, 2]
    assert [row["ids"] for part in parts for row in part] == [row["ids"] for row in alone]


@pytest.mark.slow
def test_a_process_of_its_own_casts_its_weights_once(tmp_path):
    from rank_helpers import Ranks

    server = Ranks("rollouts_worker", folder="align")
    try:
        codes, errors = server.run(1, "rollouts_worker:mixed", str(tmp_path))
        assert codes == [0], errors
    finally:
        server.close()
    before, after = json.loads((tmp_path / "mixed.json").read_text())
    for found in (before, after):
        assert found["casts"] == 4  # three layers and the rest
        assert found["rollouts"] == found["expected"]
    assert before["rollouts"] != after["rollouts"]  # the step was seen
