"""05 - Instruction-tune a chat model with DistributedDataParallel (DDP).

You learn   what a chat template is, and how it tells the tokens that are learned from those that
            are given; why a loss over several GPUs is divided by the tokens of the global batch;
            how short conversations share a row without seeing one another; when a model stops
Run it      torchrun --nproc_per_node=4 05_sft_multigpu.py             # SmolLM2-135M, 1000 steps
            torchrun --nproc_per_node=2 05_sft_multigpu.py --dataset chats.jsonl --batch_size 8 \
            --model gpt_output/final_model --num_epochs 4 --learning_rate 2e-3 --precision fp32
Expect      done: val_loss 2.654 -> 1.524, val_token_accuracy 0.3628 -> 0.5645, ... in 1.5 min; ...
            (02's tiny model, README's chats.jsonl; 2 CPU cores, Python 3.11, torch 2.13.0, 2026-11)
Reads       --dataset: a set of the Hugging Face hub, or JSONL, JSON, Parquet with messages,
            conversations (ShareGPT), prompt and response, or instruction, input and output
Writes      sft_output_multigpu/{metrics.jsonl, loss.png, loss.pdf, answers_before.jsonl,
            answers_after.jsonl, runs/, checkpoint.pt, final_model/}
If it hangs NCCL_DEBUG=INFO TORCH_DISTRIBUTED_DEBUG=DETAIL names the operation that waits
Sources     Ouyang et al. 2022 (arXiv:2203.02155, section 3: supervised fine-tuning); Ben Allal et
            al. 2025 (arXiv:2502.02737: SmolLM2); Krell et al. 2021 (arXiv:2107.02027: packing)
"""

import atexit
import bisect
import faulthandler
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import filelock
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import yaml
from matplotlib.figure import Figure
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

# The layout of a conversation for a tokenizer that has none. What stands between generation and
# endgeneration is learned: the answer, and the token that ends it.
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' "
          "%}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
          "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # others have the names that we use

@dataclass(frozen=True)
class Config:
    """Every field is a flag."""
    # What a run is: a resumed run must agree in all fields from here to config.
    model: str = HfArg(default="HuggingFaceTB/SmolLM2-135M", help="folder or hub name")
    dataset: str = HfArg(default="HuggingFaceTB/smoltalk", help="file, folder or hub name")
    dataset_config: str = HfArg(default="", help="part of a dataset of the hub; smoltalk's is "
                                "everyday-conversations if nothing is said")
    validation_file: str = HfArg(default="", help="file of held-out chats, instead of val_fraction")
    val_fraction: float = HfArg(default=0.1, help="share of rows held out; 0: judge on training's")
    max_length: int = HfArg(default=1024, help="tokens of a row; longer chats lose turns")
    packing: bool = HfArg(default=False, help="whole chats share a row of max_length tokens")
    num_epochs: int = HfArg(default=0, help="passes over the training rows; 0: 1000 steps instead")
    max_steps: int = HfArg(default=-1, help="optimizer steps, instead of epochs; 0 = only evaluate")
    learning_rate: float = HfArg(default=5e-5, help="highest learning rate")
    warmup_steps: int = HfArg(default=10, help="linear warm-up; half a cosine follows")
    weight_decay: float = HfArg(default=0.01, help="AdamW's, on matrices only")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are cut to this norm; 0 = never")
    fp16: bool = HfArg(default=False, help="short for --precision fp16")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = HfArg(default="auto", help="of autocast")
    seed: int = HfArg(default=0, help="fixes the split, data order and dropout")
    # What may change; only batch_size x gradient_accumulation_steps x processes must stay.
    config: str = HfArg(default="", help="YAML file of flags; the command line wins over it")
    output_dir: str = HfArg(default="./sft_output_multigpu", help="folder for all that is written")
    overwrite: bool = HfArg(default=False, help="replace the run that output_dir holds")
    resume: bool = HfArg(default=False, help="go on from output_dir's checkpoint")
    push_to_hub: str = HfArg(default="", help="name of a private repository; needs HF_TOKEN")
    batch_size: int = HfArg(default=2, help="rows per process and micro-batch")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches per optimizer step")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, more time")
    device: Literal["auto", "cpu", "cuda", "mps"] = HfArg(default="auto", help="where to compute")
    backend: Literal["auto", "nccl", "gloo"] = HfArg(default="auto", help="auto: nccl on GPUs")
    timeout_seconds: int = HfArg(default=1800, help="longest wait for another rank")
    deterministic: bool = HfArg(default=False, help="the same bits again on a GPU, but slower")
    profile: bool = HfArg(default=False, help="where steps 5 to 7 take their time: trace.json")
    log_every: int = HfArg(default=10, help="steps")
    eval_every: int = HfArg(default=100, help="steps")
    save_every: int = HfArg(default=500, help="steps from checkpoint to checkpoint")
    prompt: str = HfArg(default="What is the capital of France?", help="asked before and after")
    max_new_tokens: int = HfArg(default=128, help="tokens of an answer, at most")
    max_answers: int = HfArg(default=100, help="held-out prompts answered before and after")

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            low, high = (min(field.default, 1), 10**9) if field.type is int else (0, 1)
            low = {"warmup_steps": 0, "max_length": 2}.get(name, low)
            high = 1e9 if name == "max_grad_norm" else high
            if field.type in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name}={value} must lie between {low} and {high}")
        if self.fp16 and self.precision not in ("auto", "fp16"):
            raise ValueError(f"--fp16 and --precision={self.precision} contradict each other")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other; give one of them")
        if not self.prompt.strip():
            raise ValueError("--prompt is empty; ask something")
        if self.push_to_hub and not os.environ.get("HF_TOKEN"):
            raise ValueError("--push_to_hub needs a token: set HF_TOKEN to one that may write")

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

