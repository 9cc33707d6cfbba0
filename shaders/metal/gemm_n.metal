// y = x W in 8x8 matrices: what a gradient needs. x is [M, N], y [M, K].
//
// W is the right operand. A lane takes 16 neighbouring codes of one row, two for each of
// eight matrices, which lie side by side in the result: 64 columns. x is the left operand,
// from threadgroup memory.
//
// A threadgroup has 4 simdgroups, each makes 64 columns for 8 * M_TILES rows of x; SPLIT of
// them share the columns and take every SPLIT-th 8 rows of W.
//
// grid: (ceil(K / (256 / SPLIT)), ceil(M / BM), 1) threadgroups of (128) threads; with
// experts, in place of M / BM, at least as many as all experts' rows need.

#include "affine.h"

constant constexpr int BM = 8 * M_TILES;
constant constexpr int BN = 64;  // rows of W for which x is staged

// The padding keeps the rows of an operand in different banks, and pairs aligned.
constant constexpr int LD = BN + (sizeof(X) == 4 ? 4 : 8);

typedef vec<X, 2> X2;

// In float, thousands of terms one after the other would show: every BN rows of W are
// summed up by themselves.
constant constexpr bool APART = is_same<X, float>::value;

// BN columns of the rows of x, from column n0 on; zero where there are none.
inline void stage(
    threadgroup X* staged,
    const device X* x,
    const device long* order,
    constant Shape& shape,
    Tile tile,
    long n0,
    uint thread_index) {
    for (int i = thread_index; i < BM * BN; i += 128) {
        const long m = tile.first + i / BN;
        const long n = n0 + i % BN;
        X value = X(0.0f);
        if (m < tile.end && n < shape.n) {
            const long row = GATHERED ? long(order[m]) : m;
            value = x[row * shape.x_row + n * shape.x_column];
        }
        staged[i / BN * LD + i % BN] = value;
    }
}

[[kernel, max_total_threads_per_threadgroup(128)]] void gemm_n(
    const device uint* packed [[buffer(0)]],
    const device Scale* scales [[buffer(1)]],
    const device Scale* biases [[buffer(2)]],
    const device X* x [[buffer(3)]],
    device X* y [[buffer(4)]],
    constant Shape& shape [[buffer(5)]],
    const device int* permutation [[buffer(6)]],
#if EXPERTS
    const device EXPERT_TYPE* ends [[buffer(7)]],
    const device long* order [[buffer(8)]],
#endif
    uint3 position [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
    // x while summing up, then the sums of the other simdgroups.
    constexpr int STAGED = BM * LD * int(sizeof(X)) / 4;
    constexpr int SUMS = SPLIT > 1 ? 4 * 64 * 8 * M_TILES : 0;
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
    // The first of this lane's 16 columns.
    const long k = (long(position.x) * (4 / SPLIT) + simdgroup / SPLIT) * 64 + 16 * pair;

    simdgroup_matrix<float, 8, 8> sums[M_TILES * 8];
#pragma clang loop unroll(full)
    for (int i = 0; i < M_TILES * 8; ++i) {
        sums[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    float totals[APART ? 2 * M_TILES * 8 : 1] = {0.0f};
    for (long n0 = 0; n0 < shape.n; n0 += BN) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage(staged, x, order, shape, tile, n0, 32 * simdgroup + lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int block = part; block < BN / 8; block += SPLIT) {
            const long n = n0 + 8 * block + row;
            const Codes codes = load_codes(packed, scales, biases, shape, n, k);
            simdgroup_matrix<float, 8, 8> values[M_TILES];
#pragma clang loop unroll(full)
            for (int j = 0; j < M_TILES; ++j) {
                const int at = (8 * j + row) * LD + 8 * block + 2 * pair;
                const X2 two = *(const threadgroup X2*)(staged + at);
                set_elements(values[j], float2(float(two.x), float(two.y)));
            }
#pragma clang loop unroll(full)
            for (int f = 0; f < 8; ++f) {
                simdgroup_matrix<float, 8, 8> weights;
                set_elements(weights, weights_of(codes, f));
#pragma clang loop unroll(full)
                for (int j = 0; j < M_TILES; ++j) {
                    simdgroup_multiply_accumulate(
                        sums[j * 8 + f], values[j], weights, sums[j * 8 + f]);
                }
            }
        }
        if constexpr (APART) {
#pragma clang loop unroll(full)
            for (int i = 0; i < M_TILES * 8; ++i) {
                totals[2 * i] += sums[i].thread_elements()[0];
                totals[2 * i + 1] += sums[i].thread_elements()[1];
                sums[i].thread_elements()[0] = 0.0f;
                sums[i].thread_elements()[1] = 0.0f;
            }
        }
    }
    if constexpr (APART) {
#pragma clang loop unroll(full)
        for (int i = 0; i < M_TILES * 8; ++i) {
            sums[i].thread_elements()[0] = totals[2 * i];
            sums[i].thread_elements()[1] = totals[2 * i + 1];
        }
    }

    if (SPLIT > 1) {
        // [simdgroup][matrix][lane][2]
        threadgroup_barrier(mem_flags::mem_threadgroup);
        threadgroup float* own = memory + simdgroup * 64 * 8 * M_TILES + 2 * lane;
#pragma clang loop unroll(full)
        for (int i = 0; i < M_TILES * 8; ++i) {
            own[64 * i] = sums[i].thread_elements()[0];
            own[64 * i + 1] = sums[i].thread_elements()[1];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (part > 0) {
            return;
        }
#pragma clang loop unroll(full)
        for (int i = 0; i < M_TILES * 8; ++i) {
#pragma clang loop unroll(full)
            for (int other = 1; other < SPLIT; ++other) {
                const int at = other * 64 * 8 * M_TILES + 64 * i;
                sums[i].thread_elements()[0] += own[at];
                sums[i].thread_elements()[1] += own[at + 1];
            }
        }
    }
    if (k >= shape.k) {
        return;
    }
#pragma clang loop unroll(full)
    for (int j = 0; j < M_TILES; ++j) {
        const long m = tile.first + 8 * j + row;
        if (m >= tile.end) {
            continue;
        }
        device X* out = y + (GATHERED ? long(order[m]) : m) * shape.k;
#pragma clang loop unroll(full)
        for (int i = 0; i < 16; ++i) {
            const long column = PERMUTED ? long(permutation[k + i]) : k + i;
            out[column] = X(sums[j * 8 + i / 2].thread_elements()[i % 2]);
        }
    }
}
