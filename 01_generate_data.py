"""01 - Let a teacher model behind an OpenAI-compatible API write training data.

You learn   how asyncio keeps many requests in flight, and what paces them; which answers are no
            training data; how a file that only grows outlives Ctrl-C and kill -9
Run it      python 01_generate_data.py --num_examples 1000 --model gpt-4o    # with OPENAI_API_KEY
            python 01_generate_data.py --base_url http://127.0.0.1:8000/v1 --model ./my_model
Expect      done: 6 rows in data/distillation_data.jsonl, 0 failures, 0.2 requests/s, 234 + 360
            tokens, 25.3 s    (README's local teacher, 2 busy CPU cores, transformers 5.23, 2026-11)
Reads       --prompts_file, or nothing: a built-in grid has 13,000 different prompts
Writes      data/distillation_data.jsonl; what was turned away and why, in .failed.jsonl
Source      Kim and Rush 2016 (arXiv:1606.07947): a student learns from its teacher's answers
"""

import asyncio
import hashlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import filelock
import httpx2  # the openai package's HTTP client
import openai
import yaml
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

TOPICS = """photosynthesis, black holes, vaccines, earthquakes, the water cycle, natural selection,
electric motors, antibiotics, sleep, memory, the human heart, food allergies, weather forecasts,
climate change, solar panels, bridges, coral reefs, bees, dinosaurs, sourdough bread, houseplants,
first aid, running, chess, photography, jazz, poetry, detective novels, film editing, stage fright,
job interviews, meetings, learning a language, small talk, household budgets, compound interest,
inflation, insurance, advertising, the Roman Empire, the printing press, democracy, human rights,
maps, time zones, prime numbers, probability, sorting algorithms, passwords, search engines"""
TASKS = """Explain X; Give an overview of X; List the three most important facts about X; Answer a
question that people often ask about X; Correct a common mistake about X; Give practical advice
about X; Tell a short story that involves X; Write a short poem about X; Write two quiz questions
with answers about X; Describe the history of X; Suggest a small project about X; Explain the most
important terms to do with X; Write a dialogue between two friends about X"""
LEVELS = "a ten-year-old; a complete beginner; a university student; an experienced practitioner"
STYLES = "Keep a friendly tone; Be formal; Use short sentences; Include an example; Be a bit funny"
GRID = [re.split("[,;]\\s", part.replace("\n", " ")) for part in (TOPICS, TASKS, LEVELS, STYLES)]
REFUSAL = re.compile(r"I.?m sorry.{1,6}I can(.?t|not)|I can(.?t|not) (help|assist)|As an AI ")

@dataclass(frozen=True)
class Config:
    num_examples: int = HfArg(default=100, help="good rows that the file shall have")
    output_path: str = HfArg(default="./data/distillation_data.jsonl", help="file of the rows")
    model: str = HfArg(default="gpt-4o", help="the teacher's name on the server")
    max_tokens: int = HfArg(default=200, help="longest answer, in tokens")
    temperature: float = HfArg(default=0.7, help="of sampling; 0 = the likeliest token")
    api_key_env_var: str = HfArg(default="OPENAI_API_KEY", help="variable that holds the API key")
    base_url: str = HfArg(default="", help="another OpenAI-compatible server; often ends in /v1")
    prompts_file: str = HfArg(default="", help="a prompt a line; or .jsonl: prompt or messages")
    system_prompt: str = HfArg(default="auto", help="auto: 'answer in at most ... words'; or empty")
    concurrency: int = HfArg(default=16, help="most requests in flight")
    requests_per_minute: float = HfArg(default=0, help="0 = as the server allows")
    max_retries: int = HfArg(default=5, help="of a request; and of a prompt of prompts_file")
    timeout_seconds: float = HfArg(default=120, help="longest wait for one answer")
    keep_truncated: bool = HfArg(default=False, help="answers cut off by max_tokens are good rows")
    price_per_million: list[float] = HfArg(default_factory=list, help="dollars: input output")
    seed: int = HfArg(default=0, help="fixes the order of the grid's prompts")
    config: str = HfArg(default="", help="YAML file of flags; the command line wins over it")

    # A prompt of the grid gives way to the next one, one from a file is asked again.
    attempts = property(lambda self: 1 + self.max_retries if self.prompts_file else 1)

    def __post_init__(self):
        for name, low, high in (
                ("num_examples", 1, 1e9), ("max_tokens", 1, 1e6), ("temperature", 0, 2),
                ("concurrency", 1, 1000), ("requests_per_minute", 0, 1e6),
                ("max_retries", 0, 100), ("timeout_seconds", 0.1, 1e6)):
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"--{name}={value} must lie between {low} and {high:.0f}")
        prices = self.price_per_million
        if len(prices) not in (0, 2) or not all(0 <= price < 1e9 for price in prices):
            raise ValueError(f"--price_per_million={prices} must be two prices, such as 2.5 10")
        if self.base_url and not re.match(r"https?://[^/\s]", self.base_url):
            raise ValueError(f"--base_url={self.base_url} must be like http://127.0.0.1:8000/v1")

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

