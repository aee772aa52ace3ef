"""hub.py: names that the Hub would refuse, hours later, are refused at once."""

import pytest

from hf_ddpm.runtime import hub
from hf_ddpm.runtime.hub import (
    asking_the_hub,
    check_branch,
    check_license,
    check_repo_id,
    looks_like_path,
    near_path,
)

TOKEN = "hf_" + "a1B2c3D4" * 4


@pytest.mark.parametrize("value", ["me/photos", "photos", "a-b/c.d_e", "x" * 96])
def test_repositories(value):
    check_repo_id("push_to_hub", value)


@pytest.mark.parametrize(
    "value",
    ["", "a/b/c", "/a", "a/", "a b", "a--b/c", "a.git", "é/b", "a\n", "x" * 97, "../x", TOKEN, ["a"], 3],
)  # fmt: skip
def test_no_repositories(value):
    with pytest.raises(ValueError, match=r"push_to_hub is .*; allowed: user/name of letters") as error:
        check_repo_id("push_to_hub", value)
    assert TOKEN not in str(error.value)


def test_licences():
    for value in ("apache-2.0", "mit", "cc-by-4.0", "other", "openrail++"):
        check_license("license", value)
    for value in ("MIT", "apache 2.0", "", "mit\nlicense: x", ["a"], None, {"a": 1}, TOKEN, "x" * 5000):
        with pytest.raises(ValueError, match=r"license is .*; allowed: as the Hub writes it") as error:
            check_license("license", value)
        assert TOKEN not in str(error.value) and len(str(error.value)) < 280
    with pytest.raises(ValueError, match=r"did you mean 'apache-2.0'\?"):
        check_license("license", "apach-2.0")


def test_branches():
    for value in ("main", "v1.0", "refs/pr/1", "a_b-c/d"):
        check_branch("revision", value)
    for value in (
        "",
        "a b",
        '"',
        'x")\nimport os',
        "a..b",
        "/a",
        "a/",
        "-a",
        "a.lock",
        "é",
        TOKEN,
        "x" * 101,
        3,
    ):
        with pytest.raises(ValueError, match=r"revision is .*; allowed: a branch"):
            check_branch("revision", value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with photos/2024, Data/faces, a file notes and a parquet file in it."""
    for name in ("photos/2024", "Data/faces", "runs/photos"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notes").write_text("no folder")
    (tmp_path / "Data" / "train.parquet").write_text("")
    monkeypatch.chdir(tmp_path)
    hub._say.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("phtos", "photos"),
        ("phtos/", "photos"),
        ("./PHOTOS", "photos"),
        ("photos/2042", "photos/2024"),
        ("phots/2024", "photos/2024"),
        ("phots/2042", "photos/2024"),
        ("data/faces", "Data/faces"),
        ("data/trian.parquet", "Data/train.parquet"),
        ("run/photo", "runs/photos"),
        ("note", None),  # a file is no folder
        ("photos", None),
        ("somebody/faces", None),
        ("photos/2024/deeper", None),
        ("x" * 5000, None),
        ("a\0b", None),
        ("../nowhere/at/all", None),
    ],
)
def test_paths_that_were_meant(here, name, near):
    assert near_path(name, ".parquet") == near
    if near is not None and not name.startswith("."):
        assert near_path(str(here / name), ".parquet") == str(here / near)


def test_the_hub_is_asked_aloud_and_once(here, caplog, monkeypatch):
    for name in ("phtos", "phtos", "somebody/faces", "no name of the Hub", "a/b/c"):
        asking_the_hub(name)
    monkeypatch.setenv("RANK", "1")
    asking_the_hub("other/faces")
    assert caplog.messages == [
        "no folder 'phtos' here (did you mean 'photos'?); asking the Hub",
        "no folder 'somebody/faces' here; asking the Hub",
    ]


def test_what_can_only_be_a_path():
    assert all(map(looks_like_path, ["/x", "./x", "../x", "~x", "~/x", "x/", "a/b/c", "a\\b", "."]))
    assert not any(map(looks_like_path, ["x", "a/b", "a.b/c", "a-b"]))
