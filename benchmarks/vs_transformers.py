"""Speed of a lesson against transformers' Trainer with its defaults: the same model, rows, batch
size, precision, steps and learning rates, in processes of their own that take turns. Medians.

    python benchmarks/vs_transformers.py --lesson 04 --model MODEL --train_file train.jsonl \\
        --validation_file validation.jsonl --steps 100 --runs 3

samples/s leaves out the first 3 steps; accuracy is that of all validation rows after the last step.
On GPUs: CUDA_VISIBLE_DEVICES=0 for one. Peers get no length grouping, as it is not their default.
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SCRIPTS = {"04": "04_classify_accelerate.py"}

def lesson_04(args, folder):
    """(training samples per second, validation accuracy) of the lesson by its command line."""
    flags = {
        "model": args.model, "train_file": args.train_file, "validation_file": args.validation_file,
        "label_names": args.label_names, "batch_size": args.batch_size, "max_steps": args.steps,
        "learning_rate": args.learning_rate, "warmup_steps": 0, "weight_decay": 0,
        "precision": args.precision, "seed": args.seed, "output_dir": folder,
        "log_every": args.steps, "eval_every": args.steps, "save_every": args.steps}
    command = [sys.executable, ROOT / SCRIPTS["04"], *(f"--{key}={x}" for key, x in flags.items())]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    last = next(record for record in reversed(records) if "val_accuracy" in record)
    return last["samples_per_second"], last["val_accuracy"]

def trainer_04(args, folder):
    """The same numbers of the Trainer, on the model and the rows as the lesson prepares them."""
    import numpy as np
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
    lesson = importlib.import_module(SCRIPTS["04"][:-3])
    config = lesson.Config(
        model=args.model, train_file=args.train_file, validation_file=args.validation_file,
        label_names=args.label_names, seed=args.seed)
    data, names, _ = lesson.load_data(config)
    model, tokenizer, max_length, _ = lesson.load_classifier(config, names)
    rows = {split: lesson.tokenize(tokenizer, data[split], max_length)[0] for split in data}

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step in (3, args.steps):
                setattr(self, f"step_{state.global_step}", time.perf_counter())
    clock = Clock()
    trainer = Trainer(
        model, TrainingArguments(
            output_dir=folder, per_device_train_batch_size=args.batch_size, max_steps=args.steps,
            per_device_eval_batch_size=args.batch_size, learning_rate=args.learning_rate,
            bf16=args.precision == "bf16", fp16=args.precision == "fp16", save_strategy="no",
            use_cpu=not torch.cuda.is_available(), seed=args.seed, disable_tqdm=True),
        train_dataset=rows["train"], processing_class=tokenizer, callbacks=[clock],
        data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    output = trainer.predict(rows["validation"])
    seconds = getattr(clock, f"step_{args.steps}") - clock.step_3
    accuracy = np.mean(output.predictions.argmax(-1) == output.label_ids).item()
    return (args.steps - 3) * args.batch_size / seconds, accuracy

PAIRS = {"04": (lesson_04, trainer_04)}

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lesson", choices=PAIRS, default="04")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--validation_file", required=True)
    parser.add_argument("--label_names", default="")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--runs", type=int, default=3, help="of each, each with a seed of its own")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; then one more")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.steps < 5:
        parser.error("--steps must be at least 5: the first 3 are not timed")
    return args

def main():
    args = parse_arguments()
    if args.side is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(PAIRS[args.lesson][args.side](args, Path(folder) / "run")))
        return
    names = SCRIPTS[args.lesson], "transformers.Trainer"
    speeds, accuracies = ([], []), ([], [])
    for seed in range(args.seed, args.seed + args.runs):
        for side in (0, 1) if seed % 2 == 0 else (1, 0):
            command = [sys.executable, *sys.argv, f"--side={side}", f"--seed={seed}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            speed, accuracy = json.loads(run.stdout.splitlines()[-1])
            speeds[side].append(speed)
            accuracies[side].append(accuracy)
            print(f"seed {seed}: {names[side]} {speed:.1f} samples/s, accuracy {accuracy:.4f}",
                  file=sys.stderr, flush=True)
    import torch
    import transformers
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{args.precision}, {args.steps} steps of {args.batch_size}, {args.runs} runs each\n\n"
          "| | samples/s, median | lowest to highest | accuracy, mean |\n|---|---|---|---|")
    for name, speed, accuracy in zip(names, speeds, accuracies, strict=True):
        print(f"| {name} | {statistics.median(speed):.1f} | {min(speed):.1f} to {max(speed):.1f} | "
              f"{statistics.mean(accuracy):.4f} |")
    print(f"\n{statistics.median(speeds[0]) / statistics.median(speeds[1]):.2f} x")

if __name__ == "__main__":
    main()
