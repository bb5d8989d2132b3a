"""04 - Fine-tune a text classifier with Hugging Face Accelerate.

You learn   what a library takes off you that 02 writes out: prepare() wraps the model in DDP and
            deals batches to processes, accumulate() says when gradients are averaged, backward()
            scales them, gather_for_metrics() collects results; and what it leaves to you
Run it      python 04_classify_accelerate.py                           # gpt2 on dair-ai/emotion
            accelerate launch --multi_gpu 04_classify_accelerate.py
            torchrun --nproc_per_node=2 04_classify_accelerate.py --model gpt_output/final_model \
            --train_file rows.jsonl --num_epochs 5 --learning_rate 1e-3 --precision fp32
Expect      done: validation accuracy 0.5806, macro F1 0.5047 in 0.7 min; classifier_output has ...
            (02's tiny model, README's rows.jsonl; 2 CPU cores, Python 3.11, torch 2.13.0, 2026-11)
Reads       --dataset: a set of the Hugging Face hub; or --train_file: your JSONL or CSV, no network
Writes      classifier_output/{metrics.jsonl, loss.png, loss.pdf, confusion_matrix.png, report.json,
            runs/, checkpoint/, checkpoint.previous/, final_model/}
If it hangs NCCL_DEBUG=INFO TORCH_DISTRIBUTED_DEBUG=DETAIL names the operation that waits
Sources     huggingface.co/docs/accelerate: concept guides on accumulation and deferred execution
"""

import atexit
import faulthandler
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
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
from accelerate import Accelerator, utils
from matplotlib.figure import Figure
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.hf_argparser import HfArg, HfArgumentParser

TEXT_COLUMNS = ["text", "sentence", "content", "review", "document", "comment", "tweet", "question"]
LABEL_COLUMNS = ["label", "labels", "class", "category", "target", "sentiment", "emotion", "intent"]
SCORES = "loss", "accuracy", "macro_f1"  # what the log shows of an evaluation

@dataclass(frozen=True)
class Config:
    """Every field is a flag."""
    # What a run is: a resumed run must agree in all fields from here to config.
    model: str = HfArg(default="gpt2", help="folder or hub name of an encoder or a decoder")
    label_names: str = HfArg(default="", help="of labels 0, 1, ...: a,b,c or a file with a list")
    val_fraction: float = HfArg(default=0.1, help="of training, where there is no validation set")
    empty_texts: Literal["drop", "keep"] = HfArg(default="drop", help="what happens to them")
    max_length: int = HfArg(default=512, help="tokens; longer texts are cut")
    optimizer: Literal["adamw", "sgd"] = HfArg(default="adamw", help="sgd: with momentum 0.9")
    learning_rate: float = HfArg(default=5e-5, help="highest learning rate")
    warmup_steps: int = HfArg(default=100, help="linear warm-up; a linear decay to 0 follows")
    weight_decay: float = HfArg(default=0.01, help="on matrices only")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are cut to this norm; 0 = never")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = HfArg(default="auto", help="of autocast")
    seed: int = HfArg(default=0, help="fixes new weights, validation split, data order and dropout")
    # What may change; only batch_size x gradient_accumulation_steps x processes must stay.
    config: str = HfArg(default="", help="YAML file of flags; the command line wins over it")
    dataset: str = HfArg(default="dair-ai/emotion", help="on the hub: name or name:configuration")
    train_file: str = HfArg(default="", help="JSONL or CSV, instead of a dataset of the hub")
    validation_file: str = HfArg(default="", help="JSONL or CSV")
    test_file: str = HfArg(default="", help="JSONL or CSV, scored once at the end")
    text_column: str = HfArg(default="", help="default: found by its type and name")
    label_column: str = HfArg(default="", help="default: found by its type and name")
    output_dir: str = HfArg(default="classifier_output", help="folder for all that is written")
    overwrite: bool = HfArg(default=False, help="replace the run that output_dir holds")
    resume: bool = HfArg(default=False, help="go on from output_dir's checkpoint")
    push_to_hub: str = HfArg(default="", help="name of a private repository; needs HF_TOKEN")
    batch_size: int = HfArg(default=16, help="rows per process and micro-batch")
    gradient_accumulation_steps: int = HfArg(
        default=0, help="micro-batches a step; 0: ACCELERATE_GRADIENT_ACCUMULATION_STEPS, else 1")
    num_epochs: int = HfArg(default=3, help="passes over the training rows")
    max_steps: int = HfArg(default=-1, help="optimizer steps, instead of epochs; 0 = only evaluate")
    num_workers: int = HfArg(default=0, help="processes per loader that pad batches ahead")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, more time")
    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="where to compute")
    timeout_seconds: int = HfArg(default=1800, help="longest wait for another rank")
    deterministic: bool = HfArg(default=False, help="the same bits again on a GPU, but slower")
    profile: bool = HfArg(default=False, help="where steps 5 to 7 take their time: trace.json")
    log_every: int = HfArg(default=50, help="steps")
    eval_every: int = HfArg(default=500, help="steps")
    save_every: int = HfArg(default=500, help="steps from checkpoint to checkpoint")

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            low, high = (min(field.default, 1), 10**9) if field.type is int else (0, 1)
            low = 0 if name == "warmup_steps" else low
            high = 1e9 if name == "max_grad_norm" else high
            if field.type in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name}={value} must lie between {low} and {high}")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other; give one of them")
        if not self.train_file and (self.validation_file or self.test_file):
            raise ValueError("--validation_file and --test_file need a --train_file beside them")
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

