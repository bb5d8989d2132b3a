"""Runs that lose a process, the network, or their numbers; runs that meet another run."""

import random
import re
import shutil
import subprocess
import time

import harness
import kill
import pytest
import torch
import torch.nn.functional as F
from conftest import LAUNCHERS
from harness import SCRIPTS, SLOW, finished, fresh, launched, make_material, outcome, train_here

LAUNCHERS |= {host: f"ip netns exec faults_{host} bash launch_multigpu.sh" for host in "ab"}
LOST = r"^error: rank {} waited in \w+ for a process that is gone, stalls or cannot be reached"

def test_a_run_that_is_hit_at_a_random_moment_ends_the_same(tmp_path):
    counts, _ = kill.trials(random.choice([*SCRIPTS]), tmp_path, 1, random.randrange(10**6))
    assert counts["ended the same"] == 1, counts

@SLOW
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_command_twice_gives_the_same_bits(script, tmp_path):
    make_material(tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    first, second = (kill.Reference(tmp_path / name, script).outcome for name in "12")
    assert first == second

@SLOW
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rank_that_stalls_is_given_up_after_the_timeout(script, rank, tmp_path):
    """torchrun gives a process 30 seconds after SIGTERM, which a stopped one does not hear."""
    make_material(tmp_path / "run")
    with launched(tmp_path / "run", script, "--timeout_seconds=10") as run:
        run.wait_for_step(random.randrange(20))
        harness.workers(run, script)[rank].suspend()
        began = time.monotonic()
        while len(harness.workers(run, script)) == 2:
            assert time.monotonic() < began + 30
            time.sleep(0.1)
        run.process.wait(60)
        assert harness.none_left(run)
        assert re.search(LOST.format(1 - rank), run.stderr, re.M), run.stderr

@SLOW
def test_a_starter_of_03_ends_when_a_process_stalls(tmp_path):
    make_material(tmp_path / "run")
    with launched(tmp_path / "run", "03", "--timeout_seconds=10", "--num_processes=2",
                  launcher="python") as run:
        run.wait_for_step(5)
        victim = next(x for x in run.process.children() if "spawn_main" in " ".join(x.cmdline()))
        victim.suspend()
        run.process.wait(90)
        assert harness.none_left(run) and re.search(LOST.format("[01]"), run.stderr, re.M)

@pytest.fixture
def two_hosts():
    """Two network namespaces, a and b, with a cable between them. Linux's settings are its own: for
    about 15 minutes it sends again what nobody answers, before it gives a connection up."""
    run = harness.run_as_root
    try:
        for name in "ab":
            run("ip", "netns", "add", f"faults_{name}")
            run("ip", "-n", f"faults_{name}", "link", "set", "lo", "up")
        run("ip", "link", "add", "faults_a", "netns", "faults_a", "type", "veth", "peer",
            "name", "faults_b", "netns", "faults_b")
        for name, address in (("a", "10.77.0.1/24"), ("b", "10.77.0.2/24")):
            host = "ip", "-n", f"faults_{name}"
            run(*host, "addr", "add", address, "dev", f"faults_{name}")
            run(*host, "link", "set", f"faults_{name}", "up")
        yield
    finally:
        for name in "ab":
            subprocess.run(["ip", "netns", "del", f"faults_{name}"], check=False)

@SLOW
@pytest.mark.parametrize("moment", ["joining", "training"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_cut_network_ends_every_process_on_both_hosts(script, moment, two_hosts, tmp_path):
    make_material(folder := tmp_path / "run")
    def on(host, rank):
        return launched(folder, script, "--max_steps=5000", "--timeout_seconds=10", launcher=host,
                        NPROC="1", NNODES="2", NODE_RANK=rank, MASTER_ADDR="10.77.0.1",
                        GLOO_SOCKET_IFNAME=f"faults_{host}")
    with on("a", "0") as a, on("b", "1") as b:
        if moment == "training":
            b.wait_for_step(random.randrange(20))
        else:  # a's process is late; of b, first the launcher connects, then its process
            while not (late := harness.workers(a, script)):
                assert a.process.poll() is None, a.stderr
            late[0].suspend()
            connections = "ip", "netns", "exec", "faults_b", "ss", "-Htn", "dport", "= :29500"
            while len(subprocess.check_output(connections).splitlines()) < 2:
                assert b.process.poll() is None, b.stderr
                time.sleep(0.05)
            time.sleep(1)
        end, seconds, began = random.choice("ab"), {}, time.monotonic()
        subprocess.run(["ip", "-n", f"faults_{end}", "link", "set", f"faults_{end}", "down"],
                       check=True)
        if moment == "joining":
            late[0].resume()
        while len(seconds) < 2 and time.monotonic() < began + 90:
            for host, run in (("a", a), ("b", b)):
                if host not in seconds and not harness.marked(run.mark):
                    seconds[host] = round(time.monotonic() - began, 1)
            time.sleep(0.1)
        print(f"seconds from the cut at {end} until the last process of a host was gone: {seconds}")
        assert len(seconds) == 2 and a.process.wait(1) and b.process.wait(1)
        line = LOST.format("[01]") if moment == "training" else rf"{LOST.format('[01]')}|^Timeout "
        assert all(re.search(line, run.stderr, re.M) for run in (a, b)), a.stderr + b.stderr

@pytest.mark.parametrize("script", harness.QUICK_02)
@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_and_spoil_nothing(
        where, number, script, tmp_path, monkeypatch):
    step, seen = random.randrange(4, 24), []
    clip, cross_entropy = torch.nn.utils.clip_grad_norm_, F.cross_entropy
    def spoiled_clip(parameters, *arguments, **options):
        seen.append(parameters := [*parameters])
        if where == "gradient" and len(seen) == step:
            random.choice(parameters).grad.view(-1)[0] = float(number)
        return clip(parameters, *arguments, **options)
    def spoiled_loss(*arguments, **options):
        loss = cross_entropy(*arguments, **options)
        hit = where == "loss" and len(seen) == step - 1 and torch.is_grad_enabled()
        return loss * float(number) if hit else loss
    folder = fresh(script, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled_clip)
        patch.setattr(F, "cross_entropy", spoiled_loss)
        error = train_here(folder, script)
    told = re.match(rf"error: step {step}: .*\b(nan|inf)\b.* of step (\d+)\b", error)
    assert told and step - 3 <= int(told[2]) < step, error  # every third; 03 also ends an epoch so
    assert train_here(folder, script, "--resume") == 0
    assert outcome(folder) == outcome(finished(script))

@SLOW
@pytest.mark.parametrize("script", SCRIPTS)
def test_of_two_runs_on_one_folder_one_is_refused(script, tmp_path):
    folder, other = (fresh(script, tmp_path / name) for name in "12")
    one = launched(folder, script, launcher="python")
    two = launched(other, script, "--output_dir=../1/out", launcher="python")
    with one as first, two as second:
        codes = {run.process.wait(120) for run in (first, second)}
    assert codes == {0, 1} and "out is in use by another run" in first.stderr + second.stderr
    assert outcome(folder) == outcome(finished(script))

@SLOW
def test_runs_that_share_the_histories_of_06_may_start_together(tmp_path):
    folders = [fresh("06", tmp_path / name) for name in "12"]
    one, two = (launched(folder, "06", f"--cache_dir={tmp_path / 'cache'}", launcher="python")
                for folder in folders)
    with one as first, two as second:
        assert [run.process.wait(120) for run in (first, second)] == [0, 0], second.stderr
    assert all(outcome(folder) == outcome(finished("06")) for folder in folders)
