"""NF4 in one file: frozen weights in 4 bits, and linear layers over them.

Second in the reading order. The paper is QLoRA, arXiv:2305.14314, section 3.

A weight matrix is cut into blocks of 64 consecutive values. Each block stores its largest
magnitude (absmax, fp32), and each value stores the index of the nearest of 16 levels:

    w  =  LEVELS[index] * absmax[block]         4 + 32/64 = 4.5 bits per value

Each time a layer needs W, it dequantises W, multiplies by it, and discards it: 4 bits
save memory, not time. (Where a GPU has memory to spare, train.py and eval.py keep the
dequantised W by default, which saves time: see `keep_dequantized`.)

The values of a trained weight are roughly normally distributed: many are small, few are
large. So the levels are quantiles of the normal distribution, close together near zero:

    |          |     |    |   |  |   |  |  |  |  |  |   |   |     |         |
   -1                                   0                                   1

One large value makes the levels of its whole block coarse, which favours small blocks;
but each block stores an absmax, which favours large ones. Double quantisation stores
absmax itself in 8 bits, in blocks of 256, for a total of 4 + 8/64 + 32/(64 * 256) = 4.13
bits per value.

`quantize` and `dequantize` below are NF4 in plain torch, for reading and testing. The
layers use the routines (kernels) of the library bitsandbytes, which are faster; a test
shows that on a CPU they return the same bits. Left out: QLoRA's paged optimiser; 8-bit
weights; fp4; and `bitsandbytes.nn.Linear4bit`, which on some CPUs repacks its weight in
place in eval mode.

    quant.quantize_linears(model)  # before phi2.load_weights, which then quantises the weights
"""

import functools
import json
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# From appendix E of the paper. Q(u) is the quantile function of the normal distribution: a share u
# of all values is below Q(u). One of the 16 levels is exactly zero, so that pruned or padded
# weights stay zero. The others, scaled to [-1, 1], are
#   7 below it:  -Q(0.5 + i / 7 * (p - 0.5)) / Q(p)  for i = 7 to 1,
#   8 above it:   Q(0.5 + i / 8 * (p - 0.5)) / Q(p)  for i = 1 to 8.
# The outermost share p cannot be 1, because Q(1) is infinite. The paper takes the mean of 1 - 1/30
# and 1 - 1/32, which is 0.9677.
LEVELS = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
BLOCK = 64  # values of a weight that share one absmax
NESTED_BLOCK = 256  # absmax values that share one nested_absmax, under double quantisation


# -----------------------------------------------------------------------------
# NF4, written out


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises a weight of any shape whose number of values, numel, is a multiple of 64.

    Returns the packed indices (numel / 2, 1) uint8, in the shape that bitsandbytes uses, and
    absmax (numel / 64,) fp32.
    """
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    nonzero = absmax.masked_fill(absmax == 0, 1)  # a block of zeros stays zero
    scaled = blocks / nonzero[:, None]  # now within [-1, 1]

    # The 15 borders, halfway between levels, decide which level is nearest. A value on a
    # border goes to the lower level.
    borders = (LEVELS[1:] + LEVELS[:-1]) / 2
    indices = torch.bucketize(scaled, borders.to(weight.device))

    # Two indices share a byte; the first one is in its high half.
    pairs = indices.to(torch.uint8).reshape(-1, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    return packed[:, None], absmax


def dequantize(packed: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns the weight, of this shape and dtype, that packed indices and absmax represent."""
    two = packed.flatten()  # two indices in each byte
    indices = torch.stack((two >> 4, two & 15), dim=1)  # the first is in the high half
    scaled = LEVELS.to(packed.device)[indices.long()]  # within [-1, 1]
    values = scaled.reshape(-1, BLOCK) * absmax[:, None]
    return values.reshape(shape).to(dtype)


# -----------------------------------------------------------------------------
# The layer