# --- Step 1. Data connector: rows of a text and a label, from the hub or from files --------------

def load_dataset(name, **files):
    """What datasets.load_dataset returns; ValueError with the nearest cause if it cannot be had."""
    try:
        import datasets  # only here: JSONL does without
        datasets.disable_progress_bars()
        path, *configuration = name.split(":")
        if not files and "/" not in path and not os.path.exists(path):
            with suppress(Exception):  # datasets wants fancyzhx/ag_news, the hub knows ag_news too
                path = huggingface_hub.dataset_info(path, timeout=10).id
        return datasets.load_dataset(path, *configuration, **files)
    except ConnectionError:
        cause = "no network, or the hub does not answer"
    except Exception as problem:  # ImportError too
        cause = str(problem).strip().partition("\n")[0]
    source = files.get("data_files") or f"--dataset={name}"
    raise ValueError(f"{source}: {cause}; JSONL needs no network: --train_file train.jsonl")

def json_object(line):
    """The dict that a line of JSON holds; None if it holds no such thing, or no UTF-8 text."""
    try:
        row = json.loads(line)
        "".join(x for x in row.values() if isinstance(x, str)).encode()
    except (ValueError, RecursionError, AttributeError):
        return None
    return row

def read_splits(config):
    """Returns {split: (source, {line number: row})}, and {column: label names} as far as known."""
    splits = {"train": config.train_file, "validation": config.validation_file,
              "test": config.test_file}
    if not config.train_file:
        hub = load_dataset(config.dataset)
        rows = {split: (f"{config.dataset} {split}", dict(enumerate(hub[split].to_list(), 1)))
                for split in splits if split in hub}
        if "train" not in rows:
            raise ValueError(f"--dataset={config.dataset} has no train split, but {', '.join(hub)}")
        features = hub["train"].features.items()
        return rows, {column: x.names for column, x in features if hasattr(x, "names")}
    splits = {split: path for split, path in splits.items() if path}
    for split, path in splits.items():
        if path.endswith(".csv"):  # line 1 names the columns
            rows = enumerate(load_dataset("csv", data_files=path, split="train").to_list(), 2)
        else:
            rows = ((n, json_object(x)) for n, x in enumerate(open(path, "rb"), 1) if x.strip())
        splits[split] = path, dict(rows)
    return splits, {}

def find_column(source, row, flag, given, known, kinds, kind):
    """The given column; else one of known name and these kinds; else the only one of that kind."""
    named = [c for name in known for c in row if c.lower() == name and isinstance(row[c], kinds)]
    found = [given] if given else named[:1] or [c for c in row if isinstance(row[c], kind)]
    if len(found) != 1 or found[0] not in row:
        raise ValueError(f"{source}: name one of its columns with --{flag}: "
                         f"{', '.join(row) or 'there is no whole row'}")
    return found[0]

def read_pairs(config):
    """Returns {split: [(text, label)]}, the label names if they are known, and notes to print."""
    splits, names = read_splits(config)
    data, notes, text, label = {}, [], config.text_column, config.label_column
    for split, (source, rows) in splits.items():  # what is found in train holds for all
        row = {column: x for row in reversed(rows.values()) for column, x in (row or {}).items()
               if x is not None}  # the first value of each column
        label = find_column(source, row, "label_column", label, LABEL_COLUMNS, int | str, int)
        row = {column: x for column, x in row.items() if column != label}
        text = find_column(source, row, "text_column", text, TEXT_COLUMNS, str, str)
        broken = [n for n, row in rows.items() if not (  # CSV has None for an empty text
            row and text in row and isinstance(row[text], str | None)
            and isinstance(row.get(label), int | str))]
        if broken:
            raise ValueError(f"{source}:{broken[0]}: no text in {text!r}, or no text or whole "
                             f"number in {label!r}; {len(broken)} of {len(rows)} rows are broken")
        pairs = [(row[text] or "", row[label]) for row in rows.values()]
        filled = [pair for pair in pairs if pair[0].strip()]
        if len(filled) < len(pairs):
            notes.append(f"{source}: {len(pairs) - len(filled)} of {len(pairs)} texts are empty; "
                         f"--empty_texts={config.empty_texts}")
        data[split] = filled if config.empty_texts == "drop" else pairs
    return data, names.get(label), notes

