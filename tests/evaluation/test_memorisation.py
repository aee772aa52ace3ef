"""memorisation.py: the nearest image by brute force, planted copies, a model that only repeats, the floor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hf_ddpm
from hf_ddpm.cli import main
from hf_ddpm.data.pixels import to_float
from hf_ddpm.data.stream import load_stream
from hf_ddpm.evaluation import memorisation
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.memorisation import Memorisation, block_size, nearest
from hf_ddpm.evaluation.parts import Parts
from hf_ddpm.evaluation.samples import Drawing
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.scheduler import DDPMScheduler
from tests.evaluation.commands import CLASSIFIER, write_images
from tests.launching import ROOT

FEW = "--num-images 3 --num-evals-per-image 2 --sampling-steps 2 --num-samples 12 --batch-size 5".split()


def run(model, out, *flags):
    main(["evaluate", *(str(word) for word in (model, "digits", "--out", out, *FEW, *flags))])
    return json.loads((out / "evaluation.json").read_text()), load_file(out / "evaluation.safetensors")


def digits(split, rows=None):
    stream = load_stream("digits", split)
    return torch.stack(list(stream.images() if rows is None else stream.select(rows)))


def samples_of(model, folder):
    """The samples that an evaluation with `FEW` draws, by the other command."""
    draw = "--num-images 12 --steps 2 --batch-size 5".split()
    main(["sample", str(model), "--out", str(folder), *draw])
    return np.stack([np.asarray(Image.open(folder / f"{i:05d}.png")) for i in range(12)])


# The search


@pytest.mark.parametrize("block", [1, 200, 10**6])
def test_by_brute_force(block):
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 256, (n, 3, 5, 4), dtype=np.uint8) for n in (17, 40))
    a[3], a[4], b[30] = b[21], b[7], b[7]  # two copies, one of an image that is there twice
    a[5], b[11] = 0, 255  # as far apart as can be
    index, square = nearest(torch.from_numpy(a), torch.from_numpy(b), numbers_at_once=block)
    squares = ((a[:, None].astype(int) - b[None].astype(int)) ** 2).sum((2, 3, 4))
    np.testing.assert_array_equal(square, squares.min(1))
    np.testing.assert_array_equal(index, squares.argmin(1))  # the first of several
    assert index[[3, 4]].tolist() == [21, 7] and square[[3, 4]].tolist() == [0, 0]


def test_one_grey_level_in_a_large_image():
    """Where float32 sums of squares would have lost it: 3·2^16 pixels near white."""
    image = torch.full((1, 3, 256, 256), 255, dtype=torch.uint8)
    others = image.repeat(3, 1, 1, 1)
    others[0, 0, 0, 0], others[1, 0, 5, 5], others[1, 1, 5, 5] = 254, 254, 254
    for count, nearest_one in ((2, (0, 1)), (3, (2, 0))):
        index, square = nearest(image, others[:count])
        assert (int(index), int(square)) == nearest_one
    assert block_size(3 * 2**16) == 85 and block_size(784) == 4096 and block_size(2**30) == 1


# What the command finds


def test_planted_copies_are_found(tiny_folder, tmp_path, pictures, capsys, monkeypatch):
    monkeypatch.setattr(memorisation, "MOST", 16)  # they lie in three blocks
    drawn = samples_of(tiny_folder, tmp_path / "samples")
    planted = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    planted[5], planted[20] = drawn[3], drawn[7]
    planted[33] = drawn[9] ^ 1  # every pixel off by one
    data = write_images(tmp_path / "data", planted, "train")
    capsys.readouterr()
    report, tensors = run(tiny_folder, tmp_path / "out", "--nearest-dataset", data)

    rows, distances = tensors["nearest_rows"], tensors["nearest_distances"]
    squares = ((drawn[:, None].astype(float) - planted) ** 2).mean((2, 3))
    np.testing.assert_array_equal(rows, squares.argmin(1))
    np.testing.assert_allclose(distances, np.sqrt(squares.min(1)), rtol=1e-12)
    assert rows[[3, 7, 9]].tolist() == [5, 20, 33] and distances[[3, 7, 9]].tolist() == [0, 0, 1]
    held = digits("test", tensors["heldout_rows"])[:, 0].numpy().astype(float)
    floor = np.sqrt(((held[:, None] - planted) ** 2).mean((2, 3)).min(1))
    np.testing.assert_allclose(tensors["heldout_nearest_distances"], floor, rtol=1e-12)
    found = report["memorisation"]
    assert (found["dataset"], found["split"], found["num_rows"]) == (str(data), "train", 40)
    assert found["near"] == pytest.approx(np.quantile(floor, 0.01), rel=1e-12)
    assert found["samples"] == {
        "num_images": 12,
        "share_near": float(np.mean(np.sqrt(squares.min(1)) <= found["near"])),
        "median_distance": pytest.approx(np.median(np.sqrt(squares.min(1)))),
        "exact_copies": 2,
    }
    assert found["samples"]["share_near"] >= 3 / 12
    assert found["heldout"]["num_images"] == 12 and found["heldout"]["exact_copies"] == 0
    assert (found["sampling_steps"], found["scheduler"]) == (2, "DDPMScheduler")
    assert found["timestep_spacing"] == "leading"
    assert found["trained_on"] is False and "sample_metrics" not in report
    line = next(line for line in capsys.readouterr().out.splitlines() if " samples lie within " in line)
    assert "of 12 samples" in line and "exact copies 2 against 0" in line
    assert "train (on which no record says that it was trained)" in line

    # The picture: the nearest eight above what they are near to
    (above, below), labels, kinds = pictures["nearest.png"]
    assert kinds == ["sample", "training"] and (tmp_path / "out" / "nearest.png").exists()
    assert len(above) == len(below) == 8
    assert [np.asarray(image).tolist() for image in above[:3]] == drawn[[3, 7, 9]].tolist()
    assert [np.asarray(image).tolist() for image in below[:3]] == planted[[5, 20, 33]].tolist()
    assert labels[:3] == ["RMSE 0.0\nrow 5", "RMSE 0.0\nrow 20", "RMSE 1.0\nrow 33"]

    # An evaluation without it leaves no picture of another one
    run(tiny_folder, tmp_path / "out", "--overwrite", "--extractor", CLASSIFIER)
    assert not (tmp_path / "out" / "nearest.png").exists()


def test_the_held_out_images_by_another_name(tiny_folder, tmp_path, capfd):
    embedded = Path(hf_ddpm.__file__).parent / "data" / "digits"
    words = [
        "evaluate",
        tiny_folder,
        "digits",
        "--out",
        tmp_path / "out",
        *FEW,
        "--nearest-dataset",
        embedded,
    ]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--nearest-split", "test"])
    assert stop.value.code == 2 and "has the images that are evaluated" in capfd.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_training_images_that_hold_the_held_out_ones_say_nothing(tiny_folder, tmp_path, capfd):
    images = torch.cat([digits("test", range(300)), digits("train", range(4))])
    both = write_images(tmp_path / "both", images[:, 0].numpy(), "train")
    words = ["evaluate", tiny_folder, "digits", "--out", tmp_path / "out", *FEW, "--nearest-dataset", both]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    assert (
        stop.value.code == 2
        and "held-out images are among those of --nearest-dataset" in capfd.readouterr().err
    )


def test_one_drawing_serves_both(tiny_folder, tmp_path, monkeypatch):
    extracting = ["--extractor", CLASSIFIER, "--num-reference", 10]
    apart = [
        run(tiny_folder, tmp_path / "a", *extracting)[0]["sample_metrics"],
        run(tiny_folder, tmp_path / "b", "--nearest-dataset", "digits")[0]["memorisation"],
    ]
    drawn, sample = [], DDPMPipeline.__call__

    def counted(self, batch_size, *more, **options):
        drawn.append(batch_size)
        return sample(self, batch_size, *more, **options)

    monkeypatch.setattr(DDPMPipeline, "__call__", counted)
    report, _ = run(tiny_folder, tmp_path / "c", *extracting, "--nearest-dataset", "digits")
    assert sum(drawn) == 12 and [report["sample_metrics"], report["memorisation"]] == apart


@pytest.mark.parametrize("part", [3, 6])
def test_a_killed_search_goes_on(part, tiny_folder, tmp_path, monkeypatch):
    """One part of the bound, three of samples, three of the 1497 training images: ended in each kind."""
    monkeypatch.setattr(memorisation, "MOST", 500)
    flags = ["--nearest-dataset", "digits"]
    expected, tensors = run(tiny_folder, tmp_path / "unbroken", *flags)
    save, saved = Parts.save, []

    def killed(self, *what):
        saved.append(what)
        if len(saved) == part:
            raise KeyboardInterrupt
        save(self, *what)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Parts, "save", killed)
        run(tiny_folder, tmp_path / "out", *flags)
    monkeypatch.setattr(Parts, "save", lambda *what: (saved.append(what), save(*what)))
    report, again = run(tiny_folder, tmp_path / "out", *flags)
    assert len(saved) == part + (7 - (part - 1))
    assert report["memorisation"] == expected["memorisation"]
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert not list((tmp_path / "out").glob(".parts-*"))


# Who memorises and who does not


def search(samples, heldout, tmp_path, num_heldout):
    return Memorisation(config(num_heldout), heldout, load_stream("digits", "train")).run(samples, tmp_path)


def config(num_samples, **changes):
    """Of an evaluation that looks for the nearest of the digits' training images."""
    return EvaluationConfig(dataset="digits", nearest_dataset="digits", num_samples=num_samples, **changes)


