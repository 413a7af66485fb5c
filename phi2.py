"""phi-2 in one file: the model, its KV cache, and loading.

Second in the reading order, after lora.py. The module names are those of transformers' `PhiForCausalLM`
(models/phi/modeling_phi.py), so `state_dict()` is the checkpoint on the Hub, key for key. phi-1 and phi-1.5
differ only in config.json. Left out: long-context rotary scaling, grouped-query attention (no phi has it).

    model = phi2.build("microsoft/phi-2")               # or a directory; empty, on the meta device
    phi2.load_weights(model, "microsoft/phi-2", "cuda", torch.bfloat16)
"""
from dataclasses import dataclass, fields
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint

NOWHERE = 2 ** 30  # the position of padding: after every query, so that no query sees it


@dataclass
class Phi2Config:
    """The fields of config.json that matter, under Hugging Face's names; the defaults are phi-2's."""
    vocab_size: int = 51200
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    partial_rotary_factor: float = 0.4  # the part of each head's dimensions that is rotated
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    resid_pdrop: float = 0.1  # dropout on both branches of a block, in train mode


# The names in the first upload of phi-2, model type "phi-msft".
MSFT_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_inner": "intermediate_size",
              "layer_norm_epsilon": "layer_norm_eps"}
# Options of config.json that would change the result and are not implemented: the only value accepted.
FIXED = {"hidden_act": "gelu_new", "activation_function": "gelu_new", "qk_layernorm": False, "embd_pdrop": 0.0,
         "attention_dropout": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False, "rope_scaling": None, "rope_type": "default"}


def read_config(directory: Path) -> Phi2Config:
    """config.json of a model directory. Raises ValueError for an architecture that is not a phi, and for numbers that cannot be."""
    path = Path(directory) / "config.json"
    raw = checkpoint.read_json(path)
    if raw.get("model_type") not in ("phi", "phi-msft"):
        raise ValueError(f"{path}: model_type {raw.get('model_type')!r} is not supported, only 'phi' (phi-1, phi-1.5, phi-2)")
    raw |= {ours: raw[theirs] for theirs, ours in MSFT_NAMES.items() if raw.get(theirs) is not None}
    raw |= raw["rope_parameters"] if isinstance(raw.get("rope_parameters"), dict) else {}
    for name, kind in [(field.name, type(field.default)) for field in fields(Phi2Config)] + [("rotary_dim", int)]:
        low, high = (0, 1e12) if kind is float else (1, 1024 if name.startswith("num_") else 2 ** 20)  # nothing huge is ever made
        value = raw.get(name, low)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (kind, int)) or not low <= value <= high):
            raise ValueError(f"{path}: {name} = {value!r} cannot be")
    needed = [field.name for field in fields(Phi2Config)[:5]]
    if raw["model_type"] == "phi-msft":
        needed = [name for name in needed if name != "intermediate_size"] + ["rotary_dim"]
    if missing := [name for name in needed if raw.get(name) is None]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if raw["model_type"] == "phi-msft":
        raw["intermediate_size"] = raw.get("intermediate_size") or 4 * raw["hidden_size"]
        raw["partial_rotary_factor"] = raw["rotary_dim"] * raw["num_attention_heads"] / raw["hidden_size"]
    for key, value in (FIXED | {"num_key_value_heads": raw["num_attention_heads"]}).items():
        if raw.get(key, value) not in (value, None):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported, only {value!r}")
    config = Phi2Config(**{field.name: raw[field.name] for field in fields(Phi2Config) if raw.get(field.name) is not None})
    head, rest = divmod(config.hidden_size, config.num_attention_heads)
    if rest:
        raise ValueError(f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}")
    if (rotated := int(head * config.partial_rotary_factor)) % 2 or rotated > head or config.resid_pdrop >= 1:
        raise ValueError(f"{path}: {rotated} of {head} dimensions rotated, or a dropout of {config.resid_pdrop}, cannot be")
    return config


# ---- The model. Shapes: B rows, T tokens of this call, S tokens with those in the cache, H heads of D dimensions

