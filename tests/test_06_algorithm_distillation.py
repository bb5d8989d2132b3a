"""Lesson 06 by its command line. A run of one process that no signal is to hit stays in this one,
which saves the 5 seconds that a start takes."""

import importlib
import itertools
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import read_metrics, run_main, run_script, started
from matplotlib.image import imread
from safetensors.torch import load_file

NAME = "06_algorithm_distillation.py"
SIZES = ["--tf_n_embd=16", "--tf_n_layer=2", "--tf_n_head=2", "--n_transit=40"]
SMALL = ["--preset=cpu", "--device=cpu", "--n_streams=4", "--n_source_episodes=12", *SIZES,
         "--n_episodes=4", "--n_rollouts=2", "--max_steps=20", "--warmup_steps=2", "--log_every=1",
         "--eval_every=10", "--save_every=5"]
# A minute of one core: half the context of --preset cpu, a fifth of the steps.
SHORT = ["--preset=cpu", "--device=cpu", "--n_transit=100", "--max_steps=240", "--warmup_steps=30",
         "--n_streams=50", "--n_source_episodes=40", "--eval_every=240", "--n_rollouts=2",
         "--n_episodes=40"]
PUBLIC_8 = [[4, 2], [5, 6], [6, 8], [7, 2], [3, 6], [0, 5], [5, 8], [5, 4]]

