// y = x W^T + bias for the few rows of x (VECTORS, 2 to 8): each weight is read and made
// once for all of them.
//
// As in gemv, a simdgroup makes ROWS outputs of each row of x, a lane takes 32 codes at a
// time, and SPLIT simdgroups share the outputs and take a part of K each.
//
// grid: (1, ceil(N / (ROWS * GROUPS)), 1) threadgroups of (32, SPLIT * GROUPS) threads

#include "affine.h"

// What a lane holds is limited: ROWS * BITS words and ROWS * VECTORS sums.
constant constexpr int ROWS = BITS > 4 && VECTORS > 4 ? 2 : 4;

// Adds the products of a lane's run of codes with all rows of x. totals [ROWS][VECTORS]
inline void multiply_run(
    const thread uint* words,
    const thread float2* scales,
    const device X* x,
    const device int* permutation,
    constant Shape& shape,
    int run,
    thread float* totals) {
    const bool half_run = is_half(shape, run);
#pragma clang loop unroll(full)
    for (int i = 0; i < 32; i += 8) {
        if (half_run && i >= 16) {
            continue;
        }
        float weights[ROWS * 8];
#pragma clang loop unroll(full)
        for (int r = 0; r < ROWS; ++r) {
            const float2 pair = scales[r * HALVES + i * HALVES / 32];
#pragma clang loop unroll(full)
            for (int j = 0; j < 8; ++j) {
                const float code = placed_code(words + r * BITS, i + j);
                weights[r * 8 + j] = fma(code, unplaced(pair.x, i + j), pair.y);
            }
        }
#pragma clang loop unroll(full)
        for (int v = 0; v < VECTORS; ++v) {
            float values[8];
            const device X* row = x + v * shape.x_row;
            load_x8(row, permutation, shape, run * 32 + i, values);
#pragma clang loop unroll(full)
            for (int r = 0; r < ROWS; ++r) {
                float sum = totals[r * VECTORS + v];
#pragma clang loop unroll(full)
                for (int j = 0; j < 8; ++j) {
                    sum = fma(values[j], weights[r * 8 + j], sum);
                }
                totals[r * VECTORS + v] = sum;
            }
        }
    }
}

// Adds the products of the runs of K. WHOLE: all rows exist; otherwise what is computed
// for the others is not stored.
template <bool WHOLE>
inline void accumulate(
    Rows rows,
    const device X* x,
    const device int* permutation,
    constant Shape& shape,
    int2 runs,
    int lane,
    thread float* totals) {
    uint words[ROWS * BITS];
#pragma clang loop unroll(full)
    for (int i = 0; i < ROWS * BITS; ++i) {
        words[i] = 0;
    }
    for (int block = runs.x; block < runs.y; block += 32 * STEPS) {
        float2 own[ROWS * HALVES];
        load_scales<ROWS, WHOLE>(rows, shape, block, runs.y, lane, own);
        for (int step = 0; step < STEPS && block + 32 * step < runs.y; ++step) {
            float2 scales[ROWS * HALVES];
            share_scales<ROWS>(own, step, lane, scales);
            const int run = block + 32 * step + lane;
            if (run < runs.y) {
                load_runs<ROWS, WHOLE>(rows, shape, run, words);
                multiply_run(words, scales, x, permutation, shape, run, totals);
            }
        }
    }
}

[[kernel, max_total_threads_per_threadgroup(32 * SPLIT * GROUPS)]] void gemv_small(
    const device uint* packed [[buffer(0)]],
    const device Scale* scales [[buffer(1)]],
    const device Scale* biases [[buffer(2)]],
    const device X* x [[buffer(3)]],
    device X* y [[buffer(4)]],
    constant Shape& shape [[buffer(5)]],
    const device int* permutation [[buffer(6)]],
    const device X* bias [[buffer(7)]],
    uint3 position [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
    constexpr int OUTPUTS = ROWS * VECTORS;
    threadgroup float parts[SPLIT * GROUPS * OUTPUTS];
    const long n = (long(position.y) * GROUPS + simdgroup / SPLIT) * ROWS;
    const Rows rows = rows_from(packed, scales, biases, shape, n, ROWS);
    const int2 runs = runs_of_part(shape, simdgroup % SPLIT, SPLIT);
    float totals[OUTPUTS];
#pragma clang loop unroll(full)
    for (int i = 0; i < OUTPUTS; ++i) {
        totals[i] = 0.0f;
    }
    if (rows.count >= ROWS) {
        accumulate<true>(rows, x, permutation, shape, runs, lane, totals);
    } else if (rows.count > 0) {
        accumulate<false>(rows, x, permutation, shape, runs, lane, totals);
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < OUTPUTS; ++i) {
        const float total = simd_sum(totals[i]);
        if (lane == 0) {
            parts[simdgroup * OUTPUTS + i] = total;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup % SPLIT == 0) {
        for (int i = lane; i < OUTPUTS; i += 32) {
            const int r = i / VECTORS;
            const long m = i % VECTORS;
            if (r < rows.count) {
                float total = 0.0f;
                for (int part = 0; part < SPLIT; ++part) {
                    total += parts[(simdgroup + part) * OUTPUTS + i];
                }
                y[m * shape.n + n + r] = X(total + bias_at(bias, shape, m, n + r));
            }
        }
    }
}
