// What the kernels share: types, sizes, and how codes are taken out of words.
//
// The host writes these definitions before the text:
//   BITS, GROUP_SIZE  the format: w = code * scale + bias, one pair for GROUP_SIZE codes
//   X_TYPE            of inputs, results and the linear bias
//   SCALE_TYPE        of scales and biases
//   ALIGNED           1 if every packed row begins at a multiple of 16 bytes
//   X_VECTOR          1 if x has unit stride and rows that begin at a multiple of 16 bytes
//   PERMUTED          1 if stored column k belongs to input channel permutation[k]
//   BIASED            1 if a linear bias is added to the product
//   EXPERTS           0: one matrix; otherwise there is one for each expert, and
//                     1: experts[t] is the expert of row t of x
//                     2: rows are sorted, those of expert e end at experts[e]
//   EXPERT_TYPE       int or long
// A row of codes is one little-endian stream of bits, whole words long.

#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

typedef X_TYPE X;
typedef SCALE_TYPE Scale;

constant constexpr uint MASK = (1u << BITS) - 1u;

// Strides are in elements. W is [N, K], or [E, N, K]; its rows need not be contiguous.
struct Shape {
    long m, n, k;
    long x_row, x_column;
    long packed_row, scales_row;
    long bias_row, bias_column;
    long experts, packed_expert, scales_expert;
};

// ---- codes ----------------------------------------------------------------------

template <int COUNT>
inline void load_words(const device uint* from, thread uint* words) {
    if constexpr (ALIGNED && COUNT % 4 == 0) {
#pragma clang loop unroll(full)
        for (int i = 0; i < COUNT; i += 4) {
            const uint4 four = *(const device uint4*)(from + i);
            words[i] = four.x;
            words[i + 1] = four.y;
            words[i + 2] = four.z;
            words[i + 3] = four.w;
        }
    } else if constexpr (ALIGNED && COUNT % 2 == 0) {
#pragma clang loop unroll(full)
        for (int i = 0; i < COUNT; i += 2) {
            const uint2 two = *(const device uint2*)(from + i);
            words[i] = two.x;
            words[i + 1] = two.y;
        }
    } else {
#pragma clang loop unroll(full)
        for (int i = 0; i < COUNT; ++i) {
            words[i] = from[i];
        }
    }
}

// 16 codes are BITS half words; of an odd number the last word is half filled.
constant constexpr int WORDS16 = (BITS + 1) / 2;

inline void load_codes16(const device uint* row, int chunk, thread uint* words) {
    if constexpr (BITS % 2 == 0) {
        load_words<BITS / 2>(row + chunk * (BITS / 2), words);
    } else {
        const device ushort* from = (const device ushort*)row + chunk * BITS;
#pragma clang loop unroll(full)
        for (int i = 0; i < BITS; i += 2) {
            words[i / 2] = from[i];
            if (i + 1 < BITS) {
                words[i / 2] |= uint(from[i + 1]) << 16;
            }
        }
    }
}

// Code k of a run that begins at words[0].
inline uint code_at(const thread uint* words, int k) {
    const int word = k * BITS / 32;
    const int shift = k * BITS % 32;
    uint bits = words[word] >> shift;
    if (shift + BITS > 32) {
        bits |= words[word + 1] << (32 - shift);
    }
    return bits & MASK;
}

// Code k left where it lies in its word: its value times 2^place. Masks alone take it out,
// and a scale divided by that power, once for many codes, gives the same weight.
inline float placed_code(const thread uint* words, int k) {
    const int shift = k * BITS % 32;
    if (shift + BITS > 32) {
        return float(code_at(words, k));
    }
    const uint word = words[k * BITS / 32];
    if (shift < 16) {
        return float(word & (MASK << shift));
    }
    return float((word >> 16) & (MASK << (shift - 16)));
}

inline float unplaced(float scale, int k) {
    const int shift = k * BITS % 32;
    const int place = shift + BITS > 32 ? 0 : shift % 16;
    return scale * (1.0f / float(1 << place));
}

// ---- x --------------------------------------------------------------------------

// Where the channel of stored column k lies in a row of x.
inline long column_of(const device int* permutation, constant Shape& shape, int k) {
    return (PERMUTED ? long(permutation[k]) : long(k)) * shape.x_column;
}

// Two 16-bit numbers in one word.
inline void load_pair(uint word, thread float* values) {
    if constexpr (is_same<X, half>::value) {
        const half2 two = as_type<half2>(word);
        values[0] = float(two.x);
        values[1] = float(two.y);
    } else {
        values[0] = as_type<float>(word << 16);
        values[1] = as_type<float>(word & 0xffff0000u);
    }
}