def load_data(config):
    """Returns {split: [(text, class)]}, the names of the classes, and notes to print. Raises
    ValueError for labels that training cannot teach."""
    data, names, notes = read_pairs(config)
    if {label for _, label in data.get("test", [])} == {-1}:
        del data["test"]  # some sets of the hub keep its labels secret
    if given := config.label_names:
        try:
            given = Path(given).read_text("utf-8") if os.path.isfile(given) else given
            is_list = given.lstrip().startswith("[")
            names = json.loads(given) if is_list else given.strip().replace("\n", ",").split(",")
        except ValueError as problem:
            raise ValueError(f"--label_names={config.label_names}: {problem}; what works is "
                             'joy,anger or ["joy", "anger"], also in a file') from None
    known = {label for _, label in data["train"]}
    if len(known) < 2 or len({type(label) for label in known}) > 1:
        raise ValueError(f"{config.train_file or config.dataset}: training needs two labels or "
                         f"more, all numbers or all texts, and has {[*known][:4]}")
    labels = sorted(known)
    if names:
        labels = list(range(len(names))) if isinstance(labels[0], int) else names
    for split, rows in data.items():
        if strange := {label for _, label in rows} - (known & {*labels}):
            missing = "no row of training" if strange - known else f"no name among {names}"
            raise ValueError(f"{split}: the label {min(strange, key=str)!r} has {missing}")
        data[split] = [(text, labels.index(label)) for text, label in rows]
    if "validation" not in data:  # the same share of each class
        classes, chosen = np.array([label for _, label in data["train"]]), set()
        for label in range(len(labels)):
            rows = np.random.default_rng([config.seed, label]).permutation(
                np.flatnonzero(classes == label))
            chosen.update(rows[: int(len(rows) * config.val_fraction)])
        data["validation"] = [data["train"][i] for i in sorted(chosen)]
        data["train"] = [row for i, row in enumerate(data["train"]) if i not in chosen]
    if empty := [split for split, rows in data.items() if not rows]:
        raise ValueError(f"no rows for {empty[0]}; --{empty[0]}_file, --val_fraction give some")
    return data, [str(name) for name in names or labels], notes

# --- Step 2. Data processor: token ids, and the order in which they are trained on ----------------

def tokenize(tokenizer, pairs, max_length):
    """Returns [{"input_ids", "labels"}] and how many texts were longer than max_length and cut."""
    rows, cut = [], 0
    for start in range(0, len(pairs), 1000):
        texts, labels = map(list, zip(*pairs[start : start + 1000], strict=True))
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        if full := [text for text, x in zip(texts, ids, strict=True) if len(x) == max_length]:
            cut += sum(len(x) > max_length for x in tokenizer(full)["input_ids"])
        rows += [{"input_ids": np.array(x or [tokenizer.pad_token_id], np.int32), "labels": label}
                 for x, label in zip(ids, labels, strict=True)]
    return rows, cut

