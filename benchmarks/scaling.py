"""Lesson 02 on 1, 2, 4, ... processes: measured, and by two lines of arithmetic, also for clusters.

    python benchmarks/scaling.py                     # a small size, one thread per process
    python benchmarks/scaling.py --preset=124M       # flags of lesson 02; one GPU per process

Weak scaling keeps the batch per process, strong scaling the global batch. "waiting" is the share of
a step that goes away when DDP's all-reduce is swapped for nothing. The model: a ring moves every
gradient 2 (p-1)/p times through each link, and only what outlasts the backward pass, two thirds of
a micro-batch's time, delays the step. Bandwidth and latency are measured here, in DDP's buckets of
25 MiB; on paper flags give the bandwidth, and a hop takes 10 microseconds.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ladder import FLAGS, lesson
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

GPUS, BUCKET = torch.cuda.device_count(), 25 * 2**20
PARAMETERS = 1.42e9  # on paper: the preset 1.4B; flags: 50% MFU, NVLink, 400 and 100 Gbit/s

def parse(flags):
    sys.argv[1:] = flags
    return lesson.parse_config(lesson.Config, lesson.PRESETS)

def all_reduce_time(processes, size, bandwidth, latency):
    """Seconds for size bytes, in buckets, each of which takes 2 log2(p) hops to begin (a tree)."""
    volume = 2 * (processes - 1) / processes * size / bandwidth
    return volume + math.ceil(size / BUCKET) * 2 * math.log2(processes) * latency

def step_time(micro_batch, accumulation, all_reduce):
    """Seconds: the all-reduce runs beside the last backward pass and delays what it outlasts it."""
    return accumulation * micro_batch + max(0.0, all_reduce - 2 / 3 * micro_batch)

class SilentDDP(lesson.DDP):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, noop_hook)

def measure_link(size):
    _, world_size, device = lesson.setup_distributed("auto", "auto", 600)
    def seconds(*parts):
        times = []
        for _ in range(7):
            dist.barrier()
            began = time.perf_counter()
            for part in parts:
                dist.all_reduce(part)
            parts[-1].sum().item()  # waits for a GPU
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])
    latency = seconds(torch.zeros(1, device=device)) / (2 * math.log2(world_size))
    busy = seconds(*torch.zeros(size // 4, device=device).split(BUCKET // 4))
    busy -= all_reduce_time(world_size, size, math.inf, latency)
    lesson.leave_group()
    return 2 * (world_size - 1) / world_size * size / busy, latency

def worker(task, flags):
    """In one of several processes: measure the link, or train; rank 0 prints the result."""
    if task.isdigit():
        result = measure_link(int(task))
    else:
        lesson.DDP = SilentDDP if task == "silent" else lesson.DDP
        config = parse(flags)
        lesson.train(config)
        steps = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").open())
        result = statistics.median(x["tokens_per_second"] for x in steps if x["step"] > 3)
    if os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)

def launch(processes, task, flags):
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *torchrun, __file__, f"--worker={task}", *flags,
                   f"--output_dir={folder}"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1])

def measured(flags, runs):
    """The table of this machine, line by line."""
    config = parse(flags)
    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in lesson.common.GPTModel(vars(config)).parameters())
    whole, accumulation = config.batch_size, config.gradient_accumulation_steps
    most = min(whole, GPUS or len(os.sched_getaffinity(0)))
    counts = [2**i for i in range(most.bit_length())]
    kinds = [(1, "train", whole // p) for p in counts]
    kinds += itertools.product(counts[1:], ("train", "silent"), {whole // p for p in counts})
    speeds = {kind: [] for kind in kinds}
    for i in range(runs):
        for p, task, batch in kinds if i % 2 == 0 else reversed(kinds):
            speeds[p, task, batch].append(launch(p, task, [*flags, f"--batch_size={batch}"]))
            print(p, task, batch, speeds[p, task, batch][-1], file=sys.stderr, flush=True)
    speeds = {kind: statistics.median(x) for kind, x in speeds.items()}
    links = {p: launch(p, size, []) if p > 1 else (math.inf, 0) for p in counts}
    yield "| processes | batch of each | tokens/s | to one process | waiting | predicted tokens/s |"
    yield "|---|---|---|---|---|---|"
    for p, _, batch in (kind for kind in kinds if kind[1] == "train"):
        speed = speeds[p, "train", batch]
        waiting = 1 - speed / speeds.get((p, "silent", batch), speed)
        micro = batch * config.context_length / speeds[1, "train", batch]
        step = step_time(micro, accumulation, all_reduce_time(p, size, *links[p]))
        predicted = p * accumulation * batch * config.context_length / step
        yield (f"| {p} | {batch} | {speed:,.0f} | {speed / speeds[kinds[0]]:.2f} x | "
               f"{waiting:.0%} | {predicted:,.0f} |")
    for p, (bandwidth, latency) in list(links.items())[1:]:
        yield f"\n{p} processes: {bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} us per hop"

def on_paper(args):
    """The table of clusters: which share of the GPUs' speed remains, and what a GPU holds."""
    size, T = 4 * PARAMETERS, 1024
    yield ("| GPUs | GB/s each | 8 x 1 | 8 x 4 | 8 x 16 | 32 x 1 | 32 x 4 | 2^20 tokens in all | "
           "state, GiB | sharded, GiB |\n" + "|---" * 10 + "|")
    for bandwidth, p in itertools.product(args.bandwidths, (8, 64, 512, 4096)):
        all_reduce = all_reduce_time(p, size, bandwidth * 1e9, 10e-6)
        cells = []
        for batch, accumulation in ((8, 1), (8, 4), (8, 16), (32, 1), (32, 4), (2**20 / T / p, 1)):
            micro = batch * T / args.gpu_speed
            cells.append(f"{accumulation * micro / step_time(micro, accumulation, all_reduce):.0%}")
        cells += [f"{(8 + 8 / shards) * PARAMETERS / 2**30:.1f}" for shards in (1, p)]
        yield f"| {p} | {bandwidth:g} | {' | '.join(cells)} |"

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3, help="0: only the table on paper")
    parser.add_argument("--gpu_speed", type=float, default=58_400, help="tokens/s of one alone")
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[400, 50, 12.5], help="GB/s")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.worker:
        return worker(args.worker, flags)
    flags = [*FLAGS, *([] if GPUS else ["--vocab_size=257"]), f"--max_steps={args.steps}", *flags]
    for table in (measured(flags, args.runs) if args.runs else [], on_paper(args)):
        print("", *table, sep="\n")

if __name__ == "__main__":
    main()
