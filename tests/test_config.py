"""config.py: where a value comes from, what it may be, and what is said about one that it may not."""

import dataclasses
import json
import os

import pytest

from hf_ddpm.config import TrainConfig
from hf_ddpm.runtime.messages import CONTROL, one_line


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def refused(**values) -> str:
    with pytest.raises(ValueError) as error:
        TrainConfig(**values)
    return message(error)


def load_refused(*args, **values) -> str:
    with pytest.raises(ValueError) as error:
        TrainConfig.load(*args, **values)
    return message(error)


# Where a value comes from


def test_defaults_then_file_then_flags(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('batch_size = 16\nmax_steps = 5\ndataset = "digits"\nhorizontal_flip = true\n')
    config = TrainConfig.load(file, max_steps="7", lr_warmup_steps="0")
    assert (config.batch_size, config.max_steps, config.horizontal_flip) == (16, 7, True)
    assert config.lr_warmup_steps == 0
    assert config.learning_rate == TrainConfig().learning_rate == 2e-4
    assert TrainConfig.load() == TrainConfig()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1  # type: ignore[misc]


def test_json_round_trip(tmp_path):
    config = TrainConfig(image_size=(28, 32), dropout=0.1, adam_epsilon=3e-9, seed=2**63 - 1, trackers="a,b")
    file = tmp_path / "train_config.json"
    file.write_text(config.to_json())
    assert TrainConfig.load(file) == config
    assert set(json.loads(config.to_json())) == {option.name for option in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("name", ["good.toml", "good.json"])
def test_a_file_may_say_everything(tmp_path, name):
    values = {
        key: value for key, value in dataclasses.asdict(TrainConfig(seed=3)).items() if value is not None
    }
    file = tmp_path / name
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    file.write_text(json.dumps(values) if name.endswith("json") else lines)
    assert TrainConfig.load(file) == TrainConfig(seed=3)


# Types


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("max_steps", "12", 12),
        ("max_steps", 12.0, 12),
        ("learning_rate", "2e-4", 2e-4),
        ("learning_rate", 1, 1.0),
        ("compile", "true", True),
        ("compile", "False", False),
        ("compile", True, True),
        ("dropout", "none", None),
        ("dropout", "None", None),
        ("dropout", "0.1", 0.1),
        ("mixed_precision", "none", None),
        ("mixed_precision", "bf16", "bf16"),
        ("sample_steps", "none", None),
        ("channels", "3", 3),
    ],
)
def test_values_are_read_as_their_types(key, given, value):
    read = getattr(TrainConfig(**{key: given}), key)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (28, 28),
        ("28", 28),
        ([28, 32], (28, 32)),
        ((28, 32), (28, 32)),
        ("28x32", (28, 32)),
        ("28X32", (28, 32)),
        (None, None),
        ("none", None),
    ],
)
def test_image_size(given, size):
    assert TrainConfig(image_size=given).size == size


@pytest.mark.parametrize("size", ["28x", "x", "", "0", "-3", "1x2x3", "big", True, 28.5, [], [28, "a"], {}])
def test_what_is_no_image_size(size):
    assert refused(image_size=size).startswith("image_size is ")


