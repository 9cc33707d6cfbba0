// Codes, scales and biases of a weight, as `mx.quantize` makes them on a CPU: in float,
// with the true minimum and maximum, exact divisions, and halves rounded to even.
//
// The weight is one stream of groups, whatever its shape: rows are whole words. A
// simdgroup takes 32 * PER neighbours, PER to a lane: one group, or two of 16. Those are
// PER * BITS words.
//
// grid: (32 * a, b) threads in threadgroups of (256, 1), a * b simdgroups or more than
// are needed

#include "affine.h"

constant constexpr int PER = GROUP_SIZE < 32 ? 1 : GROUP_SIZE / 32;
constant constexpr int LANES = GROUP_SIZE < 32 ? 16 : 32;  // of a group
constant constexpr int GROUPS = 32 / LANES;  // of a simdgroup
constant constexpr int WIDTH = PER * BITS;  // bits of a lane, up to 64

// Lanes that a word has bits of, at most. Words begin within a lane's bits at multiples of
// the power of two that divides both.
constant constexpr int STEP = WIDTH == 64 ? 32 : WIDTH & -WIDTH;
constant constexpr int OWNERS = (31 + 2 * WIDTH - STEP) / WIDTH;

// As bits, which hold whatever a compiler thinks of NaN.
inline bool is_finite(float value) {
    return (as_type<uint>(value) & 0x7f800000u) != 0x7f800000u;
}

inline void load_weights(const device X* w, thread float* values) {
    if constexpr (X_VECTOR && PER % 4 == 0) {
#pragma clang loop unroll(full)
        for (int i = 0; i < PER; i += 4) {
            const vec<X, 4> four = *(const device vec<X, 4>*)(w + i);
            values[i] = float(four.x);
            values[i + 1] = float(four.y);
            values[i + 2] = float(four.z);
            values[i + 3] = float(four.w);
        }
    } else if constexpr (X_VECTOR && PER == 2) {
        const vec<X, 2> two = *(const device vec<X, 2>*)w;
        values[0] = float(two.x);
        values[1] = float(two.y);
    } else {
#pragma clang loop unroll(full)
        for (int i = 0; i < PER; ++i) {
            values[i] = float(w[i]);
        }
    }
}

// The smallest and the largest weight of the group. One that is not finite makes the
// largest infinite, and with it the scale, where the host sees it.
inline float2 range_of(const thread float* values) {
    float low = INFINITY;
    float high = -INFINITY;
#pragma clang loop unroll(full)
    for (int i = 0; i < PER; ++i) {
        const bool finite = is_finite(values[i]);
        low = min(low, finite ? values[i] : 0.0f);
        high = max(high, finite ? values[i] : INFINITY);
    }
#pragma clang loop unroll(full)
    for (int step = LANES / 2; step > 0; step /= 2) {
        low = min(low, simd_shuffle_xor(low, ushort(step)));
        high = max(high, simd_shuffle_xor(high, ushort(step)));
    }
    return float2(low, high);
}

// `low` with the sign of the first weight that equals it: zeros have two.
inline float first_of(const thread float* values, float low, uint lane) {
    uint first = 0xffffffffu;  // twice its place, and its sign
#pragma clang loop unroll(full)
    for (int i = 0; i < PER; ++i) {
        if (values[i] == low) {
            first = min(first, (lane * PER + i) * 2 + (as_type<uint>(values[i]) >> 31));
        }
    }
#pragma clang loop unroll(full)
    for (int step = LANES / 2; step > 0; step /= 2) {
        first = min(first, simd_shuffle_xor(first, ushort(step)));
    }
    return (first & 1u) == 1u ? -abs(low) : abs(low);
}

inline float2 scale_and_bias(const thread float* values, uint lane) {
    const float2 range = range_of(values);
    const float low = range.x;
    const float high = range.y;
    float scale = max((high - low) / float(MASK), 1e-7f);
    if constexpr (BITS == 1) {
        return float2(scale, first_of(values, low, lane));
    }
    // The end further from zero is met exactly, and zero too, if it is within reach.
    const bool from_low = abs(low) > abs(high);
    scale = from_low ? scale : -scale;
    const float edge = from_low ? low : high;
    const float steps = rint(edge / scale);
    return steps == 0.0f ? float2(scale, 0.0f) : float2(edge / steps, edge);
}

inline uint code_of(float value, float2 scale) {
    const float code = rint((value - scale.y) / scale.x);
    return code > 0.0f ? uint(min(code, float(MASK))) : 0u;  // NaN: 0
}

// Word w of the stream of all lanes, each of which has WIDTH bits. All must come here.
inline uint word_of(uint low, uint high, int w) {
    uint word = 0;
    const int first = w * 32 / WIDTH;
#pragma clang loop unroll(full)
    for (int i = 0; i < OWNERS; ++i) {
        const int owner = first + i;
        const ushort lane = ushort(min(owner, 31));
        ulong bits = simd_shuffle(low, lane);
        if (WIDTH > 32) {
            bits |= ulong(simd_shuffle(high, lane)) << 32;
        }
        const int shift = owner * WIDTH - w * 32;  // where in the word its bits begin
        if (owner < 32 && shift < 32) {
            word |= shift < 0 ? uint(bits >> -shift) : uint(bits << shift);
        }
    }
    return word;
}

kernel void quantize(
    const device X* w [[buffer(0)]],
    device uint* packed [[buffer(1)]],
    device X* scales [[buffer(2)]],
    device X* biases [[buffer(3)]],
    constant long& groups [[buffer(4)]],
    uint2 position [[thread_position_in_grid]],
    uint2 threads [[threads_per_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
    const long simdgroup = long(position.y) * (threads.x / 32) + position.x / 32;
    const long group = simdgroup * GROUPS + lane / LANES;
    if (simdgroup * GROUPS >= groups) {
        return;  // the whole simdgroup
    }
    const bool exists = group < groups;  // the last simdgroup may have half a run
    float values[PER];
    if (exists) {
        load_weights(w + (simdgroup * 32 + lane) * PER, values);
    } else {
#pragma clang loop unroll(full)
        for (int i = 0; i < PER; ++i) {
            values[i] = 0.0f;
        }
    }
    const float2 scale = scale_and_bias(values, lane);
    ulong bits = 0;
#pragma clang loop unroll(full)
    for (int i = 0; i < PER; ++i) {
        bits |= ulong(code_of(values[i], scale)) << (i * BITS);
    }
    if (exists && lane % LANES == 0) {
        scales[group] = X(scale.x);
        biases[group] = X(scale.y);
    }
    const int words = int(min(groups - simdgroup * GROUPS, long(GROUPS))) * WIDTH / GROUPS;
#pragma clang loop unroll(full)
    for (int base = 0; base < WIDTH; base += 32) {
        const int word = base + int(lane);
        const uint made = word_of(uint(bits), uint(bits >> 32), word);
        if (word < words) {
            packed[simdgroup * WIDTH + word] = made;
        }
    }
}
