"""06 - Algorithm Distillation: a transformer that learns reinforcement learning, on several GPUs.

You learn   how a causal transformer, trained on the learning histories of an algorithm, improves
            from episode to episode on goals it never saw, without any change of its weights; how
            every rank evaluates its share; why the loss does not show when this ability appears
Run it      torchrun --nproc_per_node=4 06_algorithm_distillation.py                 # 4 GPUs
            python 06_algorithm_distillation.py --preset cpu                         # no GPU needed
Expect      done: return 16.40 on 16 unseen goals, worst 13.57, in 3.9 min; ad_output has ...
            (2 quiet CPU cores, torch 2.13.0, 2026-11-21; a random policy gets 0.23, the best
            possible 16.62)
Reads       nothing: the histories are made in seconds
Writes      ad_output/{metrics.jsonl, runs/, checkpoint.pt, final_model/, results.json,
            in_context_return.png, paths.png, histories_*.pt}
If it hangs NCCL_DEBUG=INFO TORCH_DISTRIBUTED_DEBUG=DETAIL names the operation that waits
Sources     Laskin et al. 2022 (arXiv:2210.14215: Algorithm Distillation, Dark Room); Zisman et al.
            2023 (arXiv:2312.12275: --source noise); github.com/tommyma3/Algorithm_Distillation
            (the names of the options, the order of the goals)
"""

import atexit
import faulthandler
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from transformers.hf_argparser import HfArg, HfArgumentParser

import common

PRESETS = {
    "gpu": dict(mixed_precision="bf16"),  # and the defaults of Config
    "cpu": dict(train_batch_size=32, n_transit=200, max_steps=1200, warmup_steps=100, log_every=20,
                eval_every=400, save_every=200)}
PRESETS["auto"] = PRESETS["gpu" if torch.cuda.is_available() else "cpu"]
# Dark Room: a state is x * 9 + y, an outcome is action + 5 * reward. Walls stop a move.
SIZE, HORIZON, N_ACTIONS = 9, 20, 5
CENTRE, NO_OUTCOME = 40, 10  # where episodes start; what comes before the first step of a window
X, Y = torch.arange(SIZE**2) // SIZE, torch.arange(SIZE**2) % SIZE
DISTANCE = (X[:, None] - X).abs() + (Y[:, None] - Y).abs()
NEXT_STATE = torch.stack([(X + dx).clamp(0, SIZE - 1) * SIZE + (Y + dy).clamp(0, SIZE - 1)
                          for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0, 0))], dim=1)
# What an episode brings, for each of the 81 goals: to the best policy, 1 for every step from the
# arrival on; to a uniformly random one, the sum of its chances to be there after 1 to 20 steps.
OPTIMUM = HORIZON + 1.0 - DISTANCE[CENTRE].clamp(min=1)
RANDOM = sum(torch.linalg.matrix_power(F.one_hot(NEXT_STATE, SIZE**2).double().mean(1), t)[CENTRE]
             for t in range(1, HORIZON + 1))

@dataclass(frozen=True)
class Config:
    """Every field is a flag; the defaults are --preset gpu, but for its bf16."""
    # What a run is: a resumed run must agree in all fields from here to preset.
    source: Literal["pg", "noise"] = HfArg(default="pg", help="pg: policy gradient; noise: the best"
                                           " path under noise that fades out")
    n_streams: int = HfArg(default=100, help="environments per goal, which share the pg policy")
    n_source_episodes: int = HfArg(default=50, help="episodes of each history")
    n_val_goals: int = HfArg(default=8, help="goals for choosing the best weights, of 81")
    n_test_goals: int = HfArg(default=16, help="goals for the result only, of 81")
    split_seed: int = HfArg(default=0, help="which goals are for what; not changed by --seed")
    n_transit: int = HfArg(default=240, help="context in steps, a multiple of 20")
    tf_n_embd: int = HfArg(default=64, help="width")
    tf_n_layer: int = HfArg(default=4, help="blocks")
    tf_n_head: int = HfArg(default=2, help="attention heads per block")
    learning_rate: float = HfArg(default=3e-3, help="highest learning rate, for any world size")
    warmup_steps: int = HfArg(default=500, help="linear warm-up; half a cosine follows")
    min_lr_ratio: float = HfArg(default=0.0, help="last learning rate / highest; 1 = constant")
    weight_decay: float = HfArg(default=0.01, help="AdamW's, on matrices only")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are cut to this norm; 0 = never")
    mixed_precision: Literal["no", "fp16", "bf16"] = HfArg(default="no", help="of autocast")
    seed: int = HfArg(default=0, help="fixes histories, initial weights, windows and rollouts")
    # What may change; only train_batch_size x gradient_accumulation_steps x processes must stay.
    preset: Literal["auto", "cpu", "gpu"] = HfArg(default="auto", help="gpu with CUDA")
    config: str = HfArg(default="", help="YAML file of flags; the command line wins over it")
    output_dir: str = HfArg(default="ad_output", help="folder for all that is written")
    cache_dir: str = HfArg(default="", help="folder of the histories; default: output_dir")
    overwrite: bool = HfArg(default=False, help="replace the run that output_dir holds")
    resume: bool = HfArg(default=False, help="go on from output_dir's checkpoint")
    train_batch_size: int = HfArg(default=512, help="windows per process and micro-batch")
    test_batch_size: int = HfArg(default=2048, help="rollouts per process at a time")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches per optimizer step")
    num_workers: int = HfArg(default=0, help="taken, but not needed: a batch is one indexed read")
    max_steps: int = HfArg(default=50000, help="optimizer steps; 0 = only evaluate")
    n_episodes: int = HfArg(default=60, help="episodes of a rollout")
    n_rollouts: int = HfArg(default=4, help="rollouts per goal, twice as many to choose weights")
    temperature: float = HfArg(default=0.7, help="of the actions in rollouts")
    device: Literal["auto", "cpu", "cuda", "mps"] = HfArg(default="auto", help="where to compute")
    backend: Literal["auto", "nccl", "gloo"] = HfArg(default="auto", help="auto: nccl on GPUs")
    timeout_seconds: int = HfArg(default=1800, help="longest wait for another rank")
    deterministic: bool = HfArg(default=False, help="the same bits again on a GPU, but slower")
    profile: bool = HfArg(default=False, help="where steps 5 to 7 take their time: trace.json")
    log_every: int = HfArg(default=100, help="steps")
    eval_every: int = HfArg(default=1000, help="steps from rollouts to rollouts on the val goals")
    save_every: int = HfArg(default=1000, help="steps from checkpoint to checkpoint")

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            low, high = (min(field.default, 1), 10**9) if field.type is int else (0, 1)
            low = {"max_steps": 0, "warmup_steps": 0, "temperature": 0.01}.get(name, low)
            high = {"max_grad_norm": 1e9, "temperature": 100}.get(name, high)
            if field.type in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name}={value} must lie between {low} and {high}")
        nearest = max(1, round(self.n_transit / HORIZON)) * HORIZON
        for wrong, message in (
                (self.n_transit % HORIZON, f"--n_transit={self.n_transit} is no multiple of the "
                 f"{HORIZON} steps of an episode; the nearest is --n_transit={nearest}"),
                (self.n_transit > self.n_source_episodes * HORIZON, f"--n_transit={self.n_transit} "
                 f"is longer than --n_source_episodes={self.n_source_episodes} x {HORIZON} steps"),
                (self.n_val_goals + self.n_test_goals >= SIZE**2,
                 f"--n_val_goals={self.n_val_goals} --n_test_goals={self.n_test_goals} leave none "
                 f"of the {SIZE**2} goals for training"),
                (self.tf_n_embd % self.tf_n_head, f"--tf_n_embd={self.tf_n_embd} is no multiple of "
                 f"--tf_n_head={self.tf_n_head}"),
                (self.resume and self.overwrite, "--resume and --overwrite contradict each other; "
                 "give one of them")):
            if wrong:
                raise ValueError(message)

