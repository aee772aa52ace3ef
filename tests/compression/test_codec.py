"""codec.py: a pipeline and images become a file, which no other pipeline opens, and come back to the bit."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.compression import compress, decompress
from hf_ddpm.compression.container import read_content
from hf_ddpm.data.stream import load_stream
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.evaluation.errors import measure_errors
from hf_ddpm.evaluation.errors_config import ErrorsConfig
from hf_ddpm.exact import ExactDenoiser
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.models import create_model
from hf_ddpm.scheduler import DDPMScheduler
from tests.launching import environment

CODEC = "hf_ddpm.compression.codec."


@pytest.fixture(scope="module")
def digits():
    return torch.stack(list(load_stream("digits", "test").images()))[:30]


@pytest.fixture(scope="module")
def measured(tiny_folder, tmp_path_factory):
    """`tiny_folder` with a table of errors; to be read only."""
    folder = tmp_path_factory.mktemp("measured") / "model"
    shutil.copytree(tiny_folder, folder)
    measure_errors(ErrorsConfig(model=str(folder), dataset="digits", evals=201))
    return folder


@pytest.fixture(scope="module")
def pipeline(measured):
    return DDPMPipeline.from_pretrained(measured)


@pytest.fixture(scope="module")
def file(pipeline, digits, tmp_path_factory):
    """A file of `digits`; to be read only."""
    path = tmp_path_factory.mktemp("file") / "x.hfdc"
    compress(pipeline, digits, path, steps=5)
    return path


def test_there_and_back_with_names_and_labels(pipeline, digits, tmp_path):
    names, labels = [f"d/{i}.png" for i in range(30)], [i % 10 for i in range(30)]
    sizes = compress(
        pipeline, digits, tmp_path / "x", steps=5, names=names, labels=labels, classes=list("abcdefghij")
    )
    found = decompress(pipeline, tmp_path / "x")
    assert torch.equal(found.images, digits) and found.names == names
    assert found.labels == labels and found.classes == list("abcdefghij")
    assert sizes.images == 30 and sizes.file == (tmp_path / "x").stat().st_size
    assert sizes.net_images == 29 and 0 < sizes.names < 300


def test_the_chosen_chain_the_variance_and_the_decoder_are_plans(pipeline, file):
    header, errors = read_content(file).header, pipeline.errors.errors
    costs = {name: errors.best_chains("by-value", 5, name) for name in ("exact", "levels")}
    best = min(costs, key=lambda name: costs[name].nats[4])
    assert (header.variance, header.decoder) == ("by-value", best)
    assert header.steps == costs[best].steps(5) and header.dtype == "float64"


def test_the_size_is_what_the_bound_says(pipeline, digits, tmp_path):
    sizes = compress(pipeline, digits, tmp_path / "x", steps=10)
    content = read_content(tmp_path / "x")
    beside = content.header_bytes + content.chunks[0].own_bytes + 4
    assert sizes.file <= sizes.net_bits / 8 + beside
    assert content.header_bytes < 1024


@pytest.mark.parametrize("number", [1, 2, 3, 11])
@pytest.mark.parametrize("batch", [1, 8])
def test_few_images(pipeline, digits, tmp_path, number, batch):
    sizes = compress(pipeline, digits[:number], tmp_path / "x", steps=3, batch=batch)
    assert torch.equal(decompress(pipeline, tmp_path / "x").images, digits[:number])
    assert sizes.file < 1024 + 64 * number


@pytest.mark.parametrize("value", [0, 255])
def test_images_whose_own_code_is_too_short_to_draw_from(pipeline, tmp_path, value):
    images = torch.full((20, 1, 8, 8), value, dtype=torch.uint8)
    compress(pipeline, images, tmp_path / "x", steps=3)
    chunk = read_content(tmp_path / "x").chunks[0]
    assert chunk.own > 1 or chunk.spare > 0
    assert torch.equal(decompress(pipeline, tmp_path / "x").images, images)


def test_noise_after_quiet_images_needs_more_bits_on_the_way(pipeline, tmp_path):
    noise = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = torch.cat([torch.zeros(3, 1, 8, 8, dtype=torch.uint8), noise])
    compress(pipeline, images, tmp_path / "x", steps=3)
    assert torch.equal(decompress(pipeline, tmp_path / "x").images, images)


def test_chunks(pipeline, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(CODEC + "MOST_IMAGES", 13)
    compress(pipeline, digits, tmp_path / "x", steps=3, batch=4)
    assert [chunk.images for chunk in read_content(tmp_path / "x").chunks] == [13, 13, 4]
    assert torch.equal(decompress(pipeline, tmp_path / "x").images, digits)


def test_float32_comes_back_in_this_process(pipeline, digits, tmp_path):
    compress(pipeline, digits[:9], tmp_path / "x", steps=4, dtype="float32")
    assert torch.equal(decompress(pipeline, tmp_path / "x").images, digits[:9])
    assert next(pipeline.unet.parameters()).dtype == torch.float32


def test_the_pipeline_stays_as_it_is(pipeline, digits, tmp_path):
    own = copy.deepcopy(pipeline)
    own._folder = pipeline._folder
    own.unet.train()
    compress(own, digits[:3], tmp_path / "x", steps=3, dtype="float32")
    assert own.unet.training and next(own.unet.parameters()).dtype == torch.float32


def test_a_fresh_process_decodes_it(measured, file, digits, tmp_path):
    words = ["-m", "hf_ddpm", "decompress", str(measured), str(file), "--out", str(tmp_path / "back")]
    subprocess.run([sys.executable, *words], check=True, env=environment(), capture_output=True)
    for i, image in enumerate(digits):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "back" / f"{i:05d}.png")), image[0])


@pytest.mark.parametrize("most", [1, 3])
def test_another_batch_split_of_the_network_decodes_it_in_float64(pipeline, file, digits, most, monkeypatch):
    def in_pieces(network):
        inner = as_denoiser(network)
        return lambda x, t: torch.cat([inner(*z) for z in zip(x.split(most), t.split(most), strict=True)])

    monkeypatch.setattr(CODEC + "as_denoiser", in_pieces)
    assert torch.equal(decompress(pipeline, file).images, digits)


def test_any_denoiser(tmp_path):
    """A closed form that is no module, without measured errors, in RGB."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 4, 6), generator=generator).to(torch.uint8)
    scheduler = DDPMScheduler(50, beta_end=0.3, prediction_type="sample")
    model = ExactDenoiser(scheduler.process, images.double() / 127.5 - 1)
    own = DDPMPipeline(model, scheduler, image_shape=(3, 4, 6))
    compress(own, images, tmp_path / "x", steps=10)
    assert torch.equal(decompress(own, tmp_path / "x").images, images)
    assert read_content(tmp_path / "x").header.errors is None


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variances(tmp_path, digits, variance):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(20, beta_end=0.5, variance_type=variance)
    own = DDPMPipeline(create_model("tiny", out_channels=2), scheduler)
    compress(own, digits[:5], tmp_path / "x", steps=4)
    assert torch.equal(decompress(own, tmp_path / "x").images, digits[:5])
    assert read_content(tmp_path / "x").header.variance == variance


