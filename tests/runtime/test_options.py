"""options.py: choices that are looked up late; types and ranges are tested with the options of a run."""

from dataclasses import dataclass

import pytest

from hf_ddpm.runtime.options import check_options, listed, option

KINDS = ["green", "black"]


@dataclass(frozen=True)
class Tea:
    """Options of a test."""

    kind: str = option("green", "leaves", choices=lambda: KINDS)
    cake: str = option("none yet", "beside it", examples=("apple",))
    sugar: int | None = option(None, "lumps", choices=(1, 2))

    def __post_init__(self):
        check_options(self)


def test_choices_are_those_of_the_moment(monkeypatch):
    assert Tea(kind="black").kind == "black"
    with pytest.raises(ValueError) as error:
        Tea(kind="blak")
    assert str(error.value) == "kind is 'blak' (did you mean 'black'?); allowed: green, black"
    monkeypatch.setattr(f"{__name__}.KINDS", [*KINDS, "blak"])
    assert Tea(kind="blak").kind == "blak"


def test_examples_restrict_nothing():
    assert Tea(cake="anything").cake == "anything"


def test_choices_that_are_numbers():
    assert Tea(sugar="2").sugar == 2 and Tea().sugar is None
    with pytest.raises(ValueError, match="sugar is 3; allowed: 1, 2"):
        Tea(sugar=3)


def test_what_is_listed():
    assert listed({"choices": lambda: (name for name in KINDS)}, "choices") == KINDS
    assert listed({"choices": ("a",)}, "choices") == ["a"] and listed({}, "choices") == []