def share_near(distances, found):
    return (distances <= found.near).double().mean().item()


def test_the_exact_denoiser_repeats_its_images(tmp_path):
    chosen = range(0, 1497, 100)
    scheduler = DDPMScheduler(1000, prediction_type="sample")
    exact = ExactDenoiser(scheduler.process, to_float(digits("train", chosen)))
    pipeline = DDPMPipeline(exact, scheduler, image_shape=(1, 8, 8))
    drawing = Drawing(pipeline, config(30, sampling_steps=100, batch_size=30))
    images = drawing.run("weights", tmp_path, None, keep=True)["images"]
    found = search(images, load_stream("digits", "test"), tmp_path, 300)
    assert len(found.distances) == 30 and not found.distances.any()
    assert found.near > 5 and found.heldout_distances.all()
    assert set(found.rows.tolist()) <= set(chosen)


def test_the_spacing_of_sampling_steps():
    pipeline = DDPMPipeline(lambda x_t, t: x_t, DDPMScheduler(20), image_shape=(1, 8, 8))
    drawing = Drawing(pipeline, config(2, sampling_steps=4, sampling_spacing="trailing"))
    assert drawing.scheduler is pipeline.scheduler
    assert drawing.scheduler.timesteps.tolist() == [19, 14, 9, 4]
    with pytest.raises(
        ValueError, match="sampling_spacing is 'trailing', but has no use without sampling_steps"
    ):
        config(2, sampling_spacing="trailing")
    swap_scheduler(pipeline, "ddim")
    with pytest.raises(ValueError, match=r"goes down by 2 .* but sampling_spacing 'trailing' lists"):
        Drawing(pipeline, config(2, sampling_steps=7, sampling_spacing="trailing"))