@dataclass
class KVCache:
    """What attention remembers: `positions` (B, S) and, for every layer, segments of keys and values (B or 1, H, S', D).

    Each call of the model returns a longer one and leaves this as it is, autograd graph included: so the cache of a
    common prefix (B = 1) can stand before any number of batches, which share its segment, and gradients reach the prefix.
    """
    positions: Tensor
    layers: list[list[tuple[Tensor, Tensor]]]

    def select(self, rows: Tensor) -> "KVCache":
        """The cache of some rows only, `rows` holding their indices; a segment that all rows share stays one."""
        pick = [[(k, v) if len(k) < len(self.positions) else (k[rows], v[rows]) for k, v in layer] for layer in self.layers]
        return KVCache(self.positions[rows], pick)


def rotary_tables(config: Phi2Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, half of the rotated dimensions) of RoPE (arXiv:2104.09864), computed in fp32."""
    rotated = int(config.hidden_size // config.num_attention_heads * config.partial_rotary_factor)
    exponents = torch.arange(0, rotated, 2, device=positions.device).float() / rotated
    angles = positions[:, None, :, None].float() * config.rope_theta ** -exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first dimensions of x (B, H, T, D), pairing i with i + half; the rest pass through."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin), rest), dim=-1)


def attend(q: Tensor, segments: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, (B, H, T, D), over keys and values in segments of B rows, or of one for all rows.

    mask (B or 1, 1, T, S) is 0 or -inf; None on a GPU means causal. On a CPU it is written out, scores in fp32: torch's fused
    kernel is slower there in bf16, most of all backward, and a shared segment need not be copied for each row.
    """
    if q.is_cuda and q.shape[2]:
        k, v = (torch.cat([part.expand(len(q), -1, -1, -1) for part in parts], dim=2) for parts in zip(*segments))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    def product(x, y):  # (B, H, T, a) by (B or 1, H, a, b)
        return torch.einsum("bhta,hac->bhtc", x, y[0]) if len(y) < len(x) else x @ y
    queries = q.float() * q.shape[-1] ** -0.5
    scores = torch.cat([product(queries, k.float().transpose(-1, -2)) for k, _ in segments], dim=-1).add_(mask)
    weights = scores.softmax(dim=-1).to(q.dtype).split([k.shape[2] for k, _ in segments], dim=-1)
    return reduce(torch.add, (product(weight, v) for weight, (_, v) in zip(weights, segments)))


class Attention(nn.Module):
    def __init__(self, config: Phi2Config):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.dense = (nn.Linear(width, width) for _ in range(4))

    def forward(self, h, cos, sin, mask, past, at, rows):
        inputs = ((self.q_proj, h if at is None else h[at]), (self.k_proj, h), (self.v_proj, h))
        q, k, v = (proj(x).view(rows, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2) for proj, x in inputs)
        if at is None:
            q, k = rotate(torch.cat((q, k), dim=1), cos, sin).chunk(2, dim=1)
        else:
            k = rotate(k, cos, sin)
            cos, sin, mask = (t.expand(rows, -1, -1, -1).flatten(0, 2)[at].unflatten(0, (rows, 1, -1)) for t in (cos, sin, mask))
            q = rotate(q, cos, sin)
        if past and len(past[-1][0]) == rows:  # a segment of one row serves all rows, and stays apart
            k, v = (torch.cat(parts, dim=2) for parts in zip(past[-1], (k, v)))
            past = past[:-1]
        segments = [*past, (k, v)]
        return self.dense(attend(q, segments, mask).transpose(1, 2).reshape(-1, h.shape[-1])), segments


