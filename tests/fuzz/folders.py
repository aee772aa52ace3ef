"""Changes of a model's folder, one at a time, and what must come of each.

A change is a label, what makes it, and the outcome that must come of it: `REFUSED`, in one line when the
folder is loaded, `DRAWN`, or `EITHER` of them.
"""

import json
import logging
import math
import os
import resource
import shutil
import signal
import socket
import struct
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_ddpm.generation.pipeline import DDPMPipeline
from hf_ddpm.generation.samplers import swap_scheduler
from tests.folders.files import INDEX, SCHEDULER, UNET, WEIGHTS

REFUSED, DRAWN, EITHER = "refused", "drawn", "refused or drawn"
SECONDS, MEMORY, LINE = 20, 2**31, 300  # of one change; bytes beyond what the process has; characters
DEEP = json.loads("[" * 15 + "1" + "]" * 15)
VALUES = {
    "text": "x",
    "no text": "",
    "long text": "9" * 5000,
    "half a character": "\ud800",
    "null": None,
    "true": True,
    "false": False,
    "-1": -1,
    "0": 0,
    "1": 1,
    "2": 2,
    "2 as a float": 2.0,
    "2 as text": "2",
    "2e6": 2e6,
    "2000000 as text": "2000000",
    "8192": 8192,
    "10^9": 10**9,
    "10^18": 10**18,
    "10^400": 10**400,
    "0.5": 0.5,
    "-0.5": -0.5,
    "1e308": 1e308,
    "1e-320": 1e-320,
    "NaN": math.nan,
    "infinite": math.inf,
    "nothing in a list": [],
    "a list": [1],
    "a list of text": ["x"],
    "a list in a list": [[1]],
    "a long list": [0.5] * 1000,
    "deep": DEEP,
    "no keys": {},
    "keys": {"a": {"b": 1}},
}
# Keys that the files lack, which a class or another sampler would take
FURTHER = {
    INDEX: ("_name_or_path", "_ignore_files", "vae", "x"),
    UNET: ("quantization_config", "_name_or_path", "_use_default_values", "x"),
    SCHEDULER: ("solver_order", "lambda_min_clipped", "use_karras_sigmas", "_use_default_values", "x"),
}


# Values that no key takes that a class has, and those that any other key may have
NEVER = {"10^400", "half a character", "deep", "keys", "a list in a list"}
ANYWHERE = {"text", "null", "true", "1", "0.5", "a list"}


def kind_of(value):
    return "number" if type(value) in (int, float) else type(value)


def expected(file, key, name, value, before):
    """What must come of a value in a key's place; `before` is what stood there, None for nothing."""
    if file == INDEX:
        return REFUSED if kind_of(value) in ("number", dict) or name in NEVER else EITHER
    if key == "x":
        return DRAWN if name in ANYWHERE else EITHER
    if key.startswith("_"):
        return EITHER
    if name in NEVER or (name == "long text" and before is not None):
        return REFUSED
    if before is None or value is None or (key == "sample_size" and isinstance(value, list)):
        return EITHER
    if value == before and type(value) is type(before):
        return DRAWN
    odd = isinstance(value, float) and not math.isfinite(value)
    return REFUSED if odd or kind_of(value) != kind_of(before) else EITHER


def values(folder):
    """Each value of each JSON file, in turn of each odd value."""

    def change(file, key, value):
        return lambda model: (model / file).write_text(
            json.dumps(json.loads((model / file).read_text()) | {key: value})
        )

    for file, further in FURTHER.items():
        content = json.loads((folder / file).read_text())
        for key in (*content, *further):
            for name, value in VALUES.items():
                outcome = expected(file, key, name, value, content.get(key))
                yield f"{file}: {key}: {name}", change(file, key, value), outcome


