"""Lesson 03 by its command line, with tiny students that common.py makes."""

import importlib
import json
import math
import random
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, final_weights, read_metrics, run_main, run_script, started
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import common

NAME = "03_distill_student.py"
lesson = importlib.import_module("03_distill_student")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

def flags(kit, **changes):
    given = {"dataset_path": kit / "rows.jsonl", "student_model": kit / "student", "device": "cpu",
             "precision": "fp32", "learning_rate": 3e-3, "log_every": 1, "max_answers": 8} | changes
    return [f"--{key}={value}" for key, value in given.items()]

def distil_here(folder, kit, *more, **changes):
    """Returns the exit code, or the line with the error."""
    return run_main(folder, NAME, *flags(kit, output_dir=folder / "outputs", **changes), *more)

def split(batch_size, accumulation, **changes):
    return {"batch_size": batch_size, "gradient_accumulation_steps": accumulation} | changes

# 13 rows are held out, 51 make three batches of 16 and one of 3 an epoch, of which ranks get none.
SHORT = {"max_steps": 8, "val_fraction": 0.2, "max_grad_norm": 0}

@pytest.fixture(scope="module")
def whole(kit, tmp_path_factory):
    """Folder of an undisturbed run of two epochs on one process, with a teacher."""
    folder = tmp_path_factory.mktemp("whole")
    assert distil_here(folder, kit, teacher_model=kit / "teacher", **split(16, 1, **SHORT)) == 0
    return folder

# --- The mathematics does not depend on the launch ------------------------------------------------

def test_two_processes_that_the_script_starts_itself_learn_the_same(kit, whole, tmp_path):
    run = run_script(tmp_path, NAME, *flags(kit, num_processes=2, teacher_model=kit / "teacher",
                                            **split(2, 4, **SHORT)))
    assert "2 rows x 4 micro-batches x 2 processes = 16 rows a step; 4 steps per" in run.stdout
    assert "--max_length 512 is lowered to the model's 96 positions" in run.stdout
    assert_same(tmp_path, whole)
    own, expected = (read_metrics(folder)[-1] for folder in (tmp_path, whole))
    assert own.keys() == expected.keys() >= {
        f"{state}{key}" for state in ("", "before_")
        for key in ("val_loss", "perplexity", "stop_rate", "exact_match")}

def test_under_torchrun_and_with_accumulation_the_same(kit, whole, tmp_path):
    changes = {"teacher_model": kit / "teacher"} | SHORT
    run_script(tmp_path, NAME, *flags(kit, **split(8, 1, **changes)), launcher="torchrun", nproc=2)
    assert_same(tmp_path, whole)
    assert distil_here(tmp_path, kit, "--overwrite", gradient_checkpointing=True,
                       **split(4, 4, **changes)) == 0
    assert_same(tmp_path, whole)

def test_the_gradient_of_8_micro_batches_is_that_of_one_batch(kit, tmp_path):
    """AdamW's first mean is a tenth of the first gradient. Beside it: the mean of means."""
    gradients = {}
    for nproc, changes in ((1, split(32, 1)), (2, split(4, 4))):
        folder = tmp_path / str(nproc)
        run_script(folder, NAME, *flags(kit, num_processes=nproc, max_steps=1, max_grad_norm=0,
                                        max_answers=1, **changes))
        state = torch.load(folder / "outputs/checkpoint.pt")["optimizer"]["state"]
        gradients[nproc] = torch.cat([10 * adam["exp_avg"].flatten() for adam in state.values()])
    off = lambda x: ((x - gradients[1]).norm() / gradients[1].norm()).item()
    assert off(gradients[2]) < 1e-5

    model, tokenizer = lesson.load_model("student_model", kit / "student", torch.float32, "cpu")
    rows = lesson.encode(lesson.read_conversations(kit / "rows.jsonl"), tokenizer, 96)
    train_rows, _ = lesson.split_rows(rows, 0.1, seed=0)
    lengths = [len(ids) - 1 for ids, _ in train_rows]
    batch = lesson.epoch_batches(lengths, 32, 0, 0)[0]
    for start in range(0, 32, 4):
        input_ids, targets = lesson.collate([train_rows[i] if i is not None else None
                                             for i in batch[start : start + 4]])
        loss = F.cross_entropy(model(input_ids).logits.flatten(0, 1), targets.flatten())
        (loss / 8).backward()
    weights = [p for p in model.parameters() if p.dim() >= 2]
    weights += [p for p in model.parameters() if p.dim() < 2]  # the order of AdamW's groups
    mean_of_means = torch.cat([p.grad.flatten() for p in weights])
    print(f"gradient off by {off(gradients[2]):.1e}; the mean of means by {off(mean_of_means):.1%}")
    assert off(mean_of_means) > 0.05