// Eight channels of a row of x, from stored column k on.
inline void load_x8(
    const device X* row,
    const device int* permutation,
    constant Shape& shape,
    int k,
    thread float* values) {
    if constexpr (X_VECTOR && !PERMUTED && sizeof(X) == 2) {
        const uint4 words = *(const device uint4*)(row + k);
        load_pair(words.x, values);
        load_pair(words.y, values + 2);
        load_pair(words.z, values + 4);
        load_pair(words.w, values + 6);
    } else if constexpr (X_VECTOR && !PERMUTED) {
#pragma clang loop unroll(full)
        for (int i = 0; i < 8; i += 4) {
            const vec<X, 4> four = *(const device vec<X, 4>*)(row + k + i);
            values[i] = float(four.x);
            values[i + 1] = float(four.y);
            values[i + 2] = float(four.z);
            values[i + 3] = float(four.w);
        }
    } else {
#pragma clang loop unroll(full)
        for (int i = 0; i < 8; ++i) {
            values[i] = float(row[column_of(permutation, shape, k + i)]);
        }
    }
}

inline float bias_at(const device X* bias, constant Shape& shape, long m, long n) {
    return BIASED ? float(bias[m * shape.bias_row + n * shape.bias_column]) : 0.0f;
}

// ---- rows for products with few vectors -----------------------------------------
//
// A simdgroup takes some rows of W, a lane 32 neighbouring codes of each at a time. The
// scales of 32 groups are loaded at once, one by each lane, and shared: each is read once.
// 32 groups are STEPS times 32 lanes times 32 codes; of 16, there are 64 groups.

constant constexpr int STEPS = GROUP_SIZE < 32 ? 1 : GROUP_SIZE / 32;

// Groups that a run of 32 codes lies in.
constant constexpr int HALVES = GROUP_SIZE == 16 ? 2 : 1;

// K is divided among simdgroups by multiples of this many runs: lanes are then busy, and
// the scales of each part are whole 32-byte sectors.
constant constexpr int UNIT = GROUP_SIZE <= 64 ? 32 : GROUP_SIZE / 2;

struct Rows {
    const device uint* packed;
    const device Scale* scales;
    const device Scale* biases;
    int count;  // that exist
};

inline Rows rows_from(
    const device uint* packed,
    const device Scale* scales,
    const device Scale* biases,
    constant Shape& shape,
    long n,
    int most) {
    Rows rows;
    rows.packed = packed + n * shape.packed_row;
    rows.scales = scales + n * shape.scales_row;
    rows.biases = biases + n * shape.scales_row;
    rows.count = int(min(long(most), shape.n - n));
    return rows;
}

// The runs of one part of K: first and one past the last.
inline int2 runs_of_part(constant Shape& shape, int part, int parts) {
    const int runs = (int(shape.k) + 31) / 32;
    const int share = (runs + parts * UNIT - 1) / (parts * UNIT) * UNIT;
    const int begin = min(part * share, runs);
    return int2(begin, min(begin + share, runs));
}

// Whether the run has 16 codes only, which groups of 16 allow at the end of a row.
inline bool is_half(constant Shape& shape, int run) {
    return HALVES == 2 && run * 32 + 16 == int(shape.k);
}

// Scales [ROWS][HALVES]: of the groups from run `block` on, up to run `end`, each lane takes
// every 32nd, so that no sector is loaded twice. WHOLE: all rows exist.
template <int ROWS, bool WHOLE>
inline void load_scales(
    Rows rows, constant Shape& shape, int block, int end, int lane, thread float2* own) {
    const int first = block * 32 / GROUP_SIZE + lane;
    const int groups = min(int(shape.k), end * 32) / GROUP_SIZE;
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; ++r) {
#pragma clang loop unroll(full)
        for (int h = 0; h < HALVES; ++h) {
            const int group = first + 32 * h;
            own[r * HALVES + h] = float2(0.0f);
            if (group < groups && (WHOLE || r < rows.count)) {
                const long at = long(r) * shape.scales_row + group;
                own[r * HALVES + h] =
                    float2(float(rows.scales[at]), float(rows.biases[at]));
            }
        }
    }
}

