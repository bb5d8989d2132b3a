"""The GPT model and the token windows of lessons 02 and 06: the only code that scripts share.

Names and configuration keys are of S. Raschka, "Build a Large Language Model (From Scratch)", ch05/
10_llm-training-speed, whose checkpoints load strictly. B batch, T time, V vocabulary, D width."""

import itertools
import os
import re

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# --- The model -----------------------------------------------------------------------------------
class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2). (B, T, D) -> (B, T, D)."""
    def __init__(self, cfg):
        super().__init__()
        self.n_heads, self.drop_rate = cfg["n_heads"], cfg["drop_rate"]
        self.qkv = nn.Linear(cfg["emb_dim"], 3 * cfg["emb_dim"], bias=cfg["qkv_bias"])
        self.proj = nn.Linear(cfg["emb_dim"], cfg["emb_dim"])

    def forward(self, x, cache=None):
        """cache: a dict that keeps keys and values from call to call; after the first, T is 1."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache:
            k, v = (torch.cat(pair, 2) for pair in zip(cache.values(), (k, v), strict=True))
        if cache is not None:
            cache.update(keys=k, values=v)
        # FlashAttention, where PyTorch has it. One new token may look at all keys, without a mask.
        drop_rate = self.drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, None, drop_rate, is_causal=q.shape[2] > 1)
        return self.proj(x.transpose(1, 2).flatten(2))

class TransformerBlock(nn.Module):
    """Pre-LayerNorm block (Radford et al. 2019, section 2.3). (B, T, D) -> (B, T, D)."""
    def __init__(self, cfg):
        super().__init__()
        D, gelu = cfg["emb_dim"], nn.GELU(approximate="tanh")  # as in GPT-2
        layers = nn.Sequential(nn.Linear(D, 4 * D), gelu, nn.Linear(4 * D, D))
        self.norm1, self.att = nn.LayerNorm(D), MultiHeadAttention(cfg)
        self.norm2, self.ff = nn.LayerNorm(D), nn.ModuleDict({"layers": layers})
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, cache=None):
        x = x + self.drop_shortcut(self.att(self.norm1(x), cache))
        return x + self.drop_shortcut(self.ff.layers(self.norm2(x)))

class ChunkedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits, targets, reduction="sum"), computed in chunks, of which one at a time
    is in memory in fp32; its gradient, softmax - 1 at the target, takes the place of its logits."""
    @staticmethod
    def forward(ctx, logits, targets, chunks):
        loss = 0.0
        for part, ids in zip(logits.chunk(chunks), targets.chunk(chunks), strict=True):
            log_probs = part.log_softmax(-1, dtype=torch.float32)
            loss += F.nll_loss(log_probs, ids, reduction="sum")
            grad = log_probs.exp_()
            grad[torch.arange(len(ids), device=ids.device), ids.clamp(min=0)] -= 1
            part.copy_(grad.mul_((ids >= 0)[:, None]))
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].mul_(grad), None, None

class GPTModel(nn.Module):
    """GPT-2 with an output head of its own, not tied to the embedding. gradient_checkpointing: keep
    each block's input only, run it again in backward(). loss_chunks: see ChunkedCrossEntropy."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.gradient_checkpointing, self.loss_chunks = dict(cfg), False, 1
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg["n_layers"]))
        self.final_norm = nn.LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        # GPT-2 draws from N(0, 0.02); the two layers of each block that add to the residual stream
        # get 1 / sqrt(2 n_layers) of that, because the stream sums so many of them.
        for name, weight in self.named_parameters():
            residual = name.endswith(("att.proj.weight", "ff.layers.2.weight"))
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / (2 * cfg["n_layers"] if residual else 1) ** 0.5)
            elif name.endswith(".bias"):
                nn.init.zeros_(weight)

    def forward(self, input_ids, targets=None, cache=None):
        """(B, T) -> logits (B, T, V); with targets (B, T), -100 = ignored, -> their *summed* loss:
        the caller divides by the number of targets in the global batch. cache, not for training:
        one dict per block, empty at first (see MultiHeadAttention)."""
        past, T = cache[0]["keys"].shape[2] if cache and cache[0] else 0, input_ids.shape[1]
        x = self.drop_emb(self.tok_emb(input_ids) + self.pos_emb.weight[past : past + T])
        for i, block in enumerate(self.trf_blocks):
            again = self.gradient_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if again else block(x, cache and cache[i])
        logits = self.out_head(self.final_norm(x))
        if targets is None:
            return logits
        logits, targets = logits.flatten(0, 1), targets.flatten()
        if self.loss_chunks > 1:
            return ChunkedCrossEntropy.apply(logits, targets, self.loss_chunks)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

