"""bench/real_heads.py on tiny models written here: the tokeniser's round trip, and the forward pass token by token."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is part of the checkout, not of the package

from bench import real_heads  # noqa: E402
from salekit.data_files import iter_layers  # noqa: E402

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN = 2, 4, 2, 64, 48
WIDTH = HEADS * DIM
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "\u0120w o"]
PRE = {"llama": "smollm", "qwen2": "qwen2"}
TEXT = "hello world, don't 1234  \n\n\ttab_x h\u00e9\u00e9 \u65e5\u672c \u2019s 5%\r\n  end "


def write_model(path, family):
    rng = np.random.default_rng(3)
    tokens = real_heads.byte_letters() + [merge.replace(" ", "") for merge in MERGES]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE[family])
    writer.add_token_list(tokens)
    writer.add_token_merges(MERGES)
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
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    for name, weight in weights.items():
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


@pytest.mark.parametrize("family", PRE)
def test_tokens_are_the_text_again(tmp_path, family):
    write_model(tmp_path / "model.gguf", family)
    tokenizer = real_heads.Model(tmp_path / "model.gguf").tokenizer
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert [tokenizer.tokens[i] for i in ids[:2]] == ["hello", "\u0120wo"]  # merged in the order they were learned
    assert tokenizer.encode("12") == tokenizer.encode("1") + tokenizer.encode("2")


@pytest.mark.parametrize("family", PRE)
def test_forward_pass(tmp_path, family, monkeypatch, capsys):
    weights = write_model(tmp_path / "model.gguf", family)
    (tmp_path / "text.txt").write_text(TEXT * 4, encoding="utf-8", newline="")
    monkeypatch.setattr(real_heads, "ROWS", 16)  # several tiles of attention
    output = tmp_path / "heads.safetensors"
    arguments = ["model.gguf", "text.txt", "--tokens", "75", "--layers", "1,0", "-o"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["real_heads.py", *arguments, str(output)])
    real_heads.main()
    report = json.loads(capsys.readouterr().out)
    ids = real_heads.Model(tmp_path / "model.gguf").tokenizer.encode(TEXT * 4)[:75]
    layers, nll = forward(weights, ids, family)
    assert abs(report["mean_nll"] - nll) <= 1e-4 * nll
    found = {layer: tensors for layer, (*tensors, _) in iter_layers(output)}
    assert list(found) == ["0", "1"]
    for layer, tensors in found.items():
        for mine, theirs in zip(tensors, layers[int(layer)]):
            error = np.abs(mine[0].astype(np.float64) - theirs)
            # bfloat16 keeps 8 bits, which may be off by half the last; the rest is for float32, wherever it cancels.
            assert np.all(error <= 2.0**-8 * np.abs(theirs) + 1e-5 * np.abs(theirs).max())


def test_chosen_kv_heads(tmp_path, monkeypatch):
    write_model(tmp_path / "model.gguf", "llama")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8", newline="")
    files = []
    for extra in ([], ["--kv-heads", "1"]):
        files.append(tmp_path / f"{len(files)}.safetensors")
        options = ["--tokens", "40", "--layers", "1", "--no-nll", *extra, "-o", str(files[-1])]
        monkeypatch.setattr(
            sys, "argv", ["real_heads.py", str(tmp_path / "model.gguf"), str(tmp_path / "text.txt"), *options]
        )
        real_heads.main()
    (_, whole), (_, some) = (next(iter_layers(file)) for file in files)
    for all_heads, chosen, first in zip(whole, some, (2, 1, 1)):
        assert np.array_equal(all_heads[:, :, first:], chosen)
    assert not list(tmp_path.glob("*.part"))
