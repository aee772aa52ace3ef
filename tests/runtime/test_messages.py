"""messages.py: errors in one line, the name that was meant, and no token anywhere."""

import pytest

from hf_ddpm.runtime.messages import did_you_mean, nearest, one_line, redact

TOKEN = "hf_" + "a1B2c3D4" * 4


def test_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError" and one_line("") == ""
    assert one_line("x" * 300) == "x" * 300 and one_line("x" * 301, limit=None) == "x" * 301
    assert one_line("a" * 200 + "b" * 200) == "a" * 148 + " ... " + "b" * 147


def test_the_name_that_was_meant():
    assert nearest("lineer", ("cosine", "linear")) == "linear"
    assert nearest("zzz", ("cosine", "linear")) is None
    assert nearest("zzz", ("cosine",), cutoff=0) == "cosine" and nearest("zzz", (), cutoff=0) is None
    assert nearest(25, {256: 0, 32: 0}) == "256"
    assert did_you_mean("lineer", {"linear": 0}) == " (did you mean 'linear'?)"
    assert did_you_mean("zzz", ("linear",)) == did_you_mean(None, ()) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {TOKEN}, used", "token ***, used"),
        (f"api_org_{TOKEN[3:]}", "***"),
        ("https://me:secret@host/x", "https://***@host/x"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=***&y=1"),
        ("hf_short and hf_hub stay", "hf_short and hf_hub stay"),
    ],
)
def test_tokens_and_passwords(text, shown):
    assert redact(text) == shown


def test_further_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an unusual token")
    assert redact("an unusual token, s3cret-pass", "s3cret-pass", None, True) == "***, ***"
    monkeypatch.setenv("HF_TOKEN", "word")
    assert redact("a word") == "a word"  # too short to be told from one
