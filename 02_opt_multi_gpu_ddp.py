"""02 - Pretrain a GPT on several GPUs with DistributedDataParallel (DDP).

You learn   what torchrun sets and who uses it; how every rank takes its slice of one global batch;
            where gradients are averaged; why, for one global batch (without dropout and learning
            rate scaling), the losses do not depend on how many GPUs share it
Run it      torchrun --nproc_per_node=4 02_opt_multi_gpu_ddp.py                  # 1.42 B, 4 GPUs
            torchrun --nproc_per_node=2 02_opt_multi_gpu_ddp.py --preset tiny --precision fp32
Expect      done: val_loss 1.4758 in 3.1 min; gpt_output has final_model, loss.png, ...
            (no GPU, 2 CPU cores, Python 3.11, torch 2.13.0, 2026-11-21; 1.4756 in bf16)
Reads       --text_file: your text, Middlemarch (fetched once), or the manual inside every Python
Writes      gpt_output/{metrics.jsonl, loss.png, loss.pdf, runs/, checkpoint.pt, final_model/}
If it hangs NCCL_DEBUG=INFO TORCH_DISTRIBUTED_DEBUG=DETAIL names the operation that waits
Sources     Li et al. 2020 (arXiv:2006.15704: DDP); Radford et al. 2019 (GPT-2); S. Raschka, "Build
            a Large Language Model (From Scratch)", ch05/10_llm-training-speed (set-up, names)
"""

import atexit
import faulthandler
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import psutil
import torch
import torch.distributed as dist
import yaml
from matplotlib.figure import Figure
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map_only
from torch.utils.tensorboard import SummaryWriter
from transformers.hf_argparser import HfArg, HfArgumentParser

import common

PRESETS = {
    "1.4B": dict(warmup_steps=20),  # and the defaults of Config
    "124M": dict(emb_dim=768, n_heads=12, n_layers=12, batch_size=16, warmup_steps=20),
    "tiny": dict(text_file=["python_docs"], tokenizer="bytes", vocab_size=257, context_length=128,
                 emb_dim=128, n_heads=4, n_layers=4, drop_rate=0.0, batch_size=8, eval_every=100,
                 gradient_accumulation_steps=1, max_steps=1000, learning_rate=2e-3,
                 lr_scaling="none", warmup_steps=50, sample_prompt="The class"),
}
PRESETS["auto"] = PRESETS["1.4B" if torch.cuda.is_available() else "tiny"]
MIDDLEMARCH = "https://www.gutenberg.org/cache/epub/145/pg145.txt"  # about 475,000 GPT-2 tokens
# Dense bf16 FLOP/s by the makers' data sheets. A GPU that is not listed gets no MFU.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
              "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L4": 121e12}
AutoOnOff = Literal["auto", "on", "off"]

