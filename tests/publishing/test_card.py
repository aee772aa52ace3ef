"""card.py: what a card says comes from files; what they don't say, it doesn't."""

import dataclasses
import importlib.util
import json
import re
import shutil

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save

from hf_ddpm import DDPMPipeline
from hf_ddpm.cli import run
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.folders.layout import CARD
from hf_ddpm.publishing.card import CardFacts, make_card
from hf_ddpm.publishing.publish import collect
from tests.launching import ROOT
from train_scripts.make_cards import card_folders, card_of, save_card_folder

CARDS = ROOT / "model_cards"


def card_files(run):
    return {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}


def card(folder, **facts):
    return collect(folder, "tester/tiny-run", **facts).files[CARD].decode()


def test_the_numbers_are_those_of_the_files(run_folder):
    report = json.loads((run_folder / "evaluation.json").read_text())
    text = card(run_folder, license="apache-2.0")
    for numbers in (report["bits_per_dim"], report["other_variance"]):
        for key in ("bpd", "rate_bpd", "distortion_bpd"):
            assert f"{numbers[key]['value']:.3f} ± {numbers[key]['stderr']:.3f}" in text
    for name, value in report["sample_metrics"]["samples"].items():
        assert (f"| {name} | {value:.4g} |" in text) == (" std " not in name)
    assert "8 images of the UCI optical digits" in text and "hf-ddpm evaluate runs/tiny digits" in text
    assert "6 optimizer steps, 24 images seen, seed 0, mean loss 0.7500 at the end" in text
    assert "44,969 parameters" in text and "8x8 grey" in text and "decay 0.99" in text
    assert "Licence of the data: cc-by-4.0" in text  # hf_ddpm/data/digits/README.md
    assert "--num_train_timesteps 20 --beta_end 0.5" in text and "--ema_decay 0.99,0.9" in text
    assert "7.000" not in text  # held-out numbers give way to an evaluation's


def test_the_pictures_are_there(run_folder):
    files = collect(run_folder, "tester/tiny-run").files
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", files[CARD].decode())
    assert pictures == ["samples.png", "bits-per-step.png", "rate-distortion.png", "reconstructions.png"]
    assert set(pictures) <= set(files)
    assert files["samples.png"].name == "step-00000006.png"


def test_the_hubs_metadata(run_folder):
    report = json.loads((run_folder / "evaluation.json").read_text())
    data = ModelCard(card(run_folder, license="mit", dataset_id="tester/digits")).data
    assert (data.library_name, data.license, data.datasets) == ("diffusers", "mit", ["tester/digits"])
    assert {"ddpm", "unconditional-image-generation"} <= set(data.tags)
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.model_name == "tiny-run"
    bits = [result for result in data.eval_results if result.metric_type == "bits_per_dim"]
    found = report["bits_per_dim"]
    assert bits[0].metric_value == round(found["bpd"]["value"], 4)
    error = f"± {found['bpd']['stderr']:.3f}"
    assert bits[0].metric_name == f"bits/dim, upper bound (fixed_large, {error})"
    assert {result.metric_type for result in data.eval_results} == {
        *("bits_per_dim", "rate", "distortion", "frechet_distance", "kernel_distance", "classifier_score")
    }
    on = {(r.dataset_type, r.dataset_split, r.task_type) for r in data.eval_results}
    assert on == {("tester/digits", "test", "unconditional-image-generation")}
    data = ModelCard(card(run_folder)).data
    assert {result.dataset_type for result in data.eval_results} == {"digits"} and data.datasets is None


def test_what_is_missing_is_left_out(tiny_folder):
    text = card(tiny_folder)
    assert "None" not in text and "undefined" not in text and "![" not in text
    assert "bits/dim (" not in text and "How good" not in text and "hf-ddpm train" not in text
    assert "No measure of its quality is published with it." in text
    data = ModelCard(text).data
    assert data.license is None and data.datasets is None and data.eval_results is None


