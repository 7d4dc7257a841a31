import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from galenic.merge import merge
from galenic.merge.config import MergeConfig, MergeModel, MethodParameters
from galenic.merge.engine import measure, merge_blocks, output_tensors
from galenic.merge.io import Checkpoint, StateDict, TensorInfo, check_same_tensors
from galenic.merge.vocabulary import (
    RowMapped,
    align,
    difference,
    read_tokens,
    vocabulary_tensors,
    write_union_tokenizer,
)
from galenic.runtime import UserError

METHODS = ["metagpt", "linear", "task_arithmetic", "ties", "dare_linear"]
EMBED, HEAD, BIAS, NORM = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.norm.weight"
WIDTH = 3


def random_state(rows, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBED: (rows, WIDTH), HEAD: (rows, WIDTH), BIAS: (rows,), NORM: (WIDTH,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def take_rows(state, rows):
    return {name: tensor if name == NORM else tensor[rows] for name, tensor in state.items()}


def dense(view):
    return {
        name: view.read(name, 0, info.numel).view(info.shape).clone() for name, info in view.tensors.items()
    }


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def align_states(source, base, base_tokens, experts, expert_tokens):
    return align(
        source,
        StateDict(base, "base"),
        base_tokens,
        [StateDict(state, f"expert{t}") for t, state in enumerate(experts)],
        expert_tokens,
        {},
        [{}] * len(experts),
    )


def merge_aligned(aligned, method="metagpt", dtype="float32"):
    config = MergeConfig(
        out="",
        merge_method=method,
        base_model="base",
        models=[MergeModel(model=f"x/{t}", name=str(t)) for t in range(len(aligned.experts))],
        parameters=MethodParameters(),
        dtype=dtype,
    )
    check_same_tensors(aligned.base, aligned.experts)
    statistics = measure(config, aligned.base, aligned.experts)
    layout = output_tensors(config, aligned.base)
    merged = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in layout.items()}

    def write(name, start, block):
        merged[name].view(-1)[start : start + block.numel()] = block

    merge_blocks(config, aligned.base, aligned.experts, statistics, layout, write)
    return merged, statistics.summary


# ---------------------------------------------------------------------------- rows


class Counting(StateDict):
    def __init__(self, state, label):
        super().__init__(state, label)
        self.reads = []

    def read(self, name, start, stop):
        self.reads.append((name, start, stop))
        return super().read(name, start, stop)


@st.composite
def mappings(draw):
    height, count = draw(st.integers(1, 7)), draw(st.integers(0, 9))
    rows = draw(st.lists(st.integers(-1, height - 1), min_size=count, max_size=count))
    width = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    dtypes = draw(st.tuples(*[st.sampled_from([torch.bfloat16, torch.float32, torch.float64])] * 2))
    return height, torch.tensor(rows, dtype=torch.int64), width, dtypes


@settings(deadline=None, max_examples=200)
@given(mappings(), st.data())
def test_reading_equals_dense_indexing(mapping, data):
    height, rows, width, (dtype, other_dtype) = mapping
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(height, *width, generator=generator).to(dtype)
    other = torch.randn(len(rows), *width, generator=generator).to(other_dtype)
    rest = torch.arange(5.0)
    model = StateDict({"v": tensor, "rest": rest}, "model")
    view = RowMapped(model, ["v"], rows, StateDict({"v": other}, "other"))
    wide = torch.promote_types(dtype, other_dtype) if (rows < 0).any() else dtype
    expected = torch.stack(
        [tensor[row].to(wide) if row >= 0 else other[i].to(wide) for i, row in enumerate(rows.tolist())]
        or [torch.empty(width, dtype=wide)]
    )[: len(rows)]
    assert view.label == "model"
    assert view.tensors["v"] == TensorInfo(dtype=wide, shape=tuple(expected.shape))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, expected.numel())] * 2)))
    found = view.read("v", start, stop)
    assert found.dtype == wide and torch.equal(found, expected.reshape(-1)[start:stop])
    assert view.tensors["rest"] == model.tensors["rest"]
    assert torch.equal(view.read("rest", 1, 4), rest[1:4])


def test_an_unchanged_vocabulary_is_read_in_one_piece_and_not_copied():
    model = Counting({"v": torch.randn(50, 4)}, "model")
    view = RowMapped(model, ["v"], torch.arange(50), model)
    block = view.read("v", 3, 187)
    assert model.reads == [("v", 3, 187)]
    assert block.data_ptr() == model.state["v"].data_ptr() + 3 * 4


def test_a_range_costs_one_read_for_each_run_it_touches():
    model = Counting({"v": torch.randn(10, 4)}, "model")
    other = Counting({"v": torch.randn(9, 4)}, "other")
    view = RowMapped(model, ["v"], torch.tensor([5, 6, 7, 0, 1, -1, -1, 0, 9]), other)
    view.read("v", 6, 34)
    assert model.reads == [("v", 26, 32), ("v", 0, 8), ("v", 0, 4), ("v", 36, 38)]
    assert other.reads == [("v", 20, 28)]


