"""What cannot be right is refused in one line that says what was given and what is allowed."""

import json
import re
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import VOCABULARY, WIDTH, WINDOW, build, close, shapes, small, tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from galenic.model import load
from galenic.runtime import UserError

LIMIT = 20


@pytest.fixture(scope="module")
def model():
    return build(max_position_embeddings=LIMIT)


def refuses(words: str):
    return pytest.raises(ValueError, match=words)


# ---------------------------------------------------------------------------- tokens


@settings(deadline=None, max_examples=30)
@given(shapes(), st.integers(), st.integers(0, 2), st.integers(0, 5))
def test_token_ids_outside_the_vocabulary(shape, bad, row, column):
    model = build(**shape)
    bad = max(-(2**63), min(2**63 - 1, bad))
    rows = tokens(3, 6, vocabulary=model.config.vocab_size)
    rows[row, column] = bad
    if 0 <= bad < model.config.vocab_size:
        assert model(rows).logits.shape == (3, 6, model.config.vocab_size)
    else:
        last = model.config.vocab_size - 1
        with refuses(rf"^token id {bad} is outside the vocabulary \(0 to {last}\)$"):
            model(rows)


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_generation_refuses_token_ids_outside_the_vocabulary(model, bad):
    with refuses(f"token id {bad} is outside"):
        model.generate(torch.tensor([[5, bad, 6]]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_an_empty_prompt(model, shape):
    empty = torch.zeros(shape, dtype=torch.long)
    with refuses(rf"nothing to read: the input has shape \({shape[0]}, {shape[1]}\)"):
        model(empty)
    with refuses("nothing to read"):
        model(inputs_embeds=torch.zeros(*shape, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 4), (1, 0)])
def test_generation_from_an_empty_prompt(model, shape):
    empty = torch.zeros(shape, dtype=torch.long)
    with refuses(r"nothing to read|`input_ids` .*(empty|have a length of 0)|input_ids.*shape"):
        model.generate(empty, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([5, 6, 7]), r"input_ids .*\[batch, tokens\].*\(3,\)"),
        (torch.full((1, 2, 3), 5), r"input_ids .*\[batch, tokens\].*\(1, 2, 3\)"),
        (torch.tensor([[5.0, 6.0]]), r"input_ids .*(whole|int).*float32"),
        (torch.tensor([[True, False]]), r"input_ids .*(whole|int).*bool"),
    ],
)
def test_input_ids_that_are_no_token_ids(model, ids, words):
    with refuses(words):
        model(ids)


def test_token_ids_of_32_bits_are_read(model):
    rows = tokens(2, 6)
    assert torch.equal(model(rows.int()).logits, model(rows).logits)


