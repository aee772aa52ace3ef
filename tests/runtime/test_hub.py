"""hub.py: names that the Hub would refuse, hours later, are refused at once."""

import pytest

from hf_ddpm.runtime.hub import check_branch, check_license, check_repo_id

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