def test_an_epoch_has_every_row_once_in_batches_of_like_lengths():
    lengths = np.random.default_rng(0).integers(1, 500, 1003).tolist()
    first, second = (lesson.epoch_batches(lengths, 8, 0, epoch) for epoch in (0, 1))
    assert sorted(i for batch in first for i in batch if i is not None) == list(range(1003))
    assert first != second and len(first) == math.ceil(1003 / 8) and {*map(len, first)} == {8}
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
              for batch in first if None not in batch]
    assert np.mean(spread) < 100  # 390 for batches drawn at random

# --- What is learned ------------------------------------------------------------------------------

def test_a_student_learns_64_answers_by_heart_and_to_stop(kit, tmp_path):
    assert distil_here(tmp_path, kit, val_fraction=0, num_epochs=120, max_answers=64, log_every=100,
                       learning_rate=1e-2, **split(16, 1)) == 0
    last = read_metrics(tmp_path)[-1]
    assert last["exact_match"] >= 0.95 and last["stop_rate"] >= 0.95, last
    assert last["before_exact_match"] == 0
    answers = [json.loads(line) for line in (tmp_path / "outputs/answers_after.jsonl").open()]
    assert len(answers) == 64 and np.mean([row["exact"] for row in answers]) == last["exact_match"]
    chat = pipeline("text-generation", str(tmp_path / "outputs/final_model"))
    reply = chat([{"role": "user", "content": "Tree 5?"}], do_sample=False, max_new_tokens=60)
    row = json.loads((kit / "rows.jsonl").read_text().splitlines()[5])
    assert reply[0]["generated_text"][-1]["content"].strip() == row["response"]

def test_only_the_response_and_one_end_token_are_targets(kit):
    tokenizer = AutoTokenizer.from_pretrained(kit / "student")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."}]
    for template, end in ((lesson.LAYOUT, "<|endoftext|>"), (CHATML, "<|im_end|>")):
        tokenizer.chat_template = template
        if end not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"eos_token": end})
        (ids, n_prompt), = lesson.encode([messages], tokenizer, 100)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True,
                                               return_dict=False)
        assert ids[:n_prompt].tolist() == prompt
        assert tokenizer.decode(ids[n_prompt:]).strip() == f"So.{end}"
        input_ids, targets = lesson.collate([(ids, n_prompt), None])
        assert targets[0, n_prompt - 1 :].tolist() == ids[n_prompt:].tolist()
        assert (targets[0, : n_prompt - 1] == -100).all() and (targets[1] == -100).all()
        assert input_ids.shape == (2, len(ids) - 1)
    (ids, _), = lesson.encode([messages], tokenizer, n_prompt + 1)
    assert len(ids) == n_prompt + 1 and lesson.encode([messages], tokenizer, n_prompt) == [None]
    assert lesson.LAYOUT == common.CHAT_TEMPLATE

def test_padding_without_a_mask_changes_no_logit(kit):
    model = AutoModelForCausalLM.from_pretrained(kit / "student").eval()
    rows = [(np.arange(n, dtype=np.int32) + 65, 2) for n in (5, 30, 17)]
    padded = model(lesson.collate(rows)[0], use_cache=False).logits
    for i, row in enumerate(rows):
        alone = model(lesson.collate([row])[0]).logits[0]
        torch.testing.assert_close(padded[i, : len(alone)], alone, rtol=0, atol=1e-5)

