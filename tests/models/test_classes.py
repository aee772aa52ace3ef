"""`create_model(num_classes=...)`: a row for each class and one for none, in every preset."""

import pytest
import torch
from torch import nn

from hf_ddpm.denoiser import MAX_CLASSES
from hf_ddpm.models import PRESETS, create_model, num_classes

QUICK = [name for name, config in PRESETS.items() if config["sample_size"] <= 32 and name != "cifar10"]


def make(name, **changes):
    torch.manual_seed(0)
    return create_model(name, **changes).eval()


def inputs(model, batch=4):
    config, generator = model.config, torch.Generator().manual_seed(1)
    size = config.sample_size
    x_t = torch.randn(batch, config.in_channels, size, size, generator=generator)
    return x_t, torch.tensor([0, 999, 500, 500])[:batch]


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_for_each_class_and_one_for_none(name):
    with torch.device("meta"):
        plain, model = create_model(name), create_model(name, num_classes=3)
    assert num_classes(plain) is None and num_classes(model) == 3
    assert model.config.num_class_embeds == model.class_embedding.num_embeddings == 4
    others = {key: value.shape for key, value in model.state_dict().items() if "class_embedding" not in key}
    assert others == {key: value.shape for key, value in plain.state_dict().items()}


@pytest.mark.parametrize("name", QUICK)
@torch.no_grad()
def test_rows_of_zero_change_nothing_and_others_do(name):
    plain, model = make(name), make(name, num_classes=3)
    model.load_state_dict(plain.state_dict(), strict=False)
    nn.init.zeros_(model.class_embedding.weight)
    (x_t, t), y = inputs(model), torch.tensor([0, 1, 2, 3])
    assert torch.equal(model(x_t, t, y).sample, plain(x_t, t).sample)
    nn.init.ones_(model.class_embedding.weight[2])
    changed = (model(x_t, t, y).sample != plain(x_t, t).sample).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", [name for name in QUICK if "autoencoder" in name])
def test_every_weight_of_an_autoencoder_learns(name):
    model = make(name, num_classes=3)
    model(*inputs(model), torch.tensor([0, 1, 2, 3])).sample.square().sum().backward()
    assert model.class_embedding.weight.grad.any(dim=1).all()


@torch.no_grad()
def test_a_class_is_a_bias_of_the_embedding_of_t():
    """By hand: in a network that is told t, the row is added to the bias of its last linear layer."""
    for name, place in (("tiny", "time_embedding"), ("deep-autoencoder-t", "time.embed")):
        plain, model = make(name), make(name, num_classes=3)
        model.load_state_dict(plain.state_dict(), strict=False)
        plain.get_submodule(place).linear_2.bias += model.class_embedding.weight[1]
        x_t, t = inputs(model)
        torch.testing.assert_close(
            model(x_t, t, torch.ones(4, dtype=torch.int64)).sample, plain(x_t, t).sample, rtol=0, atol=2e-6
        )


def test_an_autoencoder_says_whether_it_needs_classes():
    x_t, t = inputs(make("shallow-autoencoder"))
    with pytest.raises(ValueError, match="needs a class for each image"):
        make("shallow-autoencoder", num_classes=3)(x_t, t)
    with pytest.raises(ValueError, match="has no classes"):
        make("shallow-autoencoder")(x_t, t, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "10", MAX_CLASSES + 1])
def test_bad_numbers_of_classes(bad):
    with pytest.raises(ValueError, match=r"num_classes is .*; allowed: a whole number of 1 to 100000"):
        create_model("tiny", num_classes=bad)


def test_other_kinds_of_conditions_are_no_classes():
    with torch.device("meta"):
        model = type(make("tiny")).from_config(dict(make("tiny").config) | {"class_embed_type": "timestep"})
    assert num_classes(model) is None and num_classes(nn.Linear(1, 1)) is None
    assert num_classes(lambda x_t, t: x_t) is None
