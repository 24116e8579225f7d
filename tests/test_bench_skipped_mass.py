"""bench/skipped_mass.py: its sums against exact ones, its chosen form against the package's, and a whole run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is part of the checkout, not of the package

from safetensors.numpy import save_file  # noqa: E402

from bench import skipped_mass as study  # noqa: E402
from salekit import load_sample, reference  # noqa: E402
from salekit.block_mask import BlockMask  # noqa: E402
from salekit.skipped_mass import attend_with_pools  # noqa: E402

KEYS, BLOCK, DENSITY = 1500, 9, 0.5  # a ragged end


@pytest.fixture(scope="module")
def head():
    q, k, v = (x[:, :KEYS, :1] for x in load_sample().values())
    return study.Head(q, k, v, study.BlockFacts(*(x[0, :, 0].astype(np.float32) for x in (k, v))))


@pytest.fixture(scope="module")
def parts(head):
    """(bits, sums of what is selected, tile of what is skipped, scores) of one query block."""
    bits, log_tau = head.mask(DENSITY)
    scores = head.tile(BLOCK)
    return (bits, *scores.split(bits[BLOCK], log_tau), scores)


def test_density_and_parts(head, parts):
    bits, selected, rest, scores = parts
    assert abs(bits.sum() / head.num_visible - DENSITY) <= 1 / head.num_visible
    assert rest.blocks.size > 5 and not bits[BLOCK, rest.blocks].any()
    exact = study.Sums(rest.skipped_p.sum(axis=(1, 2)), 0)
    assert np.allclose(selected.mass + exact.mass, scores.p.sum(axis=1), rtol=1e-5)
    assert np.allclose(study.true_mass(rest).mass, exact.mass, rtol=1e-5)
    # int8 codes: scores are off by a few hundredths.
    assert np.abs(np.log(study.estimated_mass(rest).mass / exact.mass)).max() <= 0.1
    limit = np.exp(scores.base + study.Head.mask(head, DENSITY)[1])
    assert (rest.skipped_p.max(axis=(1, 2)) <= 1.2 * limit).all()  # what the selection promised of them


def test_pools_of_single_keys_are_exact(parts):
    _, selected, rest, scores = parts
    sums = study.pooled(rest, rest.facts.runs(1))
    kept = sums.mass / rest.skipped_p.sum(axis=(1, 2))  # less where an estimate was below the score that it limits
    assert np.all((kept >= 0.99) & (kept <= 1 + 1e-4))
    assert np.linalg.norm((selected + sums).output() - scores.dense) <= 0.01 * np.linalg.norm(scores.dense)
    for form in (study.means, study.tilted):
        kwargs = {"size": 128} if form is study.tilted else {}
        assert np.all(form(rest, **kwargs).mass <= study.true_mass(rest).mass * (1 + 1e-4))  # Jensen's inequality


@pytest.mark.parametrize("group", (1, 4))
def test_the_chosen_form_is_the_package_s(head, parts, group):
    bits, selected, rest, _ = parts
    mine = (selected + study.tilted(rest, size=128, group=group, variance=1.0, capped=False, aligned=True)).output()
    q, k, v = (x[:, :KEYS, :1] for x in load_sample().values())
    mask = BlockMask.from_dense(bits[None, None], 128, 32, KEYS, KEYS, True)
    theirs, _ = attend_with_pools(q, k, v, mask, head.plan, group)
    theirs = theirs[0, BLOCK * 128 : (BLOCK + 1) * 128, 0].astype(np.float32)
    # bfloat16 keeps 8 bits: of the output, of the part over selected keys, and of the mean query, which moves weights.
    assert np.all(np.abs(mine - theirs) <= 2.0**-8 * (np.abs(theirs) + np.abs(theirs).max(axis=1, keepdims=True)))


def test_run(tmp_path, monkeypatch, capsys):
    q, k, v = (x[:, :KEYS] for x in load_sample().values())
    save_file({f"layers.7.{name}": x.copy() for name, x in zip("qkv", (q, k, v))}, tmp_path / "some.safetensors")
    keep = ("means", "tilted, 128 rows, 32 keys", "tilted, 128 rows, 32 keys, calibrated", "true mass, mean values")
    monkeypatch.setattr(study, "FORMS", {name: study.FORMS[name] for name in keep})
    output = tmp_path / "results.json"
    arguments = [str(tmp_path / "some.safetensors"), "--densities", ".01,.5", "--rows-every", "5", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["skipped_mass.py", *arguments])
    study.main()
    result = json.loads(output.read_text())
    assert result["forms"] == list(keep)
    assert [(r["layer"], r["head"], r["target"]) for r in result["heads"]] == [(7, 0, 0.5), (7, 1, 0.5)]  # .01: anchors
    for record in result["heads"]:
        number = record["head"]
        head = study.Head(q[:, :, number : number + 1], k, v, None)
        bits, _ = head.mask(0.5)
        mask = BlockMask.from_dense(bits[None, None], 128, 32, KEYS, KEYS, True)
        rows = np.r_[4 * 128 : 5 * 128, 9 * 128 : 10 * 128]
        some = q[:, :, number : number + 1]
        out, dense = (
            reference.attend(some, k, v, bits, head.plan)[0][0, rows, 0].astype(np.float64) for bits in (mask, None)
        )
        error = np.linalg.norm(out - dense) / np.linalg.norm(dense)
        assert abs(record["error"] - error) <= 0.003  # the twin rounds both outputs to bfloat16
        assert all(0 < ratio < 1 for ratio, _ in record["forms"])
    assert "tilted" in capsys.readouterr().out
