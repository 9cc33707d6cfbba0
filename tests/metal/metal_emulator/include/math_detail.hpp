// What math.hpp builds on: which arguments fit together and what a call returns, the walk
// over components, and functions of scalars.
#pragma once

#if defined(__CUDACC_RTC__)
#define MSL_LIBM(name) ::name##f
#else
#define MSL_LIBM(name) __builtin_##name##f
#endif

namespace msl {

// ---------------------------------------------------------------- arguments and results

namespace math_detail {

using metal::conditional_t;
using metal::enable_if_t;
using metal::is_floating_point_v;
using metal::is_integral_v;
using metal::is_same_v;
using metal::is_signed_v;
using metal::make_unsigned_t;

template <class T, int N>
using shaped = conditional_t<N == 1, T, vec<T, N>>;

template <class... A>
constexpr int widest() {
    int size = 1;
    ((size = msl_vec_size<A> > size ? msl_vec_size<A> : size), ...);
    return size;
}

// The first vector among the arguments, or the first argument.
template <class A, class... More>
struct leading {
    using type = A;
};
template <class A, class B, class... More>
struct leading<A, B, More...> {
    using rest = typename leading<B, More...>::type;
    using type = conditional_t<(msl_vec_size<A> == 1 && msl_vec_size<rest> > 1), rest, A>;
};
template <class... A>
using leading_element = msl_element_type<typename leading<A...>::type>;

// Vectors must agree with the result in type and size; scalars, beside vectors, convert.
template <class A, class T, int N>
inline constexpr bool fits =
    msl_vec_size<A> == 1 ? (N > 1 ? is_integral_v<A> || is_floating_point_v<A>
                              : is_same_v<A, T>)
                     : msl_vec_size<A> == N && is_same_v<msl_element_type<A>, T>;

// The type that overloads for float, half and bfloat would settle on for scalars: integers
// convert to anything, bfloat to float alone, and half next to float stays ambiguous.
template <bool has_float, bool has_half, bool has_bfloat>
struct settled {};
template <bool has_bfloat>
struct settled<true, false, has_bfloat> {
    using type = float;
};
template <>
struct settled<false, true, true> {
    using type = float;
};
template <>
struct settled<false, true, false> {
    using type = half;
};
template <>
struct settled<false, false, true> {
    using type = bfloat;
};

template <bool vectors, class... A>
struct float_call;
template <class... A>
struct float_call<false, A...>
    : settled<(is_same_v<A, float> || ...), (is_same_v<A, half> || ...),
              (is_same_v<A, bfloat> || ...)> {
    static constexpr bool valid =
        ((is_integral_v<A> || is_floating_point_v<A>) && ...);
};
template <class... A>
struct float_call<true, A...> {
    using type = leading_element<A...>;
    static constexpr bool valid =
        is_floating_point_v<type> && (fits<A, type, widest<A...>()> && ...);
};

// What a function over floating-point numbers computes in, unless it does not apply.
template <class... A>
using float_type =
    enable_if_t<float_call<(widest<A...>() > 1), A...>::valid,
                typename float_call<(widest<A...>() > 1), A...>::type>;
template <class... A>
using float_result = shaped<float_type<A...>, widest<A...>()>;

// The same for functions that exist for integers and floating-point numbers alike.
template <bool small_floats, class... A>
struct same_call {
    using type = leading_element<A...>;
    static constexpr bool valid = (is_integral_v<type> || is_floating_point_v<type>) &&
                                  (fits<A, type, widest<A...>()> && ...);
};
template <class... A>
struct same_call<true, A...> {  // a float beside a bfloat
    using type = float;
    static constexpr bool valid = true;
};
template <class... A>
inline constexpr bool bfloat_beside_float =
    (is_same_v<A, float> || ...) && (is_same_v<A, bfloat> || ...) &&
    ((is_same_v<A, float> || is_same_v<A, bfloat>) && ...);
template <class... A>
using same_type = enable_if_t<same_call<bfloat_beside_float<A...>, A...>::valid,
                              typename same_call<bfloat_beside_float<A...>, A...>::type>;
template <class... A>
using same_result = shaped<same_type<A...>, widest<A...>()>;

template <class... A>
using integer_type = enable_if_t<is_integral_v<same_type<A...>>, same_type<A...>>;
template <class... A>
using integer_result = shaped<integer_type<A...>, widest<A...>()>;

// A scalar, or component i of a vector, as a `Via` and then as a `To`.
template <class Via, class To, class A>
MSL_INLINE To part(A const& a, int i) {
    if constexpr (msl_vec_size<A> == 1) {
        return static_cast<To>(static_cast<Via>(a));
    } else {
        return static_cast<To>(static_cast<Via>(a[i]));
    }
}

// f over the components of the arguments.
template <class Result, class Via, class To, class F, class... A>
MSL_INLINE Result each(F f, A const&... a) {
    if constexpr (msl_vec_size<Result> == 1) {
        return static_cast<Result>(f(part<Via, To>(a, 0)...));
    } else {
        Result result;
        for (int i = 0; i < msl_vec_size<Result>; i++) {
            result[i] = static_cast<msl_element_type<Result>>(f(part<Via, To>(a, i)...));
        }
        return result;
    }
}

// ---------------------------------------------------------------- scalar building blocks

// A NaN loses against a number.
template <class T>
MSL_INLINE T lesser(T x, T y) {
    if constexpr (is_floating_point_v<T>) {
        if (x != x) {
            return y;
        }
    }
    return y < x ? y : x;
}
template <class T>
MSL_INLINE T greater(T x, T y) {
    if constexpr (is_floating_point_v<T>) {
        if (x != x) {
            return y;
        }
    }
    return x < y ? y : x;
}
template <class T>
MSL_INLINE T middle(T x, T y, T z) {
    return greater(lesser(x, y), lesser(greater(x, y), z));
}

inline constexpr float infinity = __builtin_bit_cast(float, 0x7f800000u);
inline constexpr float not_a_number = __builtin_bit_cast(float, 0x7fc00000u);
inline constexpr float pi = 3.14159265358979323846f;

MSL_INLINE bool is_nan(float x) {
    return x != x;
}
MSL_INLINE bool is_infinite(float x) {
    return x == infinity || x == -infinity;
}
MSL_INLINE float limited(float x, float low, float high) {
    return lesser(greater(x, low), high);
}

// sin(pi x) and cos(pi x).  Taking multiples of 2 away is exact, and so is the distance
// to a half or a whole turn where the function is close to zero.
MSL_INLINE float sin_of_half_turns(float x) {
    float const turn = x - 2.0f * MSL_LIBM(rint)(0.5f * x);
    float const size = MSL_LIBM(fabs)(turn);
    float const value = MSL_LIBM(sin)(pi * (size > 0.5f ? 1.0f - size : size));
    return MSL_LIBM(copysign)(value, turn);
}
MSL_INLINE float cos_of_half_turns(float x) {
    float const size = MSL_LIBM(fabs)(x - 2.0f * MSL_LIBM(rint)(0.5f * x));
    return size < 0.25f ? MSL_LIBM(cos)(pi * size) : MSL_LIBM(sin)(pi * (0.5f - size));
}

MSL_INLINE float hermite(float low, float high, float x) {
    float const t = limited((x - low) / (high - low), 0.0f, 1.0f);
    return t * t * (3.0f - 2.0f * t);
}

// The neighbour of x towards y in x's own format.
template <class T>
MSL_INLINE T next_after(T x, T y) {
    using bits_type = conditional_t<sizeof(T) == 2, ushort, uint>;
    if (x != x || x == y) {
        return x != x ? x : y;
    }
    if (y != y) {
        return y;
    }
    if (x == T(0)) {
        uint const sign = y < T(0) ? 1u << (8 * sizeof(T) - 1) : 0u;
        return as_type<T>(bits_type(sign | 1u));
    }
    bits_type const bits = as_type<bits_type>(x);
    bool const away_from_zero = (x < y) == (x > T(0));
    return as_type<T>(bits_type(away_from_zero ? bits + 1 : bits - 1));
}

template <class T>
inline constexpr int width = int(sizeof(T)) * 8;

MSL_INLINE int ones(ulong x) {
#if defined(__CUDACC_RTC__)
    return ::__popcll(x);
#else
    return __builtin_popcountll(x);
#endif
}

// Leading zeros of a T, all of them for zero.
template <class T>
MSL_INLINE T leading_zeros(T x) {
    ulong const bits = make_unsigned_t<T>(x);
    if (bits == 0) {
        return T(width<T>);
    }
#if defined(__CUDACC_RTC__)
    return T(::__clzll(long(bits)) - (64 - width<T>));
#else
    return T(__builtin_clzll(bits) - (64 - width<T>));
#endif
}
template <class T>
MSL_INLINE T trailing_zeros(T x) {
    ulong const bits = make_unsigned_t<T>(x);
    return bits == 0 ? T(width<T>) : T(ones(~bits & (bits - 1)));
}

template <class T>
MSL_INLINE T reversed(T x) {
    ulong bits = make_unsigned_t<T>(x);
    bits = (bits >> 1 & 0x5555555555555555ul) | (bits & 0x5555555555555555ul) << 1;
    bits = (bits >> 2 & 0x3333333333333333ul) | (bits & 0x3333333333333333ul) << 2;
    bits = (bits >> 4 & 0x0f0f0f0f0f0f0f0ful) | (bits & 0x0f0f0f0f0f0f0f0ful) << 4;
    bits = (bits >> 8 & 0x00ff00ff00ff00fful) | (bits & 0x00ff00ff00ff00fful) << 8;
    bits = (bits >> 16 & 0x0000ffff0000fffful) | (bits & 0x0000ffff0000fffful) << 16;
    bits = bits >> 32 | bits << 32;
    return T(bits >> (64 - width<T>));
}

MSL_INLINE ulong low_bits(uint count) {
    return count >= 64 ? ~0ul : (1ul << count) - 1;
}
template <class T>
MSL_INLINE T extracted(T x, uint offset, uint count) {
    if (count == 0 || offset >= uint(width<T>)) {
        return T(0);
    }
    ulong const bits = ulong(make_unsigned_t<T>(x)) >> offset & low_bits(count);
    if (!is_signed_v<T> || count >= 64) {
        return T(bits);
    }
    ulong const sign = 1ul << (count - 1);
    return T((bits ^ sign) - sign);
}
template <class T>
MSL_INLINE T inserted(T base, T insert, uint offset, uint count) {
    if (offset >= uint(width<T>)) {
        return base;
    }
    ulong const mask = low_bits(count) << offset;
    return T((ulong(base) & ~mask) | (ulong(insert) << offset & mask));
}

// Sums and differences wrap in the unsigned type, as signed overflow is undefined.
template <class T>
MSL_INLINE T added(T x, T y) {
    return T(ulong(x) + ulong(y));
}
template <class T>
MSL_INLINE T subtracted(T x, T y) {
    return T(ulong(x) - ulong(y));
}
template <class T>
MSL_INLINE T saturated_sum(T x, T y) {
    T const sum = added(x, y);
    if constexpr (is_signed_v<T>) {
        bool const overflow = T((x ^ sum) & (y ^ sum)) < 0;
        return !overflow  ? sum
               : x < T(0) ? metal::numeric_limits<T>::min()
                          : metal::numeric_limits<T>::max();
    } else {
        return sum < x ? metal::numeric_limits<T>::max() : sum;
    }
}
template <class T>
MSL_INLINE T saturated_difference(T x, T y) {
    T const difference = subtracted(x, y);
    if constexpr (is_signed_v<T>) {
        bool const overflow = T((x ^ y) & (x ^ difference)) < 0;
        return !overflow  ? difference
               : x < T(0) ? metal::numeric_limits<T>::min()
                          : metal::numeric_limits<T>::max();
    } else {
        return x < y ? T(0) : difference;
    }
}

template <class T>
MSL_INLINE T high_product(T x, T y) {
    if constexpr (sizeof(T) < 8) {
        using wide = conditional_t<is_signed_v<T>, long, ulong>;
        return T(wide(x) * wide(y) >> width<T>);
    } else {
        ulong const a = ulong(x);
        ulong const b = ulong(y);
        ulong const low = (a & 0xffffffffu) * (b & 0xffffffffu);
        ulong const first = (a >> 32) * (b & 0xffffffffu) + (low >> 32);
        ulong const second = (a & 0xffffffffu) * (b >> 32) + (first & 0xffffffffu);
        ulong high = (a >> 32) * (b >> 32) + (first >> 32) + (second >> 32);
        if constexpr (is_signed_v<T>) {
            high -= (x < 0 ? b : 0ul) + (y < 0 ? a : 0ul);
        }
        return T(high);
    }
}

// x * y + z in twice the width, and then the nearest T.
template <class T>
MSL_INLINE T saturated_product_sum(T x, T y, T z) {
    using bits_type = make_unsigned_t<T>;
    bits_type const product = bits_type(ulong(x) * ulong(y));
    bits_type const low = bits_type(product + bits_type(z));
    T const carry = T(low < product);
    T high = added(high_product(x, y), carry);
    high = added(high, z < T(0) ? T(-1) : T(0));
    if (high == (T(low) < T(0) && is_signed_v<T> ? T(-1) : T(0))) {
        return T(low);
    }
    return high < T(0) ? metal::numeric_limits<T>::min() : metal::numeric_limits<T>::max();
}

template <class T>
MSL_INLINE T rotated(T x, T by) {
    using bits_type = make_unsigned_t<T>;
    uint const left = uint(by) & uint(width<T> - 1);
    uint const right = uint(width<T> - left) & uint(width<T> - 1);
    return T(bits_type(bits_type(x) << left) | bits_type(x) >> right);
}

template <class T>
MSL_INLINE T absolute(T x) {
    if constexpr (is_floating_point_v<T>) {
        return static_cast<T>(MSL_LIBM(fabs)(static_cast<float>(x)));
    } else if constexpr (is_signed_v<T>) {
        return x < T(0) ? subtracted(T(0), x) : x;
    } else {
        return x;
    }
}

template <class A, class B>
MSL_INLINE float dot_product(A const& a, B const& b) {
    float sum = float(a[0]) * float(b[0]);
    for (int i = 1; i < msl_vec_size<A>; i++) {
        sum += float(a[i]) * float(b[i]);
    }
    return sum;
}

template <class T>
inline constexpr bool is_bool = is_same_v<msl_element_type<T>, bool>;

template <class... A>
using vector_type = enable_if_t<((msl_vec_size<A> == widest<A...>() && msl_vec_size<A> > 1) && ...),
                                float_type<A...>>;

}  // namespace math_detail

}  // namespace msl