@dataclass(frozen=True)
class Config:
    """Every field is a flag; the defaults are --preset 1.4B, but for its warm-up."""
    # What a run is: a resumed run must agree in all fields from here to preset.
    vocab_size: int = HfArg(default=50304, help="GPT-2's 50,257 ids, padded to a multiple of 64")
    context_length: int = HfArg(default=1024, help="tokens per window")
    emb_dim: int = HfArg(default=2048, help="width")
    n_heads: int = HfArg(default=16, help="attention heads per block")
    n_layers: int = HfArg(default=24, help="blocks")
    drop_rate: float = HfArg(default=0.1, help="dropout")
    qkv_bias: bool = HfArg(default=False, help="bias in the query, key and value projections")
    tokenizer: Literal["gpt2", "bytes"] = HfArg(default="gpt2", help="bytes needs no download")
    stride: int = HfArg(default=0, help="tokens from window to window; 0 = context_length")
    val_fraction: float = HfArg(default=0.1, help="share of the text, its end, for validation")
    optimizer: Literal["adamw", "adafactor"] = HfArg(default="adamw", help="or one of less memory")
    learning_rate: float = HfArg(default=5e-4, help="highest, before lr_scaling; Adafactor: 0.03")
    lr_scaling: Literal["linear", "sqrt", "none"] = HfArg(default="linear", help="with world size")
    warmup_steps: int = HfArg(default=0, help="linear warm-up; half a cosine follows")
    min_lr_ratio: float = HfArg(default=0.1, help="last learning rate / highest; 1 = constant")
    weight_decay: float = HfArg(default=0.1, help="AdamW's, on matrices only")
    adam_beta1: float = HfArg(default=0.9, help="AdamW's decay of the mean")
    adam_beta2: float = HfArg(default=0.95, help="AdamW's decay of the variance")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are cut to this norm; 0 = never")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = HfArg(default="auto", help="of autocast")
    seed: int = HfArg(default=0, help="fixes initial weights, data order, dropout and samples")
    # What may change; only batch_size x gradient_accumulation_steps x processes must stay.
    preset: Literal["auto", "1.4B", "124M", "tiny"] = HfArg(default="auto", help="1.4B with CUDA")
    config: str = HfArg(default="", help="YAML file of flags; the command line wins over it")
    text_file: list[str] = HfArg(default_factory=lambda: ["middlemarch"], help="UTF-8 files, globs;"
                                 " or middlemarch (fetched once), python_docs (inside Python)")
    init_from: str = HfArg(default="", help="GPT-2-type folder, hub name or .pth; sets the sizes")
    output_dir: str = HfArg(default="gpt_output", help="folder for all that is written")
    overwrite: bool = HfArg(default=False, help="replace the run that output_dir holds")
    resume: bool = HfArg(default=False, help="go on from output_dir's checkpoint")
    dry_run: bool = HfArg(default=False, help="print sizes and memory; train nothing")
    batch_size: int = HfArg(default=8, help="windows per process and micro-batch")
    gradient_accumulation_steps: int = HfArg(default=4, help="micro-batches per optimizer step")
    num_epochs: int = HfArg(default=50, help="passes over the training windows")
    max_steps: int = HfArg(default=-1, help="optimizer steps, instead of epochs; 0 = only evaluate")
    device: Literal["auto", "cpu", "cuda", "mps"] = HfArg(default="auto", help="where to compute")
    backend: Literal["auto", "nccl", "gloo"] = HfArg(default="auto", help="auto: nccl on GPUs")
    compile: bool = HfArg(default=True, help="torch.compile, on CUDA only")
    loss_chunks: int = HfArg(default=1, help="parts of the loss: more take less memory, no time")
    gradient_checkpointing: AutoOnOff = HfArg(default="auto", help="less memory, more time")
    shard_optimizer: AutoOnOff = HfArg(default="auto", help="each rank keeps part of Adam's state")
    timeout_seconds: int = HfArg(default=1800, help="longest wait for another rank")
    deterministic: bool = HfArg(default=False, help="the same bits again on a GPU, but slower")
    profile: bool = HfArg(default=False, help="where steps 5 to 7 take their time: trace.json")
    log_every: int = HfArg(default=10, help="steps")
    eval_every: int = HfArg(default=50, help="steps; every other evaluation shows a sample")
    save_every: int = HfArg(default=500, help="steps from checkpoint to checkpoint")
    sample_prompt: str = HfArg(default="Every effort moves you", help="how the samples begin")

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            low, high = (min(field.default, 1), 10**9) if field.type is int else (0, 1)
            high = 1e9 if name == "max_grad_norm" else high
            if field.type in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name}={value} must lie between {low} and {high}")
        if self.emb_dim % self.n_heads:
            raise ValueError(f"--emb_dim={self.emb_dim} is no multiple of --n_heads={self.n_heads}")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other; give one of them")

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

# --- Step 1. The text becomes one file of token ids, which every rank maps into memory ----------

