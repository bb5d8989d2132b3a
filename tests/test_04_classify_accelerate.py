"""Lesson 04 by its command line, with tiny models and texts whose words tell the class."""

import importlib
import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, read_metrics, run_main, run_script, started, write_rows
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers import PreTrainedTokenizerFast as WordTokenizer

import common

NAME = "04_classify_accelerate.py"
lesson = importlib.import_module(NAME[:-3])
WORDS = {"sad": "tears gloom sorrow", "joy": "sun smile party cake", "anger": "rage fury storm"}
FILLERS = "the a of my day in we it so very was then with"
# 203 rows make 25 steps of 8: 40 steps end in the middle of the second epoch.
SMALL = ["--model=model", "--train_file=train.jsonl", "--validation_file=val.jsonl",
         "--test_file=test.jsonl", "--device=cpu", "--precision=fp32", "--learning_rate=0.003",
         "--max_steps=40", "--warmup_steps=4", "--log_every=1", "--eval_every=10", "--save_every=5"]
EMOTION = ROOT.parent / "shared/data/emotion"

def make_rows(seed, n):
    """Texts of very different lengths; two words tell the class, one is of any class."""
    rng = random.Random(seed)
    for _ in range(n):
        label = rng.choice([*WORDS])
        words = rng.choices(FILLERS.split(), k=rng.choice([1, 2, 3, 6, 20]))
        names = label, label, rng.choice([*WORDS])
        words += [rng.choice(WORDS[name].split()) for name in names]
        yield {"text": " ".join(rng.sample(words, len(words))), "label": label}

def save_word_tokenizer(folder, left=False, max_length=64):
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *" ".join([*WORDS.values(), FILLERS]).split()]
    words = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    WordTokenizer(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", padding_side="left" if left else "right",
        model_max_length=max_length).save_pretrained(folder)
    return len(words)

def save_model(folder, kind, dropout=0.0, left=False):
    """A model of that kind with random weights, and its tokenizer, which may pad on the left."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    drop = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    if kind in ("bert", "roberta", "distilbert"):
        vocab_size = save_word_tokenizer(folder, left)
        config = AutoConfig.for_model(
            kind, vocab_size=vocab_size, max_position_embeddings=66, pad_token_id=1, **sizes,
            **drop, initializer_range=0.1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return folder
    folder.mkdir()  # as lesson 02 exports it: without a token for padding
    cfg = {"vocab_size": 257, "context_length": 256, "emb_dim": 32, "n_heads": 2, "n_layers": 2,
           "drop_rate": 0.0, "qkv_bias": False}
    common.save_hugging_face(common.GPTModel(cfg), common.load_encoding("bytes"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    if kind == "llama":
        config = AutoConfig.for_model(
            "llama", vocab_size=257, max_position_embeddings=256, eos_token_id=256, **sizes)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    config.save_pretrained(folder)
    side = "left" if left else "right"
    AutoTokenizer.from_pretrained(folder, padding_side=side).save_pretrained(folder)
    return folder

@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with data and a model, which each run gets a copy of."""
    folder = tmp_path_factory.mktemp("material")
    save_model(folder / "model", "bert")
    for seed, (split, n) in enumerate({"train": 203, "val": 41, "test": 37}.items()):
        write_rows(folder / f"{split}.jsonl", make_rows(seed, n))
    shutil.copy(ROOT / "accelerate_config.yaml", folder)
    return folder

def new_folder(path, source):
    return Path(shutil.copytree(source, path, dirs_exist_ok=True))