class LengthGroupedBatches:
    """A batch sampler: micro-batches of row numbers for the steps. Their order depends on seed and
    step alone; accelerate deals them to the processes like cards. The rows of a global batch are of
    similar length, so that little is padding: an epoch is a random order, sorted by length in parts
    of up to 50 global batches; then these batches come in random order."""
    drop_last = True
    def __init__(self, lengths, batch_size, global_batch_size, seed, steps):
        self.lengths, self.batch_size, self.seed, self.steps = lengths, batch_size, seed, steps
        self.size, self.epoch_steps = global_batch_size, len(lengths) // global_batch_size

    def __len__(self):
        return len(self.steps) * self.size // self.batch_size

    def __iter__(self):
        for epoch, steps in itertools.groupby(self.steps, lambda s: (s - 1) // self.epoch_steps):
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.lengths))[: self.epoch_steps * self.size]
            part = min(50, max(1, self.epoch_steps // 4)) * self.size
            for start in range(0, len(order), part):
                rows = order[start : start + part]
                rows[:] = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches = rng.permutation(order.reshape(self.epoch_steps, -1, self.batch_size))
            for step in steps:
                yield from batches[(step - 1) % self.epoch_steps].tolist()

def ignore_signals(worker):
    """Loader processes get the signals that go to all, but only the one that trains answers."""
    for name in {"SIGTERM", "SIGUSR1", "SIGINT"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)

# --- Step 3. Model set-up -------------------------------------------------------------------------

def load_classifier(config, names):
    """Returns (model, tokenizer, the longest input in tokens, notes to print). ValueError if they
    cannot be had."""
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not
    utils.set_seed(config.seed, deterministic=config.deterministic)
    try:
        # split_special_tokens: a text that spells out the end token is neither end nor padding.
        tokenizer = AutoTokenizer.from_pretrained(
            config.model, padding_side="right", truncation_side="right", split_special_tokens=True)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            config.model, dtype=torch.float32, id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)}, ignore_mismatched_sizes=True,
            output_loading_info=True)
    except Exception as problem:  # damaged files can raise anything
        cause = str(problem).strip().partition("\n")[0]
        raise ValueError(f"--model={config.model}: {cause} A folder needs no network: --model "
                         "./gpt_output/final_model") from None
    # The head may be new; a backbone that is new has learned nothing.
    backbone = {id(weight) for weight in model.base_model.parameters()}
    new = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
    new = [x for x, weight in model.named_parameters() if x in new and id(weight) in backbone]
    if len(new) == len(backbone):
        raise ValueError(f"--model={config.model} has none of the weights of its backbone, such as "
                         f"{new[0]}; its config.json tells of another model")
    notes = [f"--model={config.model} lacks {len(new)} of the {len(backbone)} weights of its "
             f"backbone, which start at random: {', '.join(new[:4])}"] * bool(new)
    # Decoders classify the last token that is no padding, and know padding by its id. GPT-2 and
    # Llama have none: the end token takes its part. It stands on the right, because on the left
    # GPT-2 would count it as positions (logits off by 0.19).
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"--model={config.model}: its tokenizer has no token for padding or end")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    model.train()  # from_pretrained has switched dropout off
    if config.gradient_checkpointing:  # called activation_checkpointing in transformers 5.23
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    first = 0 if padding is None else padding + 1  # RoBERTa's positions begin after it
    positions = getattr(model.config, "max_position_embeddings", math.inf) - first
    max_length = min(config.max_length, tokenizer.model_max_length, positions)
    return model, tokenizer, max_length, notes

def build_optimizer(config, model):
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    settings = dict(lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **settings)
    return torch.optim.AdamW(groups, **settings)

# --- Step 4. Trainer ------------------------------------------------------------------------------

def build_accelerator(config):
    """Join the processes. What no flag says stays as accelerate config has it."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise ValueError("SLURM_NTASKS > 1 without RANK: each task would train alone; one torchrun "
                         "per node starts them together, see multi_gpu_train.slurm")
    gpus, world_size = torch.cuda.device_count(), int(os.environ.get("WORLD_SIZE", 1))
    cpu = config.device == "cpu" or (config.device == "auto" and not gpus)
    if not cpu and int(os.environ.get("LOCAL_RANK", 0)) >= gpus:
        raise ValueError(f"--device={config.device} needs a GPU per process, here are {gpus}; "
                         "start fewer processes, or take --device=cpu")
    precision = "no"
    if config.precision != "auto" or os.environ.get("ACCELERATE_MIXED_PRECISION") != "no":
        precision = resolve_precision(config.precision, torch.device("cpu" if cpu else "cuda"))
    accumulation = config.gradient_accumulation_steps or int(
        os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1))
    timeout = timedelta(seconds=config.timeout_seconds)
    if world_size > 1:  # that is no limit: with a broken network, torch may wait 15 minutes more
        faulthandler.dump_traceback_later(config.timeout_seconds + 5, exit=True)
    # Without a GPU, cpu must be said: else processes of torchrun would not find one another. An
    # argument gradient_accumulation_steps would lose against the environment; the plugin wins.
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision.replace("fp32", "no"),
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(accumulation),
        dataloader_config=utils.DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                         utils.InitProcessGroupKwargs(timeout=timeout)])
    faulthandler.cancel_dump_traceback_later()
    if accelerator.num_processes != world_size:
        raise ValueError(f"{accelerator.num_processes} processes joined, WORLD_SIZE={world_size}")
    return accelerator

@torch.no_grad()
def score(accelerator, model, loader, n):
    """Every row once, whatever the number of processes. Returns the mean loss in nats and, from the
    confusion matrix (n true classes, n predicted), accuracy, and precision, recall and F1 of each
    class; macro F1 is their mean over the classes that occur."""
    model.eval()
    rows = []
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        # A process gathers rows, no means: the last batches hold rows twice to be of one size, and
        # gather_for_metrics leaves out the second ones.
        rows.append(accelerator.gather_for_metrics((losses, labels, logits.argmax(-1))))
    model.train()
    losses, labels, predictions = (torch.cat(x).cpu().numpy() for x in zip(*rows, strict=True))
    assert len(losses) == len(loader.dataset)
    confusion = np.bincount(labels * n + predictions, minlength=n * n).reshape(n, n)
    hits, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / np.maximum(true + predicted, 1)
    return {"loss": losses.mean(dtype=float).item(), "accuracy": hits.sum().item() / len(losses),
            "macro_f1": f1[true + predicted > 0].mean().item(), "f1": f1.tolist(),
            "precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(true, 1)).tolist(), "confusion": confusion.tolist()}

def save_state(accelerator, progress, output_dir):
    """accelerator.save_state into checkpoint/; the one before is kept. progress.json has the
    checksums of its files. By rank 0 alone: others would add random states, which nobody needs."""
    folder, previous = output_dir / "checkpoint", output_dir / "checkpoint.previous"
    with atomic_folder(folder) as unfinished:
        accelerator.save_state(unfinished)
        progress["sha256"] = {path.name: sha256(path) for path in unfinished.iterdir()}
        (unfinished / "progress.json").write_text(json.dumps(progress))
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)

def sha256(path):
    """The checksum of a file, which is on disk then."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()

