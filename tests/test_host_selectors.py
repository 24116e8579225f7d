"""Every way to choose blocks against its paper's rule in plain float64 loops, and the frontier they are compared on."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest

import salekit
from salekit import call_checks, frontier
from salekit.errors import ArgumentError
from salekit.selectors import SELECTORS, Selector, costs, field, grid, levels_of, mask_at

NAMES = list(SELECTORS)


def make(nq, nk, heads=4, kv_heads=2, block=(64, 32), seed=0, **options):
    """q, k, v and their plan. Blocks of rows and of keys have directions of their own; head 0 is nearly flat."""
    rng = np.random.default_rng(seed)

    def rows(count, heads, run, spread, noise):
        directions = rng.standard_normal((1, -(-count // run), heads, 64))
        own = rng.standard_normal((1, count, heads, 64))
        return spread * np.repeat(directions, run, axis=1)[:, :count] + noise * own

    q, k, v = rows(nq, heads, 64, 2.5, 0.4), rows(nk, kv_heads, 32, 1.0, 0.3), rows(nk, kv_heads, 32, 0.5, 1.0)
    q[:, :, 0] *= 0.02
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    return q, k, v, call_checks.make_plan(q, k, v, block=block, estimator="int8", dense_below=0, **options)


CASES = [((150, 205), (64, 32)), ((261, 261), (64, 32)), ((280, 300), (128, 64)), ((384, 384), (128, 128))]


def varied(shares, block):
    """Whether the knob moved the masks; 3 x 3 blocks are too few to say."""
    return min(shares) < max(shares) <= 1 or block == (128, 128)



def float64_heads(q, k, plan):
    """(head, q, k) of each query head in float64."""
    for head in range(plan.num_heads):
        yield head, q[0, :, head].astype(np.float64), k[0, :, head // plan.group_size].astype(np.float64)


def expect(levels, want, limit, plan, inclusive=True):
    """The mask at a limit is ``want``, but for blocks whose level is within float32's reach of the limit."""
    got = levels <= limit if inclusive else levels < limit
    differ = got != want
    near = np.abs(levels - limit) <= 1e-4 * max(1.0, abs(limit))
    assert not (differ & ~near).any(), (limit, np.argwhere(differ & ~near)[:5])
    return want[grid.visible_blocks(plan)].mean()