def test_ids_and_embeddings_exclude_each_other(model):
    rows = tokens(1, 4)
    embedded = model.model.embed_tokens(rows)
    close(model(inputs_embeds=embedded).logits, model(rows).logits)
    for arguments in ({"input_ids": rows, "inputs_embeds": embedded}, {}):
        with refuses("exactly one of input_ids and inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("shape", [(1, 4, WIDTH + 1), (4, WIDTH)])
def test_embeddings_of_another_width(model, shape):
    with refuses(rf"inputs_embeds .*{WIDTH}"):
        model(inputs_embeds=torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("skip_logits", [False, True])
def test_labels_that_do_not_fit(model, skip_logits):
    rows = tokens(2, 6)
    for labels, words in (
        (rows[:, :5], r"labels is \(2, 5\) for tokens of shape \(2, 6\)"),
        (rows[:1], r"labels is \(1, 6\)"),
        (rows.index_fill(1, torch.tensor([3]), VOCABULARY), f"label {VOCABULARY} is outside the vocabulary"),
        (rows.index_fill(1, torch.tensor([3]), -1), r"label -1 is outside .*-100"),
    ):
        with refuses(words):
            model(rows, labels=labels, skip_logits=skip_logits)
    with refuses("skip_logits .*labels"):
        model(rows, skip_logits=True)


# ---------------------------------------------------------------------------- positions


@pytest.mark.parametrize("position", [LIMIT, 10**12, -1])
def test_positions_outside_the_model(model, position):
    positions = torch.tensor([[0, 1, position]])
    with refuses(rf"position {position} is outside 0 to {LIMIT - 1} \(max_position_embeddings={LIMIT}\)"):
        model(tokens(1, 3), position_ids=positions)


def test_a_text_longer_than_the_model_was_made_for(model):
    row = tokens(1, LIMIT + 1)
    assert model(row[:, :LIMIT]).logits.shape[1] == LIMIT
    with refuses(rf"position {LIMIT} is outside .*max_position_embeddings={LIMIT}"):
        model(row)
    cache = model(row[:, :LIMIT], use_cache=True).past_key_values
    with refuses(f"position {LIMIT} is outside"):
        model(row[:, LIMIT:], past_key_values=cache)
    assert cache.get_seq_length() == LIMIT  # what was refused left nothing behind
    mask = torch.ones_like(row)
    mask[0, 0] = 0  # padding takes no position
    assert model(row, attention_mask=mask).logits.shape[1] == LIMIT + 1
    halves = torch.arange(LIMIT + 1) % 11  # nor do packed documents share one
    assert model(row, position_ids=halves[None]).logits.shape[1] == LIMIT + 1


def test_generation_stops_at_the_longest_text(model):
    row = tokens(1, LIMIT - 3)
    text = model.generate(row, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert text.shape[1] == LIMIT + 1  # the last token is written, never read
    with refuses(f"position {LIMIT} is outside"):
        model.generate(row, max_new_tokens=5, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("shape", [(3,), (1, 4), (3, 3), (1, 1, 3)])
def test_positions_for_other_tokens(model, shape):
    with refuses(f"position_ids is {re.escape(str(shape))} for 2 rows of 3 tokens"):
        model(tokens(2, 3), position_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, "cu_seq_lens_q needs a batch of one row"),
        ({"seqlens": torch.tensor([[3, 6]])}, r"seqlens must be \[batch, S\]; got shape \(1, 2\)"),
        ({"seqlens": torch.tensor([3, 6])}, r"seqlens must be \[batch, S\]; got shape \(2,\)"),
        ({"seqlens": torch.tensor([[6], [6]]), "cu_seq_lens_q": torch.tensor([0, 6])}, "not both"),
        ({"seqlens": torch.tensor([[3, 7], [6, 0]])}, "seqlens .*7.*6"),
        ({"seqlens": torch.tensor([[-3, 6], [6, 0]])}, "seqlens .*-3"),
    ],
)
def test_document_lengths_of_another_batch(model, names, words):
    with refuses(words):
        model(tokens(2, 6), **names)


# ---------------------------------------------------------------------------- masks


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 4),
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
)
def test_a_mask_for_another_batch(rows, length, past, shape):
    model = build(num_hidden_layers=1)
    cache = DynamicCache(config=model.config)
    if past:
        model(tokens(rows, past), past_key_values=cache)
    mask = torch.ones(shape, dtype=torch.long)
    if tuple(shape) == (rows, past + length):
        assert model(tokens(rows, length), attention_mask=mask, past_key_values=cache).logits.isfinite().all()
        return
    words = (
        "attention_mask must be 2-D"
        if len(shape) != 2
        else rf"attention_mask is .* for {rows} rows of {length}"
    )
    with refuses(words):
        model(tokens(rows, length), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == past


def test_a_mask_of_lists_or_of_scores(model):
    with refuses("attention_mask must be 2-D"):
        model(tokens(1, 3), attention_mask=[[1, 1, 1]])
    with refuses("attention_mask must be 2-D"):
        model(tokens(1, 3), attention_mask={"full_attention": torch.ones(1, 3)})


def test_a_row_of_padding_harms_nobody(model):
    rows, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1] = 0
    out = model(rows, attention_mask=mask, labels=rows)
    assert bool(out.logits.isfinite().all()) and bool(out.loss.isfinite())
    close(out.logits[[0, 2]], model(rows[[0, 2]]).logits)
    close(out.loss, model(rows[[0, 2]], labels=rows[[0, 2]]).loss)


# ---------------------------------------------------------------------------- caches


def test_a_cache_made_for_another_network(model):
    row = tokens(1, 4)
    words = r"past_key_values .*DynamicCache\(config=model\.config\)"
    for cache in (
        DynamicCache(),  # no room for the convolution
        DynamicCache(config=small(conv_window=1)),
        DynamicCache(config=small(num_hidden_layers=2)),
        DynamicCache(config=small(num_hidden_layers=4)),
        DynamicCache(config=small(sliding_window_layers=[0])),
        DynamicCache(config=small(sliding_window=WINDOW + 3)),
    ):
        with refuses(words):
            model(row, past_key_values=cache)
    with refuses(words):
        build(conv_window=1)(row, past_key_values=DynamicCache(config=small()))


