"""Sample metrics: which images are measured, the reference's file, a killed run."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.cli import main
from hf_ddpm.evaluation.config import EvaluationConfig
from hf_ddpm.evaluation.quality import choose_real
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.metrics import load_extractor, sample_metrics
from tests.evaluation.commands import CLASSIFIER, FEW, all_test_digits, refused, run, run_killed

QUALITY = (*FEW, "--extractor", CLASSIFIER, "--num-samples", 12, "--num-reference", 10, "--batch-size", 5)


def test_sample_metrics(tiny_folder, tmp_path, extracted, capsys):
    steps = ["--sampling-steps", 10, "--seed", 3]
    report, _ = run(tiny_folder, tmp_path / "out", *QUALITY, *steps)
    found = report["sample_metrics"]
    looked = torch.cat(extracted[1:])  # the first is one real image, to see whether such images fit
    samples, reference, floor = looked[:12], looked[12:22], looked[22:]
    assert len(floor) == 12

    # The samples are those of `hf-ddpm sample`, the real images of the data set, none of them twice.
    draw = "--num-images 12 --steps 10 --seed 3 --batch-size 5".split()
    main(["sample", str(tiny_folder), "--out", str(tmp_path / "samples"), *draw])
    drawn = [np.asarray(Image.open(tmp_path / "samples" / f"{i:05d}.png")) for i in range(12)]
    np.testing.assert_array_equal(samples[:, 0].numpy(), np.stack(drawn))
    digits = [image.numpy().tobytes() for image in all_test_digits()]
    places = [digits.index(image.numpy().tobytes()) for image in looked[12:]]
    assert len(set(places)) == 22 and max(places) > 150

    extractor = load_extractor(CLASSIFIER)
    assert found["extractor"] == extractor.name and extractor.name.startswith("digits@")
    real = extractor(reference)
    for name, images in (("samples", samples), ("floor", floor)):
        expected = sample_metrics(extractor(images), real, 3).labelled()
        assert list(found[name]) == list(expected)
        np.testing.assert_allclose(list(found[name].values()), list(expected.values()), rtol=1e-5, atol=1e-6)
    assert list(found["samples"]) == [
        f"{name} ({extractor.name})" for name in ("FD", "KD", "KD std", "CS", "CS std")
    ]
    assert [found[key] for key in ("num_samples", "num_reference", "num_floor")] == [12, 10, 12]
    assert (found["sampling_steps"], found["scheduler"]) == (10, "DDPMScheduler")
    assert found["variance_type"] == "fixed_large"
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"({extractor.name}): " in line and " of 12 samples, " in line for line in lines) == 3


def test_a_reference_is_written_and_reused(tiny_folder, tmp_path, extracted, capfd):
    reference = tmp_path / "kept" / "reference.safetensors"
    flags = [*QUALITY, "--sampling-steps", 2, "--reference", reference]
    first, _ = run(tiny_folder, tmp_path / "a", *flags)
    assert reference.is_file() and sum(map(len, extracted)) == 1 + 12 + 10 + 12
    written = reference.read_bytes()
    extracted.clear()
    again, _ = run(tiny_folder, tmp_path / "b", *flags)
    assert sum(map(len, extracted)) == 1 + 12 + 12 and reference.read_bytes() == written
    assert again["sample_metrics"] == first["sample_metrics"]
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "c", *flags, "--seed", 1)
    assert f"reference '{reference}' is another one: images is " in line
    assert not (tmp_path / "c" / "evaluation.json").exists() and reference.read_bytes() == written


def test_killed_while_sampling(tiny_folder, tmp_path, extracted, evaluations):
    """Of three parts of images and three of samples, the fifth is not saved."""
    flags = [*QUALITY, "--sampling-steps", 2, "--batch-size", 4, "--num-images", 12]
    expected, _ = run(tiny_folder, tmp_path / "unbroken", *flags)
    run_killed(tiny_folder, tmp_path / "out", *flags, part=5)
    extracted.clear(), evaluations.clear()
    report, _ = run(tiny_folder, tmp_path / "out", *flags)
    assert not evaluations and sum(map(len, extracted)) == 1 + 8 + 10 + 12
    assert report["sample_metrics"] == expected["sample_metrics"]
    assert not list((tmp_path / "out").glob(".parts-*"))


def test_real_images_are_disjoint(caplog):
    def config(num_samples, num_reference=None, seed=0):
        counts = {"num_samples": num_samples, "num_reference": num_reference}
        return EvaluationConfig(extractor="any", seed=seed, **counts)

    reference, floor = choose_real(config(10), 40)
    assert len(reference) == len(floor) == 10 and not set(reference) & set(floor)
    assert (np.diff(reference) > 0).all() and (np.diff(floor) > 0).all() and not caplog.text
    assert not np.array_equal(reference, choose_real(config(10, seed=1), 40)[0])
    reference, floor = choose_real(config(30), 40)  # too few: half serves as the reference
    assert (len(reference), len(floor)) == (20, 20) and not set(reference) & set(floor)
    assert "the floor has 20 images, not 30" in caplog.text
    for total, wanted in ((3, 1), (2, 1)):
        with pytest.raises(ValueError, match=f"num_reference is {wanted}, but the split has {total} images"):
            choose_real(config(30), total)
    with pytest.raises(ValueError, match="allowed: 2 to 38, as the floor needs others"):
        choose_real(config(5, 39), 40)


def test_samples_are_found_again_by_another_process(tiny_folder, tmp_path, extracted, monkeypatch):
    """The order in which diffusers notes what an older config leaves at its default is a set's."""
    flags, load = [*QUALITY, "--sampling-steps", 2], DDPMPipeline.from_pretrained
    names = ["thresholding", "steps_offset"]

    def loaded(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        pipeline.scheduler.register_to_config(_use_default_values=list(names))
        return pipeline

    monkeypatch.setattr(DDPMPipeline, "from_pretrained", loaded)
    run_killed(tiny_folder, tmp_path, *flags, part=5)
    names.reverse()
    extracted.clear()
    run(tiny_folder, tmp_path, *flags)
    assert sum(map(len, extracted)) < 1 + 12 + 10 + 12