def test_rows_are_the_same_from_many_threads(tmp_path):
    state = {"v": torch.randn(300, 8)}
    save_file(state, tmp_path / "model.safetensors")
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    with Checkpoint(tmp_path, "x") as model, ThreadPoolExecutor(4) as pool:
        view = RowMapped(model, ["v"], rows, model)
        ranges = [(start, min(start + 37, 2400)) for start in range(0, 2400, 37)]
        parts = list(pool.map(lambda r: view.read("v", *r), ranges))
    assert torch.equal(torch.cat(parts), state["v"][rows].flatten())


def test_row_maps_that_point_nowhere_are_refused():
    model = StateDict({"v": torch.zeros(4, 2), "w": torch.zeros(3, 2)}, "model")
    other = StateDict({"v": torch.zeros(4, 3)}, "other")
    for names, rows, message in [
        (["v"], [0, 4], r"model: the row map points at rows 0 to 4.* rows 0 to 3"),
        (["v"], [-2], "points at rows -2"),
        (["v"], [0, -1], r"other: 'v' is of shape \[4, 3\].*\[2, 2\] is needed"),
        (["w"], [-1], "other: 'w' is missing"),
        (["u"], [0], "model: lacks 'u'"),
        ([], [0], "model: lacks tensors of a vocabulary"),
        (["v", "w"], [0], "differ in their number of rows"),
    ]:
        with pytest.raises(UserError, match=message):
            RowMapped(model, names, torch.tensor(rows), other)


# ---------------------------------------------------------------------------- which tensors


def headers(shapes, dtype=torch.bfloat16):
    return SimpleNamespace(
        label="m", tensors={name: TensorInfo(dtype=dtype, shape=shape) for name, shape in shapes.items()}
    )


@pytest.mark.parametrize(
    "shapes, config, expected",
    [
        ({"model.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)}, {"vocab_size": 9}, "01"),
        ({"transformer.wte.weight": (9, 4), "transformer.wpe.weight": (9, 4)}, {}, "0"),
        ({"model.tok_embeddings.weight": (9, 4), "output.weight": (9, 4)}, {}, "01"),
        ({"gpt_neox.embed_in.weight": (9, 4), "embed_out.weight": (9, 4)}, {}, "01"),
        (
            {"shared.weight": (9, 4), "decoder.embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)},
            {},
            "012",
        ),
        ({"backbone.embeddings.weight": (9, 4), "head.weight": (9, 4)}, {}, "01"),
        (
            {
                "bert.embeddings.word_embeddings.weight": (9, 4),
                "bert.embeddings.position_embeddings.weight": (9, 4),
                "cls.predictions.bias": (9,),
                "cls.predictions.decoder.weight": (9, 4),
                "cls.predictions.decoder.bias": (9,),
                "cls.predictions.transform.dense.weight": (4, 4),
            },
            {},
            "0234",
        ),
        # a text model inside another: its config says which of two embeddings
        (
            {"vision.embedding.weight": (50, 4), "language_model.model.embed_tokens.weight": (9, 4)},
            {"text_config": {"vocab_size": 9}},
            "1",
        ),
        # a prediction layer with its own embedding and head
        (
            {
                "model.embed_tokens.weight": (9, 4),
                "model.layers.61.embed_tokens.weight": (9, 4),
                "model.layers.61.shared_head.head.weight": (9, 4),
                "model.layers.61.head.weight": (9, 4),
            },
            {},
            "012",
        ),
        # config and embedding disagree: the weights are what is merged
        ({"model.embed_tokens.weight": (9, 4), "score.weight": (8, 4)}, {"vocab_size": 8}, "0"),
        ({"model.embed_tokens.weight": (9, 4), "lm_head.weight": (8, 4)}, {"vocab_size": None}, "0"),
        ({"model.embed_tokens.weight": (9, 4), "model.embed_tokens.scale": (9, 4)}, {"text_config": 3}, "0"),
    ],
)
def test_vocabulary_tensors_are_found_by_name_and_height(shapes, config, expected):
    found = vocabulary_tensors(headers(shapes), config)
    assert found == [list(shapes)[int(i)] for i in expected]


def test_a_hidden_size_that_equals_the_vocabulary_is_not_touched():
    shapes = {
        "model.embed_tokens.weight": (4, 4),
        "model.layers.0.attention.output.weight": (4, 4),
        "model.layers.0.attention.output.bias": (4,),
        "model.layers.0.mlp.shared.weight": (4, 4),
        "model.layers.0.mlp.down_proj.weight": (4, 8),
        "encoder.block.1.decoder.weight": (4, 4),
        "lm_head.dense.weight": (4, 4),
        "model.norm.weight": (4,),
        "score.weight": (4, 4),
        "lm_head.weight": (4, 4),
    }
    found = vocabulary_tensors(headers(shapes), {"vocab_size": 4, "hidden_size": 4})
    assert found == ["model.embed_tokens.weight", "lm_head.weight"]


def test_integer_tensors_are_not_rearranged():
    state = {EMBED: torch.zeros(3, 2), "output.weight": torch.zeros(3, 2, dtype=torch.int8)}
    assert vocabulary_tensors(StateDict(state, "m"), {}) == [EMBED]


def test_models_without_a_clear_embedding_are_refused():
    with pytest.raises(UserError, match="m: no embedding among its tensors"):
        vocabulary_tensors(headers({"w": (4, 4), "lm_head.weight": (4, 4)}), {"vocab_size": 4})
    two = headers({"encoder.embed_tokens.weight": (5, 4), "decoder.embed_tokens.weight": (6, 4)})
    with pytest.raises(UserError, match=r"embeddings of \[5, 6\] rows"):
        vocabulary_tensors(two, {})
    with pytest.raises(UserError, match="no embedding"):
        vocabulary_tensors(headers({"model.embed_tokens.bias": (4,), "weight": (4, 4)}), {})


# ---------------------------------------------------------------------------- vocabularies


def write_tokenizer(folder, tokenizer):
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_tokenizer(kind, words):
    if kind == "BPE":
        return Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token=words[0]))
    if kind == "WordPiece":
        return Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token=words[0]))
    if kind == "WordLevel":
        return Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate(words)}, unk_token=words[0]))
    return Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=0))


