"""Random files of every kind that a user hands in: each is read, or refused with the reason. 50 of
each by default; `pytest -m slow tests/faults/test_fuzz.py` reads 10,000."""

import functools
import gc
import importlib
import io
import json
import pickle
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import harness
import pytest
import torch
from transformers import AutoTokenizer

import common

lesson = {script: importlib.import_module(harness.command(script)[0].removesuffix(".py"))
          for script in harness.SCRIPTS} | {"01": importlib.import_module("01_generate_data")}
TEXTS = ["", " ", "a", "Why?", "user", "assistant", "system", "\ud800", "\0", "é" * 40, "\u2028",
         "<|endoftext|>", "{{ x }}", "-1", "no", "NaN", "../x", "\ufeff", "a\r\nb", "x" * 5000]
KEYS = ["messages", "role", "content", "prompt", "response", "id", "text", "label", "tool_calls"]

class Hang(BaseException):
    pass

def value(rng, depth=3):
    """Any JSON value, with a liking for the words that mean something."""
    kind = rng.randrange(10 if depth else 7)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 7:
        return rng.choice([None, True, False, 0, 1, -1, 10**30, 0.5, 1e308, float("nan"), "1"])
    if kind == 7:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS + TEXTS[:6]): value(rng, depth - 1) for _ in range(rng.randrange(4))}

