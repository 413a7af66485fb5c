"""NF4 in one file: frozen weights in 4 bits, and linear layers over them.

Second in the reading order. The paper is QLoRA, arXiv:2305.14314, section 3.

A weight is cut into blocks of 64 consecutive values. Each block keeps its largest
magnitude (absmax, fp32), and each value keeps the index of the nearest of 16 levels:

    w  =  LEVELS[index] * absmax[block]         4 + 32/64 = 4.5 bits a weight

To use W it is dequantised, multiplied by, and dropped again: 4 bits save memory, not
time.

Weights of a trained network are roughly normal: many are small, few are large. So the
levels are quantiles of the normal distribution, and lie close where weights are many:

    |          |     |    |   |  |   |  |  |  |  |  |   |   |     |         |
   -1                                   0                                   1

One large weight makes the levels of its whole block coarse, which speaks for small
blocks; absmax has to be stored for each, which speaks for large ones. Double
quantisation stores absmax itself in 8 bits, in blocks of 256, which makes it
4 + 8/64 + 32/(64 * 256) = 4.13 bits a weight.

`quantize` and `dequantize` below are NF4 in plain torch, for reading and testing. The
layers do the same with bitsandbytes' kernels, which are faster; a test finds the same
bits. Left out: QLoRA's paged optimiser; 8-bit weights; fp4;
`bitsandbytes.nn.Linear4bit`, which on some CPUs repacks its weight in place in eval
mode.

    quant.quantize_linears(model)           # before phi2.load_weights: weights quantise on arrival
"""

import functools
import json
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Appendix E of the paper. Q(u) is the quantile of the normal distribution: the number below
# which the share u of all numbers lies. Of the 16 levels one is an exact zero, for weights
# that were pruned or padded. The others, scaled to [-1, 1], are
#   7 below it:  -Q(0.5 + i / 7 * (p - 0.5)) / Q(p)  for i = 7 to 1,
#   8 above it:   Q(0.5 + i / 8 * (p - 0.5)) / Q(p)  for i = 1 to 8.
# The outermost share p cannot be 1, because Q(1) is infinite. The paper stops half a step short
# of it: a step is 1/15 of the way from 0 to 1 for one sign and 1/16 for the other, so p is the
# mean of 1 - 1/30 and 1 - 1/32, which is 0.9677.
LEVELS = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one nested_absmax, under double quantisation


# -----------------------------------------------------------------------------
# NF4, written out


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight whose number of values is a multiple of 64.

    Returns the packed indices (numel / 2, 1) uint8 and absmax (numel / 64,) fp32.
    """
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    nonzero = absmax.masked_fill(absmax == 0, 1)  # a block of zeros stays zero
    scaled = blocks / nonzero[:, None]  # now within [-1, 1]

    # The nearest level is found by the borders between levels: there are 15.
    # A value on a border goes to the lower level.
    borders = (LEVELS[1:] + LEVELS[:-1]) / 2
    indices = torch.bucketize(scaled, borders.to(weight.device))

    # Two indices go into a byte, the first into its high half.
    pairs = indices.to(torch.uint8).reshape(-1, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    return packed[:, None], absmax


def dequantize(packed: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns the weight of this shape that the packed indices stand for."""
    two = packed.flatten()  # two indices in each byte
    indices = torch.stack((two >> 4, two & 15), dim=1)  # the first is in the high half
    scaled = LEVELS.to(packed.device)[indices.long()]  # within [-1, 1]
    values = scaled.reshape(-1, BLOCK) * absmax[:, None]
    return values.reshape(shape).to(dtype)


