"""Sampling of classes: labels by number and by name, guidance with every sampler, and what is refused."""

import json

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm import load_run, pictures
from hf_ddpm.folders.labels import write_labels
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.runs import save_own_network
from hf_ddpm.generation.samplers import SCHEDULERS, swap_scheduler
from hf_ddpm.guidance import Guided
from hf_ddpm.models import create_model
from hf_ddpm.publishing.publish import collect
from hf_ddpm.scheduler import DDPMScheduler
from tests.generation.networks import ABAR, quiet, seeds, short

NAMES = {0: "boot", 1: "bag", 2: "T-shirt/top"}

# numpy tells diffusers' schedulers what numpy 3 will want of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")


def classy(**changes):
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=3, **changes).eval()
    nn.init.normal_(network.class_embedding.weight, std=4)  # classes that differ
    pipeline = quiet(DDPMPipeline(network, short()))
    pipeline.id2label = NAMES
    return pipeline


@pytest.fixture(scope="module")
def pipeline():
    return classy()


def drawn(pipeline, count, first=0, **given):
    return pipeline(count, seeds(count, first), output_type="np", **given).images


def test_a_class_by_number_by_name_and_for_each_image(pipeline):
    boots, bags, none = (drawn(pipeline, 3, class_labels=label) for label in (0, 1, None))
    assert not np.array_equal(boots, bags) and not np.array_equal(boots, none)
    for same in (
        "boot",
        "0",
        torch.tensor(0),
        np.int32(0),
        [0, "boot", np.int64(0)],
        torch.tensor([0, 0, 0]),
    ):
        np.testing.assert_array_equal(drawn(pipeline, 3, class_labels=same), boots)
    np.testing.assert_array_equal(drawn(pipeline, 3, class_labels="none"), none)
    np.testing.assert_array_equal(drawn(pipeline, 3), none)
    mixed = drawn(pipeline, 3, class_labels=["boot", 1, None])
    np.testing.assert_allclose(mixed, np.stack([boots[0], bags[1], none[2]]), atol=1e-5)


def test_as_many_images_as_labels_and_chunks_have_their_own(pipeline):
    images = pipeline(
        generator=seeds(4), class_labels=[0, 1, 2, None], guidance_scale=2, output_type="np"
    ).images
    assert images.shape == (4, 8, 8, 1)
    for size in (1, 3):
        chunks = drawn(pipeline, 4, class_labels=[0, 1, 2, None], guidance_scale=2, max_batch_size=size)
        np.testing.assert_allclose(chunks, images, atol=1e-5)
    assert len(pipeline(class_labels="bag").images) == 1


def test_w_of_0_and_1_are_the_models_without_and_with_a_class(pipeline):
    boots, none = drawn(pipeline, 2, class_labels=0), drawn(pipeline, 2)
    np.testing.assert_array_equal(drawn(pipeline, 2, class_labels=0, guidance_scale=0), none)
    for interval in (None, (0, 20), (5, 5)):
        same = drawn(pipeline, 2, class_labels=0, guidance_scale=1, guidance_interval=interval)
        np.testing.assert_array_equal(same, boots)
    empty = drawn(pipeline, 2, class_labels=0, guidance_scale=3, guidance_interval=(5, 5))
    np.testing.assert_array_equal(empty, boots)
    everywhere = drawn(pipeline, 2, class_labels=0, guidance_scale=3, guidance_interval=(0, 20))
    np.testing.assert_array_equal(everywhere, drawn(pipeline, 2, class_labels=0, guidance_scale=3))


class Gaussians(nn.Module):
    """The exact network of pixels N(μ_y, σ²), and of N(0, σ²) without a class: one variance for all."""

    num_classes = 2
    mean = torch.tensor([0.8, -0.5, 0.0], dtype=torch.float64)
    std = 0.3

    def forward(self, x_t, t, class_labels):
        abar = torch.from_numpy(np.interp(t.double().cpu(), np.arange(1000), ABAR)).view(-1, 1, 1, 1)
        mean = self.mean[class_labels].view(-1, 1, 1, 1)
        slope = abar.sqrt() * self.std**2 / (abar * self.std**2 + 1 - abar)
        x_0 = mean + slope * (x_t.double() - abar.sqrt() * mean)
        return ((x_t.double() - abar.sqrt() * x_0) / (1 - abar).sqrt()).float()


