"""Text Generation Inference's routes."""

import json

import httpx
import huggingface_hub
import pytest


@pytest.mark.parametrize("suffix", ["", "/v1", "/v1/"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("details", [False, True])
def test_tgis_text_generation(server, tokenizer, monkeypatch, stream, details, suffix):
    """As huggingface_hub calls it, to the URL as it was given."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    prompt, texts = "Once upon a time", []
    with server.session() as session:
        url = session.base_url.removesuffix("/v1") + suffix
        client = huggingface_hub.InferenceClient(base_url=url, api_key=session.api_key)
        asked = dict(stream=stream, details=details, max_new_tokens=6, seed=1, top_n_tokens=2)
        for _ in range(2):
            answer = client.text_generation(prompt, **asked)
            if stream:
                events = list(answer)
                text = "".join(e.token.text if details else e for e in events)
                tokens, last = [e.token for e in events if details], events[-1]
                if details:
                    assert last.generated_text == text and last.details.generated_tokens == 6
                    assert last.details.input_length == len(tokenizer.encode(prompt))
                    assert [e.index for e in events] == list(range(1, 7))
                    assert all(len(e.top_tokens) == 2 for e in events)
            else:
                text = answer.generated_text if details else answer
                tokens, last = answer.details.tokens if details else [], answer
            if details:
                assert last.details.finish_reason == "length" and last.details.seed == 1
                call = session.tree.calls[-1]
                assert [t.id for t in tokens] == session.tree.tokens(call)[1]
                assert [t.logprob for t in tokens] == pytest.approx(call.logprobs)
            prompt, texts = prompt + text, [*texts, text]
        calls = [session.tree.tokens(call) for call in session.tree.calls]
    assert [tokenizer.decode(ids) for _, ids in calls] == texts
    assert calls[1][0] == tokenizer.encode("Once upon a time" + texts[0])


def test_tgis_generate_and_what_it_refuses(server):
    """The route has SGLang's bodies too; those have no `inputs`."""
    root = server.base_url.removesuffix("/v1")
    keyed = httpx.Client(headers={"authorization": f"Bearer {server.api_key}"}, timeout=60)

    def ask(path="/generate", **fields):
        return keyed.post(root + path, json={"inputs": "Hi there", "parameters": fields})

    greedy = [ask(do_sample=False, max_new_tokens=5).json()["generated_text"] for _ in range(2)]
    assert greedy[0] == greedy[1]
    whole = ask(do_sample=False, max_new_tokens=5, return_full_text=True, details=True).json()
    assert whole["generated_text"] == "Hi there" + greedy[0]
    ended = ask(do_sample=False, max_new_tokens=5, stop=[greedy[0][1:3]], details=True).json()
    assert ended["details"]["finish_reason"] == "stop_sequence"
    assert ended["generated_text"].endswith(greedy[0][1:3])
    assert ask("/", do_sample=False, max_new_tokens=5).json()[0]["generated_text"] == greedy[0]
    cut = ask(truncate=1, max_new_tokens=1, details=True)
    assert cut.status_code == 200 and len(cut.json()["details"]["tokens"]) == 1
    streamed = ask("/generate_stream", do_sample=False, max_new_tokens=5).text
    assert json.loads(streamed.strip().split("data: ")[-1])["generated_text"] == greedy[0]
    for bad, named in (
        ({"watermark": True}, "watermark"),
        ({"best_of": 2}, "best_of"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"grammar": {"type": "regex", "value": "a"}}, "response_format"),
        ({"adapter_id": "x"}, "adapter_id"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"tempratur": 1}, "tempratur"),
        ({"stop": [5]}, "stop"),
        ({"truncate": True}, "truncate"),
        ({"top_n_tokens": 9999}, "logprobs"),
    ):
        refused = ask(**bad)
        assert refused.status_code == 422, bad
        assert refused.json()["error_type"] == "validation" and named in refused.json()["error"]
    assert keyed.post(root, json={"inputs": 5}).status_code == 422
    assert keyed.post(root, json={}).status_code == 422
    long = keyed.post(root, json={"inputs": "word " * 5000})
    assert long.status_code == 422 and "maximum context length" in long.json()["error"]