def test_new_images_are_as_near_as_held_out_ones(tmp_path):
    """Samples that are other held-out digits: about 1 % are near, as of the floor."""
    memory = Memorisation(config(150), load_stream("digits", "test"), load_stream("digits", "train"))
    others = sorted(set(range(300)) - set(memory.heldout_rows.tolist()))
    found = memory.run(digits("test", others), tmp_path)
    assert len(found.distances) == len(found.heldout_distances) == 150
    # The threshold's own rank has a standard error of √(0.01 · 0.99 / 150), and the share another
    assert share_near(found.distances, found) <= 0.01 + 5 * np.sqrt(2 * 0.01 * 0.99 / 150)
    assert share_near(found.heldout_distances, found) <= 0.02
    medians = [distances.median().item() for distances in (found.distances, found.heldout_distances)]
    assert abs(medians[0] - medians[1]) < 0.1 * medians[1]


def test_fewer_held_out_images_than_samples(tmp_path):
    found = search(digits("train", range(3)), load_stream("digits", "test"), tmp_path, 10**4)
    assert len(found.heldout_distances) == 300 and not found.distances.any()
    assert found.heldout_rows.tolist() == list(range(300))
    assert found.rows.tolist() == [0, 1, 2]


# What is refused


def test_what_is_refused(tiny_folder, tmp_path, capfd):
    large = write_images(tmp_path / "large", np.zeros((3, 9, 9), np.uint8), "train")
    for flags, words in (
        (
            ["digits", "--nearest-split", "test"],
            "--nearest-split 'test' of 'digits' has the images that are evaluated",
        ),
        (["digits", "--nearest-split", "none"], "split 'none'"),
        ([large], "allowed: (1, 8, 8), as those that are evaluated"),
        ([tmp_path / "nowhere"], "nowhere"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(tiny_folder, tmp_path / "out", "--nearest-dataset", *flags)
        err = capfd.readouterr().err
        assert stop.value.code == 2 and words in err and "Traceback" not in err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tiny_folder, tmp_path):
    data = write_images(tmp_path / "data", digits("train", range(50))[:, 0].numpy(), "train")
    flags = [*FEW, "--nearest-dataset", data, "--extractor", CLASSIFIER, "--num-reference", 6]
    probe = "import sys, hf_ddpm.evaluation.memorisation as m; m.MOST = 16\n"
    probe += "from hf_ddpm.cli import main; main(sys.argv[1:])"
    (tmp_path / "probe.py").write_text(probe)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["evaluate", tiny_folder, "digits", "--out", tmp_path / "two", *flags]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(word) for word in (*launch, tmp_path / "probe.py", *words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    one, tensors = run(tiny_folder, tmp_path / "one", *flags)
    assert two["processes"] == 2 and (tmp_path / "two" / "nearest.png").stat().st_size > 1000
    assert two["memorisation"] == one["memorisation"]
    found = load_file(tmp_path / "two" / "evaluation.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors if "nearest" in name)
    assert done.stdout.count(" samples lie within ") == 1