# Copied between scripts: resolve_precision
def resolve_precision(precision, device):
    """auto: what accelerate launch was told, else bf16 where the hardware has it, else fp32."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").replace("no", "auto")
    if "auto" not in (precision, launched) and precision != launched:
        raise ValueError(f"--precision={precision}, but accelerate launch was told {launched}")
    precision = launched if precision == "auto" else precision
    if precision == "fp16" and device.type != "cuda":
        raise ValueError("--precision=fp16 needs a CUDA GPU; use bf16 or fp32")
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = gpu or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return precision if precision != "auto" else "bf16" if bf16 else "fp32"
# End of copied block: resolve_precision

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

# Copied between scripts: plot_metrics
def plot_metrics(output_dir, keys, ylabel):
    """Axes with these keys of metrics.jsonl over the steps, also those before a resume."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").open()]
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    for key in keys:
        points = [(metrics["step"], metrics[key]) for metrics in records if key in metrics]
        style = "o-" if key.startswith("val_") else "-"
        axes.plot(*np.reshape(points, (-1, 2)).T, style, label=key)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.legend()
    return axes
# End of copied block: plot_metrics

# --- Step 1. Chats of any of the usual forms become messages ------------------------------------

def open_dataset(source, dataset_config=""):
    """[(place, row)] of a JSONL, JSON or Parquet file, of a folder with one such file or one named
    train*, or of the train split of a set on the hub. A row of JSONL is the bytes of its line."""
    path = Path(source)
    if path.is_dir():
        files = sorted(x for x in path.iterdir() if x.suffix in (".jsonl", ".json", ".parquet"))
        train = [x for x in files if x.stem.startswith("train")] or files
        if len(train) != 1:
            raise ValueError(f"{source} holds {', '.join(x.name for x in files) or 'no JSONL'}: "
                             "name the one file to train on")
        path = train[0]
    if path.suffix == ".jsonl":
        return [(f"{path}:{n}", line) for n, line in enumerate(open(path, "rb"), 1) if line.strip()]
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_bytes())
            if not isinstance(rows, list):
                raise ValueError("it must hold one list of rows; with one a line, name it .jsonl")
        else:
            import datasets  # only here: JSONL and JSON do without
            datasets.disable_progress_bars()
            if path.suffix == ".parquet":
                rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
            else:
                everyday = "everyday-conversations" if source == Config.dataset else None
                rows = datasets.load_dataset(source, dataset_config or everyday, split="train")
    except Exception as problem:  # ImportError, no network, no such name, a damaged file
        cause = " ".join(str(problem).split())[:200]
        raise ValueError(f"{source}: {cause}; a file needs no network: --dataset chats.jsonl"
                         ) from None
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)]

def as_messages(row):
    """(messages, form) of a row of any of the forms that people use; ValueError for others. An
    empty system message, and what the user says last, unanswered, are left out."""
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object")
    if row.get("messages") is not None:
        form, messages = "messages", [{"role": m["role"], "content": m["content"]}
                                      for m in row["messages"]]
    elif row.get("conversations") is not None:
        form, messages = "conversations (ShareGPT)", [
            {"role": SHAREGPT_ROLES.get(m["from"], m["from"]), "content": m["value"]}
            for m in row["conversations"]]
    elif "prompt" in row and {"response", "completion"} & row.keys():
        answer = "response" if "response" in row else "completion"
        form, messages = f"prompt and {answer}", [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row[answer]}]
        if isinstance(row["prompt"], list):  # TRL's conversational form
            messages = row["prompt"] + row[answer]
    elif "instruction" in row and "output" in row:
        question = [row["instruction"], row.get("input")]
        form, messages = "instruction, input and output", [
            {"role": "user", "content": "\n\n".join(filter(None, question))},
            {"role": "assistant", "content": row["output"]}]
    else:
        raise ValueError("there are no messages, conversations, prompt and response, or "
                         f"instruction and output, but {', '.join(row) or 'nothing'}")
    roles = [m["role"] for m in messages]
    if row.get("system") and "system" not in roles:  # a column of its own
        messages.insert(0, {"role": "system", "content": row["system"]})
    elif roles[:1] == ["system"] and not messages[0]["content"]:
        del messages[0]
    if "assistant" in roles and roles[-1] == "user":
        del messages[-1]
    roles = [m["role"] for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise ValueError("the conversation is empty")
    if "assistant" not in turns:
        raise ValueError("there is no assistant turn to learn from")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"the roles are out of order: {', '.join(map(str, roles))}; wanted are "
                         "user and assistant by turns, after at most one system message")
    if not all(isinstance(m["content"], str) and m["content"].strip().encode() for m in messages):
        raise ValueError("a message is empty, or no text")
    return messages, form