@torch.no_grad()
def generate(model, input_ids, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None, rng=None):
    """Continue input_ids (B, T) by sampled ids; returns (B, T + max_new_tokens). temperature 0: the
    likeliest. n_vocab: the tokenizer's ids; those above only pad the embedding and never come. Once
    the text outgrows the context, all positions move and the key-value cache is of no more use."""
    was_training, context_length = model.training, model.cfg["context_length"]
    model.eval()
    temperature, top_k = (1.0, 1) if temperature == 0 else (temperature, top_k)
    cache = [{} for _ in model.trf_blocks]
    for i in range(max_new_tokens):
        fits = input_ids.shape[1] <= context_length
        last = input_ids[:, -1 if fits and i > 0 else -context_length :]
        logits = model(last, cache=cache if fits else None)
        logits = logits[:, -1, :n_vocab].float() / temperature
        if top_k is not None:  # exactly so many, also where logits tie
            top, ids = logits.topk(min(top_k, logits.shape[-1]))
            logits = torch.full_like(logits, float("-inf")).scatter(1, ids, top)
        next_ids = logits.softmax(dim=-1).multinomial(1, generator=rng)
        input_ids = torch.cat([input_ids, next_ids], dim=1)
    model.train(was_training)
    return input_ids

# --- The model as other programs know it ----------------------------------------------------------
HF_NAMES = {"tok_emb": "transformer.wte", "pos_emb": "transformer.wpe", "norm1": "ln_1",
            "trf_blocks": "transformer.h", "att.qkv": "attn.c_attn", "att.proj": "attn.c_proj",
            "norm2": "ln_2", "ff.layers.0": "mlp.c_fc", "ff.layers.2": "mlp.c_proj",
            "final_norm": "transformer.ln_f", "out_head": "lm_head"}

CHAT_TEMPLATE = ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
                 "{% if add_generation_prompt %}assistant:{% endif %}")

def rename_weights(weights, names):
    """Rename by parts of names; transpose the blocks' matrices, which GPT-2 keeps as (in, out)."""
    renamed = {}
    for name, w in weights.items():
        new_name = re.sub("|".join(map(re.escape, names)), lambda part: names[part[0]], name)
        in_block = w.dim() == 2 and name.startswith(("trf_blocks.", "transformer.h."))
        renamed[new_name] = w.T.contiguous() if in_block else w
    return renamed

def load_weights(source):
    """Returns (weights for GPTModel, the part of its configuration that they fix). source: a .pth
    state dict (also of DDP or compile), or a GPT-2-type Hugging Face folder or hub name. Raises
    ValueError for another kind of model, OSError for files that cannot be had."""
    if str(source).endswith((".pth", ".pt")):
        weights, sizes = torch.load(source, map_location="cpu", weights_only=True), {}
        weights = {re.sub(r"module\.|_orig_mod\.", "", name): w for name, w in weights.items()}
    else:
        from transformers import AutoModelForCausalLM, GPT2Config
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for name in ("activation_function", "layer_norm_epsilon", "scale_attn_weights", "n_inner",
                     "scale_attn_by_inverse_layer_idx"):
            if getattr(model.config, name, None) != getattr(GPT2Config(), name):
                raise ValueError(f"{source} differs from GPT-2 in {name}")
        weights = rename_weights(model.state_dict(), {hf: own for own, hf in HF_NAMES.items()})
        sizes = {"n_heads": model.config.num_attention_heads}
    if "trf_blocks.0.att.qkv.weight" not in weights:
        raise ValueError(f"{source} is no GPT-2-type model: its weights begin {list(weights)[:2]}")
    sizes["vocab_size"], sizes["emb_dim"] = weights["tok_emb.weight"].shape
    sizes["context_length"] = len(weights["pos_emb.weight"])
    sizes["n_layers"] = len({name.split(".")[1] for name in weights if "trf_blocks" in name})
    sizes["qkv_bias"] = "trf_blocks.0.att.qkv.bias" in weights
    return weights, sizes