@pytest.mark.parametrize("kd_loss", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_that_of_the_textbook(kd_loss, temperature):
    logits, teacher = torch.randn(2, 7, 11, dtype=torch.float64) * 3
    logits.requires_grad_()
    targets = torch.randint(11, (7,))
    p, q = ((x / temperature).softmax(-1) for x in (teacher, logits))
    kl = lambda a, b: (a * (a / b).log()).sum()
    soft = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p),
            "jsd": (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2}[kd_loss] * temperature**2
    hard = -logits.softmax(-1)[range(7), targets].log().sum()
    for alpha in (0.0, 0.3, 1.0):
        loss = lesson.distillation_loss(logits, targets, teacher, kd_loss, temperature, alpha)
        expected = alpha * hard + (1 - alpha) * soft
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        own, wanted = (torch.autograd.grad(x, logits, retain_graph=True)[0]
                       for x in (loss, expected))
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    assert lesson.distillation_loss(logits, targets).item() == pytest.approx(hard.item(), rel=1e-4)

def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(kit, tmp_path):
    assert distil_here(tmp_path, kit, teacher_model=kit / "student", alpha=0, max_steps=1) == 0
    record = read_metrics(tmp_path)[-1]
    assert abs(record["train_loss"]) < 1e-6 and record["grad_norm"] < 1e-5