def load_chats(source, dataset_config=""):
    """([(place, messages)], a line on what was read). Raises ValueError with the first bad row."""
    chats, forms, problems = [], set(), []
    for place, row in open_dataset(source, dataset_config):
        try:
            messages, form = as_messages(json.loads(row) if isinstance(row, bytes) else row)
            chats.append((place, messages))
            forms.add(form)
        except KeyError as problem:
            problems.append(f"{place}: there is no {problem}")
        except (ValueError, TypeError, AttributeError, RecursionError) as problem:
            problems.append(f"{place}: {problem}")
    if problems or not chats:
        raise ValueError(f"{problems[0]} ({len(problems)} bad rows)" if problems
                         else f"{source} is empty")
    return chats, f"{source}: {len(chats)} chats, as {' and '.join(sorted(forms))}"

# --- Step 2. A chat becomes token ids and labels ------------------------------------------------

# Copied between scripts: render
def render(messages, tokenizer, **settings):
    """What the chat template makes of messages; its errors become a ValueError. For a template that
    writes the date it is always the same day: tomorrow a resumed run would have other tokens."""
    date = "{% macro strftime_now(form) %}01 Jan 2026{% endmacro %}"
    try:
        template = date + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, **settings)
    except Exception as problem:  # a template can raise anything
        raise ValueError(f"the chat template fails: {problem}") from None
# End of copied block: render

def mark_turns(messages, tokenizer):
    """(token ids, for each whether the assistant says it) of a conversation. A template may mark
    the assistant's words itself. If it does not, a turn is what the text gains, from the prompt for
    an answer to the text with the answer."""
    if re.search(r"{%-?\s*generation", tokenizer.get_chat_template()):
        marked = render(messages, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
        return marked["input_ids"], marked["assistant_masks"]
    text, turns = render(messages, tokenizer, tokenize=False), []
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = render(messages[:i], tokenizer, tokenize=False, add_generation_prompt=True)
        answered = render(messages[: i + 1], tokenizer, tokenize=False)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise ValueError("the chat template writes a turn in another way once it is answered,"
                             " or once others follow; mark what the assistant says in it by "
                             "{% generation %} and {% endgeneration %}")
        turns.append(range(len(prompt), len(answered.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [
        any(start in turn for turn in turns) for start, _ in encoded["offset_mapping"]]

def encode_chats(chats, tokenizer, max_length):
    """Returns ([(ids, labels)], number of cut chats). labels are ids where the assistant speaks,
    the end of the turn included, and -100 elsewhere. A chat longer than max_length is cut after the
    last turn that fits; None stands where not even the first one does. Nothing is masked by its id:
    where padding and end are one token, the end would never be learned."""
    rows, cut, problems = [], 0, []
    disable = True if os.environ.get("RANK", "0") != "0" else None
    for place, messages in tqdm(chats, "tokenising", delay=2, disable=disable):
        try:
            ids, learned = (np.array(x) for x in mark_turns(messages, tokenizer))
            ends = np.flatnonzero(np.diff(learned.astype(int), append=0) == -1) + 1
            if not len(ends):
                raise ValueError("the chat template marks nothing as the assistant's")
        except (ValueError, NotImplementedError) as problem:  # a tokenizer without offsets
            problems.append(f"{place}: {problem}")
            continue
        end = max(ends[ends <= max_length], default=0)
        cut += 0 < end < ends[-1]
        ids, learned = ids[:end].astype(np.int32), learned[:end] == 1
        rows.append((ids, np.where(learned, ids, np.int32(-100))) if end else None)
    if problems:
        raise ValueError(f"{problems[0]} ({len(problems)} bad rows)")
    return rows, cut

def prepare_tokenizer(model, tokenizer):
    """Give a tokenizer without a chat template ChatML, and the model embeddings for new tokens, the
    mean of the others. Make the token that ends a turn the end token, in tokenizer and model: where
    answers stop. Raises ValueError where the template has no such token."""
    if tokenizer.chat_template is None:
        n, pad = len(tokenizer), tokenizer.pad_token or tokenizer.eos_token
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": pad})
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]}, False)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64,
                                          mean_resizing=False)
        if len(tokenizer) > n:
            with torch.no_grad():
                for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                    table.weight[n:] = table.weight[:n].mean(0)
    question = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [(ids, labels)], _ = encode_chats([("a first try", question)], tokenizer, math.inf)
    special = [*np.flatnonzero((labels != -100) & np.isin(
        ids, list(tokenizer.get_added_vocab().values())))]
    if not special or tokenizer.decode(ids[special[-1] + 1 :]).strip():
        raise ValueError("the chat template ends an answer without a special token, so that a model"
                         " could not learn to stop")
    end = ids[special[-1]].item()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    last, known = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    unused = list(range(last + 1, known))  # ids that are no token
    model.generation_config.suppress_tokens = unused or None

