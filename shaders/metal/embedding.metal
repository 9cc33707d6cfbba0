// Rows ids[i] of the dense weight, each code * scale + bias, rounded once. A thread takes
// 16 codes. An id that is no row gives a row of NaN: an error would make the host wait for
// the device.
//
//   ID_TYPE  int or long
//
// grid: (K / 16, number of ids) threads, exactly

#include "affine.h"

kernel void embedding(
    const device uint* packed [[buffer(0)]],
    const device Scale* scales [[buffer(1)]],
    const device Scale* biases [[buffer(2)]],
    const device ID_TYPE* ids [[buffer(3)]],
    device X* y [[buffer(4)]],
    constant Shape& shape [[buffer(5)]],
    uint2 position [[thread_position_in_grid]]) {
    const int chunk = position.x;
    const long n = ids[position.y];
    y += long(position.y) * shape.k + chunk * 16;
    if (n < 0 || n >= shape.n) {
#pragma clang loop unroll(full)
        for (int i = 0; i < 16; ++i) {
            y[i] = X(NAN);
        }
        return;
    }
    uint words[WORDS16];
    load_codes16(packed + n * shape.packed_row, chunk, words);
    const long group = n * shape.scales_row + chunk / (GROUP_SIZE / 16);
    store_values16(values_of(float(scales[group]), float(biases[group])), words, y);
}