// What this lane needs in a step of the scales that others loaded. All lanes must come here.
template <int ROWS>
inline void share_scales(const thread float2* own, int step, int lane, thread float2* scales) {
#pragma clang loop unroll(full)
    for (int i = 0; i < ROWS * HALVES; ++i) {
        if constexpr (HALVES == 2) {
            const ushort from = ushort((2 * lane + i % 2) % 32);
            const float2 low = simd_shuffle(own[i / 2 * 2], from);
            const float2 high = simd_shuffle(own[i / 2 * 2 + 1], from);
            scales[i] = lane < 16 ? low : high;
        } else if constexpr (STEPS > 1) {
            scales[i] = simd_shuffle(own[i], ushort((32 * step + lane) / STEPS));
        } else {
            scales[i] = own[i];
        }
    }
}

// Words [ROWS][BITS] of a run.
template <int ROWS, bool WHOLE>
inline void load_runs(Rows rows, constant Shape& shape, int run, thread uint* words) {
#pragma clang loop unroll(full)
    for (int r = 0; r < ROWS; ++r) {
        if (!WHOLE && r >= rows.count) {
            continue;
        }
        const device uint* from = rows.packed + long(r) * shape.packed_row + run * BITS;
        if (is_half(shape, run)) {
            load_words<BITS / 2>(from, words + r * BITS);
#pragma clang loop unroll(full)
            for (int i = BITS / 2; i < BITS; ++i) {
                words[r * BITS + i] = 0;
            }
        } else {
            load_words<BITS>(from, words + r * BITS);
        }
    }
}

// ---- codes of an 8x8 matrix -----------------------------------------------------
//
// A lane holds two neighbours of a row of each 8x8 matrix. Where the order of columns is
// free, those are codes 2 f and 2 f + 1 of a run of 16, in the f-th of eight matrices: a
// lane needs one row, one scale and one bias for all of them.

// The row of this lane's two elements, and which of the four pairs in it.
inline int row_in_matrix(uint lane) {
    return lane / 16 * 4 + lane / 2 % 4;
}

inline int pair_in_matrix(uint lane) {
    return lane / 8 % 2 * 2 + lane % 2;
}

struct Codes {
    uint words[WORDS16];
    float scale, bias;
};

// Sixteen codes of row n from column k on; zero where there are none.
inline Codes load_codes(
    const device uint* packed,
    const device Scale* scales,
    const device Scale* biases,
    constant Shape& shape,
    long n,
    long k) {
    Codes codes;
    codes.scale = 0.0f;
    codes.bias = 0.0f;
#pragma clang loop unroll(full)
    for (int i = 0; i < WORDS16; ++i) {
        codes.words[i] = 0;
    }
    if (n < shape.n && k < shape.k) {
        load_codes16(packed + n * shape.packed_row, int(k) / 16, codes.words);
        const long at = n * shape.scales_row + k / GROUP_SIZE;
        codes.scale = float(scales[at]);
        codes.bias = float(biases[at]);
    }
    return codes;
}

// What this lane holds of the f-th matrix.
inline float2 weights_of(const thread Codes& codes, int f) {
    const float low = float(code_at(codes.words, 2 * f));
    const float high = float(code_at(codes.words, 2 * f + 1));
    return float2(
        fma(low, codes.scale, codes.bias), fma(high, codes.scale, codes.bias));
}

// A matrix of which this lane holds the two.
inline void set_elements(thread simdgroup_matrix<float, 8, 8>& matrix, float2 two) {
    matrix.thread_elements()[0] = two.x;
    matrix.thread_elements()[1] = two.y;
}

// ---- experts --------------------------------------------------------------------

// Rows of x that one threadgroup takes, and their expert.
struct Tile {
    long first, end;  // rows of x
    int expert;
};

#if EXPERTS
// The expert of row t of x. -1: rows past the last end, whose result is zero.
// -2: an index that is no expert, whose result is NaN. All lanes get the same.
inline int expert_of(
    const device EXPERT_TYPE* experts, constant Shape& shape, long t, uint lane) {
    if constexpr (EXPERTS == 1) {
        const long expert = experts[t];
        return expert < 0 || expert >= shape.experts ? -2 : int(expert);
    } else {
        int before = 0;  // experts whose rows end at t or before
        for (long e = lane; e < shape.experts; e += 32) {
            before += long(experts[e]) <= t ? 1 : 0;
        }
        before = simd_sum(before);
        return before == int(shape.experts) ? -1 : before;
    }
}

inline X without_expert(int expert) {
    return expert == -1 ? X(0.0f) : X(NAN);
}

