"""What a run leaves in its folder, and shows meanwhile."""

import diffusers
import numpy as np
import torch
from PIL import Image

import hf_ddpm.training.run
from hf_ddpm import DDPMPipeline, train
from tests.training.helpers import Conv, assert_same, log, refused, small, weights


def test_a_pipeline_at_every_checkpoint(tmp_path, monkeypatch):
    seen, wait = [], hf_ddpm.training.run.update_folder

    def look(folder, fill, last):
        wait(folder, fill, last)
        step = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
        unet = DDPMPipeline.from_pretrained(folder).unet.state_dict()
        assert_same(dict(unet), weights(folder, step, "ema_0.9999"))
        seen.append(step)

    monkeypatch.setattr(hf_ddpm.training.run, "update_folder", look)
    train(small(tmp_path, max_steps=5, checkpoint_every=2, keep_checkpoints=2))
    assert seen == [2, 4, 5]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000005",
    ]
    top = {
        "checkpoints",
        "scheduler",
        "unet",
        "log.jsonl",
        "model_index.json",
        "train_config.json",
        "train_data.json",
        "training.png",
    }
    assert {path.name for path in tmp_path.iterdir()} == top


def test_plain_diffusers_gets_the_same_constant_betas(tmp_path):
    train(small(tmp_path, beta_schedule="constant", beta_start=0.03, max_steps=1, num_train_timesteps=200))
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert_same(scheduler.betas, torch.full((200,), 0.03))
    assert isinstance(pipeline.unet, diffusers.UNet2DModel)


def test_grids_are_png_files_and_repeat(tmp_path):
    plan = {"max_steps": 2, "sample_every": 1, "sample_num_images": 5, "sample_steps": 2}
    train(small(tmp_path / "a", **plan))
    train(small(tmp_path / "b", **plan, batch_size=4, trackers=""))
    names = ["step-00000001.png", "step-00000002.png"]
    assert sorted(path.name for path in (tmp_path / "a" / "samples").iterdir()) == names
    a, b = (np.asarray(Image.open(tmp_path / run / "samples" / names[1])) for run in "ab")
    assert np.array_equal(a, b) and a.std() > 0
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "a")
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    images = pipeline(5, generators, 2, return_dict=False)[0]
    corner = np.asarray(images[0].convert("RGB").resize((96, 96), Image.Resampling.NEAREST))
    assert np.abs(a[4:100, 4:100].astype(int) - corner).max() <= 1  # batches of 4 and 1 there


def test_tensorboard(tmp_path):
    train(
        small(tmp_path, trackers=" tensorboard ", sample_every=3, sample_num_images=2, sample_steps=2), None
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(
        path.parent for path in (tmp_path / "hf_ddpm").rglob("events*") if path.parent.name == "hf_ddpm"
    )
    events = EventAccumulator(str(folder)).Reload()
    quartiles = {f"loss_quartile_{number}" for number in (1, 2, 3, 4)}
    names = {"images", "loss", "lr", "ema_decay", "images_per_second", "seconds", "grad_norm"}
    assert set(events.Tags()["scalars"]) == names | quartiles
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], log(tmp_path), rtol=1e-6)
    picture = next(tag for tag in events.Tags()["images"] if tag.startswith("samples"))
    with Image.open(tmp_path / "samples" / "step-00000003.png") as grid:
        image = events.Images(picture)[0]
        assert (image.step, image.width, image.height) == (3, *grid.size)


def test_an_unknown_tracker(tmp_path):
    text = refused(small(tmp_path / "run", trackers="tensorboard,wandbb"))
    assert text.startswith("tracker 'wandbb' is unknown or not installed; available: ")
    assert not (tmp_path / "run").exists()


def test_an_output_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        text = refused(small(folder))
        assert text.startswith(f"output_dir '{folder}' can't be written: ")
    assert (tmp_path / "file").read_text() == "kept"


def test_progress_in_a_log_file_is_a_line_for_each_line_of_the_log(tmp_path, capsys):
    result = train(small(tmp_path, max_steps=2), Conv())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert [line.split(", loss")[0] for line in lines] == [
        "train: step 1/2, epoch 0.00",
        "train: step 2/2, epoch 0.01",
    ]
    assert f", loss {result.loss:.4f}, " in lines[1] and " images/s, took 00:0" in lines[1]
    assert result.images_per_second > 0 and result.loss == log(tmp_path)[-1]
