// y = x W^T + bias in 8x8 matrices, for more rows of x than gemv_small takes.
//
// The result is made transposed: W is the left operand, x the right one. The order of K is
// free, so a lane takes 16 neighbouring codes of one row of W, two for each of 8 products,
// straight into its operands: no threadgroup memory, each weight is made once, in float.
// x lies in threadgroup memory in the order that this asks for.
//
// A threadgroup has 4 simdgroups. Each makes 8 * N_TILES outputs for 8 * M_TILES rows of
// x; SPLIT of them share the outputs and take every SPLIT-th 64 columns.
//
// grid: (ceil(N / BN), ceil(M / BM), 1) threadgroups of (128) threads; with experts, in
// place of M / BM, at least as many as all experts' rows need.

#include "affine.h"

constant constexpr int BM = 8 * M_TILES;
constant constexpr int BN = 8 * N_TILES * 4 / SPLIT;
constant constexpr int BK = 64 * SPLIT;

// Rows of x in threadgroup memory. The padding keeps the eight rows of an operand in
// different banks, and pairs aligned.
constant constexpr int LD = BM + (sizeof(X) == 4 ? 4 : 8);

typedef vec<X, 2> X2;

// In float, thousands of terms one after the other would show: every BK columns are
// summed up by themselves.
constant constexpr bool APART = is_same<X, float>::value;

// Where column k of a block of 64 lies: product f takes from lane column c (of four) the
// codes 16 c + 2 f and the next.
inline int place_of_column(int k) {
    return (k % 16) / 2 * 8 + k / 16 * 2 + k % 2;
}

