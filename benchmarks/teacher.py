"""What a teacher costs (lesson 01), and what its distribution adds to its words (lesson 03).

    python benchmarks/teacher.py requests        # about a minute; a quiet machine
    python benchmarks/teacher.py distribution --student_model student --teacher_model teacher \\
        --dataset_path rows.jsonl --seeds 0 1 2 --num_epochs 4 --learning_rate 1e-3

requests: how much of the wait is 01's own. 1,000 examples at concurrency 64 from a server here that
answers after 0.2 s take 3.2 s at least. Beside it the same by client.chat.completions.create(), the
openai package's usual way, and the time in which a file of 100,000 rows is found to be finished.
distribution: 03 with and without --teacher_model on the same rows; held-out loss, mean over seeds,
which choose the held-out rows. Every other flag goes to 03. The teacher must not know the rows.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

SCRIPT, EXAMPLES, CONCURRENCY, DELAY = "01_generate_data.py", 1000, 64, 0.2
ROOT, ROWS = Path(__file__).parents[1], 100_000

def serve(port, times):
    """Answer after DELAY seconds; times gets a run's first request and last answer."""
    message = {"role": "assistant", "content": 25 * "four words of text "}
    reply = json.dumps({
        "object": "chat.completion", "created": 1, "id": "1", "usage": {"completion_tokens": 100},
        "choices": [{"message": message, "index": 0, "finish_reason": "stop"}]}).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

    async def handle(reader, writer):
        try:
            while True:
                header = (await reader.readuntil(b"\r\n\r\n")).lower()
                times[0] = times[0] or time.time()
                await reader.readexactly(int(header.split(b"content-length:")[1].split(b"\r\n")[0]))
                await asyncio.sleep(DELAY)
                writer.write(head % len(reply) + reply)
                times[1] = time.time()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run():
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=256)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()
    asyncio.run(run())

def run_measured(command, folder):
    """Returns (seconds from start to end, peak memory in MB) of a command that must succeed."""
    # By a process of its own, because RUSAGE_CHILDREN is the highest of all children so far.
    code = ("import resource, subprocess, sys, time; began = time.time(); "
            "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            "print(time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    out = subprocess.run([sys.executable, "-c", code, *map(str, command)], cwd=folder, check=True,
                         stdout=subprocess.PIPE, text=True).stdout.split()
    return float(out[0]), float(out[1]) * (1 if sys.platform == "darwin" else 1024) / 1e6

async def ask_plainly(url):
    """The peer: as many requests, and nothing written."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        prompts = iter(range(EXAMPLES))
        async def worker():
            for i in prompts:
                await client.chat.completions.create(
                    model="gpt-4o", max_tokens=200, temperature=0.7, messages=[
                        {"role": "system", "content": "You are a helpful assistant."},
                        {"role": "user", "content": f"Explain the number {i}."}])
        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))

def measure_requests():
    port, times = multiprocessing.Value("i", 0), multiprocessing.Array("d", 2)
    multiprocessing.Process(target=serve, args=(port, times), daemon=True).start()
    while not port.value:
        time.sleep(0.01)
    url, rows = f"http://127.0.0.1:{port.value}/v1", []
    command = [sys.executable, ROOT / SCRIPT, "--base_url", url, "--output_path", "rows.jsonl",
               "--concurrency", CONCURRENCY]
    for run in range(1, 4):
        with tempfile.TemporaryDirectory() as folder:
            times[:] = [0, 0]
            seconds, memory = run_measured([*command, "--num_examples", EXAMPLES], folder)
            assert len((Path(folder) / "rows.jsonl").read_bytes().splitlines()) == EXAMPLES
            rows.append((f"{SCRIPT}, run {run}", times[1] - times[0], seconds, memory))
            times[:], began = [0, 0], time.time()
            asyncio.run(ask_plainly(url))
            seconds, name = time.time() - began, f"chat.completions.create(), run {run}"
            rows.append((name, times[1] - times[0], seconds, float("nan")))
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(f"Explain the number {i} to a child.\n" for i in range(ROWS)))
        command += ["--prompts_file", prompts]
        # All rows by the script would take 5 minutes of DELAY; it writes one, the others are alike.
        run_measured([*command, "--num_examples", 1], folder)
        sys.path.insert(0, str(ROOT))
        lesson = __import__(SCRIPT.removesuffix(".py"))
        sys.argv[1:] = map(str, command[2:])
        path = Path(folder) / "rows.jsonl"
        row = json.loads(path.read_text())
        with path.open("w") as file:
            for i, messages in lesson.all_prompts(lesson.parse_config(lesson.Config, {})).items():
                row |= {"id": i, "prompt": messages[-1]["content"],
                        "messages": [*messages, row["messages"][-1]]}
                file.write(json.dumps(row) + "\n")
        measured = run_measured([*command, "--num_examples", ROWS], folder)
        rows.append((f"a finished file of {ROWS:,} rows", 0, *measured))
    print("| what | first request to last answer, s | with start-up, s | peak memory, MB |\n"
          "|---|---|---|---|")
    for name, *numbers in rows:
        print(f"| {name} |", " | ".join(f"{x:.1f}".replace("nan", "") for x in numbers), "|")

def held_out_loss(folder, *flags):
    """The last record of a run of lesson 03."""
    subprocess.run([sys.executable, ROOT / "03_distill_student.py", "--output_dir", folder,
                    "--max_answers", "1", *flags], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])

def measure_distribution():
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher_model", required=True)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--kd_losses", nargs="+", default=["forward_kl", "jsd", "reverse_kl"])
    arguments, flags = parser.parse_known_args(sys.argv[2:])
    teacher = f"--teacher_model={arguments.teacher_model}"
    columns = {"text alone": []}
    columns |= {name: [teacher, f"--kd_loss={name}"] for name in arguments.kd_losses}
    columns["teacher"] = ["--max_steps=0", "--student_model", arguments.teacher_model]
    losses = {name: [] for name in ("before", *columns)}
    with tempfile.TemporaryDirectory() as root:
        for seed in arguments.seeds:
            for name, more in reversed(columns.items()):
                record = held_out_loss(Path(root, f"{name} {seed}"), *flags, *more, "--seed", seed)
                losses[name].append(record["val_loss"])
            losses["before"].append(record["before_val_loss"])  # of the student
    print("| held-out loss, nats per token |", " | ".join(losses), "|")
    print("|---" * (len(losses) + 1) + "|")
    for i, seed in enumerate(arguments.seeds):
        print(f"| seed {seed} |", " | ".join(f"{x[i]:.4f}" for x in losses.values()), "|")
    print("| mean |", " | ".join(f"{statistics.mean(x):.4f}" for x in losses.values()), "|")

if __name__ == "__main__":
    kinds = {"requests": measure_requests, "distribution": measure_distribution}
    kinds.get("".join(sys.argv[1:2]), lambda: sys.exit(__doc__))()
