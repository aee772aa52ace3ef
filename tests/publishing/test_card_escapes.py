"""card.py: what a stranger's files say stands in a card as text, and nothing of it is obeyed."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_ddpm.publishing.card import CardFacts, as_text, fence, make_card

EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=y>",
    "[x](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "a | b\n| c | d |",
    "`` ` ``` ````",
    "\n---\nlicense: mit\n---\n",
    "x\r\n# Heading\r\n",
    "*a* _b_ **c** ~~d~~ $e$",
    "https://evil.example www.evil.example",
    "{{ config }} {% raw %}",
    "\"quoted\": 'x' #: &a *b !!python/object:os.system",
    "\x1b[2J\u202e\u2028",
    "-->",
]


def card_with(run_folder, text):
    """The card of a run whose files say `text` wherever they say a name."""
    files = {path: run_folder / path for path in ("model_index.json", "scheduler/scheduler_config.json")}
    files |= {
        path: run_folder / path for path in ("unet/config.json", "notes.md") if (run_folder / path).exists()
    }
    config = json.loads((run_folder / "train_config.json").read_text())
    config |= {"dataset": text, "split": text, "seed": text, "output_dir": text}
    report = json.loads((run_folder / "evaluation.json").read_text())
    report["data"] |= {"dataset": text, "split": text, "fit": text}
    report["method"] |= {"name": text, "decoder": text, "steps": text}
    report["bits_per_dim"]["variance_type"] = text
    report["sample_metrics"] |= {"extractor": text, "scheduler": text}
    report["command"] = f"hf-ddpm evaluate {text}"
    contents = {"train_config.json": config, "evaluation.json": report}
    files |= {name: json.dumps(content).encode() for name, content in contents.items()}
    training = {"step": text, "images": text, "loss": 0.5}
    return make_card(files, CardFacts("tester/x", training=training))


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_nothing_is_obeyed(run_folder, text):
    card, plain = card_with(run_folder, text), card_with(run_folder, "plain")
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
    assert data.keys() == yaml.safe_load(re.match(r"---\n(.*?)\n---\n", plain, re.DOTALL)[1]).keys()  # type: ignore[index]
    assert ModelCard(card).data.license is None
    prose = without_code(card.split("\n---\n", 1)[1])
    # As many lines, rows and cells, headings, links and pictures as the card of plain names
    for pattern in (
        r"^",
        r"^\|.*\|$",
        r"\|",
        r"^#",
        r"\]\(",
        r"!\[",
        r"<",
        r"`",
        r"\*",
        r"https?://",
        r"www\.",
    ):
        found = [
            len(re.findall(pattern, words, re.MULTILINE))
            for words in (prose, without_code(plain.split("\n---\n", 1)[1]))
        ]
        assert found[0] == found[1], pattern
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\u2028]", card)


def without_code(card):
    """A card without its fenced blocks, which must all be closed."""
    kept, closing = [], None
    for row in card.splitlines():
        ticks = re.match(r"(`{3,})", row)
        if closing is None and ticks:
            closing = ticks[1]
        elif closing is None:
            kept.append(row)
        elif row == closing:
            closing = None
    assert closing is None
    return "\n".join(kept)


def test_plain_names_stay_as_they_are():
    for text in (
        "fixed_large",
        "v_prediction",
        "ResNet@1a2b3c",
        "cifar-10 (small), 2.0",
        "UNet2DModel",
        "é ü 数",
    ):
        assert as_text(text) == text
    assert as_text({"a|b": [1, None, ("<",)]}) == {"a&#124;b": [1, None, ["&#60;"]]}


def test_a_fence_is_longer_than_what_it_holds():
    assert fence("x", 4) == "````" and fence("a ``````", 4) == "`" * 7 and fence(None, 3) == "```"


@pytest.mark.parametrize("license", [["a"], {"a": 1}, "<b>", 3, "x\nlicense: mit"])
def test_a_licence_of_the_config_that_is_none(run_folder, license):
    files = {
        path: run_folder / path
        for path in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    }
    files["train_config.json"] = json.dumps({"license": license}).encode()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"license is .*; allowed: as the Hub writes it"):
        make_card(files, CardFacts("tester/x"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repo_id", "a/b/c"),
        ("revision", 'x")\nprint("'),
        ("dataset_id", "[x](javascript:y)"),
        ("license", "foo"),
    ],
)
def test_facts_that_could_not_be_published(key, value):
    with pytest.raises(ValueError, match=rf"{key} is .*; allowed: "):
        CardFacts(**({"repo_id": "tester/x"} | {key: value}))
