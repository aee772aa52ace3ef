"""extractors.py: features of a module, of a model of transformers, of Inception; missing packages."""

import json
import os
import re
import sys

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_ddpm.metrics import Features, load_extractor, sample_metrics
from tests.metrics.images import features, images, normal

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


class TestFeatures:
    def test_parts_and_slices(self):
        x, logits = normal(7), normal(7, 3)
        whole = Features.cat(features(a, b) for a, b in zip(x.split(3), logits.split(3), strict=True))
        assert len(whole) == 7 and torch.equal(whole.features, x)
        assert torch.equal(whole[2:4].features, x[2:4]) and torch.equal(whole[2:4].logits, logits[2:4])
        assert features(x)[:2].logits is None

    @pytest.mark.parametrize("other", [features(normal(2), None, "b"), features(normal(2), normal(2))])
    def test_parts_of_several_kinds(self, other):
        with pytest.raises(ValueError, match="features of 2 kinds"):
            Features.cat([features(normal(2)), other])
        with pytest.raises(ValueError, match="features of 0 kinds"):
            Features.cat([])

    @pytest.mark.parametrize(
        "tensors", [(normal(2).double(),), (normal(2)[0],), (normal(2), normal(3)), (normal(2), normal(2)[0])]
    )
    def test_refusals(self, tensors):
        with pytest.raises(ValueError, match="allowed: float32"):
            Features("net", *tensors)