def test_weights_in_half_precision_are_trained_in_fp32(kit, tmp_path):
    shutil.copytree(kit / "student", tmp_path / "half")
    path = tmp_path / "half/model.safetensors"
    save_file({key: w.half() for key, w in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((tmp_path / "half/config.json").read_text()) | {"dtype": "float16"}
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    assert distil_here(tmp_path, kit, student_model=tmp_path / "half", max_steps=2) == 0
    assert {w.dtype for w in final_weights(tmp_path).values()} == {torch.float32}

def test_an_answer_does_not_depend_on_its_batch(kit):
    model, tokenizer = lesson.load_model("student_model", kit / "student", torch.float32, "cpu")
    rows = [(np.arange(65, 65 + n + 20, dtype=np.int32), n) for n in (70, 3, 60, 75, 4)]
    one, five = (lesson.answer(
        model, tokenizer, rows, 20, lesson.Config(dataset_path="x", max_length=96, batch_size=size),
        0, 1, torch.device("cpu"), partial(torch.autocast, "cpu", enabled=False))
        for size in (1, 5))
    assert one == five and len({len(row["answer"]) for row in one}) > 1

# --- Restarts -------------------------------------------------------------------------------------

def test_a_run_that_was_killed_in_an_epoch_resumes_to_the_same_bits(kit, whole, tmp_path, capfd):
    changes = {"teacher_model": kit / "teacher", "save_every": 3} | split(16, 1, **SHORT)
    with started(tmp_path, NAME, *flags(kit, **changes)) as run:
        run.wait_for_step(random.choice([4, 5, 6]))
        run.kill()
    assert distil_here(tmp_path, kit, "--resume", **changes) == 0
    assert re.search(r"^resumed from step [34678]\b", capfd.readouterr().out, re.M)
    assert_same(tmp_path, whole, rel=0)
    assert distil_here(tmp_path, kit, "--resume", **changes) == 0
    assert "this run is finished" in capfd.readouterr().out
    assert "--resume" in distil_here(tmp_path, kit, **changes)
    error = distil_here(tmp_path, kit, "--resume", **changes | {"learning_rate": 1})
    assert re.fullmatch(r"error: checkpoint.pt is of a run with {'learning_rate': 0.003}.*", error)

def test_sigterm_to_the_starter_ends_all_with_a_checkpoint(kit, tmp_path):
    with started(tmp_path, NAME, *flags(kit, num_processes=2, num_epochs=1000)) as run:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) == 143, run.stderr
    assert re.search(r"^stopped by a signal after step \d+; --resume goes on", run.stdout, re.M)
    assert (tmp_path / "outputs/checkpoint.pt").exists() and not run.stderr

# --- Bad input ------------------------------------------------------------------------------------

GOOD = {"prompt": "a", "response": "b"}
BAD_ROWS = {
    "the file is empty": "",
    r"line 2: Expecting .*\(1 bad rows\)": json.dumps(GOOD) + "\n{oops\n",
    r"line 1: there is no 'response' \(2 bad rows\)": '{"prompt": "a"}\n{"response": "b"}\n',
    "line 1: a message is empty, or no text": '{"prompt": "a", "response": " "}\n',
    "line 2: the id 7 came before": 2 * (json.dumps(GOOD | {"id": 7}) + "\n"),
    "line 1: the last of two messages or more": '{"messages": [{"role": "user"}]}\n',
    "line 1: list indices": "[1]\n",
    "0 of 1 rows fit into --max_length": json.dumps({"prompt": 99 * "a", "response": "b"}) + "\n",
}

@pytest.mark.parametrize("words", BAD_ROWS)
def test_bad_rows_are_named_by_line(words, kit, tmp_path):
    (tmp_path / "bad.jsonl").write_text(BAD_ROWS[words])
    error = distil_here(tmp_path, kit, dataset_path=tmp_path / "bad.jsonl")
    assert re.fullmatch(f"error: .*{words}.*", error)
    assert not (tmp_path / "outputs").exists()

@pytest.mark.parametrize(("changes", "words"), [
    ({"dataset_path": "nope.jsonl"}, "No such file .*nope.jsonl"),
    ({"dataset_path": ""}, "--dataset_path is missing"),
    ({"student_model": "no/such-model"}, "--student_model=no/such-model cannot be loaded"),
    ({"precision": "auto", "fp16": 1}, "fp16 needs a CUDA GPU"),
    ({"fp16": 1}, "--fp16 and --precision=fp32 contradict"),
    ({"alpha": 2}, "--alpha=2.0 must lie between 0 and 1"),
    ({"learning_rate": "nan"}, "--learning_rate=nan must lie"),
    ({"temperature": 0}, "--temperature=0.0 must lie"),
    ({"val_fraction": 1}, "leaves none for training"),
    ({"kd_loss": "mse"}, "invalid choice: 'mse'"),
    ({"colour": 1}, "unrecognized arguments: --colour=1"),
])
def test_bad_flags_end_in_one_line(changes, words, kit, tmp_path):
    assert re.fullmatch(f"error: .*{words}.*", distil_here(tmp_path, kit, **changes))

def test_another_vocabulary_cannot_be_distilled_from(kit, tmp_path):
    shutil.copytree(kit / "teacher", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens("zzz")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.resize_token_embeddings(258)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "other")
    error = distil_here(tmp_path, kit, teacher_model=tmp_path / "other")
    assert re.fullmatch("error: --teacher_model=.* has another vocabulary.*", error)

def test_models_that_cannot_be_used_are_refused(kit, tmp_path):
    shutil.copytree(kit / "student", tmp_path / "bare")
    for path in tmp_path.glob("bare/*token*"):
        path.unlink()
    assert "do the files belong together" in distil_here(
        tmp_path, kit, student_model=tmp_path / "bare")
    shutil.copytree(kit / "student", tmp_path / "strict")
    (tmp_path / "strict/chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    assert "row 1: the chat template fails: no system role" in distil_here(
        tmp_path, kit, student_model=tmp_path / "strict")
    shutil.copytree(kit / "student", tmp_path / "outputs/final_model")
    assert "lies in --output_dir" in distil_here(
        tmp_path, kit, "--overwrite", student_model=tmp_path / "outputs/final_model")
    assert (tmp_path / "outputs/final_model/model.safetensors").exists()

def test_every_process_ends_when_one_input_is_bad(kit, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    run = run_script(tmp_path, NAME, *flags(kit, num_processes=2, dataset_path="bad.jsonl"),
                     check=False, timeout=60)
    lines = run.stderr.splitlines()
    assert run.returncode == 1 and 1 <= len(lines) <= 2
    assert all(line.startswith("error: --dataset_path=bad.jsonl: line 1") for line in lines)