KINDS = ["BPE", "WordPiece", "WordLevel", "Unigram"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_read_as_the_library_reads_them(tmp_path, kind):
    tokenizer = make_tokenizer(kind, ["?", "a", "b", "医"])
    tokenizer.add_tokens(["new", AddedToken("a", special=True)])
    tokenizer.add_special_tokens(["<|end|>\n"])
    folder = write_tokenizer(tmp_path / "x", tokenizer)
    assert read_tokens(folder) == tokenizer.get_vocab(with_added_tokens=True)
    assert read_tokens(str(folder))["<|end|>\n"] == 5
    assert read_tokens(tmp_path) == {}


def test_an_added_token_of_the_vocabulary_has_the_vocabularys_row(tmp_path):
    values = json.loads(make_tokenizer("BPE", ["?", "a"]).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["added_tokens"] = [{"id": 7, "content": "a"} | flags]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert read_tokens(tmp_path) == Tokenizer.from_str(json.dumps(values)).get_vocab() == {"?": 0, "a": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[]", "not a tokenizer"),
        ("{}", "not a tokenizer"),
        ('{"model": 1}', "not a tokenizer"),
        ('{"model": {"vocab": null}}', "not a tokenizer"),
        ('{"model": {"vocab": [["a"]]}}', "not a tokenizer"),
        ('{"model": {"vocab": [[["a"], 0]]}}', "not a tokenizer"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": 0}]}', "not a tokenizer"),
        ('{"model": {"vocab": {}}, "added_tokens": 3}', "not a tokenizer"),
        ('{"model": {"vocab": {"a": -1}}}', "token 'a' has row -1"),
        ('{"model": {"vocab": {"a": 1.0}}}', "token 'a' has row 1.0"),
        ('{"model": {"vocab": {"a": true}}}', "token 'a' has row True"),
        ('{"model": {"vocab": [[3, 0.5]]}}', "token 3 has row 0"),
        (f'{{"model": {{"vocab": {{"a": {10**30}}}}}}}', "token 'a' has row 1000"),
    ],
)
def test_malformed_tokenizers_are_refused(tmp_path, text, message):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_tokens(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_differences_are_told_in_words():
    base = {"a": 0, "b": 1, "c": 2, "d": 3, "e\n": 9}
    assert difference(base, dict(base)) == ""
    text = difference(base, {"a": 0, "b": 2, "c": 1, "d": 3, "n": 4, "m": 5, "o": 6, "p": 8})
    assert "2 tokens at another row (rows 1 to 2 of the base: 'b' is row 1 there and row 2 here)" in text
    assert "4 tokens the base lacks (rows 4 to 6, 8: 'n', 'm', 'o' and 1 more)" in text
    assert r"1 token only the base has (row 9: 'e\n')" in text
    assert "`tokenizer: {source: base}`" in text and "{source: union}" in text and "\n" not in text
    many = {str(row): row for row in range(0, 20, 2)}
    assert "(rows 0, 2, 4 and 7 more ranges: '0', '2', '4' and 7 more)" in difference({}, many)
    assert difference(base, {"a": 0}).startswith(
        "its vocabulary is not the base's: 4 tokens only the base has"
    )


# ---------------------------------------------------------------------------- source: base


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(8)), st.integers(8, 10), st.sampled_from([torch.float32, torch.bfloat16]))
def test_permuted_vocabularies_give_equal_models_zero_task_vectors(order, height, dtype):
    base = random_state(height, 0, dtype)
    tokens = {chr(97 + row): row for row in range(8)}
    # row `order[i]` of the expert is row i of the base; the padding stays at the end
    moved = [*order, *range(8, height)]
    expert = take_rows(base, torch.tensor(moved).argsort())
    expert_tokens = {token: order[row] for token, row in tokens.items()}
    aligned = align_states("base", base, tokens, [expert, base], [expert_tokens, tokens])
    assert aligned.rows == height and aligned.new_tokens == []
    merged, summary = merge_aligned(aligned, dtype=None)
    assert summary["norms"] == {"0": 0.0, "1": 0.0}
    assert all(torch.equal(bits(merged[name]), bits(base[name])) for name in base)


def test_missing_tokens_keep_the_bases_rows_and_others_are_dropped():
    base, expert = random_state(5, 0), random_state(4, 1)
    aligned = align_states(
        "base", base, {"a": 0, "b": 1, "c": 2, "d": 4}, [expert], [{"new": 0, "c": 1, "a": 3}]
    )
    found = dense(aligned.experts[0])
    for name in (EMBED, HEAD, BIAS):
        expected = base[name].clone()
        expected[0], expected[2] = expert[name][3], expert[name][1]
        assert torch.equal(found[name], expected)  # row 3: padding of the base, a token's row in the expert
    assert torch.equal(found[NORM], expert[NORM])
    assert aligned.base.read(EMBED, 0, 15).tolist() == base[EMBED].flatten().tolist()
    assert aligned.notes == [
        "expert0: 2 tokens matched with the base's, 2 of them from another row; 2 missing, which keep the "
        "base's rows; 1 that the base lacks, dropped"
    ]


def test_padding_is_matched_by_row_where_it_is_padding_in_both():
    base, expert = random_state(6, 0), random_state(5, 1)
    aligned = align_states("base", base, {"a": 0, "b": 1}, [expert], [{"a": 1, "b": 0, "new": 2}])
    found = dense(aligned.experts[0])[EMBED]
    # row 2: a token in the expert; rows 3 and 4: padding in both; row 5: the expert has none
    expected = [expert[EMBED][1], expert[EMBED][0], base[EMBED][2], *expert[EMBED][3:5], base[EMBED][5]]
    assert torch.equal(found, torch.stack(expected))


def test_rows_of_a_wider_model_are_not_rounded():
    base = random_state(3, 0)
    expert = random_state(2, 1, torch.bfloat16)
    aligned = align_states("base", base, {"a": 0, "b": 1, "c": 2}, [expert], [{"a": 0, "b": 1}])
    view = aligned.experts[0]
    assert view.tensors[EMBED].dtype == torch.float32 and view.tensors[NORM].dtype == torch.bfloat16
    assert torch.equal(dense(view)[EMBED], torch.cat([expert[EMBED].float(), base[EMBED][2:]]))


def test_task_vectors_equal_those_of_models_rearranged_by_hand():
    base, by_hand = random_state(6, 0), random_state(6, 1)
    tokens = {token: row for row, token in enumerate("abcdef")}
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    expert_tokens = {"abcdef"[old]: row for row, old in enumerate(order.tolist())}
    aligned = align_states("base", base, tokens, [take_rows(by_hand, order), base], [expert_tokens, tokens])
    for method in METHODS:
        plain = SimpleNamespace(
            base=StateDict(base, "base"), experts=[StateDict(by_hand, "0"), StateDict(base, "1")]
        )
        (found, told), (expected, told_by_hand) = merge_aligned(aligned, method), merge_aligned(plain, method)
        assert told == told_by_hand and all(torch.equal(found[name], expected[name]) for name in base)


# ---------------------------------------------------------------------------- source: union


def test_a_union_has_the_bases_rows_then_each_experts_new_ones():
    base, one, two = random_state(4, 0), random_state(5, 1), random_state(5, 2)
    aligned = align_states(
        "union",
        base,
        {"a": 0, "b": 1},
        [one, two],
        [{"b": 0, "both": 4, "one": 1}, {"two": 0, "both": 2, "a": 3, "b": 4}],
    )
    # new rows use up the base's two rows of padding before the embedding grows
    assert aligned.new_tokens == ["one", "both", "two"] and aligned.rows == 5
    found, views = dense(aligned.base), [dense(view) for view in aligned.experts]
    for name in (EMBED, HEAD, BIAS):
        mean = (one[name][4].double() + two[name][2].double()) / 2
        double = [base[name][:2].double(), one[name][1:2].double(), mean[None], two[name][:1].double()]
        assert found[name].dtype == torch.float64 and torch.equal(found[name], torch.cat(double))
        assert torch.equal(views[0][name], torch.stack([base[name][0], *one[name][[0, 1, 4]], two[name][0]]))
        assert torch.equal(
            views[1][name], torch.stack([*two[name][[3, 4]], one[name][1], *two[name][[2, 0]]])
        )
    assert aligned.notes[-1] == (
        "3 tokens added to the base's vocabulary (rows 2 to 4); the embedding has 5 rows, the base's 4"
    )
    assert "2 that the base lacks, in the union" in aligned.notes[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_one_expert_alone_has_keeps_its_row_and_counts_in_no_norm(method, dtype):
    base, shared = random_state(4, 0, dtype), {"a": 0, "b": 1, "c": 2, "d": 3}
    experts = [random_state(6, t + 1, dtype) for t in range(3)]
    tokens = [shared | {f"<{t}>": 4, f"[{t}]": 5} for t in range(3)]
    aligned = align_states("union", base, shared, experts, tokens)
    assert aligned.base.tensors[EMBED].dtype == dtype  # no mean is needed
    merged, summary = merge_aligned(aligned, method, dtype=None)
    assert aligned.new_tokens == ["<0>", "[0]", "<1>", "[1]", "<2>", "[2]"]
    for name in (EMBED, HEAD, BIAS):
        own = torch.cat([expert[name][4:] for expert in experts])
        assert merged[name].dtype == dtype and torch.equal(bits(merged[name][4:]), bits(own))
    plain = align_states("base", base, shared, experts, tokens)
    assert summary["norms"] == pytest.approx(merge_aligned(plain, method, dtype=None)[1]["norms"], rel=1e-12)


def test_a_shared_new_token_is_merged_around_its_mean():
    base = random_state(2, 0)
    experts = [random_state(3, t + 1) for t in range(3)]
    tokens = [{"a": 0, "b": 1, "new": 2}] * 2 + [{"a": 0, "b": 1, "other": 2}]
    aligned = align_states("union", base, {"a": 0, "b": 1}, experts, tokens)
    first, second = experts[0][EMBED][2].double(), experts[1][EMBED][2].double()
    merged, summary = merge_aligned(aligned, "task_arithmetic")
    assert torch.equal(merged[EMBED][2], ((first + second) / 2).float())  # task vectors cancel
    gap = sum(
        float((experts[0][n][2] - experts[1][n][2]).double().square().sum()) for n in (EMBED, HEAD, BIAS)
    )
    plain = align_states("base", base, {"a": 0, "b": 1}, experts, tokens)
    norms = merge_aligned(plain, "task_arithmetic")[1]["norms"]
    extra = [summary["norms"][t] ** 2 - norms[t] ** 2 for t in "012"]
    assert extra == pytest.approx(
        [gap / 4, gap / 4, 0.0], rel=1e-5, abs=1e-5
    )  # squares in float64, and in float32


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 7), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_experts_that_agree_on_a_new_token_have_no_task_vector_there(count, value, small):
    dtype = torch.float32 if small else torch.float64
    row = torch.tensor([value]).double().clamp(-1e38, 1e38).to(dtype).expand(1, WIDTH)
    base = {EMBED: torch.zeros(1, WIDTH)}
    experts = [{EMBED: torch.cat([base[EMBED].to(dtype), row])} for _ in range(count)]
    aligned = align_states("union", base, {"a": 0}, experts, [{"a": 0, "n": 1}] * count)
    for view in [aligned.base, *aligned.experts]:
        assert torch.equal(dense(view)[EMBED][1], row[0].double())


@st.composite
def families(draw):
    height = draw(st.integers(3, 6))
    tokens = []
    for _ in range(draw(st.integers(2, 4))):
        own = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=height, unique=True))
        places = draw(st.permutations(range(height)))
        tokens.append(dict(zip(own, places, strict=False)))
    return height, tokens


