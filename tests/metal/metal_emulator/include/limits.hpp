// numeric_limits of every scalar type.
#pragma once

#include "half.hpp"

namespace msl {

namespace detail {

// A floating-point type by its number of significant bits and its largest exponent.
template <class T, int significant, int exponent, class Bits>
struct float_limits {
    static constexpr bool is_specialized = true;
    static constexpr bool is_signed = true;
    static constexpr bool is_integer = false;
    static constexpr bool is_exact = false;
    static constexpr bool is_bounded = true;
    static constexpr bool is_modulo = false;
    static constexpr bool has_infinity = true;
    static constexpr bool has_quiet_NaN = true;
    static constexpr bool has_signaling_NaN = true;
    static constexpr int radix = 2;
    static constexpr int digits = significant;
    static constexpr int digits10 = (significant - 1) * 30103 / 100000;
    static constexpr int max_digits10 = 2 + significant * 30103 / 100000;
    static constexpr int max_exponent = exponent;
    static constexpr int min_exponent = 3 - exponent;
    static constexpr int max_exponent10 = exponent * 30103 / 100000;
    static constexpr int min_exponent10 = -((exponent - 2) * 30103 / 100000);

    static constexpr T of(uint bits) { return __builtin_bit_cast(T, Bits(bits)); }
    static constexpr uint one_exponent = 1u << (significant - 1);
    static constexpr uint infinite = (2u * exponent - 1u) << (significant - 1);

    static constexpr T min() { return of(one_exponent); }
    static constexpr T max() { return of(infinite - 1u); }
    static constexpr T lowest() { return -max(); }
    static constexpr T denorm_min() { return of(1u); }
    static constexpr T infinity() { return of(infinite); }
    static constexpr T quiet_NaN() { return of(infinite | one_exponent >> 1); }
    static constexpr T signaling_NaN() { return of(infinite | one_exponent >> 2); }
    static constexpr T epsilon() {
        return of(uint(exponent - significant) << (significant - 1));
    }
    static constexpr T round_error() { return of(uint(exponent - 2) << (significant - 1)); }
};

template <class T>
struct integer_limits {
    static constexpr bool is_specialized = true;
    static constexpr bool is_signed = metal::is_signed_v<T>;
    static constexpr bool is_integer = true;
    static constexpr bool is_exact = true;
    static constexpr bool is_bounded = true;
    static constexpr bool is_modulo = !is_signed;
    static constexpr bool has_infinity = false;
    static constexpr bool has_quiet_NaN = false;
    static constexpr bool has_signaling_NaN = false;
    static constexpr int radix = 2;
    static constexpr int digits =
        metal::is_same_v<T, bool> ? 1 : int(sizeof(T)) * 8 - (is_signed ? 1 : 0);
    static constexpr int digits10 = digits * 30103 / 100000;

    static constexpr T max() { return T(~0ul >> (64 - digits)); }
    static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
    static constexpr T lowest() { return min(); }
    static constexpr T epsilon() { return T(0); }
    static constexpr T infinity() { return T(0); }
    static constexpr T quiet_NaN() { return T(0); }
};

struct no_limits {
    static constexpr bool is_specialized = false;
};

template <class T>
using limits_of = metal::conditional_t<kind_of<T> == integer, integer_limits<T>, no_limits>;

}  // namespace detail

namespace metal {

template <class T>
struct numeric_limits : detail::limits_of<T> {};
template <class T>
struct numeric_limits<T const> : numeric_limits<T> {};
template <>
struct numeric_limits<half> : detail::float_limits<half, 11, 16, ushort> {};
template <>
struct numeric_limits<bfloat> : detail::float_limits<bfloat, 8, 128, ushort> {};
template <>
struct numeric_limits<float> : detail::float_limits<float, 24, 128, uint> {};

}  // namespace metal

}  // namespace msl