# Copied between scripts: parse_config
def parse_config(config_class, presets):
    """Defaults, then --preset, then --config file.yaml, then the command line: the last wins."""
    parser = HfArgumentParser(config_class, allow_abbrev=False, usage="%(prog)s [--flag value] ...",
                              description=(__doc__ or "").partition("\n")[0])
    def error(message):
        raise ValueError(f"{message}; --help lists the flags")
    parser.error = error
    path = parser.parse_known_args()[0].config
    try:  # BaseLoader keeps all values as text: "no" is a precision, and no False
        from_file = yaml.load(Path(path).read_text("utf-8"), yaml.BaseLoader) if path else {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        from_file = None
    if not isinstance(from_file, dict) or not all(
            isinstance(x, str) for value in from_file.values()
            for x in (value if isinstance(value, list) else [value])):
        raise ValueError(f"--config={path} must hold lines of the form flag: value")
    flags = []
    for name, x in from_file.items():
        flags += [f"--{name}", *x] if isinstance(x, list) else [f"--{name}={x}"]
    flags += sys.argv[1:]
    preset = getattr(parser.parse_known_args(flags)[0], "preset", "")
    parser.set_defaults(**presets.get(preset, {}))
    return config_class(**vars(parser.parse_args(flags)))
# End of copied block: parse_config

# Copied between scripts: setup_distributed
def setup_distributed(device, backend, timeout_seconds):
    """Join the processes that torchrun started; plain python is a world of one, without a group.
    torchrun sets RANK and WORLD_SIZE (which process of how many: who computes and writes what),
    LOCAL_RANK (which GPU of this machine, nothing else), MASTER_ADDR and _PORT (where they meet).
    Returns (rank, world_size, device). Raises ValueError for what this machine does not have."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise ValueError("SLURM_NTASKS > 1 without RANK: each task would train alone; one torchrun "
                         "per node starts them together, see multi_gpu_train.slurm")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    mps = torch.backends.mps.is_available() and world_size == 1  # gloo cannot reach it
    if device == "auto":
        device = "cuda" if gpus else "mps" if mps else "cpu"
    if backend == "auto":
        backend = "nccl" if device == "cuda" and dist.is_nccl_available() else "gloo"
    if (device == "cuda" and gpus == 0) or (device == "mps" and not mps) or (
            backend == "nccl" and (device != "cuda" or local_rank >= gpus)):
        raise ValueError(f"--device={device} --backend={backend} needs a GPU per process, here are "
                         f"{gpus}; start fewer processes, or take --device=cpu --backend=gloo")
    if device == "cuda":
        device = f"cuda:{local_rank % gpus}"  # under gloo, processes may share a GPU
        torch.cuda.set_device(device)
    if world_size > 1:
        # Its own timeout is no limit: with a broken network, torch may wait 15 minutes more.
        faulthandler.dump_traceback_later(timeout_seconds + 5, exit=True)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds),
                                device_id=torch.device(device) if backend == "nccl" else None)
        faulthandler.cancel_dump_traceback_later()
    return rank, world_size, torch.device(device)
# End of copied block: setup_distributed

# Copied between scripts: on_rank_0
def on_rank_0(action, *arguments):
    """Run action on rank 0 while the others wait. All return its result, or raise its error: a
    missing file ends every process at once and leaves none waiting."""
    result, problem = None, None
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            result = action(*arguments)
        except (OSError, ValueError) as error:
            problem = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome := [result, problem], src=0)
        result, problem = outcome
    if problem:
        raise ValueError(problem)
    return result
# End of copied block: on_rank_0

# Copied between scripts: sum_over_ranks
def sum_over_ranks(device, *values):
    """Numbers, or tensors of one number, each added up over all ranks; every rank gets the sums."""
    totals = [float(value) for value in values]
    if dist.is_initialized():
        totals = torch.tensor(totals, dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        totals = totals.tolist()
    return totals
# End of copied block: sum_over_ranks

# Copied between scripts: atomic_file
@contextmanager
def atomic_file(path, mode="wb", previous=None):
    """Open a file that gets its name only when it is whole and on disk, never half of it. What had
    the name before is kept as previous, if that is given."""
    unfinished = Path(f"{path}.unfinished")
    try:
        with unfinished.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as problem:  # torch.save() raises the latter on a full disk
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written, is there space? {problem}") from problem
    if previous and path.exists():
        os.replace(path, previous)
    unfinished.replace(path)
# End of copied block: atomic_file

# Copied between scripts: atomic_folder
@contextmanager
def atomic_folder(path):
    """A new, empty folder that gets its name, and replaces what has it, only when it is filled."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
    except Exception as problem:  # on a full disk, libraries raise many kinds
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{path} cannot be written, is there space? {problem}") from problem
# End of copied block: atomic_folder

# Copied between scripts: claim_output_dir
def claim_output_dir(output_dir, lock, may_exist):
    """Lock output_dir until this process ends, however it ends; refuse to overwrite a result. When
    torchrun restarts a run, what it finds is its own, unless the run was refused before."""
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--output_dir={output_dir} is in use by another run") from None
    found = [*output_dir.glob("checkpoint*.pt"), *output_dir.glob("final_model")]
    refused, restarts = output_dir / ".refused", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if found and not may_exist and (restarts == "0" or refused.exists()):
        refused.touch()
        raise ValueError(f"{found[0]} exists: --resume goes on with it, --overwrite replaces it")
    refused.unlink(missing_ok=True)
# End of copied block: claim_output_dir

# Copied between scripts: load_checkpoint
def load_checkpoint(*paths):
    """The first of the files that is a whole checkpoint, None where there is no file; ValueError if
    all are damaged. The zip file's checksums are compared, which torch.load alone does not do."""
    for path in (paths := [path for path in paths if path.exists()]):
        try:
            if zipfile.ZipFile(path).testzip():
                raise zipfile.BadZipFile("checksum")
            checkpoint = torch.load(  # mapped: the processes share one copy, 17 GB at 1.4 billion
                path, map_location="cpu", weights_only=True, mmap=torch.cuda.is_available())
            if not {"progress", "identity"} <= checkpoint.keys():
                raise ValueError("another kind of file")
            return checkpoint
        except Exception as problem:  # a damaged file can raise anything
            print(f"{path} is damaged and not used: {type(problem).__name__}", file=sys.stderr)
    if paths:
        raise ValueError(f"{paths[0]} cannot be read; --overwrite starts afresh")
# End of copied block: load_checkpoint

# Copied between scripts: save_checkpoint
def save_checkpoint(output_dir, progress, identity, **parts):
    """Write checkpoint.pt and keep the one before: how far the run is ({"step": ...}), its identity
    (what a run that goes on must agree in), and the states of its parts (model, optimizer, ...)."""
    states = {name: part.state_dict() for name, part in parts.items()}
    previous = output_dir / "checkpoint.previous.pt"
    with atomic_file(output_dir / "checkpoint.pt", previous=previous) as file:
        torch.save({"progress": progress, "identity": identity} | states, file)
# End of copied block: save_checkpoint

# Copied between scripts: restore
def restore(output_dir, resume, identity, device, **parts):
    """Put the last checkpoint into the parts and return its progress. Where there is none, or none
    is wanted, remove what an earlier run left and return None. ValueError for another run's."""
    paths = output_dir / "checkpoint.pt", output_dir / "checkpoint.previous.pt"
    checkpoint = load_checkpoint(*paths) if resume else None
    step = checkpoint["progress"]["step"] if checkpoint else 0
    if checkpoint and (other := dict(checkpoint["identity"].items() - identity.items())):
        raise ValueError(f"checkpoint.pt is of a run with {other}: take these, or --overwrite")
    ranks, steps = sum_over_ranks(device, 1, step)
    if steps != ranks * step:
        raise ValueError(f"the processes read different checkpoints: is {output_dir} shared?")
    for name, part in parts.items() if checkpoint else ():
        part.load_state_dict(checkpoint[name])
    if int(os.environ.get("RANK", 0)) == 0:
        for path in () if resume else (*paths, output_dir / "final_model", output_dir / "runs"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if resume:
            print(f"resumed from step {step} of {output_dir}", flush=True)
    return checkpoint and checkpoint["progress"]
# End of copied block: restore

# Copied between scripts: catch_stop_signals
def catch_stop_signals():
    """A list that grows when a signal asks this process to stop: SIGTERM and SIGUSR1 come from
    Slurm and spot machines, SIGINT from Ctrl-C."""
    received = []
    for name in {"SIGTERM", "SIGUSR1", "SIGINT"} & set(dir(signal)):
        signal.signal(getattr(signal, name), lambda number, frame: received.append(number))
    return received
# End of copied block: catch_stop_signals

# Copied between scripts: explain
def explain(problem):
    """The line for an error that a user can do something about; another one is raised again."""
    text = " ".join(str(problem).split())
    if isinstance(problem, KeyboardInterrupt):
        return "interrupted; --resume goes on from the last checkpoint, if there is one"
    if isinstance(problem, ValueError | OSError):
        return text
    if not isinstance(problem, dist.DistError) and "gloo" not in text:
        raise problem
    operation = traceback.extract_tb(problem.__traceback__)[-1].name.removeprefix("_engine_run_")
    return (f"rank {os.environ.get('RANK', 0)} waited in {operation} for a process that is gone, "
            f"stalls or cannot be reached; --resume goes on from the last checkpoint: {text}")
# End of copied block: explain

# Copied between scripts: leave_group
def leave_group():
    """End together: rank 0 may still be writing."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.3)  # a gloo process that ends within milliseconds of a backward() can abort
        dist.destroy_process_group()
# End of copied block: leave_group

# Copied between scripts: MetricsLog
class MetricsLog:
    """Rank 0's log: the terminal, metrics.jsonl and TensorBoard get the same numbers. What a killed
    run wrote after the step of its checkpoint is cut off first."""
    def __init__(self, output_dir, step):
        path = output_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        with atomic_file(path, "w") as file:  # a line without its end was cut off by a kill
            file.writelines(x for x in lines if x[-1] == "\n" and json.loads(x)["step"] <= step)
        self.file = path.open("a")
        self.board = SummaryWriter(output_dir / "runs", purge_step=step + 1)

    def write(self, metrics):
        record = {key: None if isinstance(x, float) and not math.isfinite(x) else x
                  for key, x in metrics.items()}  # JSON knows neither NaN nor infinity
        print(json.dumps(record), file=self.file, flush=True)
        shown = dict(metrics)
        for key, x in metrics.items():
            if not isinstance(x, list):
                self.board.add_scalar(key, x, metrics["step"])
                shown[key] = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
        self.board.flush()
        print(" | ".join(f"{key} {x}" for key, x in shown.items()), flush=True)
# End of copied block: MetricsLog

# Copied between scripts: learning_rate_at
def learning_rate_at(step, total_steps, highest, warmup_steps, min_lr_ratio):
    """Linear warm-up, then half a cosine to min_lr_ratio * highest at total_steps (Loshchilov and
    Hutter 2017, section 3). Steps count from 1."""
    if step <= warmup_steps:
        return highest * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return highest * (min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)
# End of copied block: learning_rate_at

# Copied between scripts: start_profiler
def start_profiler(output_dir, device):
    """Returns what to call after every step. Steps 5 to 7 from now go to trace.json (to be opened
    in ui.perfetto.dev), and the operations that took longest to the terminal."""
    def show(profiler):
        profiler.export_chrome_trace(str(output_dir / "trace.json"))
        order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
        print(profiler.key_averages().table(sort_by=order, row_limit=12), flush=True)
    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=3, warmup=1, active=3, repeat=1), on_trace_ready=show)
    profiler.start()
    atexit.register(profiler.stop)  # a run that ends sooner: torch would crash at the exit
    return profiler.step
# End of copied block: start_profiler

# Copied between scripts: gpu_metrics
def gpu_metrics(device, world_size):
    """Peak memory of this rank, and the utilization of every rank's GPU in %, if NVML tells it. No
    more on a CPU, where peaks are not counted."""
    if device.type != "cuda":
        return {}
    utilization = [None] * world_size
    with suppress(Exception):  # no nvidia-ml-py, or no answer: no reason to end a training
        utilization[0] = torch.cuda.utilization(device)
    if world_size > 1:
        dist.all_gather_object(utilization, utilization[0])
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"peak_memory_gib": peak, "gpu_utilization": utilization}
# End of copied block: gpu_metrics

# --- Step 1. Goals, and the learning histories of a source algorithm ----------------------------

def split_goals(config):
    """(train, validation, test): lists of goals. With --split_seed 0 the last 8 of test are the
    test goals of github.com/tommyma3/Algorithm_Distillation, which shuffles in the same way."""
    random.Random(config.split_seed).shuffle(goals := list(range(SIZE**2)))
    n_train = len(goals) - config.n_val_goals - config.n_test_goals
    return goals[:n_train], goals[n_train : -config.n_test_goals], goals[-config.n_test_goals :]

def draw_actions(probabilities, chance):
    """Actions (...) from probabilities (..., 5) and uniform random numbers (...): these alone
    decide, so that results depend neither on the batch nor on the number of processes."""
    sums = torch.stack([*itertools.accumulate(probabilities.unbind(-1))], -1)  # the same every time
    return (chance[..., None] > sums).sum(-1).clamp(max=N_ACTIONS - 1)

def source_histories(goals, config):
    """Play --source on every goal in n_streams environments. Returns states and outcomes, uint8,
    each (goals * streams, episodes * 20). pg: an actor-critic with a table of logits and of values
    for each goal, which all streams of the goal share: each learns from what any of them found."""
    G, S, E = len(goals), config.n_streams, config.n_source_episodes
    goal, row = torch.tensor(goals)[:, None], torch.arange(G)[:, None]
    rng, history = torch.Generator().manual_seed(config.seed), []
    logits = torch.zeros(G, SIZE**2, N_ACTIONS, requires_grad=True)
    values = torch.zeros(G, SIZE**2, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    reached = DISTANCE[goals][:, NEXT_STATE]  # how far each action leads from each goal
    best = (reached == reached.amin(-1, keepdim=True)).float()
    for episode in range(E):
        noise = max(0, 1 - episode / (0.9 * E))
        noisy = (1 - noise) * best / best.sum(-1, keepdim=True) + noise / N_ACTIONS
        policy = noisy if config.source == "noise" else logits.detach().softmax(-1)
        state, steps = torch.full((G, S), CENTRE), []
        for _ in range(HORIZON):
            action = draw_actions(policy[row, state], torch.rand(G, S, generator=rng))
            next_state = NEXT_STATE[state, action]
            steps.append(torch.stack([state, action, next_state == goal]))
            state = next_state
        states, actions, rewards = torch.stack(steps, dim=-1)  # each (G, S, 20)
        history.append(torch.stack([states, actions + N_ACTIONS * rewards]).to(torch.uint8))
        if config.source == "pg":
            returns = rewards.flip(-1).cumsum(-1).flip(-1)  # from each step to the episode's end
            # gather, whose gradient, unlike that of an index, is the same for any number of threads
            index = states.flatten(1)
            value = values.gather(1, index).view_as(returns)
            chosen = index * N_ACTIONS + actions.flatten(1)
            log_policy = logits.log_softmax(-1).flatten(1).gather(1, chosen).view_as(returns)
            loss = (value - returns).square() / 2 - (returns - value.detach()) * log_policy
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    return torch.cat(history, dim=-1).flatten(1, 2)

def prepare_histories(config, folder):
    """Make the histories once, into a file named by a hash of all that went in: "states" and
    "outcomes" of the training goals; "source_returns" (81, episodes) of all goals, only to be
    compared with. Returns the path."""
    names = "source", "n_streams", "n_source_episodes", "n_val_goals", "n_test_goals", "split_seed"
    settings = {name: getattr(config, name) for name in (*names, "seed")}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    path, began = folder / f"histories_{digest[:16]}.pt", time.perf_counter()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.lock")
        lock.acquire()  # another run may just be making them
    if path.exists():
        with suppress(Exception):  # a foreign file can raise anything
            if torch.load(path, weights_only=True)["settings"] == settings:
                return path
        raise ValueError(f"{path} does not hold the histories of that name; delete it, they are "
                         "made again in seconds")
    train_goals, val_goals, test_goals = split_goals(config)
    goals = [*train_goals, *val_goals, *test_goals]
    states, outcomes = source_histories(goals, config)
    seconds, n = time.perf_counter() - began, len(train_goals) * config.n_streams
    print(f"{states.numel():,} steps of {config.source} on {len(goals)} goals in {seconds:.1f} s: "
          f"{states.numel() / seconds:,.0f} a second", flush=True)
    rewards = (outcomes // N_ACTIONS).view(len(goals), config.n_streams, -1, HORIZON)
    source_returns = torch.empty(len(goals), config.n_source_episodes)
    source_returns[goals] = rewards.sum(-1).float().mean(dim=1)
    with atomic_file(path) as file:
        torch.save({"settings": settings, "states": states[:n].clone(),
                    "outcomes": outcomes[:n].clone(), "source_returns": source_returns}, file)
    return path

# --- Step 2. Windows of whole episodes -----------------------------------------------------------

class HistoryWindows:
    """Windows of n_transit steps, each inside one stream; they begin with every episode."""
    def __init__(self, states, outcomes, n_transit):
        self.states, self.outcomes, self.n_transit = states, outcomes, n_transit
        self.per_stream = (states.shape[1] - n_transit) // HORIZON + 1

    def __len__(self):
        return len(self.states) * self.per_stream

    def batch(self, numbers):
        """Returns states, previous outcomes and actions, each (len(numbers), n_transit), int64."""
        numbers = torch.as_tensor(numbers, device=self.states.device)[:, None]
        stream, first = numbers // self.per_stream, numbers % self.per_stream * HORIZON
        time = first + torch.arange(self.n_transit, device=numbers.device)
        outcomes = self.outcomes[stream, time].long()
        previous = F.pad(outcomes[:, :-1], (1, 0), value=NO_OUTCOME)
        return self.states[stream, time].long(), previous, outcomes % N_ACTIONS

# --- Step 3. The model ---------------------------------------------------------------------------

class HistoryModel(nn.Module):
    """A causal transformer with one token per step: where the agent is, what it did before, what
    that brought, and the place in the window. It predicts what the source does next."""
    def __init__(self, config):
        super().__init__()
        D = config.tf_n_embd
        cfg = {"emb_dim": D, "n_heads": config.tf_n_head, "drop_rate": 0.0, "qkv_bias": False}
        sizes = {"x": SIZE, "y": SIZE, "outcome": NO_OUTCOME + 1, "time": config.n_transit}
        self.emb = nn.ModuleDict({name: nn.Embedding(size, D) for name, size in sizes.items()})
        self.blocks = nn.ModuleList(common.TransformerBlock(cfg) for _ in range(config.tf_n_layer))
        self.final_norm, self.head = nn.LayerNorm(D), nn.Linear(D, N_ACTIONS)
        for embedding in self.emb.values():
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, states, previous, actions=None, cache=None):
        """(B, T) -> logits (B, T, 5); with actions (B, T) -> their *summed* cross-entropy in nats.
        cache: one dict per block, empty at the start (see common.MultiHeadAttention)."""
        past, T = cache[0]["keys"].shape[2] if cache and cache[0] else 0, states.shape[1]
        x = self.emb.x(states // SIZE) + self.emb.y(states % SIZE) + self.emb.outcome(previous)
        x = x + self.emb.time.weight[past : past + T]
        for i, block in enumerate(self.blocks):
            x = block(x, cache[i] if cache else None)
        logits = self.head(self.final_norm(x)).float()
        if actions is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="sum")

# --- Step 4. Reinforcement learning in context: the weights stay as they are ---------------------

@torch.no_grad()
def play(model, pairs, config, device):
    """One environment for each pair (goal, rollout), all side by side. Returns the states that the
    actions lead to, (pairs, episodes, 20).

    Keys and values of past steps are cached, so that a step costs one token and not a window. When
    the window is full, its older half is dropped and the rest, in its new places, encoded afresh.
    To move on by one episode at a time takes 2.5 times as long and brings the same returns."""
    n_steps, kept = config.n_episodes * HORIZON, config.n_transit // HORIZON // 2 * HORIZON
    chance = torch.from_numpy(np.stack([
        np.random.default_rng([config.seed, *pair]).random(n_steps, np.float32) for pair in pairs]))
    chance, goal = chance.to(device), torch.tensor(pairs, device=device)[:, 0]
    next_state, first, cache = NEXT_STATE.to(device), 0, [{} for _ in model.blocks]
    states = torch.full((len(pairs), n_steps + 1), CENTRE, device=device)
    previous, reached = torch.full_like(states, NO_OUTCOME), torch.zeros_like(states)
    for t in range(n_steps):
        new, outcomes = slice(t, t + 1), previous[:, t : t + 1]
        if t == first + config.n_transit:
            first, cache = t - kept, [{} for _ in model.blocks]
            new = slice(first, t + 1)
            outcomes = F.pad(previous[:, first + 1 : t + 1], (1, 0), value=NO_OUTCOME)
        logits = model(states[:, new], outcomes, cache=cache)[:, -1]
        action = draw_actions((logits / config.temperature).softmax(-1), chance[:, t])
        reached[:, t] = state = next_state[states[:, t], action]
        previous[:, t + 1] = action + N_ACTIONS * (state == goal)
        states[:, t + 1] = CENTRE if (t + 1) % HORIZON == 0 else state
    return reached[:, :-1].unflatten(1, (config.n_episodes, HORIZON))

def roll_out(model, goals, n_rollouts, config, rank, world_size, device):
    """Every rank plays its share of the rollouts; the sum over ranks puts the table together.
    Returns (goals, rollouts, episodes, 20): the states that the actions led to."""
    pairs = list(itertools.product(goals, range(n_rollouts)))
    reached = torch.zeros(len(pairs), config.n_episodes, HORIZON, dtype=torch.long, device=device)
    mine = range(rank, len(pairs), world_size)
    model.eval()
    for first in range(0, len(mine), config.test_batch_size):
        numbers = mine[first : first + config.test_batch_size]
        reached[numbers] = play(model, [pairs[i] for i in numbers], config, device)
    model.train()
    if world_size > 1:
        dist.all_reduce(reached)
    return reached.cpu().unflatten(0, (len(goals), n_rollouts))

# --- Step 5. Results and pictures -----------------------------------------------------------------

def summarise(name, goals, reached, source_returns):
    """What results.json says about some goals. Prints a line of it on rank 0."""
    returns = (reached == torch.tensor(goals)[:, None, None, None]).sum(-1).double()
    per_goal, curve = returns[..., -10:].mean(dim=(1, 2)), returns.mean(dim=(0, 1)).tolist()
    result = {"last10": per_goal.mean().item(), "worst_goal": per_goal.min().item(),
              "random": RANDOM[goals].mean().item(),
              "source_last10": source_returns[goals, -10:].mean().item(),
              "optimum": OPTIMUM[goals].mean().item()}
    if int(os.environ.get("RANK", 0)) == 0:
        shown = [e for e in (1, 2, 5, 10, 20, 40, 60) if e <= len(curve)]
        print(f"{name}: return", *(f"{curve[e - 1]:.2f}" for e in shown), f"in episodes {shown}",
              *(f"| {key} {value:.2f}" for key, value in result.items()), flush=True)
    return result | {"goals": [divmod(goal, SIZE) for goal in goals], "return_per_episode": curve,
                     "last10_per_goal": per_goal.tolist()}

def draw_returns(results, source_curve, records, path):
    """The picture of this lesson: the return per episode, and when in training it appeared."""
    left, right = Figure(figsize=(11, 4.2), layout="constrained").subplots(1, 2)
    for label, curve, style in (
            ("held-out goals", results["held_out"]["return_per_episode"], "C0-"),
            ("training goals", results["train"]["return_per_episode"], "C1-"),
            ("source, learning in all streams", source_curve, "C2--")):
        left.plot(range(1, len(curve) + 1), curve, style, label=label)
    for key, color in (("optimum", "k"), ("source_last10", "C2"), ("random", "C7")):
        left.axhline(results[key], color=color, ls=":", label=f"{key}: {results[key]:.2f}")
    left.set(xlabel="episode, with fixed weights", ylabel="return per episode", ylim=(0, 20))
    left.legend(loc="lower right")
    for axes, key, style in ((right, "val_return", "C0o-"), (right.twinx(), "train_loss", "C3-")):
        points = [(metrics["step"], metrics[key]) for metrics in records if key in metrics]
        axes.plot(*np.reshape(points, (-1, 2)).T, style)
        axes.set_ylabel({"val_return": "return, last 10 episodes, validation goals",
                         "train_loss": "train_loss (nats per action)"}[key], color=style[:2])
    right.set(xlabel="optimizer step", ylim=(0, 20))
    left.figure.savefig(path, dpi=150)

def draw_paths(goal, episodes, path):
    """The agent's way in up to four episodes of one rollout, (episodes, 20)."""
    shown = [number for number in (1, 5, 20, 60) if number <= len(episodes)]
    panels = Figure(figsize=(11, 3.2), layout="constrained").subplots(1, len(shown), squeeze=False)
    for axes, number in zip(panels[0], shown, strict=True):
        states = np.array([CENTRE, *episodes[number - 1]])
        drift = np.linspace(-0.3, 0.3, len(states))  # so that ways back do not hide ways there
        axes.plot(states // SIZE + drift, states % SIZE + drift, "C0.-", linewidth=1)
        axes.plot(*divmod(goal, SIZE), "C3*", markersize=16, zorder=0)
        axes.set(title=f"episode {number}: return {(states == goal).sum()}", aspect="equal",
                 xticks=np.arange(SIZE) - 0.5, xlim=(-0.5, SIZE - 0.5), xticklabels=[],
                 yticks=np.arange(SIZE) - 0.5, ylim=(-0.5, SIZE - 0.5), yticklabels=[])
        axes.tick_params(length=0)
        axes.grid(alpha=0.3)
    axes.figure.savefig(path, dpi=150)

def export_results(config, best, goals, reached, source_returns):
    """Rank 0's last duty: results.json, the pictures, and final_model/, whole or not there."""
    output_dir, n = Path(config.output_dir), config.n_test_goals
    parts = {"held_out": slice(n), "train": slice(n, None)}
    if config.split_seed == 0 and n >= 8:
        parts["public_8"] = slice(n - 8, n)  # see split_goals
    results = {name: summarise(name, goals[part], reached[part], source_returns)
               for name, part in parts.items()}
    for key in ("random", "source_last10", "optimum"):
        results[key] = results["held_out"][key]
    results |= {"step": best["step"], "temperature": config.temperature, "seed": config.seed}
    with atomic_file(output_dir / "results.json", "w") as file:
        json.dump(results, file, indent=1)
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    source_curve = source_returns[goals[:n]].mean(dim=0)
    draw_returns(results, source_curve, records, output_dir / "in_context_return.png")
    farthest = OPTIMUM[goals[:n]].argmin()
    draw_paths(goals[farthest], reached[farthest, 0], output_dir / "paths.png")
    with atomic_folder(output_dir / "final_model") as folder:
        save_file(best["model"], folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    return results["held_out"]

# --- Step 6. Training ---------------------------------------------------------------------------

def distill_algorithm(config):
    """Returns the exit code: 0, or 143 after a signal that asked to stop."""
    rank, world_size, device = setup_distributed(
        config.device, config.backend, config.timeout_seconds)
    is_main, on_gpu, output_dir = rank == 0, device.type == "cuda", Path(config.output_dir)
    precision, launched = config.mixed_precision, os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision) or (precision == "fp16" and not on_gpu):
        raise ValueError(f"--mixed_precision={precision} on {device.type}, where accelerate launch "
                         f"says {launched}: take the same in both; fp16 needs a CUDA GPU")
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; on every rank, like every setting
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not
        torch.use_deterministic_algorithms(True)
    output_dir.mkdir(parents=True, exist_ok=True)
    resume = config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    lock = filelock.FileLock(output_dir / ".lock")  # rank 0 holds it as long as this name lives
    on_rank_0(claim_output_dir, output_dir, lock, config.resume or config.overwrite)

    global_batch_size = config.train_batch_size * config.gradient_accumulation_steps * world_size
    tokens_per_step = global_batch_size * config.n_transit
    if is_main:
        kind = "NO" if world_size == 1 else "MULTI_GPU" if on_gpu else "MULTI_CPU"
        print(f"Number of processes: {world_size}\nDistributed type: {kind}\n"
              f"Mixed precision: {precision}\nGradient accumulation steps: "
              f"{config.gradient_accumulation_steps}\nMain process device: {device}\n"
              f"{config.train_batch_size} windows x {config.gradient_accumulation_steps} "
              f"micro-batches x {world_size} processes = {global_batch_size} windows, x "
              f"{config.n_transit} transitions = {tokens_per_step:,} tokens a step", flush=True)
    history_file = on_rank_0(prepare_histories, config, Path(config.cache_dir or output_dir))
    histories = torch.load(history_file, map_location=device, weights_only=True)
    windows = HistoryWindows(histories["states"], histories["outcomes"], config.n_transit)
    source_returns = histories["source_returns"].cpu()
    train_goals, val_goals, test_goals = split_goals(config)
    if global_batch_size > len(windows):
        raise ValueError(f"a step takes {global_batch_size} of {len(windows)} windows: lower "
                         "--train_batch_size or start fewer processes")

    torch.manual_seed(config.seed)
    model = HistoryModel(config).to(device)
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    best = {"step": 0, "val_return": -1.0, "model": deepcopy(model.state_dict())}
    identity = dict(itertools.takewhile(lambda item: item[0] != "preset", asdict(config).items()))
    identity |= {"global batch": global_batch_size}
    restored = restore(output_dir, resume, identity, device, **parts)
    fresh, progress = restored is None, restored or {"step": 0, "best": best}
    start_step, best = progress.values()
    finished = not fresh and start_step >= config.max_steps and (
        output_dir / "final_model").exists()
    if is_main and not finished:
        if fresh:
            (output_dir / "results.json").unlink(missing_ok=True)
        log = MetricsLog(output_dir, -1 if fresh else start_step)

    # DDP hooks into backward(): as soon as a bucket of gradients is ready, its average over the
    # ranks is on its way while earlier layers are still being differentiated. Rollouts use the
    # plain model, so that no rank waits for another before its share is played.
    network, no_sync = model, nullcontext
    if world_size > 1:
        for weight in model.parameters():  # DDP moves these into its buckets: one copy
            weight.grad = torch.zeros_like(weight)
        network = DDP(model, [device] if on_gpu else None, gradient_as_bucket_view=True)
        no_sync = network.no_sync
    autocast = partial(torch.autocast, device.type, enabled=precision != "no",
                       dtype=torch.float16 if precision == "fp16" else torch.bfloat16)
    roll_outs = partial(roll_out, model, config=config, rank=rank, world_size=world_size,
                        device=device)
    stop_signals = catch_stop_signals()
    after_step = start_profiler(output_dir, device) if config.profile and is_main else lambda: None
    began, saved_step, stop = time.perf_counter(), start_step, 0
    loss_sum, loss_steps, seconds, timed_steps = 0.0, 0, 0.0, 0

    for step in range(start_step + 1, config.max_steps + 1):
        started, step_loss = time.perf_counter(), torch.zeros((), device=device)
        learning_rate = learning_rate_at(step, config.max_steps, config.learning_rate,
                                         config.warmup_steps, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # Every rank knows the whole global batch and takes its own slice of each micro-batch.
        rng = np.random.default_rng([config.seed, step])
        numbers = rng.integers(len(windows), size=global_batch_size)
        for micro_step in range(config.gradient_accumulation_steps):
            first = (micro_step * world_size + rank) * config.train_batch_size
            batch = windows.batch(numbers[first : first + config.train_batch_size])
            # DDP averages gradients in the last backward() of a step only (see lesson 02).
            synchronise = micro_step == config.gradient_accumulation_steps - 1
            with nullcontext() if synchronise else no_sync():
                with autocast():
                    loss = network(*batch)
                # loss is a sum over this slice; the mean over the global batch is the sum over
                # ranks and micro-batches over tokens_per_step; world_size undoes DDP's division.
                scaler.scale(loss * (world_size / tokens_per_step)).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), config.max_grad_norm or math.inf).item()
        step_loss, stop = sum_over_ranks(device, step_loss, len(stop_signals))
        # In fp16 the scaler leaves out a step whose gradient overflows, and lowers its factor; a
        # loss that is not finite comes from the forward pass, where no factor helps.
        if not math.isfinite(step_loss + (0 if precision == "fp16" else grad_norm)):
            raise ValueError(f"step {step}: loss {step_loss / tokens_per_step}, gradient norm "
                             f"{grad_norm}; the last good checkpoint is of step {saved_step}"
                             + ("; take --mixed_precision bf16" if precision == "fp16" else ""))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=world_size == 1)
        loss_sum, loss_steps = loss_sum + step_loss, loss_steps + 1
        if step > start_step + 3:  # warm-up is not counted
            seconds, timed_steps = seconds + time.perf_counter() - started, timed_steps + 1
        after_step()

        last = step == config.max_steps
        evaluate_now = step % config.eval_every == 0 or last
        save_now = step % config.save_every == 0 or last or stop
        if evaluate_now or save_now or step % config.log_every == 0:
            metrics = {"step": step, "epoch": step * global_batch_size / len(windows),
                       "tokens_seen": step * tokens_per_step,
                       "train_loss": loss_sum / (loss_steps * tokens_per_step),
                       "learning_rate": learning_rate, "grad_norm": grad_norm}
            if timed_steps:
                metrics["tokens_per_second"] = timed_steps * tokens_per_step / seconds
            metrics |= gpu_metrics(device, world_size)
            if evaluate_now:
                # Twice the rollouts: what is chosen by a noisy number is chosen for its noise.
                reached = roll_outs(val_goals, 2 * config.n_rollouts)
                result = summarise("validation", val_goals, reached, source_returns)
                metrics["val_return"] = val_return = result["last10"]
                if val_return > best["val_return"]:
                    best = {"step": step, "val_return": val_return,
                            "model": deepcopy(model.state_dict())}
            loss_sum, loss_steps, seconds, timed_steps = 0.0, 0, 0.0, 0
            if is_main:
                log.write(metrics)
        if save_now:
            if is_main:
                progress = {"step": step, "best": best}
                save_checkpoint(output_dir, progress, identity, **parts)
            saved_step = step
        if stop:
            break

    # A signal during the last validation stops here; from here on, Ctrl-C does at once.
    stop = stop or sum_over_ranks(device, len(stop_signals))[0]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stop:
        end = f"stopped by a signal after step {saved_step}; --resume goes on from there"
    elif finished:
        end = f"this run is finished: {output_dir}/final_model"
    else:
        model.load_state_dict(best["model"])
        goals = [*test_goals, *train_goals[: len(test_goals)]]
        reached = roll_outs(goals, config.n_rollouts)
        held_out = on_rank_0(export_results, config, best, goals, reached, source_returns)
        minutes = (time.perf_counter() - began) / 60
        end = (f"done: return {held_out['last10']:.2f} on {len(test_goals)} unseen goals, worst "
               f"{held_out['worst_goal']:.2f}, in {minutes:.1f} min; {output_dir} has final_model, "
               "results.json, in_context_return.png, paths.png, metrics.jsonl, runs")
    if is_main:
        print(end, flush=True)
    leave_group()
    return 143 if stop else 0

@record
def main():
    try:
        sys.exit(distill_algorithm(parse_config(Config, PRESETS)))
    except torch.OutOfMemoryError:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        message = (f"out of GPU memory, {total - free:.1f} of {total:.1f} GiB are taken; half the "
                   "--train_batch_size with twice the --gradient_accumulation_steps keeps the "
                   "global batch")
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as problem:
        message = explain(problem)
    sys.stderr.write(f"error: {message}\n")  # in one piece: other ranks write here too
    (os._exit if dist.is_initialized() else sys.exit)(1)  # gloo's threads can abort a plain exit

if __name__ == "__main__":
    main()
