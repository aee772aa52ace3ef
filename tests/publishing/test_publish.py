"""publish.py, upload.py: what is sent, once; what is tried again and what not; the command."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

from hf_ddpm.cli import publish_command, run
from hf_ddpm.folders.index import needs_us
from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.publishing.background import take_snapshot
from hf_ddpm.publishing.publish import collect, publish
from hf_ddpm.publishing.upload import PublishError, Retry
from hf_ddpm.scheduler import DDPMScheduler
from tests.launching import ROOT

PIPELINE = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
RUN = PIPELINE | {
    *("README.md", "samples.png", "evaluation.json", "train_config.json"),
    *("bits-per-step.png", "rate-distortion.png", "reconstructions.png"),
}
REPO = "tester/tiny"
FAST = Retry(attempts=3, first_wait=0.01, longest_wait=0.02)
TOKEN = "hf_" + "a1B2c3D4" * 4


def cli(*words):
    """Run the command; what `run` does to errors included."""
    run(publish_command, [str(word) for word in words], "hf-ddpm publish")


# What is sent


def test_a_run_is_sent_without_what_nobody_needs(run_folder, local_hub):
    done = publish(run_folder, REPO, license="mit", retry=FAST)
    assert done.url == f"{local_hub.endpoint}/{REPO}" and done.changed
    files = local_hub.files(REPO)
    assert set(files) == RUN
    for path in PIPELINE:
        assert files[path] == (run_folder / path).read_bytes()
    assert b"license: mit" in files["README.md"]
    loaded = DDPMPipeline.from_pretrained(REPO)
    assert type(loaded.scheduler) is DDPMScheduler and loaded.name_or_path == REPO


def test_the_same_content_makes_no_second_commit(run_folder, local_hub, capfd):
    publish(run_folder, REPO, retry=FAST)
    again = publish(run_folder, REPO, retry=FAST)
    assert not again.changed and local_hub.commits(REPO) == 1
    assert sum(line == "PUT /lfs" for line in local_hub.requests) == 5  # four pictures and the weights, once
    assert publish(run_folder, REPO, license="mit", retry=FAST).changed
    assert local_hub.commits(REPO) == 2
    assert "No files have been modified" not in capfd.readouterr().err  # the client's words for it


def test_a_dry_run_lists_what_would_be_sent_and_asks_nobody(run_folder, local_hub, capsys):
    cli(run_folder, REPO, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"would be sent to {REPO}, main:" and lines[-1].endswith(f"in {len(RUN)} files")
    listed = {line.split()[-1]: int(line.split()[0].replace(",", "")) for line in lines[1:-1]}
    assert int(lines[-1].split()[0].replace(",", "")) == sum(listed.values())
    assert local_hub.requests == []
    publish(run_folder, REPO, retry=FAST)
    assert listed == {path: len(content) for path, content in local_hub.files(REPO).items()}


def test_a_branch_and_a_private_repository(run_folder, local_hub):
    publish(run_folder, REPO, private=True, revision="v2", retry=FAST)
    assert local_hub.private == {f"models/{REPO}"}
    assert local_hub.files(REPO) == {} and set(local_hub.files(REPO, branch="v2")) == RUN
    assert b'revision="v2"' in local_hub.files(REPO, branch="v2")["README.md"]
    publish(run_folder, REPO, revision="v2", retry=FAST)  # the branch is there
    assert len(DDPMPipeline.from_pretrained(REPO, revision="v2")(1).images) == 1
    with pytest.raises(ValueError, match=f"can't load a pipeline from '{REPO}': .*nowhere"):
        DDPMPipeline.from_pretrained(REPO, revision="nowhere")


def test_private_is_never_public(run_folder, local_hub):
    publish(run_folder, REPO, retry=FAST)
    with pytest.raises(ValueError, match=f"repository '{REPO}' is there and public; allowed with private"):
        publish(run_folder, REPO, private=True, license="mit", retry=FAST)
    assert local_hub.commits(REPO) == 1


def test_other_averaged_weights(run_folder, local_hub):
    publish(run_folder, REPO, ema_decay=0.9, retry=FAST)
    files = local_hub.files(REPO)
    assert set(files) == PIPELINE | {"README.md", "train_config.json"}  # the rest is of the main weights
    sent = files["unet/diffusion_pytorch_model.safetensors"]
    assert sent == (run_folder / "unet" / "diffusion_pytorch_model.ema_0_9.safetensors").read_bytes()
    assert b"decay 0.9." in files["README.md"]
    assert set(collect(run_folder, REPO, ema_decay=0.99).files) == RUN  # the main ones, by the run's config
    with pytest.raises(
        ValueError, match=r"ema_decay is 0.5, of which there are no weights; allowed: 0.9, 0.99"
    ):
        publish(run_folder, REPO, ema_decay=0.5)


def test_other_averaged_weights_are_looked_at_too(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.ema_0_9.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"can't be published: .*ema_0_9\.safetensors is not a safetensors file"
    ):
        collect(folder, REPO, ema_decay=0.9)


def test_weights_that_were_in_shards_before(tiny_folder, tmp_path, local_hub):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    publish(tmp_path / "shards", REPO, retry=FAST)
    weights = {path for path in local_hub.files(REPO) if path.endswith((".safetensors", ".index.json"))}
    assert len(weights) > 2 and "unet/diffusion_pytorch_model.safetensors.index.json" in weights
    assert len(DDPMPipeline.from_pretrained(REPO)(1).images) == 1
    publish(tiny_folder, REPO, retry=FAST)
    assert set(local_hub.files(REPO)) == PIPELINE | {"README.md"}  # old shards would be read first


def test_a_picture_of_ones_own_and_the_custom_pipeline(run_folder, tmp_path):
    picture = run_folder / "samples" / "step-00000003.png"
    publication = collect(run_folder, REPO, picture=picture, custom_pipeline=True)
    assert publication.files["samples.png"] == picture
    assert publication.files["pipeline.py"] == b"from hf_ddpm import DDPMPipeline\n"
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"picture '.*x.png' can't be read: .*; allowed: a PNG file"):
        collect(run_folder, REPO, picture=tmp_path / "x.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe.png' can't be read: pipe.png is a pipe; allowed: a regular"):
        collect(run_folder, REPO, picture=tmp_path / "pipe.png")


def test_push_to_hub_is_the_same_code(tiny_folder, local_hub):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    assert pipeline.push_to_hub(REPO, license="mit", private=True) == f"{local_hub.endpoint}/{REPO}"
    assert set(local_hub.files(REPO)) == PIPELINE | {"README.md"} and local_hub.private
    assert pipeline.push_to_hub(REPO, license="mit") and local_hub.commits(REPO) == 1


def test_saving_may_push_too(tiny_folder, tmp_path, local_hub):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.save_pretrained(tmp_path / "mine", push_to_hub=True, license="mit")
    assert set(local_hub.files("tester/mine")) == PIPELINE | {"README.md"}
    with pytest.raises(ValueError, match="save_pretrained has no use for license without push_to_hub"):
        pipeline.save_pretrained(tmp_path / "mine", license="mit")


def test_every_argument_reaches_the_command_that_finishes_it(run_folder, local_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    picture = run_folder / "samples" / "step-00000003.png"
    options = {"revision": "v2", "ema_decay": 0.9, "license": "mit", "dataset_license": "cc0-1.0"}
    options |= {"dataset_id": "me/photos", "picture": picture, "custom_pipeline": True}
    with pytest.raises(PublishError) as error:
        publish(run_folder, REPO, private=True, **options)
    assert str(error.value).endswith(
        f"; then: hf-ddpm publish {run_folder} {REPO} --revision v2 --ema-decay 0.9 --license mit "
        f"--dataset-license cc0-1.0 --dataset-id me/photos --picture {picture} --custom-pipeline --private"
    )
    pipeline = DDPMPipeline.from_pretrained(run_folder)
    with pytest.raises(PublishError, match=r"; then: call it again$"):  # its folder is gone by then
        pipeline.push_to_hub(REPO)


# What goes wrong


@pytest.mark.parametrize(
    "request_line", [r"^POST .*/commit/", r"^POST .*/repos/create", r"^GET /api/models/"]
)
@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429}, {}], ids=["500", "429", "dropped"])
def test_what_may_pass_is_tried_again(request_line, fault, run_folder, local_hub, caplog):
    local_hub.fail(request_line, times=2, **fault)
    publish(run_folder, REPO, retry=FAST)
    assert set(local_hub.files(REPO)) == RUN and local_hub.commits(REPO) == 1
    said = [record.getMessage() for record in caplog.records if record.name == "hf_ddpm.publishing.upload"]
    assert len(said) == 2 and all("trying again in" in words and "\n" not in words for words in said)


def test_a_commit_whose_answer_got_lost_is_not_made_twice(run_folder, local_hub):
    local_hub.fail(r"^POST .*/commit/", done=True)
    publish(run_folder, REPO, retry=FAST)
    assert local_hub.commits(REPO) == 1 and set(local_hub.files(REPO)) == RUN


def test_a_dropped_upload_is_sent_again_and_the_others_are_not(run_folder, local_hub):
    local_hub.fail(r"^PUT /lfs", times=1)
    publish(run_folder, REPO, retry=FAST)
    assert set(local_hub.files(REPO)) == RUN
    assert sum(line == "PUT /lfs" for line in local_hub.requests) == 6


def test_the_hub_says_how_long_to_wait(run_folder, local_hub):
    waits = []
    retry = Retry(
        attempts=3, first_wait=0.5, longest_wait=40, sleep=lambda seconds: waits.append(seconds) or True
    )
    local_hub.fail(r"^POST .*/repos/create", status=429, headers={"Retry-After": "30"})
    local_hub.fail(r"^POST .*/repos/create", status=503, headers={"Retry-After": "9999"})
    publish(run_folder, REPO, retry=retry)
    assert waits == [30, 40]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "log in with `hf auth login`, or set HF_TOKEN (status 401: fault injected"),
        (403, "it needs the permission to write to this repository (status 403: fault injected"),
        (
            404,
            "there is no such repository or branch, or the token may not see it (status 404: fault injected",
        ),
        (400, "the Hub answered with an error (status 400: fault injected by the test)"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(status, words, run_folder, local_hub, capsys, caplog):
    publish(run_folder, REPO, retry=FAST)  # else the client asks whether it is there
    local_hub.requests.clear()
    local_hub.fail(r"^POST .*/preupload/", times=9, status=status)
    with pytest.raises(SystemExit, match="1"):
        cli(run_folder, REPO, "--license", "mit")
    error = capsys.readouterr().err.strip().splitlines()
    command = f"hf-ddpm publish {run_folder} {REPO} --license mit"
    assert (
        words in error[-1] and error[-1].endswith(f"; then: {command}") and "Traceback" not in "".join(error)
    )
    assert sum("/preupload/" in line for line in local_hub.requests) == 1 and not caplog.records
    assert local_hub.commits(REPO) == 1


def test_a_wrong_token(run_folder, local_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PublishError, match="log in with `hf auth login`") as error:
        publish(run_folder, REPO, retry=FAST)
    assert TOKEN not in str(error.value) and error.value.__cause__ is None
    publish(run_folder, REPO, token="hf_local", retry=FAST)  # said outright


def test_a_hub_that_does_not_answer(run_folder, local_hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match=r"the Hub can't be reached: .*refused"):
        publish(run_folder, REPO, retry=FAST)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        PublishError, match=f"'{REPO}' was not published: HF_HUB_OFFLINE is set; then: hf-ddpm publish"
    ):
        publish(run_folder, REPO)  # and is not tried again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["/nowhere", REPO],
            "model '/nowhere' is no folder with a model_index.json; allowed: a pipeline's folder",
        ),
        (["{run}", "a/b/c"], "repo_id is 'a/b/c'; allowed: user/name of letters"),
        (["{run}", REPO, "-x"], "unknown argument '-x'; see --help"),
        (["{run}", f"https://u:{TOKEN}@h.co/a/b"], "repo_id is 'https://***@h.co/a/b'; allowed: "),
        (["{run}", REPO, "--licence", "mit"], "unknown argument '--licence'; did you mean --license?"),
        (["{run}", REPO, "--license", "A B"], "license is 'A B'; allowed: as the Hub writes it: apache-2.0"),
        (["{run}", REPO, "--ema-decay", "x"], "--ema-decay is 'x'; allowed: a number"),
        (["{run}"], "the following arguments are required: REPO_ID"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, run_folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli(*(word.format(run=run_folder) for word in words))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and TOKEN not in error


def test_a_folder_that_does_not_load_is_not_sent(run_folder, tmp_path):
    for name, damage, words in (
        (
            "empty",
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b""),
            "can't be published: ",
        ),
        (
            "none",
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
            "no file named diffusion",
        ),
        ("config", lambda f: (f / "unet/config.json").unlink(), "there is no file named unet/config.json"),
        ("scheduler", lambda f: shutil.rmtree(f / "scheduler"), "no file named scheduler_config.json"),
    ):
        folder = tmp_path / name
        shutil.copytree(run_folder, folder)
        damage(folder)
        with pytest.raises(ValueError, match=words):
            collect(folder, REPO)


def test_a_link_out_of_the_folder_is_not_followed(run_folder, tmp_path):
    (tmp_path / "secret").write_text('{"password": "sesame"}')
    for name in ("README.md", "train_config.json", "samples/step-00000009.png", "notes.md", "training.png"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(run_folder, folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=f"{name} is a link out of '.*'; allowed: its own files"):
            collect(folder, REPO)
        with pytest.raises(ValueError, match=f"{name} is a link out of"):
            take_snapshot(folder, tmp_path / "shot")


def test_publish_says_that_hf_ddpm_is_needed(tiny_folder, tmp_path, capsys):
    pipeline = DDPMPipeline.from_pretrained(tiny_folder)
    pipeline.scheduler = DDPMScheduler(20, beta_end=0.5, prediction_type="mean")
    pipeline.save_pretrained(tmp_path)
    assert needs_us(json.loads((tmp_path / "model_index.json").read_text()))
    cli(tmp_path, REPO, "--dry-run")
    assert "plain diffusers will refuse this model: whoever uses it needs hf_ddpm" in capsys.readouterr().out
    text = collect(tmp_path, REPO).files["README.md"].decode()
    assert "library_name: hf_ddpm" in text and "from diffusers import" not in text


# From the outside: the console, plain diffusers, no network

ELSEWHERE = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_ddpm":
            raise ModuleNotFoundError("No module named 'hf_ddpm'")

sys.meta_path.insert(0, Missing())
import diffusers, torch
good, bad = sys.argv[1].split(","), sys.argv[2].split(",")
for cls in (diffusers.DDPMPipeline, diffusers.DiffusionPipeline):
    for model in good:
        pipeline = cls.from_pretrained(model)
        assert type(pipeline) is diffusers.DDPMPipeline
        assert type(pipeline.scheduler) is diffusers.DDPMScheduler
        assert len(pipeline(2, num_inference_steps=20).images) == 2
    for model in bad:
        try:
            cls.from_pretrained(model)
        except ValueError as error:
            assert "hf_ddpm" in str(error), error
        else:
            raise AssertionError(f"{model} loaded")
assert "hf_ddpm" not in sys.modules
"""


