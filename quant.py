"""NF4: the frozen weights in 4 bits (QLoRA, arXiv:2305.14314), over bitsandbytes' functional calls.

Third in the reading order. A weight is cut into blocks of 64 consecutive values; each block keeps its largest
magnitude (absmax, fp32), and each value the index of the nearest of 16 levels, which are quantiles of a normal
distribution scaled to [-1, 1]:

    w = code[index] * absmax[block]         4 bits + 32/64 bits = 4.5 bits per weight (4.13 with double quantisation)

Left out: `bitsandbytes.nn.Linear4bit`, which on some CPUs repacks its weight in place in eval mode, 8-bit weights, fp4.

    quant.quantize_linears(model)           # before phi2.load_weights: each weight is quantised as it arrives
"""
import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # weights that share one absmax
PIECE = 2 ** 20  # weights that are quantised at once: bitsandbytes needs some 20 bytes for each meanwhile on a CPU
NESTED_BLOCK = 256  # absmax values that share one scale, under double quantisation


@functools.cache
def functional():
    """bitsandbytes' functional module, imported here and without its remark on an optional CPU kernel."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # It compiles two functions for devices without kernels of their own, and loading the compiler takes four seconds
    compiler, torch.compile = torch.compile, lambda function, **_: function
    import bitsandbytes.functional
    torch.compile = compiler
    return bitsandbytes.functional


class _DequantizedLinear(torch.autograd.Function):
    """x W^T + b that keeps only the packed weight for the backward pass, and unpacks it there once more."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(), None


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight (out_features, in_features) is held in NF4.

    Buffers: `weight` (numel / 2, 1) uint8, two indices to a byte, the first in the high half; `absmax` (numel / 64,)
    fp32. With `double_quant`, absmax is itself uint8 and `nested_absmax` (one for 256) and `offset` restore it.
    Loading a floating-point `weight` through `load_state_dict` quantises it, in the dtype it arrives in; `bias`
    stays as it is, and neither gets a gradient. Inputs must have that dtype too.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, double_quant: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.double_quant = in_features, out_features, double_quant
        self.kept = None  # the dequantised weight, where keep_dequantized has put it
        self.dtype = torch.get_default_dtype()  # of the dequantised weight: that of the weight that was loaded
        numel = in_features * out_features
        blocks = -(-numel // BLOCK)
        self.register_buffer("weight", torch.empty((numel + 1) // 2, 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32))
        self.register_buffer("code", torch.empty(16), persistent=False)
        if double_quant:
            self.register_buffer("nested_absmax", torch.empty(-(-blocks // NESTED_BLOCK)))
            self.register_buffer("nested_code", torch.empty(256), persistent=False)
            self.register_buffer("offset", torch.empty(()))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.is_floating_point():
            if weight.shape != (self.out_features, self.in_features):
                raise ValueError(f"{prefix}weight has shape {tuple(weight.shape)}, not {(self.out_features, self.in_features)}")
            pieces = weight.flatten().split(weight.numel() if self.double_quant else PIECE)
            parts = [functional().quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4", compress_statistics=self.double_quant)
                     for piece in pieces]
            state = parts[0][1]
            self.dtype, self.code = weight.dtype, state.code
            state_dict[prefix + "weight"] = torch.cat([packed for packed, _ in parts])
            state_dict[prefix + "absmax"] = torch.cat([state.absmax for _, state in parts])
            if self.double_quant:
                self.nested_code = state.state2.code
                state_dict |= {prefix + "nested_absmax": state.state2.absmax, prefix + "offset": state.offset}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dequantize(self) -> Tensor:
        """The weight (out_features, in_features) that the codes stand for, in the dtype it was quantised from."""
        if self.kept is not None:
            return self.kept
        bnb, nested = functional(), {}
        if self.double_quant:
            state2 = bnb.QuantState(absmax=self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
            nested = {"offset": self.offset, "state2": state2}
        shape = torch.Size((self.out_features, self.in_features))
        state = bnb.QuantState(absmax=self.absmax, shape=shape, code=self.code, blocksize=BLOCK, quant_type="nf4",
                               dtype=self.dtype, **nested)
        return bnb.dequantize_4bit(self.weight, state)

    def forward(self, x: Tensor) -> Tensor:
        return _DequantizedLinear.apply(x, self) if self.kept is None else F.linear(x, self.kept, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, double_quant={self.double_quant}"


def replace(model: nn.Module, kind: type, make, skip: tuple[str, ...] = ()) -> list[str]:
    """Puts make(module) in the place of every module of exactly this kind, but for names in `skip`; returns the paths."""
    paths = [path for path, module in model.named_modules() if type(module) is kind and path.rpartition(".")[2] not in skip]
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))
    return paths


def quantize_linears(model: nn.Module, skip: tuple[str, ...] = ("lm_head",), double_quant: bool = False) -> list[str]:
    """Replaces every nn.Linear by an NF4Linear, in place; a layer with weights is quantised, an empty one stays empty.

    The head is skipped, as transformers does: it decides between tokens, and there is one of it. Returns the paths.
    """
    def make(linear: nn.Linear) -> NF4Linear:
        with linear.weight.device:
            quantized = NF4Linear(linear.in_features, linear.out_features, linear.bias is not None, double_quant)
        if not linear.weight.is_meta:
            quantized.load_state_dict(linear.state_dict(), strict=False, assign=True)
        return quantized
    return replace(model, nn.Linear, make, skip)


def keep_dequantized(model: nn.Module) -> None:
    """Holds the dequantised weights beside the codes: the same bits without the work, for 16 more bits a weight in bf16."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.kept = module.dequantize()


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replaces every NF4Linear by an nn.Linear with the weights its codes stand for, in place; returns the paths."""
    def make(quantized: NF4Linear) -> nn.Linear:
        with torch.device("meta"):
            linear = nn.Linear(quantized.in_features, quantized.out_features, quantized.bias is not None)
        linear.weight = nn.Parameter(quantized.dequantize().to(dtype), requires_grad=False)
        if quantized.bias is not None:
            linear.bias = nn.Parameter(quantized.bias.to(dtype), requires_grad=False)
        return linear
    return replace(model, NF4Linear, make)