def find_text(name, output_dir):
    """The files that one --text_file stands for; what is no file yet is put into output_dir."""
    path = output_dir / f"{name}.txt"
    if name == "python_docs":
        from pydoc_data.topics import topics  # Python's language reference, 0.46 M characters
        path.write_text("\n\n".join(topics.values()), "utf-8")
    elif name != "middlemarch":
        return sorted(glob.glob(name)) or [name]
    elif not path.exists():
        try:
            torch.hub.download_url_to_file(MIDDLEMARCH, path, progress=False)  # renamed when whole
        except OSError as problem:
            raise ValueError(f"{MIDDLEMARCH}: {problem}; name a text with --text_file") from None
    return [path]

def prepare_tokens(config, output_dir):
    """Tokenise the text once, into a file named by a hash of what went in. Returns its path."""
    try:
        encoding = common.load_encoding(config.tokenizer)
    except OSError:
        raise ValueError("GPT-2's vocabulary cannot be fetched; take --tokenizer bytes, or set "
                         "TIKTOKEN_CACHE_DIR to a folder that has it") from None
    if encoding.n_vocab > config.vocab_size:
        raise ValueError(f"--vocab_size={config.vocab_size} is less than the {encoding.n_vocab} of "
                         f"--tokenizer={config.tokenizer}")
    paths = [path for name in config.text_file for path in find_text(name, output_dir)]
    digests = [hashlib.file_digest(open(path, "rb"), "sha256").digest() for path in paths]
    digest = hashlib.sha256(b"".join(digests) + config.tokenizer.encode()).hexdigest()
    dtype = "uint16" if encoding.n_vocab <= 2**16 else "uint32"
    token_file = output_dir / f"tokens_{digest[:16]}.{dtype}"
    if not token_file.exists():
        with atomic_file(token_file) as file:
            common.write_tokens(paths, encoding, dtype, file)
    return token_file

# --- Step 2. Which windows make up the global batch of a step -----------------------------------

def open_windows(config, token_file, batch):
    """TokenWindows for training and for validation, the last part of the text. Raises ValueError
    where there are none, or fewer than one global batch."""
    tokens, T = np.memmap(token_file, token_file.suffix[1:], mode="r"), config.context_length
    n_train = int(len(tokens) * (1 - config.val_fraction))
    train_windows = common.TokenWindows(tokens[:n_train], T, config.stride or T)
    val_windows = common.TokenWindows(tokens[n_train:], T, T)
    if len(train_windows) < batch or len(val_windows) == 0:
        raise ValueError(
            f"--text_file makes {len(train_windows)} windows for training, of which a step takes "
            f"{batch}, and {len(val_windows)} for validation: use more text or a smaller batch")
    return train_windows, val_windows

@lru_cache(maxsize=2)
def epoch_order(seed, epoch, size):
    """The numbers below size in random order, the same on every rank."""
    return np.random.default_rng([seed, epoch]).permutation(size)

