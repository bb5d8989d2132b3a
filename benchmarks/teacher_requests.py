"""How much of the wait for a teacher is 01_generate_data.py's own: time and memory.

Run it      python benchmarks/teacher_requests.py        # about a minute; a quiet machine
Measures    1,000 examples at concurrency 64 from a server on this machine that answers after 0.2 s:
            1,000 / 64 rounds x 0.2 s = 3.2 s is the least, 4.2 s and 150 MB are the aim. Beside it
            the same requests by client.chat.completions.create(), the openai package's usual way.
            And the time and memory in which a file of 100,000 rows is found to be finished.
"""

import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

SCRIPT, EXAMPLES, CONCURRENCY, DELAY = "01_generate_data.py", 1000, 64, 0.2
ROOT, ROWS = Path(__file__).parents[1], 100_000

def serve(port, times):
    """Answer each request after DELAY seconds; times gets when the first request of a run came and
    when the last answer left."""
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
    # A process of its own starts it, because RUSAGE_CHILDREN is the highest of all children so far.
    code = ("import resource, subprocess, sys, time; began = time.time(); "
            "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            "print(time.time() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    out = subprocess.run([sys.executable, "-c", code, *map(str, command)], cwd=folder, check=True,
                         stdout=subprocess.PIPE, text=True).stdout.split()
    return float(out[0]), float(out[1]) * (1 if sys.platform == "darwin" else 1024) / 1e6

async def ask_plainly(url):
    """The peer: as many requests with typed requests and answers, and nothing written."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        prompts = iter(range(EXAMPLES))
        async def worker():
            for i in prompts:
                await client.chat.completions.create(
                    model="gpt-4o", max_tokens=200, temperature=0.7, messages=[
                        {"role": "system", "content": "You are a helpful assistant."},
                        {"role": "user", "content": f"Explain the number {i}."}])
        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))

def main():
    port, times = multiprocessing.Value("i", 0), multiprocessing.Array("d", 2)
    server = multiprocessing.Process(target=serve, args=(port, times), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    url, rows = f"http://127.0.0.1:{port.value}/v1", []
    flags = ["--base_url", url, "--output_path", "rows.jsonl", "--concurrency", CONCURRENCY]
    for attempt in range(3):
        with tempfile.TemporaryDirectory() as folder:
            times[:] = [0, 0]
            command = [sys.executable, ROOT / SCRIPT, "--num_examples", EXAMPLES, *flags]
            seconds, memory = run_measured(command, folder)
            assert len((Path(folder) / "rows.jsonl").read_bytes().splitlines()) == EXAMPLES
            rows.append((f"{SCRIPT}, run {attempt + 1}", times[1] - times[0], seconds, memory))
            times[:] = [0, 0]
            began = time.time()
            asyncio.run(ask_plainly(url))
            rows.append((f"chat.completions.create(), run {attempt + 1}", times[1] - times[0],
                         time.time() - began, float("nan")))
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(f"Explain the number {i} to a child.\n" for i in range(ROWS)))
        flags = [*flags, "--prompts_file", "prompts.txt"]
        # All rows by the script would take 5 minutes of DELAY; it writes one, the others are alike.
        run_measured([sys.executable, ROOT / SCRIPT, "--num_examples", 1, *flags], folder)
        sys.path.insert(0, str(ROOT))
        lesson = __import__(SCRIPT.removesuffix(".py"))
        sys.argv = [SCRIPT, *map(str, flags[:-1]), str(prompts)]
        path = Path(folder) / "rows.jsonl"
        row = json.loads(path.read_text())
        with path.open("w") as file:
            for i, messages in lesson.all_prompts(lesson.parse_config(lesson.Config, {})).items():
                row |= {"id": i, "prompt": messages[-1]["content"],
                        "messages": [*messages, row["messages"][-1]]}
                file.write(json.dumps(row) + "\n")
        command = [sys.executable, ROOT / SCRIPT, "--num_examples", ROWS, *flags]
        rows.append((f"a finished file of {ROWS:,} rows", 0, *run_measured(command, folder)))
    print("| what | first request to last answer, s | with start-up, s | peak memory, MB |")
    print("|---|---|---|---|")
    for name, *numbers in rows:
        print(f"| {name} |", " | ".join(f"{x:.1f}".replace("nan", "") for x in numbers), "|")
    server.kill()

if __name__ == "__main__":
    main()