def find_state(output_dir):
    """(folder, progress) of the newest whole checkpoint; None where there is none."""
    folders = [output_dir / "checkpoint", output_dir / "checkpoint.previous"]
    for folder in (folders := [folder for folder in folders if folder.exists()]):
        try:
            progress = json.loads((folder / "progress.json").read_text())
            wrong = [x for x, digest in progress["sha256"].items() if sha256(folder / x) != digest]
            if not wrong:
                best = output_dir / "final_model/best.json"  # may be newer than the checkpoint
                progress["best"] = json.loads(best.read_text()) if best.exists() else {}
                return folder, progress
            problem = f"checksum of {wrong[0]}"
        except (OSError, ValueError, KeyError) as error:
            problem = error
        print(f"{folder} is damaged and not used: {problem}", file=sys.stderr)
    if folders:
        raise ValueError(f"{folders[0]} cannot be read; --overwrite starts afresh")

def save_best(output_dir, model, tokenizer, best):
    """final_model/ is the best up to now; at the end of training it gets its card."""
    with atomic_folder(output_dir / "final_model") as folder:
        (folder / "best.json").write_text(json.dumps(best))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

def draw_confusion(confusion, names):
    """A figure: rows are true classes, columns predicted ones, colours the share of the row."""
    size, confusion = 2 + 0.7 * min(40, len(names)), np.array(confusion)
    figure, ticks = Figure([size, size], layout="tight"), range(len(names))
    axes = figure.subplots()
    axes.imshow(confusion / np.maximum(confusion.sum(1, keepdims=True), 1), "Blues", vmax=1.5)
    for (i, j), count in np.ndenumerate(confusion):
        if count or len(names) <= 40:  # hundreds of classes would be mostly noughts
            axes.text(j, i, count, ha="center", va="center")
    axes.set(xlabel="predicted", ylabel="true", yticks=ticks, yticklabels=names)
    axes.set_xticks(ticks, names, rotation=90)
    return figure

