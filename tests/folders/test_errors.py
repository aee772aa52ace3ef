"""errors.safetensors: written and read, of this network or refused in one line, whoever wrote it."""

import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from hf_ddpm.folders.errors import (
    ErrorsOf,
    StoredErrors,
    errors_of,
    network_digest,
    process_digest,
    read_errors,
    write_errors,
)
from hf_ddpm.folders.layout import ERRORS
from hf_ddpm.likelihood.errors import LOG_SIGMAS, Errors
from hf_ddpm.likelihood.levels import decoder_steps
from hf_ddpm.process import DiffusionProcess
from hf_ddpm.runtime.disk import save_tensors
from tests.oracles import chain

PROCESS = DiffusionProcess.from_betas(torch.linspace(1e-3, 0.3, 12, dtype=torch.float64))
TABLES = {
    "squared": torch.rand(12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "pixels": torch.full((12, 32), 5),
    "decoder_nats": torch.ones(32, len(LOG_SIGMAS), dtype=torch.float64),
    "levels": torch.ones(3, 256, dtype=torch.int64),
}
STEPS = len(decoder_steps(PROCESS))
ROWS, IMAGES = torch.tensor([1, 7, 90]), torch.tensor([3, -4, 5])
OF = ErrorsOf(
    weights="a" * 16,
    process=process_digest(PROCESS),
    prediction_type="epsilon",
    clip_x0=True,
    dataset="photos/",
    split="train[:90%]",
    part="train",
    holdout=0.05,
    holdout_seed=3,
    data="b" * 16,
    chosen="c" * 16,
    num_rows=100,
    evaluations=400,
    seed=7,
)
STORED = StoredErrors(Errors(process=PROCESS, **TABLES), ROWS, IMAGES, OF)


def read(folder, process=PROCESS, prediction_type="epsilon", weights="a" * 16):
    return read_errors(folder, process, prediction_type, weights)


def save(folder, change=None, of=None, drop=()):
    """The file with some of its content changed, and a sum that fits."""
    tensors = TABLES | {"rows": ROWS, "images": IMAGES} | (change or {})
    text = json.dumps(dataclasses.asdict(OF) | (of or {})) if not isinstance(of, str) else of
    save_tensors(folder / ERRORS, {k: v for k, v in tensors.items() if k not in drop}, {"of": text})


def test_what_is_written_is_read(tmp_path):
    write_errors(tmp_path, STORED)
    found = read(tmp_path)
    assert found.of == OF == errors_of(tmp_path) and torch.equal(found.images, IMAGES)
    assert torch.equal(found.rows, ROWS)
    for name, table in TABLES.items():
        assert torch.equal(getattr(found.errors, name), table)
    assert os.listdir(tmp_path) == [ERRORS]


def test_a_table_of_an_earlier_version_has_no_decoder_by_grey_levels(tmp_path):
    write_errors(tmp_path, STORED)
    old = read(tmp_path).errors
    assert old.levels_nats is None and old.best_chains("optimal", 3).nats[2].isfinite()
    with pytest.raises(ValueError, match="by an earlier version, without the decoder levels; allowed: meas"):
        old.decoder(PROCESS)
    nats = torch.ones(STEPS, 32, len(LOG_SIGMAS), dtype=torch.float64)
    new = Errors(process=PROCESS, **TABLES, levels_nats=nats)
    write_errors(tmp_path, dataclasses.replace(STORED, errors=new))
    found = read(tmp_path).errors
    assert torch.equal(found.levels_nats, nats) and len(found.decoder(PROCESS).log_levels) == 3


def test_seeds_may_be_as_large_as_the_commands_take_them(tmp_path):
    of = dataclasses.replace(OF, seed=2**63 - 1, holdout_seed=5 * 10**9)
    write_errors(tmp_path, dataclasses.replace(STORED, of=of))
    assert read(tmp_path).of == of


def test_a_compiled_network_has_the_digest_of_what_was_compiled():
    network = torch.nn.Linear(3, 2)
    assert network_digest(torch.compile(network)) == network_digest(network)


def test_of_another_network_or_process(tmp_path):
    write_errors(tmp_path, STORED)
    other = DiffusionProcess.from_betas(PROCESS.betas * 1.0001)
    for how, words in (
        ({"weights": "c" * 16}, "other weights"),
        ({"process": other}, "another process"),
        ({"prediction_type": "sample"}, "another prediction type"),
        ({"process": PROCESS.respaced([0, 5])}, "another process"),
    ):
        with pytest.raises(ValueError, match=f"is of {words} than the model's; allowed: .* hf-ddpm plan$"):
            read(tmp_path, **how)


def test_the_last_digits_of_a_process_do_not_count():
    nearly = DiffusionProcess.from_betas(PROCESS.betas * (1 + 1e-15))
    assert process_digest(nearly) == process_digest(PROCESS) != process_digest(chain("linear"))


def test_half_precision_has_the_digest_of_what_it_is_loaded_as():
    network = torch.nn.Linear(3, 2).bfloat16()
    copy = torch.nn.Linear(3, 2)
    copy.load_state_dict(network.state_dict())
    assert network_digest(copy) == network_digest(network)
    with torch.no_grad():
        copy.weight += 1
    assert network_digest(copy) != network_digest(network)


HUGE = {"squared": torch.zeros(5000, 32, dtype=torch.float64), "pixels": torch.zeros(5000, 32).long()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"change": {"squared": torch.full((12, 32), math.nan, dtype=torch.float64)}}, "squared is"),
        ({"change": {"squared": -TABLES["squared"]}}, "squared is"),
        ({"change": {"squared": TABLES["squared"].float()}}, "squared is of F32"),
        ({"change": {"squared": 1e308 + TABLES["squared"]}}, r"errors.safetensors': squared adds up to inf;"),
        ({"change": {"decoder_nats": 1e300 + TABLES["decoder_nats"]}}, "decoder_nats adds up to 1.1e"),
        ({"change": {"pixels": 2**62 + 0 * TABLES["pixels"]}}, "pixels adds up to 1.8e"),
        ({"change": {"pixels": 5 * torch.ones(12, 32).tril().long()}}, "squared has errors where pixels has"),
        ({"change": {"squared": TABLES["squared"][:, :31]}}, r"squared is of F64 \(12, 31\)"),
        ({"change": {"pixels": TABLES["pixels"][:11]}}, r"pixels is of I64 \(11, 32\)"),
        ({"change": {"pixels": 0 * TABLES["pixels"]}}, "no pixel was measured"),
        ({"change": {"levels": torch.ones(2000, 256, dtype=torch.int64)}}, r"levels is of I64 \(2000, 256\)"),
        ({"change": {"images": torch.ones(2, 2, dtype=torch.int64)}}, r"images is of I64 \(2, 2\)"),
        ({"change": {"squared": torch.tensor(1.0).double()}}, "is no table of errors"),
        ({"change": HUGE}, "is no table of errors"),
        ({"change": {"more": IMAGES.clone()}}, r"is no table of errors: it holds \["),
        ({"change": {"rows": ROWS[:2]}}, r"has \(2,\) rows, but other images"),
        ({"drop": ("levels",)}, "is no table of errors"),
        ({"change": {"levels_nats": torch.ones(3, 32, 33)}}, "levels_nats is of F32"),
        ({"change": {"levels_nats": torch.ones(13, 32, 33).double()}}, r"is of F64 \(13, 32, 33\)"),
        ({"change": {"levels_nats": torch.ones(1, 32, 33).double()}}, "levels_nats is"),
        ({"change": {"levels_nats": -torch.ones(STEPS, 32, 33).double()}}, "levels_nats is"),
        ({"of": {"holdout": "some"}}, "holdout is 'some'; allowed: a number or null"),
        ({"of": {"clip_x0": "yes"}}, "clip_x0 is 'yes'; allowed: true or false"),
        ({"of": {"evaluations": [1] * 1000}}, "evaluations is .*; allowed: a whole number"),
        ({"of": {"evaluations": -1}}, "evaluations is -1; allowed: a whole number"),
        ({"of": {"seed": 2**63}}, "seed is .*; allowed: a whole number"),
        ({"of": "{}"}, "does not say its chosen, clip_x0, data"),
        ({"of": "no json"}, "is not a valid JSON file"),
        ({"of": "[" * 10**5}, "the header of"),
    ],
)
def test_a_strangers_table(change, words, tmp_path):
    save(tmp_path, **change)
    with pytest.raises(ValueError, match=words) as refused:
        read(tmp_path)
    assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


