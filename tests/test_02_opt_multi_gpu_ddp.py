"""Lesson 02 by its command line. A run of one process that no signal is to hit stays in this one,
which saves the 5 seconds that a start takes."""

import importlib
import itertools
import math
import random
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import free_port, read_metrics, run_main, run_script, started
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common

NAME = "02_opt_multi_gpu_ddp.py"
CFG = {"vocab_size": 257, "context_length": 32, "emb_dim": 32, "n_heads": 2, "n_layers": 2,
       "drop_rate": 0.0, "qkv_bias": False}
# 20 steps of 8 windows with stride 16 go round the 2,250 training bytes a little more than once.
SMALL = ["--preset=tiny", "--device=cpu", "--precision=fp32", "--text_file=text.txt", "--stride=16",
         "--max_steps=20", "--warmup_steps=2", "--log_every=1", "--eval_every=10", "--save_every=5",
         *(f"--{key}={value}" for key, value in CFG.items())]
TEXT = 17 * ("Naïve people assert that statements are evaluated in order; a class is a set of "
             "names. The grammar of Python says more: expressions, targets, 2 < 3 <= 4. ").encode()
SHAKESPEARE = Path(__file__).parents[2] / "shared/data/text/tinyshakespeare_input.txt"

def split(batch_size, accumulation):
    return [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]

ALONE = split(1, 8)  # the reference: its steps are the slowest, so that a signal can hit them

def new_folder(path, outputs_of=None):
    path.mkdir()
    (path / "text.txt").write_bytes(TEXT[:2500])
    if outputs_of:
        shutil.copytree(outputs_of / "gpt_output", path / "gpt_output")
    return path

def train_here(folder, *flags):
    """Returns the exit code, or the line with the error."""
    # TensorBoard's thread may still write when the test has left the folder, so name it in full.
    return run_main(folder, NAME, *SMALL, f"--output_dir={folder / 'gpt_output'}", *flags)

def rewind(folder):
    """As if the run had been killed before step 20: the checkpoint is the one of step 15."""
    shutil.rmtree(folder / "gpt_output/final_model")
    (folder / "gpt_output/checkpoint.previous.pt").rename(folder / "gpt_output/checkpoint.pt")

def weights(folder):
    return load_file(folder / "gpt_output/final_model/model.safetensors")

def assert_same(folder, reference, rel=1e-5):
    """The same steps, losses, learning rates and weights; rel=0: to the last bit."""
    keys = {"step", "epoch", "tokens_seen", "train_loss", "val_loss", "learning_rate"}
    for own, expected in zip(read_metrics(folder), read_metrics(reference), strict=True):
        expected = {key: expected[key] for key in keys & expected.keys()}
        assert {key: own[key] for key in keys & own.keys()} == pytest.approx(expected, rel, abs=0)
    own, expected = weights(folder), weights(reference)
    for name in expected:
        torch.testing.assert_close(own[name], expected[name], rtol=0, atol=rel, msg=name)

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three at a time, to save time: undisturbed, on two processes, ended at a random step."""
    root, step = tmp_path_factory.mktemp("runs"), random.randint(6, 14)
    print("SIGKILL at step", step)
    with (started(new_folder(root / "1"), NAME, *SMALL, *ALONE) as whole,
          started(new_folder(root / "2"), NAME, *SMALL, *split(4, 1), launcher="accelerate",
                  nproc=2) as accelerate,
          started(new_folder(root / "3"), NAME, *SMALL, *ALONE) as killed):
        killed.wait_for_step(step)
        killed.kill()
        accelerate.process.wait(120)
        assert whole.process.wait(120) == 0, whole.stderr
    return SimpleNamespace(whole=whole, accelerate=accelerate, killed=killed)

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folder of an undisturbed run on two processes."""
    folder = new_folder(tmp_path_factory.mktemp("pair") / "1")
    run_script(folder, NAME, *SMALL, *split(1, 4), launcher="torchrun", nproc=2)
    return folder

# --- The mathematics does not depend on the launch ------------------------------------------------

def test_accelerate_launch_trains_the_same(runs):
    assert runs.accelerate.returncode == 0, runs.accelerate.stderr
    assert re.search(r"\b2 processes .*= 256\b", runs.accelerate.stdout)
    assert_same(runs.accelerate.folder, runs.whole.folder)