def write_results(config, output_dir, log, step, names, split, scores, best):
    """Rank 0's last duty: plots, report.json, and the model's card with data, command, results."""
    axes = plot_metrics(output_dir, ["train_loss", "val_loss", "val_accuracy"],
                        "loss (nats per text); accuracy (share of texts)")
    axes.figure.savefig(output_dir / "loss.pdf")
    axes.figure.savefig(output_dir / "loss.png", dpi=150)
    figure = draw_confusion(scores["confusion"], names)
    figure.savefig(output_dir / "confusion_matrix.png", dpi=150)
    log.board.add_figure("confusion_matrix", figure, step)
    log.board.flush()
    with atomic_file(output_dir / "report.json", "w") as file:
        json.dump({"split": split, "names": names} | scores, file)
    classes = zip(names, scores["precision"], scores["recall"], scores["f1"], strict=True)
    table = "\n".join(["| class | precision | recall | F1 |", "|---|---|---|---|", *(
        f"| {name} | {p:.4f} | {r:.4f} | {f1:.4f} |" for name, p, r, f1 in classes)])
    data = config.train_file or config.dataset
    hub = "" if Path(config.model).exists() else f"base_model: {config.model}\n"
    hub += "" if config.train_file else f"datasets: [{data.split(':')[0]}]\n"
    with atomic_file(output_dir / "final_model/README.md", "w") as file:
        file.write(f"""---\nlibrary_name: transformers\npipeline_tag: text-classification\n{hub}---
{config.model}, fine-tuned on {data} to tell the classes {", ".join(names)}:

    {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}

Measured on the {split} rows: accuracy {scores["accuracy"]:.4f}, macro F1 {scores["macro_f1"]:.4f}.
The weights are those of step {best["step"]} of {step}, where validation accuracy was highest
({best["val_accuracy"]:.4f}).\n\n{table}\n""")
    print(table, flush=True)

# Copied between scripts: on_hub
def on_hub(action, repo_id, **settings):
    """What the hub answers. Its errors are of many kinds; they become a ValueError."""
    try:
        return action(repo_id=repo_id, **settings)
    except Exception as problem:
        raise ValueError(f"--push_to_hub={repo_id}: {type(problem).__name__}: {problem}; when the "
                         "training is finished, --resume tries the upload again") from None
# End of copied block: on_hub

