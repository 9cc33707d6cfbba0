// The dense weight: code * scale + bias, rounded once, its columns where the input
// channels are. A thread takes 16 codes.
//
// grid: (K / 16, N, E) threads, exactly

#include "affine.h"

kernel void dequantize(
    const device uint* packed [[buffer(0)]],
    const device Scale* scales [[buffer(1)]],
    const device Scale* biases [[buffer(2)]],
    device X* y [[buffer(3)]],
    constant Shape& shape [[buffer(4)]],
    const device int* permutation [[buffer(5)]],
    uint3 position [[thread_position_in_grid]]) {
    const int chunk = position.x;
    const long n = position.y;
    const long expert = position.z;
    uint words[WORDS16];
    load_codes16(
        packed + expert * shape.packed_expert + n * shape.packed_row, chunk, words);
    const long group = expert * shape.scales_expert + n * shape.scales_row +
        chunk / (GROUP_SIZE / 16);
    const Values values = values_of(float(scales[group]), float(biases[group]));
    y += (expert * shape.n + n) * shape.k;
    if constexpr (PERMUTED) {
        permutation += expert * shape.k + chunk * 16;
#pragma clang loop unroll(full)
        for (int i = 0; i < 16; ++i) {
            const int column = permutation[i];
            // What is no permutation must not lead out of the row.
            if (column >= 0 && column < shape.k) {
                y[column] = value_of(values, code_at(words, i));
            }
        }
    } else {
        store_values16(values, words, y + chunk * 16);
    }
}