// 64 columns times SPLIT of the rows of x, from column k0 on; zero where there are none.
inline void stage(
    threadgroup X* staged,
    const device X* x,
    const device int* permutation,
    const device long* order,
    constant Shape& shape,
    Tile tile,
    int k0,
    uint thread_index) {
    for (int i = thread_index; i < BM * BK / 8; i += 128) {
        const int k = i % (BK / 8) * 8;
        const int m = i / (BK / 8);
        float values[8];
#pragma clang loop unroll(full)
        for (int j = 0; j < 8; ++j) {
            values[j] = 0.0f;
        }
        if (tile.first + m < tile.end && k0 + k < int(shape.k)) {
            const long row = GATHERED ? long(order[tile.first + m]) : tile.first + m;
            load_x8(x + row * shape.x_row, permutation, shape, k0 + k, values);
        }
        threadgroup X* block = staged + k / 64 * 64 * LD + m;
#pragma clang loop unroll(full)
        for (int j = 0; j < 8; ++j) {
            block[place_of_column(k % 64 + j) * LD] = X(values[j]);
        }
    }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void gemm(
    const device uint* packed [[buffer(0)]],
    const device Scale* scales [[buffer(1)]],
    const device Scale* biases [[buffer(2)]],
    const device X* x [[buffer(3)]],
    device X* y [[buffer(4)]],
    constant Shape& shape [[buffer(5)]],
    const device int* permutation [[buffer(6)]],
    const device X* bias [[buffer(7)]],
#if EXPERTS
    const device EXPERT_TYPE* ends [[buffer(8)]],
    const device long* order [[buffer(9)]],
#endif
    uint3 position [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
    // x while summing up, then the sums of the other simdgroups.
    constexpr int STAGED = BK * LD * int(sizeof(X)) / 4;
    constexpr int SUMS = SPLIT > 1 ? 4 * 64 * N_TILES * M_TILES : 0;
    threadgroup float4 aligned[((STAGED > SUMS ? STAGED : SUMS) + 3) / 4];
    threadgroup float* memory = (threadgroup float*)aligned;
    threadgroup X* staged = (threadgroup X*)aligned;
#if EXPERTS
    const Tile tile = tile_at(ends, shape, position.y, BM, lane);
    if (tile.first == tile.end) {
        return;  // the whole threadgroup
    }
    packed += tile.expert * shape.packed_expert;
    scales += tile.expert * shape.scales_expert;
    biases += tile.expert * shape.scales_expert;
    permutation += PERMUTED ? tile.expert * shape.k : 0;
#else
    const long first = long(position.y) * BM;
    const Tile tile = {first, min(first + BM, shape.m), 0};
    const device long* order = nullptr;
#endif

    const int row = row_in_matrix(lane);
    const int pair = pair_in_matrix(lane);
    const int part = simdgroup % SPLIT;
    const long n = long(position.x) * BN + simdgroup / SPLIT * 8 * N_TILES;

    simdgroup_matrix<float, 8, 8> sums[N_TILES * M_TILES];
#pragma clang loop unroll(full)
    for (int i = 0; i < N_TILES * M_TILES; ++i) {
        sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    float totals[APART ? 2 * N_TILES * M_TILES : 1] = {0.0f};
    for (int k0 = 0; k0 < int(shape.k); k0 += BK) {
        Codes codes[N_TILES];
#pragma clang loop unroll(full)
        for (int i = 0; i < N_TILES; ++i) {
            const int k = k0 + 64 * part + 16 * pair;
            codes[i] = load_codes(packed, scales, biases, shape, n + 8 * i + row, k);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage(staged, x, permutation, order, shape, tile, k0, 32 * simdgroup + lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const threadgroup X* block = staged + (64 * part + row) * LD + 2 * pair;
#pragma clang loop unroll(full)
        for (int f = 0; f < 8; ++f) {
            simdgroup_matrix<float, 8, 8> weights[N_TILES];
#pragma clang loop unroll(full)
            for (int i = 0; i < N_TILES; ++i) {
                set_elements(weights[i], weights_of(codes[i], f));
            }
#pragma clang loop unroll(full)
            for (int j = 0; j < M_TILES; ++j) {
                const X2 two = *(const threadgroup X2*)(block + 8 * f * LD + 8 * j);
                simdgroup_matrix<float, 8, 8> values;
                set_elements(values, float2(float(two.x), float(two.y)));
#pragma clang loop unroll(full)
                for (int i = 0; i < N_TILES; ++i) {
                    simdgroup_multiply_accumulate(
                        sums[i * M_TILES + j], weights[i], values, sums[i * M_TILES + j]);
                }
            }
        }
        if constexpr (APART) {
#pragma clang loop unroll(full)
            for (int i = 0; i < N_TILES * M_TILES; ++i) {
                totals[2 * i] += sums[i].thread_elements()[0];
                totals[2 * i + 1] += sums[i].thread_elements()[1];
                sums[i].thread_elements()[0] = 0.0f;
                sums[i].thread_elements()[1] = 0.0f;
            }
        }
    }
    if constexpr (APART) {
#pragma clang loop unroll(full)
        for (int i = 0; i < N_TILES * M_TILES; ++i) {
            sums[i].thread_elements()[0] = totals[2 * i];
            sums[i].thread_elements()[1] = totals[2 * i + 1];
        }
    }

    if (SPLIT > 1) {
        // [simdgroup][tile][lane][2]
        threadgroup_barrier(mem_flags::mem_threadgroup);
        threadgroup float* own = memory + simdgroup * 64 * N_TILES * M_TILES + 2 * lane;
#pragma clang loop unroll(full)
        for (int i = 0; i < N_TILES * M_TILES; ++i) {
            own[64 * i] = sums[i].thread_elements()[0];
            own[64 * i + 1] = sums[i].thread_elements()[1];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (part > 0) {
            return;
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < N_TILES * M_TILES; ++i) {
#pragma clang loop unroll(full)
            for (int other = 1; other < SPLIT; ++other) {
                const int at = other * 64 * N_TILES * M_TILES + 64 * i;
                sums[i].thread_elements()[0] += own[at];
                sums[i].thread_elements()[1] += own[at + 1];
            }
        }
    }
#pragma clang loop unroll(full)
    for (int i = 0; i < N_TILES; ++i) {
        const long out = n + 8 * i + row;
        if (out >= shape.n) {
            continue;
        }
#pragma clang loop unroll(full)
        for (int j = 0; j < 2 * M_TILES; ++j) {
            const long m = tile.first + 8 * (j / 2) + 2 * pair + j % 2;
            if (m < tile.end) {
                const long to = GATHERED ? long(order[m]) : m;
                const float sum = sums[i * M_TILES + j / 2].thread_elements()[j % 2];
                y[to * shape.n + out] = X(sum + bias_at(bias, shape, to, out));
            }
        }
    }
}
