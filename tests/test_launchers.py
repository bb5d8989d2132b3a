"""Every launcher starts every training script; launch_multigpu.sh ends well in every way."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, free_port, read_metrics, run_main, run_script, started

import common

SIZES = {"vocab_size": 257, "context_length": 64, "emb_dim": 32, "n_heads": 2, "n_layers": 2,
         "drop_rate": 0.0, "qkv_bias": False}
LESSON = "02_opt_multi_gpu_ddp.py"
STEPS = ["--max_steps=4", "--device=cpu", "--log_every=1"]
FLAGS = {
    LESSON: ["--preset=tiny", "--text_file=text.txt", *(f"--{k}={v}" for k, v in SIZES.items())],
    "03_distill_student.py": ["--student_model=model", "--dataset_path=chats.jsonl"],
    "04_classify_accelerate.py": ["--model=model", "--train_file=labels.jsonl"],
    "05_sft_multigpu.py": ["--model=model", "--dataset=chats.jsonl"],
    "06_algorithm_distillation.py": ["--preset=cpu", "--n_streams=2", "--n_source_episodes=4",
                                     "--tf_n_embd=16", "--n_transit=40", "--n_episodes=2",
                                     "--n_rollouts=1", "--train_batch_size=2"],
}
SCRIPTS = [script for script in FLAGS if (ROOT / script).exists()]
ONE, TWO = ["torchrun", "config", "sh"], ["two torchrun", "two sh"]  # machines
# `pytest -m slow` takes all other pairs. By default the tests of each lesson start it by torchrun,
# those of 04 with the yaml file, and 02 is below under launch_multigpu.sh.
QUICK = {("two sh", "03_distill_student.py"), ("two torchrun", "04_classify_accelerate.py"),
         ("sh", "05_sft_multigpu.py")}

@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A folder with a model and data for every script."""
    folder = tmp_path_factory.mktemp("kit")
    torch.manual_seed(0)
    (folder / "model").mkdir()
    common.save_hugging_face(common.GPTModel(SIZES), common.load_encoding("bytes"),
                             folder / "model")
    trees = ["ash", "birch", "cedar", "elm", "fir", "hazel"] * 20
    chats = [{"messages": [{"role": "user", "content": f"Tree {i}?"},
                           {"role": "assistant", "content": tree}]} for i, tree in enumerate(trees)]
    labels = [{"text": f"{tree} {i}", "label": tree} for i, tree in enumerate(trees)]
    for name, rows in (("chats", chats), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text(" ".join(f"{tree} {i}." for i, tree in enumerate(trees * 4)))
    return folder

@pytest.fixture
def folder(kit, tmp_path):
    return shutil.copytree(kit, tmp_path / "a run")  # the blank is part of the test

@contextmanager
def two_machines(folder, script, *flags, launcher):
    """Two Runs that know of each other only through MASTER_ADDR and MASTER_PORT."""
    launch = dict(launcher={"two torchrun": "node", "two sh": "sh"}[launcher], NPROC="1",
                  NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with (started(folder, script, *flags, **launch, NODE_RANK="0") as first,
          started(folder, script, *flags, **launch, NODE_RANK="1") as second):
        yield first, second

# --- Every launcher runs every script -------------------------------------------------------------

@pytest.mark.parametrize(("launcher", "script"), [
    pytest.param(launcher, script, marks=() if (launcher, script) in QUICK else pytest.mark.slow)
    for launcher in ONE + TWO for script in SCRIPTS])
def test_launcher_runs_script_on_two_processes(launcher, script, folder):
    flags = [*FLAGS[script], *STEPS]
    if launcher in ONE:
        runs = [run_script(folder, script, *flags, launcher=launcher, nproc=2, NPROC="2")]
    else:
        with two_machines(folder, script, *flags, launcher=launcher) as runs:
            codes = [run.process.wait(120) for run in runs]
        assert codes == [0, 0], runs[0].stderr + runs[1].stderr
    assert re.search(r"\b2 processes|processes: 2", "".join(run.stdout for run in runs))
    assert max(record["step"] for record in read_metrics(folder)) == 4

# --- launch_multigpu.sh ---------------------------------------------------------------------------

def test_it_recovers_from_a_lost_worker_and_stops_for_signals_without_orphans(kit, tmp_path):
    flags = [*FLAGS[LESSON], "--device=cpu", "--precision=fp32", "--max_steps=120", "--log_every=1",
             "--eval_every=120", "--save_every=5", "--learning_rate=1e-4"]
    split = "--batch_size=1", "--gradient_accumulation_steps=16"
    shutil.copytree(kit, whole := tmp_path / "whole")
    assert run_main(whole, LESSON, *flags, "--batch_size=32", "--gradient_accumulation_steps=1",
                    f"--output_dir={whole / 'gpt_output'}") == 0

    def stop(run, step, *signals):
        run.wait_for_step(step)
        family = run.process.children(recursive=True)
        assert len(family) >= 2
        for number in signals:
            run.process.send_signal(number)
        assert run.process.wait(60) == 143, run.stderr
        assert re.search(r"^stopped by a signal after step \d+; --resume goes on", run.stdout, re.M)
        assert "Traceback" not in run.stderr.rpartition("GLHF")[2]  # of the worker that lost a peer
        assert not any(process.is_running() for process in family)

    shutil.copytree(kit, folder := tmp_path / "run")
    with started(folder, LESSON, *flags, *split, launcher="sh", NPROC="2", MAX_RESTARTS="2") as run:
        run.wait_for_step(10)
        run.process.children()[1].kill()
        stop(run, 40, signal.SIGUSR1)
    assert re.search(r"^resumed from step \d+", run.stdout, re.M)
    with started(folder, LESSON, *flags, *split, "--resume", launcher="sh", NPROC="2") as run:
        stop(run, 60, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    own, expected = (
        {record["step"]: record["train_loss"] for record in read_metrics(path)[1:]}
        for path in (folder, whole))
    assert list(own) == [*range(1, len(own) + 1)] and own == pytest.approx(
        {step: expected[step] for step in own}, rel=1e-4)

@pytest.mark.slow
@pytest.mark.parametrize(("event", "codes"), [
    ("signal", [143, 143]), ("worker killed", [1, 137]), ("machine lost", [1, -9])])
def test_what_happens_to_one_machine_does_not_leave_the_other_waiting(event, codes, folder):
    flags = [*FLAGS[LESSON], "--device=cpu", "--max_steps=10000", "--log_every=1"]
    with two_machines(folder, LESSON, *flags, launcher="two sh") as runs:
        runs[0].wait_for_step(5)
        worker, = runs[1].process.children()
        if event == "signal":
            runs[1].process.terminate()
        else:
            for process in [runs[1].process, worker][event == "worker killed":]:
                process.kill()
        assert [run.process.wait(60) for run in runs] == codes
    assert (event == "signal") == ("stopped by a signal after step" in runs[0].stdout)

@pytest.fixture
def busy_port():
    with socket.create_server(("", 0)) as server:
        yield str(server.getsockname()[1])

@pytest.mark.parametrize(("env", "flags", "line"), [
    ("", ["nothing.py"], "nothing.py does not exist; a script that does is 02_"),
    ("NPROC=0", [], "NPROC=0 must be a whole number"),
    ("MAX_RESTARTS=often", [], "MAX_RESTARTS=often must be a whole number"),
    ("NNODES=2", [], "NNODES=2 needs MASTER_ADDR, a NODE_RANK below 2, and MAX_RESTARTS=0"),
    ("NNODES=2 MASTER_ADDR=host1 NODE_RANK=2", [], "NNODES=2 needs .* a NODE_RANK below 2"),
    ("NNODES=2 MASTER_ADDR=host1 NODE_RANK=0 MAX_RESTARTS=3", [], "NNODES=2 needs .*RESTARTS=0"),
    ("MASTER_PORT=port", [], ".*'localhost:port' must be an integer"),
    ("MASTER_PORT={busy}", [], ".*address already in use.* Is MASTER_PORT free"),
    ("NNODES=2 MASTER_ADDR=127.0.0.1 NODE_RANK=0 MASTER_PORT={busy}", [],
     ".*address already in use.* Is MASTER_PORT free"),
    ("NNODES=2 MASTER_ADDR=127.0.0.1 NODE_RANK=0 RDZV_TIMEOUT=2 MASTER_PORT={free}", [],
     ".*1/2 clients joined.*did all NNODES come"),
    ("NNODES=2 MASTER_ADDR=127.0.0.1 NODE_RANK=1 RDZV_TIMEOUT=2 MASTER_PORT={free}", [],
     ".*timed out.*127.0.0.1, .*did all NNODES come"),
    ("", [LESSON, "--preset=tiny", "--backend=nccl"], "--.*needs a GPU per process, here are 0"),
])
def test_bad_input_ends_in_one_line(env, flags, line, busy_port, tmp_path):
    env = dict(pair.split("=") for pair in env.format(busy=busy_port, free=free_port()).split())
    if "nccl" in "".join(flags) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    name, *more = flags or [LESSON]
    started_at = time.monotonic()
    run = run_script(tmp_path, name, *more, launcher="sh", check=False, **{"NPROC": "2"} | env)
    errors = [text for text in run.stderr.splitlines() if text.startswith("error:")]
    assert run.returncode == 1 and len({*errors}) == 1 and "Traceback" not in run.stderr
    assert re.match(f"error: {line}", errors[0]) and time.monotonic() - started_at < 60

def test_help_names_every_setting():
    text = (ROOT / "launch_multigpu.sh").read_text()
    shown = subprocess.run([ROOT / "launch_multigpu.sh", "--help"], check=True, text=True,
                           capture_output=True).stdout
    settings = {*re.findall(r"\$\{([A-Z_]+):?[-=]", text)} - {"SLURM_NODEID"}
    assert len(settings) >= 8 and [name for name in settings if name not in shown] == []
    assert "#" not in shown[0] and "--resume" in shown

@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("path", ["launch_multigpu.sh", "multi_gpu_train.slurm",
                                  "tests/start_slurm.sh"])
def test_shellcheck_finds_nothing(path):
    assert subprocess.run(["shellcheck", ROOT / path]).returncode == 0
