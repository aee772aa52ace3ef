"""Training with classes: what is hidden, resuming, a model without classes as the start, what is noticed."""

import json

import pytest
import torch

from hf_ddpm import DDPMPipeline, TrainConfig, train
from hf_ddpm.folders.labels import read_labels
from hf_ddpm.training.draws import draw_hidden


def config(folder, **changes):
    options = {"label_column": "label", "model": "tiny", "batch_size": 8, "max_steps": 4, "log_every": 2}
    quiet = {"sample_every": 0, "lr_warmup_steps": 0, "num_train_timesteps": 20, "ema_decay": "0"}
    return TrainConfig(dataset="digits", output_dir=str(folder), **(options | quiet | changes))


def lines(folder):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in found]


def weights(folder):
    return DDPMPipeline.from_pretrained(folder).unet.state_dict()


def test_what_is_hidden_depends_on_the_position_alone():
    hidden = draw_hidden(3, range(20_000), 0.1)
    assert torch.equal(hidden[1::2], draw_hidden(3, range(1, 20_000, 2), 0.1))
    assert abs(hidden.double().mean() - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    assert not draw_hidden(3, range(1000), 0.0).any()


def test_a_run_that_was_stopped_is_the_unbroken_one(tmp_path):
    train(config(tmp_path / "whole"))

    def stop(run):
        if run.step == 4:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config(tmp_path / "parts", checkpoint_every=1), after_step=stop)
    train(config(tmp_path / "parts", checkpoint_every=1))
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weight, weights(tmp_path / "parts")[name])
    last = [[line for line in lines(tmp_path / x) if line["step"] == 4] for x in ("whole", "parts")]
    assert last[0] == last[1] and any("loss_no_class" in line or "loss_class_3" in line for line in last[0])
    assert read_labels(tmp_path / "parts", 10) == {y: str(y) for y in range(10)}


def test_rows_of_zero_begin_a_run_from_a_model_without_classes(tmp_path):
    train(config(tmp_path / "plain", label_column=None))
    train(config(tmp_path / "classes", model=str(tmp_path / "plain"), max_steps=1, learning_rate=1e-12))
    one, other = (DDPMPipeline.from_pretrained(tmp_path / name).unet for name in ("plain", "classes"))
    x_t, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 19]), torch.tensor([0, 9, 10])
    torch.testing.assert_close(other(x_t, t, y).sample, one(x_t, t).sample, rtol=0, atol=1e-5)


class Deaf(torch.nn.Module):
    """A module that takes classes and makes nothing of them."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x_t, t, class_labels):
        assert class_labels.shape == t.shape and class_labels.max() <= 10
        return self.layer(x_t)


def test_a_network_that_ignores_its_classes_is_noticed(tmp_path, caplog):
    train(config(tmp_path / "deaf"), Deaf())
    assert "the network makes no use of the classes" in caplog.text
    assert [line["class_gain"] for line in lines(tmp_path / "deaf") if "class_gain" in line] == [0.0]


@pytest.mark.parametrize(
    ("model", "label_column", "message"),
    [
        (torch.nn.Conv2d(1, 1, 1), "label", "the network has no classes, but the images have 10"),
        (Deaf(), None, "the network has 10 classes, and no label_column says the images'"),
    ],
    ids=["no classes", "no labels"],
)
def test_networks_of_other_classes_are_refused(tmp_path, model, label_column, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, label_column=label_column), model)


def test_a_dropout_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"label_dropout is 0.2, but has no use without label_column"):
        TrainConfig(label_dropout=0.2)