def test_a_cache_of_another_batch(model):
    cache = model(tokens(2, 4), use_cache=True).past_key_values
    with pytest.raises((ValueError, RuntimeError), match=r"past_key_values .*2 rows.*3|[Ss]izes? of tensors"):
        model(tokens(3, 1), past_key_values=cache)


def test_a_cache_of_tuples(model):
    legacy = tuple((torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8)) for _ in range(3))
    with pytest.raises((ValueError, TypeError), match=r"past_key_values .*DynamicCache"):
        model(tokens(1, 4), past_key_values=legacy)


def test_a_preallocated_cache_that_is_full(model):
    cache = StaticCache(config=model.config, max_cache_len=6)
    model(tokens(1, 6), past_key_values=cache)
    with pytest.raises(
        (ValueError, IndexError, RuntimeError), match=r"past_key_values .*6|out of (range|bounds)"
    ):
        model(tokens(1, 1), past_key_values=cache)


# ---------------------------------------------------------------------------- configuration


POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_swa_attention_heads", "num_swa_key_value_heads", "sliding_window"),
    *("conv_window", "max_position_embeddings"),
)
NO_SIZES = st.one_of(
    st.integers(max_value=0),
    st.floats(),
    st.booleans(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.none(),
)
NO_RATES = st.one_of(
    st.floats(max_value=0),
    st.integers(max_value=0),
    st.sampled_from((float("nan"), float("inf"), "1e6", None, [1.0], True)),
)


def refuses_field(name: str, value) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b") as caught:
        small(**{name: value})
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)[: len(name) + 40]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(POSITIVE), NO_SIZES)
def test_sizes_are_positive_whole_numbers(name, value):
    refuses_field(name, value)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(("rope_theta", "rms_norm_eps")), NO_RATES)
def test_rates_are_positive_numbers(name, value):
    refuses_field(name, value)


@pytest.mark.parametrize("value", [-0.1, float("nan"), "0.02", None])
def test_the_spread_of_fresh_weights_is_a_number(value):
    refuses_field("initializer_range", value)


@pytest.mark.parametrize("name", ["norm_head", "tie_word_embeddings"])
@pytest.mark.parametrize("value", ["no", 2])
def test_switches_are_on_or_off(name, value):
    refuses_field(name, value)


@pytest.mark.parametrize("value", [[3], [-1], [0, 0], [0.5], ["1"], "12", 1, [True]])
def test_sliding_layers_are_layers(value):
    refuses_field("sliding_window_layers", value)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(("num", "num_swa")), st.integers(1, 60), st.integers(1, 60))
def test_heads_divide_the_width_and_each_other(prefix, heads, kv_heads):
    changes = {f"{prefix}_attention_heads": heads, f"{prefix}_key_value_heads": kv_heads}
    if WIDTH % (2 * heads) == 0 and heads % kv_heads == 0:
        assert build(**changes)(tokens(1, 4)).logits.isfinite().all()
        return
    name = "attention" if WIDTH % (2 * heads) else "key_value"
    with refuses(rf"^{prefix}_{name}_heads={changes[f'{prefix}_{name}_heads']} must divide"):
        small(**changes)


@pytest.mark.parametrize("value", ["gelu", "", None, "SiLU"])
def test_the_activation_is_silu(value):
    refuses_field("hidden_act", value)


# ---------------------------------------------------------------------------- folders


def tokenizer_json(path, vocabulary: dict[str, int], added: dict[str, int] | None = None) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token, i in (added or {}).items()
    ]
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    build(dtype=torch.float32).save_pretrained(folder)
    tokenizer_json(folder / "tokenizer.json", {"a": 0, "b": VOCABULARY - 1})
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    build(dtype=torch.float32).save_pretrained(folder, max_shard_size="5KB")
    return folder


@pytest.fixture
def broken(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "broken")