class MLP(nn.Module):
    def __init__(self, config: Phi2Config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """phi's parallel block: attention and MLP read the same LayerNorm, and both are added to x, (B T, width)."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cos, sin, mask, past, at, rows):
        h = self.input_layernorm(x)
        attended, present = self.self_attn(h, cos, sin, mask, past, at, rows)
        if at is not None:
            x, h = x[at], h[at]
        # transformers adds in this order, which matters to the last bit of bf16
        return self.resid_dropout(attended) + self.resid_dropout(self.mlp(h)) + x, present


class Trunk(nn.Module):
    """Everything but the head; `model.` in the checkpoint's keys."""

    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # keep a block's input alone for the backward pass, and compute the rest there again
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
                columns: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Hidden states (B, T, width) of ids (B, T), and the cache with these tokens added.

        `positions` (B, T), if not simply the next ones; a token sees itself and what stands at positions before its own.
        Only the states at `columns` (B, A), if given: the last block then computes just keys and values elsewhere.
        """
        causal = ids.is_cuda and cache is positions is columns is None  # the fused kernels need no mask for that
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None] + (cache.positions.shape[1] if cache else 0)
        x, keys, mask = self.embed_tokens(ids.flatten()), positions, None
        cos, sin = rotary_tables(self.config, positions, x.dtype)
        if cache is not None:
            keys = torch.cat([known.expand(len(ids), -1) for known in (cache.positions, positions)], dim=1)
        if not causal:
            places = torch.arange(keys.shape[1], device=ids.device)
            hidden = (keys[:, None, None, :] >= positions[:, None, :, None]) & (places != places[-ids.shape[1]:, None])
            mask = torch.zeros_like(hidden, dtype=x.dtype if x.is_cuda else torch.float32).masked_fill(hidden, float("-inf"))
        layers, at, rows = [], None, len(ids)
        if columns is not None:
            at = (torch.arange(rows, device=ids.device)[:, None] * ids.shape[1] + columns).flatten()
        for block, past in zip(self.layers, cache.layers if cache is not None else [[]] * len(self.layers)):
            run = partial(recompute, block, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block
            x, present = run(x, cos, sin, mask, past, at if block is self.layers[-1] else None, rows)
            layers.append(present)
        return self.final_layernorm(x).unflatten(0, (rows, -1)), KVCache(keys.expand(rows, -1), layers)


class Phi2(nn.Module):
    def __init__(self, config: Phi2Config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, ids: Tensor, cache: KVCache | None = None, columns: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab) of ids (B, T), or (B, A, vocab) at `columns` (B, A) alone, which saves most of their memory.

        Padding stands on the right, where the causal mask hides it.
        """
        return self.lm_head(self.model(ids, cache, columns=columns)[0])

    def prefill(self, prefix: list[int]) -> KVCache:
        """The cache of a prefix that all rows share (one row, with its graph where gradients are on)."""
        return self.model(torch.tensor([prefix], device=self.lm_head.weight.device))[1]


# ---- Loading

def build(name: str) -> Phi2:
    """The model of `name` (a directory or a Hub id) without its weights, on the meta device."""
    with torch.device("meta"):
        return Phi2(read_config(checkpoint.locate(name)))


def load_weights(model: Phi2, name: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Phi2:
    """Streams a checkpoint into `model`, tensor by tensor, as `dtype` on `device`.

    Each goes to its module's own `load_state_dict`, where a quantised layer quantises: the peak is the model plus one
    tensor. Raises ValueError for missing, unknown or misshapen tensors; `model` is then unusable. `model.fingerprint` is
    then a digest of samples of all tensors, which tells these weights from others.
    """
    from tqdm import tqdm
    directory = checkpoint.locate(name)
    with torch.device("meta"):
        expected = {key: tensor.shape for key, tensor in Phi2(model.config).state_dict().items()}
    missing, total, samples = dict(expected), len(expected), {}
    tensors = checkpoint.model_tensors(directory)
    for key, tensor in tqdm(tensors, desc="loading", total=total, unit="tensor", leave=False, delay=2, disable=None):
        if key not in expected:
            raise ValueError(f"{directory}: unknown tensor {key}; a phi of {model.config.num_hidden_layers} layers has none of that name")
        if tensor.shape != expected[key]:
            raise ValueError(f"{directory}: {key} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected[key])}")
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        if not tensor.is_floating_point() or not all(end.isfinite() for end in tensor.aminmax()):  # which makes no copy
            raise ValueError(f"{directory}: {key} holds {tensor.dtype}, or numbers that are not finite: download it again")
        path, _, leaf = key.rpartition(".")
        samples[key] = checkpoint.sample(tensor)
        model.get_submodule(path).load_state_dict({leaf: tensor}, strict=False, assign=True)
        missing.pop(key, None)
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} of {len(expected)} tensors, among them {next(iter(missing))}")
    model.fingerprint = checkpoint.digest(b"".join(key.encode() + samples[key] for key in sorted(samples)))
    return model