@settings(deadline=None, max_examples=80)
@given(families(), st.sampled_from(["base", "union"]), st.data())
def test_every_row_is_the_row_of_its_token(family, source, data):
    height, (base_tokens, *expert_tokens) = family
    base, *experts = [{EMBED: torch.randn(height, 2) + 10 * t} for t in range(len(family[1]))]
    aligned = align_states(source, base, base_tokens, experts, expert_tokens)
    rows = base_tokens | {t: 1 + max(base_tokens.values()) + k for k, t in enumerate(aligned.new_tokens)}
    everything = set(base_tokens).union(*expert_tokens)
    assert set(rows) == (everything if source == "union" else set(base_tokens))
    assert aligned.rows == max(height, 1 + max(rows.values()))
    named = {row: token for token, row in rows.items()}
    origin = dense(aligned.base)[EMBED].double()
    for row in range(aligned.rows):
        token = named.get(row)
        owners = [
            e[EMBED][t[token]].double() for e, t in zip(experts, expert_tokens, strict=True) if token in t
        ]
        if token in base_tokens or token is None:
            assert torch.equal(origin[row], base[EMBED][row].double())
        else:
            assert torch.allclose(origin[row], torch.stack(owners).mean(0), rtol=1e-15, atol=0)
            if len(owners) == 1:
                assert torch.equal(origin[row], owners[0])
    for view, expert, tokens in zip(aligned.experts, experts, expert_tokens, strict=True):
        found = dense(view)[EMBED].double()
        for row in range(aligned.rows):
            token = named.get(row)
            if token in tokens:
                expected = expert[EMBED][tokens[token]].double()
            elif token is None and row < height and row not in tokens.values():
                expected = expert[EMBED][row].double()
            else:
                expected = origin[row]
            assert torch.equal(found[row], expected)
    check_same_tensors(aligned.base, aligned.experts)
    numel = aligned.rows * 2  # any block equals the same part of the whole
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, numel)] * 2)))
    for view in [aligned.base, *aligned.experts]:
        assert torch.equal(view.read(EMBED, start, stop), dense(view)[EMBED].view(-1)[start:stop])


