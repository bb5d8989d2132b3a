"""Lesson 02 against nanoGPT's train.py and transformers' Trainer, or itself with other flags: the
same sizes, text, batch and constant learning rate, in processes that take turns. Medians.

    python benchmarks/vs_nanogpt.py --nanogpt ../nanoGPT 02 "02 --precision=fp32" \\
        "nanogpt --compile=False" "trainer --bf16=True" trainer
    python benchmarks/vs_nanogpt.py --vocab_size 50304 02 "02 --loss_chunks=8"

Each side is a program and its own flags. --nanogpt names a checkout of github.com/karpathy/nanoGPT,
which stays as it is. The first 3 steps and evaluation are not timed. Losses are means of the last
10 steps, to show that the work is the same; windows and initial weights differ. Memory is what
PyTorch allocated on a GPU, else the largest resident size of the process.
"""

import argparse
import importlib
import itertools
import json
import math
import pickle
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
lesson = importlib.import_module("02_opt_multi_gpu_ddp")
ON_GPU = torch.cuda.is_available()

def lesson_config(args, folder, *flags):
    sizes = {key: getattr(args, key) for key in (
        "vocab_size", "n_layers", "n_heads", "emb_dim", "context_length", "batch_size",
        "learning_rate")}
    fixed = dict(preset="tiny", max_steps=args.steps, min_lr_ratio=1, warmup_steps=0, log_every=1,
                 eval_every=10**6, save_every=10**6, val_fraction=0.01, output_dir=folder)
    sys.argv[1:] = [*(f"--{key}={x}" for key, x in (sizes | fixed).items()), *flags]
    return lesson.parse_config(lesson.Config, lesson.PRESETS)

def run_lesson(args, folder, flags):
    """Seconds of each timed step and loss of each step, by the lesson's own log."""
    lesson.train(lesson_config(args, folder, *flags))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()][1:]
    tokens = args.batch_size * args.context_length
    return [tokens / record["tokens_per_second"] for record in records[3:]], [
        record["train_loss"] for record in records]

def run_nanogpt(args, folder, flags):
    """The same, by what train.py prints."""
    tokens = lesson.prepare_tokens(lesson_config(args, folder), folder)  # uint16, as nanoGPT's
    for split in ("train", "val"):
        (folder / f"{split}.bin").symlink_to(tokens.name)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": args.vocab_size}))
    settings = dict(dataset=folder, out_dir=folder, n_layer=args.n_layers, n_head=args.n_heads,
                    n_embd=args.emb_dim, block_size=args.context_length, eval_iters=1,
                    batch_size=args.batch_size, gradient_accumulation_steps=1, decay_lr=False,
                    max_iters=args.steps - 1, learning_rate=args.learning_rate,
                    device="cuda" if ON_GPU else "cpu")
    command = [sys.executable, "train.py", *(f"--{key}={x}" for key, x in settings.items()), *flags]
    run = subprocess.run(command, cwd=args.nanogpt, stdout=subprocess.PIPE, text=True, check=True)
    steps = re.findall(r"^iter \d+: loss ([\d.]+), time ([\d.]+)ms", run.stdout, re.MULTILINE)
    return [float(x) / 1000 for _, x in steps[3:]], [float(loss) for loss, _ in steps]

def run_trainer(args, folder, flags):
    """The same, by a clock in a callback. GPT2LMHeadModel shifts the labels itself."""
    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *ignored, **also_ignored):
            if ON_GPU:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
    config = lesson_config(args, folder)
    windows, _ = lesson.open_windows(config, lesson.prepare_tokens(config, folder), 1)
    rows = [{"input_ids": ids, "labels": ids} for ids in windows.batch(range(len(windows)))[0]]
    settings = dict(output_dir=folder, per_device_train_batch_size=args.batch_size,
                    max_steps=args.steps, learning_rate=args.learning_rate, weight_decay=0.1,
                    lr_scheduler_type="constant", adam_beta2=0.95, logging_steps=1,
                    save_strategy="no", disable_tqdm=True, use_cpu=not ON_GPU)
    sys.argv[1:] = [*(f"--{key}={x}" for key, x in settings.items()), *flags]
    arguments, = transformers.HfArgumentParser(
        transformers.TrainingArguments).parse_args_into_dataclasses()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=args.vocab_size, n_layer=args.n_layers, n_head=args.n_heads, n_embd=args.emb_dim,
        n_positions=args.context_length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        tie_word_embeddings=False))
    times = []
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return [end - begin for begin, end in itertools.pairwise(times[2:])], losses

PROGRAMS = {"02": run_lesson, "nanogpt": run_nanogpt, "trainer": run_trainer}

def run_side(args, side):
    """One run of one side in this process; prints its record."""
    program, *flags = shlex.split(side)
    with tempfile.TemporaryDirectory() as folder:
        seconds, losses = PROGRAMS[program](args, Path(folder), flags)
    owner = resource.RUSAGE_CHILDREN if program == "nanogpt" else resource.RUSAGE_SELF
    memory = resource.getrusage(owner).ru_maxrss / 2**20
    if ON_GPU:  # nanoGPT does not tell it
        memory = math.nan if program == "nanogpt" else torch.cuda.max_memory_allocated() / 2**30
    speed = args.batch_size * args.context_length / statistics.median(seconds)
    print(json.dumps([speed, memory, statistics.mean(losses[-10:])]))

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sides", nargs="+", help="such as 02 or 'nanogpt --compile=False'")
    parser.add_argument("--nanogpt", help="folder that holds nanoGPT's train.py")
    for name, default in dict(vocab_size=257, context_length=256, emb_dim=384, n_heads=6,
                              n_layers=6, batch_size=8, steps=40, runs=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [side for side in args.sides if side.split()[0] not in PROGRAMS]:
        parser.error(f"{unknown[0]!r} must begin with one of {', '.join(PROGRAMS)}")
    if args.alone:
        return run_side(args, *args.sides)
    records = {side: [] for side in args.sides}
    flags = [x for x in sys.argv[1:] if x not in args.sides]
    for i in range(args.runs):
        for side in args.sides if i % 2 == 0 else reversed(args.sides):
            command = [sys.executable, __file__, side, *flags, "--alone"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{side}: {run.stderr}")
            records[side].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"{side}: {records[side][-1]}", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if ON_GPU else platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, {args.runs} runs of {args.steps} steps each\n\n"
          "| | tokens/s, median | lowest to highest | the first is | memory, GiB | loss |\n"
          "|---|---|---|---|---|---|")
    first = statistics.median(speed for speed, *_ in records[args.sides[0]])
    for side, runs in records.items():
        speeds, memories, losses = zip(*runs, strict=True)
        middle = statistics.median(speeds)
        print(f"| `{side}` | {middle:,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} | "
              f"{first / middle:.2f} x | {max(memories):.2f} | {statistics.mean(losses):.3f} |")

if __name__ == "__main__":
    main()
