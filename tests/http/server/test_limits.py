"""Many clients, slow clients, and clients that want more than there is; over a small app."""

import asyncio
import socket
import time
from types import SimpleNamespace

import httpx
import pytest
from small_app import KEY, House
from support import soon

from rollout_server.http.server.limits import Limits
from rollout_server.http.server.listener import Listener, listen
from rollout_server.lifecycle.gate import Gate

HEADERS = {"authorization": f"Bearer {KEY}"}


class App:
    """Answers when it is told to; `cut` counts what ended before."""

    def __init__(self):
        self.go, self.running, self.most, self.cut = asyncio.Event(), 0, 0, 0
        self.parts = 1

    async def __call__(self, scope, receive, send):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-type", b"text/event-stream")]})
            writing = asyncio.ensure_future(self._write(send))
            gone = asyncio.ensure_future(self._gone(receive))
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                self.cut += 1
            writing.cancel()
            gone.cancel()
        finally:
            self.running -= 1

    async def _write(self, send):
        for _ in range(self.parts):
            body = b"data: " + b"x" * 65536 + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _gone(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass


@pytest.fixture
async def small():
    """A listener with small limits: .app, .gate, .url, .port, .hold."""
    limits = Limits(
        body_bytes=10_000,
        bodies=4,
        connections=20,
        held=4,
        running=3,
        patience=0.5,
        header_bytes=4096,
    )
    app, gate, sock = App(), Gate(hold_timeout=5), listen("127.0.0.1", 0)
    gate.open()
    listener = Listener(House(app, gate, limits=limits).app, sock, limits)
    port = sock.getsockname()[1]
    await listener.start()
    yield SimpleNamespace(
        app=app, gate=gate, port=port, url=f"http://127.0.0.1:{port}", listener=listener
    )
    app.go.set()
    gate.open()
    await listener.close(1)


def asking(small, client, **options):
    url = small.url + "/v1/completions"
    return asyncio.ensure_future(client.post(url, json={}, headers=HEADERS, **options))


def queued(small):
    return small.gate.metrics.values()["rollout_server_queued_requests"]


async def test_so_many_run_so_many_wait_and_the_others_are_told_to_come_back(small):
    async with httpx.AsyncClient() as client:
        running = [asking(small, client) for _ in range(3)]
        await soon(lambda: small.app.running == 3)
        waiting = [asking(small, client) for _ in range(4)]
        await soon(lambda: queued(small) == 4)
        late = await asking(small, client)
        assert late.status_code == 503 and int(late.headers["retry-after"]) >= 1
        assert "4 requests wait" in late.json()["error"]["message"]
        small.app.go.set()
        assert [a.status_code for a in await asyncio.gather(*running, *waiting)] == [200] * 7
        assert small.app.most == 3
        assert (await asking(small, client)).status_code == 200


async def test_requests_that_are_held_are_counted_apart_from_those_that_run(small):
    small.gate.close()
    small.app.go.set()
    async with httpx.AsyncClient() as client:
        held = [asking(small, client) for _ in range(4)]
        await soon(lambda: small.gate.held == 4)
        assert (await asking(small, client)).status_code == 503
        assert small.app.running == 0
        small.gate.open()
        assert [a.status_code for a in await asyncio.gather(*held)] == [200] * 4


async def test_who_goes_away_waits_no_longer(small):
    small.gate.close()
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            await asking(small, client, timeout=0.2)
        await soon(lambda: small.gate.held == 0)
        for _ in range(3):
            asking(small, client)
        small.gate.open()
        await soon(lambda: small.app.running == 3)
        with pytest.raises(httpx.ReadTimeout):  # waits for its turn
            await asking(small, client, timeout=0.2)
        small.app.go.set()
        assert (await asking(small, client)).status_code == 200


async def test_a_gate_that_closes_meanwhile_holds_who_waited_for_a_turn(small):
    async with httpx.AsyncClient() as client:
        running = [asking(small, client) for _ in range(3)]
        await soon(lambda: small.app.running == 3)
        waiting = asking(small, client)
        await soon(lambda: queued(small) == 1)
        small.gate.close()
        small.app.go.set()
        await asyncio.gather(*running)
        await soon(lambda: small.gate.held == 1)
        assert not waiting.done()
        small.gate.open()
        assert (await waiting).status_code == 200


async def test_connections_past_their_number_are_told_to_come_back(small):
    held = [await asyncio.open_connection("127.0.0.1", small.port) for _ in range(20)]
    reader, writer = await asyncio.open_connection("127.0.0.1", small.port)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer
    for _, other in [*held, (reader, writer)]:
        other.close()
    await soon(lambda: not small.listener.connections)
    small.app.go.set()
    async with httpx.AsyncClient() as client:
        assert (await asking(small, client)).status_code == 200


_HEAD = b"POST /v1/completions HTTP/1.1\r\nauthorization: Bearer " + KEY.encode()


@pytest.mark.parametrize(
    ("sent", "more", "status"),
    [
        (b"", b"", b""),
        (b"POST /v1/comp", b"a", b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx: ", b"y", b"HTTP/1.1 408"),
        (_HEAD + b"\r\ncontent-length: 100\r\n\r\n{", b" ", b"HTTP/1.1 408"),
        (_HEAD + b"\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n", b"", b"HTTP/1.1 408"),
    ],
    ids=["nothing", "line", "header", "body", "chunks"],
)
async def test_a_client_that_sends_slowly_is_cut(small, sent, more, status):
    reader, writer = await asyncio.open_connection("127.0.0.1", small.port)
    started = time.perf_counter()
    writer.write(sent)
    for _ in range(3):
        await asyncio.sleep(0.1)
        writer.write(more)
    answer = await asyncio.wait_for(reader.read(), 5)
    assert 0.4 < time.perf_counter() - started < 3
    assert answer.startswith(status) and bool(answer) == bool(status)
    writer.close()
    await soon(lambda: not small.listener.connections)


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\nx: ", _HEAD + b"\r\n\r\n"])
async def test_always_one_more_byte_is_not_enough(small, head):
    if b"POST" in head:
        head = head.replace(b"\r\n\r\n", b"\r\ncontent-length: 9999\r\n\r\n")
    _, writer = await asyncio.open_connection("127.0.0.1", small.port)
    writer.write(head)
    drip = asyncio.ensure_future(dripping(writer, b" "))
    await soon(lambda: small.listener.connections)
    await soon(lambda: not small.listener.connections)
    drip.cancel()
    writer.close()


async def dripping(writer, byte):
    while True:
        writer.write(byte)
        await asyncio.sleep(0.1)


async def test_a_client_that_does_not_read_is_cut_and_its_generation_ended(small):
    small.app.go.set()
    small.app.parts = 1000  # more than sockets hold
    sock = socket.create_connection(("127.0.0.1", small.port))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nauthorization: Bearer {KEY}\r\ncontent-length: 2\r\n\r\n"
    )
    sock.sendall(head.encode() + b"{}")
    await soon(lambda: small.app.cut == 1)
    assert small.app.running == 0
    await soon(lambda: not small.listener.connections)
    sock.close()


async def test_many_large_bodies_at_once_are_told_to_come_back(small):
    """So many of the largest are there at a time, and no more."""
    url, largest = small.url + "/v1/completions", b"{}" + b" " * 9_998

    async def post(content):
        return await client.post(url, content=content, headers=HEADERS)

    async with httpx.AsyncClient() as client:
        for _ in range(2):  # what was there is given back
            small.app.go.clear()
            there = [asyncio.ensure_future(post(largest)) for _ in range(4)]
            await soon(lambda: (small.app.running, queued(small)) == (3, 1))
            answer = await post(b"{}")
            assert answer.status_code == 503 and "retry-after" in answer.headers
            small.app.go.set()
            assert [a.status_code for a in await asyncio.gather(*there)] == [200] * 4
            assert (await post(largest + b" ")).status_code == 413
            assert (await post(largest)).status_code == 200
