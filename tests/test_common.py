"""common.py against formulas, tiktoken and transformers: code that this project did not write."""

import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import common
from common import GPTModel, TokenWindows, generate

DATA = Path(__file__).parents[2] / "shared" / "data"
CFG = {"vocab_size": 300, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2,
       "drop_rate": 0.0, "qkv_bias": False}
BYTES = common.load_encoding("bytes")  # 257 ids: with vocab_size 300, 43 ids have no token
END = "<|endoftext|>"

@pytest.fixture(params=["bytes", "gpt2"])
def encoding(request, monkeypatch):
    if request.param == "gpt2" and not (DATA / "tiktoken_cache").exists():
        pytest.skip(f"GPT-2's BPE files are not in {DATA / 'tiktoken_cache'}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tiktoken_cache"))
    return common.load_encoding(request.param)

@torch.no_grad()
def random_model(**changes):
    """Weights, biases too, so large that nothing in the model is nearly linear or nearly zero."""
    torch.manual_seed(0)
    model = GPTModel(CFG | changes).eval()
    for weight in model.parameters():
        weight += 0.2 * torch.randn_like(weight)
    return model

def random_ids(*shape, n=257):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(1))

@torch.no_grad()
def favour_ids_without_token(model):
    model.final_norm.bias[0] = model.out_head.weight[BYTES.n_vocab:, 0] = 10.0
    return model

def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

# --- The model -----------------------------------------------------------------------------------

def test_the_large_preset_has_its_published_number_of_parameters():
    sizes = {"vocab_size": 50304, "context_length": 1024, "emb_dim": 2048, "n_heads": 16,
             "n_layers": 24, "drop_rate": 0.1, "qkv_bias": False}
    with torch.device("meta"):
        assert sum(w.numel() for w in GPTModel(sizes).parameters()) == 1_416_597_504

@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_state_dict_has_exactly_the_published_names(qkv_bias):
    parts = ["att.proj", "ff.layers.0", "ff.layers.2", "norm1", "norm2"]
    names = {f"trf_blocks.{i}.{part}.{kind}" for i in range(CFG["n_layers"]) for part in parts
             for kind in ("weight", "bias")}
    names |= {f"trf_blocks.{i}.att.qkv.{kind}" for i in range(CFG["n_layers"])
              for kind in ["weight", "bias"][: 1 + qkv_bias]}
    names |= {"tok_emb.weight", "pos_emb.weight", "final_norm.weight", "final_norm.bias",
              "out_head.weight"}
    assert set(GPTModel(CFG | {"qkv_bias": qkv_bias}).state_dict()) == names

