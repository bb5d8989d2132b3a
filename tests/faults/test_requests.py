"""Lesson 01 under load: a server that fails at random, and kill -9 every few seconds."""

import json
import random
import time
from collections import Counter
from contextlib import suppress

import harness
import psutil
from conftest import started
from test_01_generate_data import NAME, read, teacher

ROWS, CONCURRENCY = 9000, 32  # with what is turned away and asked again, over 10,000 requests

def stall(handler, body):
    time.sleep(8)  # twice as long as the client waits
    return 500, {}

FAULTS = {"429": 4, "500": 4, "drop": 4, "half": 3, stall: 0.2, "garbage": 2, "error": 1,
          "empty": 1, None: 80}

@harness.SLOW
def test_ten_thousand_requests_lose_no_row_and_pay_for_none_twice(tmp_path):
    """Paid is what the server has answered well. Only answers that were under way when the process
    was killed may be paid and lost: they are counted at each kill, and there are no others."""
    seed, paid, lost, kills, code = random.randrange(10**6), [], Counter(), 0, None
    print("seed", seed)
    rng, path, began = random.Random(seed), tmp_path / "rows.jsonl", time.monotonic()
    def behave(prompt, asked):
        fault = rng.choices([*FAULTS], FAULTS.values())[0]
        paid.extend([] if fault else [prompt])
        return fault
    flags = ["--output_path=rows.jsonl", f"--num_examples={ROWS}", f"--concurrency={CONCURRENCY}",
             "--timeout_seconds=4", "--max_retries=8"]
    with teacher(behave, delay=0.02) as server:
        while code is None:
            with (started(tmp_path, NAME, server.url, *flags) as run,
                  suppress(psutil.TimeoutExpired)):
                code = run.process.wait(rng.uniform(4, 9))
            if code is None:
                time.sleep(0.5)  # for the requests that the server still reads
                lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
                whole = [json.loads(line)["prompt"] for line in lines if line.endswith(b"\n")]
                before, lost, kills = lost, Counter(paid) - Counter(whole), kills + 1
                assert (lost - before).total() <= CONCURRENCY
    rows, failed = read(path), read(tmp_path / "rows.jsonl.failed.jsonl")
    print(f"{len(server.requests)} requests, {kills} kills, {lost.total()} good answers under way "
          f"at one, {len(failed)} turned away, {time.monotonic() - began:.0f} s")
    assert code == 0 and len(server.requests) > 10_000 and kills > 3, run.stderr
    assert len(rows) == len({row["id"] for row in rows}) == ROWS
    assert all(row["response"] == f"Answer to {row['prompt']}" for row in rows)
    assert Counter(paid) - Counter(row["prompt"] for row in rows) == lost
