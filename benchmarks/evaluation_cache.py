"""How fast lesson 06 is, as one table: histories, evaluation with and without a cache, training.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_cache.py    # about 5 minutes on 2 quiet cores

Evaluation is timed in three ways in the same program, with the same untrained model: as the lesson
does it; the same windows, encoded as a whole at each step; and the last n_transit steps encoded as
a whole at each step, which is what github.com/tommyma3/Algorithm_Distillation does (its window
slides on by one step). The second must lead to the same states as the first, or the program ends.
"""

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
lesson = importlib.import_module("06_algorithm_distillation")

class WithoutCache:
    """Gets what the model gets, but encodes all that the window holds at each step."""
    def __init__(self, model):
        self.model, self.blocks = model, model.blocks

    def __call__(self, states, previous, cache):
        new = torch.stack([states, previous])
        window = cache[0]["window"] = torch.cat([cache[0].get("window", new[:, :, :0]), new], -1)
        return self.model(*window)

class SlidingWindow(WithoutCache):
    """Encodes the last n_transit steps at each step."""
    window = None

    def __call__(self, states, previous, cache):
        new = torch.stack([states, previous])[:, :, -1:]
        window = new if self.window is None else torch.cat([self.window, new], -1)
        self.window = window[:, :, -self.model.emb.time.num_embeddings :]
        window = self.window.clone()
        window[1, :, 0] = lesson.NO_OUTCOME
        return self.model(*window)

def evaluation(config, device):
    """{name: seconds of one evaluation of the test goals}. The short one, with the cache, is played
    before, between and after the long ones, and its median counts."""
    torch.manual_seed(0)
    model = lesson.HistoryModel(config).to(device).eval()
    goals = lesson.split_goals(config)[2]
    pairs = [(goal, rollout) for goal in goals for rollout in range(config.n_rollouts)]
    reached, seconds = {}, {}
    for name, player in (
            ("cache", model), ("same windows, no cache", WithoutCache(model)), ("cache", model),
            ("window slides by one step, no cache", SlidingWindow(model)), ("cache", model)):
        began = time.perf_counter()
        reached[name] = lesson.play(player, pairs, config, device).cpu()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
    if not torch.equal(reached["cache"], reached["same windows, no cache"]):
        sys.exit("the cache has changed the outcome")
    return {name: statistics.median(x) for name, x in seconds.items()}

def training(processes, threads, steps):
    """tokens_per_second of the lesson at the end of a short run, 32 windows a step in all."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launch, ROOT / "06_algorithm_distillation.py", "--preset=cpu",
                   f"--train_batch_size={32 // processes}", f"--max_steps={steps}",
                   "--n_episodes=1", "--device=cpu", f"--output_dir={folder}", "--log_every=1000"]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "metrics.jsonl").open().readlines()[-1])[
            "tokens_per_second"]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_episodes", type=int, default=60, help="of the timed evaluations")
    parser.add_argument("--n_rollouts", type=int, default=1, help="per goal; the lesson plays 4")
    parser.add_argument("--steps", type=int, default=40, help="of the timed trainings; 0 = none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options, sys.argv[1:] = parser.parse_args(), ["--preset=cpu"]
    config = lesson.parse_config(lesson.Config, lesson.PRESETS)
    device = torch.device(options.device)
    began = time.perf_counter()
    steps = lesson.source_histories(list(range(81)), config)[0].numel()
    speed = steps / (time.perf_counter() - began)
    rows = [("histories, steps per second", f"{speed:,.0f}", "")]
    config = dataclasses.replace(
        config, n_episodes=options.n_episodes, n_rollouts=options.n_rollouts)
    times = evaluation(config, device)
    for name, seconds in times.items():
        rows.append((f"evaluation of {16 * config.n_rollouts} rollouts x {config.n_episodes} "
                     f"episodes: {name}", f"{seconds:.1f} s", f"{seconds / times['cache']:.1f} x"))
    kinds = ((1, 1), (1, 2), (2, 1)) if options.steps else ()
    speeds = [training(*kind, options.steps) for kind in kinds]
    for (processes, threads), speed in zip(kinds, speeds, strict=True):
        rows.append((f"training, tokens per second: {processes} processes of {threads} threads",
                     f"{speed:,.0f} ({speed / 6400:.1f} steps)", f"{speed / speeds[0]:.2f} x"))
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n")
    print("| what | measured | ratio |\n|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")

if __name__ == "__main__":
    main()
