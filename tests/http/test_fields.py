"""Every field of vLLM's requests is allowed, refused or ours: a new one is noticed. No engine."""

import typing

import pytest
import vllm_fields as table
from vllm_fields import vllms_app

from rollout_server import vllm_compat
from rollout_server.http import routes
from rollout_server.http.refusals import refuse_content
from rollout_server.http.responses import BadRequest
from rollout_server.http.tokens import fields as tokens
from rollout_server.http.tokens import options

ANY = ("x", 1, ["x"], {"x": "x"})


@pytest.fixture(scope="module")
def models():
    """(path, model) of each request that a route of vLLM's which is served takes."""
    found = []
    for route in vllms_app().routes:
        if routes.known("POST", route.path) and "POST" in (getattr(route, "methods", None) or ()):
            for body in route.dependant.body_params:
                kind = body.field_info.annotation
                found += [(route.path, model) for model in typing.get_args(kind) or (kind,)]
    return [(path, model) for path, model in found if hasattr(model, "model_fields")]


@pytest.fixture(scope="module")
def older():
    """Whether vLLM is of a version before the table's."""
    version = vllm_compat.require_vllm().split("+")[0].split(".")[:2]
    return tuple(map(int, version)) < table.VERSION


def test_the_table_has_the_models_of_all_routes_that_are_served(models, older):
    names = {model.__name__ for _, model in models}
    paths = {path for path, _ in models}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/messages"} <= paths
    assert names <= table.MODELS.keys(), "new models of requests: put them into vllm_fields.py"
    assert older or names == table.MODELS.keys()


@pytest.mark.core
def test_every_field_has_its_class(models, older):
    for path, model in models:
        listed, there = table.MODELS[model.__name__].names, set(model.model_fields)
        new = there - listed - set(table.GONE.split())
        assert not new, f"{path}: new fields {sorted(new)}: put each into vllm_fields.py"
        gone = listed - there - set(table.LATER.split())
        assert older or not gone, f"{path}: vLLM has no {sorted(gone)} any more"


def test_no_field_has_an_alias(models):
    """By which it would pass under another name."""
    for path, model in models:
        aliases = {n: f.alias for n, f in model.model_fields.items() if f.alias not in (None, n)}
        assert not aliases, f"{path}: {aliases}"


@pytest.mark.parametrize("name", table.MODELS)
def test_what_is_refused_is_refused_by_name(name):
    fields = table.MODELS[name]
    for field in [*fields.refused.split(), *table.GONE.split()]:
        for value in ANY:
            with pytest.raises(BadRequest, match=f"^{field} is "):
                refuse_content("/v1/chat/completions", {field: value})


@pytest.mark.parametrize("name", table.MODELS)
def test_what_is_allowed_passes(name):
    for field in table.MODELS[name].allowed.split():
        refusals = [_refusal({field: value}) for value in ANY]
        assert None in refusals, f"{field} is refused whatever it is: {refusals}"


def test_ours_are_not_vllms(models):
    ours = set(table.OURS.split())
    assert ours == {*options.NAMES, tokens.PREFIX}
    for path, model in models:
        assert ours.isdisjoint(model.model_fields), path


def _refusal(request):
    try:
        refuse_content("/v1/chat/completions", request)
    except BadRequest as error:
        return str(error)
    return None
