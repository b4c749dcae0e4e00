"""Initial weights from (seed, published tensor name): the same bits at every sharding and on every machine.

    values = initial_values("lm_head.weight", (131072, 4096), (0, 65536), (0, 4096), seed=28, model=model)
    initialise(gpt_model, run, tp_rank=0, tp_size=2, layer_offset=4)      # fills the parameters in place

Element (row, column) of a tensor with C columns uses word number row * C + column of a Philox 4x64-10 stream
(Salmon et al., SC 2011; numpy keeps this stream stable) whose 128-bit key is the start of
SHA-256("apertus-nemo initialisation 1" NUL seed NUL name), first word at counter 1. The top 53 bits k of the word
give p = (k + 1/2) / 2^53, and p gives a normal deviate by Wichura's PPND7 (Algorithm AS 241, Applied Statistics 37,
1988; relative error about 1e-7, that of the float32 that holds the result).

Bits do not depend on the machine, since only additions, multiplications, divisions and square roots of float64 are
used, each rounded as IEEE 754 says and none contracted (every numpy call does one of them); the logarithm in the
tails is a series of these, since a library's differs between processors.

What is drawn (reference: arXiv 2509.14233 and its training scripts): matrices from N(0, init_method_std), the
output projections (o_proj, down_proj) with the deviation over sqrt(2 * num_layers); norms are ones;
xIELU's raw scalars are the inverse softplus of their configured values. Of adapters, A is uniform within
1 / sqrt(columns), which is PEFT's default, and B is zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from apertus_nemo.errors import ApertusError
from apertus_nemo.model.adapter_layout import adapter_pieces, is_adapter_parameter
from apertus_nemo.model.layout import Piece, Range, pieces
from apertus_nemo.recipe.schema import ModelConfig, RunConfig
from apertus_nemo.record.state import published_name

if TYPE_CHECKING:
    import torch

    Floats = np.ndarray[Any, np.dtype[np.float64]]

_BLOCK = 1 << 14  # elements transformed at a time: the working arrays stay in the second-level cache
_SKIP = 4096  # words of a row that are cheaper to draw and drop than to jump over

# AS 241, PPND7: numerators and denominators, highest power first.
_CENTRE = ((5.9109374720e1, 1.5929113202e2, 5.0434271938e1, 3.3871327179e0),
           (6.7187563600e1, 7.8757757664e1, 1.7895169469e1, 1.0))  # fmt: skip
_TAIL = ((1.7023821103e-1, 1.3067284816e0, 2.7568153900e0, 1.4234372777e0),
         (1.2021132975e-1, 7.3700164250e-1, 1.0))  # fmt: skip
_FAR_TAIL = ((1.7337203997e-2, 4.2868294337e-1, 3.0812263860e0, 6.6579051150e0),
             (1.2258202635e-2, 2.4197894225e-1, 1.0))  # fmt: skip


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(b"\0".join([b"apertus-nemo initialisation 1", str(seed).encode(), name.encode()]))
    return int.from_bytes(digest.digest()[:16], "little")


def _rational(numerator: tuple[float, ...], denominator: tuple[float, ...], x: Floats) -> Floats:
    """Horner's rule for both polynomials, then one division."""
    top = np.full_like(x, numerator[0])
    bottom = np.full_like(x, denominator[0])
    for sums, coefficients in ((top, numerator), (bottom, denominator)):
        for coefficient in coefficients[1:]:
            np.multiply(sums, x, out=sums)
            np.add(sums, coefficient, out=sums)
    return np.divide(top, bottom, out=top)


def _logarithm(x: Floats) -> Floats:
    """Natural logarithm of positive normal numbers to 1e-10, by basic operations only."""
    mantissa, exponent = np.frexp(x)  # exact
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, mantissa * 2.0, mantissa)  # exact
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(x, 1.0 / 15.0)
    for divisor in (13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0):
        series = series * square + 1.0 / divisor  # two roundings: numpy multiplies, then adds
    return 2.0 * s * series + (exponent - small).astype(np.float64) * 0.6931471805599453