def test_equal_vocabularies_need_no_view_of_the_base():
    base, tokens = random_state(4, 0), {"a": 0, "b": 1}
    for source in ("base", "union"):
        aligned = align_states(source, base, tokens, [random_state(4, 1)], [dict(tokens)])
        assert isinstance(aligned.base, StateDict) and aligned.rows == 4
        assert torch.equal(dense(aligned.experts[0])[EMBED], random_state(4, 1)[EMBED])


# ---------------------------------------------------------------------------- refusals


def test_vocabularies_that_cannot_be_matched_are_refused():
    base, tokens = random_state(3, 0), {"a": 0, "b": 1}
    fine = random_state(3, 1)
    for expert, expert_tokens, message in [
        (fine, {}, "expert0: has no tokenizer.json"),
        (fine, {"a": 1, "b": 1}, "expert0: its tokenizer gives row 1 to both 'a' and 'b'"),
        (fine, {"a": 0, "b": 3}, "expert0: token 'b' has row 3, but the embedding has 3 rows"),
        ({EMBED: fine[EMBED]}, tokens, "expert0: 'lm_head.weight' is missing.* in base; tied"),
        (fine | {HEAD: torch.zeros(4, WIDTH)}, tokens, "'lm_head.weight' is not of 3 rows"),
        (fine | {EMBED: torch.zeros(3, 9)}, tokens, r"'model.embed_tokens.weight' has rows of shape \[9\]"),
        ({NORM: fine[NORM]}, tokens, "expert0: no embedding among its tensors"),
    ]:
        for source in ("base", "union"):
            with pytest.raises(UserError, match=message) as error:
                align_states(source, base, tokens, [expert], [expert_tokens])
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"base: has no tokenizer\.json"):
        align_states("base", base, {}, [fine], [tokens])
    with pytest.raises(UserError, match="base: token 'a' has row 5"):
        align_states("base", base, {"a": 5}, [fine], [tokens])


