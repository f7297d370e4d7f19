"""Images in requests: token-exact over turns, as the trainer sees them, and within limits."""

import base64
import copy
import io
import os
import re
import signal
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from support import MIB, eventually, under_way
from vision import (
    ask,
    change,
    data_url,
    far,
    idefics3,
    picture,
    rendered,
    seen_logprobs,
    tokens,
    user,
    user_over_http,
)

from rollout_server import attach
from rollout_server.errors import SamplingError

pytestmark = pytest.mark.timeout(300)
A, B, C = picture(1), picture(2, (70, 30)), picture(3, (33, 64))


@pytest.fixture(scope="module")
def policy():
    return idefics3()


@pytest.fixture(scope="module")
def server(policy):
    model, processor = policy
    with attach(
        model, processor, kv_cache_memory_bytes=64 * MIB, max_model_len=1024, progress=False
    ) as server:
        yield server


def test_the_engine_sees_what_the_trainer_sees_over_three_changes_of_weights(server, policy):
    model, processor = policy
    messages, ids = [user_over_http("What? ", A, B)], rendered(processor, [user("What? ", A, B)])
    for of in ("", "", "", "vision"):
        prompt_ids, sampled, logprobs = tokens(ask(server.openai(), messages))
        assert prompt_ids == ids
        own = seen_logprobs(model, processor, prompt_ids, sampled, [A, B])
        assert far(logprobs, own) < 1e-4
        # The check can fail: of other images the model says something else.
        assert far(logprobs, seen_logprobs(model, processor, prompt_ids, sampled, [C, A])) > 0.1
        change(model, of)
        server.sync_weights()
        server.verify_weights()


def test_no_embedding_of_an_image_outlives_a_change_of_the_tower_alone(server, policy):
    model, processor = policy
    messages = [user_over_http("Again? ", A)]
    ids, *_ = tokens(ask(server.openai(), messages, max_tokens=1))
    for _ in range(2):
        change(model, "vision")
        server.sync_weights()
        _, sampled, logprobs = tokens(ask(server.openai(), messages))
        assert far(logprobs, seen_logprobs(model, processor, ids, sampled, [A])) < 1e-4


def test_turns_of_a_session_go_on_from_their_tokens(server, policy):
    model, processor = policy
    with server.session() as session:
        client, messages, before = session.openai(), [], []
        for turn, images in enumerate(([A, B], [], [C, A], [B])):
            messages.append(user_over_http(f"Turn {turn}. ", *images))
            prompt_ids, sampled, logprobs = tokens(answer := ask(client, messages))
            assert prompt_ids[: len(before)] == before
            so_far = [[A, B], [A, B], [A, B, C, A], [A, B, C, A, B]][turn]
            own = seen_logprobs(model, processor, prompt_ids, sampled, so_far)
            assert far(logprobs, own) < 1e-4
            messages.append(
                {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
            )
            before = [*prompt_ids, *sampled]
        (row,) = session.trajectory()  # no turn was a branch of its own
        assert [*row.prompt_ids, *row.completion_ids] == before


def test_tokens_that_a_client_sends_back_stand_for_their_images(server, policy):
    model, processor = policy
    first = [user_over_http("One. ", A)]
    prompt_ids, sampled, _ = tokens(answer := ask(server.openai(), first))
    said = answer["choices"][0]["message"]["content"]
    told = {"role": "assistant", "content": said, "prompt_token_ids": prompt_ids}
    told["generation_token_ids"] = sampled
    second = [*first, told, user_over_http("Two. ", B)]
    ids, more, logprobs = tokens(ask(server.openai(), second))
    assert ids[: len(prompt_ids) + len(sampled)] == [*prompt_ids, *sampled]
    assert far(logprobs, seen_logprobs(model, processor, ids, more, [A, B])) < 1e-4


def test_what_cant_be_exact_is_refused_by_name(server):
    first = [user_over_http("One. ", A)]
    prompt_ids, sampled, _ = tokens(answer := ask(server.openai(), first))
    told = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
    told |= {"prompt_token_ids": prompt_ids, "generation_token_ids": sampled}
    other = [user_over_http("One. ", B), told, {"role": "user", "content": "Two."}]
    refused(server, {"messages": other}, "the messages hold image.*that this server knows")


def post(server, path, request):
    headers = {"authorization": f"Bearer {server.api_key}"}
    request = {"model": "policy"} | request
    return httpx.post(server.base_url + path, json=request, headers=headers, timeout=60)


def refused(server, request, told):
    answer = post(server, "/chat/completions", {"max_tokens": 1} | request)
    assert answer.status_code == 400, answer.text[:500]
    message = answer.json()["error"]["message"]
    assert re.search(told, message), message


def png(width, height):
    """A PNG whose header says so; of a few bytes, as a decompression bomb is."""

    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack("!I", len(data)) + name + data + struct.pack("!I", check)

    header = struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)
    nothing = zlib.compress(b"\0" * 1000)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", nothing) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def part(url, **more):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}, **more}]}]


