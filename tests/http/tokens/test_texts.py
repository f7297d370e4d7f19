"""Tokens of texts: what is long holds nobody up, and what is too long isn't tokenised."""

import asyncio
import copy
import threading

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout_server.http.tokens.splice import Known, Splicer
from rollout_server.http.tokens.texts import Texts, characters_per_token


class Slow:
    """A tokenizer of bytes that says where it works, and waits to be let on with what is long."""

    eos_token_id, all_special_ids, all_special_tokens = 0, [0], ["<end>"]

    def __init__(self):
        self.threads, self.inside, self.most = [], 0, 0
        self.go_on = threading.Event()

    def encode(self, text, add_special_tokens=False):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.threads.append(threading.current_thread())
        if len(text) > 10_000:
            assert self.go_on.wait(10)
        self.inside -= 1
        return list(text.encode())


async def test_long_texts_leave_the_loop_to_others_and_the_tokenizer_to_one():
    slow = Slow()
    texts = Texts(slow)
    assert await texts.encode("short") == list(b"short")
    long = asyncio.ensure_future(texts.encode("x" * 100_000))
    async with asyncio.timeout(10):
        while not slow.inside:
            await asyncio.sleep(0.001)
    short = asyncio.ensure_future(texts.encode("short"))
    await asyncio.sleep(0)
    slow.go_on.set()
    assert (await long, await short) == ([120] * 100_000, list(b"short"))
    here = threading.current_thread()
    assert [thread is here for thread in slow.threads] == [True, False, False]
    assert slow.most == 1


async def test_texts_that_are_surely_too_long_are_told_without_tokens(tokenizer):
    texts = Texts(copy.deepcopy(tokenizer), 100)
    each = characters_per_token(tokenizer)
    assert each == max(map(len, tokenizer.get_vocab()))
    longest = max(tokenizer.get_vocab(), key=len)
    text = tokenizer.convert_tokens_to_string([longest]) * 100
    assert not texts.too_long(text) and len(await texts.encode(text)) <= 100
    assert texts.too_long(text + "x" * 100 * each)
    assert not Texts(tokenizer).too_long("x" * 10_000_000)


def made(model=None, normalizer=None, pre=None, **added):
    tokenizer = Tokenizer(model or models.BPE({"a": 0, "bb": 1}, [], byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if added:
        tokenizer.add_special_tokens([AddedToken("<mark>", **added)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "tokenizer, each",
    [
        (made(), 2),
        (made(normalizer=normalizers.NFC()), 8),
        (made(normalizer=normalizers.Replace(" ", "_")), 2),
        (made(normalizer=normalizers.Replace("  ", "_")), None),
        (made(normalizer=normalizers.Strip()), None),
        (made(pre=pre_tokenizers.Whitespace()), None),
        (made(pre=pre_tokenizers.Split("a", "removed")), None),
        (made(pre=pre_tokenizers.Split("a", "isolated")), 2),
        (made(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True)), None),
        (made(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), None),
        (made(rstrip=True), None),
        (made(rstrip=False), 6),
        (Slow(), None),
    ],
)
def test_what_a_token_can_stand_for_is_known_of_tokenizers_that_keep_all(tokenizer, each):
    assert characters_per_token(tokenizer) == each


async def test_templates_are_kept_within_a_bound_and_long_texts_not_spliced(tokenizer):
    texts = Texts(copy.deepcopy(tokenizer), 50)
    splicer = Splicer(texts, ())

    async def render(messages, generation):
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)

    say = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    more = [*say, {"role": "user", "content": "c"}]
    for number in range(200):
        ids = await splicer.splice(more, Known(1, [5], [6]), render, number)
        assert ids[:2] == [5, 6] and len(ids) > 2
    assert len(splicer._frames) <= 64

    def never(*_, **__):
        raise AssertionError("tokenised")

    texts.tokenizer.encode = never
    more[-1]["content"] = "c" * 100_000
    assert await splicer.splice(more, Known(1, [5], [6]), render, 199) is None
