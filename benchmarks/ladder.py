"""Lesson 02 with one optimisation added at a time: a table and a bar chart, on whatever machine.

    python benchmarks/ladder.py                      # a small size, about 6 minutes on a CPU
    python benchmarks/ladder.py --preset=124M        # flags of lesson 02: on a GPU

The lesson has no switches for its slow past: a row swaps slow parts in by patching, in a process of
its own, and lets the lesson train. The rows take turns; medians count. Evaluation and the first 3
steps are not timed, as in all that the lesson logs. Memory is PyTorch's peak on a GPU, else the
largest resident size of the process. MFU is the share of the bf16 peak, in fp32 too.
"""

import argparse
import importlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
lesson = importlib.import_module("02_opt_multi_gpu_ddp")
ON_GPU = torch.cuda.is_available()
# What the flags after them may override: on a CPU a small model, and no work beside the training.
FLAGS = ["--log_every=1", "--eval_every=1000000", "--save_every=1000000", "--val_fraction=0.02"]
if not ON_GPU:
    FLAGS += ["--preset=tiny", "--n_layers=6", "--n_heads=6", "--emb_dim=384",
              "--context_length=256", "--vocab_size=8192"]

def written_out_attention(queries, keys, values, mask, drop_rate, is_causal):
    """What F.scaled_dot_product_attention does, with T x T matrices in memory."""
    T = queries.shape[2]
    future = torch.ones(T, T, dtype=torch.bool, device=queries.device).triu(1)
    scores = queries @ keys.transpose(2, 3) / queries.shape[3] ** 0.5
    return F.dropout(scores.masked_fill(future, -torch.inf).softmax(-1), drop_rate) @ values

def slow_attention():
    F.scaled_dot_product_attention = written_out_attention

def no_tf32():
    torch.set_float32_matmul_precision = lambda precision: None

def plain_adamw():
    """A loop over the tensors, each operation of the formula by itself."""
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda groups, **settings: adamw(
        groups, **settings | {"fused": False, "foreach": False})

def ladder(config):
    """{name: (needs a GPU, patches, flags)}; a row has all that it needs, whatever stands above."""
    batch, twice = f"--batch_size={config.batch_size}", f"--batch_size={2 * config.batch_size}"
    fp32, bf16, eager = "--precision=fp32", "--precision=bf16", "--no_compile"
    return {
        "fp32, attention written out":
            (False, [slow_attention, no_tf32, plain_adamw], [fp32, eager, batch]),
        "TF32": (True, [slow_attention, plain_adamw], [fp32, eager, batch]),
        "scaled_dot_product_attention": (False, [plain_adamw], [fp32, eager, batch]),
        "bf16 autocast": (False, [plain_adamw], [bf16, eager, batch]),
        "fused AdamW": (False, [], [bf16, eager, batch]),
        "torch.compile": (True, [], [bf16, batch]),
        "twice the batch": (False, [], [bf16, twice]),
        "loss in 8 chunks": (False, [], [bf16, twice, "--loss_chunks=8"])}

def run_row(patches, flags):
    """Train in this process and print tokens/s, MFU and memory."""
    for patch in patches:
        patch()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [*flags, f"--output_dir={folder}"]
        lesson.train(lesson.parse_config(lesson.Config, lesson.PRESETS))
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    timed = [record for record in records if "tokens_per_second" in record]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps([
        statistics.median(record["tokens_per_second"] for record in timed),
        statistics.median(record.get("mfu", 0) for record in timed),
        timed[-1].get("peak_memory_gib", resident)]))

def save(path, title, results):
    """The table as path.md, also printed, and the chart as path.png. results: {name: record}."""
    lines, before = [title, "", "| | tokens/s | to the row before | MFU | memory, GiB |",
                     "|---|---|---|---|---|"], None
    for name, record in results.items():
        if record is None:
            lines.append(f"| {name} | needs a GPU | | | |")
            continue
        speed, mfu, memory = record
        name, ratio = (f"+ {name}", f"{speed / before:.2f} x") if before else (name, "")
        share = f"{mfu:.1%}" if mfu else "unknown peak"
        lines.append(f"| {name} | {speed:,.0f} | {ratio} | {share} | {memory:.2f} |")
        before = speed
    print("\n".join(lines))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    shown = {name: record[0] for name, record in results.items() if record}
    axes = Figure(figsize=(8, 3.5), layout="constrained").subplots()
    axes.bar_label(axes.barh(list(shown), shown.values()), fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="tokens per second", title=title.replace("; ", "\n"))
    axes.title.set_fontsize(8)
    axes.figure.savefig(path.with_suffix(".png"), dpi=120)

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3, help="of each row")
    parser.add_argument("--save", type=Path, default=ROOT / "results/02_ladder", help="no suffix")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # in a process of its own
    args, flags = parser.parse_known_args()
    flags = [*FLAGS, f"--max_steps={args.steps}", *flags]
    sys.argv[1:] = flags
    config = lesson.parse_config(lesson.Config, lesson.PRESETS)
    rows = ladder(config)
    if args.row:
        _, patches, own = rows[args.row]
        return run_row(patches, [*flags, *own])
    records = {name: [] for name, (needs_gpu, *_) in rows.items() if ON_GPU or not needs_gpu}
    for i in range(args.runs):
        for name in records if i % 2 == 0 else reversed(records):
            command = [sys.executable, __file__, f"--row={name}", f"--steps={args.steps}", *flags]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            records[name].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"{name}: {records[name][-1]}", file=sys.stderr, flush=True)
    medians = {name: [statistics.median(x) for x in zip(*records[name], strict=True)]
               if name in records else None for name in rows}
    device = torch.cuda.get_device_name() if ON_GPU else (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    title = (f"{device}, torch {torch.__version__}; {config.n_layers} layers, width "
             f"{config.emb_dim}, context {config.context_length}, vocabulary {config.vocab_size}, "
             f"batch {config.batch_size}; median of {args.runs} runs of {args.steps} steps")
    save(args.save, title, medians)

if __name__ == "__main__":
    main()
