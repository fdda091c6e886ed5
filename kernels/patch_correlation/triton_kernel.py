"""Triton kernels of the patch-correlation loss: row statistics, tiles of pairs forward and backward, and the sum.

Raw rows go to the tensor cores; centring and scaling are a rank-1 correction in fp32 (`_differences`). fp32 rows are
centred as they are loaded instead. r = 0 marks rows that do not count. Derivation and layout: kernels/README.md.

Constexpr arguments in common: LOSS "mse" or "smooth_l1"; CENTRE_X, CENTRE_Y whether the side is fp32; INTERPRETED
whether the Triton interpreter runs the kernel, whose bf16 products are wrong and whose rounding to bf16 truncates.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _round(values, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def _load(base, rows, cols, stride, N, D, mu_R, CENTRE: tl.constexpr):
    """Tile of rows as they are multiplied; 0 outside. Integers become bf16, exact for one byte."""
    mask = (rows[:, None] < N) & (cols[None, :] < D)
    tile = tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0)
    if tile.dtype == tl.uint8:
        tile = tl.where(mask, tile.to(tl.float32) - 128.0, 0.0).to(tl.bfloat16)
    elif tile.dtype == tl.int8:
        tile = tile.to(tl.float32).to(tl.bfloat16)
    elif CENTRE:
        tile = tl.where(mask, tile - mu_R[:, None], 0.0)
    return tile


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def _row_statistics(base, rows, stride, N, D, eps, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean, scale and whether the standard deviation is above eps (or not a number, to be seen in the loss)."""
    total_R = tl.zeros([ROWS], tl.float32)
    for k in range(0, D, BLOCK):
        total_R += tl.sum(_load(base, rows, k + tl.arange(0, BLOCK), stride, N, D, total_R, False).to(tl.float32), 1)
    mu_R = total_R / D
    square_R = tl.zeros([ROWS], tl.float32)
    for k in range(0, D, BLOCK):
        cols = k + tl.arange(0, BLOCK)
        tile = _load(base, rows, cols, stride, N, D, total_R, False).to(tl.float32) - mu_R[:, None]
        tile = tl.where(cols[None, :] < D, tile, 0.0)
        square_R += tl.sum(tile * tile, 1)
    varies_R = tl.where(tl.sqrt(square_R / D) <= eps, False, True)
    if NORMALIZE:
        r_R = 1.0 / tl.sqrt(tl.where(square_R == 0, 1.0, square_R))
    else:
        r_R = 1.0 / tl.sqrt(tl.zeros([ROWS], tl.float32) + D)
    return mu_R, r_R, varies_R