def test_plain_diffusers_loads_what_it_can_run_and_refuses_the_rest(run_folder, tmp_path, local_hub):
    publish(run_folder, REPO, retry=FAST)
    ours = DDPMPipeline.from_pretrained(run_folder)
    ours.scheduler = DDPMScheduler(20, beta_end=0.5, variance_type="learned")
    ours.save_pretrained(tmp_path / "learned")
    publish(tmp_path / "learned", "tester/learned", retry=FAST)
    models = [f"{REPO},{run_folder}", f"tester/learned,{tmp_path / 'learned'}"]
    environment = {**os.environ, **local_hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *models], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_from_the_cache_while_nothing_answers(run_folder, local_hub, monkeypatch):
    publish(run_folder, REPO, retry=FAST)
    with pytest.raises(
        ValueError, match=f"can't load a pipeline from '{REPO}': no such folder, and from the"
    ):
        DDPMPipeline.from_pretrained(REPO, local_files_only=True)
    DDPMPipeline.from_pretrained(REPO)
    asked = len(local_hub.requests)
    DDPMPipeline.from_pretrained(REPO, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    DDPMPipeline.from_pretrained(REPO)
    assert len(local_hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    DDPMPipeline.from_pretrained(REPO)


def test_the_script_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["publish.py", "/nowhere", REPO])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "train_scripts" / "publish.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith("publish.py: error: model '/nowhere' is no folder")