def global_batch(seed, step, batch_size, size):
    """Numbers of the windows of step 1, 2, ...: the next batch from an endless row of epochs, each
    in an order of its own. No window is left out, none comes twice in an epoch."""
    samples = range((step - 1) * batch_size, step * batch_size)
    return [epoch_order(seed, i // size, size)[i % size] for i in samples]

# --- Step 3. What fits into memory --------------------------------------------------------------

def plan_memory(config, world_size, device):
    """Settle what is "auto": shard the optimizer, recompute activations, or both, as needed, and
    print the estimate for one process. Returns the config. Raises ValueError if it does not fit.

    A block keeps, of each token, two fp32 inputs of LayerNorm (8 D bytes) and 14 D numbers under
    autocast: the inputs of its four matrices (7 D) and of GELU (4 D), and q, k, v (3 D); where
    there is no FlashAttention, also its attention weights."""
    with torch.device("meta"):
        n = sum(p.numel() for p in common.GPTModel(vars(config)).parameters())
    D, L, V = config.emb_dim, config.n_layers, config.vocab_size
    half = 4 if config.precision == "fp32" else 2  # bytes of a number under autocast
    logit = 12 if config.loss_chunks == 1 else half + (16 - 2 * half) / config.loss_chunks  # bytes
    state = 8 * n if config.optimizer == "adamw" else 0  # Adafactor's is about a row per matrix
    tokens = config.batch_size * config.context_length
    block = tokens * D * (8 + 14 * half + 2 * (config.drop_rate > 0))
    if not torch.backends.cuda.flash_sdp_enabled():
        scores = tokens * config.n_heads * config.context_length
        block += scores * half * (3 if config.drop_rate else 1)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else (
        psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    options = {"auto": ("off", "on"), "on": ("on",), "off": ("off",)}
    for recompute, shard in itertools.product(
            options[config.gradient_checkpointing],
            options[config.shard_optimizer if world_size > 1 else "off"]):
        parts = {
            "casts": (4 - half) * (12 * L * D * D + V * D),
            "activations": block + L * 4 * tokens * D if recompute == "on" else L * block,
            "logits": tokens * max(V * logit, 8 * D * half),  # or what GELU needs, later
        }
        # Gradients stay where they accumulate or DDP averages them. Else they take the room that
        # the above leaves, as does DDP's second set of buckets in the second step.
        stay = world_size > 1 or config.gradient_accumulation_steps > 1
        parts |= {"gradients": 4 * n * stay + max(0, 4 * n - sum(parts.values())),
                  "weights": 4 * n, "optimizer": state / (world_size if shard == "on" else 1)}
        if sum(parts.values()) < 0.95 * free:  # allocators leave gaps
            break
    needed = f"{sum(parts.values()) / 2**30:.2f} GiB per process of {free / 2**30:.2f} free"
    print(f"{n:,} parameters on {device} in {config.precision}; about {needed}:",
          ", ".join(f"{part} {size / 2**30:.2f}" for part, size in parts.items()),
          f"(checkpointing {recompute}, sharding {shard})", flush=True)
    if sum(parts.values()) > free and not config.dry_run:
        raise ValueError(f"this needs about {needed}: half the --batch_size with twice the "
                         "--gradient_accumulation_steps takes less, --preset tiny least")
    return replace(config, gradient_checkpointing=recompute, shard_optimizer=shard)

# --- Step 4. What the training loop calls -------------------------------------------------------

def initial_weights(config):
    """The weights that --init_from names, or None, and the config with the sizes that they fix."""
    if not config.init_from:
        return None, config
    try:
        weights, sizes = common.load_weights(config.init_from)
    except (OSError, ValueError) as problem:
        raise ValueError(f"--init_from={config.init_from}: {problem}") from None
    except Exception:  # torch.load raises many kinds
        raise ValueError(f"--init_from={config.init_from} is no state dict") from None
    return weights, replace(config, **sizes)

def build_model(config, weights, device):
    """The model, the same on every rank, and its optimizer, which decays only matrices, as GPT-2's.
    Sharded, each rank keeps a part of its state (Rajbhandari et al. 2020, ZeRO stage 1)."""
    torch.manual_seed(config.seed)
    with device:
        model = common.GPTModel(vars(config))
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as problem:  # names or shapes that do not fit
            raise ValueError(f"--init_from={config.init_from}: {problem}") from None
    model.gradient_checkpointing = config.gradient_checkpointing == "on"
    model.loss_chunks = config.loss_chunks
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    adamw = partial(torch.optim.AdamW, betas=(config.adam_beta1, config.adam_beta2), fused=True)
    kind = adamw if config.optimizer == "adamw" else partial(torch.optim.Adafactor, foreach=False)
    if config.shard_optimizer == "on":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # 0.7 s to import
        kind = partial(ZeroRedundancyOptimizer, optimizer_class=kind)
    return model, kind(groups, lr=config.learning_rate, weight_decay=config.weight_decay)

def gather_optimizer(optimizer, rank, world_size):
    """Send each rank's part of the optimizer to all; rank 0 keeps them for state_dict(). Its own
    consolidate_state_dict() takes 72 ns per byte, 10 minutes for 1.4B on 4 GPUs (pytorch#79452)."""
    optimizer._all_state_dicts = []
    for source in range(world_size):
        part = [tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.optim.state_dict())
                if rank == source else None]
        dist.broadcast_object_list(part, src=source)
        optimizer._all_state_dicts += part if rank == 0 else []

@torch.no_grad()
def evaluate(model, windows, batch_size, rank, world_size, device, autocast):
    """Mean loss in nats per token over every window once: the same for any number of ranks."""
    model.eval()
    loss_sum = 0.0
    for start in range(rank * batch_size, len(windows), world_size * batch_size):
        batch = windows.batch(range(start, min(start + batch_size, len(windows))))
        with autocast():
            loss_sum += model(*(ids.to(device) for ids in batch)).item()
    model.train()
    return sum_over_ranks(device, loss_sum)[0] / (len(windows) * windows.context_length)

def sample(model, config, step, device):
    """A text of 100 tokens by the model, on one line."""
    encoding = common.load_encoding(config.tokenizer)
    prompt = encoding.encode_ordinary(config.sample_prompt) or [encoding.eot_token]
    prompt = torch.tensor([prompt], device=device)
    rng = torch.Generator(device).manual_seed(config.seed + step)
    ids = common.generate(model, prompt, 100, 0.8, top_k=50, n_vocab=encoding.n_vocab, rng=rng)
    return repr(encoding.decode(ids[0].tolist()))

def model_flops_utilization(config, world_size, tokens_per_second):
    """{"mfu": share of the GPUs' peak}, or {} for an unknown GPU: 6 FLOP per token and weight, and
    12 L D T for attention (PaLM, arXiv:2204.02311, appendix B)."""
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name())
    D, L, V, T = config.emb_dim, config.n_layers, config.vocab_size, config.context_length
    flops = tokens_per_second * (6 * (12 * L * D * D + V * D) + 12 * L * D * T)
    return {"mfu": flops / (peak * world_size)} if peak else {}

def finish(model, config, output_dir, tokens_per_step):
    """Rank 0's last duty: the plots, and final_model/, complete or not there at all."""
    axes = plot_metrics(output_dir, ["train_loss", "val_loss"], "loss (nats per token)")
    guess = f"guessing: ln {config.vocab_size:,}"
    axes.axhline(math.log(config.vocab_size), color="gray", linestyle=":", label=guess)
    tokens = lambda steps: steps * tokens_per_step, lambda tokens: tokens / tokens_per_step
    axes.secondary_xaxis("top", tokens).set_xlabel("tokens seen")
    axes.legend()
    axes.figure.savefig(output_dir / "loss.pdf")
    axes.figure.savefig(output_dir / "loss.png", dpi=150)
    with atomic_folder(output_dir / "final_model") as folder:
        common.save_hugging_face(model, common.load_encoding(config.tokenizer), folder)

# --- Step 5. Training ---------------------------------------------------------------------------

def train(config):
    """Returns the exit code: 0, or 143 after a signal that asked to stop."""
    rank, world_size, device = setup_distributed(
        config.device, config.backend, config.timeout_seconds)
    is_main, on_gpu, output_dir = rank == 0, device.type == "cuda", Path(config.output_dir)
    precision = resolve_precision(config.precision, device)
    config = replace(config, precision=precision)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; on every rank, like every setting
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not
        torch.use_deterministic_algorithms(True)
    output_dir.mkdir(parents=True, exist_ok=True)
    resume = config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    lock = filelock.FileLock(output_dir / ".lock")  # rank 0 holds it as long as this name lives
    if not config.dry_run:
        on_rank_0(claim_output_dir, output_dir, lock, config.resume or config.overwrite)
    weights, config = initial_weights(config)
    # In bf16 on a CPU, PyTorch's FlashAttention pays from 512 tokens on; with 128, attention by
    # plain matrix products is 2.3 times as fast. With dropout a CPU has nothing else.
    plain_attention = device.type == "cpu" and (
        config.drop_rate > 0 or (precision == "bf16" and config.context_length <= 256))
    torch.backends.cuda.enable_flash_sdp(not plain_attention)  # on a CPU too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain_attention)  # products in bf16
    token_file = on_rank_0(prepare_tokens, config, output_dir)
    global_batch_size = config.batch_size * config.gradient_accumulation_steps * world_size
    train_windows, val_windows = open_windows(config, token_file, global_batch_size)
    epoch_steps = len(train_windows) / global_batch_size
    tokens_per_step = global_batch_size * config.context_length
    total_steps = int(config.num_epochs * epoch_steps) if config.max_steps < 0 else config.max_steps
    config = on_rank_0(plan_memory, config, world_size, device)
    if is_main:
        print(f"{config.batch_size} windows x {config.gradient_accumulation_steps} micro-batches x "
              f"{world_size} processes x {config.context_length} tokens = {tokens_per_step:,} a"
              f" step; {epoch_steps:.1f} steps per epoch, {total_steps} in all", flush=True)
    if config.dry_run:
        return 0

    model, optimizer = build_model(config, weights, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    scale = {"linear": world_size, "sqrt": math.sqrt(world_size), "none": 1}[config.lr_scaling]
    progress = {"step": 0, "highest_lr": config.learning_rate * scale, "val_loss": math.nan}
    identity = dict(itertools.takewhile(lambda item: item[0] != "preset", asdict(config).items()))
    identity |= {"text": token_file.name, "global batch": global_batch_size}
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    restored = restore(output_dir, resume, identity, device, **parts)
    if config.shard_optimizer == "on":  # ZeRO now holds it twice, AdamW's steps on the CPU
        optimizer.state.clear()
        for state in optimizer.optim.state.values():
            state["step"] = state["step"].to(device)  # pytorch#124133
    fresh, progress = restored is None, restored or progress
    start_step, highest_lr, val_loss = progress.values()
    del weights  # several GiB
    finished = not fresh and start_step >= total_steps and (output_dir / "final_model").exists()
    if is_main and not finished:
        log = MetricsLog(output_dir, -1 if fresh else start_step)

    # DDP hooks into backward(): as soon as a bucket of gradients is ready, its average over the
    # ranks is on its way while earlier layers are still being differentiated. torch.compile wraps
    # DDP: it cuts its graph at the borders of the buckets, so that this overlap remains.
    # Evaluation and samples use the plain model.
    network, no_sync = model, nullcontext
    if world_size > 1:
        for weight in model.parameters():  # DDP moves these into its buckets: one copy
            weight.grad = torch.zeros_like(weight)
        network = DDP(model, [device] if on_gpu else None, gradient_as_bucket_view=True)
        no_sync = network.no_sync
    if config.compile and on_gpu:
        network = torch.compile(network)
    autocast = partial(torch.autocast, device.type, enabled=precision != "fp32",
                       dtype=torch.float16 if precision == "fp16" else torch.bfloat16)
    evaluation = partial(evaluate, model, val_windows, config.batch_size, rank, world_size, device,
                         autocast)
    if fresh:
        val_loss = evaluation()
    if fresh and is_main:
        log.write({"step": 0, "epoch": 0.0, "tokens_seen": 0, "val_loss": val_loss})
    stop_signals = catch_stop_signals()
    after_step = start_profiler(output_dir, device) if config.profile and is_main else lambda: None
    began, saved_step, stop = time.perf_counter(), start_step, 0
    loss_sum, loss_steps, seconds, timed_steps = 0.0, 0, 0.0, 0

    for step in range(start_step + 1, total_steps + 1):
        started, step_loss = time.perf_counter(), torch.zeros((), device=device)
        learning_rate = learning_rate_at(step, total_steps, highest_lr, config.warmup_steps,
                                         config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # Every rank knows the whole global batch and takes its own slice of each micro-batch.
        indices = global_batch(config.seed, step, global_batch_size, len(train_windows))
        for micro_step in range(config.gradient_accumulation_steps):
            first = (micro_step * world_size + rank) * config.batch_size
            batch = train_windows.batch(indices[first : first + config.batch_size])
            input_ids, targets = (ids.to(device, non_blocking=on_gpu) for ids in batch)
            seeds = np.random.SeedSequence([config.seed, step, micro_step, rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))  # of dropout
            # Gradients add up in .grad on each rank; only the last backward() averages them over
            # the ranks, once per step instead of once per micro-batch. DDP decides in the forward
            # pass whether backward() will communicate, so no_sync() encloses both.
            synchronise = micro_step == config.gradient_accumulation_steps - 1
            with nullcontext() if synchronise else no_sync():
                with autocast():
                    loss = network(input_ids, targets)
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
                             + ("; take --precision bf16 or fp32" if precision == "fp16" else ""))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=world_size == 1)
        loss_sum, loss_steps = loss_sum + step_loss, loss_steps + 1
        if step > start_step + 3:  # compilation and warm-up are not counted
            seconds, timed_steps = seconds + time.perf_counter() - started, timed_steps + 1
        after_step()

        last = step == total_steps
        evaluate_now = step % config.eval_every == 0 or last
        save_now = step % config.save_every == 0 or last or stop
        if evaluate_now or save_now or step % config.log_every == 0:
            metrics = {"step": step, "epoch": step / epoch_steps,
                       "tokens_seen": step * tokens_per_step,
                       "train_loss": loss_sum / (loss_steps * tokens_per_step),
                       "learning_rate": learning_rate, "grad_norm": grad_norm}
            if timed_steps:
                metrics["tokens_per_second"] = speed = timed_steps * tokens_per_step / seconds
                if on_gpu:
                    metrics |= model_flops_utilization(config, world_size, speed)
            metrics |= gpu_metrics(device, world_size)
            if evaluate_now:
                metrics["val_loss"] = val_loss = evaluation()
            loss_sum, loss_steps, seconds, timed_steps = 0.0, 0, 0.0, 0
            if is_main:
                log.write(metrics)
                if last or (evaluate_now and step // config.eval_every % 2):
                    print("sample:", sample(model, config, step, device), flush=True)
        if save_now:
            if config.shard_optimizer == "on":
                gather_optimizer(optimizer, rank, world_size)
            if is_main:
                progress = {"step": step, "highest_lr": highest_lr, "val_loss": val_loss}
                save_checkpoint(output_dir, progress, identity, **parts)
            saved_step = step
        if stop:
            break

    if stop:
        end = f"stopped by a signal after step {step}; --resume goes on from there"
    elif finished:
        end = f"this run is finished: {output_dir}/final_model"
    else:
        on_rank_0(finish, model, config, output_dir, tokens_per_step)
        minutes = (time.perf_counter() - began) / 60
        end = (f"done: val_loss {val_loss:.4f} in {minutes:.1f} min; {output_dir} has final_model, "
               "loss.png, loss.pdf, metrics.jsonl, runs")
    if is_main:
        print(end, flush=True)
    leave_group()
    return 143 if stop else 0

@record
def main():
    sys.stdout.reconfigure(errors="replace")  # a sample must not end a run on a narrow terminal
    try:
        config = parse_config(Config, PRESETS)
        sys.exit(train(config))
    except torch.OutOfMemoryError:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        less = "--gradient_checkpointing on --loss_chunks 8"
        if config.batch_size % 2 == 0:
            less = (f"--batch_size {config.batch_size // 2} "
                    f"--gradient_accumulation_steps {config.gradient_accumulation_steps * 2}")
        message = (f"out of GPU memory, {total - free:.1f} of {total:.1f} GiB are taken; the same "
                   f"global batch takes less with {less}")
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as problem:
        message = explain(problem)
    sys.stderr.write(f"error: {message}\n")  # in one piece: other ranks write here too
    (os._exit if dist.is_initialized() else sys.exit)(1)  # gloo's threads can abort a plain exit

if __name__ == "__main__":
    main()