def test_a_table_that_claims_another_size_is_refused_before_it_is_read(tmp_path):
    write_errors(tmp_path, STORED)
    data = (tmp_path / ERRORS).read_bytes()
    for change in (
        lambda: data[:-1],
        lambda: data[: len(data) // 2],
        lambda: data[:-1] + bytes([data[-1] ^ 1]),
        lambda: b"",
        lambda: b"no tensors at all",
        lambda: (2**40).to_bytes(8, "little") + data[8:],
        lambda: data.replace(b"photos/", b"elsewhe"),
    ):
        (tmp_path / ERRORS).write_bytes(change())
        with pytest.raises(ValueError, match=ERRORS) as refused:
            read(tmp_path)
        assert len(str(refused.value)) <= 300


def test_a_file_without_a_sum(tmp_path):
    save_file(
        TABLES | {"rows": ROWS, "images": IMAGES},
        tmp_path / ERRORS,
        {"of": json.dumps(dataclasses.asdict(OF))},
    )
    with pytest.raises(ValueError, match="it has no sum"):
        read(tmp_path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="there is no file named"):
        read(tmp_path)
    os.mkfifo(tmp_path / ERRORS)
    with pytest.raises(ValueError, match="is a pipe; allowed: a regular file"):
        read(tmp_path)