// Which rows the threadgroup at `index` has: the experts' rows are cut into tiles of `most`
// one after the other. None left: first == end.
inline Tile tile_at(
    const device EXPERT_TYPE* ends,
    constant Shape& shape,
    int index,
    int most,
    uint lane) {
    Tile tile = {0, 0, -1};
    int before = 0;  // tiles of the experts so far
    for (long base = 0; base < shape.experts; base += 32) {
        const long e = base + lane;
        const bool is_expert = e < shape.experts;
        const long first = is_expert && e > 0 ? long(ends[e - 1]) : 0;
        const long end = is_expert ? min(long(ends[e]), shape.m) : 0;
        const int count = end > first ? int((end - first + most - 1) / most) : 0;
        const int upto = before + simd_prefix_inclusive_sum(count);
        const bool mine = index < upto && index >= upto - count;
        const int owner = simd_min(mine ? int(lane) : 32);
        if (owner < 32) {
            const long from = first + long(index - (upto - count)) * most;
            tile.first = simd_shuffle(int(from), ushort(owner));
            tile.end = simd_shuffle(int(min(from + most, end)), ushort(owner));
            tile.expert = int(base) + owner;
            return tile;
        }
        before = simd_shuffle(upto, ushort(31));
    }
    return tile;
}
#endif

// ---- values ---------------------------------------------------------------------
//
// A weight is code * scale + bias rounded once, to X: fma does that for float. For the
// others float would be a rounding in between, so it is made odd first: of the two floats
// around a number that is none, the one whose last bit is set. That still tells on which
// side of a tie the number lies, and casting it rounds as if from the number itself.
//
// Every product below that takes part in a sum is exact, so it is the same whether the
// compiler fuses the two or not.

// a + b - sum, where sum is a + b rounded.
inline float rest_of_sum(float a, float b, float sum) {
    const float other = sum - a;
    return (a - (sum - other)) + (b - other);
}

// A number of the sign of code * scale + bias - nearest, where nearest is that rounded.
inline float rest_of(float code, float scale, float bias, float nearest) {
    if constexpr (!is_same<Scale, float>::value) {
        return rest_of_sum(code * scale, bias, nearest);  // 8 bits times 11: exact
    } else {
        const float high = as_type<float>(as_type<uint>(scale) & 0xffff0000u);
        const float product = code * high + code * (scale - high);  // 8 + 8 and 8 + 16 bits
        const float low = fma(code, scale, -product);
        const float rest = bias + low;
        const float sum = product + rest;
        const float near = (sum - nearest) + rest_of_sum(product, rest, sum);
        return near + rest_of_sum(bias, low, rest);
    }
}

// Unequal to what is rounded, towards it, and with its last bit set.
inline float made_odd(float nearest, float rest) {
    const uint bits = as_type<uint>(nearest);
    if (rest == 0.0f || (bits & 1u) == 1u) {
        return nearest;
    }
    if (rest > 0.0f || rest < 0.0f) {
        return as_type<float>((rest > 0.0f) == (nearest > 0.0f) ? bits + 1 : bits - 1);
    }
    return nearest;  // infinite, or NaN
}

// Weight by weight for 16 codes of one group.
struct Values {
    float scale, bias;
    float up;  // a power of two that was taken out of both
};

inline Values values_of(float scale, float bias) {
    Values values = {scale, bias, 1.0f};
    if constexpr (!is_same<X, float>::value && !is_same<Scale, half>::value) {
        // code * scale could be infinite where the sum is not.
        if (abs(scale) > 1e30f && abs(bias) > 1e30f) {
            values.up = 1024.0f;
            values.scale *= 1.0f / 1024.0f;
            values.bias *= 1.0f / 1024.0f;
        }
    }
    return values;
}

inline X value_of(const thread Values& values, uint code) {
    const float factor = float(code);
    const float nearest = fma(factor, values.scale, values.bias);
    if constexpr (is_same<X, float>::value) {
        return X(nearest);
    } else {
        const float rest = rest_of(factor, values.scale, values.bias, nearest);
        return X(made_odd(nearest, rest) * values.up);
    }
}

// Sixteen weights to where 16 elements begin at a multiple of 16 bytes.
inline void store_values16(const thread Values& values, const thread uint* words, device X* y) {
#pragma clang loop unroll(full)
    for (int i = 0; i < 16; i += 4) {
        vec<X, 4> four;
        four.x = value_of(values, code_at(words, i));
        four.y = value_of(values, code_at(words, i + 1));
        four.z = value_of(values, code_at(words, i + 2));
        four.w = value_of(values, code_at(words, i + 3));
        *(device vec<X, 4>*)(y + i) = four;
    }
}
