"""Secrets are taken out of texts and of settings."""

from rollout_server.observability.redact import remember, scrub, scrubbed


def test_secrets_are_taken_out_by_form_by_value_and_by_name(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "value-of-the-key")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("MY_TOKEN", "1")
    remember("a server's key")
    gone = [
        "value-of-the-key",
        "a server's key",
        "hf_" + "a" * 34,
        "sk-" + "b" * 20,
        "rollout-" + "c" * 32,
        "ses-" + "d" * 24,
    ]
    for secret in gone:
        assert secret not in scrub(f"x {secret} y {secret}")
    assert "abc" not in scrub("POST http://h/sessions/abc/v1/completions")
    assert "pass1" not in scrub("http://user:pass1@proxy:3128/")
    assert "abcdefgh" not in scrub("Authorization: Bearer abcdefgh")
    kept = "falsehood, 1 of 2: a session's rollout-server at http://127.0.0.1:8000/v1"
    assert scrub(kept) == kept
    told = scrubbed({"hf_token": "short", "max_tokens": 5, "on": True, "list": ["sk-" + "b" * 20]})
    assert told == {"hf_token": "[secret]", "max_tokens": 5, "on": True, "list": ["[secret]"]}
