"""What a hostile client may ask for: each attack of the table against the running server.

One is refused with the status that the table names, or shown to do no harm; after each the server
still answers, and nothing that it was told to fetch, read or run was fetched, read or run.
"""

import time

import pytest
from attacks import HARMLESS, MEDIA, REFUSED, chat, completion, schema, with_part
from hostile import Listening, post, refused
from vision import data_url, picture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("attack", REFUSED)
def test_it_is_refused_by_name(answering, attack):
    path, request, named = REFUSED[attack]
    started = time.perf_counter()
    refused(post(answering, path, request), named)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("where", ["url", "session", "gemini"])
def test_no_way_around_the_refusals(answering, where):
    path, request = chat(chat_template="{{ 1 }}")
    with answering.session() as session:
        prefix = {"url": "", "session": f"/sessions/{session.id}", "gemini": "/v1beta/openai"}
        path = prefix[where] + (path.removeprefix("/v1") if where == "gemini" else path)
        refused(post(answering, path, request), "chat_template")


@pytest.mark.parametrize("kind", MEDIA)
def test_nothing_is_fetched(answering, kind):
    with Listening() as listening:
        for url in (
            f"http://127.0.0.1:{listening.port}/a.png",
            f"HTTP://127.0.0.1:{listening.port}/a",
            f" http://127.0.0.1:{listening.port}/",
            f"https://127.0.0.1:{listening.port}/a",
            "file:///etc/passwd",
            "/etc/passwd",
            "ftp://127.0.0.1/",
            "data :,a",
        ):
            answer = post(answering, *MEDIA[kind](url))
            assert answer.status_code == 400, (url, answer.text)
            assert "root:" not in answer.text
        assert listening.connections() == 0


def test_data_for_a_model_that_takes_none_does_no_harm(answering):
    image = data_url(picture(1))
    for kind in ("image_url", "audio_url", "video_url"):
        part = with_part(**{kind: {"url": image}})
        refused(post(answering, *chat(messages=part)), "not a multimodal model")


def test_a_schema_that_refers_elsewhere_fetches_nothing(answering):
    with Listening() as listening:
        where = f"http://127.0.0.1:{listening.port}/schema.json"
        answer = post(answering, *chat(response_format=schema(**{"$ref": where})))
        assert answer.status_code in (200, 400)
        assert listening.connections() == 0


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc", "policy/../x", "a\x00b", "x" * 10**5])
def test_a_models_name_is_no_path(answering, name):
    answer = post(answering, *completion(model=name))
    assert answer.status_code == 404, answer.text[:200]


@pytest.mark.parametrize("attack", HARMLESS)
def test_it_does_no_harm(answering, attack):
    started = time.perf_counter()
    answer = post(answering, *HARMLESS[attack])
    assert answer.status_code == 200, answer.text
    assert time.perf_counter() - started < 10


def test_a_template_in_a_message_is_text(answering):
    said = "{{ 7 * 7 }}{% x %}"
    messages = [{"role": "user", "content": said}]
    tokens = post(answering, "/tokenize", {"model": "policy", "messages": messages}).json()[
        "tokens"
    ]
    prompt = post(answering, "/detokenize", {"model": "policy", "tokens": tokens}).json()["prompt"]
    assert said in prompt


def test_requests_with_one_id_are_told_apart(answering):
    """An id that a client makes up neither ends nor answers another's request."""
    from concurrent.futures import ThreadPoolExecutor

    path, request = completion(request_id="same", max_tokens=20, ignore_eos=True)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(answering, path, request), range(8)))
    assert {a.json()["usage"]["completion_tokens"] for a in answers} == {20}
