"""Checkpoints that are damaged, foreign or hostile; a full disk; a folder that became read-only."""

import hashlib
import importlib
import json
import math
import random
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import harness
import pytest
import torch
from harness import SCRIPTS, SLOW, command, finished, fresh, launched, outcome, train_here

def lesson_of(script):
    return importlib.import_module(command(script)[0].removesuffix(".py"))

def checkpoint_files(folder, script, which="checkpoint"):
    path = folder / "out" / (f"{which}.pt" if script != "04" else which)
    return [*path.iterdir()] if path.is_dir() else [path]

class Intruder:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)

def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])

def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)

def empty(path, rng):
    path.write_bytes(b"")

def foreign(path, rng):
    torch.save(rng.choice([{"weight": torch.ones(3)}, [1, 2], torch.ones(2), "text"]), path)

def code(path, rng):
    torch.save({"progress": {"step": 24}, "identity": {}, "model": Intruder()}, path)

def zeros(path, rng):
    """As a file system may leave it after a loss of power."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)

@pytest.mark.parametrize("script", harness.QUICK_02)
def test_damaged_checkpoints_are_never_used_nor_executed(script, tmp_path, capfd):
    """Whatever is done to the newest checkpoint, the run ends in the same bits; with both damaged,
    it says so in one line."""
    for number, damage in enumerate([cut, flip, empty, foreign, code, zeros]):
        seed = random.randrange(10**6)
        print("damage", damage.__name__, "seed", seed)
        rng, folder = random.Random(seed), tmp_path / str(number)
        shutil.copytree(finished(script), folder)
        if script == "04":  # final_model has the best weights; without its card, it is unfinished
            (folder / "out/final_model/README.md").unlink()
        else:
            shutil.rmtree(folder / "out/final_model")
        path = rng.choice(checkpoint_files(folder, script))
        before = path.read_bytes()
        damage(path, rng)
        harmless = path.read_bytes() == before or damage in (flip, zeros)  # between its parts
        capfd.readouterr()
        assert train_here(folder, script, "--resume") == 0
        err = capfd.readouterr().err
        assert "damaged and not used" in err or harmless
        assert outcome(folder) == outcome(finished(script))
        for which in ("checkpoint", "checkpoint.previous"):
            for path in checkpoint_files(folder, script, which):
                code(path, rng)
        error = train_here(folder, script, "--resume")
        assert re.match("error: .*checkpoint.* cannot be read; --overwrite", error)
        assert not [*folder.rglob("executed")] and not Path("executed").exists()

@SLOW
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "model.safetensors"])
def test_code_with_the_right_checksum_is_not_executed_either(name, tmp_path):
    folder = shutil.copytree(finished("04"), tmp_path / "run")
    path, progress = folder / "out/checkpoint" / name, folder / "out/checkpoint/progress.json"
    code(path, random)
    state = json.loads(progress.read_text())
    state["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    progress.write_text(json.dumps(state))
    result = train_here(folder, "04", "--resume")
    assert result == 0 or re.match("error: .*checkpoint is no checkpoint of this lesson", result)
    assert not [*folder.rglob("executed")] and not Path("executed").exists()

@pytest.mark.parametrize(("script", "other"), [
    ("02", "06"), pytest.param("03", "02", marks=SLOW), pytest.param("06", "03", marks=SLOW)])
def test_the_checkpoint_of_another_lesson_is_refused(script, other, tmp_path):
    folder = shutil.copytree(finished(script), tmp_path / "run")
    shutil.copy(finished(other) / "out/checkpoint.pt", folder / "out")
    error = train_here(folder, script, "--resume")
    assert re.match("error: checkpoint.pt is of a run with ", error)

@pytest.mark.parametrize("script", SCRIPTS)
def test_the_log_of_a_skipped_fp16_step_is_json_and_can_be_plotted(script, tmp_path):
    log = lesson_of(script).MetricsLog(tmp_path, -1)
    for step, number in enumerate([1.5, math.nan, math.inf, 1.0]):
        log.write({"step": step, "train_loss": number, "grad_norm": number})
    forbid = lambda name: pytest.fail(f"{name} is no JSON")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=forbid)["train_loss"] for line in lines]
    assert losses == [1.5, None, None, 1.0]
    if script != "06":
        figure = lesson_of(script).plot_metrics(tmp_path, ["train_loss"], "").figure
        figure.savefig(tmp_path / "loss.png")

@contextmanager
def small_disk(path, kib):
    path.mkdir()
    harness.run_as_root("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", path)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)

def assert_clean_stop(run, folder, script, capfd):
    """One error line, and no checkpoint that could not be used."""
    name = command(script)[0]
    assert run.returncode == 1 and f'{name}", line' not in run.stderr, run.stderr[-3000:]
    assert re.search(r"^error: .*(space left|is there space)", run.stderr, re.M | re.I)
    print(run.stderr.splitlines()[-1])
    assert not [*folder.glob("out/*.unfinished")]
    capfd.readouterr()
    if script == "04":
        lesson_of(script).find_state(folder / "out")
    else:
        lesson_of(script).load_checkpoint(*folder.glob("out/checkpoint*.pt"))
    assert "damaged" not in capfd.readouterr().err

@pytest.mark.parametrize("trial", [0, *(pytest.param(i, marks=SLOW) for i in range(1, 10))])
@pytest.mark.parametrize("script", harness.QUICK_02)
def test_a_full_disk_costs_nothing_but_a_start(script, trial, tmp_path, capfd):
    """It becomes full at a random moment; with more space, the run goes on and ends the same."""
    sizes = [path.stat().st_size for path in (finished(script) / "out").rglob("*")]
    kib = random.randrange(sum(sizes) // 10, sum(sizes)) // 1024
    print("disk of", kib, "of", sum(sizes) // 1024, "KiB")
    folder = fresh(script, tmp_path / "run")
    with small_disk(folder / "out", kib):
        with launched(folder, script, launcher="python") as run:
            run.process.wait(120)
        if run.returncode:  # else it did fit: files are sparse, or the peak was lower
            assert_clean_stop(run, folder, script, capfd)
            harness.run_as_root("mount", "-o", "remount,size=64m", folder / "out")
            assert train_here(folder, script, "--resume") == 0
        assert outcome(folder) == outcome(finished(script))

@SLOW
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_becomes_read_only_costs_nothing_but_a_start(
        script, tmp_path, capfd):
    step = random.randrange(1, 24)
    print("read-only after step", step)
    folder = fresh(script, tmp_path / "run")
    with launched(folder, script, launcher="python") as run:
        run.wait_for_step(step)
        harness.run_as_root("chattr", "+i", folder / "out")
        try:
            run.process.wait(120)
            assert train_here(folder, script, "--resume").startswith("error: ")
        finally:
            subprocess.run(["chattr", "-i", folder / "out"], check=True)
    assert_clean_stop(run, folder, script, capfd)
    assert train_here(folder, script, "--resume") == 0
    assert outcome(folder) == outcome(finished(script))
