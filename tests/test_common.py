"""common.py against formulas, tiktoken and transformers: code that this project did not write."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common
from common import GPTModel, TokenWindows, generate

CACHE = Path(__file__).parents[2] / "shared" / "data" / "tiktoken_cache"
CFG = {"vocab_size": 300, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2,
       "drop_rate": 0.0, "qkv_bias": False}
HF_CFG = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
          "initializer_range": 0.3}
BYTES, END = common.load_encoding("bytes"), "<|endoftext|>"  # 257 ids; 43 of CFG's have no token

@pytest.fixture(params=["bytes", pytest.param("gpt2", marks=pytest.mark.skipif(
    not CACHE.exists(), reason=f"GPT-2's BPE files are not in {CACHE}"))])
def encoding(request, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return common.load_encoding(request.param)

@torch.no_grad()
def random_model(**changes):
    """Weights, biases too, so large that nothing in the model is nearly linear or nearly zero."""
    torch.manual_seed(0)
    model = GPTModel(CFG | changes).eval()
    for weight in model.parameters():
        weight += 0.2 * torch.randn_like(weight)
    return model

def random_ids(*shape):
    return torch.randint(BYTES.n_vocab, shape, generator=torch.Generator().manual_seed(1))

def load(source):
    weights, sizes = common.load_weights(source)
    model = GPTModel({"n_heads": 4, "drop_rate": 0.0} | sizes).eval()
    model.load_state_dict(weights)
    return model

def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

def test_the_large_preset_has_its_published_number_of_parameters():
    large = CFG | {"vocab_size": 50304, "context_length": 1024, "emb_dim": 2048, "n_layers": 24}
    with torch.device("meta"):
        assert sum(weight.numel() for weight in GPTModel(large).parameters()) == 1_416_597_504

@pytest.mark.parametrize("qkv_bias", [False, True])
def test_published_names_and_plain_formulas_give_the_logits(qkv_bias):
    model, ids = random_model(qkv_bias=qkv_bias), random_ids(3, 16)
    weights = dict(model.state_dict())  # each formula takes its own out; none may be left
    def linear(x, name, bias=True):
        return x @ weights.pop(f"{name}.weight").T + (weights.pop(f"{name}.bias") if bias else 0)
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights.pop(f"{name}.weight") + weights.pop(f"{name}.bias")
    x = weights.pop("tok_emb.weight")[ids] + weights.pop("pos_emb.weight")
    for block in ("trf_blocks.0", "trf_blocks.1"):
        qkv, heads = linear(norm(x, f"{block}.norm1"), f"{block}.att.qkv", qkv_bias), []
        for i in range(4):
            query, key, value = qkv.split(8, dim=-1)[i::4]
            scores = (query @ key.mT / 8**0.5).exp().tril()  # the future has no weight
            heads.append(scores / scores.sum(-1, keepdim=True) @ value)
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.att.proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.ff.layers.0")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{block}.ff.layers.2")
    assert_close(model(ids).detach(), linear(norm(x, "final_norm"), "out_head", bias=False))
    assert not weights

def test_a_future_token_leaves_earlier_logits_alone():
    model, ids = random_model(), random_ids(1, 16)
    change = (model(ids + (torch.arange(16) == 9)) - model(ids)).abs().amax(-1)[0]
    assert change[:9].max() < 1e-5 and change[9:].min() > 1e-3

@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("loss_chunks", [1, 3, 7])
def test_the_loss_is_summed_cross_entropy(loss_chunks, gradient_checkpointing):
    """-100 ignored, gradients too. In chunks, only one of them is ever there in fp32."""
    model, input_ids, targets = random_model().train(), random_ids(3, 16), random_ids(3, 16)
    log_probs = model(input_ids).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    ignored = torch.arange(48).view(3, 16) % 5 == 2
    model.loss_chunks, model.gradient_checkpointing = loss_chunks, gradient_checkpointing
    targets = targets.masked_fill(ignored, -100)
    actual, expected = ((loss, *torch.autograd.grad(2 * loss, model.parameters()))
                        for loss in (model(input_ids, targets), -log_probs[~ignored].sum()))
    assert_close(actual, expected)

    rows = set()
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            rows.update(len(x) for x in tree_leaves(result) if torch.is_tensor(x)
                        and x.dtype == torch.float32 and x.shape[1:] == (300,))
            return result
    with Watch(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids, targets).backward()
    assert max(rows) == math.ceil(48 / loss_chunks)

def test_the_initialisation_is_that_of_gpt2():
    torch.manual_seed(0)
    model = GPTModel(CFG | {"emb_dim": 64, "n_layers": 8, "qkv_bias": True})
    for name, weight in model.named_parameters():
        residual = name.endswith(("att.proj.weight", "ff.layers.2.weight"))
        std = 0 if weight.dim() == 1 else 0.02 / math.sqrt(2 * 8) if residual else 0.02
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert abs(weight.mean().item() - ("norm" in name and "weight" in name)) < 2e-3
    loss = model(random_ids(16, 16), random_ids(16, 16)).item() / 256
    assert loss == pytest.approx(math.log(300), abs=0.05)

@pytest.mark.parametrize("prompt_length", [1, 5, 16, 20])
def test_cached_greedy_generation_equals_full_passes(prompt_length):
    """Beyond the context too, for two texts at once, and with dropout switched off."""
    model, text = random_model(drop_rate=0.5), random_ids(2, prompt_length)
    generated = generate(model.train(), text, 24, temperature=0)
    assert model.training
    assert torch.equal(generate(model.eval(), text, 24, top_k=1), generated) and not model.training
    for _ in range(24):
        text = torch.cat([text, model(text[:, -16:])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, text)

def test_greedy_generation_needs_no_luck_where_logits_are_equal_as_in_bf16():
    model, prompt = random_model().bfloat16(), random_ids(256, 1)
    assert torch.equal(*(generate(model, prompt, 12, temperature=0) for _ in range(2)))

def test_sampling_follows_temperature_top_k_and_the_seed():
    model, prompt = random_model(), random_ids(1, 4)
    logits = model(prompt)[0, -1] / 1.5
    logits[logits < logits.topk(5).values[-1]] = -math.inf
    ids, again, other = (generate(model, prompt.expand(4000, -1), 1, temperature=1.5, top_k=5,
                                  rng=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert_close(ids[:, -1].bincount(minlength=300) / 4000, logits.softmax(-1).detach(), 0.03)
    assert torch.equal(ids, again) and not torch.equal(ids, other)

def test_an_id_without_a_token_is_generated_neither_here_nor_by_transformers(tmp_path):
    model, prompt = random_model(), random_ids(64, 2)
    model.final_norm.bias.data[0] = model.out_head.weight.data[257:, 0] = 10.0  # the likeliest
    common.save_hugging_face(model, BYTES, tmp_path)
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert generate(model, prompt, 12).max() > 256
    assert generate(model, prompt, 12, n_vocab=257).max() <= 256
    assert hf_model.generate(prompt, do_sample=True, max_new_tokens=12).max() <= 256

@pytest.mark.parametrize(("vocab_size", "qkv_bias"), [(257, True), (300, False)])
def test_an_export_gives_its_logits_in_transformers_and_back_here(tmp_path, vocab_size, qkv_bias):
    model, ids = random_model(vocab_size=vocab_size, qkv_bias=qkv_bias), random_ids(2, 16)
    common.save_hugging_face(model, BYTES, tmp_path)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids), 1e-4)
    assert_close(load(tmp_path)(ids), model(ids))

def test_a_gpt2_of_transformers_gives_its_logits_here(tmp_path):
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **HF_CFG)).eval()
    hf_model.save_pretrained(tmp_path)
    assert_close(load(tmp_path)(random_ids(2, 16)), hf_model(random_ids(2, 16)).logits, 1e-4)

@pytest.mark.parametrize(("kind", "changes"), [
    ("llama", {}), ("openai-gpt", {}), ("gpt2", {"activation_function": "relu"})])
def test_another_kind_of_model_is_refused(tmp_path, kind, changes):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **HF_CFG, **changes))
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    for name in ("folder", "weights.pth"):
        with pytest.raises(ValueError, match=name):
            common.load_weights(tmp_path / name)

@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_loads_also_from_ddp_and_compile(tmp_path, prefix):
    model, ids, path = random_model(), random_ids(2, 16), tmp_path / "model.pth"
    torch.save({prefix + name: weight for name, weight in model.state_dict().items()}, path)
    assert_close(load(path)(ids), model(ids))

def test_the_exported_tokenizer_equals_tiktoken_and_ends_each_message(tmp_path, encoding):
    common.save_hugging_face(random_model(vocab_size=encoding.n_vocab), encoding, tmp_path)
    tokenizer, rng = AutoTokenizer.from_pretrained(tmp_path), random.Random(0)
    code_points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = ["", " ", "Hello , world . It 's n't I'LL we've 12345 ½Ⅷ", "x" + " " * 70 + "y  ",
             "a\r\nb\r\n\r\n  c", "\t\tif x:\n\t  y\n\n\n", "NUL \0 \x1c\x7f\x85", "<|endoftext",
             "e\u0301 ẛ\u0323 ﬁ \u212b 👩\u200d🚀 🇫🇷 ❤\ufe0f", "漢字\u3000かな العربية ١٢ </s>",
             "\ufeffBOM \u2028 \u00a0 \ufffd", f"one{END}two {END} {END}\n"]
    texts += ["".join(rng.choices(code_points[:n], k=200)) for n in [0x3000, 0x110000] * 20]
    for text in texts:
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert "How many?" in prompt and whole in (f"{prompt}Four.{END}", f"{prompt} Four.{END}")

def test_tokens_of_the_pieces_are_those_of_the_whole_text(tmp_path, encoding):
    """Pieces stay near the wanted size; nothing is changed but a byte order mark at the start."""
    parts = ["a", "it's", "7", ".", " ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "\x1c", "\ufeff"]
    text = "One.\n\n" * 200 + "Two \r\n" * 200 + "".join(random.Random(0).choices(parts, k=9999))
    (tmp_path / "text.txt").write_text("\ufeff" + text, encoding="utf-8", newline="")
    pieces = list(common.text_pieces(tmp_path / "text.txt", size=50))
    assert "".join(pieces) == text and max(map(len, pieces)) < 500
    ids = [i for piece in pieces for i in encoding.encode_ordinary(piece)]
    assert ids == encoding.encode_ordinary(text)

@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b"\xef\xbb\xbf", "empty"), (b"cut short\xe2\x82", "byte 9"),
    (b"\xef\xbb\xbfmark\xff", "byte 7"), (b"a line\n" * 1000 + b"\xe9t\xe9", "byte 7000")])
def test_a_text_that_is_empty_or_not_utf8_is_refused(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt.*{message}\b"):
        list(common.text_pieces(tmp_path / "bad.txt", size=50))

def test_the_token_file_has_an_end_token_after_each_text(tmp_path):
    """Of several pieces; an end token that is spelled out in a text is ordinary text."""
    texts = [b"One line of the text,\n\n  and another.  \n" * 30_000, f"{END} two".encode(), b" "]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    with open(tmp_path / "tokens", "wb") as file:
        common.write_tokens([tmp_path / f"{i}.txt" for i in range(3)], BYTES, "uint16", file)
    tokens = np.fromfile(tmp_path / "tokens", np.uint16).tolist()
    assert tokens == [i for text in texts for i in (*text, 256)]

@pytest.mark.parametrize(("length", "stride", "count"), [
    (65, 16, 4), (64, 16, 3), (65, 4, 13), (65, 40, 2), (17, 16, 1), (16, 16, 0), (3, 4, 0)])
def test_windows_lie_a_stride_apart_and_targets_one_token_on(tmp_path, length, stride, count):
    tokens = np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=(length,))
    tokens[:] = np.arange(length) + 60_000  # no int16
    windows = TokenWindows(tokens, 16, stride)
    assert len(windows) == count
    if count:
        expected = torch.arange(count)[:, None] * stride + torch.arange(16) + 60_000  # int64 too
        assert_close(windows.batch(range(count)), (expected, expected + 1), 0)
