"""background.py: training never waits, the newest wins, snapshots are of one moment, failures are told."""

import json
import logging
import os
import shutil
import threading
import time

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from hf_ddpm.folders.layout import SNAPSHOTS
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.publishing.background import BackgroundPush, take_snapshot
from hf_ddpm.publishing.upload import PublishError, Retry
from hf_ddpm.runtime.disk import update_folder
from hf_ddpm.scheduler import DDPMScheduler

REPO = "tester/run"
FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(run_folder, tmp_path):
    """A run's folder that may be changed."""
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()  # as while it trains
    return tmp_path / "run"


def train_on(run):
    """Replace the pipeline's files as the trainer does."""
    pipeline = DDPMPipeline.from_pretrained(run)
    pipeline.unet.conv_out.bias.data += 1
    update_folder(run, lambda place: pipeline.save_pretrained(place), last="model_index.json")
    return (run / WEIGHTS).read_bytes()


class Gate:
    """Holds back the Hub's answers to some requests until it is opened."""

    def __init__(self, hub, monkeypatch, word):
        self.reached, self._open, answer = threading.Event(), threading.Event(), hub.reply

        def reply(method, target, body, known):
            if word in target and method == "POST":
                self.reached.set()
                assert self._open.wait(30)
            return answer(method, target, body, known)

        monkeypatch.setattr(hub, "reply", reply)

    def open(self):
        self._open.set()


def messages(caplog):
    return [
        record.getMessage() for record in caplog.records if record.name == "hf_ddpm.publishing.background"
    ]


def test_pushes_go_up_one_after_the_other(run, local_hub):
    push = BackgroundPush(run, REPO, private=True, license="mit", retry=FAST)
    push.push(3)
    assert push.finish() == f"{local_hub.endpoint}/{REPO}"
    files = local_hub.files(REPO)
    assert files[WEIGHTS] == (run / WEIGHTS).read_bytes() and local_hub.private == {f"models/{REPO}"}
    assert b"license: mit" in files["README.md"] and b"24 images seen" in files["README.md"]
    assert not any("checkpoints" in path or "log" in path or "ema" in path for path in files)
    assert not (run / SNAPSHOTS).exists() and not are_progress_bars_disabled()


def test_nothing_pushed_is_no_failure(run, local_hub):
    assert BackgroundPush(run, REPO).finish() is None
    assert local_hub.requests == []


def test_training_does_not_wait_and_the_newest_wins(run, local_hub, monkeypatch):
    gate = Gate(local_hub, monkeypatch, "/commit/")
    push = BackgroundPush(run, REPO, retry=FAST)
    sent = {1: (run / WEIGHTS).read_bytes()}
    push.push(1)
    assert gate.reached.wait(30)
    for step in (2, 3, 4):  # while the first one is under way
        sent[step] = train_on(run)
        started = time.perf_counter()
        push.push(step)
        assert time.perf_counter() - started < 2  # that it doesn't wait for the gate: the snapshot alone
    assert len(set(sent.values())) == 4 and local_hub.commits(REPO) == 0
    assert sorted(os.listdir(run / SNAPSHOTS)) == ["1", "4"]
    gate.open()
    push.finish()
    assert local_hub.commits(REPO) == 2 and local_hub.files(REPO)[WEIGHTS] == sent[4]


def test_a_snapshot_is_of_the_moment_of_the_call(run, local_hub, monkeypatch):
    gate = Gate(local_hub, monkeypatch, "/repos/create")
    push = BackgroundPush(run, REPO, retry=FAST)
    before, config = (run / WEIGHTS).read_bytes(), (run / "train_config.json").read_bytes()
    push.push(1)
    assert gate.reached.wait(30)
    train_on(run)
    (run / "train_config.json").write_text("{}")  # written in place: the snapshot has a copy
    gate.open()
    push.finish()
    files = local_hub.files(REPO)
    assert files[WEIGHTS] == before and files["train_config.json"] == config


