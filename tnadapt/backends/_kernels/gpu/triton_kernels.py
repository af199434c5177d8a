"""Triton kernels: random draws, the Hadamard transform of a tile, and the passes of F, which draw their numbers.

No draws are stored, unless ``KEPT``: then the normal numbers, in the order of the permutation, are read from ``gain``.

The adjoint sums in a fixed order (no atomics), so that two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# -- Random draws, with the bits of tnadapt.algebra.rng ----------------------------------------------------------------

# Integers are exact, and every float64 operation is rounded separately. A kernel that calls :func:`normal_of` must be
# launched with ``enable_fp_fusion=False``: a fused multiply-add rounds once instead of twice, which changes the last
# bits.


if not hasattr(tl, "map_elementwise"):
    # Older versions also exchange a tile's points through shared memory in almost every stage of a transform.
    raise ImportError(f"Triton {triton.__version__} is too old: 3.5 is needed, which comes with torch 2.9")


@triton.jit
def philox(block, purpose, group, seed):
    """Compute Philox4x32-10 of the counters ``(lo32(block), hi32(block), purpose, group)``: four uint32 like block."""
    block = block.to(tl.uint64)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + tl.cast(purpose, tl.uint32)
    c3 = tl.zeros_like(c0) + tl.cast(group, tl.uint32)
    seed = seed.to(tl.uint64)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def word(index, purpose, group, seed):
    """Draw words of a stream at any positions; each computes a whole block."""
    w0, w1, w2, w3 = philox(index >> 2, purpose, group, seed)
    lane = index & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def _horner(x, c0: tl.constexpr, c1: tl.constexpr, c2: tl.constexpr, c3: tl.constexpr,
            c4: tl.constexpr, c5: tl.constexpr, c6: tl.constexpr, c7: tl.constexpr):  # fmt: skip
    return ((((((c0 * x + c1) * x + c2) * x + c3) * x + c4) * x + c5) * x + c6) * x + c7


@triton.jit
def _log(x):
    """Compute the natural logarithm of normal float64 numbers by the series of :mod:`tnadapt.algebra.rng`."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1022
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    # Compare a difference with 0: Triton before 3.8 rounds a constant operand of a comparison to single precision.
    low = mantissa - 0.7071067811865476 < 0.0
    mantissa = tl.where(low, mantissa * 2.0, mantissa)
    power = (exponent - low.to(tl.int64)).to(tl.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = _horner(square, 1 / 25, 1 / 23, 1 / 21, 1 / 19, 1 / 17, 1 / 15, 1 / 13, 1 / 11)
    series = ((((series * square + 1 / 9) * square + 1 / 7) * square + 1 / 5) * square + 1 / 3) * square + 1.0
    return power * 0.6931471805599453 + 2.0 * s * series


@triton.jit
def normal_of(word):
    """Compute standard normal numbers, float32, from words: AS 241 in float64, rounded once at the end."""
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    q = u - 0.5
    r = 0.180625 - q * q
    centre = q * _horner(
        r, 2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
        1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0,
    ) / _horner(
        r, 5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
        5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0,
    )  # fmt: skip
    r = tl.sqrt(-_log(tl.where(q < 0.0, u, 1.0 - u))) - 1.6
    tail = _horner(
        r, 7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
        3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0,
    ) / _horner(
        r, 1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
        6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0,
    )  # fmt: skip
    tail = tl.where(q < 0.0, -tail, tail)
    return tl.where(tl.abs(q) - 0.425 > 0.0, tail, centre).to(tl.float32)


# A normal number takes about a hundred operations. ``map_elementwise`` does them one number after another; otherwise
# Triton would do each operation for all numbers of a thread, whose intermediate results would not fit into registers.
# The interpreter does not support it.
_MAPPED = tl.constexpr(isinstance(normal_of, triton.JITFunction))


@triton.jit
def _normal(index, purpose, group, seed):
    return normal_of(word(index, purpose, group, seed))


@triton.jit
def normal(index, purpose, group, seed):
    """Draw elements of a normal vector at any positions."""
    if _MAPPED:
        normals = tl.map_elementwise(_normal, index, tl.full((), purpose, tl.int32), group, seed)
    else:
        normals = _normal(index, purpose, group, seed)
    return normals


@triton.jit
def normal_row(first, COLUMNS: tl.constexpr, purpose, group, seed):
    """Draw normal elements ``first[i]`` to ``first[i] + COLUMNS - 1``, (rows, COLUMNS): one Philox block per four.

    COLUMNS is a power of two, and each first position a multiple of it.
    """
    ROWS: tl.constexpr = first.shape[0]
    if COLUMNS < 4:
        normals = normal(first[:, None] + tl.arange(0, COLUMNS)[None, :], purpose, group, seed)
    else:
        block = (first >> 2)[:, None] + tl.arange(0, COLUMNS // 4)[None, :]
        w0, w1, w2, w3 = philox(block, purpose, group, seed)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, COLUMNS))
        normals = tl.map_elementwise(normal_of, words) if _MAPPED else normal_of(words)
    return normals


