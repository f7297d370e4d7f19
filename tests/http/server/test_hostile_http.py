"""HTTP that is malformed, smuggled or too large, sent to a running server."""

import gzip
import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest
from attacks import CHAT, COMPLETIONS, chat, completion
from hostile import post, raw, refused, status_of
from over_http import key, root
from support import MIB

from rollout_server import RolloutConfig

pytestmark = pytest.mark.slow


def test_headers_that_steer_vllm_are_refused(answering):
    refused(post(answering, *chat(), headers={"x-data-parallel-rank": "5"}), "data-parallel")
    body = gzip.compress(json.dumps(chat()[1]).encode())
    refused(post(answering, CHAT, body, headers={"content-encoding": "gzip"}), "content-encoding")
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "a" * 999,
    ):
        answer = post(answering, *chat(), headers={"content-type": kind})
        assert answer.status_code in (400, 415), kind


def test_forwarded_addresses_change_nothing(answering):
    headers = {"x-forwarded-for": "127.0.0.1", "x-forwarded-host": "a", "forwarded": "for=a"}
    answer = httpx.get(root(answering) + "/version", headers=headers)
    assert answer.status_code == 401


def smuggled(server, *fields, body=b""):
    head = [f"POST {COMPLETIONS} HTTP/1.1", "host: x", *fields, "connection: close"]
    head += [f"authorization: Bearer {server.api_key}", "content-type: application/json", "", ""]
    return raw(server, "\r\n".join(head).encode() + body)


def test_requests_of_two_lengths_are_refused(answering):
    for fields in (
        ["content-length: 4", "transfer-encoding: chunked"],
        ["content-length: 4", "content-length: 5"],
        ["content-length: -1"],
        ["content-length: 1e9"],
        ["content-length: 99999999999999999999"],
        ["transfer-encoding: chunked, identity"],
    ):
        answer = smuggled(answering, *fields, body=b"4\r\nabcd\r\n0\r\n\r\n")
        assert answer.split(b" ", 2)[1] in (b"400", b"413"), (fields, answer)


def test_garbage_is_refused(answering):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\na\x00b: c\r\n\r\n",
        b"GET / HTTP/1.1\r\n: c\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nhost: x\r\n\r\n",
    ):
        answer = raw(answering, garbage)
        assert answer.split(b" ", 2)[1] in (b"400", b"401", b"404", b"505"), (garbage, answer)


def test_large_headers_are_refused(answering):
    many = [f"x-{i}: y" for i in range(1000)]
    assert status_of(answering, "GET", "/version", *many) == 431
    assert status_of(answering, "GET", "/version", "x: " + "y" * 100_000) == 431
    assert status_of(answering, "GET", "/version?" + "y" * 65_000, "x: " + "y" * 900) == 431
    assert status_of(answering, "GET", "/version?" + "y" * 100_000) in (400, 431)
    assert status_of(answering, "GET", "/version?" + "y" * 10_000) == 200
    # One that never ends isn't waited for.
    url = urlsplit(answering.base_url)
    with socket.create_connection((url.hostname, url.port), timeout=20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nx: ")
        with pytest.raises(OSError):  # a reset, or a broken pipe
            while True:
                sock.sendall(b"y" * 65536)


@pytest.mark.parametrize("head", ["x: ", "content-length: 9999999999\r\n\r\n"])
def test_who_is_refused_while_sending_reads_why(answering, head):
    """No reset comes in the place of the answer, or of its end."""
    url = urlsplit(answering.base_url)
    start = f"POST {COMPLETIONS} HTTP/1.1\r\nauthorization: Bearer {answering.api_key}\r\n{head}"
    with socket.create_connection((url.hostname, url.port), timeout=20) as sock:
        sock.sendall(start.encode() + b"y" * 70_000)
        answer = sock.recv(65536)  # it is refused, and goes on sending
        for _ in range(20):
            sock.sendall(b"y" * 65536)
        sock.shutdown(socket.SHUT_WR)
        while part := sock.recv(65536):
            answer += part
    assert int(answer.split(b" ", 2)[1]) in (413, 431)
    assert b"too large" in answer or b"send less" in answer


def test_large_bodies_are_refused(answering):
    most = RolloutConfig().max_body_bytes
    answer = smuggled(answering, f"content-length: {most + 1}")  # before it is sent
    assert answer.startswith(b"HTTP/1.1 413"), answer

    def endless():
        for _ in range(100):
            yield b" " * MIB

    try:
        answer = httpx.post(root(answering) + CHAT, content=endless(), headers=key(answering))
    except httpx.WriteError:
        pass  # cut while it was sent
    else:
        assert answer.status_code == 413


def test_chunked_bodies_are_taken(answering):
    body = json.dumps(completion()[1]).encode()
    answer = httpx.post(
        root(answering) + COMPLETIONS,
        content=(bytes([b]) for b in body),
        timeout=30,
        headers=key(answering) | {"content-type": "application/json"},
    )
    assert answer.status_code == 200, answer.text