@pytest.mark.parametrize("links", [True, False])
def test_a_snapshots_weights_are_a_second_name_where_there_can_be_one(links, run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    told = ("notes.md", "commands.sh", "training.png", "samples.png", "progressive.png")
    for name in told:
        (run / name).write_text("mine")
    take_snapshot(run, tmp_path / "shot")
    assert ((tmp_path / "shot" / WEIGHTS).stat().st_ino == (run / WEIGHTS).stat().st_ino) == links
    names = {
        p.relative_to(tmp_path / "shot").as_posix() for p in (tmp_path / "shot").rglob("*") if p.is_file()
    }
    assert names == {
        *told,
        *("model_index.json", "train_config.json", "log.jsonl", "samples/step-00000006.png"),
        *("scheduler/scheduler_config.json", "unet/config.json", WEIGHTS),
        *("bits-per-step.png", "rate-distortion.png", "reconstructions.png"),
    }


def test_what_passes_is_tried_again(run, local_hub):
    local_hub.fail(r"^POST .*/commit/", times=2, status=500)
    push = BackgroundPush(run, REPO, retry=FAST)
    push.push(1)
    assert push.finish() and local_hub.commits(REPO) == 1


def test_a_failure_is_one_line_and_the_next_push_makes_up_for_it(run, local_hub, caplog):
    local_hub.fail(r"^POST .*/repos/create", status=401)
    push = BackgroundPush(run, REPO, retry=FAST)
    push.push(1)
    while not messages(caplog):
        time.sleep(0.01)
    (words,) = messages(caplog)
    assert (
        words.startswith("step 1 was not pushed, training goes on: ")
        and "(status 401: fault injected by the test)" in words
    )
    assert "\n" not in words
    push.push(2)
    assert push.finish() and local_hub.commits(REPO) == 1


def test_the_last_failure_is_raised_and_names_the_command(run, local_hub, caplog):
    push = BackgroundPush(run, REPO, private=True, dataset_license="cc-by-4.0", retry=FAST)
    push.push(1)
    while local_hub.requests == [] or any((run / SNAPSHOTS).iterdir()):  # gone when it is uploaded
        time.sleep(0.01)
    local_hub.fail(r"^POST .*/repos/create", times=9)
    push.push(2)
    command = f"hf-ddpm publish {run} {REPO} --private --dataset-license cc-by-4.0"
    with pytest.raises(PublishError, match="the Hub can't be reached: ") as error:
        push.finish()
    assert str(error.value).endswith(f"; then: {command}") and "\n" not in str(error.value)
    assert not are_progress_bars_disabled() and not (run / SNAPSHOTS).exists()


def test_a_newer_snapshot_ends_the_waiting_for_an_older_one(run, local_hub, caplog):
    local_hub.fail(r"^POST .*/repos/create", times=1)
    push = BackgroundPush(run, REPO, retry=Retry(attempts=2, first_wait=600, longest_wait=600))
    push.push(1)
    while not any("trying again in 600 s" in record.getMessage() for record in caplog.records):
        time.sleep(0.01)
    push.push(2)
    assert push.finish(timeout=60) and local_hub.commits(REPO) == 1
    assert "(a newer one follows)" in messages(caplog)[0]


def test_finish_waits_no_longer_than_it_is_told(run, local_hub, monkeypatch):
    local_hub.fail(r"^POST .*/repos/create", times=9)
    push = BackgroundPush(run, REPO, retry=Retry(attempts=9, first_wait=600, longest_wait=600))
    push.push(1)
    with pytest.raises(PublishError, match=f"; then: hf-ddpm publish {run} {REPO}$"):
        push.finish(timeout=0.2)
    gate = Gate(local_hub, monkeypatch, "/repos/create")
    push = BackgroundPush(run, REPO)
    push.push(1)
    assert gate.reached.wait(30)
    with pytest.raises(
        PublishError, match=f"'{REPO}' was not published in 0.1 s; then: hf-ddpm publish {run} {REPO}"
    ):
        push.finish(timeout=0.1)
    gate.open()


def test_a_snapshot_that_cannot_be_taken_stops_nothing(run, local_hub, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    push = BackgroundPush(run, REPO, retry=FAST)
    push.push(1)
    monkeypatch.setattr(shutil, "copyfile", full)
    push.push(2)
    assert "step 2 was not pushed, training goes on: no snapshot of the folder" in messages(caplog)[-1]
    with pytest.raises(PublishError, match=f"No space left on device; then: hf-ddpm publish {run}"):
        push.finish()


def test_damaged_files_stop_nothing(run, local_hub, caplog):
    push = BackgroundPush(run, REPO, retry=FAST)
    (run / "train_config.json").write_text("{")
    push.push(1)
    assert "step 1 was not pushed, training goes on: " in messages(caplog)[0]
    (run / "train_config.json").write_text("{}")
    push.push(2)
    assert push.finish()


def test_the_data_set_is_told_from_where_the_run_was_started(run, local_hub, monkeypatch):
    monkeypatch.chdir(run.parent)
    config = {"dataset": "someone/photos", "output_dir": "run"}
    (run / "train_config.json").write_text(json.dumps(config))
    push = BackgroundPush("run", REPO, retry=FAST)
    push.push(1)
    push.finish()
    assert b"datasets:\n- someone/photos" in local_hub.files(REPO)["README.md"]


def test_a_folder_that_cannot_be_published_stops_nothing(run, local_hub, caplog):
    push = BackgroundPush(run, REPO, retry=FAST)
    (run / WEIGHTS).unlink()
    push.push(1)
    with pytest.raises(
        PublishError, match=r"no file named diffusion_pytorch_model.safetensors.*; then: hf-ddpm"
    ):
        push.finish()
    assert len(messages(caplog)) == 1 and local_hub.requests == []


def test_what_a_killed_run_left_goes(run):
    (run / SNAPSHOTS / "1").mkdir(parents=True)
    BackgroundPush(run, REPO).finish()
    assert not (run / SNAPSHOTS).exists()


@pytest.mark.parametrize(
    ("repo_id", "options", "words"),
    [
        ("a/b/c", {}, "repo_id is 'a/b/c'; allowed: user/name"),
        (REPO, {"license": "A B"}, "license is 'A B'; allowed: "),
    ],
)
def test_bad_arguments_are_refused_before_training(repo_id, options, words, run):
    with pytest.raises(ValueError, match=words):
        BackgroundPush(run, repo_id, **options)


def test_no_token_in_what_is_said(run, local_hub, monkeypatch, caplog):
    token = "hf_" + "a1B2c3D4" * 4
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://me:{token}@127.0.0.1:9")
    with caplog.at_level(logging.DEBUG, "hf_ddpm"):
        push = BackgroundPush(run, REPO, retry=FAST)
        push.push(1)
        with pytest.raises(PublishError) as error:
            push.finish()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_ddpm")]
    assert said and token not in "".join([*said, str(error.value)])


def test_a_scheduler_that_only_hf_ddpm_runs_is_pushed_as_such(run, local_hub):
    pipeline = DDPMPipeline.from_pretrained(run)
    pipeline.scheduler = DDPMScheduler(20, beta_end=0.5, variance_type="learned")
    update_folder(run, lambda place: pipeline.save_pretrained(place), last="model_index.json")
    push = BackgroundPush(run, REPO, retry=FAST)
    push.push(1)
    push.finish()
    assert b"library_name: hf_ddpm" in local_hub.files(REPO)["README.md"]
