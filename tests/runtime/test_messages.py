"""messages.py: errors in one line, the name that was meant, and no token anywhere."""

import os

import pytest

from hf_ddpm.runtime.messages import did_you_mean, nearest, one_line, redact, shown

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


# Where a token may come from, and how it may be written


@pytest.fixture
def no_token(monkeypatch):
    """A machine whose client has no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")


@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [
        ("HF_TOKEN_PATH", "{}/mine", "mine"),
        ("HF_TOKEN_PATH", "$PLACE/mine", "mine"),
        ("HF_HOME", "{}", "token"),
        ("HF_HOME", "~", "token"),
        ("XDG_CACHE_HOME", "{}", "huggingface/token"),
        ("HOME", "{}", ".cache/huggingface/token"),
    ],
)
def test_the_token_of_the_client_s_file(variable, value, file, no_token, monkeypatch, tmp_path):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, value.format(tmp_path))
    place = tmp_path / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("of-no-known-form\n")
    assert redact("x of-no-known-form y") == "x *** y"
    place.write_text("another-of-them")  # after a new login
    assert redact("another-of-them, of-no-known-form") == "***, of-no-known-form"
    (place.parent / "stored_tokens").write_text(
        "[of-no-known-form]\nhf_token = second-one\nexpires_at = 1700000000"
    )
    assert redact("second-one of-no-known-form 1700000000") == "*** of-no-known-form 1700000000"


def test_a_client_that_was_loaded_with_another_environment(no_token, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("of-no-known-form")
    monkeypatch.setattr("huggingface_hub.utils._auth._GOOGLE_COLAB_SECRET", "of a notebook")
    monkeypatch.setattr("huggingface_hub.utils._auth._OIDC_TOKEN_CACHE", {"token": "of a pipeline"})
    assert redact("of-no-known-form, of a notebook, of a pipeline") == "***, ***, ***"


def test_a_token_file_that_is_none(no_token, monkeypatch, tmp_path):
    """A pipe gives its content once, and that to the client; a folder and a file of zeros give nothing."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text("")
    for place in (
        tmp_path / "pipe",
        tmp_path,
        "/dev/zero",
        tmp_path / "empty",
        tmp_path / "gone",
        "a\udcffb",
    ):
        monkeypatch.setenv("HF_TOKEN_PATH", str(place))
        assert redact("some words") == "some words"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"hf_oauth_{TOKEN[3:]}.a-b_c/x", "***/x"),
        (f"hf_jwt_{TOKEN[3:]}", "***"),
        (f"https://h/x?a=1&access_token={TOKEN}#y", "https://h/x?a=1&access_token=***#y"),
        ("https://h/x?X-Amz-Signature=0a1b&y=1", "https://h/x?X-Amz-Signature=***&y=1"),
        ("{'Authorization': 'Bearer abcdefgh12'}", "{'Authorization': 'Bearer ***'}"),
        ("authorization: Basic YWxhZGRpbjpvcGVu", "authorization: Basic ***"),
        ("a bearer certificate, basic training", "a bearer certificate, basic training"),
        ("runs/hf_ddpm_digits-experiment-01/x.png", "runs/hf_ddpm_digits-experiment-01/x.png"),
    ],
)
def test_forms_of_secrets(text, shown, no_token):
    assert redact(text) == shown


def test_a_token_is_hidden_however_it_is_written(no_token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "it's\\ a &token")
    for text in ("it's\\ a &token", repr("it's\\ a &token"), "https://h/it%27s%5C%20a%20%26token"):
        assert "token" not in redact(text).removesuffix("token'")


def test_no_token_is_cut_in_two(no_token):
    """What is shortened is redacted first: the rest of a token would have no form."""
    for start in range(120, 160):
        assert "a1B2" not in one_line("x" * start + " " + TOKEN + " " + "y" * 300)


def test_what_a_bad_value_looks_like():
    assert shown("x") == "'x'" and shown(3) == "3" and shown(TOKEN) == "'***'"
    assert shown("x" * 5000) == "'" + "x" * 37 + " ... " + "x" * 36 + "'"
    assert shown(16**6000) == "int too large to print"
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "list too large to print"
