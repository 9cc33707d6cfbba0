// y = W x + bias for one row of x, or for each row with an expert of its own.
//
// A simdgroup makes ROWS outputs: x is loaded once for all of them. A lane takes 32 codes
// at a time, neighbours in a row of W, so a simdgroup reads 1024. Codes are masked, not
// shifted: scales are divided by the places of codes instead, once for a run. Each weight
// is made before it is multiplied; scale * sum(x * code) + bias * sum(x) would be one
// operation less, and wrong where those two large numbers cancel.
// SPLIT simdgroups share the outputs and take a part of K each.
//
// grid: (1, ceil(N / (ROWS * GROUPS)), M) threadgroups of (32, SPLIT * GROUPS) threads

#include "affine.h"

constant constexpr int ROWS = 4;

// Adds the products of a lane's run of codes with x.
template <bool WHOLE>
inline void multiply_run(
    const thread uint* words,
    const thread float2* scales,
    int rows,
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
        float values[8];
        load_x8(x, permutation, shape, run * 32 + i, values);
#pragma clang loop unroll(full)
        for (int r = 0; r < ROWS; ++r) {
            if (!WHOLE && r >= rows) {
                continue;
            }
            const float2 pair = scales[r * HALVES + i * HALVES / 32];
            float sum = totals[r];
#pragma clang loop unroll(full)
            for (int j = 0; j < 8; ++j) {
                const float code = placed_code(words + r * BITS, i + j);
                const float weight = fma(code, unplaced(pair.x, i + j), pair.y);
                sum = fma(values[j], weight, sum);
            }
            totals[r] = sum;
        }
    }
}

// Adds the products of the runs of x with the rows. WHOLE: all rows exist.
template <bool WHOLE>
inline void accumulate(
    Rows rows,
    const device X* x,
    const device int* permutation,
    constant Shape& shape,
    int2 runs,
    int lane,
    thread float* totals) {
    for (int block = runs.x; block < runs.y; block += 32 * STEPS) {
        float2 own[ROWS * HALVES];
        load_scales<ROWS, WHOLE>(rows, shape, block, runs.y, lane, own);
        for (int step = 0; step < STEPS && block + 32 * step < runs.y; ++step) {
            float2 scales[ROWS * HALVES];
            share_scales<ROWS>(own, step, lane, scales);
            const int run = block + 32 * step + lane;
            if (run < runs.y) {
                uint words[ROWS * BITS];
                load_runs<ROWS, WHOLE>(rows, shape, run, words);
                multiply_run<WHOLE>(
                    words, scales, rows.count, x, permutation, shape, run, totals);
            }
        }
    }
}

[[kernel, max_total_threads_per_threadgroup(32 * SPLIT * GROUPS)]] void gemv(
    const device uint* packed [[buffer(0)]],
    const device Scale* scales [[buffer(1)]],
    const device Scale* biases [[buffer(2)]],
    const device X* x [[buffer(3)]],
    device X* y [[buffer(4)]],
    constant Shape& shape [[buffer(5)]],
    const device int* permutation [[buffer(6)]],
    const device X* bias [[buffer(7)]],
#if EXPERTS
    const device EXPERT_TYPE* experts [[buffer(8)]],
#endif
    uint3 position [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
    threadgroup float parts[SPLIT * GROUPS * ROWS];
    const long m = position.z;
    const long n = (long(position.y) * GROUPS + simdgroup / SPLIT) * ROWS;
    const int part = simdgroup % SPLIT;
    Rows rows = rows_from(packed, scales, biases, shape, n, ROWS);
#if EXPERTS
    const int expert = expert_of(experts, shape, m, lane);
    if (expert < 0) {
        if (part == 0 && int(lane) < rows.count) {
            y[m * shape.n + n + lane] = without_expert(expert);
        }
        return;  // the whole threadgroup
    }
    rows.packed += expert * shape.packed_expert;
    rows.scales += expert * shape.scales_expert;
    rows.biases += expert * shape.scales_expert;
    permutation += PERMUTED ? expert * shape.k : 0;
#endif
    const int2 runs = runs_of_part(shape, part, SPLIT);
    float totals[ROWS] = {0.0f, 0.0f, 0.0f, 0.0f};
    x += m * shape.x_row;
    if (rows.count == ROWS) {
        accumulate<true>(rows, x, permutation, shape, runs, lane, totals);
    } else if (rows.count > 0) {
        accumulate<false>(rows, x, permutation, shape, runs, lane, totals);
    }
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; ++r) {
        totals[r] = simd_sum(totals[r]);
    }
    if (SPLIT > 1) {
        if (lane == 0) {
#pragma clang loop unroll(full)
            for (int r = 0; r < ROWS; ++r) {
                parts[simdgroup * ROWS + r] = totals[r];
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (part == 0 && lane == 0) {
#pragma clang loop unroll(full)
        for (int r = 0; r < ROWS; ++r) {
            if (r < rows.count) {
                float total = totals[r];
                for (int other = 1; other < SPLIT; ++other) {
                    total += parts[(simdgroup + other) * ROWS + r];
                }
                y[m * shape.n + n + r] = X(total + bias_at(bias, shape, m, n + r));
            }
        }
    }
}