def fine_tune(config):
    """Returns the exit code: 0, or 143 after a signal that asked to stop."""
    transformers.logging.set_verbosity_error()  # a new head is no news, nor is loading a file
    transformers.logging.disable_progress_bar()
    accelerator, output_dir = build_accelerator(config), Path(config.output_dir)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; on every rank, like every setting
    rank, world_size = accelerator.process_index, accelerator.num_processes
    is_main, device = rank == 0, accelerator.device
    accumulation = accelerator.gradient_accumulation_steps
    if is_main:
        print(f"Number of processes: {world_size}",
              f"Distributed type: {accelerator.distributed_type.value}",
              f"Mixed precision: {accelerator.mixed_precision}",
              f"Gradient accumulation steps: {accumulation}",
              f"Main process device: {device}", sep="\n", flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    resume = config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    lock = filelock.FileLock(output_dir / ".lock")  # rank 0 holds it as long as this name lives
    on_rank_0(claim_output_dir, output_dir, lock, config.resume or config.overwrite)
    if config.push_to_hub:  # a token that may not write shows before the training, not after it
        config = replace(config, push_to_hub=on_rank_0(lambda: on_hub(
            huggingface_hub.create_repo, config.push_to_hub, private=True, exist_ok=True).repo_id))

    data, names, notes = load_data(config)
    model, tokenizer, max_length, remarks = load_classifier(config, names)
    notes += remarks
    for split, pairs in data.items():
        data[split], cut = tokenize(tokenizer, pairs, max_length)
        notes += [f"{split}: {cut} texts are longer than {max_length} tokens and cut"] * (cut > 0)
    notes.append(", ".join(f"{len(rows)} rows for {split}" for split, rows in data.items()))
    lengths = np.array([len(row["input_ids"]) for row in data["train"]])
    global_batch_size = config.batch_size * accumulation * world_size
    epoch_steps, rest = divmod(len(lengths), global_batch_size)
    if epoch_steps == 0:
        raise ValueError(f"{rest} rows for training are less than the {global_batch_size} of a "
                         "step: use a smaller --batch_size")
    if rest:
        notes.append(f"{rest} rows, others in each epoch, do not fill a step and are left out")
    total_steps = config.num_epochs * epoch_steps if config.max_steps < 0 else config.max_steps
    if is_main:
        print(*notes, f"{config.batch_size} rows x {accumulation} micro-batches x {world_size} "
              f"processes = {global_batch_size} rows a step; {epoch_steps} steps per epoch, "
              f"{total_steps} in all", sep="\n", flush=True)

    identity = dict(itertools.takewhile(lambda item: item[0] != "config", asdict(config).items()))
    texts = hashlib.sha256(b"".join(
        row["input_ids"].tobytes() + b"%d;" % row["labels"] for row in data["train"]))
    identity |= {"texts": texts.hexdigest(), "global batch": global_batch_size,
                 "precision": accelerator.mixed_precision}
    folder, progress = (on_rank_0(find_state, output_dir) if resume else None) or (None, {})
    if other := dict(progress.get("identity", identity).items() - identity.items()):
        raise ValueError(f"{folder} is of a run with {other}: take these, or --overwrite")
    start_step, best = progress.get("step", 0), progress.get("best", {})
    tokens_seen = progress.get("tokens_seen", 0)
    # prepare() wraps the model in DDP, whose backward() averages gradients over the processes, and
    # a loader so that each process gets every world_size-th batch, on its device.
    network, optimizer = accelerator.prepare(model, build_optimizer(config, model))
    # Tensor cores like multiples of 8, which must not lead beyond the model's last position.
    multiple = 8 if accelerator.mixed_precision != "no" and max_length % 8 == 0 else None
    settings = dict(collate_fn=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple),
                    num_workers=config.num_workers, worker_init_fn=ignore_signals,
                    pin_memory=device.type == "cuda")
    steps = range(start_step + 1, total_steps + 1)
    sampler = LengthGroupedBatches(
        lengths, config.batch_size, global_batch_size, config.seed, steps)
    batches = iter(accelerator.prepare(
        DataLoader(data["train"], batch_sampler=sampler, **settings)))
    loaders = {split: accelerator.prepare(DataLoader(
        sorted(data[split], key=lambda row: len(row["input_ids"])), config.batch_size, **settings))
        for split in data if split != "train"}
    # Save weights without DDP's "module." before their names: any number of processes can resume.
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: weights.__setitem__(0, model.state_dict()))
    accelerator.register_load_state_pre_hook(lambda models, folder: models.__setitem__(0, model))
    if folder:
        try:
            accelerator.load_state(folder)
        except Exception as problem:  # its checksums are right, but it is none of ours
            raise ValueError(f"{folder} is no checkpoint of this lesson, {type(problem).__name__}; "
                             "--overwrite starts afresh") from None
        accelerator.step = 0  # how accumulate() counts micro-batches
    card = output_dir / "final_model/README.md"
    finished = folder and start_step >= total_steps and card.exists()
    accelerator.wait_for_everyone()
    if is_main and resume:
        print(f"resumed from step {start_step} of {output_dir}", flush=True)
    elif is_main:
        for name in ("checkpoint", "checkpoint.previous", "final_model", "runs"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
    if is_main and not finished:
        card.unlink(missing_ok=True)
        log = MetricsLog(output_dir, start_step if folder else -1)

    def validate(step):
        """Returns what to log; the best model up to now is saved."""
        scores = score(accelerator, network, loaders["validation"], len(names))
        if scores["accuracy"] > best.get("val_accuracy", -1):
            best.update(step=step, val_accuracy=scores["accuracy"])
            on_rank_0(save_best, output_dir, model, tokenizer, best)
        return {f"val_{key}": scores[key] for key in SCORES}

    if not folder:
        metrics = {"step": 0, "epoch": 0.0, "tokens_seen": 0} | validate(0)
        if is_main:
            log.write(metrics)
    stop_signals = catch_stop_signals()
    after_step = start_profiler(output_dir, device) if config.profile and is_main else lambda: None
    began, saved_step, stop = time.perf_counter(), start_step, 0
    totals, speed = np.zeros(2), np.zeros(3)  # loss, rows; rows, tokens, seconds
    bar = tqdm(total=total_steps, initial=start_step, disable=None if is_main else True)

    for step in steps:
        started, sums = time.perf_counter(), torch.zeros(2, dtype=torch.float64, device=device)
        # Set by hand: a prepared scheduler steps once per process, and would decay faster on more.
        decay = (total_steps - step + 1) / max(1, total_steps - config.warmup_steps)
        factor = step / config.warmup_steps if step <= config.warmup_steps else decay
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        for micro_step in range(accumulation):
            batch = next(batches)
            labels = batch.pop("labels")
            seeds = np.random.SeedSequence([config.seed, step, micro_step, rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))  # of dropout
            # For all but the last micro-batch, accumulate() keeps DDP from averaging gradients.
            with accelerator.accumulate(network):
                loss = F.cross_entropy(network(**batch).logits.float(), labels, reduction="sum")
                # The mean over the global batch is the sum over processes and micro-batches divided
                # by its size. backward() will divide by accumulation, and DDP by world_size.
                accelerator.backward(loss * (accumulation * world_size / global_batch_size))
            sums += torch.stack([loss.detach(), batch["attention_mask"].sum()])
        grad_norm = accelerator.clip_grad_norm_(
            model.parameters(), config.max_grad_norm or math.inf).item()
        sums = torch.cat([sums, sums.new_tensor([len(stop_signals)])])
        loss_sum, tokens, stop = accelerator.reduce(sums, "sum").tolist()
        # In fp16 the scaler leaves out a step whose gradient overflows, and lowers its factor; a
        # loss that is not finite comes from the forward pass, where no factor helps.
        fp16 = accelerator.mixed_precision == "fp16"
        if not math.isfinite(loss_sum + (0 if fp16 else grad_norm)):
            raise ValueError(f"step {step}: loss {loss_sum / global_batch_size}, gradient norm "
                             f"{grad_norm}; the last good checkpoint is of step {saved_step}"
                             + ("; take --precision bf16 or fp32" if fp16 else ""))
        optimizer.step()
        optimizer.zero_grad()
        totals += loss_sum, global_batch_size
        tokens_seen += int(tokens)
        if step > start_step + 3:  # warm-up is not counted
            speed += global_batch_size, tokens, time.perf_counter() - started
        bar.update()
        after_step()

        last = step == total_steps
        evaluate_now = step % config.eval_every == 0 or last
        save_now = step % config.save_every == 0 or last or stop
        if evaluate_now or save_now or step % config.log_every == 0:
            metrics = {"step": step, "epoch": step / epoch_steps, "tokens_seen": tokens_seen,
                       "train_loss": totals[0] / totals[1],
                       "learning_rate": config.learning_rate * factor, "grad_norm": grad_norm}
            if speed.any():
                metrics["samples_per_second"], metrics["tokens_per_second"] = speed[:2] / speed[2]
            metrics |= gpu_metrics(device, world_size)
            if evaluate_now:
                metrics |= validate(step)
            totals[:], speed[:] = 0, 0
            if is_main:
                bar.clear()
                log.write(metrics)
        if save_now:
            progress = {"step": step, "tokens_seen": tokens_seen, "identity": identity}
            on_rank_0(save_state, accelerator, progress, output_dir)
            saved_step = step
        if stop:
            break

    bar.close()
    # A signal during the last validation stops here; from here on, Ctrl-C does at once.
    late = torch.tensor(len(stop_signals), device=device)
    stop = stop or accelerator.reduce(late, "sum").item()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stop:
        end = f"stopped by a signal after step {saved_step}; --resume goes on from there"
    elif finished:
        end = f"this run is finished: {output_dir}/final_model"
    else:
        if not (output_dir / "final_model").exists():
            raise ValueError(f"{output_dir}/final_model, which holds the best weights up to step "
                             f"{start_step}, was removed; --overwrite starts afresh")
        trained = AutoModelForSequenceClassification.from_pretrained(
            output_dir / "final_model", dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
        split = "test" if "test" in data else "validation"
        scores = score(accelerator, network, loaders[split], len(names))
        logged = (output_dir / "metrics.jsonl").read_text().splitlines()[-1] if is_main else ""
        if is_main and split == "test" and "test_loss" not in logged:  # by a run killed below
            log.write({"step": total_steps, "epoch": total_steps / epoch_steps}
                      | {f"test_{key}": scores[key] for key in SCORES})
        on_rank_0(lambda: write_results(
            config, output_dir, log, total_steps, names, split, scores, best))
        minutes = (time.perf_counter() - began) / 60
        end = (f"done: {split} accuracy {scores['accuracy']:.4f}, macro F1 "
               f"{scores['macro_f1']:.4f} in {minutes:.1f} min; {output_dir} has final_model, "
               "report.json, confusion_matrix.png, loss.png, loss.pdf, metrics.jsonl, runs")
    if is_main:
        print(end, flush=True)
    leave_group()
    if config.push_to_hub and is_main and not stop:  # however long it takes, nobody waits for it
        print("uploaded:", on_hub(huggingface_hub.upload_folder, config.push_to_hub,
                                  folder_path=output_dir / "final_model"), flush=True)
    return 143 if stop else 0

# --- Step 5. Application --------------------------------------------------------------------------

@record
def main():
    sys.stdout.reconfigure(errors="replace")  # a label must not end a run on a narrow terminal
    try:
        config = parse_config(Config, {})
        sys.exit(fine_tune(config))
    except torch.OutOfMemoryError:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        less = ("a smaller --max_length" if config.gradient_checkpointing
                else "--gradient_checkpointing")
        message = (f"out of GPU memory, {total - free:.1f} of {total:.1f} GiB are taken; half the "
                   f"--batch_size {config.batch_size} with twice the --gradient_accumulation_steps "
                   f"takes less for the same global batch, and so does {less}")
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as problem:
        message = explain(problem)
    sys.stderr.write(f"error: {message}\n")  # in one piece: other ranks write here too
    (os._exit if dist.is_initialized() else sys.exit)(1)  # gloo's threads can abort a plain exit

if __name__ == "__main__":
    main()