# -----------------------------------------------------------------------------
# The layer


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is held in NF4. To load a weight is to quantise it.

    `load_state_dict(..., assign=True)` takes a floating-point `weight` (out_features,
    in_features), quantises it and forgets it. (Without `assign` it would be copied into
    the buffers, which may be on the meta device.) A weight that bitsandbytes or this
    layer has saved in NF4 is taken over as it is.

    Buffers, with numel = in_features * out_features, all sizes rounded up to whole
    numbers:
        weight: (numel / 2, 1) uint8, two indices to a byte.
        absmax: (numel / 64,) fp32.
    With `double_quant` absmax is quantised too, as a weight is, but to 256 levels in
    blocks of 256, and the buffer holds its indices. The value of absmax is
    levels[index] * nested_absmax[block] + offset, for the levels of `nested_levels`.
        absmax: (numel / 64,) uint8, indices.
        nested_absmax: (numel / 64 / 256,) fp32.
        offset: () fp32.

    dtype: of the dequantised weight, and so of inputs. Loading sets it to the dtype of
        the bias. Without a bias it is that of the floating-point weight; set it by hand
        where indices were loaded.

    Do not call `layer.to(dtype)`, which rounds absmax.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, double_quant: bool = False
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.double_quant = double_quant
        self.dtype = torch.get_default_dtype()  # of the dequantised weight
        # The dequantised weight, once keep_dequantized has put it here. Not persistent:
        # the state_dict is to hold the weight once.
        self.register_buffer("kept", None, persistent=False)

        numel = in_features * out_features
        self.register_buffer("weight", torch.empty((numel + 1) // 2, 1, dtype=torch.uint8))
        blocks = -(-numel // BLOCK)  # rounded up
        absmax_dtype = torch.uint8 if double_quant else torch.float32
        self.register_buffer("absmax", torch.empty(blocks, dtype=absmax_dtype))
        if double_quant:
            nested_blocks = -(-blocks // NESTED_BLOCK)
            self.register_buffer("nested_absmax", torch.empty(nested_blocks, dtype=torch.float32))
            self.register_buffer("offset", torch.empty((), dtype=torch.float32))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            return F.linear(x, self.kept, self.bias)
        return DequantizedLinear.apply(x, self)

    def dequantize(self) -> Tensor:
        """Returns the weight (out_features, in_features), as `dequantize` above restores it."""
        if self.kept is not None:
            return self.kept
        absmax = self.absmax
        if self.double_quant:
            levels = nested_levels(absmax.device)
            # levels[index] * nested_absmax[block], as from_bitsandbytes writes it out
            absmax = kernels().dequantize_blockwise(
                absmax, self.nested_absmax, levels, NESTED_BLOCK, torch.float32
            )
            absmax = absmax + self.offset
        shape = (self.out_features, self.in_features)
        # On a CPU bitsandbytes begins a block with each row, which is right for whole blocks
        # alone. Flat, the weight is one row.
        flat = shape if self.in_features % BLOCK == 0 else (self.out_features * self.in_features,)
        weight = kernels().dequantize_4bit(self.weight, absmax, BLOCK, "nf4", flat, self.dtype)
        return weight.reshape(shape)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Puts the buffers in the place of the weight. load_state_dict calls it for each module.

        The weight may be a floating-point one; this layer's indices; or those of
        bitsandbytes.
        """
        # load_state_dict has given us a copy of its dictionary, so it may be written to.
        key = prefix + "weight"
        weight = state_dict.get(key)
        parts = {}  # what bitsandbytes stores beside a weight in NF4, such as weight.absmax
        for name in list(state_dict):
            if name.startswith(f"{key}."):
                parts[name.removeprefix(f"{key}.")] = state_dict.pop(name)
        buffers = {}
        if parts:  # quantised by bitsandbytes
            if self.double_quant:
                raise ValueError("it is in NF4 already: load it without double quantisation")
            buffers["weight"], buffers["absmax"] = from_bitsandbytes(weight, parts)
        elif weight is not None and weight.is_floating_point():  # not quantised yet
            buffers = self.buffers_of(weight)
            self.dtype = weight.dtype
        state_dict.update({prefix + name: tensor for name, tensor in buffers.items()})
        if weight is not None:
            self.kept = None  # it was dequantised from the previous weight
        # Puts the buffers in place, also those of this layer's own state_dict, and the bias.
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.bias is not None:
            self.dtype = self.bias.dtype

    def buffers_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the buffers that hold a floating-point weight (out_features, in_features)."""
        shape = (self.out_features, self.in_features)
        if weight.shape != shape:
            raise ValueError(f"the weight has shape {tuple(weight.shape)}, not {shape}")
        packed, absmax = quantize_by_kernel(weight)
        if not self.double_quant:
            return {"weight": packed, "absmax": absmax}
        # Half of the nested levels are negative, and absmax never is. Minus its mean it
        # has both signs: of 0.2, 0.3 and 0.7 the offset is 0.4, and -0.2, -0.1 and 0.3
        # are quantised.
        offset = absmax.mean()
        levels = nested_levels(absmax.device)
        indices, nested_absmax = kernels().quantize_blockwise(
            absmax - offset, levels, NESTED_BLOCK
        )
        return {
            "weight": packed,
            "absmax": indices,
            "nested_absmax": nested_absmax,
            "offset": offset,
        }

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, double_quant={self.double_quant}"


class DequantizedLinear(torch.autograd.Function):
    """Computes x W^T + b for x (..., in), tokens as rows, with W in full only while it is used.

    Backward: the gradient of x is g W, for the gradient g (..., out) of the output. It
    needs W, which autograd would store for each layer: in bf16 three and a half times
    what NF4 takes. So W is dequantised a second time instead. W and b are frozen and
    have no gradient; that of W would need x, which is not stored either.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(), None  # None: `layer` is no tensor


# -----------------------------------------------------------------------------
# Whole models


def quantize_linears(
    model: nn.Module, skip: tuple[str, ...] = ("lm_head",), double_quant: bool = False
) -> list[str]:
    """Replaces every nn.Linear by an NF4Linear, in place. Returns their paths.

    A layer with weights is quantised; an empty one (on the meta device) stays empty
    until its weight is loaded. The head is skipped, as transformers does: its errors
    would go into the logits directly. (For phi-2 that costs 0.19 GB: 51,200 * 2,560
    weights of 16 bits instead of 4.5.) To be called before lora.inject, whose A and B
    are linear layers too.
    """

    def make(linear: nn.Linear) -> NF4Linear:
        has_bias = linear.bias is not None
        with linear.weight.device:  # where the new buffers are made
            layer = NF4Linear(linear.in_features, linear.out_features, has_bias, double_quant)
        layer.train(linear.training)
        if not linear.weight.is_meta:
            layer.load_state_dict(linear.state_dict(), assign=True)
        return layer

    return replace(model, nn.Linear, make, skip)


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replaces every NF4Linear by an nn.Linear with the weights that its indices stand for."""

    def make(layer: NF4Linear) -> nn.Linear:
        has_bias = layer.bias is not None
        linear = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
        linear.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
        if has_bias:
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        linear.train(layer.training)
        return linear

    return replace(model, NF4Linear, make)


def keep_dequantized(model: nn.Module) -> None:
    """Stores the dequantised weights beside the indices.

    The results are the same to the bit and faster, for 16 more bits a weight in bf16.
    """
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.kept = module.dequantize()


def dequantized_size(model: nn.Module) -> int:
    """Returns how many bytes `keep_dequantized` takes."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return sum(layer.in_features * layer.out_features * layer.dtype.itemsize for layer in layers)


def replace(
    model: nn.Module,
    kind: type[nn.Module],
    make: Callable[[nn.Module], nn.Module],
    skip: tuple[str, ...] = (),
) -> list[str]:
    """Puts make(module) in the place of each module of exactly this kind. Returns their paths.

    Modules that `skip` names stay, with all that is in them. A name may be a path or any
    part of one between dots (where a target of lora.py is the end of one).
    """
    paths = []
    for path, module in model.named_modules():
        is_skipped = any(f".{name}." in f".{path}." for name in skip)
        if type(module) is kind and not is_skipped:
            paths.append(path)
    for path in paths:
        model.set_submodule(path, make(model.get_submodule(path)))
    return paths


# -----------------------------------------------------------------------------
# bitsandbytes: its kernels, and the files that it writes


@functools.cache
def kernels():
    """Returns bitsandbytes' operators. They are imported at their first use: that takes seconds."""
    # bitsandbytes remarks on an optional kernel that is not installed, at each start.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401  (registers the operators)

    return torch.ops.bitsandbytes


@functools.cache
def nested_levels(device: torch.device) -> Tensor:
    """Returns the 256 levels (fp32, from -1 to 1) of double quantisation.

    bitsandbytes calls them its dynamic map. Of each sign 64 lie between 0.1 and 1, 32
    between 0.01 and 0.1, and so on, so that small numbers keep a digit too.
    """
    kernels()  # first, because it silences a remark of the import
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def from_bitsandbytes(weight: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns packed indices and absmax of a weight that bitsandbytes has quantised and saved.

    `parts` are the tensors beside it in the file, by what follows "weight." in their
    names. Raises ValueError, LookupError, TypeError or RuntimeError where they do not
    fit together.
    """
    state = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist()))
    if state["blocksize"] != BLOCK:
        raise ValueError(f"its NF4 has blocks of {state['blocksize']} weights, not of {BLOCK}")
    absmax = parts["absmax"]
    if "nested_offset" in state:  # double quantisation: absmax is in 8 bits
        levels = parts["nested_quant_map"][absmax.long()]
        nested_absmax = parts["nested_absmax"].float()
        of_each = nested_absmax.repeat_interleave(state["nested_blocksize"])[: len(levels)]
        absmax = levels * of_each + state["nested_offset"]
    if not absmax.isfinite().all():
        raise ValueError("its absmax holds numbers that are not finite")
    # Some uploads store the packed indices under another dtype, with the same bits.
    return weight.view(torch.uint8).reshape(-1, 1), absmax.float()


PIECE = 2**20  # weights quantised at once on a CPU, where bitsandbytes needs 20 bytes for each


def quantize_by_kernel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `quantize` returns, of a weight of any size."""
    size = PIECE if weight.device.type == "cpu" else weight.numel()
    pieces = [
        kernels().quantize_4bit(piece, BLOCK, "nf4", torch.uint8)
        for piece in weight.flatten().split(size)  # blocks never cross pieces
    ]
    packed = torch.cat([indices for indices, _ in pieces])
    return packed, torch.cat([absmax for _, absmax in pieces])
