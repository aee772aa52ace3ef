"""A killed evaluation goes on, and never with parts of other work."""

import json
import shutil

import diffusers
import pytest

from tests.evaluation.commands import (
    FEW,
    assert_same,
    grey,
    kill_at,
    run,
    run_killed,
    save_plain,
    write_images,
)


@pytest.mark.parametrize("method", [FEW, (*FEW[:2], *FEW[4:], "--exact", "--steps", 5)], ids=["few", "all"])
def test_a_killed_evaluation_goes_on(method, tiny_folder, tmp_path, evaluations):
    expected, tensors = run(tiny_folder, tmp_path / "unbroken", *method)
    evaluations.clear()
    run_killed(tiny_folder, tmp_path / "out", *method, part=3)
    per_image = 5 if "--exact" in method else 4
    assert sum(evaluations) == 7 * per_image
    evaluations.clear()
    report, again = run(tiny_folder, tmp_path / "out", *method)
    assert sum(evaluations) == 1 * per_image  # of batches of 3, 3 and 1, the last
    assert_same(again, tensors)
    for key in ("bits_per_dim", "other_variance", "method", "data"):
        assert report[key] == expected[key]
    assert not list((tmp_path / "out").glob(".parts-*"))


def test_parts_of_other_work_are_not_taken(tiny_folder, tmp_path, evaluations):
    other = save_plain(tmp_path / "other", diffusers.DDPMScheduler(20, beta_end=0.5), seed=1)
    run_killed(tiny_folder, tmp_path / "killed", *FEW)
    for i, (model, flags) in enumerate(
        [
            (tiny_folder, ["--seed", 1]),
            (other, ["--variance-type", "fixed_large"]),
            (tiny_folder, ["--variance-type", "fixed_small"]),
            (tiny_folder, ["--num-evals-per-image", 5]),
            (tiny_folder, ["--split", "train"]),
        ]
    ):
        out = shutil.copytree(tmp_path / "killed", tmp_path / str(i))
        evaluations.clear()
        run(model, out, *FEW, *flags)
        assert sum(evaluations) == 7 * (5 if "--num-evals-per-image" in flags else 4), flags
        assert not list(out.glob(".parts-*"))  # nor are they left


@pytest.mark.parametrize("change", [{"beta_end": 0.4}, {"timestep_spacing": "trailing"}], ids=str)
def test_parts_of_another_process_are_not_taken(change, tiny_folder, tmp_path, evaluations):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    run_killed(model, tmp_path / "out", *FEW, "--steps", 5)
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    evaluations.clear()
    run(model, tmp_path / "out", *FEW, "--steps", 5)
    assert sum(evaluations) == 28


def test_parts_of_other_images_are_not_taken(tiny_folder, tmp_path, evaluations):
    data = write_images(tmp_path / "data", grey(7))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        kill_at(patch, 2)
        run(tiny_folder, tmp_path / "out", *FEW, dataset=data)
    shutil.rmtree(data)
    write_images(data, 255 - grey(7))
    evaluations.clear()
    run(tiny_folder, tmp_path / "out", *FEW, dataset=data)
    assert sum(evaluations) == 28
