"""Lesson 05 by its command line, with a tiny Llama without a chat template and a GPT-2 of 02."""

import importlib
import json
import random
import re
import shutil
import signal
import sys
import urllib.request
from contextlib import nullcontext
from functools import partial

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    WORDS,
    assert_same,
    free_port,
    read_metrics,
    run_main,
    run_script,
    started,
    write_rows,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    pipeline,
)

import common

NAME = "05_sft_multigpu.py"
lesson = importlib.import_module("05_sft_multigpu")
PLAIN = lesson.CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")

def chat(*contents, system=None):
    """Messages, the user's first, by turns."""
    roles = ["user", "assistant"] * len(contents)
    return [{"role": "system", "content": system}] * bool(system) + [
        {"role": role, "content": x} for role, x in zip(roles, contents, strict=False)]

@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """A folder with two models of 257 byte tokens, and 64 chats of one to three turns."""
    folder, draw = tmp_path_factory.mktemp("kit05"), random.Random(0)
    torch.manual_seed(0)
    gpt = common.GPTModel({"vocab_size": 257, "context_length": 192, "emb_dim": 32, "n_heads": 2,
                           "n_layers": 2, "drop_rate": 0.0, "qkv_bias": False})
    (folder / "gpt").mkdir()
    common.save_hugging_face(gpt, common.load_encoding("bytes"), folder / "gpt")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=192,
        tie_word_embeddings=True, bos_token_id=256, eos_token_id=256)).save_pretrained(
            folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "llama")
    say = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))
    write_rows(folder / "chats.jsonl", [
        {"messages": chat(f"Tree {i}?", say(), *[say() for _ in range(2 * (i % 3))])}
        for i in range(64)])
    return folder

def flags(kit, **changes):
    given = {"dataset": kit / "chats.jsonl", "model": kit / "llama", "device": "cpu",
             "precision": "fp32", "learning_rate": 3e-3, "log_every": 1, "max_answers": 8,
             "max_new_tokens": 40, "prompt": "Tree 5?"} | changes
    return [f"--{key}={value}" for key, value in given.items()]

def tune_here(folder, kit, *more, **changes):
    """Returns the exit code, or the line with the error."""
    output = folder / "sft_output_multigpu"
    return run_main(folder, NAME, *flags(kit, output_dir=output, **changes), *more)

def split(batch_size, accumulation, **changes):
    return {"batch_size": batch_size, "gradient_accumulation_steps": accumulation} | changes

# 13 chats are held out, 51 make three batches of 16 and one of 3 an epoch, of which ranks get none.
SHORT = {"max_steps": 8, "val_fraction": 0.2, "max_grad_norm": 0, "eval_every": 3}

@pytest.fixture(scope="module")
def whole(kit, tmp_path_factory):
    """Folder of an undisturbed run of two epochs on one process."""
    folder = tmp_path_factory.mktemp("whole05")
    assert tune_here(folder, kit, **split(16, 1, **SHORT)) == 0
    return folder

def load(kit, name="llama"):
    model, tokenizer = lesson.load_model("model", kit / name, torch.float32, "cpu")
    lesson.prepare_tokenizer(model, tokenizer)
    return model.eval(), tokenizer

def encoded(kit, tokenizer, max_length=192):
    return lesson.encode_chats(lesson.load_chats(kit / "chats.jsonl")[0], tokenizer, max_length)[0]

# --- The mathematics does not depend on the launch ------------------------------------------------

def test_two_processes_and_accumulation_learn_the_same(kit, whole, tmp_path):
    run = run_script(tmp_path, NAME, *flags(kit, **split(2, 4, **SHORT)), launcher="torchrun",
                     nproc=2)
    assert "2 rows x 4 micro-batches x 2 processes = 16 rows a step; 4 steps per" in run.stdout
    assert "--max_length 1024 is lowered to the model's 192 positions" in run.stdout
    assert re.search(r"^learned is what stands in brackets: .*assistant\\n\[[a-z ]+<\|im_end\|>\]",
                     run.stdout, re.M)
    assert_same(tmp_path, whole)
    own, expected = (read_metrics(folder)[-1] for folder in (tmp_path, whole))
    for key in ("val_token_accuracy", "stop_rate", "before_val_loss", "before_stop_rate"):
        assert own[key] == pytest.approx(expected[key], rel=1e-5)
    assert tune_here(tmp_path, kit, "--overwrite", gradient_checkpointing=True,
                     **split(4, 4, **SHORT)) == 0
    assert_same(tmp_path, whole)