def test_an_untied_head_of_an_expert_is_left_to_the_comparison_of_tensors():
    base, tokens = {EMBED: torch.randn(3, 2)}, {"a": 0, "b": 1}
    expert = {EMBED: torch.randn(3, 2), HEAD: torch.randn(3, 2)}
    aligned = align_states("base", base, tokens, [expert], [tokens])
    with pytest.raises(UserError, match=r"has in addition 'lm_head\.weight'"):
        check_same_tensors(aligned.base, aligned.experts)


def test_tensors_as_high_as_the_vocabulary_but_of_other_names_are_told():
    state = {EMBED: torch.randn(3, 2), "model.layers.0.output.weight": torch.randn(3, 2)}
    aligned = align_states("base", state, {"a": 0, "b": 1}, [state], [{"a": 1, "b": 0}])
    assert "'model.layers.0.output.weight': as many rows as the vocabulary" in aligned.notes[-1]
    assert torch.equal(dense(aligned.experts[0])["model.layers.0.output.weight"], state[list(state)[1]])


# ---------------------------------------------------------------------------- the union's tokenizer

CHARACTERS = ["?", *"abcdefg .<>|"]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(KINDS),
    st.lists(st.text("abcdefg .<>|", min_size=2, max_size=5), max_size=3, unique=True),
    st.lists(st.text("abcdefg .<>|", min_size=2, max_size=5), min_size=1, max_size=4, unique=True),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.text("abcdefg .<>|", max_size=30),
)
def test_union_tokenizers_give_new_tokens_their_rows_and_leave_old_texts_alone(
    tmp_path, kind, old, new, flags, text
):
    base = make_tokenizer(kind, CHARACTERS)
    base.add_tokens([AddedToken(token, normalized=False) for token in old])
    expert = make_tokenizer(kind, CHARACTERS[::-1])
    own = dict(zip(("lstrip", "rstrip", "single_word", "special"), flags, strict=True))
    expert.add_tokens([AddedToken(token, normalized=False, **own) for token in new])
    folders = write_tokenizer(tmp_path / "base", base), write_tokenizer(tmp_path / "expert", expert)
    tokens = [read_tokens(folder) for folder in folders]
    states = [{EMBED: torch.randn(len(t) + 1, 2)} for t in tokens]
    aligned = align_states("union", states[0], tokens[0], states[1:], tokens[1:])
    assert set(aligned.new_tokens) == set(new) - set(old)

    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    size = write_union_tokenizer(folders[0], folders[1:], aligned.new_tokens, out)
    rows = read_tokens(out)
    union = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert size == len(rows) <= aligned.rows and union.get_vocab() == rows
    assert tokens[0].items() <= rows.items()
    for k, token in enumerate(aligned.new_tokens):
        assert union.encode(token).ids == [rows[token]] == [len(tokens[0]) + k]
        entry = union.get_added_tokens_decoder()[rows[token]]
        assert {flag: getattr(entry, flag) for flag in own} == own and not entry.normalized
    if not any(token in text for token in aligned.new_tokens):
        assert union.encode(text).ids == base.encode(text).ids
    # the union as one of the models: nothing moves
    assert difference(rows, union.get_vocab()) == ""


