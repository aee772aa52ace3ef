"""pictures.py: of Gaussian data, where every picture is known in closed form; layout, seeds, files."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.data.pixels import to_float
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from hf_ddpm.pictures import encode_decode, forward_process, interpolate, progressive_generation
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.seeds import image_generators

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # the default schedule by its definition
MEAN, VARIANCE = 0.2, 0.25
STEPS = 25  # that are executed of the thousand
SHAPES = pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)], ids=str)


def posterior_mean(x_t, t):
    """E[x_0 | x_t] of x_0 ~ N(MEAN, VARIANCE), a line."""
    return MEAN + slope(t) * (x_t - ABAR[t] ** 0.5 * MEAN)


def slope(t):
    return ABAR[t] ** 0.5 * VARIANCE / (ABAR[t] * VARIANCE + 1 - ABAR[t])


def model(seen=None, **config):
    """A pipeline with the exact network; what it is asked goes to `seen`."""

    def network(x_t, t):
        if seen is not None:
            seen.append((int(t[0]), x_t))
        return posterior_mean(x_t, int(t[0]))

    config = {"prediction_type": "sample", "clip_sample": False, **config}
    pipeline = DDPMPipeline(network, DDPMScheduler(**config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(count, *shape):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def near(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Interpolation


@SHAPES
@pytest.mark.parametrize("t", [0, 250, 500, 999])
def test_interpolations_of_a_linear_network(shape, t):
    # Noise is shared, and each step is linear with the exact mean, so images differ as E[x_0 | x_t] does:
    # by slope · √ᾱ · (b − a) from λ = 0 to λ = 1, evenly; nothing of it at t = 999, all at t = 0.
    a, b = images(2, *shape)
    sheet = interpolate(model(), a, b, t, 5, seed=3, num_inference_steps=STEPS)
    assert sheet.images.shape == (1, 7, *shape) and sheet.rows == [f"t = {t}"]
    assert sheet.columns == ["A", "λ = 0", "λ = 0.25", "λ = 0.5", "λ = 0.75", "λ = 1", "B"]
    assert torch.equal(sheet.images[0, 0], a) and torch.equal(sheet.images[0, -1], b)
    row = sheet.images[0, 1:-1]
    kept = slope(t) * ABAR[t] ** 0.5
    assert {0: kept > 0.999, 999: kept < 2e-5}.get(t, 0.01 < kept < 0.9)
    for i in range(5):
        near(row[i] - row[0], kept * i / 4 * (b - a))


def test_the_ends_are_reconstructions_and_rows_are_their_own():
    a, b = images(2, 1, 8, 8)
    pipeline = model()
    nine = interpolate(pipeline, a, b, [500, 250], 9, 7, STEPS).images
    two = interpolate(pipeline, a, b, 250, 2, 7, STEPS).images
    near(nine[1, [1, -2]], two[0, 1:-1], 1e-6)
    for end, image in ((1, a), (-2, b)):
        near(encode_decode(pipeline, image[None], [500, 250], 7, STEPS).images[2, 1:], nine[:, end], 1e-6)
    other = interpolate(pipeline, a, b, 250, 2, 8, STEPS).images
    assert (other[0, 1] - two[0, 1]).std() > 0.05
    assert torch.equal(interpolate(pipeline, a, b, 250, 2, 7, STEPS).images, two)


def test_mixtures_have_the_variance_of_their_step():
    a, b = images(2, 1, 64, 64)
    seen = []
    interpolate(model(seen), a, b, 500, 3, 0, 1)
    t, x_t = seen[0]
    assert t == 500
    noise = [x - ABAR[500] ** 0.5 * mix for x, mix in zip(x_t, (a, (a + b) / 2, b), strict=True)]
    for each in noise:
        near(each, noise[0], 1e-5)  # one ε
        # The standard error of a variance from n normal draws is σ² √(2/n).
        assert abs(each.var() - (1 - ABAR[500])) < 5 * (1 - ABAR[500]) * (2 / each.numel()) ** 0.5
    assert len({int(t) for t, _ in seen}) == 1  # 500 alone: the grid of one step is above it


# Encode, decode


@SHAPES
def test_encode_decode(shape):
    x_0, steps = images(2, *shape), [0, 300, 999]
    sheet = encode_decode(model(), x_0, steps, 5, STEPS)
    assert sheet.columns == ["image", "t = 0", "t = 300", "t = 999"]
    assert sheet.rows == ["x_t", "x̂_0", "decoded"] * 2
    assert sheet.images.shape == (6, 4, *shape)
    for i in range(2):
        rows = sheet.images[3 * i : 3 * i + 3]
        assert all(torch.equal(row[0], x_0[i]) for row in rows)
        noise = [
            (rows[0, 1 + j] - ABAR[t] ** 0.5 * x_0[i]) / (1 - ABAR[t]) ** 0.5 for j, t in enumerate(steps)
        ]
        near(noise[0], noise[2], 1e-4)  # at t = 0 divided by 0.01
        for j, t in enumerate(steps):
            near(rows[1, 1 + j], posterior_mean(rows[0, 1 + j], t).float())
        near(rows[2, 1], rows[1, 1], 1e-6)  # one step from t = 0: x̂_0 itself
    assert (sheet.images[0, 3] - sheet.images[3, 3]).std() > 0.5  # each image has noise of its own

    # At the end nothing is left of the image: another one gives the same.
    other = encode_decode(model(), images(4, *shape)[2:], steps, 5, STEPS)
    near(other.images[2::3, 3], sheet.images[2::3, 3], 1e-4)
    near(encode_decode(model(), x_0[:1], [300], 5, STEPS).images[2, 1], sheet.images[2, 2], 1e-6)


# Generation


@pytest.mark.parametrize("kind", ["sample", "epsilon"])
def test_progressive_generation(kind, tiny_folder):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.scheduler.register_to_config(prediction_type=kind)
    pipeline.set_progress_bar_config(disable=True)
    sheet = progressive_generation(pipeline, 3, 4, 6)
    assert sheet.columns == ["t = 19", "t = 13", "t = 6", "t = 0", "image"]
    assert sheet.rows == ["x_t", "x̂_0"] * 3 and sheet.images.shape == (6, 5, 1, 8, 8)
    # The images of `hf-ddpm sample --seed 6`.
    drawn = pipeline(3, image_generators(6, range(3)), output_type="pt").images
    near((sheet.images[::2, -1] / 2 + 0.5).clamp(0, 1), drawn, 1e-5)
    assert torch.equal(sheet.images[::2, -1], sheet.images[1::2, -1])
    first = torch.stack([torch.randn(1, 8, 8, generator=each) for each in image_generators(6, range(3))])
    assert torch.equal(sheet.images[::2, 0], first)
    for column, t in enumerate((19, 13, 6, 0)):
        near(pipeline.predict_x0(sheet.images[::2, column], t), sheet.images[1::2, column], 1e-4)
    near(sheet.images[1::2, 3].clamp(-1, 1), sheet.images[::2, 4], 1e-5)  # the last step gives x̂_0

    spaced = progressive_generation(pipeline, 1, 2, 6, 5)
    assert spaced.columns == ["t = 17", "t = 0", "image"]  # 16 knows its image yet


# To noise


def test_forward_process():
    x_0 = images(2, 3, 5, 7)
    sheet = forward_process(DDPMScheduler().process, x_0, 4, 1)
    assert sheet.columns == ["image", "t = 0", "t = 333", "t = 666", "t = 999"]
    assert torch.equal(sheet.images[:, 0], x_0)
    noise = (sheet.images[:, 4] - ABAR[999] ** 0.5 * x_0) / (1 - ABAR[999]) ** 0.5
    assert abs(noise.var() - 1) < 5 * (2 / noise.numel()) ** 0.5
    for column, t in enumerate((0, 333, 666), 1):
        near(sheet.images[:, column], (ABAR[t] ** 0.5 * x_0 + (1 - ABAR[t]) ** 0.5 * noise).float(), 1e-5)
    near(forward_process(DDPMScheduler().process, x_0[:1], 4, 1).images[0], sheet.images[0], 0)


# Files and refusals


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 6, 4), (1, 64, 4)], ids=str)
def test_a_sheet_is_a_png_file(shape, tmp_path):
    sheet = interpolate(model(), *images(2, *shape), [10, 20], 3, num_inference_steps=2)
    path = tmp_path / "new" / "sheet.png"
    assert sheet.save(path) == path
    with Image.open(path) as picture:
        assert picture.format == "PNG" and all(90 < side < 2000 for side in picture.size)
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p, x: interpolate(p, x[0], x[1], 1000), "t is 1000; allowed: steps in 0..999"),
        (lambda p, x: interpolate(p, x[0], x[1], [3, -1]), "t is -1; allowed: steps in 0..999"),
        (lambda p, x: interpolate(p, x[0], x[1], []), "t is empty; allowed: steps in 0..999"),
        (lambda p, x: interpolate(p, x[0], x[1], 5, 1), "num_images is 1; allowed: whole numbers >= 2"),
        (lambda p, x: interpolate(p, x[0], x[1][:, 1:], 5), "shapes (1, 8, 8) and (1, 7, 8); allowed: one"),
        (lambda p, x: interpolate(p, x[0], x[1], 5, "9"), "num_images is '9'; allowed: whole numbers >= 2"),
        (lambda p, x: interpolate(p, x[0], x[1], 5.0), "t is 5.0; allowed: steps in 0..999"),
        (lambda p, x: interpolate(p, x[0], x[1], [5, True]), "t is True; allowed: steps in 0..999"),
        (lambda p, x: interpolate(p, x[0], x[1], None), "t is None; allowed: steps in 0..999"),
        (lambda p, x: interpolate(x[0], x[1], p, 5), "pipeline is a float32 tensor of shape (1, 8, 8)"),
        (lambda p, x: encode_decode(x, p, [5]), "pipeline is a float32 tensor of shape (2, 1, 8, 8)"),
        (lambda p, x: progressive_generation(p.unet), "; allowed: a DDPMPipeline"),
        (lambda p, x: progressive_generation(p, 2.5), "num_images is 2.5; allowed: whole numbers >= 1"),
        (lambda p, x: encode_decode(p, x, [5, 1000]), "t is 1000; allowed: steps in 0..999"),
        (lambda p, x: encode_decode(p, x, "50"), "t is '50'; allowed: steps in 0..999"),
        (lambda p, x: forward_process(p.process, x, 0), "num_columns is 0; allowed: whole numbers in"),
        (lambda p, x: forward_process(p.process, x, 1001), "num_columns is 1001; allowed: whole numbers"),
        (lambda p, x: forward_process(p.process, x, 2.5), "num_columns is 2.5; allowed: whole numbers"),
    ],
)  # fmt: skip
def test_bad_argument(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make(model(), images(2, 1, 8, 8))


@pytest.mark.parametrize("number", [np.int64, torch.tensor], ids=["NumPy", "torch"])
def test_a_step_may_be_a_number_of_a_library(number):
    pipeline, x = model(), images(2, 1, 8, 8)
    expected = interpolate(pipeline, x[0], x[1], 3, 2)
    assert torch.equal(interpolate(pipeline, x[0], x[1], number(3), 2).images, expected.images)
    assert interpolate(pipeline, x[0], x[1], number(3), 2).rows == ["t = 3"]


def test_another_sampler_is_refused(tiny_folder):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    swap_scheduler(pipeline, "ddim")
    for make in (
        lambda: progressive_generation(pipeline),
        lambda: interpolate(pipeline, *images(2, 1, 8, 8), 5),
    ):
        with pytest.raises(ValueError, match="the scheduler is 'DDIMScheduler'; allowed: DDPMScheduler"):
            make()


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: [Image.fromarray(image) for image in x],
        lambda x: x,
        lambda x: x[..., None],
        lambda x: list(x),
        lambda x: tuple(torch.from_numpy(x)[:, None]),
        lambda x: (image for image in torch.from_numpy(x)),
        lambda x: torch.from_numpy(x)[:, None],
        lambda x: x[:, None].astype(np.float32) / 127.5 - 1,
        lambda x: (torch.from_numpy(x)[:, None] / 127.5 - 1).double(),
    ],
    ids=range(9),
)
def test_images_of_every_form_give_the_same_picture(form, tiny_folder):
    x_0 = to_float(torch.from_numpy(PIXELS)[:, None])
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    for draw_it in (
        lambda x: forward_process(pipeline.process, x, 3),
        lambda x: encode_decode(pipeline, x, [10], num_inference_steps=2),
        lambda x: interpolate(pipeline, *(x if isinstance(x, list | tuple) else form(PIXELS)), 10, 2),
    ):
        near(draw_it(form(PIXELS)).images, draw_it(x_0).images, 1e-5)


@pytest.mark.parametrize("form", [Image.fromarray, np.copy, torch.from_numpy], ids=["PIL", "array", "tensor"])
def test_one_image_is_a_batch_of_one(form, tiny_folder):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    x_0 = to_float(torch.from_numpy(PIXELS)[:1, None])
    near(encode_decode(pipeline, form(PIXELS[0]), [10]).images, encode_decode(pipeline, x_0, [10]).images)
    near(
        forward_process(pipeline.process, form(PIXELS[0])).images,
        forward_process(pipeline.process, x_0).images,
    )


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(0, 1, 8, 8), "allowed: at least one image of at least one pixel"),
        ([], "there are no images; allowed: at least one"),
        (torch.full((1, 1, 8, 8), float("nan")), "values from nan to nan; allowed: [-1, 1], or uint8"),
        (torch.from_numpy(PIXELS)[:, None].float(), "from 0 to 248; allowed: [-1, 1], or uint8"),
        (torch.from_numpy(PIXELS)[:, None] / 255, "none below 0; allowed: [-1, 1], or uint8 (did you"),
        (PIXELS.astype(np.int64), "are an int64 NumPy array of shape (2, 8, 8); allowed: PIL images, uint8"),
        (Image.fromarray(PIXELS[0]).convert("P"), "an image has PIL mode P; allowed: L, RGB, RGBA"),
        ([PIXELS[0], PIXELS[1, :4]], "(4, 8)"),
        ("digit.png", "images are 'digit.png'; allowed: PIL images, uint8, or"),
        (None, "images are None; allowed: PIL images, uint8, or"),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_are_no_images_is_refused(images, words, tiny_folder):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    for draw_it in (
        lambda: encode_decode(pipeline, images, [0]),
        lambda: forward_process(pipeline.process, images),
    ):
        with pytest.raises(ValueError) as error:
            draw_it()
        line = str(error.value)
        assert len(line) < 300 and "\n" not in line and (words in line or "(1, 4, 8)" in line)


def test_what_is_not_one_image_and_no_process_is_refused():
    pipeline, x = model(), images(2, 1, 8, 8)
    with pytest.raises(ValueError, match="there are 2 images where one is interpolated; allowed: one"):
        interpolate(pipeline, x, x[0], 5)
    with pytest.raises(ValueError, match="process is a DDPMPipeline; allowed: a DiffusionProcess, as pipe"):
        forward_process(pipeline, x)


@pytest.mark.parametrize("name", ["sheet.png", "new/SHEET.PNG", "a/b/sheet.jpg", "sheet.webp", "sheet.tiff"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_sheet_is_saved_as_its_name_says(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sheet = forward_process(DDPMScheduler().process, images(1, 3, 5, 7), 3)
    assert sheet.save(kind(name)) == Path(name)
    with Image.open(name) as picture:
        assert picture.format == {"jpg": "JPEG", "tiff": "TIFF"}.get(name[-3:].lower(), picture.format)
        assert picture.size == sheet.picture().size
        if picture.format != "JPEG":
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.asarray(sheet.picture()))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "sheet.xyz",
            ValueError,
            "path is 'sheet.xyz'; allowed: a name that ends in .png, .jpg, .jpeg, .webp",
        ),
        ("sheet", ValueError, "path is 'sheet'; allowed: a name that ends in .png"),
        ("", ValueError, "path is ''; allowed: a name that ends in .png"),
        ("a\0.png", ValueError, "allowed: a name without zero bytes"),
        ("~nobody-here/x.png", ValueError, "path '~nobody-here/x.png' is no path of a file"),
        (3, ValueError, "path is 3; allowed: the name of a file, such as 'sheet.png'"),
        (None, ValueError, "path is None; allowed: the name of a file, such as 'sheet.png'"),
        ("file/sheet.png", OSError, "can't write 'file/sheet.png': "),
        ("folder.png", OSError, "can't write 'folder.png': "),
    ],
    ids=range(9),
)
def test_a_file_that_can_not_be(name, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.png").mkdir()
    sheet = forward_process(DDPMScheduler().process, images(1, 1, 5, 7), 2)
    with pytest.raises(error, match=re.escape(words)) as found:
        sheet.save(name)
    assert "\n" not in str(found.value) and len(str(found.value)) < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_the_noise_of_the_steps_is_not_that_in_x_t():
    # T = 2 and x̂_0 = 0, then x̂_0 = x: the decoded image is c_t x_t + σ z, with z independent of ε.
    settings = {"num_train_timesteps": 2, "beta_start": 0.5, "beta_end": 0.5, "clip_sample": False}
    scheduler = DDPMScheduler(**settings, prediction_type="sample")
    pipeline = DDPMPipeline(lambda x_t, t: x_t * (t == 0).view(-1, 1, 1, 1), scheduler)
    sheet = encode_decode(pipeline, torch.zeros(1, 1, 100, 100), [1])
    x_t, decoded = (sheet.images[row, 1].double().flatten() for row in (0, 2))
    z = decoded - pipeline.process.posterior_mean_coef_xt[1] * x_t
    assert z.std() > 0.1
    assert abs(torch.corrcoef(torch.stack([x_t, z]))[0, 1]) < 5 / 100