def pack_chats(chats, capacity):
    """Rows, lists of chats that have capacity input tokens or less together: each chat, the longest
    first, goes to the row where it leaves the least room (best-fit decreasing)."""
    rows, rooms = [], []  # rooms: (room left, number of the row), sorted
    for chat in sorted(chats, key=lambda chat: len(chat[0]), reverse=True):
        place = bisect.bisect_left(rooms, (len(chat[0]) - 1,))
        if place == len(rooms):
            rows.append([])
        room, number = rooms.pop(place) if place < len(rooms) else (capacity, len(rows) - 1)
        rows[number].append(chat)
        bisect.insort(rooms, (room - len(chat[0]) + 1, number))
    return rows

def padding_share(lengths, batches, batch_size):
    """Share of the positions of an epoch that hold no token."""
    micro_batches = [[lengths[i] for i in batch[start : start + batch_size] if i is not None]
                     for batch in batches for start in range(0, len(batch), batch_size)]
    return 1 - sum(lengths) / sum(max(x, default=0) * batch_size for x in micro_batches)

def collate_chats(rows):
    """input_ids, targets, position_ids, each (B, T) int64, of rows of chats [(ids, labels)]:
    targets lie one token further, positions start at 0 in each chat. Padding stands on the right,
    and causal attention looks only to the left. A row None is padding alone."""
    lengths = [sum(len(ids) - 1 for ids, _ in row or []) for row in rows]
    input_ids = torch.zeros(len(rows), max(*lengths, 1), dtype=torch.int64)
    targets = torch.full_like(input_ids, -100)
    position_ids = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        start = 0
        for ids, labels in row or []:
            end = start + len(ids) - 1
            input_ids[i, start:end] = torch.from_numpy(ids[:-1])
            targets[i, start:end] = torch.from_numpy(labels[1:])
            position_ids[i, start:end] = torch.arange(end - start)
            start = end
    return input_ids, targets, position_ids

def show_labels(ids, labels, tokenizer):
    """The text of a chat, what is learned in brackets."""
    parts = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100)
    texts = ((learned, repr(tokenizer.decode([i for i, _ in pairs]))) for learned, pairs in parts)
    return "".join(f"[{text[1:-1]}]" if learned else text[1:-1] for learned, text in texts)

# Copied between scripts: split_rows
def split_rows(encoded, val_fraction, seed):
    """Returns (training rows, held-out rows) of those that are not None; with val_fraction 0 all
    rows are both. The held-out rows are the same for any number of processes."""
    rows = [*filter(None, encoded)]
    order = np.random.default_rng(seed).permutation(len(rows))
    n_val = math.ceil(len(rows) * val_fraction)
    if n_val >= len(rows):
        raise ValueError(f"{len(rows)} of {len(encoded)} rows fit into --max_length, which leaves "
                         "none for training: take more rows, raise it, or lower --val_fraction")
    val_rows, train_rows = ([rows[i] for i in part] for part in np.split(order, [n_val]))
    return train_rows, val_rows or train_rows
# End of copied block: split_rows

# Copied between scripts: epoch_batches
def epoch_batches(lengths, batch, seed, epoch):
    """Global batches of row numbers, every row once, the same on every rank: a random order, sorted
    by length within groups of up to 50 batches, so that a batch is short or long as a whole. One
    batch, anywhere in the order, is filled up with None."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    group = batch * max(1, min(50, len(order) // (4 * batch)))
    order = [i for start in range(0, len(order), group)
             for i in sorted(order[start : start + group], key=lengths.__getitem__)]
    order += [None] * (-len(order) % batch)
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    rng.shuffle(batches)
    return batches
# End of copied block: epoch_batches

# --- Step 3. What a model can do: its loss, and answers of its own -------------------------------

# Copied between scripts: load_model
def load_model(flag, name, dtype, device):
    """Returns (model, tokenizer) of a folder or hub name; ValueError if they cannot be used."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype,
                                                                  use_safetensors=True)
    except Exception as problem:  # a damaged file can raise anything
        raise ValueError(f"--{flag}={name} cannot be loaded; name a folder with a model and its "
                         f"tokenizer, or a hub name while online: {str(problem)[:200]}") from None
    special, known = len(tokenizer.all_special_tokens), model.get_input_embeddings().num_embeddings
    if not special < len(tokenizer) <= known or not tokenizer.eos_token:
        raise ValueError(f"--{flag}={name}: its tokenizer has {len(tokenizer)} tokens, the model "
                         f"{known}, the end token is {tokenizer.eos_token}: do the files belong "
                         "together, tokenizer.json included?")
    return model.to(device), tokenizer