def test_a_network_of_classes_is_told_the_labels(tmp_path, digits):
    torch.manual_seed(0)
    own = DDPMPipeline(create_model("tiny", num_classes=10), DDPMScheduler(20, beta_end=0.5))
    labels = [i % 10 for i in range(5)]
    compress(own, digits[:5], tmp_path / "x", steps=4, labels=labels)
    assert read_content(tmp_path / "x").header.conditioned
    assert torch.equal(decompress(own, tmp_path / "x").images, digits[:5])
    for others in (None, [10, 0, 0, 0, 0]):  # none, and one that the network doesn't know
        compress(own, digits[:5], tmp_path / "y", steps=4, labels=others, overwrite=True)
        assert not read_content(tmp_path / "y").header.conditioned
        assert torch.equal(decompress(own, tmp_path / "y").images, digits[:5])


# Another model


def refused(pipeline, file, **options):
    with pytest.raises(ValueError) as error:
        decompress(pipeline, file, **options)
    words = str(error.value)
    assert len(words) < 300 and "\n" not in words and str(file.name) in words
    return words


def other(pipeline, folder=True):
    found = copy.deepcopy(pipeline)
    found._folder = pipeline._folder if folder is True else folder
    return found


def test_other_weights_are_refused_by_both_digests(pipeline, file):
    another = other(pipeline, None)
    another.unet.conv_out.bias.data += 1e-3
    words = refused(another, file)
    assert (
        read_content(file).header.weights in words and "the weights" in words and "allowed: the same" in words
    )
    assert refused(another, file, force=True) == words


def test_another_process_is_refused(pipeline, file):
    another = DDPMPipeline(pipeline.unet, DDPMScheduler(20, beta_end=0.4))
    assert "the process" in refused(another, file)


def test_other_errors_are_refused(pipeline, measured, file, tmp_path):
    shutil.copytree(measured, tmp_path / "m")
    (tmp_path / "m" / ERRORS).unlink()
    assert f"the model has no {ERRORS}" in str(refused(DDPMPipeline.from_pretrained(tmp_path / "m"), file))
    measure_errors(ErrorsConfig(model=str(tmp_path / "m"), dataset="digits", evals=202, seed=1))
    assert "the errors table" in refused(DDPMPipeline.from_pretrained(tmp_path / "m"), file)