def test_packed_rows_on_two_processes_learn_the_same_as_on_one(kit, tmp_path):
    changes = {"packing": 1, "max_steps": 6, "max_answers": 1}
    (tmp_path / "1").mkdir()
    assert tune_here(tmp_path / "1", kit, **split(4, 1, **changes)) == 0
    run_script(tmp_path / "2", NAME, *flags(kit, **split(1, 2, **changes)), launcher="torchrun",
               nproc=2)
    assert_same(tmp_path / "2", tmp_path / "1")

# --- Packing --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_packed_chats_do_not_see_each_other(kit, name):
    """Logits of chats that share rows are those of each chat alone; so is the loss. The two ways
    in which transformers would let chats see each other without a word are seen to do so."""
    model, tokenizer = load(kit, name)
    chats = encoded(kit, tokenizer)
    rows = lesson.pack_chats(chats, 192)
    assert len(rows) < len(chats) / 2
    learned, cpu = lesson.learned_logits, torch.device("cpu")
    alone = [learned(model, [[chat]], False, cpu)[0] for row in rows for chat in row]
    packed = torch.cat([learned(model, rows[i : i + 3], True, cpu)[0]
                        for i in range(0, len(rows), 3)])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)

    input_ids, targets, position_ids = lesson.collate_chats(rows[:1])
    keep, first = targets != -100, torch.cat(alone)[: (targets != -100).sum()]
    for leak in ({"use_cache": True}, {"attention_mask": torch.ones_like(input_ids)}):
        leaky = model(input_ids, position_ids=position_ids, **{"use_cache": False} | leak)
        assert (leaky.logits[keep] - first).abs().max() > 1e-3, leak

    config = lesson.Config(batch_size=3)
    place = 0, 1, torch.device("cpu"), partial(torch.autocast, "cpu", enabled=False)
    unpacked = lesson.evaluate_chats(model, [[chat] for chat in chats], config, *place)
    config = lesson.Config(batch_size=3, packing=True)
    assert lesson.evaluate_chats(model, rows, config, *place) == pytest.approx(unpacked, rel=1e-5)

def test_every_chat_is_packed_once_and_rows_are_nearly_full():
    draw = np.random.default_rng(0)
    chats = [(np.arange(n), None) for n in draw.integers(2, 300, 1000)]
    rows = lesson.pack_chats(chats, 512)
    assert sorted(id(chat) for row in rows for chat in row) == sorted(map(id, chats))
    lengths = [sum(len(ids) - 1 for ids, _ in row) for row in rows]
    assert max(lengths) <= 512 and sum(lengths) / (512 * len(rows)) > 0.98

def test_padding_share_counts_the_positions_without_a_token():
    assert lesson.padding_share([4, 2, 3], [[0, 1, 2, None]], 2) == pytest.approx(1 - 9 / 14)

def test_a_loss_by_hand(kit):
    """Mean over the learned tokens of all chats, by one plain forward pass for each."""
    model, tokenizer = load(kit)
    chats = encoded(kit, tokenizer)
    nats = torch.cat([F.cross_entropy(
        model(torch.tensor(ids[None]).long()).logits[0, :-1],
        torch.tensor(labels[1:]).long(), reduction="none", ignore_index=-100)[labels[1:] != -100]
        for ids, labels in chats])
    place = 0, 1, torch.device("cpu"), partial(torch.autocast, "cpu", enabled=False)
    rows = [[chat] for chat in chats]
    metrics = lesson.evaluate_chats(model, rows, lesson.Config(batch_size=5), *place)
    assert metrics["val_loss"] == pytest.approx(nats.mean().item(), rel=1e-5)

# --- What is learned ------------------------------------------------------------------------------

def learned_texts(tokenizer, ids, labels):
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(labels != -100)) + 1)
    return [tokenizer.decode(ids[run]) for run in runs if labels[run[0]] != -100]