@pytest.mark.parametrize("w", [0, 1, 2.5])
def test_guided_ddim_of_gaussians_of_one_variance_is_a_linear_recursion(w):
    """x̂_w = w μ + k (x − √ᾱ w μ): the recursion that goes to N(w μ, σ²)."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipeline = quiet(DDPMPipeline(Gaussians(), scheduler, image_shape=(1, 4, 4)))
    found = {}

    def watch(owner, step, t, tensors):
        found[step] = tensors["sample"]

    pipeline(2, seeds(2), 20, class_labels=[0, 1], guidance_scale=w, callback_on_step_end=watch)
    x = torch.stack([torch.randn(1, 4, 4, generator=g) for g in seeds(2)]).double()
    mean = w * torch.tensor([0.8, -0.5], dtype=torch.float64).view(2, 1, 1, 1)
    for step, t in enumerate(range(950, -1, -50)):
        abar, before = ABAR[t], ABAR[t - 50] if t else 1.0
        k = abar**0.5 * 0.09 / (abar * 0.09 + 1 - abar)
        x_0 = mean + k * (x - abar**0.5 * mean)
        x = before**0.5 * x_0 + ((1 - before) / (1 - abar)) ** 0.5 * (x - abar**0.5 * x_0)
        torch.testing.assert_close(found[step].double(), x, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_guides(name):
    """Guidance of the two exact classes goes to w μ, whichever sampler takes the steps."""
    pipeline = quiet(DDPMPipeline(Gaussians(), DDPMScheduler(clip_sample=False), image_shape=(1, 8, 8)))
    swap_scheduler(pipeline, name)
    seen = []

    def watch(owner, step, t, tensors):
        seen.append(tensors["sample"])

    pipeline(8, seeds(8), 100, class_labels=[0, 1] * 4, guidance_scale=2, callback_on_step_end=watch)
    means = seen[-1].view(4, 2, -1).mean((0, 2))
    torch.testing.assert_close(means, torch.tensor([1.6, -1.0]), rtol=0, atol=0.12)


def test_a_prediction_is_clipped_once_after_guidance():
    """x̂_none = 0 and x̂_y = 0.8 give 2.4 at w = 3, clipped to 1; clipped halves would give 1 as well, but
    x̂_none = 2 and x̂_y = 0.8 give −1.6, and clipped halves 1 + 3 (0.8 − 1) = 0.4."""

    class Two(nn.Module):
        num_classes = 1

        def forward(self, x_t, t, class_labels):
            return torch.tensor([0.8, 2.0])[class_labels].view(-1, 1, 1, 1).expand(x_t.shape)

    pipeline = quiet(DDPMPipeline(Two(), short(prediction_type="sample"), image_shape=(1, 2, 2)))
    images = pipeline(1, class_labels=0, guidance_scale=3, output_type="pt").images
    assert torch.equal(images, torch.zeros(1, 1, 2, 2))  # −1.6, clipped to −1
    x_t = torch.zeros(1, 1, 2, 2)
    assert pipeline.predict_x0(x_t, 5, 0, 3).unique().item() == pytest.approx(2 + 3 * (0.8 - 2))


def test_the_network_is_asked_about_a_class(pipeline):
    x_t = torch.randn(3, 1, 8, 8, generator=seeds(1)[0])
    none, boot = pipeline.predict_x0(x_t, 7), pipeline.predict_x0(x_t, 7, "boot")
    guided = pipeline.predict_x0(x_t, 7, class_labels=[0, 0, None], guidance_scale=2)
    torch.testing.assert_close(guided[:2], (none + 2 * (boot - none))[:2], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(guided[2], none[2], rtol=1e-4, atol=1e-3)
    assert not torch.equal(pipeline.score(x_t, 7, 1), pipeline.score(x_t, 7))
    denoised = [pipeline.denoise(x_t, 7, seeds(3), **given) for given in ({}, {"class_labels": [0, 1, 2]})]
    assert not torch.equal(*denoised)


def test_without_labels_every_entrance_means_no_class(pipeline):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    none = DDPMPipeline(Guided(pipeline.unet, 3, 1), short(), image_shape=(1, 8, 8))
    for other in (pipeline, none):
        quiet(other)
    found, expected = (p.bits_per_dim(images, num_evals_per_image=4).per_image_bpd for p in (pipeline, none))
    torch.testing.assert_close(found, expected)
    sheets = [
        (
            pictures.interpolate(p, images[0], images[1], 10, 3),
            pictures.encode_decode(p, images, [5]),
            pictures.progressive_generation(p, 1, 2),
        )
        for p in (pipeline, none)
    ]
    for found, expected in zip(*sheets, strict=True):
        torch.testing.assert_close(found.images, expected.images, rtol=1e-4, atol=1e-4)


def test_names_go_with_the_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/labels.json").read_text())["id2label"] == {
        str(y): n for y, n in NAMES.items()
    }
    loaded = quiet(DDPMPipeline.from_pretrained(tmp_path / "model"))
    assert loaded.id2label == NAMES
    np.testing.assert_array_equal(drawn(loaded, 2, class_labels="bag"), drawn(pipeline, 2, class_labels=1))
    plain = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="class_labels should be provided"):
        plain(1, num_inference_steps=1)

    (tmp_path / "model/labels.json").write_text('{"id2label": {"0": "boot"}}')
    with pytest.raises(
        ValueError, match=r"labels.json: id2label names 1 classes; allowed for this network: 3"
    ):
        DDPMPipeline.from_pretrained(tmp_path / "model")


def test_a_folder_without_names(pipeline, tmp_path, caplog):
    DDPMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path / "model")
    loaded = quiet(DDPMPipeline.from_pretrained(tmp_path / "model"))
    assert loaded.id2label is None and "row 3 of its classes is taken for no class" in caplog.text
    np.testing.assert_array_equal(drawn(loaded, 2, class_labels=1), drawn(pipeline, 2, class_labels="bag"))
    with pytest.raises(ValueError, match=r"class is 'bag'; allowed: 0 to 2, none$"):
        loaded(class_labels="bag")


def test_names_go_to_the_hub_and_beside_a_module_of_ones_own(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    assert "labels.json" in collect(tmp_path / "model", "me/model").files

    class Own(nn.Module):
        def __init__(self, **said):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))
            vars(self).update(said)

        def forward(self, x_t, t, class_labels):
            return x_t * 0 + class_labels.view(-1, 1, 1, 1) / 4

    (tmp_path / "run").mkdir()
    own, scheduler = Own(num_classes=3), short(prediction_type="sample")
    save_own_network(tmp_path / "run", {"0.9": own.state_dict()}, "Own", (1, 8, 8), scheduler)
    write_labels(tmp_path / "run", NAMES)
    loaded = quiet(load_run(tmp_path / "run", Own(num_classes=3)))
    assert loaded.id2label == NAMES
    images = loaded(class_labels=["bag", "boot", None], output_type="pt").images
    torch.testing.assert_close(2 * images[:, 0, 0, 0] - 1, torch.tensor([0.25, 0, 0.75]))
    with pytest.raises(ValueError, match="Own says no num_classes; allowed: 3, as an attribute"):
        load_run(tmp_path / "run", Own())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"class_labels": 3}, "class is 3; allowed: 0 to 2"),
        ({"class_labels": -1}, "class is -1; allowed: 0 to 2"),
        ({"class_labels": True}, "class is True; allowed: a number in 0..2, a name, or None"),
        ({"class_labels": 1.0}, "class is 1.0; allowed"),
        ({"class_labels": "bot"}, "class is 'bot' (did you mean 'boot'?); allowed: 0 to 2"),
        ({"class_labels": [0, 1]}, "there are 2 class_labels for 3 images; allowed: as many, or one"),
        ({"class_labels": []}, "class_labels is an empty list"),
        ({"class_labels": [0, 1, 1.5]}, "class is 1.5; allowed"),
        ({"class_labels": [0, 1, [2]]}, "class is a list; allowed"),
        ({"class_labels": [0, 1, 7]}, "class is 7; allowed: 0 to 2"),
        ({"class_labels": torch.ones(3)}, "class_labels is a float32 tensor of shape (3,); allowed"),
        ({"class_labels": torch.ones(3, dtype=torch.bool)}, "class_labels is a bool tensor of shape (3,)"),
        ({"class_labels": torch.ones(3, 1).long()}, "class_labels is an int64 tensor of shape (3, 1)"),
        ({"class_labels": torch.ones(1).long()}, "there are 1 class_labels for 3 images"),
        ({"class_labels": np.ones(3)}, "class_labels is a float64 NumPy array of shape (3,)"),
        ({"class_labels": {0: 1}}, "class is a dict; allowed"),
        ({"guidance_scale": 2}, "guidance_scale is 2, but no class is given; allowed: with a class"),
        ({"class_labels": "none", "guidance_scale": 2}, "guidance_scale is 2, but no class is given"),
        ({"guidance_interval": (0, 5)}, "guidance_interval is set, but no class is given"),
        ({"class_labels": 0, "guidance_scale": -1}, "guidance_scale is -1; allowed: finite numbers >= 0"),
        ({"class_labels": 0, "guidance_scale": "2"}, "guidance_scale is '2'; allowed"),
        (
            {"class_labels": 0, "guidance_scale": 2, "guidance_interval": (0, 21)},
            "guidance_interval is (0, 21); allowed: (lo, hi), two steps with 0 <= lo <= hi <= 20",
        ),
    ],
    ids=str,
)
def test_refused_before_any_work(given, words):
    def never(x_t, t, class_labels=None):
        raise AssertionError

    pipeline = classy()
    pipeline.unet.forward = never
    with pytest.raises(ValueError) as caught:
        pipeline(3, **given)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_network_without_classes_refuses_them():
    pipeline = DDPMPipeline(create_model("tiny"), short())
    for given, words in (
        ({"class_labels": 0}, "class_labels is 0, but the network knows no classes"),
        ({"class_labels": [0]}, "class_labels is a list, but"),
        ({"guidance_scale": 2}, "guidance_scale is 2, but the network knows no classes"),
        ({"guidance_interval": (0, 5)}, "guidance_interval is set, but the network knows no classes"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(**given)
    with pytest.raises(ValueError, match="id2label names classes, but the network knows none"):
        pipeline.id2label = NAMES
    with pytest.raises(ValueError, match="class_labels is 1, but the network knows no classes"):
        pipeline.predict_x0(torch.zeros(1, 1, 8, 8), 3, 1)