@pytest.mark.parametrize(
    ("key", "given", "words"),
    [
        ("max_steps", "many", "'many'; allowed: a whole number"),
        ("max_steps", 1.5, "1.5; allowed: a whole number"),
        ("max_steps", True, "True; allowed: a whole number"),
        ("max_steps", None, "None; allowed: a whole number"),
        ("max_steps", float("inf"), "inf; allowed: a whole number"),
        ("learning_rate", "fast", "'fast'; allowed: a number"),
        ("learning_rate", "nan", "'nan'; allowed: a number"),
        ("learning_rate", [1], "[1]; allowed: a number"),
        ("compile", "maybe", "'maybe'; allowed: true or false"),
        ("compile", 1, "1; allowed: true or false"),
        ("dropout", "some", "'some'; allowed: a number or none"),
        ("holdout", "5%", "'5%' (did you mean 0.05?); allowed: a number or none"),
        ("learning_rate", "0,001", "'0,001' (did you mean 0.001?); allowed: a number"),
        ("max_steps", "800,000", "'800,000' (did you mean 800000?); allowed: a whole number"),
        ("max_steps", "5%", "'5%'; allowed: a whole number"),
        ("dataset", 3, "3; allowed: text"),
        ("dataset", None, "None; allowed: text"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_is_allowed(key, given, words):
    assert refused(**{key: given}) == f"{key} is {words}"


# Ranges


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("channels", [0], ">= 1"),
        ("shuffle_memory", [-1.0], ">= 0"),
        ("num_workers", [-1], ">= 0"),
        ("max_loss", [0.0], "> 0"),
        ("push_every", [0], ">= 1"),
        ("dropout", [-0.1, 1.0], ">= 0 and < 1"),
        ("label_dropout", [-0.1, 1.0], ">= 0 and < 1"),
        ("num_train_timesteps", [1], ">= 2"),
        ("beta_start", [0.0, 1.0], "> 0 and < 1"),
        ("beta_end", [0.0, 1.0], "> 0 and < 1"),
        ("max_steps", [0], ">= 1"),
        ("batch_size", [0], ">= 1"),
        ("gradient_accumulation_steps", [0], ">= 1"),
        ("learning_rate", [0.0, -1.0], "> 0"),
        ("lr_warmup_steps", [-1], ">= 0"),
        ("adam_beta1", [-0.1, 1.0], ">= 0 and < 1"),
        ("adam_beta2", [-0.1, 1.0], ">= 0 and < 1"),
        ("adam_epsilon", [0.0], "> 0"),
        ("weight_decay", [-0.1], ">= 0"),
        ("max_grad_norm", [-1.0], ">= 0"),
        ("snr_gamma", [0.0], "> 0"),
        ("hybrid_weight", [0.0], "> 0"),
        ("seed", [-1, 2**63], ">= 0 and < 9.22337e+18"),
        ("checkpoint_every", [0], ">= 1"),
        ("keep_checkpoints", [0], ">= 1"),
        ("log_every", [0], ">= 1"),
        ("sample_every", [-1], ">= 0"),
        ("sample_num_images", [0], ">= 1"),
        ("sample_steps", [0], ">= 1"),
        ("evaluate_every", [-1], ">= 0"),
        ("evaluate_num_images", [1], ">= 2"),
        ("evaluate_num_evals", [1], ">= 2"),
    ],
)
def test_a_value_out_of_range(key, values, words):
    for value in values:
        assert refused(**{key: value}) == f"{key} is {value!r}; allowed: {words}"


def test_decays():
    words = "allowed: a number in [0, 1), or up to 8 different ones with commas between"
    for value in ("-0.1", "1.0", "", "0.9,", "0.9,0.9", "fast", "1e-1"):
        assert refused(ema_decay=value) == f"ema_decay is {value!r}; {words}"
    for value in ("0.999, 0.9", [0.999, 0.9]):
        assert TrainConfig(ema_decay=value).ema_decays == {"0.999": 0.999, "0.9": 0.9}  # type: ignore[arg-type]
    assert TrainConfig(ema_decay=0.5).ema_decays == {"0.5": 0.5}  # type: ignore[arg-type]
    assert TrainConfig(ema_decay=0).ema_decays == {"0": 0.0}  # type: ignore[arg-type]


def test_every_range_is_tested():
    ranged = {
        o.name for o in dataclasses.fields(TrainConfig) if {"above", "least", "below"} & set(o.metadata)
    }
    tested = {case[0] for case in test_a_value_out_of_range.pytestmark[0].args[1]}
    assert ranged == tested


@pytest.mark.parametrize(
    ("key", "value"),
    [(o.name, "lineer") for o in dataclasses.fields(TrainConfig) if "choices" in o.metadata and o.type is str]
    + [("mixed_precision", "fp8")],
)
def test_a_choice_that_is_none(key, value):
    text = refused(**{key: value})
    assert text.startswith(f"{key} is {value!r}") and "; allowed: " in text


def test_the_nearest_choice_is_named():
    assert "did you mean 'linear'?" in refused(lr_scheduler="lineer")


def test_registered_objectives_are_choices(monkeypatch):
    monkeypatch.setattr("hf_ddpm.objectives.OBJECTIVES", {"mine": None})
    assert refused(objective="simple") == "objective is 'simple'; allowed: mine"


def test_values_that_contradict_each_other():
    assert refused(sample_steps=51, num_train_timesteps=50) == "sample_steps is 51; allowed: <= 50 (T)"
    assert "allowed with it: sample, v_prediction" in refused(rescale_betas_zero_snr=True)
    assert "prediction_type is 'score'" in refused(rescale_betas_zero_snr=True, prediction_type="score")
    assert TrainConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction").rescale_betas_zero_snr
    assert TrainConfig(rescale_betas_zero_snr=True, prediction_type="mean").rescale_betas_zero_snr
    assert refused(objective="hybrid").endswith("trains one; allowed with it: learned_range")
    assert refused(variance_type="learned_range").endswith("allowed with it: fixed_small, fixed_large")
    for objective in ("bound", "hybrid", "sddpm"):
        assert TrainConfig(objective=objective, variance_type="learned_range").objective == objective
    assert (
        refused(background="red") == "background is 'red'; allowed: white, black, or a colour as in '#ff8000'"
    )
    assert TrainConfig(background="#FF8000").background == "#FF8000"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.01}, "beta_start"),
        ({"beta_schedule": "squaredcos_cap_v2", "beta_end": 0.01}, "beta_end"),
        ({"beta_schedule": "laplace", "beta_end": 0.01}, "beta_end"),
        ({"beta_schedule": "constant", "beta_end": 0.01}, "beta_end"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 10}, "lr_warmup_steps"),
        ({"objective": "simple", "snr_gamma": 3.0}, "snr_gamma"),
        ({"objective": "min-snr", "hybrid_weight": 0.1}, "hybrid_weight"),
        ({"objective": "sddpm", "t_sampler": "importance"}, "t_sampler"),
    ],
)
def test_a_key_without_effect_is_refused(changes, key):
    shown = repr(changes[key])
    assert refused(**changes).startswith(f"{key} is {shown}, but ")


