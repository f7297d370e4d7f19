"""What is written to a connection."""

import asyncio

from rollout_server.http.server.connections import JoinedWrites


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
