"""Hostile clients of a running server."""

import json
import socket
import threading
from urllib.parse import urlsplit

import over_http
from support import eventually


def post(server, path, request, **options):
    """`request`: JSON, or the bytes of a body."""
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    return over_http.post(server, path, content=body, headers=headers, timeout=30, **options)


def refused(answer, named):
    """400 in OpenAI's form (or Anthropic's) that names the field."""
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert named in message, message
    assert "Traceback" not in message and "site-packages" not in message


def raw(server, request, timeout=10):
    """What the server answers to the bytes of a request."""
    url = urlsplit(server.base_url)
    with socket.create_connection((url.hostname, url.port), timeout=timeout) as sock:
        sock.sendall(request)
        answer = b""
        while part := sock.recv(65536):
            answer += part
        return answer


def status_of(server, method, target, *fields):
    """The status of the answer, 0 where there is none."""
    lines = [f"{method} {target} HTTP/1.1", "host: x", "connection: close", *fields]
    lines += [f"authorization: Bearer {server.api_key}", "", ""]
    answer = raw(server, "\r\n".join(lines).encode())
    return int(answer.split(b" ", 2)[1]) if answer else 0


class Listening:
    """A port of its own, which nothing may connect to."""

    def __enter__(self):
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port, self._clients = self._sock.getsockname()[1], []
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self):
        while True:
            try:
                connection, client = self._sock.accept()
            except OSError:
                return
            connection.close()
            self._clients.append(client)

    def connections(self):
        """How many there were before one of our own: they are taken in their order."""
        with socket.create_connection(("127.0.0.1", self.port)) as own:
            eventually(lambda: own.getsockname() in self._clients)
            return self._clients.index(own.getsockname())

    def __exit__(self, *_):
        self._sock.close()
