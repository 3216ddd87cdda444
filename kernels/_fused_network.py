"""The whole network in one GPU kernel (Triton): raw features in, outputs of the network and their variance out.

A program takes a block of grid points from features to results. Only features and results pass through the device's
memory: layer by layer, the network of `gpurho.prediction` would write and read its activations a dozen times, and
for a narrow network these passes, not the arithmetic, are the time. Products are of bfloat16, or of float32 in three
steps of TF32, and add up in float32, in which everything between them stays, too.

The kernels are plain functions that `gpurho.fused` compiles, or gives to Triton's interpreter, which runs them on a
CPU; they call no function of their own, because a compiled one cannot be interpreted.
"""

from __future__ import annotations

# Kernels are Triton's language, which mypy does not know.
# mypy: ignore-errors
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2PI = tl.constexpr(0.3989422804014327)
FAR = tl.constexpr(3.0e38)


def network(
    features, n_points, slope, shift, decay, low, high, baseline,
    first, first_bias, first_variance, first_bias_variance,
    hidden, hidden_bias, hidden_variance, hidden_bias_variance, skip,
    last, last_bias, last_variance, last_bias_variance, factor, factor_bias,
    out, variance_out, excess_out, baseline_out,
    N_FEATURES: tl.constexpr, WIDTH: tl.constexpr, N_HIDDEN: tl.constexpr, POINTS: tl.constexpr, CHUNK: tl.constexpr,
    TYPE: tl.constexpr, MODE: tl.constexpr, DECAYS: tl.constexpr, BASELINE: tl.constexpr,
):  # fmt: skip
    """Outputs at the means of the weights, and their epistemic variance in closed form.

    features : (n_points, N_FEATURES) float32
    slope, shift, decay, low, high, baseline : (N_FEATURES,) float32
        Inputs are ``slope * f + shift``, of ``exp(-decay * f)`` where `decay` is not 0 (only where DECAYS).
    first, first_variance : (N_FEATURES, WIDTH); hidden, hidden_variance : (N_HIDDEN - 1, WIDTH, WIDTH)
        Weights and their variances, input by output; biases are (layers, WIDTH) float32.
    skip : (N_HIDDEN,) float32
        0 at the first layer of a block.
    last, last_variance, last_bias_variance : (2, WIDTH), (WIDTH,), (1,) float32
    factor, factor_bias : (WIDTH + 1, WIDTH), (WIDTH + 1,) float32
        Of the posterior of the last layer.
    out, variance_out, excess_out, baseline_out : (2, n_points), (n_points,) ... float32; OUTPUT

    MODE is 0 for the outputs alone, 1 for the variance of all weights, 2 for that of the last layer, and 3 for none but
    the distance from the training domain. TYPE is that of the factors of products: bfloat16, or float32 in three steps
    of TF32.
    """
    rows = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    valid = rows < n_points
    begin = rows.to(tl.int64) * N_FEATURES
    unit = tl.arange(0, WIDTH)
    z = tl.zeros((POINTS, WIDTH), tl.float32)
    spread = tl.zeros((POINTS, WIDTH), tl.float32)
    excess = tl.zeros((POINTS,), tl.float32)
    superposition = tl.zeros((POINTS,), tl.float32)
    for at in range(0, N_FEATURES, CHUNK):
        column = at + tl.arange(0, CHUNK)
        there = column < N_FEATURES
        f = tl.load(features + begin[:, None] + column[None, :], valid[:, None] & there[None, :], 0.0)
        if BASELINE:
            superposition += tl.sum(f * tl.load(baseline + column, there, 0.0)[None, :], 1)
        if DECAYS:
            rate = tl.load(decay + column, there, 0.0)[None, :]
            f = tl.where(rate != 0.0, tl.exp(-rate * f), f)
        x = f * tl.load(slope + column, there, 0.0)[None, :] + tl.load(shift + column, there, 0.0)[None, :]
        if MODE != 0:
            above = x - tl.load(high + column, there, FAR)[None, :]
            below = tl.load(low + column, there, -FAR)[None, :] - x
            excess = tl.maximum(excess, tl.max(tl.maximum(above, below), 1))
        place = column[:, None] * WIDTH + unit[None, :]
        w = tl.load(first + place, there[:, None], 0.0)
        z += tl.dot(x.to(TYPE), w, input_precision="tf32x3")
        if MODE == 1:
            v = tl.load(first_variance + place, there[:, None], 0.0)
            spread += tl.dot((x * x).to(TYPE), v, input_precision="tf32x3")
    z += tl.load(first_bias + unit)[None, :]
    cumulative = 0.5 + 0.5 * tl.erf(z * ROOT_HALF)
    h = z * cumulative
    # Of every layer what the way back needs: dh/dz, and the variance of z.
    slopes = (cumulative + z * ROOT_2PI * tl.exp(-0.5 * z * z),)
    spreads = (spread + tl.load(first_bias_variance + unit)[None, :],)
    matrix = unit[:, None] * WIDTH + unit[None, :]
    for i in tl.static_range(N_HIDDEN - 1):
        w = tl.load(hidden + i * WIDTH * WIDTH + matrix)
        z = tl.dot(h.to(TYPE), w, input_precision="tf32x3")
        z += tl.load(hidden_bias + i * WIDTH + unit)[None, :]
        if MODE == 1:
            v = tl.load(hidden_variance + i * WIDTH * WIDTH + matrix)
            spread = tl.dot((h * h).to(TYPE), v, input_precision="tf32x3")
            spreads = spreads + (spread + tl.load(hidden_bias_variance + i * WIDTH + unit)[None, :],)  # noqa: RUF005
        cumulative = 0.5 + 0.5 * tl.erf(z * ROOT_HALF)
        if MODE == 1:
            slopes = slopes + (cumulative + z * ROOT_2PI * tl.exp(-0.5 * z * z),)  # noqa: RUF005
        h = z * cumulative + tl.load(skip + i + 1) * h
    density = tl.load(last + unit)
    tl.store(out + rows, tl.sum(h * density[None, :], 1) + tl.load(last_bias), valid)
    noise = tl.sum(h * tl.load(last + WIDTH + unit)[None, :], 1) + tl.load(last_bias + 1)
    tl.store(out + n_points + rows, noise, valid)
    if BASELINE:
        tl.store(baseline_out + rows, superposition, valid)
    if MODE != 0:
        tl.store(excess_out + rows, excess, valid)
    if MODE == 1:
        variance = tl.sum(h * h * tl.load(last_variance + unit)[None, :], 1) + tl.load(last_bias_variance)
        delta = tl.zeros((POINTS, WIDTH), tl.float32) + density[None, :]
        for k in tl.static_range(N_HIDDEN):
            local = delta * slopes[N_HIDDEN - 1 - k]
            variance += tl.sum(local * local * spreads[N_HIDDEN - 1 - k], 1)
            if k < N_HIDDEN - 1:
                turned = unit[None, :] * WIDTH + unit[:, None]
                w = tl.load(hidden + (N_HIDDEN - 2 - k) * WIDTH * WIDTH + turned)
                below = tl.dot(local.to(TYPE), w, input_precision="tf32x3")
                delta = below + tl.load(skip + N_HIDDEN - 1 - k) * delta
        tl.store(variance_out + rows, variance, valid)
    if MODE == 2:
        w = tl.load(factor + unit[None, :] * WIDTH + unit[:, None])
        part = tl.dot(h, w, input_precision="tf32x3") + tl.load(factor_bias + unit)[None, :]
        rest = tl.sum(h * tl.load(factor + WIDTH * WIDTH + unit)[None, :], 1) + tl.load(factor_bias + WIDTH)
        tl.store(variance_out + rows, tl.sum(part * part, 1) + rest * rest, valid)