# --- Step 1. The prompts, no two alike ----------------------------------------------------------

def grid_prompts(seed):
    """Yield every combination of topic, task, difficulty and style once, in an order by seed."""
    combinations = list(itertools.product(*GRID))
    random.Random(seed).shuffle(combinations)
    for topic, task, level, style in combinations:
        yield [{"role": "user", "content": f"{task.replace('X', topic)} for {level}. {style}."}]

def file_prompts(path):
    """Yield the messages of each line. A last message of the assistant, as in the rows that this
    script writes, is left out: the teacher is asked for it. Raises ValueError for bad lines."""
    bad, is_json = [], path.endswith((".jsonl", ".json"))
    for number, line in enumerate(open(path, "rb"), 1):
        try:
            row = json.loads(line) if is_json else {"prompt": line.decode("utf-8-sig").strip()}
            messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            texts = [(x["role"] + x["content"].strip()).encode() for x in messages]
            if messages[-1]["role"] != "user" or b"user" in texts:
                raise ValueError
            yield messages
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if line.strip():
                bad.append(number)
    if bad:
        rule = "JSON with a prompt, or messages up to a user's" if is_json else "UTF-8"
        raise ValueError(f"{path} line {bad[0]} must be {rule} ({len(bad)} bad lines)")

def all_prompts(config):
    """{id: messages}. The id is a hash of everything that is asked for."""
    words = max(1, config.max_tokens * 6 // 10)  # 200 tokens are about 150 English words
    system = (f"You are a helpful assistant. Answer completely, in at most {words} words."
              if config.system_prompt == "auto" else config.system_prompt)
    prompts, path = {}, config.prompts_file
    front = [{"role": "system", "content": system}] if system else []
    for messages in file_prompts(path) if path else grid_prompts(config.seed):
        if messages[0]["role"] not in ("system", "developer"):
            messages = front + messages
        request = json.dumps([config.model, config.max_tokens, config.temperature, messages])
        prompts[hashlib.sha256(request.encode()).hexdigest()[:20]] = messages
    return prompts

# --- Step 2. The files ----------------------------------------------------------------------------

def read_ids(path, known=None):
    """The ids of a file's rows. A last line that a kill has cut off is removed, with a notice.
    Raises ValueError for broken rows and, given the known ids, for others and for repeats."""
    ids, bad, line = set(), [], b"\n"
    for number, line in enumerate(path.open("rb") if path.exists() else [], 1):
        try:
            if not line.endswith(b"\n"):
                break
            row_id = json.loads(line)["id"]
            if known is not None and (row_id in ids or row_id not in known):
                raise ValueError
            ids.add(row_id)
        except (ValueError, LookupError, TypeError, RecursionError):
            bad.append(number)
    if bad:
        raise ValueError(
            f"{path} line {bad[0]} ({len(bad)} such lines) is broken, comes twice, or had another "
            "prompt, --model, --max_tokens or --temperature: take these, or another --output_path")
    if not line.endswith(b"\n"):
        os.truncate(path, path.stat().st_size - len(line))
        print(f"{path} line {number} was cut off when it was written; it is dropped")
    return ids

def without_key(text, key):
    """For all that is shown or written. A short key is a placeholder and may be a usual word."""
    return text.replace(key, "[API key]") if len(key) > 11 else text

def append(path, row, key):
    """Add one line in one piece: a kill loses no more than this line."""
    line = without_key(json.dumps(row, ensure_ascii=False), key) + "\n"
    with open(path, "ab") as file:
        file.write(line.encode("utf-8", "replace"))

# --- Step 3. One request --------------------------------------------------------------------------

class Traffic:
    """Hooks that the HTTP client calls for every attempt, also for those that openai repeats."""
    def __init__(self, config):
        self.interval = 60 / config.requests_per_minute if config.requests_per_minute else 0
        self.queue, self.next_slot = asyncio.Lock(), 0
        self.hooks = {"request": [self.before_request], "response": [self.after_response]}

    async def before_request(self, request):
        async with self.queue:  # first come, first served
            while (wait := self.next_slot - time.monotonic()) > 0:
                await asyncio.sleep(wait)  # then look again: the slot may have moved meanwhile
            self.next_slot = time.monotonic() + self.interval

    async def after_response(self, response):
        if response.status_code in (429, 503):
            wait = response.headers.get("retry-after", "")  # a number, or a date: openai knows both
            until = time.monotonic() + (float(wait) if wait.replace(".", "", 1).isdigit() else 0)
            if until > self.next_slot + 10:
                tqdm.write(f"the server asks for a pause of {wait} seconds")
            self.next_slot = max(self.next_slot, until)
            if b"insufficient_quota" in await response.aread():
                response.headers["x-should-retry"] = "false"  # openai would try again for nothing

async def ask(client, config, messages, parameters):
    """Returns what examine() does, or ({"response": error}, reason). Raises ValueError for what all
    requests would meet. parameters: what all send; changed here when the model wants others."""
    while True:
        sent = dict(parameters)
        try:
            # chat.completions.create() sends the same; its typed objects double the CPU time.
            return examine(config.keep_truncated, await client.post(
                "/chat/completions", cast_to=httpx2.Response,
                body={"model": config.model, "messages": messages, **sent}))
        except openai.APIConnectionError as problem:  # a timeout, too
            cause = problem.__cause__
            if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
                raise ValueError(f"cannot reach --base_url {client.base_url}: {cause}") from None
            return {"response": str(cause)}, type(cause).__name__
        except openai.APIStatusError as problem:
            status, code, name = problem.status_code, problem.code, problem.param
            text = problem.body.get("message") if isinstance(problem.body, dict) else None
            text = str(text or problem.response.text)[:500]
            if 400 < status < 405 or b"insufficient_quota" in problem.response.content:
                raise ValueError(f"HTTP {status}: {text}; check the key in {config.api_key_env_var}"
                                 ", its credit, --model and --base_url") from None
            if code not in ("unsupported_parameter", "unsupported_value") or name not in sent:
                return {"response": text}, f"HTTP {status} {code or ''}".strip()
            if name in parameters:  # the first worker to learn it; the others just ask again
                value = parameters.pop(name)
                parameters |= {"max_completion_tokens": value} if name == "max_tokens" else {}
                tqdm.write(f"{config.model} takes no {name}={value}; sending {parameters} now")

def examine(keep_truncated, response):
    """Returns (parts of a row, None), or (parts, reason) if they are no training data."""
    try:
        answer = response.json()
        choice, usage = answer["choices"][0], dict(answer.get("usage") or {})
        refusal, text = choice["message"].get("refusal"), choice["message"].get("content") or ""
        refused, finish_reason = REFUSAL.match(text.strip()), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        reason = "error in the body" if b'"error"' in response.content else "malformed body"
        return {"response": response.text, "usage": {}}, reason
    reason = ("content_filter" if finish_reason == "content_filter" else
              "refusal" if refusal or refused else
              "length" if finish_reason == "length" and not keep_truncated else
              "empty" if not text.strip() else None)
    return {"response": text or refusal or "", "finish_reason": finish_reason, "usage": usage,
            "created": answer.get("created") or int(time.time()),
            "request_id": response.headers.get("x-request-id") or answer.get("id")}, reason

# --- Step 4. All requests -------------------------------------------------------------------------

class Progress:
    """What this run has done so far, and the bar that shows it; in a pipe, 20 lines."""
    def __init__(self, config, rows):
        self.config, self.rows, self.rows_before, self.began = config, rows, rows, time.monotonic()
        self.failures, self.in_a_row = Counter(), Counter()  # by reason; since the last good row
        self.tokens, self.finish_reasons = Counter(), Counter()
        self.bar = tqdm(total=config.num_examples, initial=rows, unit="row", disable=None)

    def count(self, parts, reason):
        """Raises ValueError when everything fails, rather than pay for all of the grid."""
        self.tokens.update({key: n for key, n in parts.get("usage", {}).items() if type(n) is int})
        if "finish_reason" in parts:
            self.finish_reasons[parts["finish_reason"]] += 1
            if self.finish_reasons.total() == 50 and self.finish_reasons["length"] > 10:
                tqdm.write("over 20% of the first 50 answers are cut off: raise --max_tokens")
        if reason:
            self.failures[reason] += 1
            self.in_a_row[reason] += 1
            self.last_failure = f"{reason}, {parts['response'][:300]}"
        else:
            self.rows += 1
            self.in_a_row.clear()
        self.bar.set_postfix_str(self.summary(), refresh=False)
        self.bar.update(not reason)
        if self.bar.disable and not reason and self.rows * 20 % self.config.num_examples < 20:
            print(f"{self.rows:,} of {self.config.num_examples:,} rows, {self.summary()}")
        if (n := self.in_a_row.total()) == 50 * self.config.attempts:
            mostly = self.in_a_row.most_common(1)[0][0]
            raise ValueError(f"{n} failures in a row, mostly {mostly}; the last: "
                             + self.last_failure)

    def summary(self):
        new_rows, failures = self.rows - self.rows_before, self.failures.total()
        seconds, prices = time.monotonic() - self.began, self.config.price_per_million
        tokens = self.tokens["prompt_tokens"], self.tokens["completion_tokens"]
        text = (f"{failures:,} failures, {(new_rows + failures) / seconds:.1f} requests/s, "
                f"{tokens[0]:,} + {tokens[1]:,} tokens, {seconds:.1f} s")
        if prices:
            spent = (tokens[0] * prices[0] + tokens[1] * prices[1]) / 1e6
            expected = spent * (self.config.num_examples - self.rows_before) / max(new_rows, 1)
            text += f", ${spent:.2f} of about ${expected:.2f}"
        return text

async def collect(config, key, prompts, todo, progress):
    """Ask until output_path has num_examples rows. Returns the signal that stopped it."""
    client = openai.AsyncOpenAI(
        api_key=key, base_url=config.base_url or None, max_retries=config.max_retries,
        timeout=openai.Timeout(config.timeout_seconds, connect=10),
        http_client=openai.DefaultAsyncHttpxClient(event_hooks=Traffic(config).hooks))
    parameters = {"max_tokens": config.max_tokens, "temperature": config.temperature}
    todo, path, missing = iter(todo), config.output_path, config.num_examples - progress.rows

    async def worker():
        nonlocal missing  # rows that no worker is after
        while missing > 0 and (prompt_id := next(todo, None)):
            missing -= 1
            messages = prompts[prompt_id]
            row = {"id": prompt_id, "prompt": messages[-1]["content"]}
            for _ in range(config.attempts):
                parts, reason = await ask(client, config, messages, parameters)
                if reason:
                    append(f"{path}.failed.jsonl", row | {"reason": reason} | parts, key)
                else:
                    reply = {"role": "assistant", "content": parts["response"]}
                    append(path, row | parts | {
                        "messages": [*messages, reply], "model": config.model,
                        "temperature": parameters.get("temperature")}, key)
                progress.count(parts, reason)
                if not reason or "usage" not in parts:  # without an answer, openai has tried again
                    break
            missing += reason is not None

    loop, task, signals = asyncio.get_running_loop(), asyncio.current_task(), []
    def stop(number, frame):
        if not signals and not task.done():  # once; when all is done, the loop may be closed
            loop.call_soon_threadsafe(task.cancel)
        signals.append(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(config.concurrency):
                group.create_task(worker())
    except asyncio.CancelledError:
        return signals[0]
    except ExceptionGroup as group:
        raise group.exceptions[0] from None

def generate(config):
    """Returns the exit code: 0, or 128 + the number of the signal that asked to stop."""
    prompts, path = all_prompts(config), Path(config.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)  # held as long as this name lives
    except filelock.Timeout:
        raise ValueError(f"--output_path={path} is in use by another run") from None
    done, failed = read_ids(path, prompts), read_ids(Path(f"{path}.failed.jsonl"))
    if len(done) >= config.num_examples:
        print(f"finished: {path} has {len(done):,} rows; no request was sent")
        return 0
    todo = [i for i in prompts if i not in done and (config.prompts_file or i not in failed)]
    todo.sort(key=failed.__contains__)  # from a file, those that have failed before come last
    if len(done) + len(todo) < config.num_examples:
        raise ValueError(f"--num_examples={config.num_examples} asks for more than {len(prompts)} "
                         f"different prompts can give; take --num_examples={len(done) + len(todo)}")
    key = os.environ.get(config.api_key_env_var, "").strip() or (config.base_url and "none")
    if not (key and key.isascii() and key.isprintable()):
        raise ValueError(f"{config.api_key_env_var} holds no API key: set it, or use --base_url")
    print(f"{len(done):,} of {config.num_examples:,} rows are in {path}; asking {config.model}")
    progress = Progress(config, len(done))
    try:
        number = asyncio.run(collect(config, key, prompts, todo, progress))
    except ValueError as problem:
        raise ValueError(without_key(str(problem), key)) from None
    finally:
        progress.bar.close()
        complete = progress.rows >= config.num_examples
        reasons = "".join(f", {n} {reason}" for reason, n in progress.failures.most_common())
        print(f"{'done' if complete else 'stopped, the same command goes on'}: {progress.rows:,} "
              f"rows in {path}, {progress.summary()}{reasons}")
    if not complete and not number:
        raise ValueError(f"no prompt is left, see {path}.failed.jsonl; the last failure: "
                         + without_key(progress.last_failure, key))
    return 0 if complete else 128 + number

def main():
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        sys.exit(generate(parse_config(Config, {})))
    except (ValueError, OSError, httpx2.InvalidURL) as problem:
        sys.stderr.write(f"error: {' '.join(str(problem).split())}\n")
        sys.exit(1)
    except KeyboardInterrupt:  # before the first request
        sys.exit(130)

if __name__ == "__main__":
    main()