def logits_by_formula(weights, n_heads, input_ids):
    """GPT-2 from its papers, in plain tensor operations."""
    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    T, D = input_ids.shape[1], weights["tok_emb.weight"].shape[1]
    future = torch.ones(T, T).triu(1).bool()
    x = weights["tok_emb.weight"][input_ids] + weights["pos_emb.weight"][:T]
    for block in sorted({name.rsplit(".norm1")[0] for name in weights if ".norm1" in name}):
        heads = linear(norm(x, f"{block}.norm1"), f"{block}.att.qkv").split(D // n_heads, dim=-1)
        mixed = []
        for i in range(n_heads):
            query, key, value = heads[i::n_heads]
            scores = (query @ key.mT / (D // n_heads) ** 0.5).masked_fill(future, -math.inf).exp()
            mixed.append(scores / scores.sum(-1, keepdim=True) @ value)
        x = x + linear(torch.cat(mixed, dim=-1), f"{block}.att.proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.ff.layers.0")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{block}.ff.layers.2")
    return linear(norm(x, "final_norm"), "out_head")

@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_logits_are_those_of_the_formulas(qkv_bias):
    model, input_ids = random_model(qkv_bias=qkv_bias), random_ids(3, 16)
    expected = logits_by_formula(model.state_dict(), CFG["n_heads"], input_ids)
    assert_close(model(input_ids).detach(), expected, 1e-5)

def test_a_future_token_leaves_earlier_logits_alone():
    model, input_ids = random_model(), random_ids(1, 16)
    before = model(input_ids)
    input_ids[0, 9] += 1
    after = model(input_ids)
    assert_close(after[:, :9], before[:, :9], 1e-6)
    assert (after[:, 9:] - before[:, 9:]).abs().amax(-1).min() > 1e-3

@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("loss_chunks", [1, 3, 7])
def test_the_loss_is_summed_cross_entropy(loss_chunks, gradient_checkpointing):
    """-100 ignored, gradients too, and however it is computed."""
    model, input_ids, targets = random_model().train(), random_ids(2, 16), random_ids(2, 16) + 43
    log_probs = model(input_ids).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    targets[0, 4:9] = -100
    losses = [-log_probs[targets != -100].sum()]
    model.loss_chunks, model.gradient_checkpointing = loss_chunks, gradient_checkpointing
    losses.append(model(input_ids, targets))
    actual, expected = ((loss, *torch.autograd.grad(loss, model.parameters())) for loss in losses)
    assert_close(actual, expected, 1e-5)

def test_a_chunked_loss_never_holds_all_logits():
    """Neither in one chunk's computation, backward included, nor stored for the backward pass."""
    model, tokens, largest, stored = random_model(), 64, {}, {}
    for chunks in (1, 3):
        made, saved, model.loss_chunks = [], [], chunks
        hook = model.out_head.register_forward_hook(lambda *a, made=made: made.append(a[2].numel()))
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = model(random_ids(4, 16), random_ids(4, 16))
        loss.backward()
        hook.remove()
        largest[chunks], stored[chunks] = max(made), sum(saved)
    assert largest == {1: tokens * 300, 3: 22 * 300}
    assert stored[1] - stored[3] >= tokens * 300

def test_the_initialisation_is_that_of_gpt2():
    torch.manual_seed(0)
    model = GPTModel(CFG | {"emb_dim": 64, "n_layers": 8, "qkv_bias": True})
    for name, weight in model.named_parameters():
        residual = name.endswith(("att.proj.weight", "ff.layers.2.weight"))
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02 / (4 if residual else 1), rel=0.1)
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all()
    loss = model(random_ids(16, 16), random_ids(16, 16)).item() / 256
    assert loss == pytest.approx(math.log(300), abs=0.05)

@pytest.mark.parametrize("prompt_length", [1, 5, 16, 20])
def test_cached_greedy_generation_equals_full_passes(prompt_length):
    """Beyond the context too, for two texts at once, and with dropout switched off."""
    model, text = random_model(drop_rate=0.5).eval(), random_ids(2, prompt_length)
    generated = generate(model.train(), text, 24, temperature=0)
    assert model.training
    assert torch.equal(generate(model.eval(), text, 24, top_k=1), generated)
    assert not model.training
    for _ in range(24):
        text = torch.cat([text, model(text[:, -16:])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, text)

def test_generation_never_takes_an_id_without_a_token():
    model, prompt = favour_ids_without_token(random_model()), random_ids(64, 1)
    assert generate(model, prompt, 20).max() >= BYTES.n_vocab
    assert generate(model, prompt, 20, n_vocab=BYTES.n_vocab).max() < BYTES.n_vocab

def test_the_generator_alone_decides_what_is_sampled():
    first, again, other = (generate(random_model(), random_ids(2, 4), 12,
                                    rng=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)

def test_sampling_follows_temperature_and_top_k():
    model, prompt = random_model(), random_ids(1, 4)
    logits = model(prompt)[0, -1] / 1.5
    logits[logits < logits.topk(5).values[-1]] = -math.inf
    rng = torch.Generator().manual_seed(0)
    ids = generate(model, prompt.expand(20_000, -1), 1, temperature=1.5, top_k=5, rng=rng)[:, -1]
    frequencies = ids.bincount(minlength=300) / len(ids)
    assert_close(frequencies, logits.softmax(-1).detach(), 0.02)

# --- The model as other programs know it ---------------------------------------------------------

@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("vocab_size", [257, 300])
def test_transformers_computes_the_same_logits(tmp_path, vocab_size, qkv_bias):
    """And the folder comes back through load_weights as it was (GPT-2 always has a qkv bias)."""
    model = random_model(vocab_size=vocab_size, qkv_bias=qkv_bias)
    common.save_hugging_face(model, BYTES, tmp_path)
    expected = model(random_ids(2, 16))
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(hf_model(random_ids(2, 16)).logits, expected, 1e-4)
    weights, sizes = common.load_weights(tmp_path)
    cfg = CFG | {"vocab_size": vocab_size, "qkv_bias": True}
    assert cfg == sizes | {"drop_rate": 0.0}
    again = GPTModel(cfg).eval()
    again.load_state_dict(weights)
    assert torch.equal(again(random_ids(2, 16)), expected)

def test_transformers_never_generates_an_id_without_a_token(tmp_path):
    common.save_hugging_face(favour_ids_without_token(random_model()), BYTES, tmp_path)
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = hf_model.generate(random_ids(32, 2), do_sample=True, max_new_tokens=12)
    assert ids.shape == (32, 14) and ids.max() < BYTES.n_vocab

def test_the_exported_tokenizer_equals_tiktoken(tmp_path, encoding):
    common.save_hugging_face(random_model(vocab_size=encoding.n_vocab), encoding, tmp_path)
    tokenizer, rng = AutoTokenizer.from_pretrained(tmp_path), random.Random(0)
    code_points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = ["", " ", "Hello , world . It 's n't", "a\r\nb\r\n\r\n  c", "x" + " " * 70 + "y  ",
             "\t\tif x:\n\t  y\n\n\n", "NUL \0 \x1c\x7f\x85", "e\u0301 \u1e9b\u0323 \ufb01 \u212b",
             "\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7 \u2764\ufe0f", "\u6f22\u5b57\u3000\u304b\u306a",
             "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0661\u0662", "\ufeffBOM \u2028 \u00a0 \ufffd",
             "I'LL we've 12345 \u00bd\u2167", f"one{END}two {END} {END}\n", "<|endoftext", " <s> </s> [UNK]",
             *("".join(map(chr, rng.choices(code_points, k=200))) for _ in range(20)),
             *("".join(map(chr, rng.choices(code_points[:0x3000], k=200))) for _ in range(20))]
    for text in texts:
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text

def test_the_chat_template_asks_for_the_answer_and_ends_it(tmp_path):
    common.save_hugging_face(random_model(), BYTES, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert "How many?" in prompt and whole.startswith(prompt)
    assert whole.removeprefix(prompt).lstrip(" ") == f"Four.{tokenizer.eos_token}" == f"Four.{END}"

def test_a_gpt2_of_transformers_loads(tmp_path):
    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(GPT2Config(300, 16, 32, 2, 4, initializer_range=0.3)).eval()
    hf_model.save_pretrained(tmp_path)
    weights, sizes = common.load_weights(tmp_path)
    model = GPTModel(sizes | {"drop_rate": 0.0}).eval()
    model.load_state_dict(weights)
    assert_close(model(random_ids(2, 16)), hf_model(random_ids(2, 16)).logits, 1e-4)

@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_loads_also_from_ddp_and_compile(tmp_path, prefix):
    model = random_model()
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    torch.save(weights, tmp_path / "model.pth")
    weights, sizes = common.load_weights(tmp_path / "model.pth")
    assert CFG == sizes | {"drop_rate": 0.0, "n_heads": 4}
    assert_close(weights, dict(model.state_dict()), 0.0)

def test_a_state_dict_of_another_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match=r"linear\.pth"):
        common.load_weights(tmp_path / "linear.pth")

@pytest.mark.parametrize("config", [
    transformers.LlamaConfig(64, 16, 32, 1, 2),
    transformers.OpenAIGPTConfig(64, 16, 16, 1, 2),
], ids=lambda config: config.model_type)
def test_another_kind_of_hugging_face_model_is_refused(tmp_path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=tmp_path.name):
        common.load_weights(tmp_path)

# --- Texts and token windows ---------------------------------------------------------------------

def test_tokens_of_the_pieces_are_those_of_the_whole_text(tmp_path, encoding):
    """The pieces stay near the wanted size, and nothing in the text is changed."""
    parts = ["a", "it's", "7", "é", ".", "'", " ", "  ", "\t", "\n", "\n", "\n\n", "\r\n", "\r",
             "\ufeff", "\u00a0", "\u2028", "\x1c", "\0"]
    text = "".join(random.Random(0).choices(parts, k=20_000))
    (tmp_path / "text.txt").write_bytes(text.encode())
    pieces = list(common.text_pieces(tmp_path / "text.txt", size=50))
    assert "".join(pieces) == text
    assert len(pieces) > len(text) / 250
    ids = [i for piece in pieces for i in encoding.encode_ordinary(piece)]
    assert ids == encoding.encode_ordinary(text)

def test_pieces_stay_small_where_blank_lines_separate_all_lines(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"A paragraph.\n\n" * 200)
    assert max(map(len, common.text_pieces(tmp_path / "text.txt", size=50))) < 100

def test_a_byte_order_mark_is_dropped_at_the_start_only(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffone\n\ufefftwo".encode())
    assert "".join(common.text_pieces(tmp_path / "text.txt")) == "one\n\ufefftwo"

@pytest.mark.parametrize(("content", "offset"), [
    (b"\xff", 0), (b"one\ntw\xff", 6), (b"cut short\xe2\x82", 9), (b"\xef\xbb\xbfmark\xff", 7),
    (b"a line\n" * 1000 + b"\xe9t\xe9", 7000)])
def test_a_text_that_is_not_utf8_is_refused_with_the_place(tmp_path, content, offset):
    (tmp_path / "latin.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"latin\.txt.*\b{offset}\b"):
        list(common.text_pieces(tmp_path / "latin.txt", size=50))

@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(tmp_path, content):
    (tmp_path / "nothing.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"nothing\.txt"):
        list(common.text_pieces(tmp_path / "nothing.txt"))

def test_the_token_file_has_an_end_token_after_each_text(tmp_path, encoding):
    """Of several pieces; an end token that is spelled out in a text is ordinary text."""
    texts = ["One line of the text,\n\n  and another.  \n" * 40_000, f"{END} two", " "]
    paths = [tmp_path / str(i) for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, newline="")
    with open(tmp_path / "tokens", "wb") as file:
        common.write_tokens(paths, encoding, file)
    expected = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in texts]
    assert common.token_dtype(encoding) == np.uint16
    assert np.array_equal(np.fromfile(tmp_path / "tokens", np.uint16), np.concatenate(expected))

def test_a_large_vocabulary_gets_wider_ids():
    assert common.token_dtype(SimpleNamespace(n_vocab=65_536)) == np.uint16
    assert common.token_dtype(SimpleNamespace(n_vocab=70_000)) == np.uint32

@pytest.mark.parametrize(("length", "stride", "count"), [
    (65, 16, 4), (64, 16, 3), (65, 4, 13), (65, 1, 49), (65, 40, 2), (17, 16, 1), (16, 16, 0), (3, 4, 0)])
def test_windows_are_spaced_by_the_stride_and_targets_lie_one_token_on(tmp_path, length, stride, count):
    tokens = np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=(length,))
    tokens[:] = np.arange(length) + 60_000  # ids beyond int16
    windows = TokenWindows(tokens, 16, stride)
    assert len(windows) == count
    expected = [range(60_000 + i * stride, 60_000 + i * stride + 16) for i in range(count)]
    for i, window in enumerate(expected):
        pass