def _deviates(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Floats:
    """Standard normal deviates, one a word."""
    # p - 1/2 = (2k + 1 - 2^53) / 2^54, exact in float64: a signed odd integer below 2^53
    odd = ((words >> np.uint64(10)) | np.uint64(1)).view(np.int64)
    odd -= 1 << 53
    q = odd.astype(np.float64)
    q *= 2.0**-54
    distance = q * q
    np.subtract(0.180625, distance, out=distance)
    tail = np.flatnonzero(distance < 0.0)  # |q| > 0.425
    result = _rational(*_CENTRE, distance)
    result *= q
    if tail.size:
        side = q[tail]
        t = np.sqrt(-_logarithm(0.5 - np.abs(side)))  # 0.5 - |q| is exact here
        values = _rational(*_TAIL, t - 1.6)
        far = np.flatnonzero(t > 5.0)
        if far.size:
            values[far] = _rational(*_FAR_TAIL, t[far] - 5.0)
        result[tail] = np.copysign(values, side)
    return result


def _uniform(words: np.ndarray[Any, np.dtype[np.uint64]]) -> Floats:
    """Uniform in (-1, 1), one a word: 2p - 1, exact in float64."""
    odd = ((words >> np.uint64(10)) | np.uint64(1)).view(np.int64)
    odd -= 1 << 53
    return odd.astype(np.float64) * 2.0**-53


def _drawn(
    name: str, columns: int, rows: Range, cols: Range, scale: float, seed: int, transform: Callable[..., Floats]
) -> np.ndarray[Any, Any]:
    """The block of a matrix of independent values, `scale` times what `transform` makes of words; float32."""
    width, count = cols[1] - cols[0], rows[1] - rows[0]
    out = np.empty((count, width), dtype=np.float32)
    if not out.size:
        return out
    stream = np.random.Philox(key=_key(seed, name))
    position = 0  # of the stream, in counters of four words

    def words(start: int, number: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        nonlocal position
        counter, skip = divmod(start, 4)
        stream.advance(counter - position)  # drops what was buffered
        position = counter + -(-(skip + number) // 4)
        return stream.random_raw(skip + number)[skip:]

    if width == columns or columns <= _SKIP:  # whole rows, sliced before they are transformed
        step = max(1, _BLOCK // columns)
        for first in range(0, count, step):
            number = min(step, count - first)
            drawn = words((rows[0] + first) * columns, number * columns).reshape(number, columns)
            block = transform(np.ascontiguousarray(drawn[:, cols[0] : cols[1]]).reshape(-1))
            block *= scale
            out[first : first + number] = block.reshape(number, width)
        return out
    for row in range(count):
        for first in range(0, width, _BLOCK):
            number = min(_BLOCK, width - first)
            block = transform(words((rows[0] + row) * columns + cols[0] + first, number))
            block *= scale
            out[row, first : first + number] = block
    return out


def _bfloat16(x: float) -> float:
    """The nearest bfloat16, ties to even."""
    bits = int(np.float32(x).view(np.uint32))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def xielu_raw(model: ModelConfig, precision: str = "fp32") -> tuple[float, float]:
    """(alpha_p, alpha_n) as they are trained: inverse softplus ln(e^x - 1) of the configured values.

    In bf16 every step is rounded, as the published training did: 0.2109375 and -1.046875 for the published 0.8
    (transformers 4.57 takes expm1 in one step instead and starts from 0.2041015625).
    """

    def inverse_softplus(x: float) -> float:
        if precision == "bf16":
            return _bfloat16(math.log(_bfloat16(_bfloat16(math.exp(_bfloat16(x))) - 1.0)))
        return math.log(math.expm1(x))

    return inverse_softplus(model.xielu_alpha_p_init), inverse_softplus(model.xielu_alpha_n_init - model.xielu_beta)


def initial_values(
    name: str,
    shape: tuple[int, ...],
    rows: Range,
    cols: Range,
    *,
    seed: int,
    model: ModelConfig,
    precision: str = "fp32",
) -> np.ndarray[Any, Any]:
    """Rows and columns of a published tensor's initial values, float32 [rows, cols].

    `shape` is that of the whole tensor, whose size in columns fixes which words of the stream an element uses.
    `precision` ("fp32" or "bf16") matters for xIELU's scalars alone, see `xielu_raw`; what is returned for bf16 is
    to be rounded to bfloat16 by the caller.
    """
    block = (rows[1] - rows[0], cols[1] - cols[0])
    if name.endswith("norm.weight"):
        return np.ones(block, dtype=np.float32)
    if name.endswith((".act_fn.alpha_p", ".act_fn.alpha_n")):
        alpha_p, alpha_n = xielu_raw(model, precision)
        return np.full(block, alpha_p if name.endswith("_p") else alpha_n, dtype=np.float32)
    if name.endswith(".lora_B.weight"):
        return np.zeros(block, dtype=np.float32)
    if name.endswith(".lora_A.weight"):
        return _drawn(name, shape[1], rows, cols, 1.0 / math.sqrt(shape[1]), seed, _uniform)
    if len(shape) != 2:
        raise ApertusError(f"no initialisation is known for {name!r} of shape {shape}")
    std = model.init_method_std
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        std /= math.sqrt(2.0 * model.num_layers)
    return _drawn(name, shape[1], rows, cols, std, seed, _deviates)


def initialise(model_chunk: torch.nn.Module, run: RunConfig, *, tp_rank: int, tp_size: int, layer_offset: int) -> None:
    """Fill every parameter of a Megatron GPTModel (one model chunk, not wrapped) in place.

    `layer_offset` is the global index of the chunk's first layer. Raises ApertusError if a parameter is unknown,
    has another shape than the layout says, or would keep an element that was not set.
    """
    for parameter, tensor in model_chunk.named_parameters():
        _fill(
            tensor,
            parameter,
            pieces(parameter, run.model, tp_rank=tp_rank, tp_size=tp_size, layer_offset=layer_offset),
            run,
        )


def initialise_adapters(
    model_chunk: torch.nn.Module, run: RunConfig, *, tp_rank: int, tp_size: int, layer_offset: int
) -> None:
    """As `initialise`, of the parameters of adapters alone."""
    for parameter, tensor in model_chunk.named_parameters():
        if is_adapter_parameter(parameter):
            blocks = adapter_pieces(
                parameter, run.model, run.adapter.rank, tp_rank=tp_rank, tp_size=tp_size, layer_offset=layer_offset
            )
            _fill(tensor, parameter, blocks, run)


def _fill(tensor: torch.Tensor, parameter: str, blocks: Iterable[Piece], run: RunConfig) -> None:
    import torch

    if tensor.is_meta:  # a dry build has shapes only
        return
    with torch.no_grad():
        matrix = tensor.detach().view(1, -1) if tensor.dim() == 1 else tensor.detach()
        covered = 0
        for piece in blocks:
            values = torch.from_numpy(
                initial_values(
                    published_name(piece.name),
                    piece.shape,
                    piece.rows,
                    piece.cols,
                    seed=run.trainer.seed,
                    model=run.model,
                    precision=run.trainer.precision,
                )
            )
            local = matrix[piece.local_rows[0] : piece.local_rows[1], piece.local_cols[0] : piece.local_cols[1]]
            if local.shape != values.shape:
                raise ApertusError(
                    f"{parameter} is {tuple(tensor.shape)}: no room for {piece.name} at {piece.local_rows}, "
                    f"{piece.local_cols}"
                )
            local.copy_(values)
            covered += values.numel()
        if covered != tensor.numel():
            raise ApertusError(f"{parameter} has {tensor.numel()} elements, and {covered} were initialised")
