"""Does a teacher's distribution teach more than its words? Lesson 03 with and without
--teacher_model, on the same rows for the same steps; held-out loss, mean over seeds.

    python benchmarks/distillation.py --student_model student --teacher_model teacher \
        --dataset_path rows.jsonl --seeds 0 1 2 --num_epochs 4 --learning_rate 1e-3

Every other flag goes to 03. The seed chooses the held-out rows as well, the same for all columns.
The teacher must not have been trained on the rows, or its advantage would be their memory."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "03_distill_student.py"

def held_out_loss(folder, *flags):
    """The last record of a run of lesson 03."""
    subprocess.run([sys.executable, SCRIPT, "--output_dir", folder, "--max_answers", "1", *flags],
                   check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher_model", required=True)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--kd_losses", nargs="+", default=["forward_kl", "jsd", "reverse_kl"])
    arguments, flags = parser.parse_known_args()
    teacher = f"--teacher_model={arguments.teacher_model}"
    columns = {"text alone": []} | {
        name: [teacher, f"--kd_loss={name}"] for name in arguments.kd_losses}
    losses = {name: [] for name in ("before", *columns, "teacher")}
    with tempfile.TemporaryDirectory() as root:
        for seed in arguments.seeds:
            for name, more in columns.items():
                record = held_out_loss(Path(root, f"{name} {seed}"), *flags, *more, "--seed", seed)
                losses[name].append(record["val_loss"])
            losses["before"].append(record["before_val_loss"])
            judged = held_out_loss(Path(root, f"teacher {seed}"), *flags, "--seed", seed,
                                   "--max_steps=0", "--student_model", arguments.teacher_model)
            losses["teacher"].append(judged["val_loss"])
            print(f"seed {seed} done", flush=True)
    print("\n| held-out loss, nats per token |", " | ".join(losses), "|")
    print("|---" * (len(losses) + 1) + "|")
    for i, seed in enumerate(arguments.seeds):
        print(f"| seed {seed} |", " | ".join(f"{x[i]:.4f}" for x in losses.values()), "|")
    print("| mean |", " | ".join(f"{statistics.mean(x):.4f}" for x in losses.values()), "|")

if __name__ == "__main__":
    main()
