"""Text to tokens and back. What is long is done in a thread: 16 MiB of text take seconds, in which
all streams would stand still."""

import asyncio
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rollout_server.completion import text_tokenizer

_SHORT = 8 << 10  # characters; a millisecond or two on the loop
_IDS = 2 << 10  # likewise tokens
# Steps of a tokenizer that drop no character; those that compose make at most four into one.
_KEEPING = {"ByteLevel", "Digits", "Metaspace", "Prepend", "Split", "Regex", "String"}
_COMPOSING = {"NFC", "NFD", "NFKC", "NFKD"}


class Texts:
    """One tokenizer's, which must be its own: it isn't thread-safe. Used on one loop.

    longest: most tokens of a text that can be of use; None for no such number.
    """

    def __init__(self, tokenizer: Any, longest: int | None = None):
        self.tokenizer = text_tokenizer(tokenizer)
        self.longest = longest
        each = characters_per_token(self.tokenizer)
        self._most = None if longest is None or each is None else longest * each
        self._turn = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "rollout-server-tokenizer")

    def too_long(self, text: str) -> bool:
        """Whether a text surely has more tokens than `longest`, told without making them."""
        return self._most is not None and len(text) > self._most

    async def encode(self, text: str, special: bool = False) -> list[int]:
        """special: whether with the tokens that the tokenizer puts around a text."""
        ids: list[int] = await self._done(self._encode, len(text) <= _SHORT, text, special)
        return ids

    async def decode(self, ids: Sequence[int]) -> str:
        """Special tokens included."""
        text: str = await self._done(self._decode, len(ids) <= _IDS, ids)
        return text

    async def _done(self, work: Callable[..., Any], short: bool, *args: Any) -> Any:
        if short and self._turn.acquire(blocking=False):  # else the thread has the tokenizer
            try:
                return work(*args)
            finally:
                self._turn.release()
        return await asyncio.get_running_loop().run_in_executor(
            self._worker, self._locked, work, *args
        )

    def _locked(self, work: Callable[..., Any], *args: Any) -> Any:
        with self._turn:
            return work(*args)

    def _encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def characters_per_token(tokenizer: Any) -> int | None:
    """The most characters of a text that one token can stand for; None where a tokenizer may drop
    characters, or have one token for many that it doesn't know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    steps = f"{backend.normalizer!r} {backend.pre_tokenizer!r}"
    names = set(re.findall(r"\b([A-Z]\w*)\(", steps)) - {"Sequence"}
    knows_all = backend.model.byte_fallback or "ByteLevel" in names
    drops = "removed" in steps.lower() or not _single_replacements(steps)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    absorbs = any(token.lstrip or token.rstrip for token in added)
    if not knows_all or drops or absorbs or names - _KEEPING - _COMPOSING - {"Replace"}:
        return None
    longest = max(map(len, tokenizer.get_vocab()))
    return longest * (4 if names & _COMPOSING else 1)


def _single_replacements(steps: str) -> bool:
    """Whether what is replaced is a single character by at least one."""
    replaced = r'Replace\(pattern=String\("(?:[^"\\]|\\.)"\), content="[^"]+"\)'
    return steps.count("Replace(") == len(re.findall(replaced, steps))