class NF4Linear(nn.Module):
    """A frozen linear layer that stores its weight in NF4. Loading a weight quantises it.

    `load_state_dict(..., assign=True)` takes a floating-point `weight` (out_features,
    in_features), quantises it and discards the original. (Without `assign`, the result
    would be copied into the existing buffers, which may be on the meta device.) A weight
    that bitsandbytes or this layer has saved in NF4 is used as it is (a double-quantised
    absmax of bitsandbytes is restored to fp32).

    Buffers, with numel = in_features * out_features and all sizes rounded up:
        weight: (numel / 2, 1) uint8, two indices per byte.
        absmax: (numel / 64,) fp32.
    With `double_quant`, absmax is quantised too, after its mean (offset) is subtracted: to
    256 levels (`nested_levels`) and in blocks of 256, in the same way as a weight. The buffer
    then holds indices, and the value of absmax is levels[index] * nested_absmax[block] + offset.
        absmax: (numel / 64,) uint8, indices.
        nested_absmax: (numel / 64 / 256,) fp32.
        offset: () fp32.

    dtype: the dtype of the dequantised weight, and so of inputs. Loading sets it to the
        dtype of the bias or, without a bias, of the floating-point weight. If indices are
        loaded and there is no bias, set it by hand.

    Do not call `layer.to(dtype)`: it would round absmax.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, double_quant: bool = False
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.double_quant = double_quant
        self.dtype = torch.get_default_dtype()  # of the dequantised weight
        # The dequantised weight, if keep_dequantized has stored it. Not persistent, so
        # that the state_dict contains the weight only once.
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
        """Returns the dequantised weight (out_features, in_features), in the layer's dtype."""
        if self.kept is not None:
            return self.kept
        absmax = self.absmax
        if self.double_quant:
            levels = nested_levels(absmax.device)
            # levels[index] * nested_absmax[block], as from_bitsandbytes computes it
            # in plain torch
            absmax = kernels().dequantize_blockwise(
                absmax, self.nested_absmax, levels, NESTED_BLOCK, torch.float32
            )
            absmax = absmax + self.offset
        shape = (self.out_features, self.in_features)
        # On a CPU bitsandbytes starts a new block with each row, which is only
        # right if a row is a whole number of blocks. Otherwise the weight is passed
        # as one long row.
        numel = self.out_features * self.in_features
        shape_for_kernel = shape if self.in_features % BLOCK == 0 else (numel,)
        weight = kernels().dequantize_4bit(
            self.weight, absmax, BLOCK, "nf4", shape_for_kernel, self.dtype
        )
        return weight.reshape(shape)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Loads a weight into the buffers. load_state_dict calls this method for each module.

        The weight comes in one of three forms: in floating point; in NF4 from bitsandbytes,
        with more tensors, such as weight.absmax; or as the buffers that the state_dict of
        such a layer contains.
        """
        # load_state_dict passes a copy of its dictionary, so the copy may be changed.
        key = prefix + "weight"
        weight = state_dict.get(key)  # None if it is missing, which super() reports below
        parts = {}  # what bitsandbytes stores beside an NF4 weight
        for name in list(state_dict):
            if name.startswith(f"{key}."):
                parts[name.removeprefix(f"{key}.")] = state_dict.pop(name)

        buffers = {}  # stays empty in the third form, where nothing needs converting
        if parts:
            if self.double_quant:
                raise ValueError("it is in NF4 already: load it without double quantisation")
            buffers["weight"], buffers["absmax"] = from_bitsandbytes(weight, parts)
        elif weight is not None and weight.is_floating_point():
            buffers = self.buffers_of(weight)
            self.dtype = weight.dtype
        state_dict.update({prefix + name: tensor for name, tensor in buffers.items()})
        if weight is not None:
            self.kept = None  # dequantised from the previous weight
        super()._load_from_state_dict(state_dict, prefix, *args)  # loads buffers and bias
        if self.bias is not None:
            self.dtype = self.bias.dtype

    def buffers_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the buffers for a floating-point weight (out_features, in_features)."""
        shape = (self.out_features, self.in_features)
        if weight.shape != shape:
            raise ValueError(f"the weight has shape {tuple(weight.shape)}, not {shape}")
        packed, absmax = quantize_by_kernel(weight)
        if not self.double_quant:
            return {"weight": packed, "absmax": absmax}
        # Half of the nested levels are negative, but absmax never is. Subtracting the
        # mean gives it both signs: for 0.2, 0.3 and 0.7 the offset is 0.4, and the
        # values to quantise are -0.2, -0.1 and 0.3.
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
    """Computes x W^T + b for x (..., in), with tokens as rows. W exists in full only while used.

    In the backward pass the gradient of x, which the adapters of earlier layers need, is
    g W, where g (..., out) is the gradient of the output. autograd would store W for this,
    for every layer; in bf16 that takes three and a half times the memory of NF4. So W is
    dequantised a second time instead. W and b are frozen and get no gradient. Only the
    gradient of W would need x, so x is not stored here. (An adapter stores what A needs.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize(), None  # None: `layer` is not a tensor


# -----------------------------------------------------------------------------
# Whole models


def quantize_linears(
    model: nn.Module, skip: tuple[str, ...] = ("lm_head",), double_quant: bool = False
) -> list[str]:
    """Replaces every nn.Linear with an NF4Linear, in place. Returns their paths.

    A layer that has weights is quantised; an empty one (on the meta device) stays empty
    until its weight is loaded. The output head, lm_head, is skipped by default, as in
    transformers, because its errors would go straight into the logits. (For phi-2 this
    costs 0.19 GB: 51,200 * 2,560 values of 16 bits instead of 4.5.) Call this function
    before lora.inject, whose A and B are linear layers too.
    """

    def make(linear: nn.Linear) -> NF4Linear:
        has_bias = linear.bias is not None
        with linear.weight.device:  # the device of the new buffers
            layer = NF4Linear(linear.in_features, linear.out_features, has_bias, double_quant)
        layer.train(linear.training)
        if not linear.weight.is_meta:
            layer.load_state_dict(linear.state_dict(), assign=True)
        return layer

    return replace(model, nn.Linear, make, skip)


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replaces every NF4Linear with an nn.Linear of its dequantised weight. Returns their paths."""

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

    The results are bit-identical and come faster, at the cost of 16 more bits per value in bf16.
    """
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.kept = module.dequantize()


def dequantized_size(model: nn.Module) -> int:
    """Returns how many bytes of memory `keep_dequantized` takes."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return sum(layer.in_features * layer.out_features * layer.dtype.itemsize for layer in layers)