@triton.jit
def sign_row(first, COLUMNS: tl.constexpr, group, seed):
    """Draw signs ``first[i]`` to ``first[i] + COLUMNS - 1`` as uint32, 1 for -1: one Philox block per row.

    COLUMNS is a power of two up to 128, and each first position a multiple of it.
    """
    w0, w1, w2, w3 = philox(first >> 7, 3, group, seed)
    bit = (first & 127).to(tl.uint32)
    column = tl.arange(0, COLUMNS).to(tl.uint32)[None, :]
    if COLUMNS <= 32:
        # A row needs a single word: select it before broadcasting over the columns.
        low = tl.where(bit < 32, w0, w1)
        high = tl.where(bit < 96, w2, w3)
        bits = tl.where(bit < 64, low, high)[:, None] >> ((bit & 31)[:, None] + column)
    else:
        bit = bit[:, None] + column
        low = tl.where(bit < 32, w0[:, None], w1[:, None])
        high = tl.where(bit < 96, w2[:, None], w3[:, None])
        bits = tl.where(bit < 64, low, high) >> (bit & 31)
    return bits & 1


@triton.jit
def feistel_keys(group, seed):
    """Draw the eight keys of a permutation: the first words of its stream."""
    zero = tl.full((), 0, tl.int64)
    k0, k1, k2, k3 = philox(zero, 1, group, seed)
    k4, k5, k6, k7 = philox(zero + 1, 1, group, seed)
    return k0, k1, k2, k3, k4, k5, k6, k7


