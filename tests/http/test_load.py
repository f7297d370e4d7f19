"""Many clients of the running server."""

import asyncio
import json
import re
import resource
from collections import Counter
from urllib.parse import urlsplit

import inside
import pytest
from support import held, soon


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
    running = inside.most_at_a_time(server)
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