def test_a_warm_up_of_zero_goes_with_a_constant_rate():
    assert TrainConfig(lr_scheduler="constant", lr_warmup_steps=0).lr_warmup_steps == 0


# Files


def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("batchsize = 16\n")
    assert load_refused(file) == f"config file '{file}': unknown key 'batchsize'; did you mean 'batch_size'?"
    assert load_refused(lerning_rate=1) == "unknown key 'lerning_rate'; did you mean 'learning_rate'?"
    file.write_text("[training]\nmax_steps = 3\n")
    assert "unknown key 'training'" in load_refused(file)


def test_a_bad_value_is_blamed_on_who_said_it(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("batch_size = 0\n")
    assert load_refused(file) == f"config file '{file}': batch_size is 0; allowed: >= 1"
    assert load_refused(file, batch_size=-1) == "batch_size is -1; allowed: >= 1"
    assert TrainConfig.load(file, batch_size=1).batch_size == 1


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.toml"
    assert load_refused(missing) == f"can't read config file '{missing}': No such file or directory"
    assert "Is a directory" in load_refused(tmp_path)
    for name, content, words in (
        ("bad.toml", b"batch_size = = 3", "is not TOML"),
        ("latin.toml", b"dataset = '\xe9'", "is not TOML"),
        ("bad.json", b"{", "is not JSON"),
        ("latin.json", b'{"dataset": "\xe9"}', "is not JSON"),
        ("list.json", b"[1, 2]", "holds list; allowed: keys and values"),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        assert f"config file '{file}' {words}" in load_refused(file)


# Values that nobody means


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("seed", value) for value in ("１２", "٣", "²", "1e3", "9" * 5000, 16**6000, [1], {}, True, 1.5)],
        *[("dropout", value) for value in ("nan", "inf", "0.５", "0." + "9" * 999, float("nan"), 10**400)],
        *[("split", value) for value in ("", " ", "a\nb", "\x1b[2J", "a\0b", 3, ["x"])],
        *[("output_dir", value) for value in ("", "a\0b", "a\nb", "~nouser/x", "x" * 300, "a/" * 3000)],
        *[
            ("image_size", value)
            for value in ("٣x٣", "9" * 5000, 16**6000, [[1]], float("inf"), "8x8x8", "0")
        ],
        *[
            ("ema_decay", value)
            for value in ("0.９", "0." + "9" * 50, ",".join(f"0.{i}" for i in range(1, 99)))
        ],
        *[("license", value) for value in (["a"], "MIT", "foo")],
        *[("push_to_hub", value) for value in ("a/b/c", "", "é/b")],
        ("dataset_id", "<b>"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else type(value).__name__,
)
def test_values_that_nobody_means(key, value):
    text = refused(**{key: value})
    assert text.startswith(f"{key} is ") and "allowed: " in text and len(text) < 280


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("batch_size", 2**20),
        ("num_workers", 256),
        ("num_train_timesteps", 10**6),
        ("gradient_accumulation_steps", 10**6),
        ("sample_num_images", 4096),
        ("evaluate_num_evals", 10**5),
    ],
)
def test_a_limit_is_told_to_those_who_pass_it(key, most):
    assert refused(**{key: most + 1}).endswith(f" and <= {most}")
    assert getattr(TrainConfig(**{key: most}), key) == most  # type: ignore[arg-type]


