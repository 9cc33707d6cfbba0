// half and bfloat: 16 bits of storage, computed in float and rounded after every operation.
#pragma once

#include "traits.hpp"

namespace msl {

namespace detail {

constexpr uint float_bits(float value) {
    return __builtin_bit_cast(uint, value);
}

// A 16-bit float's pattern, told from a number to convert.
struct pattern {
    ushort bits;
};

// Rounds the magnitude `bits` to a multiple of 2**dropped, ties to even, and shifts it down.
constexpr uint round_shift(uint bits, int dropped) {
    uint const kept = bits >> dropped;
    uint const half_way = (1u << (dropped - 1)) - 1u + (kept & 1u);
    return (bits + half_way) >> dropped;
}

constexpr ushort half_bits_exactly(float value) {
    uint const bits = float_bits(value);
    uint const sign = bits >> 16 & 0x8000u;
    uint const magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return ushort(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    }
    if (magnitude >= 0x47800000u) {  // 2**16 and more, infinity
        return ushort(sign | 0x7c00u);
    }
    if (magnitude >= 0x38800000u) {  // normal in half; a carry may still reach infinity
        return ushort(sign | round_shift(magnitude - 0x38000000u, 13));
    }
    int const dropped = 126 - int(magnitude >> 23);
    if (dropped > 24) {  // below half of the smallest subnormal
        return ushort(sign);
    }
    return ushort(sign | round_shift((magnitude & 0x7fffffu) | 0x800000u, dropped));
}

constexpr float half_value_exactly(ushort bits) {
    uint const sign = uint(bits & 0x8000) << 16;
    uint const magnitude = bits & 0x7fffu;
    if (magnitude < 0x400u) {  // zero and subnormals: a multiple of 2**-24
        float const value = float(magnitude) * 0x1p-24f;
        return sign ? -value : value;
    }
    uint const exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
    uint const quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return __builtin_bit_cast(float, sign | ((magnitude << 13) + exponent) | quiet);
}

#if defined(__CUDACC_RTC__)
// The instruction forgets a NaN's sign and payload, which x86 and Metal keep.
MSL_INLINE ushort half_bits_fast(float value) {
    if (value != value) {
        return half_bits_exactly(value);
    }
    ushort bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
MSL_INLINE float half_value_fast(ushort bits) {
    if ((bits & 0x7fffu) > 0x7c00u) {
        return half_value_exactly(bits);
    }
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#elif defined(__FLT16_MANT_DIG__) && (defined(__F16C__) || defined(__aarch64__))
MSL_INLINE ushort half_bits_fast(float value) {
    return __builtin_bit_cast(ushort, _Float16(value));
}
MSL_INLINE float half_value_fast(ushort bits) {
    return float(__builtin_bit_cast(_Float16, bits));
}
#elif defined(__F16C__)
// g++ before 13 and clang before 15 have no _Float16 here.
typedef float four_floats __attribute__((vector_size(16)));
typedef short eight_shorts __attribute__((vector_size(16)));
MSL_INLINE ushort half_bits_fast(float value) {
    return ushort(__builtin_ia32_vcvtps2ph(four_floats{value, 0, 0, 0}, 0)[0]);
}
MSL_INLINE float half_value_fast(ushort bits) {
    return __builtin_ia32_vcvtph2ps(eight_shorts{short(bits), 0, 0, 0, 0, 0, 0, 0})[0];
}
#elif defined(__aarch64__)
MSL_INLINE ushort half_bits_fast(float value) {
    return __builtin_bit_cast(ushort, __fp16(value));
}
MSL_INLINE float half_value_fast(ushort bits) {
    return float(__builtin_bit_cast(__fp16, bits));
}
#else
MSL_INLINE ushort half_bits_fast(float value) {
    return half_bits_exactly(value);
}
MSL_INLINE float half_value_fast(ushort bits) {
    return half_value_exactly(bits);
}
#endif

MSL_INLINE constexpr ushort half_bits(float value) {
    return __builtin_is_constant_evaluated() ? half_bits_exactly(value)
                                             : half_bits_fast(value);
}
MSL_INLINE constexpr float half_value(ushort bits) {
    return __builtin_is_constant_evaluated() ? half_value_exactly(bits)
                                             : half_value_fast(bits);
}

MSL_INLINE constexpr ushort bfloat_bits(float value) {
    uint const bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {  // rounding could turn a NaN into infinity
        return ushort(bits >> 16 | 0x40u);
    }
    return ushort((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
MSL_INLINE constexpr float bfloat_value(ushort bits) {
    return __builtin_bit_cast(float, uint(bits) << 16);
}

template <class S>
using enable_integer = metal::enable_if_t<kind_of<S> == integer, int>;
template <class S>
using enable_float = metal::enable_if_t<kind_of<S> == float_kind, int>;

}  // namespace detail

// An operation on the 16-bit type `T`, also with integers (which become T), rounded once.
#define MSL_ARITHMETIC(T, op)                                   \
    friend MSL_INLINE constexpr T operator op(T a, T b) {       \
        return T(float(a) op float(b));                         \
    }                                                           \
    template <class S, detail::enable_integer<S> = 0>           \
    friend MSL_INLINE constexpr T operator op(T a, S b) {       \
        return a op T(b);                                       \
    }                                                           \
    template <class S, detail::enable_integer<S> = 0>           \
    friend MSL_INLINE constexpr T operator op(S a, T b) {       \
        return T(a) op b;                                       \
    }                                                           \
    template <class S, detail::enable_float<S> = 0>             \
    friend MSL_INLINE constexpr float operator op(T a, S b) {   \
        return float(a) op b;                                   \
    }                                                           \
    template <class S, detail::enable_float<S> = 0>             \
    friend MSL_INLINE constexpr float operator op(S a, T b) {   \
        return a op float(b);                                   \
    }                                                           \
    template <class S>                                          \
    friend MSL_INLINE constexpr T& operator op##=(T & a, S b) { \
        return a = T(a op b);                                   \
    }                                                           \
    friend MSL_INLINE constexpr float& operator op##=(float& a, T b) { \
        return a = a op float(b);                               \
    }

#define MSL_COMPARISON(T, op)                                \
    friend MSL_INLINE constexpr bool operator op(T a, T b) { \
        return float(a) op float(b);                         \
    }                                                        \
    template <class S, detail::enable_integer<S> = 0>        \
    friend MSL_INLINE constexpr bool operator op(T a, S b) { \
        return a op T(b);                                    \
    }                                                        \
    template <class S, detail::enable_integer<S> = 0>        \
    friend MSL_INLINE constexpr bool operator op(S a, T b) { \
        return T(a) op b;                                    \
    }                                                        \
    template <class S, detail::enable_float<S> = 0>          \
    friend MSL_INLINE constexpr bool operator op(T a, S b) { \
        return float(a) op b;                                \
    }                                                        \
    template <class S, detail::enable_float<S> = 0>          \
    friend MSL_INLINE constexpr bool operator op(S a, T b) { \
        return a op float(b);                                \
    }

#define MSL_16_BIT_OPERATORS(T)                                 \
    MSL_ARITHMETIC(T, +)                                        \
    MSL_ARITHMETIC(T, -)                                        \
    MSL_ARITHMETIC(T, *)                                        \
    MSL_ARITHMETIC(T, /)                                        \
    MSL_COMPARISON(T, ==)                                       \
    MSL_COMPARISON(T, !=)                                       \
    MSL_COMPARISON(T, <)                                        \
    MSL_COMPARISON(T, <=)                                       \
    MSL_COMPARISON(T, >)                                        \
    MSL_COMPARISON(T, >=)                                       \
    MSL_INLINE constexpr T operator+() const { return *this; }  \
    MSL_INLINE constexpr T operator-() const {                  \
        return T(detail::pattern{ushort(bits ^ 0x8000)});       \
    }                                                           \
    MSL_INLINE constexpr T& operator++() { return *this += 1; } \
    MSL_INLINE constexpr T& operator--() { return *this -= 1; } \
    MSL_INLINE constexpr T operator++(int) {                    \
        T const before = *this;                                 \
        ++*this;                                                \
        return before;                                          \
    }                                                           \
    MSL_INLINE constexpr T operator--(int) {                    \
        T const before = *this;                                 \
        --*this;                                                \
        return before;                                          \
    }

// IEEE 754 binary16; converts implicitly from and to every arithmetic type.
struct half {
    ushort bits;

    half() = default;
    MSL_INLINE constexpr explicit half(detail::pattern p) : bits(p.bits) {}
    template <class S, detail::enable_integer<S> = 0>
    MSL_INLINE constexpr half(S value) : bits(detail::half_bits(float(value))) {}
    template <class S, detail::enable_float<S> = 0>
    MSL_INLINE constexpr half(S value) : bits(detail::half_bits(value)) {}
    MSL_INLINE constexpr explicit half(bfloat value);
    MSL_INLINE constexpr operator float() const { return detail::half_value(bits); }

    MSL_16_BIT_OPERATORS(half)
};

// The upper half of a float; converts implicitly only to float, and from integers.
struct bfloat {
    ushort bits;

    bfloat() = default;
    MSL_INLINE constexpr explicit bfloat(detail::pattern p) : bits(p.bits) {}
    template <class S, detail::enable_integer<S> = 0>
    MSL_INLINE constexpr bfloat(S value) : bits(detail::bfloat_bits(float(value))) {}
    template <class S, detail::enable_float<S> = 0>
    MSL_INLINE constexpr explicit bfloat(S value) : bits(detail::bfloat_bits(value)) {}
    MSL_INLINE constexpr explicit bfloat(half value)
        : bits(detail::bfloat_bits(float(value))) {}

    // A template binds to float alone, where a plain `operator float` would also lead on
    // to every integer type and make `condition ? value : 0` an int.
    template <class S, detail::enable_float<S> = 0>
    MSL_INLINE constexpr operator S() const {
        return detail::bfloat_value(bits);
    }
    template <class S, detail::enable_integer<S> = 0>
    MSL_INLINE constexpr explicit operator S() const {
        return S(detail::bfloat_value(bits));
    }

    MSL_16_BIT_OPERATORS(bfloat)
};

MSL_INLINE constexpr half::half(bfloat value) : bits(detail::half_bits(float(value))) {}

// Together they meet in float.
#define MSL_MIXED(op, result)                                   \
    MSL_INLINE constexpr result operator op(half a, bfloat b) { \
        return float(a) op float(b);                            \
    }                                                           \
    MSL_INLINE constexpr result operator op(bfloat a, half b) { \
        return float(a) op float(b);                            \
    }
MSL_MIXED(+, float)
MSL_MIXED(-, float)
MSL_MIXED(*, float)
MSL_MIXED(/, float)
MSL_MIXED(==, bool)
MSL_MIXED(!=, bool)
MSL_MIXED(<, bool)
MSL_MIXED(<=, bool)
MSL_MIXED(>, bool)
MSL_MIXED(>=, bool)

#undef MSL_MIXED
#undef MSL_16_BIT_OPERATORS
#undef MSL_COMPARISON
#undef MSL_ARITHMETIC

}  // namespace msl
