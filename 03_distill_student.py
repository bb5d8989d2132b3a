"""03 - Distil a student from a teacher's answers, on every GPU of the machine, in fp16.

You learn   one process per GPU without torchrun; why a mean over answers of different lengths must
            be taken over the global batch; what a GradScaler is for; the loss on answers only, end
            token included; what a teacher's full distribution adds to its words
Run it      python 03_distill_student.py --dataset_path data/distillation_data.jsonl --fp16
            python 03_distill_student.py --dataset_path chats.jsonl --learning_rate 2e-3 \
            --student_model gpt_output/final_model --num_processes 2 --num_epochs 4 --precision fp32
Expect      done: val_loss 2.647 -> 1.509, perplexity 14.1 -> 4.523, ... in 2.2 min; ...
            (02's tiny model, README's chats.jsonl; 2 CPU cores, Python 3.11, torch 2.13.0, 2026-11)
Reads       --dataset_path: JSONL with prompt and response, or messages (what 01 writes)
Writes      outputs/{metrics.jsonl, loss.png, loss.pdf, answers_before.jsonl, answers_after.jsonl,
            runs/, checkpoint.pt, final_model/}
If it hangs NCCL_DEBUG=INFO TORCH_DISTRIBUTED_DEBUG=DETAIL names the operation that waits
Sources     Kim and Rush 2016 (arXiv:1606.07947: sequence-level distillation); Hinton et al. 2015
            (arXiv:1503.02531: soft targets); Micikevicius et al. 2018 (arXiv:1710.03740: fp16)
"""

import atexit
import faulthandler
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import socket
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
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
import yaml
from matplotlib.figure import Figure
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

# The layout of a conversation for a tokenizer that has no chat template; final_model keeps it.
LAYOUT = ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
          "{% if add_generation_prompt %}assistant:{% endif %}")

@dataclass(frozen=True)
class Config:
    """Every field is a flag."""
    # What a run is: a resumed run must agree in all fields from here to config.
    student_model: str = HfArg(default="distilgpt2", help="folder or hub name")
    teacher_model: str = HfArg(default="", help="folder or hub name of a model with the student's "
                               "vocabulary; without it, only the text of the answers is learned")
    kd_loss: Literal["forward_kl", "reverse_kl", "jsd"] = HfArg(
        default="forward_kl", help="how far the student is from --teacher_model")
    temperature: float = HfArg(default=1.0, help="softens both distributions in kd_loss")
    alpha: float = HfArg(default=0.5, help="share of the text's loss; 1 - alpha is kd_loss's")
    max_length: int = HfArg(default=512, help="tokens of prompt and response together")
    val_fraction: float = HfArg(default=0.1, help="share of rows held out; 0: judge on training's")
    num_epochs: int = HfArg(default=3, help="passes over the training rows")
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
    dataset_path: str = HfArg(default="", help="JSONL: prompt and response, or messages (required)")
    output_dir: str = HfArg(default="./outputs", help="folder for all that is written")
    overwrite: bool = HfArg(default=False, help="replace the run that output_dir holds")
    resume: bool = HfArg(default=False, help="go on from output_dir's checkpoint")
    num_processes: int = HfArg(default=0, help="processes to start; 0 = one per GPU")
    batch_size: int = HfArg(default=8, help="rows per process and micro-batch")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches per optimizer step")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, more time")
    device: Literal["auto", "cpu", "cuda", "mps"] = HfArg(default="auto", help="where to compute")
    backend: Literal["auto", "nccl", "gloo"] = HfArg(default="auto", help="auto: nccl on GPUs")
    timeout_seconds: int = HfArg(default=1800, help="longest wait for another rank")
    deterministic: bool = HfArg(default=False, help="the same bits again on a GPU, but slower")
    profile: bool = HfArg(default=False, help="where steps 5 to 7 take their time: trace.json")
    log_every: int = HfArg(default=10, help="steps")
    save_every: int = HfArg(default=500, help="steps between checkpoints, besides each epoch's end")
    max_answers: int = HfArg(default=200, help="held-out prompts answered before and after")

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            low, high = (min(field.default, 1), 10**9) if field.type is int else (0, 1)
            low = {"warmup_steps": 0, "temperature": 0.01}.get(name, low)
            high = {"max_grad_norm": 1e9, "temperature": 100}.get(name, high)
            if field.type in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name}={value} must lie between {low} and {high}")
        if not self.dataset_path:
            raise ValueError("--dataset_path is missing; 01_generate_data.py writes such a file")
        if self.fp16 and self.precision not in ("auto", "fp16"):
            raise ValueError(f"--fp16 and --precision={self.precision} contradict each other")
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