SMALL = data_url(A)
TIFF = io.BytesIO()
A.save(TIFF, "TIFF")
ATTACKS = {
    "a bomb": (part(png(60000, 60000)), "3600000000 pixels.*give at most"),
    "a large one": (part(png(6000, 6000)), "6000 x 6000 pixels"),
    "many that are large": (
        [{"role": "user", "content": part(png(5000, 5000))[0]["content"] * 6}],
        "all images up to this one",
    ),
    "many": ([{"role": "user", "content": part(SMALL)[0]["content"] * 65}], "more than 64 images"),
    "no image": (part("data:image/png;base64,AAAA"), "isn't an image that can be read"),
    "a script": (
        part("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()),
        "isn't an image that can be read",
    ),
    "a rare kind": (
        part("data:image/tiff;base64," + base64.b64encode(TIFF.getvalue()).decode()),
        "give one of PNG",
    ),
    "no base64": (part("data:image/png,AAAA"), "data:image/png;base64"),
    "bad base64": (part("data:image/png;base64,???"), "aren't base64"),
    "half an image": (part(SMALL[: len(SMALL) // 2 // 4 * 4]), ""),
    "a name for it": (part(SMALL, uuid="a"), r"uuid is 'a'.*leave it out"),
    "a name alone": ([{"role": "user", "content": [{"type": "image_url", "uuid": "a"}]}], "uuid"),
    "an object": ([{"role": "user", "content": [{"type": "image_pil", "image_pil": "a"}]}], "pil"),
    "a video": (
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": SMALL}}]}],
        "(?i)video",
    ),
    "from elsewhere": (part("http://127.0.0.1:1/a.png"), "nothing is fetched"),
    "from disk": (part("file:///etc/passwd"), "nothing is fetched"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_by_name(server, attack):
    messages, told = ATTACKS[attack]
    refused(server, {"messages": messages}, told)


def test_tokens_of_images_that_arent_there_do_no_harm(server, policy):
    _, processor = policy
    for text in ("<image>" * 9, "<fake_token_around_image><global-img><image>", "<image>\n"):
        answer = ask(server.openai(), [{"role": "user", "content": text}], max_tokens=1)
        assert answer["choices"]
        mixed = ask(server.openai(), [user_over_http(text, A)], max_tokens=1)
        assert mixed["choices"]
    ids = [processor.image_token_id] * 9
    assert server.generate(ids, {"max_tokens": 1})[0].ids


def test_other_dialects(server):
    source = {"type": "base64", "media_type": "image/png", "data": SMALL.partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]
    request = {"max_tokens": 2, "messages": [{"role": "user", "content": content}]}
    answer = post(server, "/messages", request)
    assert answer.status_code == 200, answer.text
    source["data"] = png(6000, 6000).partition(",")[2]
    answer = post(server, "/messages", request)
    assert answer.status_code == 400 and "6000 x 6000" in answer.text
    item = {"type": "input_image", "image_url": SMALL, "detail": "auto"}
    request = {"max_output_tokens": 2, "input": [{"role": "user", "content": [item]}]}
    answer = post(server, "/responses", request)
    assert answer.status_code == 200, answer.text


def test_generate_takes_images(server, policy):
    model, processor = policy
    greedily = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    messages = [[user("One. ", A)], [user("Two. ", B, A)], [{"role": "user", "content": "Three."}]]
    seen = [[A], [B, A], []]
    completions = server.generate(messages, greedily)
    by_ids = server.generate([c.prompt_ids for c in completions], greedily, images=seen)
    for completion, same, images in zip(completions, by_ids, seen, strict=True):
        assert completion.ids == same.ids
        if images:
            own = seen_logprobs(model, processor, completion.prompt_ids, completion.ids, images)
            assert far(completion.logprobs, own) < 1e-4
    with pytest.raises(SamplingError, match="must hold 2 images"):
        server.generate(completions[0].prompt_ids, greedily, images=[[A, B]])
    once = processor.tokenizer("<image> One.")["input_ids"]  # not expanded
    with pytest.raises(SamplingError, match="must hold 1 images"):
        server.generate(once, greedily, images=[[A]])
    stray = [*completions[0].prompt_ids, processor.image_token_id]
    with pytest.raises(SamplingError, match="no such token besides"):
        server.generate(stray, greedily, images=[[A]])
    with pytest.raises(SamplingError, match="decoded"):
        server.generate([user("One. ", "a.png")], greedily)


def test_a_generation_goes_on_with_the_image_as_the_new_tower_sees_it(server, policy):
    model, processor = policy
    messages = [user_over_http("Long. ", A)]
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, server.openai(), messages, max_tokens=150)
        eventually(lambda: under_way(server))
        before = copy.deepcopy(model)
        change(model, "vision")
        server.sync_weights()
        answer = asked.result(120)
    prompt_ids, sampled, logprobs = tokens(answer)
    (spans,) = answer["policy_versions"]
    assert len(spans) == 2, spans
    at = spans[0]["end"]
    for of, there in ((before, slice(0, at)), (model, slice(at, None))):
        own = seen_logprobs(of, processor, prompt_ids, sampled, [A])
        assert far(logprobs[there], own[there]) < 1e-4


@pytest.mark.models  # it costs another engine's start
def test_a_generation_outlives_its_engine_and_its_images(server, policy):
    model, processor = policy
    messages = [user_over_http("Long. ", A)]
    ask(server.openai(), messages, max_tokens=1)  # the image is known to the engine
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask, server.openai(), messages, max_tokens=150)
        eventually(lambda: under_way(server))
        os.kill(server.engine_pid, signal.SIGKILL)
        prompt_ids, sampled, logprobs = tokens(asked.result(200))
    own = seen_logprobs(model, processor, prompt_ids, sampled, [A])
    assert far(logprobs, own) < 1e-4