def test_without_an_evaluation_the_held_out_number_stands(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "evaluation.json").unlink()
    text = card(folder)
    assert "7.000 ± 0.250 bits/dim" in text and "at step 6" in text
    assert "bits-per-step.png" not in text


def test_numbers_of_other_weights_are_left_out(run_folder, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.ema_0_9.safetensors", weights)  # the run went on
    publication = collect(folder, "tester/tiny-run")
    assert "evaluation.json" not in publication.files and "bits-per-step.png" not in publication.files
    assert "evaluation.json is of other weights" in caplog.text
    (folder / "evaluation.json").write_text('{"model": "somebody\'s"}')
    assert "evaluation.json" not in collect(folder, "tester/tiny-run").files


def test_an_evaluation_without_a_command_has_no_empty_block(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    file = tmp_path / "run" / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"command": ""}))  # called from Python
    text = card(tmp_path / "run")
    assert "bits/dim" in text and not re.search(r"```\s*```", text)


def test_numbers_on_training_images_say_so(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    report = json.loads((folder / "evaluation.json").read_text())
    report["data"]["trained_on"] = True
    report["bits_per_dim"]["bpd"]["stderr"] = None  # of a single image
    (folder / "evaluation.json").write_text(json.dumps(report))
    text = card(folder)
    assert "say nothing about new images" in text
    assert f"| bits/dim | {report['bits_per_dim']['bpd']['value']:.3f} |" in text


def test_a_data_set_of_the_hub_and_one_of_ones_own(run_folder, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(run_folder, folder)
    config = json.loads((folder / "train_config.json").read_text()) | {"license": "mit"}
    (tmp_path / "my" / "photos").mkdir(parents=True)
    link = "[someone/photos](https://huggingface.co/datasets/someone/photos)"
    for where, dataset, output_dir, words in (
        (tmp_path, "someone/photos", "runs/mine", link),
        (tmp_path, "someone/photos", str(folder), "photos"),  # it can't be told where the run was started
        (
            tmp_path / "runs",
            "someone/photos",
            "runs/mine",
            "photos",
        ),  # not here, and what is there is not known
        (tmp_path, "my/photos", "runs/mine", "photos"),
        (tmp_path, str(tmp_path / "my" / "photos"), "runs/mine", "photos"),
    ):
        monkeypatch.chdir(where)
        changed = config | {"dataset": dataset, "output_dir": output_dir}
        (folder / "train_config.json").write_text(json.dumps(changed))
        text = card(folder)
        assert f"**Data**: {words}, split train" in text
        assert ModelCard(text).data.datasets == (["someone/photos"] if words == link else None)
        assert ModelCard(text).data.license == "mit"  # the config may say it
    (folder / "train_config.json").write_text(
        json.dumps(config | {"dataset": "x", "dataset_id": "me/photos"})
    )
    assert ModelCard(card(folder)).data.datasets == ["me/photos"]


def test_the_code_in_a_card_runs(run_folder):
    blocks = re.findall(r"```python\n(.*?)```", card(run_folder), re.S)
    assert len(blocks) == 2
    for block in blocks:
        scope = {}
        exec(block.replace("tester/tiny-run", str(run_folder)), scope)
        assert len(scope["images"]) == 16


def test_a_card_of_ones_own_is_sent_as_it_is(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / CARD).write_text("# My words\n")
    assert card(folder) == "# My words\n"
    (folder / CARD).write_text(card(run_folder) + "old")
    assert card(folder) == card(run_folder)


@pytest.mark.parametrize("key", ["license", "dataset_license"])
def test_a_licence_is_an_identifier(key):
    with pytest.raises(
        ValueError, match=rf"{key} is 'Apache 2.0' \(did you mean 'apache-2.0'\?\); allowed: "
    ):
        CardFacts("tester/x", **{key: "Apache 2.0"})


def test_a_damaged_file_is_named(run_folder):
    files = card_files(run_folder) | {"evaluation.json": b"{", CARD: b""}
    with pytest.raises(ValueError, match=r"evaluation\.json can't be read"):
        make_card(files, CardFacts("tester/x"))


def test_an_evaluation_of_another_shape_is_one_line(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    report = json.loads((folder / "evaluation.json").read_text())
    del report["method"]["clip_x0"]
    (folder / "evaluation.json").write_text(json.dumps(report))
    with pytest.raises(
        ValueError, match="are not what they should be, KeyError: 'clip_x0'; allowed: files as"
    ):
        card(folder)


def test_an_old_scheduler_config_has_diffusers_defaults(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    text = card(folder)
    assert "a process\nof 1000 steps" in text
    assert 'The network predicts "epsilon", the variance is "fixed_small".' in text
    file.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    assert 'The network predicts "epsilon". The weights' in card(folder)


def test_no_token_gets_into_a_card(run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    folder, token = tmp_path / "run", "hf_" + "a1B2" * 8
    shutil.copytree(run_folder, folder)
    config = json.loads((folder / "train_config.json").read_text())
    config |= {"dataset": f"https://me:{token}@example.org/photos", "trackers": "very-secret-value"}
    (folder / "notes.md").write_text(f"I had {token}.\n")
    (folder / "commands.sh").write_text(f"export HF_TOKEN={token}\n")
    (folder / "train_config.json").write_text(json.dumps(config))
    publication = collect(folder, "tester/tiny-run")
    for path, content in publication.files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        assert token.encode() not in data and b"very-secret-value" not in data, path
    assert "***" in publication.files[CARD].decode()


def test_what_a_person_saw_and_did_is_told(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    assert "minutes" not in card(run) and "seed 0" in card(run)
    (run / "notes.md").write_text("Two of five trousers have three legs.\n")
    (run / "commands.sh").write_text("torchrun --nproc_per_node 2 train.py\n")
    for name in ("progressive.png", "interpolation.png", "training.png"):
        shutil.copy(run / "samples" / "step-00000006.png", run / name)
    with (run / "log.jsonl").open("w") as file:
        file.write(json.dumps({"step": 6, "images": 24, "loss": 0.5, "seconds": 7261.0}))
    text = card(run)
    assert "Two of five trousers have three legs.\n" in text
    assert "````\ntorchrun --nproc_per_node 2 train.py\n````" in text and "hf-ddpm train --" not in text
    assert "24 images seen in 121 minutes, seed 0, mean loss 0.5000 at the end" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures[:3] == ["samples.png", "progressive.png", "interpolation.png"]
    assert pictures[-1] == "training.png"
    sent = collect(run, "tester/tiny-run").files
    assert {*pictures, "notes.md", "commands.sh"} <= set(sent)
    assert "notes.md" not in collect(run, "tester/tiny-run", ema_decay=0.9).files  # they are of other weights


def test_a_folder_with_half_weights_loads_and_is_published_with_its_numbers(
    run_folder, tmp_path, make_cards, capsys
):
    make_cards("--folder", tmp_path, "--add", run_folder, "tester/half", "--half-weights")
    folder = tmp_path / "half"
    assert not (folder / "evaluation.json").exists()  # that was of the weights before they were rounded
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    original = load_file(run_folder / "unet" / file.name)
    for kind in (DDPMPipeline, diffusers.DDPMPipeline):
        weights = kind.from_pretrained(folder).unet.state_dict()
        for name, weight in weights.items():
            assert weight.dtype == torch.float32 and torch.equal(weight, original[name].half().float()), name
    config = EvaluationConfig(model=str(folder), dataset="digits", num_images=4, overwrite=True)
    measured = evaluate(config, "hf-ddpm evaluate")
    sent = collect(folder, "tester/half").files
    assert json.loads(sent["evaluation.json"])["model"] == measured["model"]
    assert sent["samples.png"] == folder / "samples.png"

    with pytest.raises(SystemExit, match="2"):
        make_cards("--folder", tmp_path, "--half-weights")
    assert "--half-weights has no use without --add" in capsys.readouterr().err
    weights = load_file(file) | {"conv_out.bias": torch.tensor([1e6])}
    publication = collect(run_folder, "tester/half")
    bad = publication.files | {"unet/diffusion_pytorch_model.safetensors": save(weights)}
    with pytest.raises(ValueError, match="weights beyond 65504, which float16 can't hold"):
        save_card_folder(dataclasses.replace(publication, files=bad), tmp_path / "bad", half_weights=True)
    assert not (tmp_path / "bad").exists()


# model_cards/


@pytest.mark.parametrize("folder", card_folders(CARDS), ids=lambda folder: folder.name)
def test_no_card_is_stale(folder):
    assert (folder / CARD).read_text(encoding="utf-8") == card_of(folder), "run `make cards`"


@pytest.fixture
def make_cards():
    """The command, as a function of its words."""
    script = ROOT / "train_scripts" / "make_cards.py"
    spec = importlib.util.spec_from_file_location("make_cards", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: run(module.make_cards, [str(word) for word in words], "make_cards.py")


def test_a_published_runs_card_is_made_again_from_its_folder(run_folder, tmp_path, make_cards, capsys):
    publication = collect(run_folder, "tester/tiny-run", license="mit", dataset_id="tester/digits")
    save_card_folder(publication, tmp_path / "tiny-run")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert card_folders(tmp_path) == [tmp_path / "tiny-run"]
    again = card_of(tmp_path / "tiny-run")
    assert again == (tmp_path / "tiny-run" / CARD).read_text() == publication.files[CARD].decode()
    assert card_folders(tmp_path / "nothing") == []

    (tmp_path / "tiny-run" / CARD).write_text("old")
    with pytest.raises(SystemExit, match="2"):
        make_cards("--folder", tmp_path, "--check")
    assert "stale cards in model_cards: tiny-run" in capsys.readouterr().err
    make_cards("--folder", tmp_path)
    assert capsys.readouterr().out == "cards: 1, of which 1 were stale\n"
    assert (tmp_path / "tiny-run" / CARD).read_text() == again
    make_cards("--folder", tmp_path, "--check")
    make_cards("--folder", tmp_path / "more", "--add", run_folder, "tester/other", "--license", "mit")
    assert "license: mit" in (tmp_path / "more" / "other" / CARD).read_text()

    (tmp_path / "tiny-run" / "card.json").write_text('{"colour": "red"}')
    with pytest.raises(ValueError, match="is no folder of a card"):
        card_of(tmp_path / "tiny-run")


def test_memorisation_is_told(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    report = json.loads((run / "evaluation.json").read_text())
    assert "repeat images" not in card(run)
    of = {"num_images": 12, "share_near": 0.25, "median_distance": 20.04, "exact_copies": 2}
    floor = {"num_images": 300, "share_near": 0.01, "median_distance": 31.0, "exact_copies": 0}
    found = {"dataset": "/home/me/images", "split": "train", "num_rows": 99, "near": 12.34}
    found["trained_on"] = True
    report["memorisation"] = found | {"samples": of, "heldout": floor}
    (run / "evaluation.json").write_text(json.dumps(report))
    text = " ".join(card(run).split())
    assert (
        "25.0% of 12 samples lie within 12.3 grey levels (RMSE) of one of the 99 images of images, train"
        in text
    )
    assert "median distance 20.0 against 31.0, exact copies 2 against 0." in text and "/home/me" not in text
    report["memorisation"]["trained_on"] = False
    (run / "evaluation.json").write_text(json.dumps(report))
    assert "images, train (on which no record says that it was trained), against" in " ".join(
        card(run).split()
    )
