"""What the example reports: likelihood, passkey recall and the time to the first token, for one way of attention."""

from __future__ import annotations

import math
import re
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

import salekit
from salekit.errors import ArgumentError

from .model import Model

LOGIT_ROWS = 512  # positions whose logits exist at once: 150,000 float32 each
ANSWER_TOKENS = 8  # a space, five digits, and what ends them
KEY_DIGITS = 5
BEFORE = "There is a pass key hidden in the text below. Remember it.\n\n"
HIDDEN = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
AFTER = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Attention:
    """Attention as ``Model.forward`` calls it. thresholds: of each layer; None for dense attention."""

    name: str
    thresholds: list[Any] | None
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        if self.thresholds is None or q.shape[1] == 1:  # SALE is for prefill: tokens after it attend to everything
            return salekit.dense_attention(q, k, v)
        return salekit.sparse_attention(q, k, v, **self._options(layer))

    def with_density(self, layer: int, q: Any, k: Any, v: Any) -> tuple[Any, float]:
        """The output, and the density of the mask, mean over the heads."""
        if self.thresholds is None:
            return self(layer, q, k, v), 1.0
        out, mask = salekit.sparse_attention(q, k, v, return_mask=True, **self._options(layer))
        return out, float(mask.density().mean())

    def _options(self, layer: int) -> dict[str, Any]:
        return {"thresholds": self.thresholds[layer], "dense_below": 0, **self.options}


def likelihood(model: Model, ids: list[int], attention: Attention) -> dict[str, float]:
    """Mean negative log-likelihood of each next token, in nats, its exp, and the mean density of the masks."""
    xp, positions, total = model.xp, len(ids) - 1, 0.0
    if positions < 1:
        raise ArgumentError(f"ids: got {len(ids)} tokens; wants at least 2")
    densities: list[float] = []

    def attend(*arguments: Any) -> Any:
        out, density = attention.with_density(*arguments)
        densities.append(density)
        return out

    hidden, following = model.forward(ids, attend), xp.asarray(ids[1:])
    for start in range(0, positions, LOGIT_ROWS):
        rows = slice(start, min(start + LOGIT_ROWS, positions))
        logits, targets = model.logits(hidden[rows]), following[rows]
        top = logits.max(axis=1)
        lse = top + xp.log(xp.exp(logits - top[:, None]).sum(axis=1))
        total += float((lse - logits[xp.arange(len(targets)), targets]).sum())
    nll = total / positions
    return {"mean_nll": nll, "perplexity": math.exp(nll), "density": statistics.fmean(densities)}


def passkey_prompt(model: Model, filler: list[int], tokens: int, key: str, depth: float) -> list[int]:
    """``tokens`` tokens less those of an answer: filler with the key at ``depth`` (0 to 1), and the question."""
    before, hidden, after = (model.tokenizer.encode(text.format(key=key)) for text in (BEFORE, HIDDEN, AFTER))
    room = tokens - ANSWER_TOKENS - len(before) - len(hidden) - len(after)
    if not 0 <= room <= len(filler):
        least = tokens - room
        raise ArgumentError(f"tokens: got {tokens}; wants {least} to {least + len(filler)} with this text")
    split = round(depth * room)
    return before + filler[:split] + hidden + filler[split:room] + after


def recall(
    model: Model, filler: list[int], tokens: int, trials: int, attention: Attention, seed: int = 0
) -> dict[str, Any]:
    """How often greedy decoding gives the five-digit key, one depth a trial, the same keys for the same seed."""
    keys = [str(key) for key in np.random.default_rng(seed).integers(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS, trials)]
    answers, right = [], 0
    for trial, key in enumerate(keys):
        prompt = passkey_prompt(model, filler, tokens, key, (trial + 0.5) / trials)
        answers.append(answer(model, prompt, attention))
        right += (re.findall(r"\d+", answers[-1]) or [""])[0] == key
    return {"recall": right / trials, "right": right, "trials": trials, "keys": keys, "answers": answers}


def answer(model: Model, prompt: list[int], attention: Attention) -> str:
    """ANSWER_TOKENS tokens after a prompt, greedily."""
    cache, ids, new = model.cache(len(prompt) + ANSWER_TOKENS), [], prompt
    while len(ids) < ANSWER_TOKENS:
        ids.append(_next_token(model, model.forward(new, attention, cache)))
        new = ids[-1:]
    return model.tokenizer.decode(ids)


def _next_token(model: Model, hidden: Any) -> int:
    return int(model.logits(hidden[-1:]).argmax())  # int() waits for the GPU


def first_token(model: Model, ids: list[int], ways: list[Attention], repeats: int) -> list[dict[str, Any]]:
    """Of each way: median, least and largest time from the tokens to the first new one, in ms, the ways in turn.

    One call of each before warms up. attention_ms: of one further call, spent in attention, the GPU waited for before
    and after each layer's.
    """

    def seconds(way: Callable[..., Any]) -> float:
        started = time.perf_counter()
        _next_token(model, model.forward(ids, way))
        return time.perf_counter() - started

    for way in ways:
        seconds(way)
    taken = [[seconds(way) for way in ways] for _ in range(repeats)]
    results = []
    for way, samples in zip(ways, zip(*taken)):
        clock = _Clock(model, way)
        seconds(clock)
        statistic = {"median": statistics.median, "min": min, "max": max}
        results.append({
            "first_token_ms": {name: round(1e3 * f(samples), 3) for name, f in statistic.items()},
            "attention_ms": round(1e3 * clock.seconds, 3),
        })
    return results


class _Clock:
    """The same attention, timed."""

    def __init__(self, model: Model, attention: Attention):
        self.attention, self.seconds = attention, 0.0
        self._wait = (lambda: None) if model.xp is np else model.xp.cuda.Device().synchronize

    def __call__(self, *arguments: Any) -> Any:
        self._wait()
        started = time.perf_counter()
        out = self.attention(*arguments)
        self._wait()
        self.seconds += time.perf_counter() - started
        return out
