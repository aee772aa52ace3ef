"""autoencoders.py: the equation by hand, 30 numbers and no more, every size, folders, the real trainer."""

import json

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, TrainConfig, train
from hf_ddpm.denoiser import as_denoiser
from hf_ddpm.models import NETWORKS, PRESETS, create_model
from hf_ddpm.models.autoencoders import ConvAutoencoder, DenseAutoencoder
from hf_ddpm.scheduler import DDPMScheduler

NAMES = [f"{kind}-autoencoder{end}" for kind in ("shallow", "deep", "conv") for end in ("", "-t")]
T = torch.tensor([0, 999])


def make(name, **changes):
    torch.manual_seed(0)
    return create_model(name, **changes).eval()


def images(batch, *shape, seed=1):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def double(weight):
    return weight.detach().double().numpy()


def silu(x):
    return x / (1 + np.exp(-x))


def test_presets_are_the_six():
    assert [name for name in PRESETS if "autoencoder" in name] == NAMES
    assert {
        "DenseAutoencoder": DenseAutoencoder,
        "ConvAutoencoder": ConvAutoencoder,
    }.items() <= NETWORKS.items()


# The equations


@torch.no_grad()
def test_a_shallow_one_by_hand():
    model, x = make("shallow-autoencoder"), images(2, 1, 8, 8)
    first, last = model.hidden[0], model.last
    hidden = silu(double(x).reshape(2, 64) @ double(first.weight).T + double(first.bias))
    expected = double(x) + (hidden @ double(last.weight).T + double(last.bias)).reshape(2, 1, 8, 8)
    np.testing.assert_allclose(model(x, 0).sample, expected, rtol=0, atol=1e-5)
    assert hidden.shape[1] == 30


@torch.no_grad()
def test_time_by_hand():
    model, x = make("shallow-autoencoder-t"), images(2, 1, 8, 8)
    torch.nn.init.normal_(model.time.gain.weight)  # it begins at zero
    model.time.gain.bias.fill_(0.25)
    rates = 10000 ** -(np.arange(32) / 31)  # Ho et al.'s positions, 64 of them
    angles = np.array([3.0, 700.0])[:, None] * rates
    e = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    for layer, act in ((model.time.embed.linear_1, silu), (model.time.embed.linear_2, silu)):
        e = act(e @ double(layer.weight).T + double(layer.bias))
    shift, gain = (
        e @ double(layer.weight).T + double(layer.bias) for layer in (model.time.shifts[0], model.time.gain)
    )
    flat, first, last = double(x).reshape(2, 64), model.hidden[0], model.last
    hidden = silu(flat @ double(first.weight).T + double(first.bias) + shift)
    expected = flat + gain * flat + hidden @ double(last.weight).T + double(last.bias)
    answer = model(x, torch.tensor([3, 700])).sample
    np.testing.assert_allclose(answer.reshape(2, 64), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_thirty_numbers_pass(name):
    """ε_r is a function of 30 numbers: its Jacobian has that rank, though an image has 64 pixels."""
    model, x = make(name).double(), images(1, 1, 8, 8).double()
    jacobian = torch.autograd.functional.jacobian(lambda x_t: model(x_t, 5).sample - x_t, x).reshape(64, 64)
    values = torch.linalg.svdvals(jacobian)
    assert values[29] > 1e-9 * values[0] and values[30] < 1e-12 * values[0]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_who_sees_the_step(name):
    model, x = make(name), images(2, 1, 8, 8)
    change = model(x, T).sample - model(x, 0).sample
    assert change[0].abs().max() < 1e-5
    assert change[1].abs().max() > 1e-3 if name.endswith("-t") else not change.any()
    # Every way of saying t
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])):
        torch.testing.assert_close(model(x, t).sample, model(x, 7).sample, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("network", [DenseAutoencoder, ConvAutoencoder])
def test_residual_is_a_choice(network):
    x, answers = images(2, 1, 5, 5), []
    for residual in (True, False):
        torch.manual_seed(0)
        answers.append(network(sample_size=5, residual=residual)(x, 0).sample)
    torch.testing.assert_close(answers[0] - answers[1], x)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_learned_variance_gets_no_image(name):
    model = make(name, channels=3, out_channels=6)
    x = images(2, 3, 8, 8) * 1e4
    assert as_denoiser(model)(x, T).shape == (2, 6, 8, 8)
    for weight in model.parameters():
        weight.zero_()
    assert torch.equal(model(x, T).sample, torch.cat([x, torch.zeros_like(x)], 1))


# Shapes


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 28, (5, 12), (1, 9)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_size(name, size, channels):
    model = make(name, image_size=size, channels=channels)
    shape = (channels, *(size if isinstance(size, tuple) else (size, size)))
    for batch in (1, 3):
        answer = as_denoiser(model)(images(batch, *shape), torch.arange(batch))
        assert answer.shape == (batch, *shape) and answer.isfinite().all()
    assert model.config["sample_size"] == size and model.image_shape == shape


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(name):
    model, x = make(name, image_size=7), images(4, 1, 7, 7)
    together = model(x, torch.arange(4)).sample
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1], i).sample[0], together[i])


@pytest.mark.parametrize("name", NAMES)
def test_no_memory_on_meta(name):
    with torch.device("meta"):
        model = create_model(name, image_size=28)
        assert model(torch.zeros(2, 1, 28, 28), torch.zeros(2)).sample.shape == (2, 1, 28, 28)
    assert all(weight.is_meta for weight in model.parameters()) and not list(model.buffers())


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    model, x = make(name), images(2, 1, 8, 8)
    answer = model.to(torch.bfloat16)(x.bfloat16(), T).sample
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), make(name)(x, T).sample, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_learns(name):
    """DDP stops at a weight without a gradient."""
    model = make(name, image_size=5)
    model(images(2, 1, 5, 5), T).sample.square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_tuple_if_asked():
    answer = make("conv-autoencoder")(x := images(1, 1, 8, 8), 0, return_dict=False)
    assert isinstance(answer, tuple) and answer[0].shape == x.shape