@pytest.mark.parametrize("flags", [split(8, 1), split(2, 4)])
def test_accumulation_over_the_same_global_batch_trains_the_same(flags, runs, tmp_path):
    folder = new_folder(tmp_path / "run")
    assert train_here(folder, *flags) == 0
    assert_same(folder, runs.whole.folder)

@pytest.mark.parametrize(("nproc", "flags"), [
    (4, split(1, 2)), pytest.param(2, split(4, 1), marks=pytest.mark.slow),
    pytest.param(2, [*split(2, 2), "--shard_optimizer=on"], marks=pytest.mark.slow)])
def test_torchrun_over_the_same_global_batch_trains_the_same(nproc, flags, runs, tmp_path):
    folder = new_folder(tmp_path / "run")
    run = run_script(folder, NAME, *SMALL, *flags, launcher="torchrun", nproc=nproc)
    assert re.search(rf"\b{nproc} processes .*= 256\b", run.stdout)
    assert_same(folder, runs.whole.folder)

# --- Restarts -------------------------------------------------------------------------------------

def test_a_killed_run_resumes_to_the_same_bits(runs, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", runs.killed.folder)
    assert train_here(folder, *ALONE, "--resume") == 0
    assert re.search(r"^resumed from step (5|10|15|20)\b", capfd.readouterr().out, re.M)
    assert_same(folder, runs.whole.folder, rel=0)

@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_dropout_is_the_same_after_a_resume_and_when_activations_are_recomputed(
        optimizer, tmp_path):
    whole = new_folder(tmp_path / "whole")
    assert train_here(whole, "--drop_rate=0.1", f"--optimizer={optimizer}") == 0
    for rel, flags in ((0, []), (1e-5, ["--gradient_checkpointing=on", "--loss_chunks=3"])):
        folder = new_folder(tmp_path / f"{rel}", whole)
        rewind(folder)
        assert train_here(folder, "--drop_rate=0.1", f"--optimizer={optimizer}", "--resume",
                          *flags) == 0
        assert_same(folder, whole, rel)

def test_two_processes_without_torchrun_go_on_with_the_run_of_one_sharded(runs, tmp_path):
    folder = new_folder(tmp_path / "run", runs.killed.folder)
    flags = [*SMALL, *split(2, 2), "--shard_optimizer=on", "--resume"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (started(folder, NAME, *flags, RANK="0", LOCAL_RANK="0", **world) as first,
          started(folder, NAME, *flags, RANK="1", LOCAL_RANK="1", **world) as second):
        assert (first.process.wait(120), second.process.wait(30)) == (0, 0), first.stderr
    assert "2 processes" in first.stdout and "resumed from" in first.stdout and not second.stdout
    assert_same(folder, runs.whole.folder)

    rewind(folder)  # and back, from a checkpoint that the sharded run has written
    assert train_here(folder, *ALONE, "--resume") == 0
    assert_same(folder, runs.whole.folder)

def test_sigterm_ends_with_a_checkpoint_and_the_folder_is_locked_until_then(runs, tmp_path, capfd):
    folder = new_folder(tmp_path / "run")
    with started(folder, NAME, *SMALL, *ALONE) as run:
        run.wait_for_step(1)
        run.process.suspend()
        assert re.match("error: .*gpt_output.* in use", train_here(folder, "--resume"))
        run.process.terminate()
        run.process.resume()
        assert run.process.wait(60) == 143
    step = run.metrics[-1]["step"]
    assert re.search(rf"signal.* step {step}\b.*--resume", run.stdout) and step < 20
    assert not (folder / "gpt_output/final_model").exists()
    assert train_here(folder, *ALONE, "--resume") == 0
    assert f"resumed from step {step} " in capfd.readouterr().out
    assert_same(folder, runs.whole.folder, rel=0)

def test_a_finished_run_is_neither_changed_nor_overwritten_unasked(
        runs, tmp_path, capfd, monkeypatch):
    folder = new_folder(tmp_path / "run", runs.whole.folder)
    def contents():
        return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}
    before = contents()
    assert train_here(folder, *ALONE, "--resume") == 0
    assert "finished" in capfd.readouterr().out
    assert contents() == before
    for restarts in ("0", "1"):  # torchrun --max-restarts starts a refused run again
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert re.match("error: .*gpt_output.*--resume.*--overwrite", train_here(folder, *ALONE))
        assert contents() == before
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert train_here(folder, "--max_steps=0", "--overwrite") == 0
    assert [record["step"] for record in read_metrics(folder)] == [0]
    assert not list(folder.glob("gpt_output/checkpoint*"))

class Intruder:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)

