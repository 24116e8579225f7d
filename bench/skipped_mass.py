"""What an estimate of the skipped blocks' mass does to the output's error (docs/skipped-mass.md), by NumPy alone.

    python bench/skipped_mass.py FILE.safetensors... [--densities .05,.1,.2,.3] [--rows-every 8] -o results.json

For every head of every layer: the mask of salekit's int8 estimator at the tau that gives each density, then attention
over the selected blocks, plus what each form of FORMS adds for the skipped ones, against dense attention on every n-th
128-row query block. Skipped blocks are fully visible: those that the diagonal crosses are anchors.

A form gives, for each query row, an estimate of L = sum exp(s) and N = sum exp(s) v over the skipped keys.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import salekit  # noqa: E402
from salekit.data_files import iter_layers  # noqa: E402

SCHEMA = 1
HELD = ("ratio", "ratio_equal_cost")  # of each form and head, in the results
BLOCK = 32  # keys of a block
ROWS = 128  # rows of a query block
FACTORS = np.r_[0, np.exp2(np.linspace(-3, 3, 49))]  # that a calibrated form chooses from
PLAIN_DENSITIES = np.geomspace(0.03, 0.7, 24)  # of the curve that says what the cost of a form buys without it
KMEANS_STEPS = 5


class Sums(NamedTuple):
    """Over some keys, per query row, relative to exp(row maximum): mass [rows], values [rows, head_dim]."""

    mass: np.ndarray
    values: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.mass + other.mass, self.values + other.values)

    def scaled(self, factor: float) -> Sums:
        return Sums(factor * self.mass, factor * self.values)

    def output(self) -> np.ndarray:
        return self.values / self.mass[:, None]


class Pools(NamedTuple):
    """Pooled keys: of each block, ``size`` keys with the mean ``key`` and ``value``; [blocks], [blocks, head_dim]."""

    size: np.ndarray
    key: np.ndarray
    value: np.ndarray


class BlockFacts:
    """What is known of each whole 32-key block of one KV head, before any query. float32 k and v, [keys, head_dim]."""

    def __init__(self, k: np.ndarray, v: np.ndarray):
        self.num_blocks = len(k) // BLOCK
        self.k = k[: self.num_blocks * BLOCK].reshape(self.num_blocks, BLOCK, -1)
        self.v = v[: self.num_blocks * BLOCK].reshape(self.num_blocks, BLOCK, -1)
        self.key, self.value = self.k.mean(axis=1), self.v.mean(axis=1)
        self.centred = self.k - self.key[:, None]

    @cached_property
    def variances(self) -> np.ndarray:
        """[blocks, head_dim]: of each channel of k."""
        return np.square(self.centred).mean(axis=1)

    @cached_property
    def direction(self) -> tuple[np.ndarray, np.ndarray]:
        """[blocks, head_dim]: the keys' principal direction; [blocks, 32]: what each key has of it."""
        _, vectors = np.linalg.eigh(self.centred @ self.centred.swapaxes(1, 2))
        along = np.einsum("bjd,bj->bd", self.centred, vectors[..., -1])
        along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-30)
        return along, np.einsum("bjd,bd->bj", self.centred, along)

    @cached_property
    def value_slope(self) -> np.ndarray:
        """[blocks, head_dim]: mean of (v - mean) times the key's share of the principal direction."""
        return np.einsum("bj,bjd->bd", self.direction[1], self.v - self.value[:, None]) / BLOCK

    def pools(self, member: np.ndarray) -> list[Pools]:
        """One Pools for each part, from bool or weights [parts, blocks, 32]; an empty part has size 0."""
        found = []
        for weights in member.astype(np.float32):
            size = weights.sum(axis=1)
            share = (weights / np.maximum(size, 1)[:, None])[:, None]
            found.append(Pools(size, (share @ self.k)[:, 0], (share @ self.v)[:, 0]))
        return found

    @cached_property
    def whole(self) -> list[Pools]:
        return self.pools(np.ones((1, self.num_blocks, BLOCK)))

    def runs(self, length: int) -> list[Pools]:
        """Parts of ``length`` neighbouring keys."""
        part = np.arange(BLOCK) // length
        return self.pools(np.repeat((part == np.arange(BLOCK // length)[:, None])[:, None], self.num_blocks, axis=1))

    @cached_property
    def halves_by_direction(self) -> list[Pools]:
        above = self.direction[1] > 0
        return self.pools(np.stack([above, ~above]))

    @cached_property
    def two_means(self) -> list[Pools]:
        """k-means with two centres, from the halves by direction on."""
        above = self.direction[1] > 0
        for _ in range(KMEANS_STEPS):
            a, b = self.pools(np.stack([above, ~above]))
            above = np.square(self.k - a.key[:, None]).sum(-1) < np.square(self.k - b.key[:, None]).sum(-1)
        return self.pools(np.stack([above, ~above]))


@dataclass
class Tile:
    """One query block, [rows, ...], and what is skipped; scores are relative to top, each row's largest."""

    q: np.ndarray  # times softmax_scale
    top: np.ndarray
    p: np.ndarray  # exp(s - top), [rows, visible keys], 0 for what a row does not see
    estimated: np.ndarray  # the int8 estimate of s - top, likewise, where it is visible
    blocks: np.ndarray  # the skipped ones
    limit: np.ndarray  # [rows]: what the selection says of a skipped key's score: at most this, relative to top
    facts: BlockFacts

    @cached_property
    def skipped_p(self) -> np.ndarray:
        """[rows, skipped blocks, 32]"""
        return self.p[:, : self.facts.num_blocks * BLOCK].reshape(len(self.q), -1, BLOCK)[:, self.blocks]

    @cached_property
    def row_means(self) -> dict[int, list[tuple[slice, np.ndarray]]]:
        """By size: (rows, their mean query)."""
        starts = {size: range(0, len(self.q), size) for size in (16, 32, 64, 128)}
        return {
            size: [(slice(start, start + size), self.q[start : start + size].mean(axis=0)) for start in each]
            for size, each in starts.items()
        }

    def exp(self, score: np.ndarray, size: np.ndarray | float = 1.0) -> np.ndarray:
        """size * exp(score - top), at most size * exp(limit): no skipped key's score was above it."""
        with np.errstate(over="ignore"):
            return size * np.exp(np.minimum(score - self.top[:, None], self.limit[:, None]))


# --- the forms -------------------------------------------------------------------------------------------------------
def pooled(tile: Tile, parts: list[Pools]) -> Sums:
    """For each part size * exp(q . key), value."""
    mass, values = 0, 0
    for part in parts:
        weight = tile.exp(tile.q @ part.key[tile.blocks].T, part.size[tile.blocks])
        mass, values = mass + weight.sum(axis=1), values + weight @ part.value[tile.blocks]
    return Sums(mass, values)


def means(tile: Tile) -> Sums:
    return pooled(tile, tile.facts.whole)


def mass_alone(tile: Tile) -> Sums:
    sums = means(tile)
    return Sums(sums.mass, np.zeros_like(sums.values))


def values_alone(tile: Tile) -> Sums:
    sums = means(tile)
    return Sums(np.zeros_like(sums.mass), sums.values)


def with_variance(tile: Tile, variance: np.ndarray) -> Sums:
    """Block means with half the variance of q . k over a block's keys, [rows, skipped blocks], in the exponent."""
    weight = tile.exp(tile.q @ tile.facts.key[tile.blocks].T + variance / 2, BLOCK)
    return Sums(weight.sum(axis=1), weight @ tile.facts.value[tile.blocks])


def scalar_variance(tile: Tile) -> Sums:
    each = tile.facts.variances[tile.blocks].mean(axis=1)
    return with_variance(tile, np.square(tile.q).sum(axis=1)[:, None] * each)


def diagonal_variance(tile: Tile) -> Sums:
    return with_variance(tile, np.square(tile.q) @ tile.facts.variances[tile.blocks].T)


def full_variance(tile: Tile) -> Sums:
    """The variance of the scores themselves: what a full second moment of each block gives."""
    scores = np.einsum("rd,bjd->rbj", tile.q, tile.facts.centred[tile.blocks], optimize=True)
    return with_variance(tile, np.square(scores).mean(axis=2))


def along_direction(tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """q . direction, and the variance that this one direction gives."""
    direction, share = (x[tile.blocks] for x in tile.facts.direction)
    dot = tile.q @ direction.T
    return dot, np.square(dot) * np.square(share).mean(axis=1)


def one_direction(tile: Tile) -> Sums:
    return with_variance(tile, along_direction(tile)[1])


def one_direction_sloped(tile: Tile) -> Sums:
    """And the values' first-order change along it, for |q . direction * share| up to about 1."""
    dot, variance = along_direction(tile)
    weight = tile.exp(tile.q @ tile.facts.key[tile.blocks].T + variance / 2, BLOCK)
    slope = weight * dot / np.maximum(1, np.sqrt(variance))
    return Sums(
        weight.sum(axis=1), weight @ tile.facts.value[tile.blocks] + slope @ tile.facts.value_slope[tile.blocks]
    )


def tilted(
    tile: Tile, size: int, group: int | None = 1, variance: float = 0.0, capped: bool = True, aligned: bool = False
) -> Sums:
    """Keys and values pooled for the mean query of each ``size`` rows, over ``group`` skipped blocks (None: all).

    With weights softmax(mean . k): mass, its first order in q and the value are exact for that query. variance:
    what the mass's second order, by one variance for all channels, adds to the exponent at most. aligned: a pool is
    what is skipped of ``group`` neighbours, not so many skipped ones after one another.
    """
    group = len(tile.blocks) if group is None else group
    blocks = np.full(
        -(-tile.facts.num_blocks // group) * group if aligned else -(-len(tile.blocks) // group) * group, -1
    )
    blocks[tile.blocks if aligned else slice(len(tile.blocks))] = tile.blocks
    blocks = blocks.reshape(-1, group)
    blocks = blocks[(blocks >= 0).any(axis=1)]
    k, v = (x[blocks].reshape(len(blocks), group * BLOCK, -1) for x in (tile.facts.k, tile.facts.v))
    absent = np.repeat(blocks < 0, BLOCK, axis=1)
    num_keys = (~absent).sum(axis=1).astype(np.float32)
    mass, values = np.zeros(len(tile.q), np.float32), np.zeros_like(tile.q)
    for rows, mean in tile.row_means[size]:
        scores = np.where(absent, np.float32(-np.inf), k @ mean)
        largest = scores.max(axis=1, keepdims=True)
        weight = np.exp(scores - largest)
        total = weight.sum(axis=1, keepdims=True)
        share = (weight / total)[:, None]
        key, value = (share @ k)[:, 0], (share @ v)[:, 0]
        shift = (largest + np.log(total))[:, 0] - key @ mean - np.log(num_keys)
        score = tile.q[rows] @ key.T + shift - tile.top[rows, None]
        if variance:
            spread = (share[:, 0] * np.square(k - key[:, None]).sum(axis=2)).sum(axis=1) / k.shape[2]
            score += np.minimum(np.square(tile.q[rows] - mean).sum(axis=1)[:, None] * (spread / 2), variance)
        weight = num_keys * np.exp(np.minimum(score, tile.limit[rows, None]) if capped else score)
        mass[rows], values[rows] = weight.sum(axis=1), weight @ value
    return Sums(mass, values)


def true_mass(tile: Tile) -> Sums:
    """Each block's own mass, its plain mean value: the least error that plain values allow."""
    weight = tile.skipped_p.sum(axis=2)
    return Sums(weight.sum(axis=1), weight @ tile.facts.value[tile.blocks])


def estimated_mass(tile: Tile) -> Sums:
    """Each block's mass from the estimator's scores, its plain mean value."""
    scores = tile.estimated[:, : tile.facts.num_blocks * BLOCK].reshape(len(tile.q), -1, BLOCK)[:, tile.blocks]
    weight = np.exp(scores).sum(axis=2)
    return Sums(weight.sum(axis=1), weight @ tile.facts.value[tile.blocks])


def true_mass_tilted(tile: Tile) -> Sums:
    """Each block's own mass, its value as the mean query weights it."""
    ((_, mean),) = tile.row_means[ROWS]
    scores = tile.facts.k[tile.blocks] @ mean
    weight = np.exp(scores - scores.max(axis=1, keepdims=True))
    value = np.einsum("bj,bjd->bd", weight / weight.sum(axis=1, keepdims=True), tile.facts.v[tile.blocks])
    mass = tile.skipped_p.sum(axis=2)
    return Sums(mass.sum(axis=1), mass @ value)


def true_mass_alone(tile: Tile) -> Sums:
    """The right denominator, nothing in the numerator."""
    return Sums(tile.skipped_p.sum(axis=(1, 2)), np.zeros_like(tile.q))


class Form(NamedTuple):
    """cost: a share of dense attention's products over what is skipped; NaN: not to be had without its scores."""

    cost: float
    sums: Callable[[Tile], Sums]
    calibrated: bool = False  # times a factor of the head: the best one for the other half of the query blocks


POOL = 1 / BLOCK  # one more key a skipped block
FORMS = {
    "means": Form(POOL, means),
    "means, mass alone": Form(POOL / 2, mass_alone),
    "means, values alone": Form(POOL, values_alone),
    "means, calibrated": Form(POOL, means, True),
    "scalar variance": Form(POOL, scalar_variance),
    "diagonal variance": Form(1.5 * POOL, diagonal_variance),
    "full variance": Form(math.nan, full_variance),
    "one direction": Form(1.5 * POOL, one_direction),
    "one direction, sloped values": Form(2 * POOL, one_direction_sloped),
    "two means, neighbours": Form(2 * POOL, lambda tile: pooled(tile, tile.facts.runs(16))),
    "two means, by direction": Form(2 * POOL, lambda tile: pooled(tile, tile.facts.halves_by_direction)),
    "two means, k-means": Form(2 * POOL, lambda tile: pooled(tile, tile.facts.two_means)),
    "four means, neighbours": Form(4 * POOL, lambda tile: pooled(tile, tile.facts.runs(8))),
    "eight means, neighbours": Form(8 * POOL, lambda tile: pooled(tile, tile.facts.runs(4))),
    # Pooling for a mean query: its scores, and its sums of k and of v, are each half of a dense row's work.
    **{
        f"tilted, {rows} rows, {keys} keys": Form(
            1 / keys + 1.5 / rows, partial(tilted, size=rows, group=keys // BLOCK)
        )
        for rows, keys in (
            (128, 32),
            (64, 32),
            (32, 32),
            (16, 32),
            (128, 64),
            (128, 128),
            (64, 128),
            (32, 128),
            (128, 512),
        )
    },
    **{
        f"tilted, {rows} rows, all keys": Form(1.5 / rows, partial(tilted, size=rows, group=None))
        for rows in (128, 32, 16)
    },
    "tilted, 128 rows, 32 keys, variance": Form(POOL + 1.5 / ROWS, partial(tilted, size=ROWS, variance=np.inf)),
    **{
        f"tilted, 128 rows, {keys} keys, variance up to 1": Form(
            1 / keys + 1.5 / ROWS, partial(tilted, size=ROWS, group=keys // BLOCK, variance=1.0, capped=False)
        )
        for keys in (32, 64, 128)
    },
    # A pool for 128 keys of which two thirds or more are skipped: 1.5 / 128 of those.
    "tilted, 128 rows, skipped of 128 keys, variance up to 1": Form(
        1.5 / 128 + 1.5 / ROWS, partial(tilted, size=ROWS, group=4, variance=1.0, capped=False, aligned=True)
    ),
    "tilted, 128 rows, 32 keys, calibrated": Form(POOL + 1.5 / ROWS, partial(tilted, size=ROWS), True),
    "tilted, 128 rows, 128 keys, calibrated": Form(POOL / 4 + 1.5 / ROWS, partial(tilted, size=ROWS, group=4), True),
    "tilted, 128 rows, all keys, calibrated": Form(1.5 / ROWS, partial(tilted, size=ROWS, group=None), True),
    "true mass alone": Form(math.nan, true_mass_alone),
    "int8 mass, mean values": Form(math.nan, estimated_mass),
    "true mass, mean values": Form(math.nan, true_mass),
    "true mass, tilted values": Form(math.nan, true_mass_tilted),
}


# --- measuring -------------------------------------------------------------------------------------------------------
class Head:
    """One query head: its scores of blocks, and its tiles."""

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, facts: BlockFacts):
        """q, k, v: [1, seqlen, 1, head_dim], float16 or bfloat16."""
        self.plan = salekit.make_plan(q, k, v, estimator="int8", block=(ROWS, BLOCK), dense_below=0)
        self.codes = salekit.quantize(q, k, self.plan)
        self.m, self.l = salekit.anchor_statistics(q, k, self.codes.k_mean, self.plan)
        self.scores = salekit.block_scores(self.codes, self.m, self.l, self.plan)
        self.facts = facts
        self.q = q[0, :, 0].astype(np.float32) * np.float32(self.plan.softmax_scale)
        self.k, self.v = (x[0, :, 0].astype(np.float32) for x in (k, v))
        visible = self.scores[0, 0] > -np.inf
        self.num_visible = int(visible.sum())
        self.num_anchors = int(np.isposinf(self.scores).sum())
        self._sorted = np.sort(self.scores[0, 0][visible & np.isfinite(self.scores[0, 0])])[::-1]

    def mask(self, density: float) -> tuple[np.ndarray, float]:
        """bool [query blocks, key blocks] with at most this density or the anchors alone, and ln(tau)."""
        extra = round(density * self.num_visible) - self.num_anchors
        log_tau = self._sorted[extra] if 0 <= extra < len(self._sorted) else (np.inf if extra < 0 else -np.inf)
        mask = salekit.mask_from_scores(self.scores, float(np.exp(np.float64(log_tau))), self.plan)
        return mask.to_dense()[0, 0], float(log_tau)

    def tile(self, block: int) -> TileScores:
        return TileScores(self, block)


class TileScores:
    """The exact scores of a query block's rows, shared by all densities and forms."""

    def __init__(self, head: Head, block: int):
        self.head, self.block = head, block
        rows = np.arange(block * ROWS, min((block + 1) * ROWS, len(head.q)))
        seen = rows + head.plan.offset + 1
        self.q = head.q[rows]
        s = self.q @ head.k[: seen.max()].T
        hidden = np.arange(seen.max()) >= seen[:, None]
        s[hidden] = -np.inf
        self.top = s.max(axis=1)
        self.p = np.exp(s - self.top[:, None])
        codes, shift = head.codes, self.q @ head.codes.k_mean[0, 0]
        unit = np.float32(head.plan.softmax_scale) * codes.q_scale[0, 0, rows] * codes.k_scale[0, 0]
        product = codes.q_codes[0, 0, rows].astype(np.float32) @ codes.k_codes[0, 0, : seen.max()].T.astype(np.float32)
        self.estimated = product * unit[:, None] + (shift - self.top)[:, None]
        # A skipped pair's estimate is at most m + ln(tau l), here without ln(tau).
        self.base = (head.m + np.log(head.l))[0, 0, rows] + shift - self.top
        self.dense = Sums(self.p.sum(axis=1), self.p @ head.v[: seen.max()]).output()

    def split(self, bits: np.ndarray, log_tau: float) -> tuple[Sums, Tile]:
        """What the selected blocks give, and the rest. bits: bool [key blocks]."""
        num_keys = self.p.shape[1]
        keys = np.flatnonzero(np.repeat(bits, BLOCK)[:num_keys])
        p = self.p[:, keys]
        selected = Sums(p.sum(axis=1), p @ self.head.v[keys])
        skipped = np.flatnonzero(~bits[: -(-num_keys // BLOCK)])
        limit = self.base + np.float32(log_tau)
        return selected, Tile(self.q, self.top, self.p, self.estimated, skipped, limit, self.head.facts)


def squares(output: np.ndarray, dense: np.ndarray) -> float:
    return float(np.square(output - dense, dtype=np.float64).sum())


def measure_head(head: Head, densities: list[float], every: int) -> list[dict]:
    """One record for each density that the anchors leave room for."""
    blocks = range(every - 1, head.plan.num_q_blocks, every)
    masks = {d: head.mask(d) for d in densities if d * head.num_visible >= head.num_anchors}
    plain_masks = [head.mask(d)[0] for d in PLAIN_DENSITIES]
    plain = np.zeros(len(PLAIN_DENSITIES))
    norm = 0.0
    sums = {
        d: {name: np.zeros((2, len(FACTORS) if form.calibrated else 1)) for name, form in FORMS.items()} for d in masks
    }
    without = dict.fromkeys(masks, 0.0)
    for turn, block in enumerate(blocks):
        tile = head.tile(block)
        norm += squares(tile.dense, 0)
        for index, bits in enumerate(plain_masks):
            plain[index] += squares(tile.split(bits[block], 0.0)[0].output(), tile.dense)
        for density, (bits, log_tau) in masks.items():
            selected, rest = tile.split(bits[block], log_tau)
            without[density] += squares(selected.output(), tile.dense)
            for name, form in FORMS.items():
                added = form.sums(rest) if rest.blocks.size else selected.scaled(0)
                for index, factor in enumerate(FACTORS if form.calibrated else (1.0,)):
                    output = (selected + added.scaled(factor)).output()
                    sums[density][name][turn % 2, index] += squares(output, tile.dense)
    plain_at = np.array([bits.sum() / head.num_visible for bits in plain_masks])
    records = []
    for density, (bits, _) in masks.items():
        measured = bits.sum() / head.num_visible
        forms = {}
        for name, form in FORMS.items():
            halves = sums[density][name]
            best = halves[::-1].argmin(axis=1)  # of the other half
            total = halves[[0, 1], best].sum()
            forms[name] = {"error": math.sqrt(total / norm), "ratio": math.sqrt(total / without[density])}
            if form.calibrated:
                forms[name]["factors"] = FACTORS[best].tolist()
            forms[name]["worth"] = density_of(forms[name]["error"], plain_at, np.sqrt(plain / norm)) - measured
            if not math.isnan(form.cost):
                equal = measured + form.cost * (1 - measured)
                instead = plain_error(equal, plain_at, np.sqrt(plain / norm))
                forms[name]["ratio_equal_cost"] = forms[name]["error"] / instead
        records.append(
            {"density": measured, "target": density, "error": math.sqrt(without[density] / norm), "forms": forms}
        )
    return records


def plain_error(density: float, densities: np.ndarray, errors: np.ndarray) -> float:
    """The error without any form at this density, between measured ones; linear in the logarithm of the error."""
    densities, first = np.unique(densities, return_index=True)
    return float(np.exp(np.interp(density, densities, np.log(np.maximum(errors[first], 1e-30)))))


def density_of(error: float, densities: np.ndarray, errors: np.ndarray) -> float:
    """The density at which there is this error without any form, at most the largest one measured."""
    densities, first = np.unique(densities, return_index=True)
    falling = np.minimum.accumulate(np.log(np.maximum(errors[first], 1e-30)))
    return float(np.interp(-math.log(max(error, 1e-30)), -falling, densities))


def measure_file(path: Path, densities: list[float], every: int, progress=lambda text: None) -> list[dict]:
    records = []
    for layer, (q, k, v, _) in iter_layers(path):
        group = q.shape[2] // k.shape[2]
        for number in range(q.shape[2]):
            started = time.perf_counter()
            kv = slice(number // group, number // group + 1)
            if number % group == 0:
                facts = BlockFacts(*(x[0, :, kv.start].astype(np.float32) for x in (k, v)))
            head = Head(q[:, :, number : number + 1], k[:, :, kv], v[:, :, kv], facts)
            name = {"file": path.stem, "layer": int(layer), "head": number, "seqlen": q.shape[1]}
            records += [{**name, **record} for record in measure_head(head, densities, every)]
            progress(f"{path.stem} layer {layer} head {number}: {time.perf_counter() - started:.1f} s")
    return records


def summary(records: list[dict]) -> list[dict]:
    """Over heads, for each file, target density and form: shares and medians of the ratios."""
    rows = []
    for file, target in sorted({(r["file"], r["target"]) for r in records}):
        some = [r for r in records if (r["file"], r["target"]) == (file, target)]
        for name in FORMS:
            row = {"file": file, "target": target, "heads": len(some), "form": name}
            row["median_worth"] = float(np.median([r["forms"][name]["worth"] for r in some]))
            for key in ("ratio", "ratio_equal_cost"):
                ratios = [r["forms"][name].get(key) for r in some]
                if None not in ratios:
                    row[f"median_{key}"] = float(np.median(ratios))
                    row[f"third_{key}"] = float(np.mean(np.array(ratios) <= 2 / 3))
            rows.append(row)
    return rows


def rounded(x):
    """Four digits are what the files hold; what is not a number is left out."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items() if value is not None}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def write_result(path: Path, head: dict, rows: list[dict], records: list[dict]) -> None:
    """One line a row and a record; a head has the HELD of each form, in the order of "forms"."""
    head = {**head, "forms": list(FORMS), "held": HELD}
    heads = [
        {**record, "forms": [[record["forms"][name].get(key) for key in HELD] for name in FORMS]} for record in records
    ]
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for name, items in (("summary", rows), ("heads", heads)):
        lines = ",\n".join(json.dumps(rounded(item), allow_nan=False) for item in items)
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    path.write_text("{" + ",\n".join(parts) + "}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--densities", default="0.05,0.1,0.2,0.3")
    parser.add_argument("--rows-every", type=int, default=8, help="every n-th 128-row query block is measured")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    densities = [float(x) for x in options.densities.split(",")]
    records = []
    for path in options.files:
        records += measure_file(
            path, densities, options.rows_every, lambda text: print(text, file=sys.stderr, flush=True)
        )
    measured = f"{options.rows_every - 1}, {2 * options.rows_every - 1}, ..."
    head = {"schema": SCHEMA, "estimator": "int8", "block": [ROWS, BLOCK], "query_blocks": measured}
    write_result(options.output, head, summary(records), records)
    for row in summary(records):
        figures = "  ".join(
            f"{row.get(key, math.nan):6.3f}"
            for key in (
                "median_ratio",
                "third_ratio",
                "median_ratio_equal_cost",
                "third_ratio_equal_cost",
                "median_worth",
            )
        )
        print(f"{row['file']:36} {row['target']:5} {row['heads']:3} {row['form']:42} {figures}")


if __name__ == "__main__":
    main()
