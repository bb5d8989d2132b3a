"""multi_gpu_train.slurm on a real Slurm: two nodes that start_slurm.sh starts on this machine."""

import os
import re
import shutil
import subprocess
import time

import pytest
from conftest import ROOT, free_port, read_metrics, started
from safetensors.torch import load_file

MISSING = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd wants to be started by root")]
LESSON = "02_opt_multi_gpu_ddp.py"
FLAGS = ["--preset=tiny", "--text_file", "my text.txt", "--device=cpu", "--context_length=64",
         "--emb_dim=32", "--n_heads=2", "--n_layers=2", "--batch_size=1", "--log_every=1",
         "--eval_every=1000", "--gradient_accumulation_steps=32"]
RESOURCES = "--gpus-per-node=1", "--cpus-per-task=1"  # here GPUs are names only

@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function that runs a command of Slurm and returns its output."""
    folder = tmp_path_factory.mktemp("slurm")
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "NPROC": "1"}
    daemons = subprocess.Popen([ROOT / "tests/start_slurm.sh", folder, str(free_port())],
                               stdout=subprocess.PIPE, text=True)
    try:
        assert "ready\n" in iter(daemons.stdout.readline, ""), "see the logs in the folder"
        yield lambda *command, cwd=folder: subprocess.run(
            command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT).stdout
    finally:
        daemons.terminate()
        daemons.wait(30)

@pytest.fixture
def folder(tmp_path):
    for name in (LESSON, "common.py", "launch_multigpu.sh", "multi_gpu_train.slurm"):
        shutil.copy(ROOT / name, tmp_path)
    words = "\n".join(f"line {i} of a text of some words" for i in range(300))
    (tmp_path / "my text.txt").write_text(words)
    return tmp_path

def submit(slurm, folder, *arguments):
    return re.search(r"batch job (\d+)", slurm("sbatch", *arguments, cwd=folder))[1]

def wait_for(slurm, job, pattern, timeout):
    """Until `scontrol show job`, or the log of the job, shows the pattern."""
    end = time.monotonic() + timeout
    while True:
        shown = slurm("scontrol", "show", "job", job)
        log = "".join(open(path).read() for path in re.findall(r"StdOut=(.+)", shown)
                      if os.path.exists(path))
        if found := re.search(pattern, shown + log, re.M):
            return found
        assert time.monotonic() < end, f"no {pattern} in {timeout} s:\n{shown}\n{log[-3000:]}"
        time.sleep(0.3)

def test_tasks_without_torchrun_end_in_a_line_that_names_the_batch_script(slurm, folder):
    output = slurm("srun", "--nodes=1", "--ntasks=2", "python", LESSON, *FLAGS, cwd=folder)
    errors = [line for line in output.splitlines() if line.startswith("error: SLURM_NTASKS")]
    assert len(errors) == 2 and len({*errors}) == 1 and "multi_gpu_train.slurm" in errors[0]
    assert re.search("tasks? 0.*: Exited with exit code 1", output) and "Traceback" not in output

@pytest.mark.slow
def test_a_job_stops_before_its_time_is_over_comes_back_and_ends_as_if_undisturbed(slurm, folder):
    steps = "--max_steps=400"  # more than the first minute has time for
    shutil.copytree(folder, whole := folder / "whole")
    with started(whole, LESSON, *FLAGS, steps, launcher="sh", NPROC="2") as undisturbed:
        job = submit(slurm, folder, "--nodes=2", "--time=1", "--signal=TERM@30", *RESOURCES,
                     "multi_gpu_train.slurm", LESSON, *FLAGS, steps, "--overwrite")
        wait_for(slurm, job, r"^stopped by a signal after step \d+; --resume goes on", 120)
        wait_for(slurm, job, "JobState=PENDING", 60)
        # Slurm lets a job wait for two minutes when it comes back; not here.
        slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30", "StartTime=now")
        wait_for(slurm, job, r"^resumed from step [1-9]", 120)
        wait_for(slurm, job, "JobState=COMPLETED", 300)
        assert wait_for(slurm, job, r"Restarts=(\d+)", 1)[1] != "0"
        assert undisturbed.process.wait(300) == 0
    own, expected = (load_file(path / "gpt_output/final_model/model.safetensors")
                     for path in (folder, whole))
    assert own.keys() == expected.keys() and all((own[k] == expected[k]).all() for k in own)
    losses = [[(record["step"], record.get("train_loss")) for record in read_metrics(path)]
              for path in (folder, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 401

@pytest.mark.slow
def test_a_cancelled_job_does_not_come_back(slurm, folder):
    job = submit(slurm, folder, *RESOURCES, "multi_gpu_train.slurm", LESSON, *FLAGS,
                 "--max_steps=100000")
    wait_for(slurm, job, r"^step 5 ", 60)
    slurm("scancel", job)
    wait_for(slurm, job, "^stopped by a signal", 60)
    wait_for(slurm, job, "JobState=CANCELLED", 60)
    time.sleep(5)
    assert slurm("squeue", "--noheader") == ""

@pytest.mark.slow
def test_a_script_that_fails_is_not_started_again(slurm, folder):
    job = submit(slurm, folder, *RESOURCES, "--nodes=2", "multi_gpu_train.slurm", LESSON,
                 "--batch_size=0")
    wait_for(slurm, job, "JobState=FAILED", 60)
    assert wait_for(slurm, job, "^error: --batch_size=0 must lie between", 1)
