"""Byte-pair encoding with the vocabulary and merges of a GGUF file."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import lru_cache
from itertools import islice, pairwise
from typing import Iterator

from salekit.errors import FileFormatError

PRE = ("smollm", "qwen2")  # ``tokenizer.ggml.pre``: how a text falls into words before the merges


@lru_cache(maxsize=1)
def _patterns() -> dict[str, tuple[str, ...]]:
    r"""By ``tokenizer.ggml.pre``: each pattern splits what the one before it found."""
    # \w is letters, numbers and _; ``re`` has no class for Unicode's numbers alone: \d lacks ½ and ², for example.
    number = "".join(chr(c) for c in range(sys.maxunicode) if unicodedata.category(chr(c))[0] == "N")
    letter, other = rf"[^\W_{number}]", r"(?:[^\s\w]|_)"
    gpt2 = rf"'(?:[stmd]|re|ve|ll)| ?{letter}+| ?[{number}]+| ?{other}+|\s+(?!\S)|\s+"
    qwen2 = (
        rf"'(?i:[stmd]|re|ve|ll)|(?:[^\S\r\n]|{other})?{letter}+|[{number}]| ?{other}+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"smollm": (rf"[{number}]|[^{number}]+", gpt2), "qwen2": (qwen2,)}


def byte_letters() -> list[str]:
    """The printable letter for each byte in a GPT-2 vocabulary: itself where it is one, else from 256 on."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) if byte in own else chr(256 + others.index(byte)) for byte in range(256)]


class Tokenizer:
    """Text to tokens and back. Special tokens are text like any other, and nothing is added at the start."""

    def __init__(self, tokens: list[str], merges: list[str], pre: str):
        if pre not in PRE:
            raise FileFormatError(f"tokenizer.ggml.pre: got {pre!r}; wants {' or '.join(PRE)}")
        self.tokens = tokens
        self._ids = {token: index for index, token in enumerate(tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._patterns = [re.compile(pattern) for pattern in _patterns()[pre]]
        self._letters = byte_letters()
        self._byte_of = {letter: byte for byte, letter in enumerate(self._letters)}
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The tokens of a text, or the first ``limit`` of them."""
        return list(islice((token for word in self._words(text, 0) for token in self._word(word)), limit))

    def decode(self, ids: list[int]) -> str:
        """The text again. A character that is cut off becomes U+FFFD; a special token shows by its name."""
        letters = "".join(self.tokens[index] for index in ids)
        parts = (bytes([self._byte_of[x]]) if x in self._byte_of else x.encode() for x in letters)
        return b"".join(parts).decode(errors="replace")

    def _words(self, text: str, level: int) -> Iterator[str]:
        if level == len(self._patterns):
            yield text
            return
        for match in self._patterns[level].finditer(text):
            yield from self._words(match[0], level + 1)

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            parts = [self._letters[byte] for byte in word.encode()]
            while len(parts) > 1:  # merge the pair that was learned first
                ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(parts)]
                best = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[best] == len(self._ranks):
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            self._known[word] = [self._ids[part] for part in parts]
        return self._known[word]
