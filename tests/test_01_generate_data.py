"""Lesson 01 against a small local server that fails on demand, and against `transformers serve`."""

import json
import os
import re
import signal
import sys
import threading
import time
import urllib.request
import zlib
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import free_port, run_main, started

import common

for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):  # no test may ask a real server
    os.environ.pop(name, None)
NAME, KEY = "01_generate_data.py", "sk-fake-0123456789abcdef-marked"
USAGE = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}
REJECTED = ("length", "content_filter", "refusal", "empty")
FIELDS = {"id", "prompt", "response", "messages", "model", "finish_reason", "usage", "temperature",
          "created", "request_id"}

class Teacher(BaseHTTPRequestHandler):
    """Answers with the fault that server.behave(prompt, number of times it was asked) names."""
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        began, server = time.monotonic(), self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        with server.lock:
            server.requests.append((began, prompt, body))
            asked = [p for _, p, _ in server.requests].count(prompt)
        fault = server.behave(prompt, asked)
        if callable(fault):
            return self.send(*fault(self, body))
        if fault == "drop":
            return self.close()
        time.sleep(3 if fault == "slow" else server.delay)
        if fault in ("429", "500"):
            return self.send(int(fault), {"error": {"message": "busy"}}, {"Retry-After": "0.3"})
        if fault == "garbage":
            return self.send(200, b"<html>not json")
        if fault == "error":
            return self.send(200, {"error": {"message": "upstream"}, "choices": None})
        text = {"empty": "", "refusal": None, "no": "I'm sorry, but I can't help."}.get(
            fault, f"Answer to {prompt}")
        finish_reason = fault if fault in ("length", "content_filter") else "stop"
        refusal = "I will not." if fault == "refusal" else None
        choice = {"message": {"role": "assistant", "content": text, "refusal": refusal},
                  "finish_reason": finish_reason, "index": 0}
        self.send(200, {"model": body["model"], "created": 1, "choices": [choice], "usage": USAGE},
                  half=fault == "half")

    def send(self, status, body, headers=None, half=False):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "x-request-id": "req-1",
                            "content-length": len(body), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if half else body)
        if half:
            self.close()

    def close(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def log_message(self, *args):
        pass

@contextmanager
def teacher(behave=lambda prompt, asked: None, delay=0):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    server.behave, server.delay, server.daemon_threads = behave, delay, True
    server.requests, server.lock = [], threading.Lock()
    server.handle_error = lambda *args: None  # a client that has given up is no news
    server.url = f"--base_url=http://127.0.0.1:{server.server_port}/v1"
    server.prompts = lambda: [prompt for _, prompt, _ in server.requests]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

def generate(folder, server, *flags):
    """Returns the exit code, or the error line."""
    return run_main(folder, NAME, server.url, "--output_path=rows.jsonl", *flags)

# --- Faults ---------------------------------------------------------------------------------------

PASSING, LASTING = ("429", "500", "drop", "slow", "half"), ("garbage", "error", "no", *REJECTED)

def fault_of(prompt):
    number = zlib.crc32(prompt.encode()) % 40
    return (*PASSING, *LASTING)[number] if number < len(PASSING + LASTING) else None

@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """200 rows from a server where a third of the prompts meet a fault; some pass when repeated."""
    folder = tmp_path_factory.mktemp("faulty")
    passes = lambda prompt, asked: fault_of(prompt) in PASSING and asked > 1
    with teacher(lambda *prompt: None if passes(*prompt) else fault_of(prompt[0])) as server:
        code = generate(folder, server, "--num_examples=200", "--timeout_seconds=1.5",
                        "--max_retries=2")
    return SimpleNamespace(folder=folder, code=code, prompts=server.prompts(),
                           rows=read(folder / "rows.jsonl"),
                           failed=read(folder / "rows.jsonl.failed.jsonl"))

def test_faults_leave_exactly_the_rows_asked_for(faulty):
    assert faulty.code == 0 and len(faulty.rows) == 200
    assert [len({row[key] for row in faulty.rows}) for key in ("id", "prompt")] == [200, 200]
    for row in faulty.rows:
        assert row.keys() == FIELDS and row["response"] == f"Answer to {row['prompt']}"
        assert row["messages"][1:] == [{"role": "user", "content": row["prompt"]},
                                       {"role": "assistant", "content": row["response"]}]
        assert (row["finish_reason"], row["usage"], row["temperature"]) == ("stop", USAGE, 0.7)
        assert (row["model"], row["request_id"]) == ("gpt-4o", "req-1")
    assert {fault_of(row["prompt"]) for row in faulty.rows} == {*PASSING, None}

def test_what_is_turned_away_has_its_reason(faulty):
    reasons = {"garbage": "malformed body", "error": "error in the body", "no": "refusal"}
    for row in faulty.failed:
        fault = fault_of(row["prompt"])
        assert row["reason"] == reasons.get(fault, fault) and fault in LASTING
    assert {fault_of(row["prompt"]) for row in faulty.failed} == set(LASTING)

def test_a_failed_prompt_gives_way_to_the_next_of_the_grid(faulty):
    asked = list(dict.fromkeys(faulty.prompts))
    assert len(asked) == 200 + len(faulty.failed)  # as many as needed, and none twice but retries
    again = {prompt for prompt in asked if faulty.prompts.count(prompt) > 1}
    assert again == {prompt for prompt in asked if fault_of(prompt) in PASSING}

def test_failed_prompts_of_the_grid_are_not_asked_in_the_next_run(faulty):
    with teacher() as server:
        assert generate(faulty.folder, server, "--num_examples=205") == 0
    assert len(read(faulty.folder / "rows.jsonl")) == 205
    assert len(server.requests) == 5 and not set(server.prompts()) & set(faulty.prompts)

def test_another_seed_asks_other_prompts_first(tmp_path):
    with teacher() as server:
        for seed in (1, 2, 1):
            (tmp_path / "rows.jsonl").unlink(missing_ok=True)
            assert generate(tmp_path, server, "--num_examples=20", f"--seed={seed}") == 0
    first, second, third = (set(server.prompts()[i:i + 20]) for i in (0, 20, 40))
    assert first == third and len(first & second) < 10

def test_fifty_failures_in_a_row_end_the_run(tmp_path):
    def behave(prompt, asked):
        n = len(server.requests)  # 60 single failures do not count among the 50
        return "content_filter" if n > 120 else "empty" if n % 2 else None
    with teacher(behave) as server:
        error = generate(tmp_path, server, "--num_examples=1000")
    assert re.match("error: 50 failures in a row, mostly content_filter", error)
    assert 150 <= len(server.requests) <= 190

@pytest.mark.parametrize("keep", [False, True])
def test_many_cut_off_answers_are_reported_once_and_kept_on_demand(keep, tmp_path, capfd):
    behave = lambda prompt, asked: "length" if zlib.crc32(prompt.encode()) % 2 else None
    with teacher(behave) as server:
        flags = ["--keep_truncated"] if keep else []
        assert generate(tmp_path, server, "--num_examples=60", *flags) == 0
    assert capfd.readouterr().out.count("first 50 answers are cut off: raise --max_tokens") == 1
    assert ("length" in {row["finish_reason"] for row in read(tmp_path / "rows.jsonl")}) == keep

# --- Restarts -------------------------------------------------------------------------------------

def wait_for_rows(run, n):
    rows, end = run.folder / "rows.jsonl", time.monotonic() + 60
    while not rows.exists() or rows.read_bytes().count(b"\n") < n:
        assert run.process.poll() is None and time.monotonic() < end, run.stderr
        time.sleep(0.01)

def test_kill_9_loses_only_what_was_in_flight_and_no_row_is_paid_twice(tmp_path, capfd):
    with teacher(delay=0.05) as server:
        flags = [server.url, "--output_path=rows.jsonl", "--num_examples=150", "--concurrency=4"]
        with started(tmp_path, NAME, *flags) as run:
            wait_for_rows(run, 20)
            assert re.match("error: .*rows.jsonl is in use", run_main(tmp_path, NAME, *flags))
            run.kill()
        before = read(tmp_path / "rows.jsonl")
        lost = set(server.prompts()) - {row["prompt"] for row in before}
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('{"id": "0123", "prompt": "torn')
        first_run = len(server.requests)
        assert run_main(tmp_path, NAME, *flags) == 0
        assert "was cut off" in capfd.readouterr().out
        rows = read(tmp_path / "rows.jsonl")
        assert rows[:len(before)] == before and len({row["id"] for row in rows}) == len(rows) == 150
        assert len(lost) <= 4 and len(server.requests) - first_run == 150 - len(before)

        requests = len(server.requests)
        assert run_main(tmp_path, NAME, *flags[1:]) == 0  # finished: needs neither server nor key
        assert len(server.requests) == requests and read(tmp_path / "rows.jsonl") == rows

@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_the_way_to_go_on(number, code, tmp_path):
    with teacher(delay=0.1) as server:
        flags = [server.url, "--output_path=rows.jsonl", "--num_examples=1000"]
        with started(tmp_path, NAME, *flags) as run:
            wait_for_rows(run, 5)
            run.process.send_signal(number)
            assert run.process.wait(20) == code
    rows = len(read(tmp_path / "rows.jsonl"))
    assert f"stopped, the same command goes on: {rows} rows" in run.stdout
    assert "Traceback" not in run.stderr

@pytest.mark.parametrize(("text", "message"), [
    ('{"id": null}\n', "line 1 .1 such"), ("nothing\n" * 3, "line 1 .3 such"), ("{}\n", "line 1")])
def test_a_file_of_something_else_is_left_alone(text, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text)
    with teacher() as server:
        assert re.match(f"error: .*{message}", generate(tmp_path, server))
    assert not server.requests and (tmp_path / "rows.jsonl").read_text() == text

@pytest.mark.parametrize("flag", ["--model=other", "--max_tokens=99", "--temperature=0",
                                  "--system_prompt=Rhyme."])
def test_rows_of_other_settings_are_not_mixed(flag, tmp_path):
    with teacher() as server:
        assert generate(tmp_path, server, "--num_examples=3") == 0
        error = generate(tmp_path, server, "--num_examples=3", flag)
    assert re.match("error: rows.jsonl line 1 .3 such lines.*another --output_path", error)

# --- Prompts from a file --------------------------------------------------------------------------

def test_prompts_file_as_text_and_as_jsonl(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffDéjà vu?\r\n\nTwo?\nTwo?\n", "utf-8")
    chat = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Four?"}]
    rows = [{"prompt": "Three?"}, {"messages": chat},
            {"messages": [*chat[1:], {"role": "assistant", "content": "An old answer"}]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with teacher() as server:
        for name, n in (("p.txt", 2), ("p.jsonl", 3)):
            assert generate(tmp_path, server, "--system_prompt=", f"--output_path={name}.rows",
                            f"--num_examples={n}", f"--prompts_file={name}") == 0
    sent = [body["messages"] for _, _, body in server.requests]
    expected = [[{"role": "user", "content": text}] for text in ("Déjà vu?", "Two?", "Three?")]
    assert sorted(sent, key=str) == sorted([*expected, chat, chat[1:]], key=str)

@pytest.mark.parametrize(("name", "text", "message"), [
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 1}\nx\n', "p.jsonl line 2 .*2 bad"),
    ("p.jsonl", b'{"messages": [{"role": "user", "content": " "}]}\n', "p.jsonl line 1 "),
    ("p.jsonl", b'{"prompt": "\\ud800"}\n', "p.jsonl line 1 "),
    ("p.txt", b"a\n\xff\n", "p.txt line 2 must be UTF-8"), ("p.txt", b"a\nb\na\n", "than 2 .*=2$"),
    ("other.txt", b"", "No such file.*p.txt")])
def test_bad_prompts_file_is_named_before_anything_is_sent(name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text)
    with teacher() as server:
        path = name.replace("other", "p")
        error = generate(tmp_path, server, "--num_examples=3", f"--prompts_file={path}")
    assert re.match(f"error: .*{message}", error) and not server.requests

def test_prompts_of_a_file_are_tried_again_in_this_run_and_the_next(tmp_path):
    (tmp_path / "p.txt").write_text("bad\nflaky\ngood\n")
    flags = ["--num_examples=3", "--prompts_file=p.txt", "--max_retries=2", "--concurrency=1"]
    times = {"bad": 9, "flaky": 1, "good": 0}  # how often each fails
    with teacher(lambda prompt, asked: "empty" if asked <= times[prompt] else None) as server:
        assert re.match("error: no prompt is left", generate(tmp_path, server, *flags))
        assert server.prompts() == ["bad"] * 3 + ["flaky"] * 2 + ["good"]
        server.behave = lambda prompt, asked: None
        assert generate(tmp_path, server, *flags) == 0
    assert server.prompts()[6:] == ["bad"]
    assert [row["prompt"] for row in read(tmp_path / "rows.jsonl")] == ["flaky", "good", "bad"]

# --- Manners --------------------------------------------------------------------------------------

def test_requests_keep_the_given_pace(tmp_path):
    began = time.monotonic()
    with teacher() as server:
        assert generate(tmp_path, server, "--num_examples=8", "--requests_per_minute=300") == 0
    times = sorted(at - began for at, _, _ in server.requests)
    assert len(times) == 8 and all(at > 0.2 * i for i, at in enumerate(times)), times

def test_retry_after_holds_back_every_request(tmp_path):
    def behave(prompt, asked):
        if len(server.requests) == 10:
            return lambda handler, body: (429, {"error": {}}, {"Retry-After": "1.5"})
    with teacher(behave, delay=0.02) as server:
        assert generate(tmp_path, server, "--num_examples=40", "--concurrency=4") == 0
    times = [at - server.requests[9][0] for at, _, _ in server.requests]
    assert len(times) == 41 and not any(0.6 < at < 1.4 for at in times), times

def test_as_many_requests_are_in_flight_as_concurrency_says(tmp_path):
    barrier, flying, most = threading.Barrier(8, timeout=20), [], []
    def behave(prompt, asked):
        flying.append(prompt)
        barrier.wait()  # nobody goes on before 8 are there
        most.append(len(flying))
        barrier.wait()
        flying.remove(prompt)
    with teacher(behave) as server:
        assert generate(tmp_path, server, "--num_examples=40", "--concurrency=8") == 0
    assert set(most) == {8} and len(server.requests) == 40

def test_parameters_that_the_model_refuses_are_replaced(tmp_path, capfd):
    def refuse(handler, body):
        name = "max_tokens" if "max_tokens" in body else "temperature"
        code = "unsupported_parameter" if name == "max_tokens" else "unsupported_value"
        return 400, {"error": {"message": f"no {name}", "param": name, "code": code}}
    def behave(prompt, asked):
        return refuse if {"max_tokens", "temperature"} & server.requests[-1][2].keys() else None
    with teacher(behave) as server:
        assert generate(tmp_path, server, "--num_examples=5", "--concurrency=1") == 0
    last = server.requests[-1][2]
    assert last["max_completion_tokens"] == 200 and not {"max_tokens", "temperature"} & last.keys()
    assert len(server.requests) == 7 and capfd.readouterr().out.count("gpt-4o takes no") == 2
    assert {row["temperature"] for row in read(tmp_path / "rows.jsonl")} == {None}

@pytest.mark.parametrize(("status", "code"), [
    (429, "insufficient_quota"), (401, "invalid_api_key"), (403, None), (404, "model_not_found")])
def test_a_hopeless_run_stops_at_once_and_hides_the_key(status, code, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    def refuse(handler, body):
        assert handler.headers["authorization"] == f"Bearer {KEY}"
        return status, {"error": {"message": f"not for {KEY}", "code": code}}
    with teacher(lambda *_: refuse) as server:
        error = generate(tmp_path, server, "--concurrency=1")
    start = rf"error: HTTP {status}: not for \[API key\]; check the key in OPENAI_API_KEY"
    assert re.match(start, error)
    assert len(server.requests) == 1

def test_the_key_is_in_no_file_and_no_output(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_KEY", KEY)
    def echo(handler, body):
        text = handler.headers["authorization"]
        answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        odd = len(body["messages"][1]["content"]) % 2
        return (400, {"error": {"message": text}}) if odd else (200, answer)
    with teacher(lambda *_: echo) as server:
        assert generate(tmp_path, server, "--num_examples=20", "--api_key_env_var=MY_KEY") == 0
    for name in ("rows.jsonl", "rows.jsonl.failed.jsonl"):
        text = (tmp_path / name).read_text()
        assert "Bearer [API key]" in text and KEY not in text
    assert KEY not in str(capfd.readouterr())

def test_the_closing_line_has_rows_failures_tokens_and_money(tmp_path, capfd):
    with teacher() as server:
        prices = ["--price_per_million", "1000", "3000"]
        assert generate(tmp_path, server, "--num_examples=10", *prices) == 0
    assert re.search(r"done: 10 rows in rows.jsonl, 0 failures, [\d.]+ requests/s, 300 \+ 100 "
                     r"tokens, [\d.]+ s, \$0.60 of about \$0.60\n$", capfd.readouterr().out)

@pytest.mark.parametrize(("flags", "message"), [
    (["--num_examples=0"], "--num_examples=0 "), (["--temperature=3"], "--temperature=3"),
    (["--concurrency=0"], "--concurrency=0"), (["--price_per_million", "1"], "--price_per_million"),
    (["--num_examples=20000"], "take --num_examples=13000"),
    (["--bad=1"], "unrecognized arguments: --bad=1"),
    (["--base_url=localhost:1"], "--base_url=localhost:1"), (["--output_path=."], "Is a directory"),
    ([], "OPENAI_API_KEY holds no API key"),
    (["--base_url=http://127.0.0.1:{port}/v1", "--max_retries=0"],
     "cannot reach --base_url http://127")])
def test_wrong_settings_end_with_one_line(flags, message, tmp_path):
    flags = [flag.format(port=free_port()) for flag in flags]
    assert re.match(f"error: .*{re.escape(message)}", run_main(tmp_path, NAME, *flags))

# --- A real server --------------------------------------------------------------------------------

@contextmanager
def transformers_serve(folder, model, port):
    """As in README, but for the cache: an empty one, so that nothing of this machine is needed."""
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--device", "cpu",
               "--port", str(port)]
    with (folder / "serve.log").open("w") as log:
        env = os.environ | {"HF_HOME": str(folder / "cache")}
        server = psutil.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            end, ready = time.monotonic() + 100, False
            while not ready:
                assert server.poll() is None and time.monotonic() < end, log.name
                with suppress(OSError):
                    ready = urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
            yield
        finally:
            server.kill()
            server.wait(30)

def test_a_local_model_behind_transformers_serve_is_a_teacher(tmp_path):
    model = common.GPTModel({"vocab_size": 257, "context_length": 256, "emb_dim": 32, "n_heads": 2,
                             "n_layers": 1, "drop_rate": 0.0, "qkv_bias": False})
    torch.nn.init.zeros_(model.out_head.weight)  # every byte is as likely; the end comes some time
    (tmp_path / "my_model").mkdir()
    common.save_hugging_face(model, common.load_encoding("bytes"), tmp_path / "my_model")
    port = free_port()
    server = SimpleNamespace(url=f"--base_url=http://127.0.0.1:{port}/v1")
    with transformers_serve(tmp_path, "./my_model", port):
        code = generate(tmp_path, server, "--num_examples=4", "--model=./my_model",
                        "--max_tokens=20", "--system_prompt=", "--keep_truncated")
    assert code == 0, (tmp_path / "serve.log").read_text()[-3000:]
    rows = read(tmp_path / "rows.jsonl")
    assert len(rows) == 4 and all(row["response"] for row in rows)
    assert all(0 < row["usage"]["completion_tokens"] <= 20 for row in rows)