def test_a_home_folder_is_expanded_in_flags_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('output_dir = "~/runs"\ndataset = "~"\nmodel = "./~x"')
    config = TrainConfig.load("~/run.toml", resume="~/runs/checkpoints/1")
    assert (config.output_dir, config.dataset, config.model) == (f"{tmp_path}/runs", str(tmp_path), "./~x")
    assert config.resume == f"{tmp_path}/runs/checkpoints/1"
    assert TrainConfig(output_dir="a~b").output_dir == "a~b"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.toml", "seed = " + "[" * 100_000),
        ("deep.json", '{"seed": ' + "[" * 100_000),
        ("deep2.json", '{"seed": ' + "[" * 900 + "]" * 900 + "}"),
        ("long.toml", "seed = " + "9" * 5000),
        ("long.json", '{"seed": ' + "9" * 5000 + "}"),
        ("hex.toml", "seed = 0x" + "f" * 6000),
        ("nan.json", '{"dropout": NaN}'),
        ("nan.toml", "dropout = nan"),
        ("inf.toml", "dropout = -inf"),
        ("key.toml", '"' + "k" * 5000 + '" = 1'),
        ("key.json", '{"\\u001b[2J\\ud800": 1}'),
        ("date.toml", "seed = 1979-05-27"),
        ("list.json", "[]"),
        ("null.json", '{"seed": null}'),
        ("empty.json", ""),
        ("bytes.toml", "\udcff\udcfe"),
        ("large.toml", "#" * 2_000_000),
    ],
)
def test_files_that_nobody_means(name, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    words = load_refused(tmp_path / name)
    assert name in words and len(one_line(words)) <= 300 and not CONTROL.search(one_line(words))


def test_a_config_file_that_would_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    assert "allowed: a regular file" in load_refused(tmp_path / "pipe.toml")
    assert "allowed: a regular file" in load_refused("/dev/zero")
    for path in ("", "a\0b", "x" * 5000, "~nouser/x"):
        assert load_refused(path).startswith("config is ")