# What is refused


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (DenseAutoencoder, {"sample_size": 0}, r"sample_size is 0; allowed: a positive whole number"),
        (DenseAutoencoder, {"sample_size": (8, 8, 8)}, r"sample_size is \(8, 8, 8\); allowed"),
        (ConvAutoencoder, {"sample_size": "8"}, r"sample_size is '8'; allowed"),
        (ConvAutoencoder, {"in_channels": 0}, r"in_channels is 0; allowed"),
        (DenseAutoencoder, {"out_channels": 3}, r"out_channels is 3; allowed: 1 or 2 \(C or 2C\)"),
        (DenseAutoencoder, {"hidden_sizes": ()}, r"hidden layers are \[\] wide; allowed: one or more"),
        (DenseAutoencoder, {"hidden_sizes": (30, -1)}, r"hidden layers are \[30, -1\] wide; allowed"),
        (ConvAutoencoder, {"conv_channels": ()}, r"hidden layers are \[\] wide; allowed"),
        (ConvAutoencoder, {"hidden_size": 0}, r"hidden layers are \[16, 32, 0, 32, 16\] wide; allowed"),
    ],
)
def test_bad_configs(network, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        network(**changes)
    assert "\n" not in str(caught.value)


def test_bad_calls():
    for name in ("shallow-autoencoder", "conv-autoencoder"):
        with pytest.raises(
            ValueError, match=r"^x_t has shape \(1, 1, 8, 9\); allowed for this .*: \(B, 1, 8, 8\)$"
        ):
            make(name)(torch.zeros(1, 1, 8, 9), 0)
    with pytest.raises(ValueError, match=r"^dropout is 0.1, but 'deep-autoencoder' has none; allowed: none$"):
        create_model("deep-autoencoder", dropout=0.1)
    with pytest.raises(ValueError, match=r"unknown \(did you mean 'shallow-autoencoder'\?\)"):
        create_model("shalow-autoencoder")


def test_a_pipeline_draws_its_own_size_only():
    pipeline = DDPMPipeline(make("conv-autoencoder-t", image_size=7), DDPMScheduler(20, beta_end=0.5))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, output_type="np").images.shape == (2, 7, 7, 1)
    with pytest.raises(
        ValueError, match=r"image_shape is \(1, 8, 8\); allowed: \(1, 7, 7\), which the network"
    ):
        pipeline(1, image_shape=(1, 8, 8))


# Folders


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_ours(name, tmp_path):
    pipeline = DDPMPipeline(make(name, image_size=(5, 7), channels=3), DDPMScheduler(20, beta_end=0.5))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["hf_ddpm", type(pipeline.unet).__name__]
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is type(pipeline.unet)
    drawn = []
    for one in (pipeline, again):
        one.set_progress_bar_config(disable=True)
        drawn.append(one(2, torch.Generator().manual_seed(0), output_type="np").images)
    np.testing.assert_array_equal(*drawn)
    for plain in (diffusers.DDPMPipeline, diffusers.DiffusionPipeline):
        with pytest.raises(ValueError, match="hf_ddpm"):
            plain.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_sizes": [10**6]},
        {"hidden_sizes": [30] * 1000},
        {"time_conditioned": True},
        {"sample_size": 64},
    ],
)
def test_a_config_of_another_network_is_refused(changes, tmp_path):
    DDPMPipeline(make("shallow-autoencoder"), DDPMScheduler(20)).save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match="allowed: a config and weights of the same network"):
        DDPMPipeline.from_pretrained(tmp_path)


# The trainer


@pytest.mark.filterwarnings("ignore:.*(copy keyword|__array_wrap__):DeprecationWarning")
@pytest.mark.parametrize("name", ["shallow-autoencoder", "deep-autoencoder-t", "conv-autoencoder-t"])
def test_three_steps_of_training(name, tmp_path):
    facts = {"num_train_timesteps": 50, "beta_schedule": "constant", "beta_start": 0.2, "lr_warmup_steps": 0}
    facts |= {"prediction_type": "sample", "max_steps": 3, "batch_size": 4, "sample_num_images": 2}
    facts |= {"evaluate_every": 3, "evaluate_num_images": 4, "evaluate_num_evals": 3}
    config = TrainConfig(model=name, output_dir=str(tmp_path / "run"), checkpoint_every=2, **facts)
    result = train(config)
    assert result.step == 3 and np.isfinite(result.loss)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(np.isfinite(line.get("heldout_bpd", np.nan)) for line in lines)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run")
    torch.manual_seed(config.seed)
    fresh = create_model(name, image_size=8, channels=1)
    assert type(pipeline.unet) is type(fresh) and pipeline.image_shape == (1, 8, 8)
    before, after = fresh.state_dict(), pipeline.unet.state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    # And a run that goes on from the folder
    more = TrainConfig(model=str(tmp_path / "run"), output_dir=str(tmp_path / "more"), **facts)
    assert train(more).step == 3


def test_what_it_cannot_do_is_one_line(tmp_path):
    config = TrainConfig(
        model="shallow-autoencoder", gradient_checkpointing=True, output_dir=str(tmp_path), max_steps=1
    )
    with pytest.raises(
        ValueError, match="gradient_checkpointing is True, which DenseAutoencoder doesn't have"
    ):
        train(config)
