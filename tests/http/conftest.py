"""Servers under attack."""

import pytest
from attacks import completion
from hostile import post


@pytest.fixture
def answering(server):
    """The shared server, which answers a normal request after the test as before it."""
    yield server
    answer = post(server, *completion())
    assert answer.status_code == 200, answer.text