def replace(
    model: nn.Module,
    kind: type[nn.Module],
    make: Callable[[nn.Module], nn.Module],
    skip: tuple[str, ...] = (),
) -> list[str]:
    """Replaces each module of exactly this class with make(module). Returns their paths.

    Modules that `skip` names are left alone, with everything inside them. A name may be a
    whole path or any part of one between dots (a target in lora.py must be the end of one).
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
# bitsandbytes: its kernels, and its file format


@functools.cache
def kernels():
    """Returns bitsandbytes' operators. The first call imports them, which takes seconds."""
    # On each import bitsandbytes would warn about an optional kernel that is
    # not installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401  (registers the operators)

    return torch.ops.bitsandbytes


@functools.cache
def nested_levels(device: torch.device) -> Tensor:
    """Returns the 256 levels (fp32, from -0.993 to 1) of double quantisation.

    bitsandbytes calls them its dynamic map. For each sign, 64 levels are between 0.1 and
    1, 32 between 0.01 and 0.1, and so on, so that small numbers keep some precision too.
    """
    kernels()  # first, because it silences a warning on import
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def from_bitsandbytes(weight: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns packed indices and absmax of a weight that bitsandbytes has quantised and saved.

    `parts` are the tensors stored with the weight; the keys are what follows "weight."
    in their names. Raises ValueError, LookupError, TypeError or RuntimeError if they do
    not fit together.
    """
    state = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist()))
    if state["blocksize"] != BLOCK:
        raise ValueError(f"its NF4 has blocks of {state['blocksize']} values, not of {BLOCK}")
    absmax = parts["absmax"]
    if "nested_offset" in state:  # double quantisation: absmax holds 8-bit indices
        level_of_each = parts["nested_quant_map"][absmax.long()]
        nested_absmax = parts["nested_absmax"].float()
        of_each = nested_absmax.repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = level_of_each * of_each + state["nested_offset"]
    if not absmax.isfinite().all():
        raise ValueError("its absmax holds numbers that are not finite")
    # Some uploads store the packed indices as another dtype, with the same bits.
    return weight.view(torch.uint8).reshape(-1, 1), absmax.float()


PIECE = 2**20  # values quantised at once on a CPU, where bitsandbytes needs 20 bytes for each


def quantize_by_kernel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `quantize` returns, for a weight of any size."""
    size = PIECE if weight.device.type == "cpu" else weight.numel()
    pieces = [
        kernels().quantize_4bit(piece, BLOCK, "nf4", torch.uint8)
        for piece in weight.flatten().split(size)  # blocks never cross pieces
    ]
    packed = torch.cat([indices for indices, _ in pieces])
    return packed, torch.cat([absmax for _, absmax in pieces])