def train_here(folder, *flags):
    """Returns the exit code, or the line with the error. accelerate keeps a state per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return run_main(folder, NAME, *SMALL, f"--output_dir={folder / 'classifier_output'}", *flags)

def report(folder):
    return json.loads((folder / "classifier_output/report.json").read_text())

def weights(folder):
    return load_file(folder / "classifier_output/checkpoint/model.safetensors")

def rewind(folder):
    """As if the run had been killed after step 35, in the middle of an epoch."""
    output = folder / "classifier_output"
    (output / "final_model/README.md").unlink()
    shutil.rmtree(output / "checkpoint")
    (output / "checkpoint.previous").rename(output / "checkpoint")

def assert_same(folder, reference, rel):
    """Losses to rel, of evaluation to a tenth of it; every count the same. rel=0: the same bits."""
    for own, expected in zip(read_metrics(folder), read_metrics(reference), strict=True):
        for key in own.keys() & expected.keys():
            if key.endswith("_loss"):
                tolerance = rel if key == "train_loss" else rel / 10
                assert own[key] == pytest.approx(expected[key], tolerance, abs=0), own["step"]
            elif not key.endswith(("second", "grad_norm")):
                assert own[key] == expected[key], own["step"]
    own, expected = report(folder), report(reference)
    assert own.pop("loss") == pytest.approx(expected.pop("loss"), rel=rel / 10, abs=0)
    assert own == expected

@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """Folder of an undisturbed run of one process; what it printed is in stdout.log."""
    folder = new_folder(tmp_path_factory.mktemp("whole"), material)
    run = run_script(folder, NAME, *SMALL, "--batch_size=8")
    assert "it/s" not in run.stderr
    return folder

@pytest.fixture(scope="module")
def pairs(material, tmp_path_factory):
    """Two at a time: by accelerate launch to the end, by torchrun and killed at a random step."""
    root, step = tmp_path_factory.mktemp("pairs"), random.randint(6, 20)
    print("SIGKILL at step", step)
    folders = [new_folder(root / name, material) for name in ("launched", "killed")]
    two = dict(nproc=2, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2")
    flags = [*SMALL, "--batch_size=2"]
    with (started(folders[0], NAME, *flags, launcher="config", **two) as launched,
          started(folders[1], NAME, *flags, launcher="torchrun", **two) as killed):
        killed.wait_for_step(step)
        killed.kill()
        launched.process.wait(120)
    return SimpleNamespace(launched=launched, killed=killed)

# --- The mathematics does not depend on the launch ------------------------------------------------

def test_accelerate_launch_on_two_processes_trains_as_one_does(pairs, whole):
    run = pairs.launched
    assert run.returncode == 0, run.stderr[-3000:]
    for line in ("Number of processes: 2", "Distributed type: MULTI_CPU", "Mixed precision: no",
                 "Gradient accumulation steps: 2", "Main process device: cpu:0"):
        assert run.stdout.count(f"{line}\n") == 1
    assert "2 rows x 2 micro-batches x 2 processes = 8 rows a step" in run.stdout
    assert_same(run.folder, whole, rel=1e-4)

@pytest.mark.parametrize(("batch_size", "accumulation", "compiler"), [
    (1, 8, "no"), (4, 2, "eager")])
def test_accumulation_over_the_same_global_batch_trains_the_same(
        batch_size, accumulation, compiler, whole, material, tmp_path, monkeypatch):
    """Also with the torch.compile() of `accelerate config`."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", compiler)
    folder = new_folder(tmp_path / "run", material)
    assert train_here(folder, f"--batch_size={batch_size}",
                      f"--gradient_accumulation_steps={accumulation}") == 0
    assert_same(folder, whole, rel=1e-4)