def split(batch_size, accumulation):
    return [f"--train_batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]

ALONE = split(1, 8)  # the reference: its steps are the slowest, so that a signal can hit them

def new_folder(path, outputs_of=None):
    path.mkdir()
    if outputs_of:
        shutil.copytree(outputs_of / "ad_output", path / "ad_output")
    return path

def train_here(folder, *flags):
    """Returns the exit code, or the line with the error."""
    # TensorBoard's thread may still write when the test has left the folder, so name it in full.
    return run_main(folder, NAME, *SMALL, f"--output_dir={folder / 'ad_output'}", *flags)

def weights(folder):
    return load_file(folder / "ad_output/final_model/model.safetensors")

def results(folder):
    return json.loads((folder / "ad_output/results.json").read_text())

def assert_same(folder, reference, rel=1e-5):
    """The same steps, losses, learning rates, returns and weights; rel=0: to the last bit."""
    keys = {"step", "epoch", "tokens_seen", "train_loss", "val_return", "learning_rate"}
    for own, expected in zip(read_metrics(folder), read_metrics(reference), strict=True):
        expected = {key: expected[key] for key in keys & expected.keys()}
        assert {key: own[key] for key in keys & own.keys()} == pytest.approx(expected, rel, abs=0)
    own, expected = weights(folder), weights(reference)
    for name in expected:
        torch.testing.assert_close(own[name], expected[name], rtol=0, atol=rel, msg=name)
    assert results(folder) == results(reference)

@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run that learns, beside the other tests."""
    with started(tmp_path_factory.mktemp("short"), NAME, *SHORT) as run:
        yield run

@pytest.fixture(scope="module")
def runs(tmp_path_factory, short):
    """At a time, to save time: undisturbed, on two processes, ended at a random step."""
    root, step = tmp_path_factory.mktemp("runs"), random.randint(6, 14)
    print("SIGKILL at step", step)
    with (started(root / "1", NAME, *SMALL, *ALONE) as whole,
          started(root / "2", NAME, *SMALL, *split(2, 2), launcher="torchrun", nproc=2) as pair,
          started(root / "3", NAME, *SMALL, *ALONE) as killed):
        killed.wait_for_step(step)
        killed.kill()
        assert pair.process.wait(120) == 0, pair.stderr
        assert whole.process.wait(120) == 0, whole.stderr
    return SimpleNamespace(whole=whole, pair=pair, killed=killed)

@pytest.fixture(scope="module")
def lesson():
    return importlib.import_module("06_algorithm_distillation")

@pytest.fixture
def config(lesson, monkeypatch):
    monkeypatch.setattr("sys.argv", [NAME, *SMALL])
    return lesson.parse_config(lesson.Config, lesson.PRESETS)

@pytest.fixture
def histories(runs):
    path, = runs.whole.folder.glob("ad_output/histories_*.pt")
    return torch.load(path, weights_only=True)

# --- The mathematics does not depend on the launch ------------------------------------------------

def test_two_processes_with_accumulation_train_and_evaluate_as_one_does(runs):
    assert "= 8 windows, x 40 transitions = 320 tokens a step" in runs.whole.stdout
    assert "2 windows x 2 micro-batches x 2 processes = 8 windows" in runs.pair.stdout
    assert_same(runs.pair.folder, runs.whole.folder)

def test_one_large_batch_trains_as_many_small_ones(runs, tmp_path):
    folder = new_folder(tmp_path / "run")
    assert train_here(folder, *split(8, 1)) == 0
    assert_same(folder, runs.whole.folder)

@pytest.mark.slow
def test_accelerate_launch_trains_the_same(runs, tmp_path):
    run = run_script(tmp_path / "run", NAME, *SMALL, *split(4, 1), launcher="accelerate", nproc=2)
    assert "Distributed type: MULTI_CPU" in run.stdout
    assert_same(run.folder, runs.whole.folder)

def test_ranks_see_different_windows_which_together_are_the_global_batch(
        lesson, tmp_path, monkeypatch):
    numbers, batch = [], lesson.HistoryWindows.batch
    def record_numbers(windows, batch_numbers):
        numbers.append(batch_numbers.tolist())
        return batch(windows, batch_numbers)
    def numbers_of(world_size, rank, *flags):
        monkeypatch.setattr(lesson, "setup_distributed",
                            lambda *_: (rank, world_size, torch.device("cpu")))
        numbers.clear()
        flags = ["--max_steps=2", "--n_episodes=1", "--overwrite", *flags]
        assert train_here(tmp_path, f"--cache_dir={tmp_path}", *flags) == 0
        return list(numbers)
    # Processes without each other: nothing is exchanged, and there is no group to leave.
    monkeypatch.setattr(lesson, "dist", MagicMock(is_initialized=lambda: False))
    monkeypatch.setattr(lesson, "DDP", lambda model, *_, **options: model)
    monkeypatch.setattr(lesson.HistoryModel, "no_sync", nullcontext, raising=False)
    monkeypatch.setattr(lesson.HistoryWindows, "batch", record_numbers)
    whole, ranks = numbers_of(1, 0, *split(8, 1)), [numbers_of(2, r, *split(2, 2)) for r in (0, 1)]
    for step in range(2):
        parts = [ranks[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert [*itertools.chain(*parts)] == whole[step] and len(set(whole[step])) == 8
    assert whole[0] != whole[1]

def test_the_learning_rate_does_not_depend_on_the_number_of_processes(runs):
    alone, pair = ([record["learning_rate"] for record in read_metrics(run.folder)]
                   for run in (runs.whole, runs.pair))
    assert alone == pair and len(alone) == 20
    assert alone[:2] == [0.0015, 0.003] and alone[-1] < 1e-9
    assert all(a > b for a, b in itertools.pairwise(alone[1:]))

# --- Restarts -------------------------------------------------------------------------------------

def test_a_killed_run_resumes_to_the_same_bits(runs, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", runs.killed.folder)
    assert train_here(folder, *ALONE, "--resume") == 0
    assert re.search(r"^resumed from step (5|10|15|20)\b", capfd.readouterr().out, re.M)
    assert_same(folder, runs.whole.folder, rel=0)

def test_two_processes_go_on_with_the_run_of_one(runs, tmp_path):
    folder = new_folder(tmp_path / "run", runs.killed.folder)
    flags = [*SMALL, *split(4, 1), "--resume"]
    run_script(folder, NAME, *flags, launcher="torchrun", nproc=2)
    assert_same(folder, runs.whole.folder)

def test_sigterm_ends_with_a_checkpoint_and_the_folder_is_locked_until_then(runs, tmp_path, capfd):
    folder = new_folder(tmp_path / "run")
    with started(folder, NAME, *SMALL, *ALONE) as run:
        run.wait_for_step(1)
        run.process.suspend()
        assert re.match("error: .*ad_output.* in use", train_here(folder, "--resume"))
        run.process.terminate()
        run.process.resume()
        assert run.process.wait(60) == 143
    step = run.metrics[-1]["step"]
    assert re.search(rf"signal.* step {step}\b.*--resume", run.stdout) and step < 20
    assert not (folder / "ad_output/final_model").exists()
    assert train_here(folder, *ALONE, "--resume") == 0
    assert f"resumed from step {step} " in capfd.readouterr().out
    assert_same(folder, runs.whole.folder, rel=0)

def test_ctrl_c_ends_the_last_rollouts_which_resume_repeats(runs, tmp_path):
    folder = new_folder(tmp_path / "run", runs.whole.folder)
    shutil.rmtree(folder / "ad_output/final_model")
    with started(folder, NAME, *SMALL, *ALONE, "--n_episodes=3000", "--resume") as run:
        while "resumed from step 20 " not in run.stdout:
            assert run.process.poll() is None
            time.sleep(0.01)
        time.sleep(1)
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(10) in (1, 143)
    assert re.search("^(error: interrupted|stopped by).*; --resume goes", run.stderr + run.stdout,
                     re.M)
    assert train_here(folder, *ALONE, "--resume") == 0
    assert_same(folder, runs.whole.folder, rel=0)

def test_a_finished_run_is_neither_changed_nor_overwritten_unasked(runs, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", runs.whole.folder)
    def contents():
        return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}
    before = contents()
    assert train_here(folder, *ALONE, "--resume") == 0
    assert "finished" in capfd.readouterr().out
    assert re.match("error: .*ad_output.*--resume.*--overwrite", train_here(folder, *ALONE))
    assert contents() == before
    shutil.rmtree(folder / "ad_output/final_model")  # to evaluate once more, in another way
    assert train_here(folder, *ALONE, "--resume", "--n_episodes=3") == 0
    assert len(results(folder)["held_out"]["return_per_episode"]) == 3
    assert read_metrics(folder) == runs.whole.metrics

def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(runs, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", runs.whole.folder)
    path = folder / "ad_output/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert train_here(folder, *ALONE, "--resume") == 0
    out, err = capfd.readouterr()
    assert re.search(r"checkpoint\.pt .*damaged", err) and "resumed from step 15 " in out
    assert_same(folder, runs.whole.folder, rel=0)

@pytest.mark.parametrize(("flags", "words"), [
    (["--tf_n_embd=32"], "tf_n_embd.*16"), (["--n_streams=5"], "n_streams.*4"),
    (split(1, 7), "global.batch.* 8")])
def test_a_checkpoint_of_another_configuration_is_refused(flags, words, runs, tmp_path):
    folder = new_folder(tmp_path / "run", runs.whole.folder)
    error = train_here(folder, *ALONE, *flags, "--resume")
    assert re.fullmatch(rf"error: .*checkpoint\.pt.*{words}.*", error)

def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_checkpoint(
        lesson, tmp_path, monkeypatch):
    forward, steps = lesson.HistoryModel.forward, []
    def forward_until_step_7(model, *arguments, **options):
        steps.extend([1] * model.training)
        return forward(model, *arguments, **options) * (math.nan if len(steps) == 7 else 1)
    monkeypatch.setattr(lesson.HistoryModel, "forward", forward_until_step_7)
    folder = new_folder(tmp_path / "run")
    assert re.match(r"error: step 7: .*nan.* step 5\b", train_here(folder, *split(8, 1)))
    checkpoint = torch.load(folder / "ad_output/checkpoint.pt", weights_only=True)
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())

# --- The room, the histories, the windows ---------------------------------------------------------

def test_the_room_gives_the_returns_that_can_be_counted_by_hand(lesson):
    right, left, up, down, stay = range(5)
    table = lesson.NEXT_STATE
    assert table[40].tolist() == [49, 31, 41, 39, 40]  # (5,4) (3,4) (4,5) (4,3) (4,4)
    assert (table[0, left], table[0, down], table[80, right], table[80, up]) == (0, 0, 80, 80)
    assert table[:, stay].tolist() == list(range(81))
    # Corner: 8 steps away, there from step 8 to 20. Neighbours of the centre: from step 1.
    assert lesson.OPTIMUM[[0, 80, 40, 41, 42]].tolist() == [13, 13, 20, 20, 19]
    assert lesson.RANDOM.sum().item() == pytest.approx(20)  # somewhere at every step
    rng, state, visits = np.random.default_rng(0), np.full(20000, 40), 0
    for _ in range(20):
        state = table.numpy()[state, rng.integers(5, size=20000)]
        visits += (state == 41).mean()
    assert lesson.RANDOM[41].item() == pytest.approx(visits, abs=0.05)

def test_the_goals_are_split_once_and_test_holds_those_of_the_public_implementation(lesson, config):
    train, val, test = lesson.split_goals(config)
    assert (len(train), len(val), len(test)) == (57, 8, 16)
    assert sorted(train + val + test) == list(range(81))
    assert [list(divmod(goal, 9)) for goal in test[-8:]] == PUBLIC_8
    assert lesson.split_goals(replace(config, seed=1)) == (train, val, test)
    assert lesson.split_goals(replace(config, split_seed=1)) != (train, val, test)

def test_every_window_is_a_piece_of_one_stream_of_one_training_goal(lesson, config, histories):
    train_goals, (states, outcomes) = lesson.split_goals(config)[0], (
        histories[key].long() for key in ("states", "outcomes"))
    windows = lesson.HistoryWindows(histories["states"], histories["outcomes"], 40)
    assert len(windows) == 57 * 4 * 11  # streams x first episodes
    state, previous, action = windows.batch(range(len(windows)))
    assert (state[:, ::20] == 40).all() and (previous[:, 0] == 10).all()
    reward, arrived = previous[:, 1:] // 5, lesson.NEXT_STATE[state, action]
    assert torch.equal(previous[:, 1:] % 5, action[:, :-1])
    within = torch.arange(1, 40) % 20 != 0  # an episode goes on from where the action leads
    assert torch.equal(arrived[:, :-1][:, within], state[:, 1:][:, within])
    goal = torch.tensor(train_goals).repeat_interleave(4 * 11)[:, None]
    assert torch.equal(reward == 1, arrived[:, :-1] == goal) and reward.sum() > 100
    for number in (0, 10, 11, 2507):
        stream, first = number // 11, number % 11 * 20
        assert torch.equal(state[number], states[stream, first : first + 40])
        assert torch.equal(action[number], outcomes[stream, first : first + 40] % 5)

@pytest.mark.parametrize("source", ["pg", "noise"])
def test_the_source_learns_every_goal(source, lesson, config):
    config = replace(config, source=source, n_streams=20, n_source_episodes=50)
    goals = list(range(81))
    states, outcomes = lesson.source_histories(goals, config)
    assert states.shape == outcomes.shape == (81 * 20, 50 * 20) and states.dtype == torch.uint8
    returns = (outcomes // 5).view(81, 20, 50, 20).sum(-1).double()
    assert returns.mean((0, 1))[0] < 1 < returns.mean((0, 1))[20]
    assert returns[:, :, -5:].mean() > 0.85 * lesson.OPTIMUM.mean()
    assert (returns.amax((1, 2)) <= lesson.OPTIMUM).all()

# --- Evaluation -----------------------------------------------------------------------------------

def test_cached_logits_equal_full_ones_and_the_future_changes_nothing(lesson, config):
    torch.manual_seed(0)
    model = lesson.HistoryModel(config).eval()
    states, previous = torch.randint(81, (3, 40)), torch.randint(11, (3, 40))
    full, cache = model(states, previous), [{} for _ in model.blocks]
    parts = [model(states[:, :21], previous[:, :21], cache=cache)]
    parts += [model(states[:, t : t + 1], previous[:, t : t + 1], cache=cache)
              for t in range(21, 40)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5)
    states[:, 30], previous[:, 30] = (states[:, 30] + 1) % 81, (previous[:, 30] + 1) % 11
    other = model(states, previous)
    assert torch.equal(other[:, :30], full[:, :30]) and not torch.equal(other[:, 30], full[:, 30])

@torch.no_grad()
def test_rollouts_are_those_of_the_model_without_a_cache(lesson, config):
    """Every step of a rollout from its whole window: of 2 episodes, the older is dropped."""
    torch.manual_seed(0)
    model, goal = lesson.HistoryModel(config).eval(), 41
    device = torch.device("cpu")
    reached = lesson.roll_out(model, [12, goal], config.n_rollouts, config, 0, 1, device)
    assert reached.shape == (2, 2, 4, 20)
    arrived, chance = reached[1, 1].flatten(), np.random.default_rng([0, goal, 1]).random(80, "f4")
    states = [40 if t % 20 == 0 else arrived[t - 1].item() for t in range(80)]
    outcomes = []
    for t in range(80):
        first = max(0, t // 20 - 1) * 20
        window = torch.tensor([[10, *outcomes[first:]]])
        logits = model(torch.tensor([states[first : t + 1]]), window)[0, -1]
        cumulative = (logits / config.temperature).softmax(-1).cumsum(-1)
        action = min(4, sum(chance[t] > p for p in cumulative.tolist()))
        assert lesson.NEXT_STATE[states[t], action] == arrived[t]
        outcomes.append(action + 5 * (arrived[t].item() == goal))

def test_results_are_the_returns_of_the_held_out_goals(runs):
    held_out, train = results(runs.whole.folder)["held_out"], results(runs.whole.folder)["train"]
    assert held_out["goals"][-8:] == PUBLIC_8 == results(runs.whole.folder)["public_8"]["goals"]
    assert len(held_out["goals"]) == len(train["goals"]) == 16
    assert not {*map(tuple, held_out["goals"])} & {*map(tuple, train["goals"])}
    for part in (held_out, train):
        assert len(part["return_per_episode"]) == 4
        assert part["last10"] == pytest.approx(np.mean(part["return_per_episode"]))
        assert part["worst_goal"] == min(part["last10_per_goal"]) <= part["last10"]
    top = results(runs.whole.folder)
    assert top["optimum"] == 16.625 and top["random"] == pytest.approx(0.2289, abs=1e-4)
    assert 0.2 < top["source_last10"] < 16.625

def test_the_terminal_the_log_and_the_pictures(runs):
    out, output = runs.whole.stdout, runs.whole.folder / "ad_output"
    assert out.startswith("Number of processes: 1\nDistributed type: NO\nMixed precision: no\n"
                          "Gradient accumulation steps: 8\nMain process device: cpu\n1 windows x")
    assert runs.pair.stdout.startswith("Number of processes: 2\nDistributed type: MULTI_CPU\n")
    assert out.count("Number of processes") == runs.pair.stdout.count("Number of processes") == 1
    for name in ("validation", "held_out", "train", "public_8"):
        assert re.search(rf"^{name}: return .*random \d.*source_last10 \d.*optimum 1\d", out, re.M)
    assert re.search(r"^done: return .* 16 unseen goals.*final_model", out, re.M)
    assert [record["step"] for record in runs.whole.metrics] == list(range(1, 21))
    for record in runs.whole.metrics:
        assert record["tokens_seen"] == record["step"] * 320 and record["grad_norm"] > 0
        assert ("val_return" in record) == (record["step"] in (10, 20))
    assert runs.whole.metrics[0]["train_loss"] == pytest.approx(math.log(5), abs=0.15)
    assert imread(output / "in_context_return.png").std() > 0.05
    assert imread(output / "paths.png").std() > 0.05
    assert next(output.glob("runs/events*")).stat().st_size > 20 * 50
    assert not list(output.glob("*.unfinished"))

def test_the_best_weights_of_the_validation_goals_are_kept(lesson, config, runs):
    val_returns = {record["step"]: record["val_return"] for record in runs.whole.metrics
                   if "val_return" in record}
    checkpoint = torch.load(runs.whole.folder / "ad_output/checkpoint.pt", weights_only=True)
    best = checkpoint["progress"]["best"]
    assert val_returns[best["step"]] == max(val_returns.values()) == best["val_return"]
    assert results(runs.whole.folder)["step"] == best["step"]
    model = lesson.HistoryModel(config)
    model.load_state_dict(weights(runs.whole.folder))
    settings = json.loads((runs.whole.folder / "ad_output/final_model/config.json").read_text())
    assert settings["tf_n_embd"] == 16 and settings["n_transit"] == 40

def test_no_steps_evaluate_without_training_and_seeds_differ(tmp_path):
    for seed in (0, 1):
        folder = new_folder(tmp_path / f"{seed}")
        assert train_here(folder, "--max_steps=0", f"--seed={seed}") == 0
        assert not (folder / "ad_output/checkpoint.pt").exists() and read_metrics(folder) == []
        assert results(folder)["held_out"]["last10"] < 2
    first, second = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert not torch.equal(first["head.weight"], second["head.weight"])

# --- Errors ---------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--n_transit=45": "--n_transit=45.* 20 .*--n_transit=40", "--n_transit=9": "--n_transit=20",
    "--n_transit=0": "--n_transit=0", "--n_transit=260": "--n_transit=260.*--n_source_episodes=12",
    "--n_test_goals=73": "--n_val_goals=8 --n_test_goals=73.* 81",
    "--n_val_goals=0": "--n_val_goals=0", "--tf_n_embd=17": "--tf_n_embd=17.*--tf_n_head=2",
    "--train_batch_size=0": "--train_batch_size=0",
    "--train_batch_size=2509": "2509 of 2508 windows.*--train_batch_size",
    "--temperature=0": "--temperature=0", "--learning_rate=nan": "--learning_rate=nan",
    "--source=ppo": "source.*ppo", "--mixed_precision=fp16": "--mixed_precision=fp16.*CUDA",
    "--gradient_accumulation_steps=0": "--gradient_accumulation_steps=0",
    "--tf_layers=3": "--tf_layers=3", "--resume --overwrite": "--resume.*--overwrite",
    "--config=absent.yaml": r"absent\.yaml", "--config=key.yaml": "tf_layers",
    "--config=type.yaml": "tf_n_embd.*wide"}

@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_or_file_ends_in_one_line_that_names_it(flags, tmp_path):
    (tmp_path / "key.yaml").write_text("tf_layers: 3")
    (tmp_path / "type.yaml").write_text("tf_n_embd: wide")
    error = train_here(tmp_path, *flags.split())
    assert re.fullmatch(f"error: .*{BAD_FLAGS[flags]}.*", error)
    assert not list(tmp_path.glob("ad_output/checkpoint*"))

@pytest.mark.parametrize(("variable", "words"), [
    ("SLURM_NTASKS=2", "SLURM_NTASKS.*RANK"),
    ("ACCELERATE_MIXED_PRECISION=bf16", "--mixed_precision=no.*bf16")])
def test_a_bad_environment_ends_in_one_line(variable, words, tmp_path, monkeypatch):
    monkeypatch.setenv(*variable.split("="))
    assert re.fullmatch(f"error: .*{words}.*", train_here(tmp_path))

@pytest.mark.parametrize("damage", ["empty", "foreign", "of other settings", "cut"])
def test_a_damaged_or_foreign_history_file_is_named(damage, runs, tmp_path):
    path, = runs.whole.folder.glob("ad_output/histories_*.pt")
    content, copy = path.read_bytes(), tmp_path / path.name
    copy.write_bytes({"empty": b"", "foreign": b"hello", "cut": content[:-99]}.get(damage, b""))
    if damage == "of other settings":
        torch.save(torch.load(path) | {"settings": {"source": "noise"}}, copy)
    before = copy.read_bytes()
    error = train_here(tmp_path, f"--cache_dir={tmp_path}")
    assert re.fullmatch(rf"error: .*{path.stem}\.pt .*delete it.*", error)
    assert copy.read_bytes() == before

def test_histories_are_made_once_and_anew_for_other_settings(runs, tmp_path, capfd):
    path, = runs.whole.folder.glob("ad_output/histories_*.pt")
    shutil.copy(path, tmp_path)
    for flags, made in (("--learning_rate=0.1", 0), ("--seed=1", 1), ("--source=noise", 1)):
        flags = [flags, "--max_steps=0", "--n_episodes=1", "--overwrite"]
        assert train_here(tmp_path, f"--cache_dir={tmp_path}", *flags) == 0
        assert capfd.readouterr().out.count(" on 81 goals in ") == made
    assert len(list(tmp_path.glob("histories_*.pt"))) == 3

def test_no_in_a_yaml_file_is_a_precision(lesson, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("mixed_precision: no\npreset: cpu\n")
    monkeypatch.setattr(sys, "argv", [NAME, f"--config={tmp_path / 'run.yaml'}", "--seed=3"])
    config = lesson.parse_config(lesson.Config, lesson.PRESETS)
    assert (config.mixed_precision, config.n_transit, config.seed) == ("no", 200, 3)

def test_under_torchrun_every_process_ends_with_that_line_and_none_hangs(tmp_path):
    flags = [*SMALL, "--train_batch_size=1255"]
    run = run_script(tmp_path, NAME, *flags, launcher="torchrun", nproc=2, check=False)
    assert run.returncode == 1
    assert len(re.findall("error: a step takes 2510 of 2508 windows", run.stderr)) == 2
    assert NAME + '", line' not in run.stderr  # a traceback of the lesson

# --- What it is for -------------------------------------------------------------------------------

def test_a_short_run_learns_in_context_on_goals_that_it_never_saw(short):
    assert short.process.wait(300) == 0, short.stderr
    held_out = results(short.folder)["held_out"]
    assert held_out["last10"] > 5
    assert np.mean(held_out["return_per_episode"][:3]) < 0.5 * held_out["last10"]
    assert results(short.folder)["source_last10"] > 15