def blocks_of(plan):
    """The grid's own facts in plain loops: visible and diagonal, bool [query blocks, key blocks]."""
    nq, nk, bq, bk = plan.seqlen_q, plan.seqlen_k, plan.block_q, plan.block_k
    visible = np.zeros((plan.num_q_blocks, plan.num_k_blocks), bool)
    diagonal = visible.copy()
    for i in range(nq):
        position = i + nk - nq
        for j in range(position + 1):
            visible[i // bq, j // bk] = True
        diagonal[i // bq, position // bk] = True
    return visible, diagonal


def row_probabilities(q, k, plan, rows):
    """float64 [len(rows), seqlen_k]: causal softmax of these rows."""
    p = np.zeros((len(rows), plan.seqlen_k))
    for n, i in enumerate(rows):
        keys = k[: i + plan.offset + 1]
        s = plan.softmax_scale * (keys @ q[i])
        e = np.exp(s - s.max())
        p[n, : len(keys)] = e / e.sum()
    return p


# --- the grid's tools ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, block", CASES)
def test_grid(shape, block):
    *_, plan = make(*shape, block=block)
    visible, diagonal = blocks_of(plan)
    assert np.array_equal(grid.visible_blocks(plan), visible)
    assert np.array_equal(grid.diagonal_blocks(plan), diagonal)


def test_range_minimum():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(50).astype(np.float32)
    first = rng.integers(-30, 70, (7, 9))
    last = first + rng.integers(0, 40, first.shape)
    got = grid.range_minimum(x, first, last)
    for index in np.ndindex(*first.shape):
        inside = [x[i] for i in range(first[index], last[index] + 1) if 0 <= i < 50]
        assert got[index] == min(inside, default=np.inf)


def test_running_maximum_and_ranks():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, (5, 37)).astype(np.float32)
    got = grid.running_maximum(x)
    for r in range(5):
        assert got[r].tolist() == [-np.inf] + [x[r, :j].max() for j in range(1, 37)]
        order = sorted(range(37), key=lambda j: (-x[r, j], j))
        assert [order.index(j) for j in range(37)] == grid.ranks(x)[r].tolist()


def test_masks_are_packed_as_block_masks_are():
    *_, plan = make(261, 261)
    levels = np.random.default_rng(0).standard_normal((1, 4, plan.num_q_blocks, plan.num_k_blocks)).astype(np.float32)
    levels[0, :, 0, 3:] = np.inf
    limits = np.array([-np.inf, -0.5, 0.0, np.inf])
    mask = mask_at(levels, limits, plan)
    bits = (levels <= limits[None, :, None, None]) & (levels < np.inf)
    assert mask.words.dtype == np.uint32 and np.array_equal(mask.to_dense(), bits)


# --- each selector against its rule ----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, block", CASES)
def test_oracle_mass(shape, block):
    q, k, _, plan = make(*shape, block=block)
    visible, diagonal = blocks_of(plan)
    levels = SELECTORS["oracle-mass"].levels(q, k, plan)
    for head, queries, keys in float64_heads(q, k, plan):
        p = row_probabilities(queries, keys, plan, range(plan.seqlen_q))
        mass = np.zeros(visible.shape)
        for i in range(plan.seqlen_q):
            for j in range(plan.seqlen_k):
                mass[i // plan.block_q, j // plan.block_k] += p[i, j]
        want = np.where(diagonal, -np.inf, np.where(visible, -mass, np.inf))
        np.testing.assert_allclose(levels[0, head], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape, block", CASES[:2])
def test_exact_is_the_rule_of_sale(shape, block):
    q, k, _, plan = make(*shape, block=block, sink=32, local=32)
    levels = SELECTORS["exact"].levels(q, k, plan)
    shares = []
    for head, queries, keys in float64_heads(q, k, plan):
        s = plan.softmax_scale * queries @ keys.T
        for tau in (0.3, 0.01, 0.0005):
            want = oracle.select(s, s, tau, True, *block, 32, 32)
            shares.append(expect(levels[0, head], want, -math.log(tau), plan, inclusive=False))
    assert min(shares) < 0.8 and max(shares) > min(shares)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("int")])
def test_estimators_give_the_masks_of_a_call(name):
    q, k, _, plan = make(300, 300, sink=32, local=32, full_rows=100)
    estimator, _, stride = name.partition("/")
    levels = SELECTORS[name].levels(q, k, plan)
    options = plan.replace(estimator=estimator, query_stride=int(stride or 1))
    codes = salekit.quantize(q, k, options)
    m, l = salekit.anchor_statistics(q, k, codes.k_mean, options)
    for tau in (0.1, 0.003):
        mask = salekit.estimate(codes, salekit.row_limits(m, l, codes, tau, options), options).to_dense()
        for head in range(plan.num_heads):
            expect(levels[0, head], mask[0, head], -math.log(tau), plan, inclusive=False)
        assert 0.2 < mask[0, 1:].sum() / (3 * plan.visible_blocks.sum()) < 0.95


@pytest.mark.parametrize("shape, block", CASES)
def test_window(shape, block):
    q, k, _, plan = make(*shape, block=block)
    visible, diagonal = blocks_of(plan)
    levels = SELECTORS["sink-local"].levels(q, k, plan)
    for window in (1, 40, 100):
        want = visible & diagonal
        for r, c in np.argwhere(visible):
            near = r * block[0] + plan.offset - min((c + 1) * block[1], plan.seqlen_k) + 1 < window
            want[r, c] |= near or c * block[1] < 32
        assert np.array_equal(levels[0, 3] < window, want)


@pytest.mark.parametrize("shape, block", CASES)
@pytest.mark.parametrize("verticals, slashes", [(300, 600), (900, 100)])
def test_minference(shape, block, verticals, slashes):
    q, k, _, plan = make(*shape, block=block)
    visible, diagonal = blocks_of(plan)
    levels = field.minference_levels(q, k, plan, verticals, slashes)
    shares = []
    for head, queries, keys in float64_heads(q, k, plan):
        rows = range(plan.seqlen_q - 64, plan.seqlen_q)
        p = row_probabilities(queries, keys, plan, rows)
        vertical = {j: p[:, j].sum() if j >= 30 else math.inf for j in range(plan.seqlen_k)}
        slash = {}
        for distance in range(plan.seqlen_k):
            pairs = [(n, i + plan.offset - distance) for n, i in enumerate(rows)]
            slash[distance] = math.inf if distance < 100 else sum(p[n, j] for n, j in pairs if j >= 0)
        for r in (0.02, 0.25):
            best = lambda of, count: sorted(of, key=lambda x: (-of[x], x))[: int(count)]  # noqa: E731
            chosen = set(best(vertical, r * verticals)) | set(range(30))
            distances = set(best(slash, r * slashes)) | set(range(100))
            want = diagonal.copy()
            for i in range(plan.seqlen_q):
                for distance in distances:
                    if i + plan.offset - distance >= 0:
                        want[i // block[0], (i + plan.offset - distance) // block[1]] = True
                for c in {j // block[1] for j in chosen}:
                    want[i // block[0], c] = True
            shares.append(expect(levels[0, head], want & visible, r, plan))
    assert varied(shares, block)


@pytest.mark.parametrize("shape, block", CASES)
def test_flexprefill(shape, block):
    """Vertical-slash or block by block, as the divergence decides: both happen."""
    q, k, _, plan = make(*shape, block=block)
    visible, diagonal = blocks_of(plan)
    levels = SELECTORS["flexprefill"].levels(q, k, plan)
    nk, size, kinds, shares = plan.seqlen_k, block[1], set(), []
    for head, queries, keys in float64_heads(q, k, plan):
        rows = list(range(max(0, plan.seqlen_q - 128), plan.seqlen_q))
        p = row_probabilities(queries, keys, plan, rows)
        vertical = p.mean(axis=0)
        slash = np.zeros(nk)  # by distance
        for n, i in enumerate(rows):
            for j in range(i + plan.offset + 1):
                slash[i + plan.offset - j] += p[n, j] / len(rows)
        columns = [sum(vertical[c * size : (c + 1) * size]) for c in range(plan.num_k_blocks)]
        # Diagonals are pooled from the farthest distance on, and numbered from the nearest.
        bins = [0.0] * plan.num_k_blocks
        for distance in range(nk):
            bins[plan.num_k_blocks - 1 - (nk - 1 - distance) // size] += slash[distance]
        means = [keys[c * size : (c + 1) * size].mean(axis=0) for c in range(plan.num_k_blocks)]
        estimate = np.exp([plan.softmax_scale * queries[rows].mean(axis=0) @ mean for mean in means])
        estimate /= estimate.sum()
        half = [(a + b) / 2 for a, b in zip(estimate, columns)]
        divergence = sum(
            0.5 * x * math.log(x / m) for of in (estimate, columns) for x, m in zip(of, half) if x > 0
        )
        query_aware = math.sqrt(max(divergence, 0)) < 0.1
        kinds.add(query_aware)
        for gamma in (0.5, 0.8, 0.95):
            want = diagonal.copy()
            keep_columns = keep_bins = 1
            if not query_aware:
                keep_columns, keep_bins = (
                    (int((np.cumsum(np.sort(of)[::-1]) <= gamma).sum()) + 1) // size + 1 for of in (vertical, slash)
                )
            best_columns = sorted(range(len(columns)), key=lambda c: -(math.inf if c == 0 else columns[c]))
            best_bins = sorted(range(len(bins)), key=lambda b: -(math.inf if b == 0 else bins[b]))
            for c in best_columns[:keep_columns]:
                want[:, c] = True
            for i in range(plan.seqlen_q):
                for b in best_bins[:keep_bins]:
                    c = (i + plan.offset) // size - b
                    if c >= 0:
                        want[i // block[0], c] = True
            if query_aware:
                shares_of = []
                for r in range(plan.num_q_blocks):
                    mean = queries[r * block[0] : (r + 1) * block[0]].mean(axis=0)
                    e = {c: math.exp(plan.softmax_scale * mean @ means[c]) for c in range(len(means)) if visible[r, c]}
                    shares_of += [(x / sum(e.values()), r, c) for c, x in e.items()]
                total = 0.0
                for share, r, c in sorted(shares_of, reverse=True):
                    total += share
                    if total <= gamma * plan.num_q_blocks:
                        want[r, c] = True
            shares.append(expect(levels[0, head], want & visible, gamma, plan))
    assert False in kinds and (True in kinds or nk % size) and varied(shares, block)


@pytest.mark.parametrize("shape, block", CASES)
@pytest.mark.parametrize("stride", [8, 16])
def test_xattention(shape, block, stride):
    q, k, _, plan = make(*shape, block=block)
    visible, diagonal = blocks_of(plan)
    levels = field.xattention_levels(q, k, plan, stride)
    tiles_q, tiles_k = -(-plan.seqlen_q // stride), -(-plan.seqlen_k // stride)
    shares = []
    for head, queries, keys in float64_heads(q, k, plan):
        s = plan.softmax_scale * queries @ keys.T
        mass = np.zeros(visible.shape)
        for a in range(tiles_q):
            scores = {}
            for c in range(tiles_k):
                if c * stride > a * stride + stride - 1 + plan.offset:
                    continue
                pairs = [(a * stride + stride - 1 - n, c * stride + n) for n in range(stride)]
                inside = [s[i, j] for i, j in pairs if i < plan.seqlen_q and j < plan.seqlen_k]
                scores[c] = sum(inside) / stride
            top = max(scores.values())
            total = sum(math.exp(x - top) for x in scores.values())
            for c, x in scores.items():
                mass[a * stride // block[0], c * stride // block[1]] += math.exp(x - top) / total
        mass[~visible] = 0
        for threshold in (0.6, 0.9):
            want = diagonal.copy()
            want[:, 0] = True
            for r in range(plan.num_q_blocks):
                covered = mass[r][want[r]].sum()
                for c in sorted(np.flatnonzero(~want[r] & visible[r]), key=lambda c: -mass[r, c]):
                    if covered >= threshold * mass[r].sum():
                        break
                    want[r, c] = True
                    covered += mass[r, c]
            shares.append(expect(levels[0, head], want & visible, threshold, plan, inclusive=False))
    assert varied(shares, block)


@pytest.mark.parametrize("shape, block", CASES)
@pytest.mark.parametrize("similarity, by_count", [(0.3, False), (-0.1, False), (-0.1, True)])
def test_sparge(shape, block, similarity, by_count):
    q, k, _, plan = make(*shape, block=block)
    q[0, :64, 2] = np.random.default_rng(1).standard_normal((64, 64))  # a block whose rows are not alike
    visible, diagonal = blocks_of(plan)
    levels = field.sparge_levels(q, k, plan, similarity, by_count)
    alike, shares = [], []

    def pooled(x, size):
        means, similar = [], []
        for start in range(0, len(x), size):
            rows = x[start : start + size]
            unit = [row / np.linalg.norm(row) for row in rows]
            means.append(rows.mean(axis=0))
            similar.append(np.mean([a @ b for a in unit for b in unit]) > similarity)
        return means, similar

    for head, queries, keys in list(float64_heads(q, k, plan))[1:3]:
        (means_q, similar_q), (means_k, similar_k) = pooled(queries, block[0]), pooled(keys - keys.mean(0), block[1])
        alike += similar_q + similar_k
        for knob in (0.2, 0.999):
            want = diagonal.copy()
            for r in range(plan.num_q_blocks):
                usable = [c for c in range(plan.num_k_blocks) if visible[r, c] and similar_k[c]]
                weight = {c: math.exp(plan.softmax_scale * means_q[r] @ means_k[c]) for c in usable}
                order = sorted(usable, key=lambda c: -weight[c])
                total = np.cumsum([weight[c] / sum(weight.values()) for c in order])
                count = int(knob * plan.num_k_blocks) if by_count else int((total <= knob).sum())
                want[r, order[: max(1, count)]] = True
                want[r] |= ~np.array(similar_k) | (not similar_q[r])
            shares.append(expect(levels[0, head], want & visible, knob, plan))
    assert varied(shares, block) and (similarity < 0) == all(alike) and any(alike)


@pytest.mark.parametrize("shape, block", CASES)
def test_quest(shape, block):
    q, k, _, plan = make(*shape, block=block)
    visible, diagonal = blocks_of(plan)
    levels = SELECTORS["quest"].levels(q, k, plan)
    for head, queries, keys in float64_heads(q, k, plan):
        pages = [keys[c * block[1] : (c + 1) * block[1]] for c in range(plan.num_k_blocks)]
        low, high = ([getattr(page, name)(axis=0) for page in pages] for name in ("min", "max"))
        for count in (1, 2):
            want = diagonal.copy()
            for i in range(plan.seqlen_q):
                seen = [c for c in range(len(pages)) if c * block[1] <= i + plan.offset]
                bound = {c: np.maximum(queries[i] * low[c], queries[i] * high[c]).sum() for c in seen}
                for c in sorted(seen, key=lambda c: -bound[c])[:count]:
                    want[i // block[0], c] = True
            got = levels[0, head] <= count
            assert (got != (want & visible)).sum() <= 1  # float32 may turn two pages that are nearly level


@pytest.mark.parametrize("shape, block", CASES)
def test_blasst(shape, block):
    q, k, _, plan = make(*shape, block=block)
    visible, _ = blocks_of(plan)
    diagonal = grid.diagonal_blocks(plan)
    levels = SELECTORS["blasst"].levels(q, k, plan)
    shares = []
    for head, queries, keys in float64_heads(q, k, plan):
        s = plan.softmax_scale * queries @ keys.T
        for lam in (1.0, 0.5, 0.05):
            want = diagonal.copy()
            for r in range(plan.num_q_blocks):
                rows = range(r * block[0], min((r + 1) * block[0], plan.seqlen_q))
                running = dict.fromkeys(rows, -math.inf)
                for c in range(plan.num_k_blocks):
                    skip, tops = True, {}
                    for i in rows:
                        seen = [s[i, j] for j in range(c * block[1], min((c + 1) * block[1], i + plan.offset + 1))]
                        tops[i] = max(seen, default=-math.inf)
                        if seen and tops[i] >= running[i] + math.log(lam):
                            skip = False
                    if not skip:
                        want[r, c] = True
                        running = {i: max(running[i], tops[i]) for i in rows}
            shares.append(expect(levels[0, head], want & visible, -math.log(lam), plan))
    assert varied(shares, block)


# --- all of them -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_odd_inputs(name):
    """Nothing crashes; what is always kept and never kept stays so; with SALE a NaN selects whatever could see it."""
    shapes = [(1, 1), (1, 70), (129, 129), (200, 150)]
    for nq, nk in shapes:
        for value in (None, np.nan, np.inf, 0.0):
            q, k, _, plan = make(nq, nk, 2, 1)
            if value is not None:
                q[0, -1, 0], k[0, nk // 2] = value, value
            levels = levels_of(SELECTORS[name], q, k, plan, anchors=value is None)
            assert levels.shape == (1, 2, plan.num_q_blocks, plan.num_k_blocks) and levels.dtype == np.float32
            visible, diagonal = grid.visible_blocks(plan), grid.diagonal_blocks(plan) & grid.visible_blocks(plan)
            assert not np.isnan(levels).any()
            assert np.isneginf(levels[:, :, diagonal]).all() and np.isposinf(levels[:, :, ~visible]).all()
            if value is None:
                assert np.isneginf(levels[:, :, grid.anchor_blocks(plan) & visible]).all()
            if name.startswith("int8") and value is np.nan:
                assert np.isneginf(levels[:, :, visible]).all()


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_grouped_heads(name):
    q, k, _, plan = make(200, 200, 4, 2)
    other = make(200, 200, 4, 2, seed=1)
    both_q, both_k = (np.concatenate([x, y]) for x, y in ((q, other[0]), (k, other[1])))
    levels = SELECTORS[name].levels(both_q, both_k, plan.replace(batch=2))
    assert np.array_equal(levels[1], SELECTORS[name].levels(other[0], other[1], plan)[0])
    alone = SELECTORS[name].levels(q[:, :, 3:], k[:, :, 1:], plan.replace(num_heads=1, num_kv_heads=1))
    np.testing.assert_allclose(levels[0, 3], alone[0, 0], rtol=1e-5, atol=1e-5)


def test_rejected():
    q, k, v, plan = make(200, 200)
    with pytest.raises(ArgumentError, match="causal"):
        levels_of(SELECTORS["quest"], q, k, plan.replace(causal=False))
    with pytest.raises(ArgumentError, match="causal"):
        frontier.Comparison(q, k, v, plan.replace(causal=False))


# --- costs -----------------------------------------------------------------------------------------------------------
def test_costs():
    """Counted one by one."""
    *_, plan = make(300, 310, block=(64, 32), full_rows=70)
    pairs = sum(i + 11 for i in range(300))
    tested = [i for i in range(300) if i % 64 % 4 == 0 or i // 64 >= 230 // 64]
    count = {name: {p.what: (p.operations * pairs, p.bits) for p in SELECTORS[name].cost(plan)} for name in NAMES}
    assert count["int8"]["estimate"] == (pytest.approx(pairs), 8)
    assert count["int4/4"]["estimate"] == (pytest.approx(sum(i + 11 for i in tested)), 4)
    assert count["int8-sp24/4"]["estimate"] == (pytest.approx(sum(i + 11 for i in tested) / 2), 8)
    anchors = sum(64 * len(oracle.anchor_keys(t, 300, 310, True)) for t in range(5))
    assert count["int8"]["anchor statistics"][0] >= anchors / 2  # without keys past the tile's last row
    assert count["int8"]["anchor statistics"][0] <= anchors
    assert count["minference"] == {"last 64 rows": (pytest.approx(64 * 310), 16)}
    blocks = int(blocks_of(plan)[0].sum())
    assert count["flexprefill"]["pooled q.k"][0] == pytest.approx(10 + blocks)
    assert count["sparge"]["pooled q.k"][0] == pytest.approx(blocks)
    assert count["xattention-8"]["antidiagonals"] == (pytest.approx(pairs / 8), 16)
    assert count["quest"]["bounds of pages"][0] == pytest.approx(2 * pairs / 32)
    assert count["sink-local"] == {}
    assert costs.equivalent([costs.Product(1.0, 8, ""), costs.Product(0.5, 4, "")]) == 0.625
    assert SELECTORS["sink-local"].work(plan, 0.3) == pytest.approx(0.3)
    assert SELECTORS["oracle-mass"].work(plan, 0.3) == pytest.approx(0.8)
    assert SELECTORS["blasst"].work(plan, 0.3) == pytest.approx(0.65)  # q.k once, p.v for what is kept


# --- the frontier ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def comparison():
    q, k, v = (salekit.load_sample()[name][:, :900] for name in "qkv")
    plan = call_checks.make_plan(q, k, v, estimator="int8", block=(64, 32), dense_below=0, sink=32, local=32)
    return frontier.Comparison(q, k, v, plan)


def test_nothing_beats_the_oracle(comparison):
    best, _ = comparison.points(SELECTORS["oracle-mass"], [0.3, 0.5])
    levels = SELECTORS["oracle-mass"].levels(comparison.q, comparison.k, comparison.plan)
    for point in best:
        np.testing.assert_allclose(point.density, point.wanted, atol=1 / comparison.plan.visible_blocks.sum())
    for name in ("exact", "int8", "xattention-8", "quest", "sparge-topk", "blasst"):
        for got, bound in zip(comparison.points(SELECTORS[name], [0.3, 0.5])[0], best):
            same = ~np.isnan(got.recall)
            assert (got.recall <= bound.recall + 2e-3)[same].all(), name
    # The mass that attention kept is that of the blocks.
    mask = mask_at(levels, np.array([-0.2, -1.0]), comparison.plan)
    every = SELECTORS["oracle-mass"].levels(comparison.q, comparison.k, comparison.plan)
    measured = comparison.group.measure(mask)
    diagonal = grid.diagonal_blocks(comparison.plan)
    lost = np.where(mask.to_dense() | diagonal | np.isinf(every), 0, -every).sum(axis=(0, 2, 3)) / 900
    np.testing.assert_allclose(measured.recall, 1 - lost, atol=1e-4)


def test_points_are_what_a_call_gives(comparison):
    """The mask at the knob that is reported has the density that is reported."""
    (point,), _ = comparison.points(SELECTORS["int8"], [0.4])
    *_, mask = salekit.sparse_attention(
        comparison.q, comparison.k, salekit.load_sample()["v"][:, :900], thresholds=list(point.knob * (1 - 1e-6)),
        estimator="int8", block=(64, 32), dense_below=0, sink=32, local=32, return_mask=True,
    )
    np.testing.assert_allclose(mask.density()[0], point.density, atol=2 / comparison.plan.visible_blocks.sum())
    np.testing.assert_allclose(point.density, 0.4, atol=1 / comparison.plan.visible_blocks.sum())


def test_one_setting_for_all_heads(comparison):
    shared = frontier.Comparison(comparison.q, comparison.k, salekit.load_sample()["v"][:, :900], comparison.plan, True)
    (point,), _ = shared.points(SELECTORS["int8"], [0.5])
    assert point.knob[0] == point.knob[1] and abs(point.density[0] - point.density[1]) > 0.01
    assert point.density.mean() == pytest.approx(0.5, abs=1e-2)


def test_limits_and_ties():
    inf = np.inf
    assert frontier._limits(np.array([1.0, 2, 3, 4]), 2) == (2.0, 2.0, 1.0)
    assert frontier._limits(np.array([1.0, 3, 3, 3, 3]), 2) == (1.0, 3.0, 0.25)
    assert frontier._limits(np.array([-inf, -inf, 3]), 2)[2] == 1
    for values, count in (([-inf, -inf, 3], 1), ([3.0, 3], 1), ([1.0], 2), ([1.0], 0)):
        assert math.isnan(frontier._limits(np.array(values), count)[2])


def test_interpolated_between_tied_levels(comparison):
    """A family of two masks: its points lie on the line between them."""
    plan = comparison.plan
    steps = np.where(np.arange(plan.num_k_blocks) % 2 == 0, 1.0, 2.0)
    levels = np.broadcast_to(steps, (1, 2, plan.num_q_blocks, plan.num_k_blocks)).astype(np.float32)
    selector = Selector("two", lambda q, k, plan: np.stack([[grid.finish(x, plan) for x in levels[0]]]),
                        costs.none, "x", "", "")
    at = [comparison.group.measure(mask_at(selector.levels(None, None, plan), [x, x], plan)) for x in (1, 2)]
    (point, too_sparse, all_), sparsest = comparison.points(selector, [0.8, 0.01, 1.0])
    low, high = at[0].density, at[1].density
    weight = (0.8 - low) / (high - low)
    assert (0 < weight).all() and (weight < 1).all()
    np.testing.assert_allclose(point.density, 0.8, atol=5e-3)
    np.testing.assert_allclose(point.recall, at[0].recall + weight * (at[1].recall - at[0].recall), atol=1e-3)
    assert np.isnan(too_sparse.recall).all() and np.allclose(all_.recall, 1, atol=1e-4) and (sparsest > 0.01).all()
