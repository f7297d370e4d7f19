"""The routes that there are."""

import pytest

from rollout_server.http.routes import label


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/sessions/secret/v1/completions", "/v1/completions"),
        ("/sessions/secret/v1beta/openai/chat/completions", "/v1/chat/completions"),
        ("/sessions/secret/v1/reward", "/v1/reward"),
        ("/v1/models/anything", "/v1/models/{model}"),
        ("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel"),
        ("/sessions/secret", "other"),
        ("/sessions/secret/sessions/secret/v1/completions", "other"),
        ("/v1/whatever", "other"),
    ],
)
def test_a_route_is_one_of_a_few(path, route):
    assert label(path) == route