def change_a_byte(path):
    largest = max(zipfile.ZipFile(path).infolist(), key=lambda part: part.file_size)
    data = bytearray(path.read_bytes())
    where = largest.header_offset + largest.file_size // 2  # in a tensor, not in the padding
    data[where] = (data[where] + 1) % 256
    path.write_bytes(data)

DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "one byte": change_a_byte,
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: torch.save({"step": 20, "model": Intruder()}, path)}

@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(damage, runs, tmp_path, capfd):
    folder = new_folder(tmp_path / "run", runs.whole.folder)
    DAMAGE[damage](folder / "gpt_output/checkpoint.pt")
    assert train_here(folder, *ALONE, "--resume") == 0
    out, err = capfd.readouterr()
    assert re.search(r"checkpoint\.pt .*damaged", err) and "resumed from step 15 " in out
    assert_same(folder, runs.whole.folder, rel=0)

    for path in folder.glob("gpt_output/checkpoint*.pt"):
        DAMAGE[damage](path)
    assert re.match("error: .*checkpoint.*--overwrite", train_here(folder, *ALONE, "--resume"))
    assert not (folder / "executed").exists()

def test_every_micro_batch_has_its_own_dropout(tmp_path, monkeypatch):
    forward, seeds = common.GPTModel.forward, []
    def record_seed(model, *arguments, **options):
        seeds.extend([torch.initial_seed()] * model.training)
        return forward(model, *arguments, **options)
    monkeypatch.setattr(common.GPTModel, "forward", record_seed)
    assert train_here(new_folder(tmp_path / "run"), *split(4, 2), "--max_steps=3") == 0
    assert len(seeds) == len(set(seeds)) == 6

def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_the_checkpoint(
        tmp_path, monkeypatch):
    forward, steps = common.GPTModel.forward, []
    def forward_until_step_7(model, *arguments, **options):
        steps.extend([1] * model.training)
        return forward(model, *arguments, **options) * (math.nan if len(steps) == 7 else 1)
    monkeypatch.setattr(common.GPTModel, "forward", forward_until_step_7)
    folder = new_folder(tmp_path / "run")
    assert re.match(r"error: step 7: .*nan.* step 5\b", train_here(folder))
    checkpoint = torch.load(folder / "gpt_output/checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["step"] == 5
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())

# --- Outputs --------------------------------------------------------------------------------------