def test_new_tokens_keep_the_flags_of_the_first_expert_that_adds_them(tmp_path):
    base = make_tokenizer("BPE", CHARACTERS)
    plain = make_tokenizer("BPE", [*CHARACTERS, "both", "vocabulary"])
    special = make_tokenizer("BPE", CHARACTERS)
    special.add_special_tokens([AddedToken("both", lstrip=True, normalized=False), AddedToken("end")])
    late = make_tokenizer("BPE", CHARACTERS)
    late.add_tokens([AddedToken("both"), AddedToken("end", rstrip=True, normalized=True)])
    names = ["base", "plain", "special", "late"]
    folders = [
        write_tokenizer(tmp_path / n, t) for n, t in zip(names, [base, plain, special, late], strict=True)
    ]
    config = {"model_max_length": 9, "added_tokens_decoder": {"0": {"content": "?"}}}
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    assert write_union_tokenizer(folders[0], folders[1:], ["both", "vocabulary", "end"], out) == 16
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    entries = [
        {"content": "both"} | flags | {"lstrip": True, "special": True},
        {"content": "vocabulary"} | flags,
        {"content": "end"} | flags | {"special": True},
    ]
    written = json.loads((out / "tokenizer.json").read_text())
    assert written["added_tokens"] == [{"id": 13 + k} | entry for k, entry in enumerate(entries)]
    assert written["model"] == json.loads(base.to_str())["model"]
    assert json.loads((out / "tokenizer_config.json").read_text()) == config | {
        "added_tokens_decoder": {"0": {"content": "?"}} | {str(13 + k): e for k, e in enumerate(entries)}
    }
    union = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert union.decode(union.encode("a both end b").ids, skip_special_tokens=True).split() == ["a", "b"]


def test_byte_level_tokenizers_keep_their_texts_and_decode_new_entries(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def byte_level(extra=()):
        entries = [*alphabet, *extra]
        merges = [tuple(word) for word in extra if len(word) == 2]
        tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(entries)}, merges=merges))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    base, expert = byte_level(), byte_level(["Ġh"])
    expert.add_special_tokens(["<|im_start|>", "医生"])
    folders = write_tokenizer(tmp_path / "base", base), write_tokenizer(tmp_path / "expert", expert)
    new = ["Ġh", "<|im_start|>", "医生"]
    out = tmp_path / "out"
    out.mkdir()
    assert write_union_tokenizer(folders[0], folders[1:], new, out) == 259
    assert not (out / "tokenizer_config.json").exists()  # the base has none
    union = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert union.encode("oh hé\n").ids == base.encode("oh hé\n").ids
    assert union.encode("<|im_start|>医生").ids == [257, 258]
    assert union.decode([256, 258], skip_special_tokens=False) == " h医生"