@pytest.mark.parametrize("template", [None, PLAIN, lesson.CHATML])
def test_answers_and_the_ends_of_their_turns_are_learned(kit, template):
    """Of every turn, nothing else; the same whether the template marks them or not, and also where
    padding and end are the same token."""
    model, tokenizer = lesson.load_model("model", kit / "llama", torch.float32, "cpu")
    if template:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
        tokenizer.chat_template = template
    lesson.prepare_tokenizer(model, tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (tokenizer.pad_token == tokenizer.eos_token) == bool(template)
    messages = chat("Why?", "So. Föhn 火\n", "And?", " Yes", system="Be brief.")
    [(ids, labels)], cut = lesson.encode_chats([("row", messages)], tokenizer, 500)
    assert learned_texts(tokenizer, ids, labels) == ["So. Föhn 火\n<|im_end|>", " Yes<|im_end|>"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == text.rstrip() and cut == 0
    shown = lesson.show_labels(ids, labels, tokenizer)
    assert shown.count("[") == 2 and shown.endswith("assistant\\n[ Yes<|im_end|>]")

def test_the_template_of_02_is_kept(kit):
    _, tokenizer = load(kit, "gpt")
    [(ids, labels)], _ = lesson.encode_chats([("row", chat("a", "b", "c", "d"))], tokenizer, 192)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert learned_texts(tokenizer, ids, labels) == [" b<|endoftext|>", " d<|endoftext|>"]

def test_a_long_chat_is_cut_after_the_last_turn_that_fits(kit):
    _, tokenizer = load(kit)
    messages = chat("a", "b", "c", "d" * 50)
    first, both = (len(tokenizer.apply_chat_template(messages[:n], return_dict=False)) - 1
                   for n in (2, 4))
    for max_length, kept in ((both, both), (both - 1, first), (first, first), (first - 1, None)):
        [row], cut = lesson.encode_chats([("row", messages)], tokenizer, max_length)
        assert (row and len(row[0])) == kept and cut == (kept == first)

def test_new_tokens_get_the_mean_row_and_a_multiple_of_64(kit):
    old = load_file(kit / "llama/model.safetensors")["model.embed_tokens.weight"]
    model, tokenizer = load(kit)
    new = model.get_input_embeddings().weight
    assert len(tokenizer) == 259 and new.shape[0] == 320
    assert torch.equal(new[:257], old)
    torch.testing.assert_close(new[257:], old.mean(0).expand(63, -1))
    assert model.generation_config.suppress_tokens == list(range(259, 320))
    model, tokenizer = lesson.load_model("model", kit / "llama", torch.float32, "cpu")
    model.resize_token_embeddings(300)  # rows without a token, as Pythia has them
    lesson.prepare_tokenizer(model, tokenizer)
    new = model.get_input_embeddings().weight
    assert new.shape[0] == 300 and torch.equal(new[258], new[:257].mean(0))

def test_some_kinds_of_models_cannot_be_packed(kit):
    _, tokenizer = load(kit)
    first = encoded(kit, tokenizer)[0]
    sizes = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    for config in (OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32),
                   MistralConfig(**sizes, intermediate_size=64, num_key_value_heads=1)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        context = (pytest.raises(ValueError, match="--packing: with this kind of model")
                   if config.model_type == "opt" else nullcontext())
        with context:
            lesson.check_packing(model, first, torch.device("cpu"))

FORMS = {
    "messages": {"messages": chat("a", "b")},
    "conversations (ShareGPT)": {"conversations": [
        {"from": "system", "value": "s"}, {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"}]},
    "prompt and response": {"prompt": "a", "response": "b"},
    "prompt and completion": {"prompt": "a", "completion": "b"},
    "instruction, input and output": {"instruction": "a", "input": "x", "output": "b"},
}

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_the_usual_forms_are_read(form, suffix, tmp_path):
    path, rows = tmp_path / f"rows.{suffix}", [FORMS[form]] * 2
    if suffix == "parquet":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else f"{json.dumps(rows[0])}\n\n" * 2)
    for source in (path, tmp_path):  # a folder with one such file
        chats, read = lesson.load_chats(str(source))
        assert read == f"{source}: 2 chats, as {form}"
        question = "a\n\nx" if "instruction" in form else "a"
        assert chats[1][1] == chat(question, "b", system="s" if "ShareGPT" in form else None)

@pytest.mark.parametrize(("row", "messages"), [
    ({"messages": [{"role": "system", "content": ""}, *chat("a", "b", "c")]}, chat("a", "b")),
    ({"prompt": "a", "response": "b", "system": "s"}, chat("a", "b", system="s")),
    ({"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]},
     chat("a", "b", "c", "d")),
])
def test_variants_of_the_forms_are_read(row, messages):
    assert lesson.as_messages(row)[0] == messages

def test_a_template_with_todays_date_gives_the_same_tokens_tomorrow(kit, monkeypatch):
    _, tokenizer = load(kit)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert lesson.render(chat("a"), tokenizer, tokenize=False).startswith("01 Jan 2026<|im_start|>")

def test_a_model_whose_file_could_not_be_saved_is_exported(kit, tmp_path):
    shutil.copytree(kit / "gpt", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"temperature": 0.6, "top_k": 9}')
    assert tune_here(tmp_path, kit, model=tmp_path / "model", max_steps=0) == 0

def test_a_held_out_loss_that_is_not_a_number_costs_no_model(kit, tmp_path, capfd):
    shutil.copytree(kit / "gpt", tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    weights = load_file(path)
    weights["transformer.wte.weight"][ord("Z")] = float("nan")
    save_file(weights, path, {"format": "pt"})
    write_rows(tmp_path / "held_out.jsonl", [{"messages": chat("Z?", "Z.")}])
    assert tune_here(tmp_path, kit, model=tmp_path / "model", max_steps=1,
                     validation_file=tmp_path / "held_out.jsonl") == 0
    assert re.search("^done: val_loss nan -> nan, val_token_accuracy [0-9]", capfd.readouterr().out,
                     re.M)
    assert read_metrics(tmp_path)[-1]["train_loss"] > 0

def test_a_model_learns_its_chats_by_heart_and_to_stop(kit, tmp_path):
    """... and its folder answers in a pipeline."""
    rows = [{"prompt": f"Tree {i}?", "response": f"{WORDS[i % 10]} {WORDS[i // 10]}"}
            for i in range(24)]
    write_rows(tmp_path / "rows.jsonl", rows)
    changes = split(2, 1, val_fraction=0, num_epochs=80, max_answers=24, log_every=100)
    assert tune_here(tmp_path, kit, dataset=tmp_path / "rows.jsonl", learning_rate=1e-2, packing=1,
                     eval_every=1000, **changes) == 0
    last, output = read_metrics(tmp_path)[-1], tmp_path / "sft_output_multigpu"
    assert last["stop_rate"] > 0.9 > 0.1 > last["before_stop_rate"]
    assert last["val_token_accuracy"] > 0.9 and last["val_loss"] < last["before_val_loss"] / 4
    answers = [json.loads(line) for line in (output / "answers_after.jsonl").open()]
    assert len(answers) == 25 and np.mean([row["exact"] for row in answers[1:]]) > 0.8
    ask = pipeline("text-generation", str(output / "final_model"))
    reply = ask(chat("Tree 5?"), do_sample=False, max_new_tokens=60)[0]["generated_text"][-1]
    assert reply["content"].strip() == answers[0]["answer"] != ""
    assert {path.name for path in output.iterdir()} >= {
        "loss.png", "loss.pdf", "answers_before.jsonl", "metrics.jsonl", "runs", "checkpoint.pt"}

@pytest.mark.slow
def test_transformers_serve_answers_with_final_model(whole):
    port = free_port()
    folder = str(whole / "sft_output_multigpu/final_model")
    server = psutil.Popen([sys.executable, "-m", "transformers.cli.transformers", "serve", folder,
                           "--device", "cpu", "--port", str(port)])
    body = {"model": folder, "messages": chat("Tree 5?"), "max_tokens": 8}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
        {"content-type": "application/json"})
    try:
        for _ in range(60):
            try:
                reply = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except ConnectionError:
                assert server.poll() is None
            except urllib.error.URLError:
                lesson.time.sleep(1)
        assert reply["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        server.wait(30)

def test_no_steps_evaluate_and_export(kit, tmp_path):
    assert tune_here(tmp_path, kit, max_steps=0, validation_file=kit / "chats.jsonl") == 0
    record, = read_metrics(tmp_path)
    assert record["val_loss"] == record["before_val_loss"]
    assert (tmp_path / "sft_output_multigpu/final_model/model.safetensors").exists()

@pytest.mark.parametrize("steps", [5, 7])  # a run that ends within the profile, or after it
def test_a_profile_and_deterministic_kernels(steps, kit, tmp_path):
    run = run_script(tmp_path, NAME, *flags(kit, max_steps=steps, max_answers=1), "--profile",
                     "--deterministic")
    assert "Self CPU time total" in run.stdout
    trace = json.loads((tmp_path / "sft_output_multigpu/trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert [x for x in names if x.startswith("ProfilerStep#")] and "aten::mm" in names

def test_final_model_is_pushed_to_the_hub(kit, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setenv("HF_TOKEN", "hf_marked")
    monkeypatch.setattr(lesson.huggingface_hub, "create_repo", lambda repo_id, **given: (
        calls.append((repo_id, given)), type("Url", (), {"repo_id": f"me/{repo_id}"}))[1])
    monkeypatch.setattr(lesson.huggingface_hub, "upload_folder", lambda **given: calls.append(
        {given["repo_id"], *(path.name for path in given["folder_path"].iterdir())}))
    assert tune_here(tmp_path, kit, max_steps=1, push_to_hub="mine") == 0
    assert calls[0] == ("mine", {"private": True, "exist_ok": True})
    assert {"model.safetensors", "tokenizer.json", "me/mine"} <= calls[1]

# --- Against TRL ----------------------------------------------------------------------------------

def test_labels_and_losses_are_those_of_trl(kit, tmp_path):
    trl = pytest.importorskip("trl", reason="install trl beside the requirements to compare")
    datasets = pytest.importorskip("datasets")
    model, tokenizer = load(kit)
    rows = [{"messages": messages} for _, messages in lesson.load_chats(kit / "chats.jsonl")[0]]
    for packing in (False, True):
        args = trl.SFTConfig(str(tmp_path), assistant_only_loss=True, max_length=192, use_cpu=True,
                             packing=packing, bf16=False, per_device_train_batch_size=4)
        trainer = trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows),
                                 processing_class=tokenizer)
        chats = encoded(kit, tokenizer)
        wanted = sorted((ids.tolist(), labels.tolist()) for ids, labels in chats)
        losses, targets, found = 0.0, 0, []
        for batch in trainer.get_train_dataloader():
            labels, starts = batch["labels"], (batch["labels"][:, 1:] != -100).sum().item()
            with torch.no_grad():
                losses += trainer.compute_loss(model, dict(batch)).item() * starts
            targets += starts
            positions = batch.get("position_ids")
            for i, ids in enumerate(batch["input_ids"]):
                if positions is None:
                    pieces = [batch["attention_mask"][i].bool()]
                else:
                    number = (positions[i] == 0).cumsum(0)
                    pieces = [number == n for n in number.unique()]
                for piece in pieces:  # TRL keeps the newline after the last turn, unlearned
                    own = labels[i][piece].tolist()
                    last = max(n for n, x in enumerate(own) if x != -100) + 1
                    found.append((ids[piece].tolist()[:last], own[:last]))
        assert sorted(found) == wanted
        place = 0, 1, torch.device("cpu"), partial(torch.autocast, "cpu", enabled=False)
        ours = lesson.evaluate_chats(model, [[x] for x in chats], lesson.Config(), *place)
        assert losses / targets == pytest.approx(ours["val_loss"], rel=1e-4)

# --- Restarts -------------------------------------------------------------------------------------

def test_a_run_that_was_killed_resumes_to_the_same_bits(kit, whole, tmp_path, capfd):
    changes = {"save_every": 3} | split(16, 1, **SHORT)
    with started(tmp_path, NAME, *flags(kit, **changes)) as run:
        run.wait_for_step(random.choice([4, 5, 6]))
        run.kill()
    assert tune_here(tmp_path, kit, "--resume", **changes) == 0
    assert re.search(r"^resumed from step [36]\b", capfd.readouterr().out, re.M)
    assert_same(tmp_path, whole, rel=0)
    assert tune_here(tmp_path, kit, "--resume", **changes) == 0
    assert "this run is finished" in capfd.readouterr().out
    assert "--resume" in tune_here(tmp_path, kit, **changes)
    error = tune_here(tmp_path, kit, "--resume", **changes | {"learning_rate": 1})
    assert re.fullmatch(r"error: checkpoint.pt is of a run with {'learning_rate': 0.003}.*", error)

def test_sigterm_ends_all_with_a_checkpoint(kit, tmp_path):
    with started(tmp_path, NAME, *flags(kit, num_epochs=1000)) as run:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) == 143, run.stderr
    assert re.search(r"^stopped by a signal after step \d+; --resume goes on", run.stdout, re.M)
    assert (tmp_path / "sft_output_multigpu/checkpoint.pt").exists()

# --- Bad input ------------------------------------------------------------------------------------

GOOD = {"messages": chat("a", "b")}
BAD_ROWS = {
    "is empty": [],
    r":2: Expecting .*\(1 bad rows\)": [GOOD, "{oops"],
    r":1: there is no 'content' \(2 bad rows\)": [{"messages": [{"role": "user"}]}] * 2,
    ":1: there are no messages, .* but text": [{"text": "a"}],
    ":1: the conversation is empty": [{"messages": []}],
    ":1: there is no assistant turn": [{"messages": chat("a")}],
    ":1: the roles are out of order: assistant;": [{"messages": chat("a", "b")[::-1]}],
    ":1: the roles are out of order: user, user": [{"messages": chat("a", "b")[:1] * 2 + GOOD[
        "messages"]}],
    ":1: a message is empty": [{"messages": chat("a", " ")}],
    ":1: a row must be a JSON object": [[1]],
}

@pytest.mark.parametrize("words", BAD_ROWS)
def test_bad_rows_are_named_by_line(words, kit, tmp_path):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in BAD_ROWS[words])
    (tmp_path / "bad.jsonl").write_text("".join(f"{line}\n" for line in lines))
    error = tune_here(tmp_path, kit, dataset=tmp_path / "bad.jsonl")
    assert re.fullmatch(f"error: .*bad.jsonl ?{words}.*", error)
    assert not (tmp_path / "sft_output_multigpu").exists()

@pytest.mark.parametrize(("changes", "words"), [
    ({"dataset": "nope.jsonl"}, "No such file .*nope.jsonl"),
    ({"dataset": "no/such-set"}, "no/such-set: .*a file needs no network"),
    ({"model": "no/such-model"}, "--model=no/such-model cannot be loaded"),
    ({"precision": "auto", "fp16": 1}, "fp16 needs a CUDA GPU"),
    ({"backend": "nccl"}, "needs a GPU per process"),
    ({"learning_rate": "nan"}, "--learning_rate=nan must lie"),
    ({"max_length": 20}, "0 of 64 rows fit into --max_length"),
    ({"prompt": "x" * 300}, "--prompt has 3[0-9]+ tokens; take one .* --max_length 192"),
    ({"push_to_hub": "mine"}, "--push_to_hub needs a token: set HF_TOKEN"),
    ({"colour": 1}, "unrecognized arguments: --colour=1"),
])
def test_bad_flags_end_in_one_line(changes, words, kit, tmp_path):
    assert re.fullmatch(f"error: .*{words}.*", tune_here(tmp_path, kit, **changes))

@pytest.mark.parametrize(("template", "words"), [
    ("{{ raise_exception('no such role') }}", "the chat template fails: no such role"),
    ("{% for m in messages %}{{ m.content }} {% endfor %}", "ends an answer without a special"),
    ("{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
     "writes a turn in another way once it is answered"),
    ("{% for m in messages %}{{ ': ' + m.content + eos_token + '.' }}{% endfor %}",
     "ends an answer without a special"),
])
def test_templates_that_cannot_be_used_are_refused(template, words, kit, tmp_path):
    shutil.copytree(kit / "gpt", tmp_path / "strict")
    (tmp_path / "strict/chat_template.jinja").write_text(template)
    assert words in tune_here(tmp_path, kit, model=tmp_path / "strict")

def test_every_process_ends_when_one_input_is_bad(kit, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    run = run_script(tmp_path, NAME, *flags(kit, dataset="bad.jsonl"), check=False, timeout=60,
                     launcher="torchrun", nproc=2)
    assert run.returncode == 1
    assert len(re.findall("^error: bad.jsonl:1: Expecting", run.stderr, re.M)) in (1, 2)