# End of copied block: load_model

def learned_logits(network, rows, packing, device):
    """(logits (N, V), targets (N,)) of the N tokens in rows that are learned. Only columns that
    hold one go through the output layer. With packing, positions that start again tell transformers
    where a chat begins, and it masks what came before (Krell et al. 2021, section 3.2); but only
    without an attention mask and without a cache: with either, chats see each other, silently."""
    input_ids, targets, position_ids = collate_chats(rows)
    keep = targets != -100  # indices are worked out on the CPU, so that no GPU is waited for
    columns = keep.any(0).nonzero()[:, 0]
    places = keep[:, columns].nonzero(as_tuple=True)
    input_ids, position_ids, columns, targets, *places = (
        x.to(device, non_blocking=device.type == "cuda")
        for x in (input_ids, position_ids, columns, targets[keep], *places))
    logits = network(input_ids=input_ids, use_cache=False, logits_to_keep=columns,
                     position_ids=position_ids if packing else None).logits
    return logits[tuple(places)], targets

@torch.no_grad()
def check_packing(model, chat, device):
    """Raises ValueError if what stands before a chat in its row changes the chat's logits. Most
    kinds of models are exact (Llama, GPT-2, Qwen, Gemma, ...), some are not (OPT, Mamba, ...)."""
    others = chat[0][::-1].copy(), chat[1]
    model.eval()
    logits = [learned_logits(model, [[first, chat]], True, device)[0] for first in (chat, others)]
    model.train()
    own = len(logits[0]) // 2
    if not torch.allclose(logits[0][own:], logits[1][own:], rtol=1e-3, atol=1e-4):
        raise ValueError("--packing: with this kind of model, chats in one row would see each "
                         "other; leave it out")

@torch.no_grad()
def evaluate_chats(model, rows, config, rank, world_size, device, autocast):
    """Mean loss in nats per learned token over every row once, and the share of these tokens that
    the model would have chosen: the same for any number of ranks."""
    model.eval()
    loss_sum, hits, n_targets = 0.0, 0, 0
    for start in range(rank * config.batch_size, len(rows), world_size * config.batch_size):
        with autocast():
            logits, targets = learned_logits(
                model, rows[start : start + config.batch_size], config.packing, device)
        loss_sum += F.cross_entropy(logits.float(), targets, reduction="sum").item()
        hits += (logits.argmax(-1) == targets).sum().item()
        n_targets += len(targets)
    model.train()
    loss_sum, hits, n_targets = sum_over_ranks(device, loss_sum, hits, n_targets)
    return {"val_loss": loss_sum / n_targets, "val_token_accuracy": hits / n_targets}

def judge_chats(model, tokenizer, rows, asked, config, *place):
    """The metrics over held-out rows, and the answers to what is asked, --prompt first."""
    answers = answer(model, tokenizer, asked, config.max_new_tokens, config, *place)
    stopped = [row["stopped"] for row in answers[1:]]
    metrics = evaluate_chats(model, rows, config, *place)
    return metrics | {"stop_rate": sum(stopped) / len(stopped)}, answers

# Copied between scripts: answer
@torch.no_grad()
def answer(model, tokenizer, rows, longest, config, rank, world_size, device, autocast):
    """Greedy answers of at most longest tokens to the prompts of rows, (ids, number of prompt
    tokens) each. Returns, on every rank, {"prompt", "response", "answer", "stopped", "exact"}s."""
    model.eval()
    end = tokenizer.eos_token_id
    room = lambda i: min(longest, config.max_length - rows[i][1])  # of a row, not of its batch
    own, answers = sorted(range(rank, len(rows), world_size), key=lambda i: rows[i][1]), {}
    while own:
        chosen = [i for i in own[: 4 * config.batch_size] if room(i) == room(own[0])]
        own = own[len(chosen) :]
        prompts = [rows[i][0][: rows[i][1]].tolist() for i in chosen]
        width = max(map(len, prompts))  # padded on the left, so that all answers start at one place
        padded = [[end] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        with autocast():
            generated = model.generate(
                torch.tensor(padded, device=device), do_sample=False, pad_token_id=end,
                attention_mask=torch.tensor(mask, device=device), eos_token_id=end,
                max_new_tokens=room(chosen[0]), repetition_penalty=1.0)[:, width:].tolist()
        for i, prompt, new in zip(chosen, prompts, generated, strict=True):
            text, wanted = (
                tokenizer.decode([*itertools.takewhile(lambda token: token != end, ids)]).strip()
                for ids in (new, rows[i][0][len(prompt):].tolist()))
            answers[i] = {"prompt": tokenizer.decode(prompt), "response": wanted, "answer": text,
                          "stopped": end in new, "exact": text == wanted}
    model.train()
    parts = [answers] * world_size
    if world_size > 1:
        dist.all_gather_object(parts, answers)
    return [parts[i % world_size][i] for i in range(len(rows))]
# End of copied block: answer

# Copied between scripts: write_answers
def write_answers(path, answers):
    """All as JSONL into path; ten of them to the terminal."""
    with atomic_file(path) as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in answers)
    print(f"the first of {len(answers)} answers in {path}:")
    for row in answers[:10]:
        print(f"  {row['prompt'][-80:]!r} -> {row['answer'][:80]!r}", flush=True)
