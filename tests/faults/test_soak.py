"""Ten minutes of lessons 02, 05 and 06 side by side, one process each: memory, files, threads and
speed stay as they are after the first fifth. `pytest -m slow -rP tests/faults/test_soak.py`"""

import time
from contextlib import ExitStack

import harness
import numpy as np

MINUTES, SCRIPTS = 10, ("02", "05", "06")
FLAGS = ["--max_steps=10000000", "--log_every=100", "--eval_every=1000", "--save_every=1000"]

@harness.SLOW
def test_nothing_grows_in_ten_minutes(tmp_path):
    for script in SCRIPTS:
        harness.make_material(tmp_path / script)
    samples, flat = {script: [] for script in SCRIPTS}, {}
    with ExitStack() as stack:
        runs = {script: stack.enter_context(harness.launched(
            tmp_path / script, script, *FLAGS, launcher="python")) for script in SCRIPTS}
        for run in runs.values():
            run.wait_for_step(1)
        end = time.monotonic() + 60 * MINUTES
        while time.monotonic() < end:
            time.sleep(2)
            for script, run in runs.items():
                p = run.process
                samples[script].append((p.memory_info().rss, p.num_fds(), p.num_threads()))
        for run in runs.values():
            run.process.terminate()
        assert {run.process.wait(60) for run in runs.values()} == {143}
    for script, run in runs.items():
        later = np.array(samples[script][len(samples[script]) // 5 :], float)
        fifth = len(later) // 4
        speeds = [x["tokens_per_second"] for x in run.metrics if "tokens_per_second" in x]
        speeds = speeds[len(speeds) // 5 :]
        old, new = np.median(speeds[: len(speeds) // 4]), np.median(speeds[-(len(speeds) // 4) :])
        memory, files, threads = later[-fifth:].mean(0) / later[:fifth].mean(0) - 1
        print(f"{script}: step {run.metrics[-1]['step']:,}, {later[-1][0] / 2**20:.0f} MiB, memory "
              f"{memory:+.2%}, open files {files:+.2%}, threads {threads:+.2%}, speed "
              f"{new / old - 1:+.1%}")
        flat[script] = memory < 0.02 and files <= 0 and threads <= 0 and new > 0.9 * old
    assert all(flat.values()), flat
