// y = x W for few rows of x (VECTORS, 1 to 4), or for each row with an expert of its own.
// x is [M, N], y [M, K].
//
// A lane takes 16 neighbouring columns of every fourth row of W, a simdgroup 128 columns of
// every row; the simdgroups of a threadgroup share the columns and divide the rows.
//
// grid: (1, ceil(K / 128), M with experts, else 1) threadgroups of (32, SIMDGROUPS) threads

#include "affine.h"

[[kernel, max_total_threads_per_threadgroup(32 * SIMDGROUPS)]] void gemv_n(
    const device uint* packed [[buffer(0)]],
    const device Scale* scales [[buffer(1)]],
    const device Scale* biases [[buffer(2)]],
    const device X* x [[buffer(3)]],
    device X* y [[buffer(4)]],
    constant Shape& shape [[buffer(5)]],
    const device int* permutation [[buffer(6)]],
#if EXPERTS
    const device EXPERT_TYPE* experts [[buffer(7)]],
#endif
    uint3 position [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
    threadgroup float parts[SIMDGROUPS * VECTORS * 128];
    const long k0 = long(position.y) * 128;
    const long m0 = position.z;
    const int thread_index = 32 * simdgroup + lane;
#if EXPERTS
    const int expert = expert_of(experts, shape, m0, lane);
    if (expert < 0) {
        for (int i = thread_index; i < 128 && k0 + i < shape.k; i += 32 * SIMDGROUPS) {
            y[m0 * shape.k + k0 + i] = without_expert(expert);
        }
        return;  // the whole threadgroup
    }
    packed += expert * shape.packed_expert;
    scales += expert * shape.scales_expert;
    biases += expert * shape.scales_expert;
    permutation += PERMUTED ? expert * shape.k : 0;
#endif
    float totals[VECTORS * 16];
#pragma clang loop unroll(full)
    for (int i = 0; i < VECTORS * 16; ++i) {
        totals[i] = 0.0f;
    }
    const long k = k0 + lane % 8 * 16;
    x += m0 * shape.x_row;
    for (long n = simdgroup * 4 + lane / 8; n < shape.n; n += SIMDGROUPS * 4) {
        const Codes codes = load_codes(packed, scales, biases, shape, n, k);
        float values[VECTORS];
#pragma clang loop unroll(full)
        for (int v = 0; v < VECTORS; ++v) {
            values[v] = float(x[v * shape.x_row + n * shape.x_column]);
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < 16; ++i) {
            const float code = float(code_at(codes.words, i));
            const float weight = fma(code, codes.scale, codes.bias);
#pragma clang loop unroll(full)
            for (int v = 0; v < VECTORS; ++v) {
                totals[v * 16 + i] = fma(values[v], weight, totals[v * 16 + i]);
            }
        }
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < VECTORS * 16; ++i) {
        float total = totals[i];
        total += simd_shuffle_xor(total, ushort(8));
        total += simd_shuffle_xor(total, ushort(16));
        if (lane < 8) {
            parts[(simdgroup * VECTORS + i / 16) * 128 + lane * 16 + i % 16] = total;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < VECTORS * 128; i += 32 * SIMDGROUPS) {
        const long column = k0 + i % 128;
        if (column < shape.k) {
            float total = 0.0f;
            for (int part = 0; part < SIMDGROUPS; ++part) {
                total += parts[part * VECTORS * 128 + i];
            }
            const long to = PERMUTED ? long(permutation[column]) : column;
            y[(m0 + i / 128) * shape.k + to] = X(total);
        }
    }
}