# End of copied block: write_answers

# Copied between scripts: export_model
def export_model(model, tokenizer, output_dir, ylabel, keys):
    """Rank 0's last duty: the plots, and final_model/, complete or not there at all. Returns, in
    one line, what each of the keys was before training and is now."""
    axes = plot_metrics(output_dir, ["train_loss", "val_loss"], ylabel)
    axes.figure.savefig(output_dir / "loss.pdf")
    axes.figure.savefig(output_dir / "loss.png", dpi=150)
    settings = model.generation_config
    settings.eos_token_id = tokenizer.eos_token_id  # where it has learned to stop
    try:
        settings.validate(strict=True)
    except ValueError:  # a file has top_k or the like, and not that it samples: cannot be saved
        settings.do_sample = True
    with atomic_folder(output_dir / "final_model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    *_, last = map(json.loads, (output_dir / "metrics.jsonl").open())
    number = lambda key: f"{np.float64(last.get(key)):.4g}"  # null is nan again
    return ", ".join(f"{key} {number(f'before_{key}')} -> {number(key)}" for key in keys)
# End of copied block: export_model

# Copied between scripts: on_hub
def on_hub(action, repo_id, **settings):
    """What the hub answers. Its errors are of many kinds; they become a ValueError."""
    try:
        return action(repo_id=repo_id, **settings)
    except Exception as problem:
        raise ValueError(f"--push_to_hub={repo_id}: {type(problem).__name__}: {problem}; when the "
                         "training is finished, --resume tries the upload again") from None
# End of copied block: on_hub

# --- Step 4. Training ----------------------------------------------------------------------------

def tune(config):
    """Returns the exit code: 0, or 143 after a signal that asked to stop."""
    rank, world_size, device = setup_distributed(
        config.device, config.backend, config.timeout_seconds)
    is_main, on_gpu, output_dir = rank == 0, device.type == "cuda", Path(config.output_dir)
    precision = resolve_precision("fp16" if config.fp16 else config.precision, device)
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; on every rank, like every setting
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not
        torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    # Chats, tokens and weights. The weights are fp32 also where the file holds bf16, as SmolLM2's
    # does: in half precision small updates would be rounded away. Autocast computes in bf16.
    chats, read = load_chats(config.dataset, config.dataset_config)
    model, tokenizer = load_model("model", config.model, torch.float32, device)
    prepare_tokenizer(model, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", config.max_length)
    if positions < config.max_length and is_main:
        print(f"--max_length {config.max_length} is lowered to the model's {positions} positions")
    config = replace(config, max_length=min(config.max_length, positions), precision=precision,
                     fp16=precision == "fp16")
    encoded, cut = encode_chats(chats, tokenizer, config.max_length)
    if config.validation_file:
        chats, also_read = load_chats(config.validation_file)
        held_out, also_cut = encode_chats(chats, tokenizer, config.max_length)
        train_rows, val_rows = [*filter(None, encoded)], [*filter(None, held_out)]
        if not (train_rows and val_rows):
            raise ValueError(f"no chat fits into --max_length {config.max_length}; raise it")
        read, cut, encoded = f"{read}; {also_read}", cut + also_cut, encoded + held_out
    else:
        train_rows, val_rows = split_rows(encoded, config.val_fraction, config.seed)
    digest = hashlib.sha256(b"".join(x.tobytes() for row in train_rows + val_rows for x in row))
    question = render([{"role": "user", "content": config.prompt}], tokenizer,
                      add_generation_prompt=True, return_dict=False)
    if len(question) >= config.max_length:
        raise ValueError(f"--prompt has {len(question)} tokens; take one with less than "
                         f"--max_length {config.max_length}")
    asked = [(np.array([*question, tokenizer.eos_token_id], np.int32), len(question))]
    for ids, labels in val_rows[: config.max_answers]:  # the last turn of each is answered anew
        asked.append((ids, np.flatnonzero(labels == -100)[-1].item() + 1))
    if config.packing:
        check_packing(model, train_rows[0], device)

    # A row is a list of chats: of one, or with --packing of as many as fit.
    unpacked = [len(ids) - 1 for ids, _ in train_rows]
    val_rows = sorted(val_rows, key=lambda chat: len(chat[0]))
    train_rows, val_rows = (
        pack_chats(chats, config.max_length) if config.packing else [[chat] for chat in chats]
        for chats in (train_rows, val_rows))
    lengths = [sum(len(ids) - 1 for ids, _ in row) for row in train_rows]
    n_targets = [sum((labels != -100).sum().item() for _, labels in row) for row in train_rows]
    global_batch_size = config.batch_size * config.gradient_accumulation_steps * world_size
    epoch_steps = math.ceil(len(train_rows) / global_batch_size)
    total_steps = config.num_epochs * epoch_steps or 1000
    total_steps = total_steps if config.max_steps < 0 else config.max_steps

    if Path(config.model).resolve() == (output_dir / "final_model").resolve():
        raise ValueError(f"{config.model} lies in --output_dir={output_dir}, which is written anew:"
                         " take another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    resume = config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    lock = filelock.FileLock(output_dir / ".lock")  # rank 0 holds it as long as this name lives
    on_rank_0(claim_output_dir, output_dir, lock, config.resume or config.overwrite)
    if config.push_to_hub:  # a token that may not write shows before the training, not after it
        config = replace(config, push_to_hub=on_rank_0(lambda: on_hub(
            huggingface_hub.create_repo, config.push_to_hub, private=True, exist_ok=True).repo_id))
    if is_main:
        padding = lambda lengths: padding_share(
            lengths, epoch_batches(lengths, global_batch_size, config.seed, 0), config.batch_size)
        print(f"{read}; --max_length {config.max_length} cut {cut} after a turn that fits and "
              f"dropped {encoded.count(None)}")
        print(f"{len(unpacked)} chats for training in {len(lengths)} rows, {padding(lengths):.1%} "
              "padding" + f" ({padding(unpacked):.1%} without --packing)" * config.packing
              + f"; {len(asked) - 1} held-out prompts are answered before and after")
        print(f"learned is what stands in brackets: {show_labels(*train_rows[-1][-1], tokenizer)}")
        print(f"{config.batch_size} rows x {config.gradient_accumulation_steps} micro-batches x "
              f"{world_size} processes = {global_batch_size} rows a step; {epoch_steps} steps per "
              f"epoch, {total_steps} in all; {precision} on {device}", flush=True)

    if config.gradient_checkpointing:  # called activation_checkpointing in transformers 5.23
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay,
                                  fused=True)
    # Gradients below 6e-8 are zero in fp16. The scaler multiplies the loss, so that they are not,
    # divides the gradients again, and looks for the largest factor that does not overflow.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    identity = dict(itertools.takewhile(lambda item: item[0] != "config", asdict(config).items()))
    identity |= {"data": digest.hexdigest()[:16], "global batch": global_batch_size}
    restored = restore(output_dir, resume, identity, device, **parts)
    fresh, progress = restored is None, restored or {"step": 0, "tokens_seen": 0}
    start_step, tokens_seen = progress.values()
    finished = not fresh and start_step >= total_steps and (output_dir / "final_model").exists()
    if is_main and not finished:
        log = MetricsLog(output_dir, -1 if fresh else start_step)

    network, no_sync = model, nullcontext
    if world_size > 1:
        for weight in model.parameters():  # DDP moves these into its buckets: one copy
            weight.grad = torch.zeros_like(weight)
        network = DDP(model, [device] if on_gpu else None, gradient_as_bucket_view=True)
        no_sync = network.no_sync
    autocast = partial(torch.autocast, device.type, enabled=precision != "fp32", dtype=half)
    place = rank, world_size, device, autocast
    model.train()
    if fresh:
        metrics, answers = judge_chats(model, tokenizer, val_rows, asked, config, *place)
        if is_main:
            before = {f"before_{key}": x for key, x in metrics.items()}
            log.write({"step": 0, "epoch": 0.0, "tokens_seen": 0} | metrics | before)
            (output_dir / "answers_after.jsonl").unlink(missing_ok=True)
            write_answers(output_dir / "answers_before.jsonl", answers)
    stop_signals = catch_stop_signals()
    after_step = start_profiler(output_dir, device) if config.profile and is_main else lambda: None
    began, saved_step, stop = time.perf_counter(), start_step, 0
    loss_sum, loss_targets, seconds, timed_tokens = 0.0, 0, 0.0, 0
    bar = tqdm(total=total_steps, initial=start_step, disable=None if is_main else True)

    for step in range(start_step + 1, total_steps + 1):
        epoch, position = divmod(step - 1, epoch_steps)
        if position == 0 or step == start_step + 1:
            batches = epoch_batches(lengths, global_batch_size, config.seed, epoch)
        started, step_loss = time.perf_counter(), torch.zeros((), device=device)
        learning_rate = learning_rate_at(
            step, total_steps, config.learning_rate, config.warmup_steps, min_lr_ratio=0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # Every rank knows the whole global batch, so also how many tokens it teaches. A mean over
        # each micro-batch, averaged, would weigh the tokens of short answers more (in 03's test its
        # gradient is off by 10%, this one by 1e-7).
        batch = batches[position]
        step_targets = sum(n_targets[i] for i in batch if i is not None)
        step_tokens = sum(lengths[i] for i in batch if i is not None)
        for micro_step in range(config.gradient_accumulation_steps):
            first = (micro_step * world_size + rank) * config.batch_size
            chosen = batch[first : first + config.batch_size]
            rows = [None if i is None else train_rows[i] for i in chosen]
            seeds = np.random.SeedSequence([config.seed, step, micro_step, rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))  # of dropout
            # Through DDP's wrapper: model(...) has the same loss, but its gradients would never be
            # averaged. In no_sync() they only add up; the step's last backward() averages them.
            synchronise = micro_step == config.gradient_accumulation_steps - 1
            with nullcontext() if synchronise else no_sync():
                with autocast():
                    logits, targets = learned_logits(network, rows, config.packing, device)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                scaler.scale(loss * (world_size / step_targets)).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), config.max_grad_norm or math.inf).item()
        step_loss, stop = sum_over_ranks(device, step_loss, len(stop_signals))
        # In fp16 the scaler leaves out a step whose gradient overflows, and lowers its factor; a
        # loss that is not finite comes from the forward pass, where no factor helps.
        if not math.isfinite(step_loss + (0 if precision == "fp16" else grad_norm)):
            raise ValueError(f"step {step}: loss {step_loss / step_targets}, gradient norm "
                             f"{grad_norm}; the last good checkpoint is of step {saved_step}"
                             + ("; take --precision bf16 or fp32" if precision == "fp16" else ""))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=world_size == 1)
        loss_sum, loss_targets = loss_sum + step_loss, loss_targets + step_targets
        tokens_seen += step_tokens
        if step > start_step + 3:  # warm-up is not counted
            seconds += time.perf_counter() - started
            timed_tokens += step_tokens
        bar.set_postfix(loss=f"{step_loss / step_targets:.4f}", refresh=False)
        bar.update()
        after_step()

        last = step == total_steps
        evaluate_now = step % config.eval_every == 0 or last
        save_now = step % config.save_every == 0 or last or stop
        if evaluate_now or save_now or step % config.log_every == 0:
            metrics = {"step": step, "epoch": step / epoch_steps, "tokens_seen": tokens_seen,
                       "train_loss": loss_sum / loss_targets, "learning_rate": learning_rate,
                       "grad_norm": grad_norm}
            if timed_tokens:
                metrics["tokens_per_second"] = timed_tokens / seconds
            metrics |= gpu_metrics(device, world_size)
            if last:
                after, answers = judge_chats(model, tokenizer, val_rows, asked, config, *place)
                metrics |= after
            elif evaluate_now:
                metrics |= evaluate_chats(model, val_rows, config, *place)
            loss_sum, loss_targets, seconds, timed_tokens = 0.0, 0, 0.0, 0
            if is_main:
                bar.clear()
                if last:
                    first = json.loads((output_dir / "metrics.jsonl").open().readline())
                    metrics |= {key: np.float64(x) for key, x in first.items() if "before_" in key}
                    write_answers(output_dir / "answers_after.jsonl", answers)
                log.write(metrics)
        if save_now:
            if is_main:
                progress = {"step": step, "tokens_seen": tokens_seen}
                save_checkpoint(output_dir, progress, identity, **parts)
            saved_step = step
        if stop:
            break

    bar.close()
    if stop:
        end = f"stopped by a signal after step {step}; --resume goes on from there"
    elif finished:
        end = f"this run is finished: {output_dir}/final_model"
    else:
        keys = ["val_loss", "val_token_accuracy", "stop_rate"]
        result = on_rank_0(export_model, model, tokenizer, output_dir,
                           "loss (nats per learned token)", keys)
        minutes = (time.perf_counter() - began) / 60
        end = (f"done: {result} in {minutes:.1f} min; {output_dir} has final_model, loss.png, "
               "loss.pdf, answers_before.jsonl, answers_after.jsonl, metrics.jsonl, runs")
    if is_main:
        print(end, flush=True)
    leave_group()
    if config.push_to_hub and is_main and not stop:  # however long it takes, nobody waits for it
        print("uploaded:", on_hub(huggingface_hub.upload_folder, config.push_to_hub,
                                  folder_path=output_dir / "final_model"), flush=True)
    return 143 if stop else 0

@record
def main():
    sys.stdout.reconfigure(errors="replace")  # an answer must not end a run on a narrow terminal
    try:
        config = parse_config(Config, {})
        sys.exit(tune(config))
    except torch.OutOfMemoryError:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        less = ("a smaller --max_length" if config.gradient_checkpointing
                else "--gradient_checkpointing")
        if config.batch_size % 2 == 0:
            less += (f" or --batch_size {config.batch_size // 2} "
                     f"--gradient_accumulation_steps {config.gradient_accumulation_steps * 2}")
        message = (f"out of GPU memory, {total - free:.1f} of {total:.1f} GiB are taken; the same "
                   f"global batch takes less with {less}")
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as problem:
        message = explain(problem)
    sys.stderr.write(f"error: {message}\n")  # in one piece: other ranks write here too
    (os._exit if dist.is_initialized() else sys.exit)(1)  # gloo's threads can abort a plain exit

if __name__ == "__main__":
    main()
