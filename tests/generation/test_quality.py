"""A sampler by one word: what the sweep beside the model recommends, for one call, and refused in words."""

import json
import re
import shutil

import pytest
import torch

from hf_ddpm import DDPMPipeline
from hf_ddpm.cli import main
from hf_ddpm.evaluation.sweep import sweep
from hf_ddpm.evaluation.sweep_config import SweepConfig
from hf_ddpm.folders.layout import SWEEP, SWEEP_PLOT
from hf_ddpm.folders.sweep import choose, read_sweep, sweep_of
from hf_ddpm.generation.quality import Sampler, kept_scheduler
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.publishing.card import CardFacts, make_card
from hf_ddpm.publishing.publish import collect
from tests.evaluation.commands import CLASSIFIER
from tests.folders.sweeps import cell


@pytest.fixture(scope="module")
def swept(tiny_folder, tmp_path_factory):
    """A model whose sweep says: fast is ddim:trailing in 2 steps, best is unipc in 4. To be read only."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("swept") / "model")
    config = SweepConfig(
        model=str(folder),
        dataset="digits",
        extractor=CLASSIFIER,
        num_samples=10,
        steps=[2, 4],
        schedulers=["ddim:trailing", "unipc"],
    )
    sweep(config, "hf-ddpm sweep model digits")
    report = json.loads((folder / SWEEP).read_text())
    made_up = {
        ("ddim:trailing", 2): cell("", 2, 2.1, 0.3, 1),
        ("ddim:trailing", 4): cell("", 4, 9.0, 0.3, 2),
        ("unipc", 2): cell("", 2, 9.0, 0.3, 3),
        ("unipc", 4): cell("", 4, 2.0, 0.3, 4),
    }
    for found in report["cells"]:
        distance = made_up[found["sampler"], found["steps"]].distance
        found |= {"value": distance.value, "stderr": distance.stderr}
        found["left_out"] = distance.left_out.tolist()
    report["of"]["num_samples"] = 8  # as many as the made-up errors are of
    report["floor"] |= {"value": 1.0, "stderr": 0.0, "left_out": [1.0] * 8}
    (folder / SWEEP).write_text(sweep_of(report).text())
    return folder


@pytest.fixture
def pipeline(swept):
    return load(swept)


def load(folder, **how):
    found = DDPMPipeline.from_pretrained(folder, **how)
    found.set_progress_bar_config(disable=True)
    return found


def noise():
    return torch.Generator().manual_seed(0)


def draw(pipeline, **how):
    return pipeline(3, noise(), output_type="pt", **how).images


def test_it_draws_as_the_sweep_says_and_changes_nothing(swept, pipeline, caplog):
    own = pipeline.scheduler
    config, entry = dict(own.config), dict(pipeline.config)
    own.set_timesteps(7)
    before, timesteps = draw(pipeline), own.timesteps.clone()
    fast, best = draw(pipeline, quality="fast"), draw(pipeline, quality="best")
    assert pipeline.scheduler is own and dict(own.config) == config and dict(pipeline.config) == entry
    assert torch.equal(own.timesteps, timesteps)
    torch.testing.assert_close(draw(pipeline), before, rtol=0, atol=0)

    other = load(swept)
    swap_scheduler(other, "ddim", timestep_spacing="trailing")
    torch.testing.assert_close(fast, draw(other, num_inference_steps=2), rtol=0, atol=0)
    swap_scheduler(other, "unipc", timestep_spacing="linspace")  # its own, as diffusers has it
    torch.testing.assert_close(best, draw(other, num_inference_steps=4), rtol=0, atol=0)
    assert caplog.text.count("quality 'fast' is ddim:trailing, 2 steps: FD 2.10 ± 0.30 of 8 samples") == 1
    draw(pipeline, quality="fast")
    assert caplog.text.count("quality 'fast' is") == 1  # told once
    # Another sampler that the user chose neither matters nor is lost
    torch.testing.assert_close(draw(other, quality="fast"), fast, rtol=0, atol=0)
    assert type(other.scheduler).__name__ == "UniPCMultistepScheduler"


def test_all_arguments_are_handed_on(pipeline):
    calls = []
    out = pipeline(
        3,
        [torch.Generator().manual_seed(i) for i in range(3)],
        quality="best",
        output_type="np",
        return_dict=False,
        max_batch_size=2,
        pred_original_steps=[0, -1],
        callback_on_step_end=lambda pipeline, step, t, tensors: calls.append(len(tensors["sample"])),
        image_shape=(1, 16, 16),
    )
    images, x_0s = out
    assert images.shape == (3, 16, 16, 1) and list(x_0s) == [0, -1]
    assert calls == [2] * 4 + [1] * 4


def test_it_is_restored_after_an_error(pipeline):
    own = pipeline.scheduler
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipeline(0, quality="fast")
    with pytest.raises(KeyError), kept_scheduler(pipeline):
        Sampler("heun").give_to(pipeline)
        assert pipeline.scheduler is not own
        raise KeyError
    assert pipeline.scheduler is own


def test_half_precision_has_the_sweep_and_other_weights_have_none(swept, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        assert load(swept, torch_dtype=dtype).sweep is not None
    changed = load(swept)
    changed.unet.conv_out.bias.data += 1e-3
    with pytest.raises(
        ValueError, match=f"the {SWEEP} of this model is of other weights than the pipeline's"
    ):
        changed(1, quality="fast")
    changed.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / SWEEP).exists()


def test_saved_with_the_pipeline(swept, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / SWEEP).read_bytes() == (swept / SWEEP).read_bytes()
    draw(load(tmp_path / "same"), quality="fast")
    half = load(swept, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").sweep is not None


def change(swept, folder, *place, value):
    shutil.copytree(swept, folder)
    report = json.loads((folder / SWEEP).read_text())
    found = report
    for key in place[:-1]:
        found = found[key]
    found[place[-1]] = value
    (folder / SWEEP).write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("of", "weights"), "f" * 16, None),  # and then of none of the three
        (("of", "process"), "f" * 16, "is of another process than the pipeline's; allowed: measure it anew"),
        (("of", "prediction_type"), "sample", "is of another prediction type than the pipeline's"),
        (
            ("of", "scheduler", "clip_sample"),
            False,
            "has clip_sample True, but sweep.json was measured with F",
        ),
        (("cells", 0, "sampler"), "evil", "scheduler 'evil' is unknown"),
        (("cells", 0, "sampler"), "ddim:\x1b[2J", r"has no choice '\\x1b[2J'"),
        (("cells", 0, "steps"), 21, "num_inference_steps is 21; allowed: whole numbers in 1..20"),
        (("cells", 0, "value"), None, "cells[0].value is None; allowed: a number"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_sweeps_of_others(swept, tmp_path, place, value, said):
    folder = change(swept, tmp_path / "model", *place, value=value)
    if said is None:
        report = json.loads((folder / SWEEP).read_text())
        report["of"]["rounded"] = ["a", "b"]
        (folder / SWEEP).write_text(json.dumps(report))
        said = "is of other weights than the pipeline's"
    found = load(folder)
    own = found.scheduler
    with pytest.raises(ValueError, match=re.escape(said).replace(r"\\\\", r"\\")) as error:
        found(1, quality="fast")
    assert len(str(error.value)) <= 300 and "\x1b" not in str(error.value) and found.scheduler is own


def test_refused(swept, pipeline, tiny_folder, monkeypatch):
    with pytest.raises(ValueError, match=r"quality is 'fats' \(did you mean 'fast'\?\); allowed: fast, best"):
        pipeline(1, quality="fats")
    for wrong in (True, 3, ["fast"]):
        with pytest.raises(ValueError, match=r"quality is .*; allowed: fast, best"):
            pipeline(1, quality=wrong)
    with pytest.raises(ValueError, match="num_inference_steps is 5, but quality 'fast' chooses it"):
        pipeline(1, quality="fast", num_inference_steps=5)
    message = f"quality is 'fast', but '{tiny_folder}' has no {SWEEP}; allowed: after hf-ddpm sweep MODEL"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tiny_folder)(1, quality="fast")
    made = DDPMPipeline(pipeline.unet, pipeline.scheduler)
    assert made.sweep is None
    with pytest.raises(ValueError, match=r"the pipeline was not loaded from a folder with a sweep\.json"):
        made(1, quality="best")
    changed = load(swept)
    changed.scheduler.variance_type = "fixed_small"
    with pytest.raises(ValueError, match="has variance_type 'fixed_small', but"):
        changed(1, quality="fast")


def test_on_the_command_line(swept, tmp_path, capfd, caplog):
    flags = ["--num-images", "2", "--out"]
    main(["sample", str(swept), *flags, str(tmp_path / "a"), "--quality", "fast"])
    assert "quality 'fast' is ddim:trailing, 2 steps: " in caplog.text
    chosen = ["--scheduler", "ddim", "--steps", "2", "--timestep-spacing", "trailing"]
    main(["sample", str(swept), *flags, str(tmp_path / "b"), *chosen])
    for name in ("00000.png", "00001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for words, said in (
        (["--steps", "3"], "--steps is 3, but quality 'fast' chooses it; allowed: one of the two"),
        (["--scheduler", "ddim"], "--scheduler is 'ddim', but quality 'fast' chooses it"),
        (["--variance-type", "fixed_small"], "--variance-type is 'fixed_small', but quality 'fast' chooses"),
        (["--timestep-spacing", "leading"], "--timestep-spacing is 'leading', but quality 'fast' chooses it"),
        (["--quality", "worst"], "--quality is 'worst'; allowed: fast, best"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["sample", str(swept), *flags, str(tmp_path / "c"), "--quality", "fast", *words])
        assert stop.value.code == 2 and said in capfd.readouterr().err and not (tmp_path / "c").exists()


# Published with the model


def test_the_card_and_what_goes(swept, tmp_path):
    model = shutil.copytree(swept, tmp_path / "model")
    publication = collect(model, "me/model")
    assert {SWEEP, SWEEP_PLOT} <= publication.files.keys()
    card = publication.files["README.md"].decode()
    assert "## Which sampler, how many steps?" in card and f"]({SWEEP_PLOT})" in card
    assert (
        "| | 2 steps | 4 steps |\n|---|---|---|\n| `ddim:trailing` | **2.10 ± 0.30** | 9.00 ± 0.30 |" in card
    )
    assert "Take ddim:trailing, 2 steps: FD 2.10 ± 0.30" in card and 'pipeline(16, quality="fast")' in card
    assert "reach 1.00 ± 0.00" in card and "hf-ddpm sweep model digits" in card

    (model / SWEEP).write_text((model / SWEEP).read_text().replace(read_sweep(model).of.weights, "f" * 16))
    assert not {SWEEP, SWEEP_PLOT} & collect(model, "me/model").files.keys()
    (model / SWEEP).write_text("{}")
    with pytest.raises(ValueError, match="has no label"):
        collect(model, "me/model")


def test_a_strangers_sweep_stays_text_in_the_card(swept):
    report = json.loads((swept / SWEEP).read_text())
    evil = "[x](https://evil) | <script> ![a](b) `"
    report["cells"][0]["sampler"] = report["label"] = evil
    report["data"] |= {"dataset": evil, "split": evil}
    report["command"] = "```\n# evil"
    files = {path.relative_to(swept).as_posix(): path for path in swept.rglob("*") if path.is_file()}
    card = make_card({**files, SWEEP: json.dumps(report).encode()}, CardFacts("me/model"))
    body = card[card.index("## Which sampler") : card.index("## How it was made")]
    for active in ("](https:", "<script>", "![a]", "\n# evil"):
        assert active not in body
    report["cells"][0]["value"] = "2"
    with pytest.raises(ValueError, match="value is '2'; allowed: a number"):
        make_card({**files, SWEEP: json.dumps(report).encode()}, CardFacts("me/model"))


def test_choices_of_samplers(tiny_folder):
    assert (
        str(Sampler.parse("unipc")) == "unipc"
        and str(Sampler.parse("ddpm:fixed_large")) == "ddpm:fixed_large"
    )
    pipeline = load(tiny_folder)
    Sampler.parse("ddim:trailing").give_to(pipeline)
    Sampler.parse("ddim").give_to(pipeline)  # nothing of one remains in the next
    assert pipeline.scheduler.config.timestep_spacing == "leading"
    learned = load(tiny_folder)
    learned.scheduler.register_to_config(variance_type="learned_range")
    learned.trained_with(learned.scheduler)
    with pytest.raises(ValueError, match="the network learns its variance"):
        Sampler.parse("ddpm:fixed_small").give_to(learned)


def test_choose_is_what_quality_takes(swept):
    fast, best = choose(read_sweep(swept).cells)
    assert (fast.name, best.name) == ("ddim:trailing, 2 steps", "unipc, 4 steps")