class Mean(nn.Module):
    """Mean level of each channel, times a weight; its dropout shows whether it is in eval mode."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.weight * x.double().mean((2, 3)))


class TestModule:
    def test_features_and_name(self):
        extractor = load_extractor(Mean().train())
        assert re.fullmatch(r"Mean@[0-9a-f]{8}", extractor.name)
        x = images(6, 3)
        found = extractor(x)
        assert found.extractor == extractor.name and found.logits is None
        assert found.features.dtype == torch.float32 and not found.features.requires_grad
        torch.testing.assert_close(found.features, x.float().mean((2, 3)))

    def test_the_name_follows_the_weights(self):
        assert load_extractor(Mean(1.0)).name == load_extractor(Mean(1.0)).name
        assert load_extractor(Mean(1.0)).name != load_extractor(Mean(2.0)).name

    @pytest.mark.parametrize("bad", [images(2).float(), images(2)[0], images(2)[:0]])
    def test_images_must_be_a_uint8_batch(self, bad):
        with pytest.raises(ValueError, match=r"allowed: uint8 \(B, C, H, W\)"):
            load_extractor(Mean())(bad)

    @pytest.mark.parametrize("answer", [lambda x: x, lambda x: "words", lambda x: x[0, 0], lambda x: x + "1"])
    def test_an_answer_that_is_no_features(self, answer):
        module = nn.Module()
        module.forward = answer
        with pytest.raises(ValueError, match=r"Module@\w+ (failed on|made)"):
            load_extractor(module)(images(3))


def save_model(folder, model, channels=3, **processor):
    model.save_pretrained(folder)
    settings = {
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }
    ViTImageProcessorPil(**settings | processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL))
    return save_model(tmp_path_factory.mktemp("dinov2") / "dinov2-tiny", model), model.eval()


class TestTransformers:
    def test_dinov2(self, dinov2):
        """Its pooled output on images scaled to [-1, 1]; the name is the folder's and a hash."""
        folder, model = dinov2
        extractor, x = load_extractor(folder), images(3, 3)
        found = extractor(x)
        assert re.fullmatch(r"dinov2-tiny@[0-9a-f]{8}", extractor.name) and extractor.channels == 3
        with torch.no_grad():
            wanted = model(x / 127.5 - 1).pooler_output
        torch.testing.assert_close(found.features, wanted, rtol=1e-4, atol=1e-5)
        assert found.logits is None and found.extractor == extractor.name

    def test_grey_images_are_repeated_and_others_refused(self, dinov2):
        extractor, x = load_extractor(str(dinov2[0])), images(3)
        torch.testing.assert_close(extractor(x).features, extractor(x.repeat(1, 3, 1, 1)).features)
        with pytest.raises(ValueError, match=r"images have 4 channels, dinov2-tiny@.* wants 3"):
            extractor(images(3, 4))

    def test_images_are_resized(self, dinov2):
        extractor, x = load_extractor(dinov2[0]), images(3, 3)
        large = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
        torch.testing.assert_close(extractor(large).features, extractor(x).features, rtol=0.2, atol=0.2)

    def test_the_name_follows_weights_and_preparation(self, dinov2, tmp_path):
        folder, model = dinov2
        name = load_extractor(folder).name
        assert load_extractor(save_model(tmp_path / "a" / folder.name, model)).name == name
        other = save_model(tmp_path / "b" / folder.name, model, image_mean=[0.4] * 3)
        assert load_extractor(other).name != name

    def test_classifier_without_pooler(self, tmp_path):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**SMALL, num_labels=4, num_channels=1)).eval()
        found = load_extractor(save_model(tmp_path / "vit", model, 1))(x := images(3))
        with torch.no_grad():
            pixels = x / 127.5 - 1
            logits, hidden = model(pixels).logits, model.vit(pixels).last_hidden_state
        torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.features, hidden[:, 0], rtol=1e-4, atol=1e-5)

    def test_a_pooler_drawn_at_random_is_not_used(self, tmp_path):
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).eval()
        folder = save_model(tmp_path / "vit", model)
        x, found = images(3, 3), [load_extractor(folder) for _ in range(2)]
        with torch.no_grad():
            wanted = model(x / 127.5 - 1).last_hidden_state[:, 0]
        assert found[0].name == found[1].name
        torch.testing.assert_close(found[0](x).features, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["convolutions", "clip"])
    def test_other_architectures(self, tmp_path, kind):
        torch.manual_seed(0)
        if kind == "clip":
            tower = {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            }
            vision = {**tower, "image_size": 8, "patch_size": 4}
            config = CLIPConfig(
                text_config={**tower, "vocab_size": 9}, vision_config=vision, projection_dim=4
            )
            model = CLIPModel(config)
        else:
            model = ConvNextModel(
                ConvNextConfig(patch_size=2, hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)
            )
        found = load_extractor(save_model(tmp_path / "model", model))(images(3))
        assert found.features.shape == (3, 8) and found.features.std(0).min() > 0

    def test_half_precision_weights_are_used_in_float32(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "half", Dinov2Model.from_pretrained(dinov2[0]).half())
        found = load_extractor(folder)(images(3)).features
        torch.testing.assert_close(found, load_extractor(dinov2[0])(images(3)).features, rtol=0.02, atol=0.02)

    def test_incomplete_weights(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        with pytest.raises(ValueError, match=r"the weights of '.*' lack .*layer\.1.* more"):
            load_extractor(folder)

    def test_pickled_weights_are_refused(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        torch.save(dinov2[1].state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"can't load the safetensors weights of '.*m'") as caught:
            load_extractor(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("file", "what"),
        [
            ("config.json", "config"),
            ("preprocessor_config.json", "image processor"),
            ("model.safetensors", "safetensors weights"),
        ],
    )
    @pytest.mark.parametrize("damaged", [False, True])
    def test_missing_or_damaged_files(self, dinov2, tmp_path, no_hub, file, what, damaged):
        folder = save_model(tmp_path / "m", dinov2[1])
        (folder / file).unlink()
        if damaged:
            (folder / file).write_text("{")
        with pytest.raises(ValueError, match=f"can't load the {what} of ") as caught:
            load_extractor(folder)
        assert "\n" not in str(caught.value)

    def test_code_in_the_folder_does_not_run(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        config = json.loads((folder / "config.json").read_text())
        auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(ValueError, match="can't load the config"):
            load_extractor(folder)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("source", ["./missing", "/no/such", "a/b/c", ""])
    def test_no_folder(self, source):
        with pytest.raises(ValueError, match=f"no folder '{source}'"):
            load_extractor(source)

    def test_hub_id_without_a_network(self, no_hub):
        with pytest.raises(ValueError, match="can't load the config of 'nobody/nothing-xyz'"):
            load_extractor("nobody/nothing-xyz")


class TestMissingPackages:
    def test_torchmetrics(self, monkeypatch):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
        with pytest.raises(ValueError, match=r"pip install 'hf_ddpm\[eval\]'"):
            sample_metrics(features(normal(9)), features(normal(9)))

    def test_torch_fidelity(self, monkeypatch):
        monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
        with pytest.raises(ValueError, match=r"needs torch-fidelity: pip install 'hf_ddpm\[eval\]'"):
            load_extractor("inception")

    def test_inception_gives_features_and_logits_of_colour(self, monkeypatch):
        class Network(nn.Module):  # what torch-fidelity's answers with; the real one is not to be had here
            def __init__(self, name, layers, antialias):
                super().__init__()
                assert (name, layers, antialias) == (
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    False,
                )

            def _torch_fidelity_forward(self, x):
                assert x.dtype == torch.uint8 and x.shape[1] == 3
                return x.float().mean((2, 3)), x.float().amax((2, 3))

        monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Network)
        extractor = load_extractor("inception")
        found = extractor(images(12))
        assert extractor.name == "inception-v3" and found.features.shape == found.logits.shape == (12, 3)
        assert "FID (inception-v3)" in sample_metrics(found, found).labelled()


def test_a_refused_extractor_leaves_progress_bars_as_they_were():
    """transformers hides the Hub client's bars together with its own."""
    shown = are_progress_bars_disabled()
    for source in ("/nowhere/model", ""):
        with pytest.raises(ValueError, match="no folder"):
            load_extractor(source)
        assert are_progress_bars_disabled() == shown


class TestStrangers:
    """A feature network from a stranger's folder: no pipe, no size that is not there, no code."""

    def refused(self, folder, words):
        with pytest.raises(ValueError, match=r"can't load the .* of ") as error:
            load_extractor(folder)
        assert words in str(error.value) and len(str(error.value)) <= 300 and "\n" not in str(error.value)

    @pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
    def test_a_pipe(self, file, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        (folder / file).unlink()
        os.mkfifo(folder / file)
        self.refused(folder, "is a pipe; allowed: a regular file")

    @pytest.mark.parametrize(
        ("file", "changes", "words"),
        [
            ("config.json", {"hidden_size": 2**16}, "it has more than"),
            ("config.json", {"num_hidden_layers": 10**9}, "allowed: at most 1048576"),
            ("config.json", {"attn_implementation": "kernels-community/any"}, "allowed: eager, sdpa"),
            ("config.json", {"vision_config": {"_attn_implementation": "a/b"}}, "allowed: eager, sdpa"),
            ("config.json", {"quantization_config": {"quant_method": "awq"}}, "allowed: none"),
            ("preprocessor_config.json", {"size": {"height": 10**6, "width": 8}}, "allowed: at most 8192"),
        ],
    )
    def test_a_config(self, file, changes, words, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(found | changes))
        self.refused(folder, words)

    def test_an_adapter(self, dinov2, tmp_path):
        folder = save_model(tmp_path / "m", dinov2[1])
        (folder / "adapter_config.json").write_text("{}")
        self.refused(folder, "allowed: a network without an adapter")

    def test_a_network_of_the_hub_comes_without_code(self, dinov2, tmp_path, local_hub):
        folder = save_model(tmp_path / "m", dinov2[1])
        (folder / "own.py").write_text("")
        local_hub.put("tester/net", {path.name: path.read_bytes() for path in folder.iterdir()})
        assert re.fullmatch(r"tester/net@[0-9a-f]{8}", load_extractor("tester/net").name)
        assert not any("own.py" in line for line in local_hub.requests)
