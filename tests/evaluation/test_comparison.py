"""Two evaluations compared, image by image."""

import diffusers
import numpy as np
from safetensors.torch import save_file

from tests.evaluation.commands import FEW, TENSORS, grey, refused, run, save_plain, write_images


def test_paired_difference(tiny_folder, tmp_path, capsys):
    other = save_plain(tmp_path / "other", diffusers.DDPMScheduler(20, beta_end=0.5), seed=1)
    _, theirs = run(other, tmp_path / "theirs", *FEW, "--variance-type", "fixed_large")
    report, ours = run(tiny_folder, tmp_path / "ours", *FEW, "--compare-with", tmp_path / "theirs")
    found, difference = report["comparison"], (ours["bpd"] - theirs["bpd"]).numpy()
    assert found["with"]["name"] == str(other) and found["variance_types"] == ["fixed_large"] * 2
    np.testing.assert_allclose(found["difference_bpd"], difference.mean(), rtol=1e-12)
    np.testing.assert_allclose(found["stderr"], difference.std(ddof=1) / np.sqrt(7), rtol=1e-12)
    spread = (ours["bpd"].var() / 7 + theirs["bpd"].var() / 7).sqrt().item()
    np.testing.assert_allclose(found["stderr_without_pairing"], spread, rtol=1e-12)
    line = (
        f"{found['difference_bpd']:.4f} ± {found['stderr']:.4f} bits/dim difference to {other} "
        "(fixed_large - fixed_large)"
    )
    assert line in capsys.readouterr().out.splitlines()


def test_comparisons_that_are_refused(tiny_folder, tmp_path, capfd):
    two = ["--num-images", 2, "--num-evals-per-image", 4]
    run(tiny_folder, tmp_path / "a", *two)
    compare = ["--compare-with", tmp_path / "a"]
    for i, (flags, words) in enumerate(
        [
            (["--seed", 1], "seed 0, this one has 1; allowed: equal"),
            (["--num-images", 3], "other images; allowed: the same"),
            (["--num-evals-per-image", 5], "evaluations_per_image 4, this one has 5; allowed: equal"),
            (["--clip-x0", "false"], "--clip-x0 True, this one has False; allowed: equal"),
            (["--pilot-images", 2], "--pilot-images 0, this one has 2; allowed: equal"),
        ]
    ):
        out = tmp_path / str(i)
        line = refused(capfd, tiny_folder, "digits", "--out", out, *two, *flags, *compare)
        assert f"--compare-with '{tmp_path / 'a'}' was made with {words}" in line
        assert not (out / "evaluation.json").exists()
    exact = ["--exact", "--num-images", 2]
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "x", *exact, *compare)
    assert "with name 'stratified estimate', this one has 'every step once'; allowed: equal" in line
    report = tmp_path / "a" / "evaluation.json"
    whole = report.read_text()
    for content, words in (
        ("{}", "has no bits_per_dim"),
        (whole.replace("1", "2", 1), "evaluation.json is not the one that"),
        (whole[:-9], "is not a valid JSON file"),
        ("7", "holds int; allowed: keys and values"),
    ):
        report.write_text(content)
        line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "y", *two, *compare)
        assert f"'{tmp_path / 'a'}' holds no evaluation that can be read: " in line and words in line
    report.write_text(whole)
    (tmp_path / "a" / TENSORS).write_bytes(b"cut")
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "y", *two, *compare)
    assert f"'{tmp_path / 'a'}' holds no evaluation that can be read: " in line


def test_comparing_exact_evaluations_of_two_seeds_is_refused(tiny_folder, tmp_path, capfd):
    data = write_images(tmp_path / "data", grey(3))
    run(tiny_folder, tmp_path / "a", "--exact", dataset=data)
    flags = ["--exact", "--seed", 1, "--compare-with", tmp_path / "a"]
    line = refused(capfd, tiny_folder, data, "--out", tmp_path / "b", *flags)
    assert "with seed 0, this one has 1; allowed: equal" in line


def test_another_chain_and_decoder_are_compared_image_by_image(tiny_folder, tmp_path, capsys):
    _, theirs = run(tiny_folder, tmp_path / "a", *FEW)
    for i, (flags, words) in enumerate(
        [
            (["--decoder", "tanh"], "20 steps (even), decoder tanh"),
            (["--steps", 5, "--chain", "quadratic"], "5 steps (quadratic), decoder exact"),
        ]
    ):
        report, ours = run(tiny_folder, tmp_path / str(i), *FEW, *flags, "--compare-with", tmp_path / "a")
        found = report["comparison"]
        assert found["chains"] == [words, "20 steps (even), decoder exact"]
        assert f"; {words} - 20 steps (even), decoder exact)" in capsys.readouterr().out
        np.testing.assert_allclose(found["difference_bpd"], (ours["bpd"] - theirs["bpd"]).mean(), rtol=1e-12)


def test_comparing_one_image(tiny_folder, tmp_path):
    flags = ["--num-images", 1, "--num-evals-per-image", 4]
    run(tiny_folder, tmp_path / "a", *flags)
    report, _ = run(tiny_folder, tmp_path / "b", *flags, "--compare-with", tmp_path / "a")
    assert report["comparison"]["difference_bpd"] == 0
    assert report["comparison"]["stderr"] is None


def test_a_flipped_bit_in_the_tensors_of_the_other_is_refused(tiny_folder, tmp_path, capfd):
    two = ["--num-images", 2, "--num-evals-per-image", 4]
    run(tiny_folder, tmp_path / "a", *two)
    file = tmp_path / "a" / TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40  # the exponent of the last number
    file.write_bytes(data)
    line = refused(capfd, tiny_folder, "digits", "--out", tmp_path / "b", *two, "--compare-with", file.parent)
    assert (
        "is missing or damaged: its content is not what its sum says" in line
        and not (tmp_path / "b").exists()
    )


def test_an_evaluation_of_an_earlier_version_has_no_sums(tiny_folder, tmp_path):
    two = ["--num-images", 2, "--num-evals-per-image", 4]
    _, tensors = run(tiny_folder, tmp_path / "a", *two)
    save_file(tensors, tmp_path / "a" / TENSORS)
    report, _ = run(tiny_folder, tmp_path / "b", *two, "--compare-with", tmp_path / "a")
    assert report["comparison"]["difference_bpd"] == 0