# --- Step 1. Conversations become token ids, of which the last answer is learned -----------------

def read_conversations(path):
    """A list of conversations, each a list of {"role", "content"} that ends with the response.
    Raises ValueError with the first bad line and their number."""
    conversations, ids, problems = [], set(), []
    for number, line in enumerate(open(path, "rb"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = row["messages"] if "messages" in row else [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]}]
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise ValueError("the last of two messages or more must be the assistant's")
            if not all(isinstance(message[key], str) and message[key].strip().encode()
                       for message in messages for key in ("role", "content")):
                raise ValueError("a message is empty, or no text")
            if (row_id := row.get("id", f"of line {number}")) in ids:
                raise ValueError(f"the id {row_id} came before")
            ids.add(row_id)
            conversations.append(messages)
        except KeyError as problem:
            problems.append(f"line {number}: there is no {problem}")
        except (ValueError, TypeError, AttributeError, RecursionError) as problem:
            problems.append(f"line {number}: {problem}")
    if problems or not conversations:
        first = problems[0] if problems else "the file is empty"
        raise ValueError(f"--dataset_path={path}: {first} ({len(problems)} bad rows)")
    return conversations

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

def encode(conversations, tokenizer, max_length):
    """(ids, number of prompt tokens) of each conversation, through the chat template; the response
    ends with one end token and is cut to max_length, None where the prompt alone is as long. The
    two are tokenised apart, so that training sees the ids from which an answer will start."""
    prompts, responses, encoded, end = [], [], [], tokenizer.eos_token_id
    for number, messages in enumerate(conversations, start=1):
        try:
            prompt = render(messages[:-1], tokenizer, tokenize=False, add_generation_prompt=True)
            text = render(messages, tokenizer, tokenize=False)
        except ValueError as problem:
            raise ValueError(f"row {number}: {problem}") from None
        if not text.startswith(prompt):
            raise ValueError(f"row {number}: the chat template renders a prompt in another way once"
                             f" it is answered, so the answer cannot be told apart: {prompt!r:.80}")
        prompts.append(prompt)
        responses.append(text[len(prompt):])
    ids = (tokenizer(texts, add_special_tokens=False).input_ids for texts in (prompts, responses))
    for prompt, response in zip(*ids, strict=True):
        response = [*itertools.takewhile(lambda token: token != end, response), end]
        row = np.array(prompt + response, np.int32)[:max_length], len(prompt)
        encoded.append(row if len(prompt) < max_length else None)
    return encoded

def collate(rows):
    """input_ids and targets, each (B, T) int64: targets lie one token further, and are -100 outside
    the responses. Padding stands on the right, and causal attention looks only to the left, so that
    there is no mask to pass. A row None is padding alone."""
    rows = [row or (np.zeros(2, np.int32), 2) for row in rows]
    input_ids = torch.zeros(len(rows), max(len(ids) for ids, _ in rows) - 1, dtype=torch.int64)
    targets = torch.full_like(input_ids, -100)
    for i, (ids, n_prompt) in enumerate(rows):
        ids = torch.from_numpy(ids)
        input_ids[i, : len(ids) - 1] = ids[:-1]
        targets[i, n_prompt - 1 : len(ids) - 1] = ids[n_prompt:]
    return input_ids, targets

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

# --- Step 2. Student and teacher -----------------------------------------------------------------

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

def distillation_loss(logits, targets, teacher_logits=None, kd_loss="forward_kl", temperature=1.0,
                      alpha=1.0):
    """alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), summed over the N tokens of logits
    (N, V), targets (N,), teacher_logits (N, V): Hinton et al. 2015, section 2. T^2 keeps the size
    of the soft part's gradient when the temperature changes. reverse_kl is KL(student || teacher)
    (Gu et al. 2024, arXiv:2306.08543), jsd the mean of both against their mixture. CE alone where
    there is no teacher. In nats, computed in fp32."""
    cross_entropy = F.cross_entropy(logits.float(), targets, reduction="sum")
    if teacher_logits is None:
        return cross_entropy
    shared = min(logits.shape[-1], teacher_logits.shape[-1])  # ids beyond are padding of one model
    student = F.log_softmax(logits[:, :shared].float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits[:, :shared].float() / temperature, dim=-1)
    kl = lambda p, q: F.kl_div(q, p, reduction="sum", log_target=True)  # KL(p || q)
    if kd_loss == "forward_kl":
        divergence = kl(teacher, student)
    elif kd_loss == "reverse_kl":
        divergence = kl(student, teacher)
    else:
        mixture = torch.logaddexp(student, teacher) - math.log(2)
        divergence = (kl(teacher, mixture) + kl(student, mixture)) / 2
    return alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence

# --- Step 3. What the student can do: its loss, and answers of its own ---------------------------

@torch.no_grad()
def response_loss(model, rows, batch_size, rank, world_size, device, autocast):
    """Mean loss in nats per response token over every row once, for any number of ranks."""
    model.eval()
    loss_sum, n_targets = 0.0, 0
    for start in range(rank * batch_size, len(rows), world_size * batch_size):
        input_ids, targets = (ids.to(device) for ids in collate(rows[start : start + batch_size]))
        keep = targets != -100
        with autocast():
            logits = model(input_ids, use_cache=False).logits[keep]
        loss_sum += distillation_loss(logits, targets[keep]).item()
        n_targets += keep.sum().item()
    model.train()
    loss_sum, n_targets = sum_over_ranks(device, loss_sum, n_targets)
    return loss_sum / n_targets

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

def judge(model, tokenizer, rows, config, *place):
    """The metrics of a student over all rows, and its answers to the first --max_answers."""
    val_loss = response_loss(model, rows, config.batch_size, *place)
    asked = rows[: config.max_answers]
    longest = max(len(ids) - n_prompt for ids, n_prompt in asked)
    answers = answer(model, tokenizer, asked, longest, config, *place)
    rate = lambda key: sum(row[key] for row in answers) / len(answers)
    return {"val_loss": val_loss, "perplexity": math.exp(min(val_loss, 700)),
            "stop_rate": rate("stopped"), "exact_match": rate("exact")}, answers

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

# --- Step 4. Training ----------------------------------------------------------------------------