def test_tokenizers_that_cannot_be_extended_are_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    expert = write_tokenizer(tmp_path / "expert", make_tokenizer("BPE", CHARACTERS))
    with pytest.raises(UserError, match="no such file"):
        write_union_tokenizer(tmp_path, [expert], ["new"], out)
    gaps = tmp_path / "gaps"
    values = json.loads(make_tokenizer("BPE", CHARACTERS).to_str())
    values["model"]["vocab"]["g"] = 40
    write_tokenizer(gaps, make_tokenizer("BPE", CHARACTERS))
    (gaps / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"'new' would get id 13 instead of 41.*gaps"):
        write_union_tokenizer(gaps, [expert], ["new"], out)
    (gaps / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    with pytest.raises(UserError, match="the tokenizers library cannot load it") as error:
        write_union_tokenizer(gaps, [expert], ["new"], out)
    assert "\n" not in str(error.value)
    (expert / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"expert.*not a tokenizer"):
        write_union_tokenizer(gaps, [expert], ["new"], out)
    assert not list(out.iterdir())


# ---------------------------------------------------------------------------- whole merges


@pytest.fixture
def unequal(tmp_path, write):
    """A base and two experts on disk: the first has moved rows and a new token, the second lacks a token."""
    words = [["?", "a", "b", "c"], ["?", "c", "b", "a", "new"], ["?", "a", "b"]]
    folders = []
    for place, tokens in zip(("base", "moved", "fewer"), words, strict=True):
        state = random_state(len(tokens), seed=len(folders), dtype=torch.bfloat16)
        state[BIAS] = torch.zeros(len(tokens), dtype=torch.bfloat16)
        config = {"model_type": "llama", "dtype": "bfloat16", "vocab_size": len(tokens)}
        folders.append(write(tmp_path / place, state, config=config))
        write_tokenizer(folders[-1], make_tokenizer("WordLevel", tokens))
    return folders


def recipe_of(folders, **changes):
    models = [{"model": str(folder)} for folder in folders[1:]]
    return {"merge_method": "linear", "base_model": str(folders[0]), "models": models} | changes


def test_unequal_vocabularies_are_refused_with_the_rows_before_shapes_are_compared(unequal, tmp_path):
    with pytest.raises(
        UserError, match=r"2 tokens at another row \(rows 1, 3 of the base.*1 token the base lacks"
    ):
        merge(recipe_of(unequal), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("word", [{"tokenizer_source": "base"}, {"tokenizer": {"source": "base"}}])
def test_the_bases_vocabulary_with_rows_matched_by_token(unequal, tmp_path, word):
    out = merge(recipe_of(unequal, **word), tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    base, moved, fewer = (load_file(folder / "model.safetensors") for folder in unequal)
    for name in (EMBED, HEAD):
        pairs = zip(moved[name][[0, 3, 2]].double(), fewer[name].double(), strict=True)
        rows = [(first + second) / 2 for first, second in pairs]
        rows.append((moved[name][1].double() + base[name][3].double()) / 2)
        assert torch.equal(merged[name], torch.stack(rows).bfloat16())
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 4
    assert read_tokens(out) == read_tokens(unequal[0])
    summary = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert len(summary["vocabulary"]) == 2 and not [w for w in summary["warnings"] if "vocab" in w]


def test_a_union_is_a_model_with_a_tokenizer_of_its_own(unequal, tmp_path):
    out = merge(recipe_of(unequal, tokenizer={"source": "union"}), tmp_path / "out")
    merged, moved = load_file(out / "model.safetensors"), load_file(unequal[1] / "model.safetensors")
    assert merged[EMBED].shape == (5, WIDTH) and merged[EMBED].dtype == torch.bfloat16
    assert torch.equal(merged[EMBED][4], moved[EMBED][4])
    assert Tokenizer.from_file(str(out / "tokenizer.json")).token_to_id("new") == 4
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 5


def test_statistics_of_matched_rows_are_not_those_of_rows_as_they_lie(unequal, tmp_path):
    """The cache tells apart what the same files give with and without matching."""
    same = [unequal[0], tmp_path / "swapped"]
    state = load_file(unequal[0] / "model.safetensors")
    same[1].mkdir()
    order = [0, 3, 2, 1]
    save_file(take_rows(state, order), same[1] / "model.safetensors", metadata={"format": "pt"})
    (same[1] / "config.json").write_text((same[0] / "config.json").read_text())
    recipe = recipe_of(same, merge_method="metagpt")
    merge(recipe, tmp_path / "by-number")
    write_tokenizer(same[1], make_tokenizer("WordLevel", ["?", "c", "b", "a"]))
    merge(recipe | {"tokenizer_source": "base"}, tmp_path / "by-token")
    norms = [
        json.loads((tmp_path / out / "merge.json").read_text())["norms"]["swapped"]
        for out in ("by-number", "by-token")
    ]
    assert norms[0] > 0 and norms[1] == 0


def test_matching_costs_nothing_where_vocabularies_are_the_same(family, tmp_path):
    plain, matched = recipe_of(family), recipe_of(family, tokenizer_source="base")
    first, second = merge(plain, tmp_path / "plain"), merge(matched, tmp_path / "matched")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