def test_another_shape_is_refused(file):
    another = DDPMPipeline(create_model("tiny", image_size=16), DDPMScheduler(20, beta_end=0.5))
    words = refused(another, file)
    assert "(1, 8, 8)" in words and "(1, 16, 16)" in words


def other_answers(factor):
    """What stands in for `as_denoiser`: answers that are off by this factor."""
    return lambda network: lambda x, t: as_denoiser(network)(x, t) * factor


def test_answers_that_differ_here_are_refused_before_anything_is_decoded(pipeline, file, monkeypatch):
    monkeypatch.setattr(CODEC + "as_denoiser", other_answers(1 + 1e-6))
    monkeypatch.setattr(CODEC + "decode_chunk", lambda *_: pytest.fail("decoded"))
    words = refused(pipeline, file)
    assert (
        "the network's answers" in words and read_content(file).header.answers in words and "force" in words
    )


@pytest.mark.parametrize("factor", [1.001, 1.5, 0.0])
def test_force_finds_wrong_pixels_all_the_same(pipeline, file, factor, monkeypatch):
    monkeypatch.setattr(CODEC + "as_denoiser", other_answers(factor))
    assert "can't be decoded here" in refused(pipeline, file, force=True)


def test_tables_of_another_machine_are_refused(pipeline, file, monkeypatch):
    monkeypatch.setattr("hf_ddpm.compression.scheme.Chain.digest", "5" * 16)
    assert "the coder tables" in refused(pipeline, file)
    decompress(pipeline, file, force=True)


def forge(file, path, change):
    from tests.compression.test_container import MAGIC, START, VERSION, hashlib

    data = file.read_bytes()
    length = int.from_bytes(data[10:14], "little")
    header = json.loads(data[START : START + length])
    change(header)
    text = json.dumps(header).encode()
    numbers = VERSION.to_bytes(2, "little") + len(text).to_bytes(4, "little")
    body = text + data[START + length :]
    path.write_bytes(MAGIC + numbers + hashlib.sha256(numbers + body).digest() + body)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"variance": "optimism"},
        {"decoder": "tanh"},
        {"steps": [0, 400]},
        {"steps": [1, 2]},
        {"parts": 5},
        {"bin_width": 2.0},
        {"clip_x0": False},
        {"conditioned": True},
    ],
    ids=lambda change: "".join(change),
)
def test_a_header_with_a_right_sum_that_is_not_the_models(pipeline, file, tmp_path, change):
    for force in (False, True):
        path = forge(file, tmp_path / "y.hfdc", lambda header: header.update(change))
        with pytest.raises(ValueError) as error:
            decompress(pipeline, path, force=force)
        assert len(str(error.value)) < 300


def test_a_network_that_is_not_finite(tmp_path, digits):
    torch.manual_seed(0)
    own = DDPMPipeline(create_model("tiny"), DDPMScheduler(20, beta_end=0.5))
    own.unet.conv_out.bias.data += torch.nan
    with pytest.raises(ValueError, match="not finite"):
        compress(own, digits[:3], tmp_path / "x", steps=3)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 21}, "steps is 21; allowed: 1 to 20"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 5000}, "batch is 5000; allowed: at most 4096"),
        ({"dtype": "float16"}, "dtype is 'float16'; allowed: float64, float32"),
        ({"names": ["a.png"]}, "one for each"),
        ({"names": ["../a.png", "b.png", "c.png"]}, "allowed: of files within a folder"),
        ({"labels": [1, 2]}, "labels is"),
        ({"labels": [1, 2, "x"]}, "labels is"),
        ({"classes": ["a"]}, "classes is"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_that_can_not_be(pipeline, digits, tmp_path, options, words):
    with pytest.raises(ValueError) as error:
        compress(pipeline, digits[:3], tmp_path / "x", **{"steps": 3, **options})
    assert words in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 9, 8),
        torch.zeros(2, 1, 8, 8) + 0.3,
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        3,
        [],
    ],
    ids=["shape", "levels", "none", "number", "empty"],
)
def test_images_that_can_not_be(pipeline, tmp_path, images):
    with pytest.raises(ValueError):
        compress(pipeline, images, tmp_path / "x", steps=3)


def test_a_file_that_is_there_is_kept(pipeline, digits, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="there already"):
        compress(pipeline, digits[:2], tmp_path / "x", steps=3)
    assert (tmp_path / "x").read_text() == "mine"
    with pytest.raises(ValueError, match="the order is compress"):
        compress(digits[:2], pipeline, tmp_path / "y")


@pytest.mark.slow
def test_ten_thousand_images_without_a_wrong_pixel(pipeline, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10_000, 1, 8, 8), generator=generator).to(torch.uint8)
    images[::3] //= 4
    compress(pipeline, images, tmp_path / "x", steps=5, batch=64)
    assert torch.equal(decompress(pipeline, tmp_path / "x").images, images)