def refused(folder, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_the_unbroken_folder_is_read(whole, sharded):
    assert torch.equal(load(whole)(tokens(1, 5)).logits, load(sharded)(tokens(1, 5)).logits)


@pytest.mark.parametrize(
    ("vocabulary", "added", "token", "number"),
    [
        ({"a": 0, "zz": VOCABULARY}, {}, "zz", VOCABULARY),
        ({"a": 0}, {"<new>": VOCABULARY + 7}, "<new>", VOCABULARY + 7),
        ({"a": 0, "zz": 900}, {"<pad>": 3}, "zz", 900),
    ],
)
def test_a_tokenizer_with_tokens_the_model_lacks(broken, vocabulary, added, token, number):
    tokenizer_json(broken / "tokenizer.json", vocabulary, added)
    refused(broken, rf"tokenizer\.json: token '{token}' has id {number}, .*vocab_size={VOCABULARY}")


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens_is_fine(broken):
    tokenizer_json(broken / "tokenizer.json", {"a": 0, "b": 7})
    assert load(broken).config.vocab_size == VOCABULARY


@pytest.mark.parametrize("text", ["{", "[]", '"words"', '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_a_tokenizer_file_without_a_vocabulary(broken, text):
    (broken / "tokenizer.json").write_text(text)
    refused(broken, r"tokenizer\.json: (not valid JSON|not a usable tokenizer)")


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_weight_file_cut_anywhere(whole, tmp_path_factory, data):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("cut") / "model")
    file = folder / "model.safetensors"
    size = data.draw(st.integers(0, file.stat().st_size - 1))
    with open(file, "r+b") as stream:
        stream.truncate(size)
    refused(folder, r"model\.safetensors: damaged or cut off")


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_one_cut_shard_among_many(sharded, tmp_path_factory, data):
    folder = shutil.copytree(sharded, tmp_path_factory.mktemp("cut") / "model")
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    with open(file, "r+b") as stream:
        stream.truncate(data.draw(st.integers(0, file.stat().st_size - 1)))
    refused(folder, rf"{file.name}: damaged or cut off")


def test_a_header_that_lies(broken):
    file = broken / "model.safetensors"
    content = bytearray(file.read_bytes())
    for length in (2**63 - 1, 2**40, 0):
        content[:8] = struct.pack("<Q", length)
        file.write_bytes(content)
        refused(broken, r"model\.safetensors: damaged or cut off")


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_missing_extra_or_misshaped_tensor_is_named(whole, tmp_path_factory, data):
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("changed") / "model")
    tensors = load_file(folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    change = data.draw(st.sampled_from(("missing", "extra", "longer", "flat")))
    if change == "missing":
        del tensors[name]
        words = rf"lack tensor {name};"
    elif change == "extra":
        tensors[name + "x"] = torch.zeros(1)
        words = rf"tensor {name}x does not belong .*{name}"
    else:
        tensor = tensors[name]
        tensors[name] = torch.cat((tensor, tensor[:1])) if change == "longer" else tensor[None].clone()
        shape = re.escape(str(tuple(tensors[name].shape)))
        words = rf"tensor {name} has shape {shape}, config\.json asks for"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, words)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_numbers_of_weights(broken, dtype):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(broken, r"tensor model\.norm\.weight .*(int64|uint8|bool|complex64|I64|U8|BOOL|C64)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_a_value(broken, value):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert (
        not load(broken)(tokens(1, 3)).logits.isfinite().all()
    )  # read as written; training guards look for it


def test_the_same_tensor_in_two_shards(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "twice")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(first) | load_file(second)
    save_file(tensors, second, metadata={"format": "pt"})
    refused(folder, rf"tensor \S+ .*({first.name}|{second.name}).*({first.name}|{second.name})")


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", ""])
def test_an_index_that_points_elsewhere(sharded, tmp_path, place):
    folder = shutil.copytree(sharded, tmp_path / "index")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["lm_head.weight"] = place
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="names this file, but it is not in the folder"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conv_window": 0}, "conv_window must be a positive whole number"),
        ({"sliding_window": "8k"}, "sliding_window must be a positive whole number"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 must divide num_attention_heads=3"),
    ],
)
def test_a_config_file_with_a_mistake(broken, changes, words):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | changes))
    refused(broken, rf"config\.json: .*{words}")


def test_a_foreign_folder_needs_permission_to_run_its_code(broken):
    config = json.loads((broken / "config.json").read_text())
    name = "modeling_baichuan_m1.BaichuanM1ForCausalLM"
    config |= {"model_type": "baichuan_m9", "auto_map": {"AutoModelForCausalLM": name, "AutoConfig": name}}
    (broken / "config.json").write_text(json.dumps(config))
    refused(broken, "model_type is 'baichuan_m9'")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(broken, trust_remote_code=False, local_files_only=True)