def test_the_log_shows_a_model_that_learns(runs):
    first, *steps = read_metrics(runs.whole.folder)
    assert first["step"] == first["tokens_seen"] == 0
    assert first["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert [record["step"] for record in steps] == list(range(1, 21))
    for record in steps:
        assert record["tokens_seen"] == record["step"] * 8 * 32
        assert record["epoch"] == pytest.approx(record["step"] * 8 / 139)
        assert record["grad_norm"] > 0 and record["learning_rate"] > 0
        assert ("val_loss" in record) == (record["step"] in (10, 20))
    assert steps[-1]["tokens_per_second"] > 0 and "tokens_per_second" not in steps[2]
    assert 0 < steps[-1]["train_loss"] < 0.9 * steps[0]["train_loss"]
    assert 0 < steps[-1]["val_loss"] < 0.9 * first["val_loss"]

def test_the_terminal_shows_the_batch_arithmetic_samples_and_the_result(runs):
    for line in (r"1 windows? x 8 micro-batches x 1 process(es)? x 32 tokens = 256\b.*\b20\b",
                 r"step 20 \| .*train_loss \d.*learning_rate \d", r"sample: '?\"?The class.+",
                 r"done: val_loss \d\.\d.*final_model"):
        assert re.search(f"^{line}", runs.whole.stdout, re.M), line

def test_plots_and_tensorboard_are_written(runs):
    output = runs.whole.folder / "gpt_output"
    assert imread(output / "loss.png").std() > 0.05
    assert (output / "loss.pdf").read_bytes().startswith(b"%PDF")
    assert next(output.glob("runs/events*")).stat().st_size > 20 * 50
    assert not list(output.glob("*.unfinished"))

@torch.no_grad()
def test_transformers_loads_the_final_model_with_the_logits_of_the_checkpoint(runs):
    final = runs.whole.folder / "gpt_output/final_model"
    input_ids = AutoTokenizer.from_pretrained(final)("Naïve", return_tensors="pt").input_ids
    assert input_ids.tolist() == [list("Naïve".encode())]
    own = common.GPTModel(CFG).eval()
    own.load_state_dict(torch.load(runs.whole.folder / "gpt_output/checkpoint.pt")["model"])
    logits = AutoModelForCausalLM.from_pretrained(final)(input_ids).logits
    torch.testing.assert_close(logits, own(input_ids), rtol=0, atol=1e-4)

def test_no_steps_evaluate_and_export_without_training(tmp_path, capfd):
    folder = new_folder(tmp_path / "run")
    assert train_here(folder, "--max_steps=0", "--text_file=python_docs") == 0
    record, = read_metrics(folder)
    assert f"val_loss {record['val_loss']:.3f}" in capfd.readouterr().out and weights(folder)

def test_a_final_model_can_be_trained_further(runs, tmp_path):
    folder, final = new_folder(tmp_path / "run"), runs.whole.folder / "gpt_output/final_model"
    assert train_here(folder, f"--init_from={final}", "--max_steps=0") == 0
    val_loss = read_metrics(runs.whole.folder)[-1]["val_loss"]
    assert read_metrics(folder)[0]["val_loss"] == pytest.approx(val_loss, rel=1e-5)

def test_flags_win_over_the_yaml_file_and_a_dry_run_writes_no_results(tmp_path, capfd):
    folder = new_folder(tmp_path / "run")
    (folder / "run.yaml").write_text("gradient_accumulation_steps: 3\nbatch_size: 5\nseed: 1\n")
    flags = ["--config=run.yaml", "--dry_run"]
    for batch_size in ("--batch-size=2", "--batch_size=2"):
        assert train_here(folder, *flags, batch_size) == 0
        out = capfd.readouterr().out
        assert "2 windows x 3 micro-batches x 1 processes x 32 tokens = 192" in out
    for part in ("parameters", "GiB", "weights", "gradients", "optimizer", "activations", "logits"):
        assert part in out
    assert not {"checkpoint.pt", "metrics.jsonl", "final_model", "runs"} & {
        path.name for path in folder.glob("gpt_output/*")}

def test_a_preset_can_be_named_in_the_yaml_file(tmp_path, capfd):
    folder = new_folder(tmp_path / "run")
    (folder / "run.yaml").write_text("preset: 124M\nbatch_size: 1\n")
    flags = ["--config=run.yaml", "--text_file=text.txt", "--tokenizer=bytes", "--dry_run"]
    assert run_main(folder, NAME, *flags, "--context_length=32", "--n_layers=1") == 0
    assert "1 windows x 4 micro-batches" in (out := capfd.readouterr().out)
    assert re.match(r"84,\d{3},\d{3} parameters", out)  # width 768, 50,304 rows twice, one block

# --- Errors ---------------------------------------------------------------------------------------

BAD_FLAGS = {
    "--text_file=nope.txt": r"nope\.txt", "--text_file=nope*.txt": r"nope\*\.txt",
    "--text_file=empty.txt": r"empty\.txt.* empty", "--text_file=short.txt": "text.* 0 windows",
    "--batch_size=500": "text.* 139 windows.* (500|1000)", "--text_file=latin1.txt": "latin1.* 11",
    "--emb_dim=33": "--emb_dim=33.*--n_heads=2", "--vocab_size=200": "--vocab_size=200.* 257",
    "--batch_size=0": "--batch_size=0", "--context_length=-1": "--context_length=-1",
    "--n_layers=0": "--n_layers=0", "--save_every=0": "--save_every=0",
    "--gradient_accumulation_steps=0": "--gradient_accumulation_steps=0",
    "--max_steps=-2": "--max_steps=-2", "--drop_rate=1.5": "drop_rate=1.5",
    "--val_fraction=1.5": "val_fraction=1.5", "--val_fraction=0": "val",
    "--learning_rate=nan": "--learning_rate=nan", "--learning_rate=inf": "--learning_rate=inf",
    "--learning_rate=-1": "--learning_rate=-1", "--learning_rate=fast": "learning_rate.*fast",
    "--precision=fp16": "--precision=fp16.*CUDA", "--n_layer=3": "--n_layer=3",
    "--device=tpu": "device.*tpu",
    "--config=absent.yaml": r"absent\.yaml", "--config=key.yaml": "n_layer",
    "--config=type.yaml": "emb_dim.*wide", "--config=list.yaml": r"list\.yaml",
    "--config=broken.yaml": r"broken\.yaml", "--config=latin1.txt": r"latin1\.txt",
    "--init_from=nope": "nope", "--init_from=nope.pth": r"nope\.pth",
    "--resume --overwrite": "--resume.*--overwrite"}

@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_or_file_ends_in_one_line_that_names_it(flags, tmp_path):
    folder = new_folder(tmp_path / "run")
    files = {"empty.txt": b"", "short.txt": b"thirty-two bytes of text, no more",
             "latin1.txt": "Voilà, déjà vu".encode()[:11] + b"\xe9" + b" vu" * 999,
             "key.yaml": b"n_layer: 3", "type.yaml": b"emb_dim: wide", "list.yaml": b"[1, 2]",
             "broken.yaml": b"emb_dim: [1"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    error = train_here(folder, *flags.split())
    assert re.fullmatch(f"error: .*{BAD_FLAGS[flags]}.*", error)
    assert not list(folder.glob("gpt_output/checkpoint*"))

@pytest.mark.parametrize(("variable", "value", "flags", "words"), [
    ("SLURM_NTASKS", "2", [], "SLURM_NTASKS.*RANK"),
    ("ACCELERATE_MIXED_PRECISION", "bf16", [], "--precision=fp32.*bf16"),
    ("TIKTOKEN_CACHE_DIR", "empty", ["--tokenizer=gpt2", "--vocab_size=50257"],
     "--tokenizer bytes.*TIKTOKEN_CACHE_DIR"),
    ("NO_PROXY", "", ["--text_file=middlemarch"], "gutenberg.*--text_file")])
def test_a_bad_environment_ends_in_one_line(variable, value, flags, words, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no network
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    error = train_here(new_folder(tmp_path / "run"), *flags)
    assert re.fullmatch(f"error: .*{words}.*", error)

@pytest.mark.parametrize(("flags", "words"), [
    (["--emb_dim=64"], "emb_dim.*32"), (["--learning_rate=0.5"], "learning_rate.*0.002"),
    (split(1, 7), "global.batch.* 8"), (["--text_file=other.txt"], "text")])
def test_a_checkpoint_of_another_configuration_is_refused(flags, words, runs, tmp_path):
    folder = new_folder(tmp_path / "run", runs.whole.folder)
    (folder / "other.txt").write_bytes(TEXT[1:2501])
    error = train_here(folder, *ALONE, *flags, "--resume")
    assert re.fullmatch(rf"error: .*checkpoint\.pt.*{words}.*", error)

@pytest.mark.parametrize("flags", [
    [], ["--precision=bf16", "--gradient_accumulation_steps=2"], ["--gradient_checkpointing=on"],
    ["--drop_rate=0.1"], ["--drop_rate=0.1", "--precision=bf16", "--batch_size=4"],
    ["--vocab_size=20000"], *(["--vocab_size=20000", "--loss_chunks=4", f"--precision={precision}"]
                              for precision in ("fp32", "bf16"))])
def test_the_estimate_of_memory_is_within_10_percent_of_what_is_allocated(flags, tmp_path, capfd):
    folder = new_folder(tmp_path / "run")
    (folder / "text.txt").write_bytes(2 * TEXT)
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert train_here(folder, "--emb_dim=256", "--n_layers=4", "--n_heads=4", "--batch_size=16",
                          "--context_length=128", "--max_steps=2", *flags) == 0
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    changes = (x.nbytes() for x in sorted(events, key=lambda x: x.start_ns()))
    peak = max(itertools.accumulate(changes)) / 2**30
    estimate = re.search(r"about ([\d.]+) GiB", capfd.readouterr().out)[1]
    assert float(estimate) == pytest.approx(peak, rel=0.1)

def test_the_gpu_of_a_mac_is_found(monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    setup_distributed = importlib.import_module(NAME.removesuffix(".py")).setup_distributed
    assert setup_distributed("auto", "auto", 10) == (0, 1, torch.device("mps"))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device=mps .*needs a GPU"):
        setup_distributed("mps", "auto", 10)

def test_too_little_memory_is_noticed_before_anything_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    error = train_here(new_folder(tmp_path / "run"))
    assert re.fullmatch("error: .* GiB .*--batch_size.*--gradient_accumulation_steps.*", error)

def test_running_out_of_gpu_memory_says_which_flags_keep_the_global_batch(tmp_path, monkeypatch):
    def forward(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(common.GPTModel, "forward", forward)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *device: (2**30, 80 * 2**30))
    error = train_here(new_folder(tmp_path / "run"), *split(4, 2))
    assert re.fullmatch("error: .*79.* 80.*--batch_size 2 --gradient_accumulation_steps 4", error)

@pytest.mark.parametrize("flags", ["--text_file=nope.txt", *(
    pytest.param(flags, marks=pytest.mark.slow) for flags in (
        "--emb_dim=33", "--precision=fp16", "--n_layer=3", "--batch_size=500"))])
def test_under_torchrun_every_process_ends_with_that_line_and_none_hangs(flags, tmp_path):
    folder = new_folder(tmp_path / "run")
    run = run_script(folder, NAME, *SMALL, flags, launcher="torchrun", nproc=2, check=False)
    assert run.returncode == 1
    assert len(re.findall(f"error: .*?{BAD_FLAGS[flags]}", run.stderr)) == 2
    assert NAME + '", line' not in run.stderr  # a traceback of the lesson

# --- Minutes long ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_killed_processes_resume_to_the_same_bits(pair, tmp_path):
    folder, step = new_folder(tmp_path / "run"), random.randint(6, 14)
    flags = [*SMALL, *split(1, 4)]
    print("SIGKILL at step", step)
    with started(folder, NAME, *flags, launcher="torchrun", nproc=2) as run:
        run.wait_for_step(step)
        run.kill()
    run = run_script(folder, NAME, *flags, "--resume", launcher="torchrun", nproc=2)
    assert "resumed from step" in run.stdout
    assert_same(folder, pair, rel=0)

@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_torchrun_restarts_a_run_that_lost_a_process(attempt, pair, tmp_path):
    folder, step = new_folder(tmp_path / "run"), random.randint(6, 14)
    print("SIGKILL at step", step)
    with started(folder, NAME, *SMALL, *split(1, 4), launcher="torchrun", nproc=2,
                 PET_MAX_RESTARTS="3", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as run:
        run.wait_for_step(step)
        random.choice(run.process.children()).kill()
        assert run.process.wait(180) == 0, run.stderr
    assert "resumed from step" in run.stdout
    assert_same(folder, pair, rel=0)

@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(40))
def test_a_short_run_on_two_processes_ends_with_0(attempt, tmp_path):
    flags = [*SMALL, "--max_steps=2"]
    run_script(new_folder(tmp_path / "run"), NAME, *flags, launcher="torchrun", nproc=2)

@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE.name} is not in shared/data")
def test_tiny_shakespeare_reaches_the_loss_that_nanogpt_states(tmp_path):
    flags = [
        "--preset=tiny", "--context_length=64", "--stride=1", "--emb_dim=128", "--n_heads=4",
        "--n_layers=4", "--drop_rate=0", "--max_steps=2000", "--learning_rate=1e-3",
        "--min_lr_ratio=0.1", "--warmup_steps=100", "--adam_beta2=0.99", "--weight_decay=0.1",
        "--precision=fp32", "--device=cpu", "--eval_every=500", f"--text_file={SHAKESPEARE}"]
    run = run_script(tmp_path, NAME, *flags, *split(12, 1), timeout=900)
    assert run.metrics[-1]["val_loss"] <= 1.90  # 1.88 on random windows