def distill(config):
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

    # The student's weights are fp32 also where its file holds fp16: in half precision the updates
    # would be rounded away, and a GradScaler refuses such gradients. Nobody updates the teacher.
    conversations = read_conversations(config.dataset_path)
    model, tokenizer = load_model("student_model", config.student_model, torch.float32, device)
    positions = lambda model: getattr(model.config, "max_position_embeddings", config.max_length)
    teacher, max_length = None, min(config.max_length, positions(model))
    if config.teacher_model:
        teacher, vocabulary = load_model("teacher_model", config.teacher_model,
                                         torch.float32 if precision == "fp32" else half, device)
        max_length = min(max_length, positions(teacher))
        if vocabulary.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"--teacher_model={config.teacher_model} has another vocabulary than "
                             f"--student_model={config.student_model}: its distribution over tokens"
                             " cannot be learned; let it write text with 01_generate_data.py")
    if tokenizer.chat_template is None:  # some models begin every text with a token of their own
        tokenizer.chat_template = ("{{ bos_token }}" if tokenizer("").input_ids else "") + LAYOUT
    if is_main and max_length < config.max_length:
        print(f"--max_length {config.max_length} is lowered to the model's {max_length} positions")
    config = replace(config, max_length=max_length, precision=precision, fp16=precision == "fp16")
    encoded = encode(conversations, tokenizer, config.max_length)
    train_rows, val_rows = split_rows(encoded, config.val_fraction, config.seed)
    lengths, n_targets = zip(*((len(ids) - 1, len(ids) - n) for ids, n in train_rows), strict=True)
    global_batch_size = config.batch_size * config.gradient_accumulation_steps * world_size
    epoch_steps = math.ceil(len(train_rows) / global_batch_size)
    total_steps = config.num_epochs * epoch_steps if config.max_steps < 0 else config.max_steps

    for name in (config.student_model, config.teacher_model):
        if Path(name).resolve() == (output_dir / "final_model").resolve():
            raise ValueError(f"{name} lies in --output_dir={output_dir}, which is written anew: "
                             "take another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    resume = config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    lock = filelock.FileLock(output_dir / ".lock")  # rank 0 holds it as long as this name lives
    on_rank_0(claim_output_dir, output_dir, lock, config.resume or config.overwrite)
    if is_main:
        ids, n = train_rows[0]
        print(f"{len(train_rows)} rows for training, {len(val_rows)} "
              + ("held out" if config.val_fraction else "of them judged (--val_fraction 0)")
              + f"; at most {max(lengths) + 1} tokens; --max_length {config.max_length} cut "
              f"{sum(ids[-1] != tokenizer.eos_token_id for ids, _ in filter(None, encoded))} "
              f"responses and dropped {encoded.count(None)} rows whose prompt leaves no room")
        print(f"learned is what stands in brackets: {tokenizer.decode(ids[:n])[-200:]!r}"
              f"[{tokenizer.decode(ids[n:])[-200:]!r}]")
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
    digest = hashlib.sha256(Path(config.dataset_path).read_bytes()).hexdigest()
    identity |= {"data": digest[:16], "global batch": global_batch_size}
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
        metrics, answers = judge(model, tokenizer, val_rows, config, *place)
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
        # each micro-batch, averaged, would weigh the tokens of short answers more (in the test its
        # gradient is off by 10%, this one by 1e-7).
        batch = batches[position]
        step_targets = sum(n_targets[i] for i in batch if i is not None)
        step_tokens = sum(lengths[i] for i in batch if i is not None)
        for micro_step in range(config.gradient_accumulation_steps):
            first = (micro_step * world_size + rank) * config.batch_size
            chosen = batch[first : first + config.batch_size]
            input_ids, targets = collate([None if i is None else train_rows[i] for i in chosen])
            keep = (targets != -100).nonzero(as_tuple=True)  # on the CPU: no GPU is waited for
            input_ids, targets, *keep = (x.to(device, non_blocking=on_gpu)
                                         for x in (input_ids, targets[keep], *keep))
            seeds = np.random.SeedSequence([config.seed, step, micro_step, rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))  # of dropout
            # Through DDP's wrapper: model(...) has the same loss, but its gradients would never be
            # averaged. In no_sync() they only add up; the step's last backward() averages them.
            synchronise = micro_step == config.gradient_accumulation_steps - 1
            with nullcontext() if synchronise else no_sync():
                with autocast():
                    logits = network(input_ids, use_cache=False).logits[tuple(keep)]
                    with torch.no_grad():
                        teacher_logits = teacher and teacher(
                            input_ids, use_cache=False).logits[tuple(keep)]
                loss = distillation_loss(logits, targets, teacher_logits, config.kd_loss,
                                         config.temperature, config.alpha)
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

        last, epoch_ends = step == total_steps, position == epoch_steps - 1
        save_now = step % config.save_every == 0 or epoch_ends or last or stop
        if save_now or step % config.log_every == 0:
            metrics = {"step": step, "epoch": step / epoch_steps, "tokens_seen": tokens_seen,
                       "train_loss": loss_sum / loss_targets, "learning_rate": learning_rate,
                       "grad_norm": grad_norm}
            if timed_tokens:
                metrics["tokens_per_second"] = timed_tokens / seconds
            metrics |= gpu_metrics(device, world_size)
            if last:
                after, answers = judge(model, tokenizer, val_rows, config, *place)
                metrics |= after
            elif epoch_ends:
                metrics["val_loss"] = response_loss(model, val_rows, config.batch_size, *place)
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
        keys = ["val_loss", "perplexity", "stop_rate", "exact_match"]
        result = on_rank_0(export_model, model, tokenizer, output_dir,
                           "loss (nats per response token)", keys)
        minutes = (time.perf_counter() - began) / 60
        end = (f"done: {result} in {minutes:.1f} min; {output_dir} has final_model, loss.png, "
               "loss.pdf, answers_before.jsonl, answers_after.jsonl, metrics.jsonl, runs")
    if is_main:
        print(end, flush=True)
    leave_group()
    return 143 if stop else 0

# --- Step 5. One process per GPU -----------------------------------------------------------------

def worker(local_rank, world_size, port):
    """What torchrun would have set, then main() once more."""
    os.environ.update(RANK=str(local_rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    main()

def start_workers(world_size):
    """Run main() in world_size new processes, also where torchrun does not work (Windows). Returns
    the exit code; if one fails, the others are ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    logging.getLogger("torch.multiprocessing.spawn").setLevel("ERROR")  # the workers say it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // world_size)))
    workers = mp.spawn(worker, (world_size, port), nprocs=world_size, join=False)
    for name in {"SIGTERM", "SIGUSR1"} & set(dir(signal)):
        signal.signal(getattr(signal, name), lambda number, frame: [
            os.kill(process.pid, number) for process in workers.processes if process.is_alive()])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers by itself
    try:
        while not workers.join():
            pass
    except mp.ProcessExitedException as problem:
        if problem.exit_code < 0:
            raise ValueError(f"process {problem.error_index} was ended by {problem.signal_name}; "
                             "--resume goes on from the last checkpoint") from None
        return problem.exit_code
    return 0

@record
def main():
    sys.stdout.reconfigure(errors="replace")  # an answer must not end a run on a narrow terminal
    try:
        config = parse_config(Config, {})
        world_size = config.num_processes
        if world_size == 0 and config.device in ("auto", "cuda"):
            world_size = torch.cuda.device_count()
        launched = {"RANK", "ACCELERATE_MIXED_PRECISION"} & {*os.environ} or int(
            os.environ.get("SLURM_NTASKS", 1)) > 1
        sys.exit(distill(config) if launched or world_size < 2 else start_workers(world_size))
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
