"""What all tests of faults share: small material, one table of scripts, and ways to run them."""

import atexit
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import run_main, started

import common

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
# 24 steps: a checkpoint after every third, an evaluation after every fourth.
STEPS = ["--device=cpu", "--log_every=1", "--eval_every=4", "--save_every=3", "--max_steps=24",
         "--warmup_steps=2", "--output_dir=out", "--gradient_accumulation_steps=2"]
SCRIPTS = {
    "02": "02_opt_multi_gpu_ddp.py --preset=tiny --text_file=text.txt --context_length=32"
          " --emb_dim=32 --n_heads=2 --n_layers=2 --batch_size=2 --drop_rate=0.1 --precision=fp32",
    "03": "03_distill_student.py --dataset_path=chats.jsonl --student_model=model --batch_size=4"
          " --max_answers=8 --learning_rate=0.003 --precision=fp32",
    "04": "04_classify_accelerate.py --model=model --train_file=rows.jsonl --test_file=rows.jsonl"
          " --batch_size=4 --learning_rate=0.003 --precision=fp32",
    "05": "05_sft_multigpu.py --dataset=chats.jsonl --model=model --batch_size=4 --packing"
          " --max_answers=8 --max_new_tokens=16 --learning_rate=0.003 --precision=fp32",
    "06": "06_algorithm_distillation.py --preset=cpu --n_streams=4 --n_source_episodes=12"
          " --tf_n_embd=16 --tf_n_layer=2 --n_transit=40 --n_episodes=4 --n_rollouts=2"
          " --train_batch_size=2"}
NO_EVAL_EVERY = {"03"}  # judged at each epoch's end
QUICK_02 = ["02", *(pytest.param(script, marks=SLOW) for script in SCRIPTS if script != "02")]
MARK = "FAULTS_RUN"  # in the environment of every process of one run, whoever started it

def make_material(folder):
    """A text, chats, rows with labels, and a GPT with random weights that 03 and 04 tune."""
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(
        "A class is a set of names; statements are evaluated in order. " * 80)
    colours = ["red", "green", "blue"]
    chats = ({"prompt": f"Number {i}?", "response": colours[i % 3] + "!" * (i % 5)}
             for i in range(60))
    rows = ({"text": f"{i} is {colours[i % 3]}", "label": colours[i % 3]} for i in range(60))
    for name, lines in (("chats", chats), ("rows", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "model").mkdir()
    torch.manual_seed(0)
    model = common.GPTModel({"vocab_size": 257, "context_length": 64, "emb_dim": 32, "n_heads": 2,
                             "n_layers": 2, "drop_rate": 0.1, "qkv_bias": True})
    common.save_hugging_face(model, common.load_encoding("bytes"), folder / "model")

def command(script):
    """(file name, flags) of a row of the table."""
    name, *flags = SCRIPTS[script].split()
    return name, [*flags, *(x for x in STEPS if script not in NO_EVAL_EVERY or "eval" not in x)]

@contextmanager
def launched(folder, script, *flags, launcher="torchrun", **env):
    """A Run of two processes, or of one by launcher="python", with a mark on all of them. None of
    them outlives the block."""
    name, given = command(script)
    env = {MARK: uuid.uuid4().hex, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | env
    with started(folder, name, *given, *flags, launcher=launcher, nproc=2, **env) as run:
        run.mark = env[MARK]
        try:
            yield run
        finally:
            kill_all(run.mark)

def train_here(folder, script, *flags):
    """One process, this one. Returns its exit code: 0 or the error line."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    name, given = command(script)
    return run_main(folder, name, *given, f"--output_dir={folder / 'out'}", *flags)

@functools.cache
def finished(script):
    """The folder of an undisturbed run of one process."""
    root = tempfile.TemporaryDirectory(prefix="faults_")
    atexit.register(root.cleanup)
    make_material(folder := Path(root.name) / "run")
    assert train_here(folder, script) == 0
    return folder

def fresh(script, folder):
    """A copy of that run's material, without its results."""
    return shutil.copytree(finished(script), folder, ignore=lambda *_: ["out"])

def run_as_root(*words):
    """A command of the system; the test is skipped, visibly, where it is not there or forbidden."""
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not installed")
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"not permitted here: {' '.join(map(str, words))}: {result.stderr}")

def marked(mark):
    """All processes of a run that are alive."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != "zombie":
                found.append(process)
    return found

def kill_all(mark):
    """kill -9 until there is none: torchrun may just be starting another one."""
    while left := marked(mark):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()

def none_left(run, seconds=10):
    """True as soon as no process of the run is alive."""
    end = time.monotonic() + seconds
    while marked(run.mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True

def workers(run, script):
    """The processes that torchrun or the launcher has started, by rank."""
    found = []
    with suppress(psutil.Error):
        for process in run.process.children():
            with suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank and SCRIPTS[script].split()[0] in process.cmdline():
                    found.append((int(rank), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]

def outcome(folder):
    """What must be the same after every fault: the log but for speeds, and the weights."""
    log = [{key: x for key, x in json.loads(line).items() if not key.endswith("per_second")}
           for line in (folder / "out/metrics.jsonl").open()]
    weights = (folder / "out/final_model/model.safetensors").read_bytes()
    return log, weights
