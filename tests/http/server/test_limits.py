"""Many clients, slow clients, and clients that want more than their share."""

import asyncio
import json
import re
import resource
import socket
import time
from collections import Counter
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from support import held, soon

from rollout_server.http.middleware.admission import AdmissionQueue
from rollout_server.http.middleware.stack import layered
from rollout_server.http.server.connections import JoinedWrites
from rollout_server.http.server.limits import Limits
from rollout_server.http.server.listener import Listener, listen
from rollout_server.http.sessions import Sessions
from rollout_server.lifecycle.gate import Gate

KEY = "key-of-the-tests"
HEADERS = {"authorization": f"Bearer {KEY}"}


# -- turns ------------------------------------------------------------------------------------


async def test_sessions_take_turns():
    """A thousand requests of one session aren't all in front of another's single one."""
    admission, order = AdmissionQueue(2), []

    async def ask(owner, number):
        await admission.enter(owner)
        order.append((owner, number))
        await asyncio.sleep(0)
        admission.leave()

    many = [asyncio.ensure_future(ask("greedy", i)) for i in range(1000)]
    await asyncio.sleep(0)
    assert (admission.running, admission.queued) == (2, 998)
    few = [asyncio.ensure_future(ask(owner, 0)) for owner in ("a", "b", None)]
    await asyncio.gather(*many, *few)
    at = [order.index((owner, 0)) for owner in ("a", "b", None)]
    assert max(at) <= 2 + 2 * 3
    assert [n for owner, n in order if owner == "greedy"] == [*range(1000)]  # each in its order
    assert (admission.running, admission.queued) == (0, 0)


async def test_a_turn_is_not_lost_with_who_leaves():
    admission = AdmissionQueue(1)
    await admission.enter("a")
    waiting = [asyncio.ensure_future(admission.enter(owner)) for owner in "bcd"]
    await asyncio.sleep(0)
    waiting[0].cancel()  # while it waits
    await asyncio.sleep(0)
    admission.leave()
    waiting[1].cancel()  # at the moment when it is let in
    await asyncio.gather(*waiting, return_exceptions=True)
    assert waiting[2].done() and not waiting[2].cancelled()
    assert (admission.running, admission.queued) == (1, 0)
    admission.leave()
    assert admission.running == 0


# -- writes -----------------------------------------------------------------------------------


class Transport:
    """What is written to it, in pieces."""

    def __init__(self):
        self.pieces, self.closed = [], False

    def write(self, data):
        self.pieces.append(bytes(data))

    def writelines(self, parts):
        self.pieces.append(b"".join(parts))

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed


async def test_what_is_written_in_one_turn_of_the_loop_goes_out_as_one():
    out = JoinedWrites(asyncio.get_running_loop())
    out.transport = told = Transport()
    out.write(b"header")
    out.write(b"body")
    assert told.pieces == []
    await asyncio.sleep(0)
    assert told.pieces == [b"headerbody"]
    large = b"x" * 100_000  # what is large doesn't wait: a slow client is noticed by it
    out.write(b"header")
    out.write(large)
    assert told.pieces[1:] == [b"header" + large]
    out.write(b"end")
    out.close()
    assert told.closed and told.pieces[2:] == [b"end"]
    out.write(b"late")
    await asyncio.sleep(0)
    assert told.pieces[3:] == []


# -- limits, over a small app of the tests' own -----------------------------------------------


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
    served = layered(app, KEY, gate, lambda: 1, Sessions(), ["policy"], 100, {}, limits)
    listener = Listener(served, sock, limits)
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
    await soon(lambda: not small.listener._server.server_state.connections)
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
    await soon(lambda: not small.listener._server.server_state.connections)


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\nx: ", _HEAD + b"\r\n\r\n"])
async def test_always_one_more_byte_is_not_enough(small, head):
    if b"POST" in head:
        head = head.replace(b"\r\n\r\n", b"\r\ncontent-length: 9999\r\n\r\n")
    _, writer = await asyncio.open_connection("127.0.0.1", small.port)
    writer.write(head)
    drip = asyncio.ensure_future(dripping(writer, b" "))
    await soon(lambda: small.listener._server.server_state.connections)
    await soon(lambda: not small.listener._server.server_state.connections)
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
    await soon(lambda: not small.listener._server.server_state.connections)
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


# -- the running server -----------------------------------------------------------------------


@pytest.mark.slow
async def test_one_session_does_not_starve_another(server):
    """With 600 requests before it, another session's single one is among the first answered."""
    greedy, modest = server.session(), server.session()
    answered = []

    async def ask(session, client, text):
        await client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": text}],
            max_tokens=8,
            extra_body={"ignore_eos": True},
        )
        answered.append(session)

    many, one = greedy.async_openai(max_retries=0), modest.async_openai(max_retries=0)
    await asyncio.to_thread(server.sleep)
    tasks = [asyncio.ensure_future(ask(greedy, many, f"{i}")) for i in range(600)]
    await soon(lambda: held(server) == 600, within=60)
    await asyncio.to_thread(server.wake)
    await soon(lambda: len(answered) > 0, 60)
    await ask(modest, one, "one")
    place = answered.index(modest)
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    running = server._engine.client.vllm_config.scheduler_config.max_num_seqs
    assert place < len(answered) - running, (place, running)
    for client, session in ((many, greedy), (one, modest)):
        await client.close()
        session.end()


CONNECTIONS = 2000


@pytest.mark.slow
async def test_two_thousand_connections_are_held_over_a_sleep(server):
    """Each is answered once, and takes another request after that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS + 1024  # both ends are in this process
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files, the hard limit is {hard}")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    url = urlsplit(server.base_url)
    body = json.dumps({"model": "policy", "prompt": [5], "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.api_key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"

    async def ask(reader, writer):
        writer.write(head.encode() + body)
        got = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", got)[1])
        answer = json.loads(await reader.readexactly(length))
        return int(got.split(b" ", 2)[1]), answer.get("id")

    opening = [asyncio.open_connection(url.hostname, url.port) for _ in range(CONNECTIONS)]
    ends = await asyncio.gather(*opening)
    try:
        await asyncio.to_thread(server.sleep)
        asked = [asyncio.ensure_future(ask(*end)) for end in ends]
        await soon(lambda: held(server) == CONNECTIONS, within=60)
        assert not any(one.done() for one in asked)
        await asyncio.to_thread(server.wake)
        answers = await asyncio.wait_for(asyncio.gather(*asked), 180)
        assert Counter(status for status, _ in answers) == {200: CONNECTIONS}
        assert len({name for _, name in answers}) == CONNECTIONS
        again = await asyncio.gather(*[ask(*end) for end in ends[:100]])
        assert {status for status, _ in again} == {200}
    finally:
        for _, writer in ends:
            writer.close()