def save_hugging_face(model, encoding, folder):
    """Write the folder of a GPT2LMHeadModel with the same logits and of the tokenizer that equals
    the tiktoken.Encoding. Ids that have no token are never generated."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    cfg, end, token = model.cfg, encoding.eot_token, encoding.decode([encoding.eot_token])
    weights = rename_weights({k: w.cpu() for k, w in model.state_dict().items()}, HF_NAMES)
    for i in range(cfg["n_layers"]):  # GPT-2 always has this bias
        weights.setdefault(f"transformer.h.{i}.attn.c_attn.bias", torch.zeros(3 * cfg["emb_dim"]))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = GPT2Config(
        vocab_size=cfg["vocab_size"], n_positions=cfg["context_length"], n_embd=cfg["emb_dim"],
        n_layer=cfg["n_layers"], n_head=cfg["n_heads"], tie_word_embeddings=False, dtype="float32",
        embd_pdrop=cfg["drop_rate"], attn_pdrop=cfg["drop_rate"], resid_pdrop=cfg["drop_rate"],
        architectures=["GPT2LMHeadModel"], bos_token_id=end, eos_token_id=end)
    unused = list(range(encoding.n_vocab, cfg["vocab_size"])) or None  # ids without a token
    generation = GenerationConfig(do_sample=True, suppress_tokens=unused, bos_token_id=end,
                                  eos_token_id=end, pad_token_id=end)
    converter = TikTokenConverter(None, encoding._pat_str, extra_special_tokens=[token])
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=token, eos_token=token,
        model_max_length=cfg["context_length"], chat_template=CHAT_TEMPLATE)
    for part in (config, generation, tokenizer):
        part.save_pretrained(folder)

# --- Token windows --------------------------------------------------------------------------------
def load_encoding(name):
    """A tiktoken.Encoding: "gpt2" (OSError offline), or "bytes", one id per byte and an end."""
    if name != "bytes":
        return tiktoken.get_encoding(name)
    ranks, end = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=end)

def text_pieces(path, size=2**20):
    """Yield a UTF-8 text in pieces of about size characters, cut before the white space at a line's
    end, a border of GPT-2's pattern: the tokens stay the same. ValueError if empty or not UTF-8."""
    piece, offset = "", 0
    with open(path, "rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as problem:
                raise ValueError(f"{path} is not UTF-8 at byte {offset + problem.start}") from None
            piece += text if offset else text.removeprefix("\ufeff")  # the byte order mark
            offset += len(line)
            end = len(piece.rstrip(" \t\r\n")) if len(piece) > size else 0
            if 0 < end < len(piece) and piece[end - 1].strip():
                yield piece[:end]
                piece = piece[end:]
    if not piece:
        raise ValueError(f"{path} is empty")
    yield piece

def write_tokens(paths, encoding, dtype, file):
    """Append the texts to file as ids of a tiktoken.Encoding, with an end token after each text."""
    for path in paths:
        pieces = text_pieces(path)
        while batch := list(itertools.islice(pieces, 64)):
            for ids in encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1):
                file.write(np.array(ids, dtype).tobytes())
        file.write(np.array([encoding.eot_token], dtype).tobytes())

class TokenWindows:
    """Windows of context_length tokens over a memory-mapped array of ids; O(1) memory each.
    Window i is tokens[i * stride :][:context_length]; its targets lie one token further."""
    def __init__(self, tokens, context_length, stride):
        self.tokens, self.context_length, self.stride = tokens, context_length, stride

    def __len__(self):
        return max(0, (len(self.tokens) - self.context_length - 1) // self.stride + 1)

    def batch(self, indices):
        """Returns input_ids and targets, each (len(indices), context_length), int64."""
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self.stride
        rows = self.tokens[starts + np.arange(self.context_length + 1)].astype(np.int64)
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
