"""Lesson 05 against TRL's SFTTrainer: learned tokens per second, same model, data and precision.

Run it   pip install trl beside the requirements, in an environment of its own, then
         python benchmarks/vs_trl.py --tokenizer gpt_output/final_model --dataset chats.jsonl
The model has the shape of SmolLM2-135M and random weights. Contenders run by turns, each in a new
process, on as many threads as OMP_NUM_THREADS says; the first three steps are not counted. TRL has
its defaults, but for gradient checkpointing, which costs it a quarter of its speed: that is off.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, rope_theta=100000.0,
               num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
               tie_word_embeddings=True)
CONTENDERS = {"ours": "lesson 05", "trl": "TRL", "trl_grouped": "TRL, batches grouped by length",
              "ours_packed": "lesson 05, packed", "trl_packed": "TRL, packed"}

class Meter:
    """Learned tokens per second from the end of the third step on."""
    def __init__(self):
        self.targets, self.steps = 0, []

    def count(self, labels):
        self.targets += (labels[:, 1:] != -100).sum().item()

    def step(self):
        self.steps.append((time.perf_counter(), self.targets))

    def result(self):
        (began, before), (ended, after) = self.steps[2], self.steps[-1]
        return (after - before) / (ended - began)

def make_model(tokenizer, folder):
    """A random Llama of SmolLM2-135M's shape with this tokenizer, and ChatML as its template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    lesson = importlib.import_module("05_sft_multigpu")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer.chat_template = None
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMOLLM2))
    lesson.prepare_tokenizer(model, tokenizer, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def run_ours(args, meter):
    lesson = importlib.import_module("05_sft_multigpu")
    collate = lesson.collate_chats
    def counting(rows):
        batch = collate(rows)
        meter.targets += (batch[1] != -100).sum().item()
        return batch
    lesson.collate_chats = counting
    lesson.start_profiler = lambda *_: meter.step
    lesson.judge_chats = lambda *_: ({"val_loss": 0, "val_token_accuracy": 0, "stop_rate": 0}, [])
    sys.argv = ["05_sft_multigpu.py", "--model", args.folder, "--dataset", args.dataset,
                "--max_steps", str(args.steps), "--batch_size", str(args.batch_size),
                "--max_length", str(args.max_length), "--precision", args.precision,
                "--eval_every", "100000", "--val_fraction", "0.01",
                "--output_dir", f"{args.folder}/out", "--overwrite"]
    sys.argv += ["--packing"] * args.contender.endswith("packed")
    try:
        lesson.main()
    except SystemExit as end:
        assert not end.code

def run_trl(args, meter):
    import datasets
    import trl
    from transformers import TrainerCallback
    class Timer(TrainerCallback):
        def on_step_end(self, *_, **__):
            meter.step()
    lesson = importlib.import_module("05_sft_multigpu")
    rows = [{"messages": chat} for chat in lesson.load_chats(args.dataset)[0]]
    config = trl.SFTConfig(
        f"{args.folder}/out", assistant_only_loss=True, max_length=args.max_length,
        packing=args.contender.endswith("packed"), per_device_train_batch_size=args.batch_size,
        max_steps=args.steps, learning_rate=5e-5, lr_scheduler_type="cosine", save_strategy="no",
        bf16=args.precision == "bf16", use_cpu=args.device == "cpu", gradient_checkpointing=False,
        train_sampling_strategy="group_by_length" if "grouped" in args.contender else "random",
        model_init_kwargs={"dtype": "float32"}, report_to="none", disable_tqdm=True)
    trainer = trl.SFTTrainer(args.folder, config, train_dataset=datasets.Dataset.from_list(rows),
                             callbacks=[Timer()])
    compute_loss = trainer.compute_loss
    def counting(model, inputs, **given):
        meter.count(inputs["labels"])
        return compute_loss(model, inputs, **given)
    trainer.compute_loss = counting
    trainer.train()

def main():
    flag = argparse.ArgumentParser(description=__doc__.splitlines()[0]).add_argument
    parser = flag.__self__
    flag("--tokenizer", default="gpt_output/final_model", help="folder with a tokenizer")
    flag("--dataset", required=True, help="JSONL of chats")
    flag("--steps", type=int, default=30)
    flag("--runs", type=int, default=3)
    flag("--batch_size", type=int, default=8)
    flag("--max_length", type=int, default=512)
    flag("--precision", default="bf16", choices=["bf16", "fp32"])
    flag("--device", default="cpu", choices=["cpu", "cuda"])
    flag("--contenders", nargs="+", default=[*CONTENDERS], choices=[*CONTENDERS])
    flag("--contender", help=argparse.SUPPRESS)
    flag("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        run, meter = run_ours if args.contender.startswith("ours") else run_trl, Meter()
        run(args, meter)
        print(json.dumps(meter.result()))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(args.tokenizer, folder)
        start = partial(subprocess.run, check=True, text=True, stdout=subprocess.PIPE,
                        env=os.environ | {"HF_HUB_OFFLINE": "1"})
        speeds = {name: [] for name in args.contenders}
        for _ in range(args.runs):
            for name, found in speeds.items():
                output = start([sys.executable, *sys.argv, "--contender", name, "--folder", folder])
                found.append(float(output.stdout.splitlines()[-1]))
                print(f"{CONTENDERS[name]}: {found[-1]:,.0f} learned tokens per second", flush=True)
    print("\n| contender | learned tokens/s, median | ratio to TRL |\n|---|---|---|")
    for name, found in speeds.items():
        peer = speeds.get("trl_packed" if name.endswith("packed") else "trl", found)
        print(f"| {CONTENDERS[name]} | {median(found):,.0f} | {median(found) / median(peer):.2f} |")

if __name__ == "__main__":
    main()