def spoil(rng, data):
    """Cut, flip, insert, repeat or remove some bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(6)
        if what == 0:
            del data[at:]
        elif what == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif what == 3:
            data[at:at] = data[max(0, at - 20) : at] * rng.choice([1, 5])
        elif what == 4:
            del data[at : at + rng.randrange(1, 30)]
        else:
            data[at:at] = rng.choice([b"[", b'{"a":', b"- "]) * rng.choice([3, 5000])
    return bytes(data)

def json_lines(good):
    """A maker of JSONL: rows like good(rng), with changed values, or anything."""
    def make(rng):
        rows = []
        for _ in range(rng.randrange(1, 8)):
            row = good(rng)
            if rng.random() < 0.2:
                row[rng.choice([*row])] = value(rng)
            rows.append(json.dumps(row if rng.random() < 0.9 else value(rng)))
        return spoil(rng, "\n".join(rows).encode())
    return make

def chat(rng):
    roles = ["user", "assistant"] * rng.randrange(1, 3)
    if rng.random() < 0.4:
        return {"prompt": rng.choice(TEXTS[2:]), "response": rng.choice(TEXTS[2:])}
    return {"messages": [{"role": role, "content": rng.choice(TEXTS[2:])} for role in roles]}

def any_chat(rng):
    """Of any form that 05 reads."""
    row, q, a = chat(rng), rng.choice(TEXTS[2:]), rng.choice(TEXTS[2:])
    shares = [{"from": x.get("role"), "value": q} for x in row.get("messages", [])]
    forms = [row, {"conversations": shares}, {"instruction": q, "input": a, "output": a},
             {"prompt": q, "completion": a, "system": rng.choice(TEXTS)},
             {"prompt": row.get("messages", [])[:-1], "completion": row.get("messages", [])[-1:]}]
    return rng.choice(forms)

def labelled(rng):
    return {"text": rng.choice(TEXTS), "label": rng.choice(["a", "b"])}

def text(rng):
    pieces = [*(x.encode("utf-8", "ignore") for x in TEXTS), b"\n", b"word ", rng.randbytes(4)]
    weights = [5] * (len(pieces) - 1) + [rng.choice([0, 1])]
    data = b"".join(rng.choices(pieces, weights, k=rng.randrange(60)))
    return data * rng.choice([1, 1, 1, 30])

def yaml_config(rng):
    names = rng.choices(["batch_size", "seed", "max_steps", "output_dir", "model", rng.choice(
        ["learning_rate", "text_file", "preset", "config", "help", "resume", *TEXTS])], k=2)
    plain = [rng.choice(["1", "9" * rng.choice([3, 400, 5000]), "x", json.dumps(value(rng))])
             for _ in names]
    bomb = "a: &a [x, x]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in zip(
        "abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True))
    lines = "".join(f"{name}: {x}\n" for name, x in zip(names, plain, strict=True))
    return spoil(rng, (bomb if rng.random() < 0.02 else lines).encode("utf-8", "ignore"))

def checkpoint(rng):
    file, what = io.BytesIO(), value(rng)
    weights = common.GPTModel({"vocab_size": 9, "context_length": 4, "emb_dim": 16, "n_heads": 1,
                               "n_layers": 1, "drop_rate": 0.0, "qkv_bias": True}).state_dict()
    if rng.random() < 0.5:
        strange = rng.choice([torch.ones(3), torch.ones(2, 2), torch.ones(()), what])
        weights[rng.choice(["weight", 1, *weights])] = strange
    state = {"progress": rng.choice([{"step": 1}, what]), "identity": rng.choice([{"a": 1}, what]),
             "model": weights}
    with suppress(UnicodeEncodeError):  # a lone surrogate
        torch.save(rng.choice([state, state, weights, what]), file)
    data = file.getvalue() or pickle.dumps([what])
    if rng.random() < 0.5 and data:
        data = bytearray(data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return spoil(rng, data)

def read_chats(path):
    rows = lesson["03"].read_conversations(path)
    lesson["03"].encode(rows, tokenizer(), 64)

def read_any_chats(path):
    chats, _ = lesson["05"].load_chats(path)
    lesson["05"].encode_chats(chats, tokenizer(), 64)

def read_labelled(path):
    config = lesson["04"].Config(train_file=path, val_fraction=0.5)
    data, *_ = lesson["04"].load_data(config)
    for pairs in data.values():
        lesson["04"].tokenize(tokenizer(), pairs, 64)

def read_text(path):
    config = lesson["02"].Config(tokenizer="bytes", vocab_size=257, context_length=8,
                                 text_file=[path], val_fraction=0.5)
    file = lesson["02"].prepare_tokens(config, Path(path).parent)
    try:
        lesson["02"].open_windows(config, file, 1)
    finally:
        file.unlink()

def read_config(path):
    sys.argv = ["x", f"--config={path}"]
    problems = []
    for script in lesson.values():
        try:
            script.parse_config(script.Config, getattr(script, "PRESETS", {}))
        except SystemExit:  # "help: []" prints the help
            pass
        except ValueError as problem:
            problems.append(problem)
    if len(problems) == len(lesson):
        raise problems[0]

def read_checkpoint(path):
    with suppress(ValueError):
        return lesson["02"].load_checkpoint(Path(path))
    config = lesson["02"].Config(init_from=path)
    weights, config = lesson["02"].initial_weights(config)
    lesson["02"].build_model(config, weights, torch.device("cpu"))

@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(harness.finished("02") / "model")

FORMATS = {
    "chats.jsonl": (json_lines(chat), read_chats),
    "any_chats.jsonl": (json_lines(any_chat), read_any_chats),
    "any_chats.json": (lambda rng: b"[%s]" % json_lines(any_chat)(rng).replace(b"\n", b","),
                       read_any_chats),
    "prompts.jsonl": (json_lines(chat), lambda path: [*lesson["01"].file_prompts(path)]),
    "prompts.txt": (text, lambda path: [*lesson["01"].file_prompts(path)]),
    "rows.jsonl": (json_lines(lambda rng: {"id": str(rng.randrange(9))}),
                   lambda path: lesson["01"].read_ids(Path(path))),
    "labelled.jsonl": (json_lines(labelled), read_labelled), "text.txt": (text, read_text),
    "config.yaml": (yaml_config, read_config), "checkpoint.pt": (checkpoint, read_checkpoint)}

def hang(number, frame):
    raise Hang

@pytest.mark.parametrize("n", [50, pytest.param(10_000, marks=harness.SLOW)])
@pytest.mark.parametrize("name", FORMATS)
def test_random_files_are_read_or_refused_in_a_line(name, n, tmp_path, monkeypatch):
    make, read = FORMATS[name]
    path, first, read_ones, slowest = tmp_path / name, random.randrange(10**6), 0, 0
    monkeypatch.setattr(sys, "argv", sys.argv)
    tokenizer()
    signal.signal(signal.SIGALRM, hang)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + n):
        path.write_bytes(make(random.Random(seed)))
        began = time.monotonic()
        signal.alarm(60)  # 5,000 brackets take PyYAML a second in each script, a busy machine more
        try:
            read(str(path))
            read_ones += 1
        except (ValueError, OSError) as problem:
            if isinstance(problem, UnicodeError | json.JSONDecodeError) or not str(problem):
                raise AssertionError(f"seed {seed}: {problem!r}") from problem
        except (Exception, Hang) as problem:
            raise AssertionError(f"seed {seed}: {problem!r}") from problem
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - began)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    gc.collect()
    print(f"{name}: {read_ones} of {n} read, slowest {slowest:.2f} s, {grown:.0f} MiB more")
    assert grown < 300 and (n < 1000 or n // 50 < read_ones < n)
