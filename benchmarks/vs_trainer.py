"""Lesson 04 against transformers' Trainer, lesson 05 against TRL's SFTTrainer: the same model,
rows, batch size, precision, steps, learning rate; in processes that take turns. Medians.

    python benchmarks/vs_trainer.py 04 --model MODEL --train_file train.jsonl \\
        --validation_file validation.jsonl --steps 500
    python benchmarks/vs_trainer.py 05 --model MODEL --train_file chats.jsonl \\
        --sides ours trainer trainer_grouped ours_packed trainer_packed

The first 3 steps are not timed. Peers have their defaults: no grouping by length, except as
trainer_grouped; only SFTTrainer's gradient checkpointing, which costs speed, is off. 05 needs trl,
best in an environment of its own. On GPUs: CUDA_VISIBLE_DEVICES=0 for one.
"""

import argparse
import contextlib
import importlib
import json
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
NAMES = {"04": "04_classify_accelerate", "05": "05_sft_multigpu"}

class Meter(transformers.TrainerCallback):
    """Samples (04) or learned tokens (05) per second, from the end of the third step on."""
    def __init__(self, per_step):
        self.per_step, self.counted, self.steps = per_step, 0, []

    def step(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.counted += self.per_step
        self.steps.append((time.perf_counter(), self.counted))
    on_step_end = step

    def counting(self, function, count):
        def wrapper(*args, **given):
            self.counted += count(*args)
            return function(*args, **given)
        return wrapper

    def speed(self):
        (began, before), (ended, after) = self.steps[2], self.steps[-1]
        return (after - before) / (ended - began)

def lesson_flags(args):
    if args.lesson == "04":
        return {"model": args.model, "train_file": args.train_file, "eval_every": args.steps,
                "validation_file": args.validation_file}
    return {"model": args.model, "dataset": args.train_file, "max_length": args.max_length,
            "packing": "packed" in args.side, "val_fraction": 0.01, "eval_every": 10**9,
            "max_answers": 1, "max_new_tokens": 1}

def trainer_04(args, lesson, meter, settings):
    """A Trainer for the model and the rows as the lesson prepares them, and a test for it."""
    config = lesson.Config(seed=args.seed, **lesson_flags(args))
    data, names, _ = lesson.load_data(config)
    model, tokenizer, max_length, _ = lesson.load_classifier(config, names)
    rows = {split: lesson.tokenize(tokenizer, data[split], max_length)[0] for split in data}
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**settings), train_dataset=rows["train"],
        processing_class=tokenizer, callbacks=[meter])  # pads, as there is a tokenizer
    def accuracy():
        output = trainer.predict(rows["validation"])
        return (output.predictions.argmax(-1) == output.label_ids).mean().item()
    return trainer, accuracy

def trainer_05(args, lesson, meter, settings):
    import datasets
    import trl
    rows = [{"messages": chat} for _, chat in lesson.load_chats(args.train_file)[0]]
    trainer = trl.SFTTrainer(args.model, trl.SFTConfig(
        **settings, assistant_only_loss=True, max_length=args.max_length,
        packing="packed" in args.side, gradient_checkpointing=False, lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length" if "grouped" in args.side else "random",
        model_init_kwargs={"dtype": "float32"}),
        train_dataset=datasets.Dataset.from_list(rows), callbacks=[meter])
    trainer.compute_loss = meter.counting(trainer.compute_loss, lambda model, inputs, *_: (
        inputs["labels"][:, 1:] != -100).sum().item())
    return trainer, lambda: None

def run_side(args):
    """[speed, accuracy or None] of one side, in this process."""
    lesson = importlib.import_module(NAMES[args.lesson])
    meter = Meter(args.batch_size if args.lesson == "04" else 0)
    if "trainer" in args.side:
        trainer, accuracy = globals()[f"trainer_{args.lesson}"](args, lesson, meter, dict(
            output_dir=f"{args.folder}/out", per_device_train_batch_size=args.batch_size,
            max_steps=args.steps, seed=args.seed, learning_rate=args.learning_rate,
            bf16=args.precision == "bf16", fp16=args.precision == "fp16", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), save_strategy="no"))
        trainer.train()
        return meter.speed(), accuracy()
    flags = lesson_flags(args) | {
        "batch_size": args.batch_size, "max_steps": args.steps, "learning_rate": args.learning_rate,
        "warmup_steps": 0, "weight_decay": 0, "precision": args.precision, "seed": args.seed,
        "output_dir": f"{args.folder}/out", "save_every": 10**9, "profile": True}
    lesson.start_profiler = lambda *_: meter.step  # in the place of --profile, after every step
    if args.lesson == "05":
        lesson.collate_chats = meter.counting(lesson.collate_chats, lambda rows: sum(
            (labels[1:] != -100).sum().item() for row in rows for _, labels in row or []))
    sys.argv = [NAMES[args.lesson], *(f"--{key}={x}" for key, x in flags.items())]
    with contextlib.suppress(SystemExit):  # a failed run has too few steps for a speed
        lesson.main()
    records = map(json.loads, Path(args.folder, "out/metrics.jsonl").open())
    return meter.speed(), [x.get("val_accuracy") for x in records][-1]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    flag = parser.add_argument
    flag("lesson", choices=NAMES)
    for name, value in dict(
            model="", train_file="", validation_file="", batch_size=32, max_length=512, steps=100,
            learning_rate=1e-4, runs=3, seed=0).items():
        flag(f"--{name}", type=type(value), default=value)
    flag("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    flag("--sides", nargs="+", default=["ours", "trainer"])
    flag("--side", help=argparse.SUPPRESS)  # in a process of its own
    flag("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return print(json.dumps(run_side(args)))
    found = {side: [] for side in args.sides}
    for seed in range(args.seed, args.seed + args.runs):
        for side in args.sides if seed % 2 == 0 else reversed(args.sides):
            with tempfile.TemporaryDirectory() as folder:
                command = [*sys.argv, f"--side={side}", f"--seed={seed}", f"--folder={folder}"]
                run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            found[side].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"seed {seed}, {side}: {found[side][-1]}", file=sys.stderr, flush=True)
    print("\n| | per second, median | range | to the first | accuracy |\n|---|---|---|---|---|")
    first = statistics.median(speed for speed, _ in found[args.sides[0]])
    for side, results in found.items():
        speeds, accuracies = zip(*results, strict=True)
        mean = f"{statistics.mean(accuracies):.4f}" if None not in accuracies else ""
        print(f"| {side} | {statistics.median(speeds):.1f} | {min(speeds):.1f} to "
              f"{max(speeds):.1f} | {statistics.median(speeds) / first:.2f} x | {mean} |")

if __name__ == "__main__":
    main()