def test_one_process_goes_on_with_the_killed_run_of_two(pairs, whole, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", pairs.killed.folder)
    assert train_here(folder, "--batch_size=8", "--resume") == 0
    assert re.search(r"^resumed from step (\d*[05]) of ", capfd.readouterr().out, re.M)
    assert_same(folder, whole, rel=1e-4)

def test_the_loss_is_the_mean_over_the_global_batch_and_the_rate_is_linear(whole):
    losses = [record["train_loss"] for record in read_metrics(whole) if "train_loss" in record]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert losses[0] == pytest.approx(np.log(3), rel=0.2)  # a new head guesses
    assert report(whole)["accuracy"] > 0.6  # 0.43 are of the largest class
    rates = [record["learning_rate"] for record in read_metrics(whole) if "learning_rate" in record]
    assert rates == pytest.approx([0.003 * min(s / 4, (41 - s) / 36) for s in range(1, 41)])

def test_every_epoch_has_each_row_once_in_another_order_with_little_padding():
    lengths = np.random.default_rng(0).integers(1, 60, 1003)
    def batches(steps, batch_size=4):
        return list(lesson.LengthGroupedBatches(lengths, batch_size, 16, 7, steps))
    first, second = batches(range(1, 63)), batches(range(63, 125))
    assert len({*chain(*first)}) == len([*chain(*first)]) == 62 * 16 and first != second
    assert batches(range(1, 125)) == first + second
    assert batches(range(30, 63)) == first[29 * 4 :]
    sampler = lesson.LengthGroupedBatches(lengths, 4, 16, 7, range(1, 63))
    dealt = [list(BatchSamplerShard(sampler, 2, rank)) for rank in (0, 1)]
    assert dealt == [first[0::2], first[1::2]] and len(sampler) == 248
    whole = [[*chain(*first[i : i + 4])] for i in range(0, 248, 4)]
    assert batches(range(1, 63), 16) == whole
    padding = [1 - lengths[rows].sum() / (len(rows) * lengths[rows].max()) for rows in first]
    assert np.mean(padding) < 0.1  # 0.35 in random order

# --- Evaluation and what comes out ----------------------------------------------------------------

def test_final_model_names_the_labels_and_its_answers_give_the_reported_scores(whole):
    rows = [json.loads(line) for line in (whole / "test.jsonl").open()]
    classify = pipeline("text-classification", str(whole / "classifier_output/final_model"))
    answers = [classify(row["text"])[0]["label"] for row in rows]
    pairs = Counter((row["label"], answer) for row, answer in zip(rows, answers, strict=True))
    scores, names = report(whole), sorted(WORDS)
    assert scores["split"] == "test" and scores["names"] == names and {*answers} <= {*names}
    assert scores["confusion"] == [[pairs[true, x] for x in names] for true in names]
    assert scores["accuracy"] == pytest.approx(sum(pairs[x, x] for x in names) / len(rows))
    f1 = []
    for i, name in enumerate(names):
        right, true = pairs[name, name], sum(row["label"] == name for row in rows)
        assert scores["recall"][i] == pytest.approx(right / true)
        assert scores["precision"][i] == pytest.approx(right / max(1, answers.count(name)))
        f1.append(2 * right / (true + answers.count(name)))
    assert scores["macro_f1"] == pytest.approx(np.mean(f1))
    records = read_metrics(whole)
    assert records[-1]["test_accuracy"] == scores["accuracy"]
    assert records[-1]["test_macro_f1"] == scores["macro_f1"]
    best = max(record["val_accuracy"] for record in records if "val_accuracy" in record)
    card = (whole / "classifier_output/final_model/README.md").read_text()
    for part in (f"({best:.4f})", f"{scores['accuracy']:.4f}", "train.jsonl", "--batch_size=8"):
        assert part in card

def test_plots_tensorboard_and_the_keys_of_the_log(whole):
    output = whole / "classifier_output"
    assert all(imread(output / name).std() > 0.01 for name in ("loss.png", "confusion_matrix.png"))
    assert (output / "loss.pdf").read_bytes()[:4] == b"%PDF"
    board = EventAccumulator(str(output / "runs")).Reload()
    assert board.Tags()["images"] == ["confusion_matrix"]
    assert {"train_loss", "val_accuracy", "test_macro_f1"} <= {*board.Tags()["scalars"]}
    step = next(record for record in read_metrics(whole) if record["step"] == 20)
    assert {*step} == {"step", "epoch", "tokens_seen", "train_loss", "learning_rate", "grad_norm",
                       "val_loss", "samples_per_second", "tokens_per_second", "val_accuracy",
                       "val_macro_f1"}

@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "roberta", "distilbert"])
@pytest.mark.parametrize("left", [False, True])
def test_a_padded_batch_has_the_logits_of_single_rows(kind, left, tmp_path):
    """Also where the tokenizer wants to pad on the left, and a text spells out the end token."""
    folder = save_model(tmp_path / kind, kind, left=left)
    config = lesson.Config(model=str(folder))
    model, tokenizer, longest, notes = lesson.load_classifier(config, ["a", "b", "c"])
    assert not notes and longest == (256 if kind in ("gpt2", "llama") else 64)
    texts = ["the rain", "my day was so very sun", "a storm <|endoftext|>", "we [SEP]", ""]
    rows, cut = lesson.tokenize(tokenizer, [(text, 0) for text in texts], longest)
    batch = lesson.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=32)(rows)
    batch.pop("labels")
    assert cut == 0 and batch["input_ids"].shape[1] > max(len(row["input_ids"]) for row in rows)
    with torch.no_grad():
        padded = model.eval()(**batch).logits
        for i, row in enumerate(rows):
            ids = torch.from_numpy(row["input_ids"]).long()[None]
            torch.testing.assert_close(padded[i], model(ids).logits[0], rtol=0, atol=1e-5)
            if kind == "gpt2":  # the last real token, by hand
                hidden = model.transformer(ids).last_hidden_state[0, -1]
                torch.testing.assert_close(padded[i], model.score(hidden), rtol=0, atol=1e-5)