@triton.jit
def statistics_kernel(
    X, Y, VALID, STATS, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn, eps_x, eps_y,
    HAS_VALID: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STATS (B,4,N): mean of x, r of x, mean of y, r of y; both r are 0 where a row does not count."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image = tl.program_id(1).to(tl.int64)
    mu_x, r_x, varies_x = _row_statistics(X + image * stride_xb, rows, stride_xn, N, D, eps_x, NORMALIZE, ROWS, BLOCK)
    mu_y, r_y, varies_y = _row_statistics(Y + image * stride_yb, rows, stride_yn, N, DT, eps_y, NORMALIZE, ROWS, BLOCK)
    counts = varies_x & varies_y & (rows < N)
    if HAS_VALID:
        counts = counts & (tl.load(VALID + image * N + rows, mask=rows < N, other=0) != 0)
    # A mean of rows that do not count is 0 too: padding may hold anything.
    out = STATS + image * 4 * N + rows
    tl.store(out, tl.where(counts, mu_x, 0.0), mask=rows < N)
    tl.store(out + N, tl.where(counts, r_x, 0.0), mask=rows < N)
    tl.store(out + 2 * N, tl.where(counts, mu_y, 0.0), mask=rows < N)
    tl.store(out + 3 * N, tl.where(counts, r_y, 0.0), mask=rows < N)


@triton.jit
def _multiply_rows(
    acc, base, stride, rows_i, rows_j, mu_i, mu_j, N, D,
    CENTRE: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + rows_i rows_j'."""
    for k in range(0, D, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        a = _load(base, rows_i, cols, stride, N, D, mu_i, CENTRE)
        b = _load(base, rows_j, cols, stride, N, D, mu_j, CENTRE)
        acc = _dot(a, tl.trans(b), acc, INTERPRETED)
    return acc


@triton.jit
def _inverse(r):
    return tl.where(r == 0, 0.0, 1.0 / tl.where(r == 0, 1.0, r))


@triton.jit
def _differences(
    X, Y, FOCUS, STATS, image, rows_i, rows_j, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn,
    HAS_FOCUS: tl.constexpr, EXCLUDE_DIAG: tl.constexpr, CENTRE_X: tl.constexpr, CENTRE_Y: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """C - T for a tile of pairs and C in type KEEP, both 0 where a pair does not count.

    One accumulator: C is divided by y's scales, negated, and y's products are added to it.
    """
    stats = STATS + image * 4 * N
    in_i, in_j = rows_i < N, rows_j < N
    mu_xi, mu_xj = tl.load(stats + rows_i, in_i, 0.0), tl.load(stats + rows_j, in_j, 0.0)
    r_xi, r_xj = tl.load(stats + N + rows_i, in_i, 0.0), tl.load(stats + N + rows_j, in_j, 0.0)
    mu_yi, mu_yj = tl.load(stats + 2 * N + rows_i, in_i, 0.0), tl.load(stats + 2 * N + rows_j, in_j, 0.0)
    r_yi, r_yj = tl.load(stats + 3 * N + rows_i, in_i, 0.0), tl.load(stats + 3 * N + rows_j, in_j, 0.0)

    acc = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    base_x = X + image * stride_xb
    acc = _multiply_rows(acc, base_x, stride_xn, rows_i, rows_j, mu_xi, mu_xj, N, D, CENTRE_X, BLOCK_K, INTERPRETED)
    if not CENTRE_X:
        acc -= (mu_xi * D)[:, None] * mu_xj[None, :]
    acc *= r_xi[:, None] * r_xj[None, :]
    kept = _round(acc, KEEP, INTERPRETED)

    acc *= (-_inverse(r_yi))[:, None] * _inverse(r_yj)[None, :]
    base_y = Y + image * stride_yb
    acc = _multiply_rows(acc, base_y, stride_yn, rows_i, rows_j, mu_yi, mu_yj, N, DT, CENTRE_Y, BLOCK_K, INTERPRETED)
    if not CENTRE_Y:
        acc -= (mu_yi * DT)[:, None] * mu_yj[None, :]
    acc *= (-r_yi)[:, None] * r_yj[None, :]

    counts = (r_xi != 0)[:, None] & (r_xj != 0)[None, :]
    if EXCLUDE_DIAG:
        counts = counts & (rows_i[:, None] != rows_j[None, :])
    if HAS_FOCUS:
        focus_i = tl.load(FOCUS + image * N + rows_i, in_i, 0) != 0
        focus_j = tl.load(FOCUS + image * N + rows_j, in_j, 0) != 0
        counts = counts & (focus_i[:, None] | focus_j[None, :])
    return tl.where(counts, acc, 0.0), tl.where(counts, kept, 0.0)


@triton.jit
def _skip(rows, r_R, N):
    """Rows to load for a product with H: those that do not count lie outside, as 0 times them need not be 0."""
    return tl.where(r_R != 0, rows, N)


@triton.jit
def _slope(d, beta, LOSS: tl.constexpr):
    """dl/dC. The clamp is written so that what is not a number stays so."""
    if LOSS == "mse":
        slope = 2 * d
    else:
        slope = tl.where(d > beta, 1.0, tl.where(d < -beta, -1.0, d / beta))
    return slope


@triton.jit
def distance_kernel(
    X, Y, FOCUS, STATS, PARTIAL, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn, tiles, beta,
    LOSS: tl.constexpr, HAS_FOCUS: tl.constexpr, EXCLUDE_DIAG: tl.constexpr,
    CENTRE_X: tl.constexpr, CENTRE_Y: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """PARTIAL (B, tiles (tiles + 1) / 2): distances summed by tile of the upper triangle, mirrored ones twice."""
    i, j, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j < i:
        return
    rows_i, rows_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    d, _ = _differences(
        X, Y, FOCUS, STATS, image, rows_i, rows_j, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn,
        HAS_FOCUS, EXCLUDE_DIAG, CENTRE_X, CENTRE_Y, tl.float32, BLOCK, BLOCK, BLOCK_K, INTERPRETED,
    )  # fmt: skip
    if LOSS == "mse":
        distance = d * d
    else:
        distance = tl.where(tl.abs(d) < beta, 0.5 * d * d / beta, tl.abs(d) - 0.5 * beta)
    total = tl.sum(tl.sum(distance, 1), 0) * tl.where(i == j, 1.0, 2.0)
    slots = tiles * (tiles + 1) // 2
    tl.store(PARTIAL + image * slots + i * tiles - i * (i - 1) // 2 + (j - i), total)


@triton.jit
def sum_kernel(
    PARTIAL, STATS, FOCUS, TOTAL, PAIRS, N, slots,
    HAS_FOCUS: tl.constexpr, EXCLUDE_DIAG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOTAL and PAIRS of an image, in an order of summation that depends on N alone."""
    image = tl.program_id(0).to(tl.int64)
    sum_K = tl.zeros([BLOCK], tl.float32)
    for k in range(0, slots, BLOCK):
        at = k + tl.arange(0, BLOCK)
        sum_K += tl.load(PARTIAL + image * slots + at, mask=at < slots, other=0.0)
    tl.store(TOTAL + image, tl.sum(sum_K, 0))
    rows_K = tl.zeros([BLOCK], tl.int64)
    apart_K = tl.zeros([BLOCK], tl.int64)
    for k in range(0, N, BLOCK):
        at = k + tl.arange(0, BLOCK)
        counts = tl.load(STATS + (image * 4 + 1) * N + at, mask=at < N, other=0.0) != 0
        rows_K += counts.to(tl.int64)
        if HAS_FOCUS:
            focus = tl.load(FOCUS + image * N + at, mask=at < N, other=0) != 0
            apart_K += tl.where(focus, 0, counts.to(tl.int64))
    rows, apart = tl.sum(rows_K, 0), tl.sum(apart_K, 0)
    pairs = rows * rows - apart * apart
    if EXCLUDE_DIAG:
        pairs -= rows - apart
    tl.store(PAIRS + image, pairs)


@triton.jit(do_not_specialize=["first"])
def slope_kernel(
    X, Y, FOCUS, STATS, H, SUMS, first, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn, stride_h, tiles, beta,
    LOSS: tl.constexpr, HAS_FOCUS: tl.constexpr, EXCLUDE_DIAG: tl.constexpr,
    CENTRE_X: tl.constexpr, CENTRE_Y: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """H (chunk, N, stride_h) and SUMS (chunk, 2, tiles, N): per tile of columns the row sums of G C and of H mu.

    Images `first` and on. A tile above the diagonal also writes its mirror image; each number is written once.
    """
    i, j, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if j < i:
        return
    image = first + slot
    rows_i, rows_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    d, c = _differences(
        X, Y, FOCUS, STATS, image, rows_i, rows_j, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn,
        HAS_FOCUS, EXCLUDE_DIAG, CENTRE_X, CENTRE_Y, KEEP, BLOCK, BLOCK, BLOCK_K, INTERPRETED,
    )  # fmt: skip
    # All sums come before the stores, so that G C is gone from the registers by then.
    g = _slope(d, beta, LOSS)
    gc = g * c.to(tl.float32)
    s_i, s_j = tl.sum(gc, 1), tl.sum(gc, 0)
    stats = STATS + image * 4 * N
    in_i, in_j = rows_i < N, rows_j < N
    r_i, r_j = tl.load(stats + N + rows_i, in_i, 0.0), tl.load(stats + N + rows_j, in_j, 0.0)
    h = _round(g * (r_i * D)[:, None] * r_j[None, :], KEEP, INTERPRETED)
    sums = SUMS + slot * 2 * tiles * N
    tl.store(sums + j * N + rows_i, s_i, mask=in_i)
    if not CENTRE_X:
        mu_i, mu_j = tl.load(stats + rows_i, in_i, 0.0), tl.load(stats + rows_j, in_j, 0.0)
        t_i = tl.sum(h.to(tl.float32) * mu_j[None, :], 1)
        t_j = tl.sum(h.to(tl.float32) * mu_i[:, None], 0)
        tl.store(sums + (tiles + j) * N + rows_i, t_i, mask=in_i)
    out = H + slot * N * stride_h
    tl.store(out + rows_i[:, None] * stride_h + rows_j[None, :], h, mask=in_i[:, None] & (rows_j < stride_h)[None, :])
    if i < j:
        tl.store(
            out + rows_j[:, None] * stride_h + rows_i[None, :], tl.trans(h),
            mask=in_j[:, None] & (rows_i < stride_h)[None, :],
        )  # fmt: skip
        tl.store(sums + i * N + rows_j, s_j, mask=in_j)
        if not CENTRE_X:
            tl.store(sums + (tiles + i) * N + rows_j, t_j, mask=in_j)


@triton.jit
def _store_gradient(
    DX, X, image, rows, cols, N, D, stride_xb, stride_xn, sum_x, s, t, mu, r, scale,
    NORMALIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """2 g [(sum_x - t) / D - s r^2 (x - mu)]; t is 0 where x was centred as it was loaded."""
    mask = (rows[:, None] < N) & (cols[None, :] < D)
    out = (sum_x - t[:, None]) / D
    if NORMALIZE:
        x = tl.load(X + image * stride_xb + rows[:, None] * stride_xn + cols[None, :], mask=mask, other=0)
        out -= (s * r * r)[:, None] * (x.to(tl.float32) - mu[:, None])
    # Rows that do not count hold anything: their gradient is 0 and not what 0 times it gives.
    out = tl.where((r != 0)[:, None], out * (2 * scale), 0.0)
    out = _round(out, DX.dtype.element_ty, INTERPRETED)
    tl.store(DX + image * N * D + rows[:, None] * D + cols[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["first"])
def apply_kernel(
    X, STATS, H, SUMS, SCALE, DX, first, N, D, stride_xb, stride_xn, stride_h, tiles,
    NORMALIZE: tl.constexpr, CENTRE_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """DX (B,N,D) from the H of a chunk of images, `first` and on."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = tl.program_id(2).to(tl.int64)
    image = first + slot
    stats = STATS + image * 4 * N
    in_rows = rows < N
    panel = H + slot * N * stride_h + rows[:, None] * stride_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for k in range(0, stride_h, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        h = tl.load(panel + at[None, :], mask=in_rows[:, None] & (at < stride_h)[None, :], other=0.0)
        mu_k, r_k = tl.load(stats + at, at < N, 0.0), tl.load(stats + N + at, at < N, 0.0)
        x = _load(X + image * stride_xb, _skip(at, r_k, N), cols, stride_xn, N, D, mu_k, CENTRE_X)
        acc = _dot(h, x.to(h.dtype), acc, INTERPRETED)
    s = tl.zeros([BLOCK_M], tl.float32)
    t = tl.zeros([BLOCK_M], tl.float32)
    sums = SUMS + slot * 2 * tiles * N + rows
    for k in range(tiles):
        s += tl.load(sums + k * N, in_rows, 0.0)
        if not CENTRE_X:
            t += tl.load(sums + (tiles + k) * N, in_rows, 0.0)
    mu, r = tl.load(stats + rows, in_rows, 0.0), tl.load(stats + N + rows, in_rows, 0.0)
    _store_gradient(
        DX, X, image, rows, cols, N, D, stride_xb, stride_xn, acc, s, t, mu, r, tl.load(SCALE + image),
        NORMALIZE, INTERPRETED,
    )  # fmt: skip


@triton.jit
def panel_kernel(
    X, Y, FOCUS, STATS, SCALE, DX, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn, beta,
    LOSS: tl.constexpr, HAS_FOCUS: tl.constexpr, EXCLUDE_DIAG: tl.constexpr, NORMALIZE: tl.constexpr,
    CENTRE_X: tl.constexpr, CENTRE_Y: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """DX for BLOCK_M rows of an image whose N is at most BLOCK_N: their panel of H never leaves the chip."""
    rows, image = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK_N)
    d, c = _differences(
        X, Y, FOCUS, STATS, image, rows, at, N, D, DT, stride_xb, stride_xn, stride_yb, stride_yn,
        HAS_FOCUS, EXCLUDE_DIAG, CENTRE_X, CENTRE_Y, KEEP, BLOCK_M, BLOCK_N, BLOCK_K, INTERPRETED,
    )  # fmt: skip
    g = _slope(d, beta, LOSS)
    s = tl.sum(g * c.to(tl.float32), 1)
    stats = STATS + image * 4 * N
    in_rows = rows < N
    mu, r = tl.load(stats + rows, in_rows, 0.0), tl.load(stats + N + rows, in_rows, 0.0)
    mu_at, r_at = tl.load(stats + at, at < N, 0.0), tl.load(stats + N + at, at < N, 0.0)
    h = _round(g * (r * D)[:, None] * r_at[None, :], KEEP, INTERPRETED)
    if CENTRE_X:
        t = tl.zeros([BLOCK_M], tl.float32)
    else:
        t = tl.sum(h.to(tl.float32) * mu_at[None, :], 1)
    scale = tl.load(SCALE + image)
    counted = _skip(at, r_at, N)
    for k in range(0, D, BLOCK_D):
        cols = k + tl.arange(0, BLOCK_D)
        x = _load(X + image * stride_xb, counted, cols, stride_xn, N, D, mu_at, CENTRE_X)
        sum_x = _dot(h, x.to(h.dtype), tl.zeros([BLOCK_M, BLOCK_D], tl.float32), INTERPRETED)
        _store_gradient(
            DX, X, image, rows, cols, N, D, stride_xb, stride_xn, sum_x, s, t, mu, r, scale, NORMALIZE, INTERPRETED
        )  # fmt: skip