@triton.jit
def _mix(x, key):
    x = (x ^ key) * tl.full((), 0x85EBCA6B, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full((), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _round(lo, hi, keys, NUMBER: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    if NUMBER % 2 == 0:
        hi = hi ^ (_mix(lo, keys[NUMBER]) & tl.full((), (1 << HIGH) - 1, tl.uint32))
    else:
        lo = lo ^ (_mix(hi, keys[NUMBER]) & tl.full((), (1 << LOW) - 1, tl.uint32))
    return lo, hi


@triton.jit
def feistel(x, keys, BITS: tl.constexpr, INVERSE: tl.constexpr):
    """Compute the images (int64) of positions below ``2**BITS`` under the network or its inverse."""
    LOW: tl.constexpr = BITS // 2
    lo = x.to(tl.uint32) & tl.full((), (1 << LOW) - 1, tl.uint32)
    hi = (x >> LOW).to(tl.uint32)
    for i in tl.static_range(8):
        lo, hi = _round(lo, hi, keys, 7 - i if INVERSE else i, LOW, BITS - LOW)
    return (hi.to(tl.int64) << LOW) | lo.to(tl.int64)


@triton.jit
def permuted(x, size, keys, BITS: tl.constexpr, INVERSE: tl.constexpr):
    """Compute the images of positions below size under the permutation of that size, or under its inverse.

    ``2**(BITS - 1) < size <= 2**BITS``. Images of size or more are permuted again until all are below size (cycle
    walking). This may never end for a position that is itself not below size: replace it by 0.
    """
    image = feistel(x, keys, BITS, INVERSE)
    while tl.max((image >= size).to(tl.int32)) > 0:
        image = tl.where(image >= size, feistel(image, keys, BITS, INVERSE), image)
    return image


# -- The Hadamard transform of a tile of points, and the pass that does only this --------------------------------------

# The points of a tile are in the program's registers. A stage removes the lowest binary digit of the position
# (``split``), does the butterfly, and adds the digit back at the top (``join``, ``permute``). To the compiler this only
# renames registers as long as the lowest digit is within a thread. Otherwise it exchanges points through shared memory,
# once in about five stages.


@triton.jit
def butterflies(x, N: tl.constexpr, BITS: tl.constexpr):
    """Transform the lowest BITS digits of the position in (N,), and move them to the top in order."""
    for _ in tl.static_range(BITS):
        a, b = tl.split(tl.reshape(x, (N // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (1, 0)), (N,))
    return x


@triton.jit
def tile_rows(ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Return the positions in the whole array at which the rows of this program's tile begin: (ROWS,), int64."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS).to(tl.int64)
    if STRIDE == 1:
        start = (tile * ROWS + row) * COLUMNS
    else:
        ACROSS: tl.constexpr = STRIDE // COLUMNS
        start = tile // ACROSS * (ROWS * STRIDE) + tile % ACROSS * COLUMNS + row * STRIDE
    return start


@triton.jit
def transform(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr):
    """Transform a tile without scaling: over 2**BITS neighbors, or (STRIDE not 1) over the ROWS of each column."""
    N: tl.constexpr = ROWS * COLUMNS
    if STRIDE == 1:
        x = butterflies(tl.reshape(x, (N,)), N, BITS)
        x = tl.permute(tl.reshape(x, (1 << BITS, N >> BITS)), (1, 0))
    else:
        x = butterflies(tl.reshape(tl.permute(x, (1, 0)), (N,)), N, BITS)
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def scaled(x, scale_bits):
    """Multiply x by the float64 number with these bits, which is first rounded to x's dtype."""
    return x * scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(x.dtype)


# Triton specializes a kernel for some values of integers (1, multiples of 16), which is useless for integers that are
# not part of addresses.
@triton.jit(do_not_specialize=["vectors", "scale_bits"])
def hadamard_pass(
    x, out, vectors: tl.int64, n_in: tl.int64, n_out: tl.int64, scale_bits: tl.int64,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tile_rows(ROWS, COLUMNS, STRIDE)
    column = tl.arange(0, COLUMNS)[None, :]
    vector = first // LENGTH
    j = (first % LENGTH)[:, None] + column
    inside = (vector < vectors)[:, None]
    tile = tl.load(x + (vector * n_in)[:, None] + j, mask=inside & (j < n_in), other=0.0)
    tile = scaled(transform(tile, ROWS, COLUMNS, BITS, STRIDE), scale_bits)
    tl.store(out + (vector * n_out)[:, None] + j, tile, mask=inside & (j < n_out))


# -- The passes of F ---------------------------------------------------------------------------------------------------


@triton.jit
def _diagonal(tile, first, COLUMNS: tl.constexpr, SIGNS: tl.constexpr, group, seed):
    if SIGNS:
        tile = tl.where(sign_row(first, COLUMNS, group, seed) == 1, -tile, tile)
    else:
        tile = tile * normal_row(first, COLUMNS, 4, group, seed).to(tile.dtype)
    return tile


@triton.jit
def _gain(gain, place, first, COLUMNS: tl.constexpr, group, seed, KEPT: tl.constexpr):
    """Return the elements of g for rows of positions, where ``place`` are their images under the inverse."""
    # g[perm] is stored, read here at the inverse of a position.
    return tl.load(gain + place) if KEPT else normal_row(first, COLUMNS, 2, group, seed)


@triton.jit(do_not_specialize=["vectors", "scale_bits", "group", "seed"])
def drawn_pass(
    x, out, gain, vectors: tl.int64, n_in: tl.int64, n_out: tl.int64, scale_bits: tl.int64, group: tl.int64,
    seed: tl.uint64,
    LENGTH: tl.constexpr, LOG_LENGTH: tl.constexpr, PERIOD: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, SIGNS: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    first = tile_rows(ROWS, COLUMNS, STRIDE)
    vector = first // LENGTH
    first = first % LENGTH
    j = first[:, None] + tl.arange(0, COLUMNS)[None, :]
    inside = (vector < vectors)[:, None]
    start = x + (vector * n_in)[:, None]
    if LOAD == "permuted":
        place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, False)
        tile = tl.load(start + place % PERIOD, mask=inside, other=0.0)
        factor = tl.load(gain + j) if KEPT else normal(place, 2, group, seed)
        tile = tile * factor.to(tile.dtype)
    elif LOAD == "unpermuted":
        place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, True)
        tile = tl.load(start + place, mask=inside, other=0.0)
        tile = tile * _gain(gain, place, first, COLUMNS, group, seed, KEPT).to(tile.dtype)
    else:
        tile = tl.load(start + j, mask=inside & (j < n_in), other=0.0)
        if LOAD == "diagonal":
            tile = _diagonal(tile, first, COLUMNS, SIGNS, group, seed)
    tile = scaled(transform(tile, ROWS, COLUMNS, BITS, STRIDE), scale_bits)
    if STORE == "diagonal":
        tile = _diagonal(tile, first, COLUMNS, SIGNS, group, seed)
    tl.store(out + (vector * n_out)[:, None] + j, tile, mask=inside & (j < n_out))


@triton.jit(do_not_specialize=["group", "seed"])
def gathered_sum(
    x, out, gain, group: tl.int64, seed: tl.uint64,
    LENGTH: tl.constexpr, LOG_LENGTH: tl.constexpr, PERIOD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = PERIOD // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    # Index over all repeats of all vectors; ROWS divides the number of repeats per vector.
    repeat = program // ACROSS * ROWS + tl.arange(0, ROWS).to(tl.int64)
    first = repeat * PERIOD + program % ACROSS * COLUMNS
    vector = first // LENGTH
    first = first % LENGTH
    j = first[:, None] + tl.arange(0, COLUMNS)[None, :]
    place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, True)
    tile = tl.load(x + (vector * LENGTH)[:, None] + place)
    tile = tile * _gain(gain, place, first, COLUMNS, group, seed, KEPT).to(tile.dtype)
    tl.store(out + program * COLUMNS + tl.arange(0, COLUMNS), tl.sum(tile, axis=0))


@triton.jit(do_not_specialize=["size", "group", "seed"])
def shuffle(
    x, out, size: tl.int64, group: tl.int64, seed: tl.uint64,
    BITS: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(size, TILE)
    program = tl.program_id(0).to(tl.int64)
    start = program // tiles * size
    j = program % tiles * TILE + tl.arange(0, TILE)
    inside = j < size
    place = permuted(tl.where(inside, j, 0), size, feistel_keys(group, seed), BITS, INVERSE)
    tl.store(out + start + j, tl.load(x + start + place, mask=inside), mask=inside)
