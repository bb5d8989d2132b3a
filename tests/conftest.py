"""Start a lesson as a reader does: copied alone into a folder, by its command line."""

import gc
import importlib
import io
import json
import os
import random
import shutil
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Before torch is imported: one thread here as in the children, so that results agree to the bit.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1")
for name in [*os.environ]:
    if name.startswith(("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_", "ACCELERATE_")):
        del os.environ[name]
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import common  # noqa: E402

LAUNCHERS = {
    "python": "python",
    "torchrun": "torchrun --standalone --nproc_per_node={nproc}",
    "node": "torchrun --nnodes=2 --nproc_per_node={nproc} --rdzv_backend=c10d --rdzv_id=run1"
            " --rdzv_endpoint=127.0.0.1:{port} --local-addr=127.0.0.1",
    "accelerate": "accelerate launch --multi_gpu --num_processes {nproc} --num_machines 1"
                  " --mixed_precision no --dynamo_backend no --main_process_port {port}",
    "config": "accelerate launch --config_file accelerate_config.yaml --num_processes {nproc}"
              " --mixed_precision no --main_process_port {port}",
    "sh": "bash launch_multigpu.sh",  # its settings are environment variables
}
WITH_COMMON = ("02_opt_multi_gpu_ddp.py", "06_algorithm_distillation.py")  # others go alone
WORDS = ["ash", "birch", "cedar", "elm", "fir", "hazel", "juniper", "larch", "maple", "oak"]

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]

def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """A folder with a student, a teacher of twice its width, and 64 rows of different lengths."""
    folder, draw = tmp_path_factory.mktemp("kit"), random.Random(0)
    for name, width in (("student", 32), ("teacher", 64)):
        torch.manual_seed(0)
        model = common.GPTModel({"vocab_size": 257, "context_length": 96, "emb_dim": width,
                                 "n_heads": 2, "n_layers": 2, "drop_rate": 0.0, "qkv_bias": False})
        (folder / name).mkdir()
        common.save_hugging_face(model, common.load_encoding("bytes"), folder / name)
    write_rows(folder / "rows.jsonl", [
        {"id": i, "prompt": f"Tree {i}?", "response": " ".join(draw.choices(WORDS, k=1 + i % 4)),
         "label": i % 4} for i in range(64)])
    return folder

def read_metrics(folder):
    # Read at once: line by line, a line that is just being written can come in two parts.
    text = "".join(path.read_text() for path in folder.glob("*/metrics.jsonl"))
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

def final_weights(folder):
    return load_file(next(folder.glob("*/final_model")) / "model.safetensors")

def assert_same(folder, reference, rel=1e-5):
    """The same steps, losses, learning rates and weights; rel=0: to the last bit."""
    keys = {"step", "epoch", "tokens_seen", "train_loss", "val_loss", "learning_rate"}
    for own, expected in zip(read_metrics(folder), read_metrics(reference), strict=True):
        expected = {key: expected[key] for key in keys & expected.keys()}
        assert {key: own[key] for key in keys & own.keys()} == pytest.approx(expected, rel, abs=0)
    own, expected = final_weights(folder), final_weights(reference)
    for name in expected:
        assert_close(own[name], expected[name], rtol=0, atol=rel, msg=name)

class Run:
    """A lesson at work, and what it has printed and logged up to now."""
    def __init__(self, folder, command, env):
        self.folder, rank = folder, env.get("RANK", env.get("NODE_RANK", ""))
        self.logs = [folder / f"{stream}{rank}.log" for stream in ("stdout", "stderr")]
        out, err = (log.open("w") for log in self.logs)
        self.process = psutil.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)
    stdout = property(lambda self: self.logs[0].read_text("utf-8"))
    stderr = property(lambda self: self.logs[1].read_text("utf-8"))
    metrics = property(lambda self: read_metrics(self.folder))
    returncode = property(lambda self: self.process.returncode)

    def wait_for_step(self, step, timeout=120):
        end = time.monotonic() + timeout
        while not any(record["step"] >= step for record in self.metrics):
            assert self.process.poll() is None and time.monotonic() < end, self.stderr[-3000:]
            time.sleep(0.001)

    def kill(self):
        """SIGKILL for all: torchrun puts its workers into process groups of their own."""
        with suppress(psutil.NoSuchProcess):
            for process in [self.process, *self.process.children(recursive=True)]:
                process.kill()
        self.process.wait(30)

@contextmanager
def started(folder, name, *flags, launcher="python", nproc=1, **env):
    """A Run that ends with the block at the latest."""
    folder.mkdir(parents=True, exist_ok=True)
    launch = LAUNCHERS[launcher].format(nproc=nproc, port=env.get("MASTER_PORT") or free_port())
    needed = {name, *launch.split(), *["common.py"] * (name in WITH_COMMON)}
    needed -= set(os.listdir(folder))
    for file in needed & set(os.listdir(ROOT)):
        shutil.copy(ROOT / file, folder)
    run = Run(folder, [*launch.split(), name, *map(str, flags)], os.environ | env)
    try:
        yield run
    finally:
        run.kill()

def run_script(folder, name, *flags, check=True, timeout=120, **launch):
    with started(folder, name, *flags, **launch) as run, suppress(psutil.TimeoutExpired):
        run.process.wait(timeout)
    assert not (check and run.returncode), f"exit code {run.returncode}: {run.stderr[-3000:]}"
    return run

def run_main(folder, name, *flags):
    """The lesson in this process, without its start. Returns its exit code: 0 or the error line."""
    script = importlib.import_module(Path(name).stem)
    torch.backends.cuda.enable_flash_sdp(True)  # as in a new process: 02 may have set these
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *map(str, flags)])
        patch.setattr("signal.signal", lambda *handler: None)  # pytest keeps its own
        patch.setattr(sys, "stderr", stderr := io.StringIO())
        try:
            return script.main() or 0
        except SystemExit as end:
            return stderr.getvalue().splitlines()[-1] if end.code == 1 else end.code
        finally:
            gc.collect()  # the lock of a run goes with its frames
            os.write(2, stderr.getvalue().encode())