def test_the_export_of_lesson_02_trains_and_long_texts_are_cut_and_counted(
        material, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", material)
    save_model(folder / "gpt", "gpt2")
    assert train_here(folder, "--model=gpt", "--max_length=40", "--optimizer=sgd", "--max_steps=5",
                      "--gradient_checkpointing", "--precision=bf16", "--num_workers=1") == 0
    lines = (folder / "train.jsonl").read_text().splitlines()
    cut = sum(len(json.loads(line)["text"]) > 40 for line in lines)
    printed = capfd.readouterr().out
    assert f"train: {cut} texts are longer than 40 tokens and cut\n" in printed
    assert "11 rows, others in each epoch, do not fill a step and are left out\n" in printed
    assert "Mixed precision: bf16\n" in printed
    AutoModelForSequenceClassification.from_pretrained(folder / "classifier_output/final_model")

def test_a_backbone_that_was_not_loaded_is_named(tmp_path):
    load = lambda: lesson.load_classifier(lesson.Config(model=str(folder)), ["a", "b", "c"])
    folder, other = save_model(tmp_path / "bert", "bert"), save_model(tmp_path / "gpt", "gpt2")
    path = folder / "model.safetensors"
    tensors = {name: x for name, x in load_file(path).items() if "pooler" not in name}
    save_file(tensors, path, {"format": "pt"})
    assert "lacks 2 of the 39 weights of its backbone" in load()[3][0]
    shutil.copy(other / "model.safetensors", path)
    with pytest.raises(ValueError, match=r"--model=.* has none of the weights of its backbone"):
        load()

# --- Restarts -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dropout(material, tmp_path_factory):
    """Folder of a run with dropout and accumulation, in this process."""
    folder = new_folder(tmp_path_factory.mktemp("dropout") / "run", material)
    shutil.rmtree(folder / "model")
    save_model(folder / "model", "bert", dropout=0.1)
    assert train_here(folder, "--batch_size=4", "--gradient_accumulation_steps=2") == 0
    return folder

def test_a_resume_in_mid_epoch_ends_in_the_same_bits_with_dropout_too(dropout, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", dropout)
    rewind(folder)
    assert train_here(folder, "--batch_size=4", "--gradient_accumulation_steps=2", "--resume") == 0
    assert "resumed from step 35 of " in capfd.readouterr().out
    assert_same(folder, dropout, rel=0)
    own, expected = weights(folder), weights(dropout)
    assert own.keys() == expected.keys() and all(own[x].equal(expected[x]) for x in own)

def test_final_model_may_be_newer_than_the_checkpoint(dropout, tmp_path):
    """Killed after a good validation; the steps repeated with other rounding are not as good."""
    folder = new_folder(tmp_path / "run", dropout)
    rewind(folder)
    model = folder / "classifier_output/final_model"
    (model / "best.json").write_text('{"step": 38, "val_accuracy": 0.99}')
    before = (model / "model.safetensors").read_bytes()
    assert train_here(folder, "--batch_size=8", "--resume") == 0
    assert (model / "model.safetensors").read_bytes() == before
    assert re.search(r"step 38 of 40.*\s.*\(0.9900\)", (model / "README.md").read_text())

def test_a_run_killed_before_its_card_has_one_record_of_the_test(whole, tmp_path):
    folder = new_folder(tmp_path / "run", whole)
    (folder / "classifier_output/final_model/README.md").unlink()
    assert train_here(folder, "--batch_size=8", "--resume") == 0
    assert_same(folder, whole, rel=0)

def test_ctrl_c_ends_the_last_evaluation_which_resume_repeats(material, tmp_path):
    folder, flags = new_folder(tmp_path / "run", material), ["--batch_size=1", "--max_steps=2"]
    small = (folder / "test.jsonl").read_text()
    (folder / "test.jsonl").write_text(small * 300)  # half a minute
    with started(folder, NAME, *SMALL, *flags) as run:
        while not (folder / "classifier_output/checkpoint").exists():
            assert run.process.poll() is None
            time.sleep(0.01)
        time.sleep(1)
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(10) in (1, 143)
    assert re.search("^(error: interrupted|stopped by).*; --resume goes", run.stderr + run.stdout,
                     re.M)
    (folder / "test.jsonl").write_text(small)
    assert train_here(folder, *flags, "--resume") == 0 and report(folder)["split"] == "test"

def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(dropout, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", dropout)
    path = folder / "classifier_output/checkpoint/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # one bit, in a tensor
    path.write_bytes(data)
    assert train_here(folder, "--batch_size=8", "--resume") == 0
    output = capfd.readouterr()
    assert "checkpoint is damaged and not used: checksum of model.safetensors" in output.err
    assert "resumed from step 35 of " in output.out

    for name in ("checkpoint", "checkpoint.previous"):
        (folder / "classifier_output" / name / "progress.json").write_text("{")
    error = train_here(folder, "--batch_size=8", "--resume")
    assert "cannot be read; --overwrite" in error

def test_a_finished_run_is_left_as_it_is_and_another_run_is_refused(whole, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", whole)
    log = (folder / "classifier_output/metrics.jsonl").read_text()
    assert train_here(folder, "--batch_size=8", "--resume") == 0
    assert "this run is finished: " in capfd.readouterr().out
    assert (folder / "classifier_output/metrics.jsonl").read_text() == log
    assert "--resume goes on with it" in train_here(folder, "--batch_size=8")
    assert "global batch': 8" in train_here(folder, "--batch_size=4", "--resume")
    assert "'seed': 0" in train_here(folder, "--batch_size=8", "--resume", "--seed=1")
    assert train_here(folder, "--batch_size=8", "--overwrite", "--max_steps=0") == 0
    assert [record["step"] for record in read_metrics(folder)] == [0, 0]

def test_sigterm_ends_with_a_checkpoint_and_the_folder_is_locked_until_then(
        whole, material, tmp_path):
    folder = new_folder(tmp_path / "run", material)
    with started(folder, NAME, *SMALL, "--batch_size=1", "--gradient_accumulation_steps=8") as run:
        run.wait_for_step(1)
        run.process.suspend()
        assert re.match("error: .*in use", train_here(folder, "--batch_size=8", "--resume"))
        run.process.terminate()
        run.process.resume()
        assert run.process.wait(60) == 143
    assert re.search(r"^stopped by a signal after step \d+; --resume", run.stdout, re.M)
    assert train_here(folder, "--batch_size=8", "--resume") == 0
    assert_same(folder, whole, rel=1e-4)

# --- Data: every kind that works, one line for every kind that does not ---------------------------

GOOD = {"text": "rain", "label": "sad"}

@pytest.mark.parametrize(("flags", "files", "message"), [
    (["--text_column=words"], {}, r"train.jsonl: .*--text_column: text$"),
    (["--label_column=mood"], {}, r"train.jsonl: .*--label_column: text, label$"),
    ([], {"train": [{"a": "rain", "b": "sun"}]}, r"--label_column: a, b$"),
    ([], {"train": [GOOD, {"text": "sun"}, "{", GOOD, {"text": 1, "label": 1}]},
     r"train.jsonl:2: .*'text'.*'label'; 3 of 5 rows are broken"),
    ([], {"test": [GOOD, b"\xff\xfe\n"]}, r"test.jsonl:2: .* 1 of 2 rows are broken"),
    ([], {"train": [GOOD] * 30}, r"two labels or more.*'sad'"),
    ([], {"train": [GOOD, {"text": "sun", "label": 1}] * 9}, r"all numbers or all texts"),
    ([], {"val": [GOOD, {"text": "x", "label": "awe"}]}, r"validation: .*'awe'.*no row of train"),
    (["--label_names=joy,sad"], {}, r"train: the label 'anger' has no name among"),
    (["--label_names=[joy"], {}, r"--label_names=\[joy: .*; what works is joy,anger"),
    ([], {"train": [{"text": " ", "label": "a"}, {"text": "", "label": "b"}]}, r"two labels"),
    ([], {"val": [{"text": " ", "label": "sad"}]}, r"no rows for validation"),
    (["--batch_size=204"], {}, r"203 rows .* less than the 204"),
    (["--batch_size=0"], {}, r"--batch_size=0 must lie between 1 and 1000000000"),
    (["--precision=fp16"], {}, r"--precision=fp16 needs a CUDA GPU; use bf16 or fp32"),
    (["--device=cuda"], {}, r"--device=cuda needs a GPU per process, here are 0"),
    (["--model=none/such"], {}, r"--model=none/such: .*--model ./gpt_output/final_model"),
    (["--model=empty"], {}, r"--model=empty: "),
    (["--train_file=none.jsonl"], {}, r"No such file.*none.jsonl"),
    (["--train_file="], {}, r"--validation_file and --test_file need a --train_file"),
    (["--train_file=", "--validation_file=", "--test_file="], {},
     r"--dataset=dair-ai/emotion: no network.*; JSONL needs no network: --train_file"),
    (["--push_to_hub=name"], {}, r"--push_to_hub needs a token: set HF_TOKEN"),
])
def test_bad_input_ends_with_one_line(flags, files, message, material, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    folder = new_folder(tmp_path / "run", material)
    (folder / "empty").mkdir()
    for split, rows in files.items():
        (folder / f"{split}.jsonl").write_bytes(b"".join(
            row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    line = train_here(folder, *flags)
    assert re.match(f"error: .*{message}", str(line)), line
    assert not (folder / "classifier_output/metrics.jsonl").exists()

def test_bad_input_ends_every_process(material, tmp_path):
    folder = new_folder(tmp_path / "run", material)
    run = run_script(folder, NAME, *SMALL, "--text_column=words", launcher="torchrun", nproc=2,
                     check=False, timeout=60)
    assert run.returncode == 1 and run.stderr.count("error: train.jsonl: name one of") == 2

@pytest.mark.parametrize("flag", ["drop", "keep"])
def test_numbers_as_labels_and_empty_texts_and_a_validation_split_of_each_class(
        flag, material, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", material)
    names = sorted(WORDS)
    rows = [{"Sentence": row["text"], "id": i, "Class": names.index(row["label"])}
            for i, row in enumerate(make_rows(9, 120))]
    write_rows(folder / "train.jsonl", [*rows, *({**row, "Sentence": " "} for row in rows[:6])])
    (folder / "names.json").write_text(json.dumps(names))
    assert train_here(folder, "--validation_file=", "--test_file=", "--label_names=names.json",
                      "--max_steps=3", "--batch_size=8", f"--empty_texts={flag}") == 0
    printed, scores = capfd.readouterr().out, report(folder)
    assert f"train.jsonl: 6 of 126 texts are empty; --empty_texts={flag}\n" in printed
    counts = Counter(row["Class"] for row in [*rows, *rows[:6 if flag == "keep" else 0]])
    taken = [int(counts[i] * 0.1) for i in range(3)]
    assert np.sum(scores["confusion"], axis=1).tolist() == taken and scores["split"] == "validation"
    assert f"{sum(counts.values()) - sum(taken)} rows for train, {sum(taken)} rows for" in printed
    config = json.loads((folder / "classifier_output/final_model/config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(names)}

def test_columns_without_a_value_are_not_chosen_and_a_null_is_an_empty_text(
        material, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", material)
    rows = [{"text": None, "label": None, "note": row["text"], "mood": row["label"]}
            for row in make_rows(9, 60)]
    write_rows(folder / "train.jsonl", [{**rows[0], "note": None}, *rows])
    assert train_here(folder, "--validation_file=", "--test_file=", "--label_column=mood",
                      "--max_steps=2", "--batch_size=8") == 0
    assert "train.jsonl: 1 of 61 texts are empty" in capfd.readouterr().out

def test_csv_and_sets_of_the_hub_come_through_datasets(material, tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    folder = new_folder(tmp_path / "run", material)
    rows = [*make_rows(9, 60)]
    (folder / "train.csv").write_text(
        "review,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows) + ",sad\n")
    flags = ["--test_file=", "--max_steps=2", "--batch_size=8"]
    assert train_here(folder, "--train_file=train.csv", "--validation_file=", *flags) == 0
    assert "train.csv: 1 of 61 texts are empty" in capfd.readouterr().out
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["joy", "sad", "anger"])})
    (folder / "hub").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features).to_parquet(folder / f"hub/{split}.parquet")
    assert train_here(folder, "--train_file=", "--validation_file=", "--dataset=hub", "--overwrite",
                      *flags) == 0
    assert report(folder)["names"] == ["joy", "sad", "anger"] and report(folder)["split"] == "test"

def test_short_names_of_the_hub_become_full_ones(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: names)
    monkeypatch.setattr(lesson.huggingface_hub, "dataset_info", lambda name, **_: SimpleNamespace(
        id=f"fancyzhx/{name}"))
    assert lesson.load_dataset("ag_news:plain") == ("fancyzhx/ag_news", "plain")
    assert lesson.load_dataset("me/ag_news") == ("me/ag_news",)

def test_push_to_hub_makes_the_repository_before_and_fills_it_after(
        material, tmp_path, monkeypatch, capfd):
    folder = new_folder(tmp_path / "run", material)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    flags = ["--push_to_hub=mood", "--max_steps=2", "--batch_size=8"]
    assert train_here(folder, *flags).startswith("error: --push_to_hub=mood: Offline")
    assert not (folder / "classifier_output/metrics.jsonl").exists()
    calls = []
    def upload_folder(repo_id, folder_path):
        calls.append((repo_id, (folder_path / "README.md").read_text()))
        if len(calls) == 2:
            raise httpx2.ConnectError("no route")
        return "https://hub/me/mood"
    hub = lesson.huggingface_hub
    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **_: calls.append(
        repo_id) or SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    error = train_here(folder, *flags)
    assert error.startswith("error: --push_to_hub=me/mood: ConnectError: no route; ")
    assert train_here(folder, *flags, "--resume") == 0  # a finished run is only uploaded
    assert "uploaded: https://hub/me/mood\n" in capfd.readouterr().out
    assert calls[0] == calls[2] == "mood" and calls[1] == calls[3] and calls[1][0] == "me/mood"
    assert "train.jsonl" in calls[1][1] and len(calls) == 4
    files = [path for path in (folder / "classifier_output").rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(b"hf_secret" in path.read_bytes() for path in files)