def files():
    """Each file, in turn of each thing that is no such file."""
    header = b'{"conv_in.bias": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}'
    contents = {
        "empty": b"",
        "zeros": bytes(1000),
        "half": None,
        "no JSON": b"\x80\x04\x95\xff",
        "a list": b"[1, 2]",
        "a number": b"7",
        "NaN": b'{"a": NaN}',
        "a key twice": b'{"a": 1, "a": 2}',
        "a mark before it": b"\xef\xbb\xbf{}",
        "no keys": b"{}",
        "very deep": b'{"a":' * 100_000,
        "many lists": b'{"a": [' + b"[]," * 200_000 + b"[]]}",
        "a long number": b'{"a": ' + b"9" * 5000 + b"}",
        "a header of 2^60": struct.pack("<Q", 2**60) + header,
        "a header of nothing": struct.pack("<Q", 0) + header,
        "a header without its data": struct.pack("<Q", len(header)) + header,
        "a header of many bytes": struct.pack("<Q", 2**25) + b" " * 2**25 + b"\0",
        "a deep header": struct.pack("<Q", 60_000) + b"[" * 60_000 + b"\0",
    }

    def put(file, content):
        def change(model):
            data = (model / file).read_bytes()
            (model / file).unlink()
            (model / file).write_bytes(data[: len(data) // 2] if content is None else content)

        return change

    def huge(model, file):
        with (model / file).open("r+b") as opened:
            opened.truncate(2**33)

    def link(to):
        return lambda path: path.symlink_to(to)

    def open_socket(path):
        before = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(before)

    kinds = {
        "missing": lambda path: None,
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a socket": open_socket,
        "a link to nothing": link("/nowhere/at/all"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to zeros": link("/dev/zero"),
        "a link to a terminal": link("/dev/tty"),
    }

    def replace(file, make):
        def change(model):
            (model / file).unlink()
            make(model / file)

        return change

    for file in (INDEX, UNET, SCHEDULER, WEIGHTS):
        yield f"{file}: huge", lambda model, file=file: huge(model, file), REFUSED
        for name, content in contents.items():
            # Older versions of diffusers wrote few keys of a scheduler
            outcome = EITHER if file == SCHEDULER and name in ("no keys", "NaN") else REFUSED
            yield f"{file}: {name}", put(file, content), outcome
        yield from ((f"{file}: {name}", replace(file, make), REFUSED) for name, make in kinds.items())


def tensors():
    """The weights, in turn of each thing that is not the network's."""

    def change(edit):
        def save(model):
            weights = load_file(model / WEIGHTS)
            edit(weights)
            save_file(weights, model / WEIGHTS, {"format": "pt"})

        return save

    first = "conv_in.weight"
    edits = {
        "none": dict.clear,
        "one missing": lambda x: x.pop(first),
        "one too many": lambda x: x.update(extra=torch.zeros(1)),
        "one with a long name": lambda x: x.update({"x" * 5000: torch.zeros(1)}),
        "a thousand too many": lambda x: x.update({f"extra{i}": torch.zeros(1) for i in range(1000)}),
        "empty": lambda x: x.update({first: torch.zeros(0)}),
        "empty and large": lambda x: x.update({first: torch.zeros(0, 2**40)}),
        "flat": lambda x: x.update({first: x[first].flatten()}),
        "wider": lambda x: x.update({first: torch.cat([x[first]] * 2)}),
        "not a number": lambda x: x[first].view(-1)[0].fill_(math.nan),
        "infinite": lambda x: x[first].view(-1)[0].fill_(math.inf),
        "very large": lambda x: x[first].fill_(3e38),
        "zeros": lambda x: x[first].zero_(),
    }
    dtypes = (torch.bool, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    dtypes += (torch.float8_e4m3fn, torch.complex64)
    for name, edit in edits.items():
        yield f"{WEIGHTS}: {name}", change(edit), {"very large": EITHER, "zeros": DRAWN}.get(name, REFUSED)
    for dtype in dtypes:
        outcome = DRAWN if dtype in (torch.float16, torch.bfloat16, torch.float64) else REFUSED
        one = change(lambda x, dtype=dtype: x.update({first: x[first].to(dtype)}))
        yield f"{WEIGHTS}: {dtype}", one, outcome
        every = change(lambda x, dtype=dtype: x.update({k: v.to(dtype) for k, v in x.items()}))
        yield f"{WEIGHTS}: all {dtype}", every, outcome


def draw(pipeline):
    """Draw an image with the pipeline's own sampler and two others, in one step."""
    pipeline.set_progress_bar_config(disable=True)
    for sampler in (None, "ddim", "dpm-solver++"):
        if sampler is not None:
            swap_scheduler(pipeline, sampler)
        pipeline(num_inference_steps=1)


def attempt(model, outcome):
    """What is wrong with what comes of a folder; None where that is the outcome, in one line if refused."""
    loaded = False
    try:
        pipeline = DDPMPipeline.from_pretrained(model)
        loaded = True
        if outcome == REFUSED:
            return "it was loaded"
        draw(pipeline)
    except (ValueError, OSError) as error:
        words = str(error)
        if len(words) > LINE or "\n" in words:
            return f"a line of {len(words)} characters: {words[:400]!r}"
        if any(word in words for word in ("object has no attribute", "unexpected keyword", "NoneType")):
            return f"Python's own words: {words!r}"
        if outcome == DRAWN:
            return f"{'not drawn' if loaded else 'refused'}: {words!r}"
    except BaseException:
        return traceback.format_exc()
    return None


def attack(folder, changes, scratch):
    """Make each change in a copy of the folder, in a process of its own that may not allocate much.

    Returns:
        What was wrong, a text each.
    """
    report = scratch / "report.jsonl"
    child = os.fork()
    if child == 0:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("a hang")))
        logging.disable()
        status = 1
        try:
            for label, change, outcome in changes:
                model = scratch / "model"
                shutil.rmtree(model, ignore_errors=True)
                shutil.copytree(folder, model)
                change(model)
                with report.open("a") as file:
                    file.write(json.dumps([label, "the process ended"]) + "\n")
                    signal.alarm(SECONDS)
                    found = attempt(model, outcome)
                    signal.alarm(0)
                    file.write(json.dumps([label, found]) + "\n")
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    last = dict(json.loads(line) for line in report.read_text().splitlines())
    wrong = [f"{label}: {found}" for label, found in last.items() if found is not None]
    return wrong if status == 0 else [*wrong, f"the process ended with {status}"]
