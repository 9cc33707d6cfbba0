// The functions of Metal's standard library that take numbers: math, integer, common,
// relational and geometric.  Packing is not there.
//
// Half and bfloat are computed in float and rounded once; vectors go component by
// component, and a scalar beside a vector stands for all components.  Which arguments a
// function takes follows Metal's overloads: `pow(x, 2)` is fine for a float x, while
// `max(x, 2)` and `sqrt(2)` are ambiguous there and refused here.
//
// Of the types' header this uses scalars, vec with v[i], msl_vec_size, msl_element_type, as_type,
// MSL_INLINE and the traits in metal.
#pragma once

#include "math_detail.hpp"

namespace msl {

namespace metal {

// ---------------------------------------------------------------- floating point

// Each `expression` is over floats x, y and z.
#define MSL_FLOAT_1(name, expression)                                   \
    template <class A, class R = math_detail::float_result<A>>          \
    MSL_INLINE R name(A a) {                                            \
        return math_detail::each<R, math_detail::float_type<A>, float>( \
            [](float x) { return expression; }, a);                     \
    }
#define MSL_FLOAT_2(name, expression)                                      \
    template <class A, class B, class R = math_detail::float_result<A, B>> \
    MSL_INLINE R name(A a, B b) {                                          \
        return math_detail::each<R, math_detail::float_type<A, B>, float>( \
            [](float x, float y) { return expression; }, a, b);            \
    }
#define MSL_FLOAT_3(name, expression)                                                  \
    template <class A, class B, class C, class R = math_detail::float_result<A, B, C>> \
    MSL_INLINE R name(A a, B b, C c) {                                                 \
        return math_detail::each<R, math_detail::float_type<A, B, C>, float>(          \
            [](float x, float y, float z) { return expression; }, a, b, c);            \
    }

MSL_FLOAT_1(acos, MSL_LIBM(acos)(x))
MSL_FLOAT_1(acosh, MSL_LIBM(acosh)(x))
MSL_FLOAT_1(asin, MSL_LIBM(asin)(x))
MSL_FLOAT_1(asinh, MSL_LIBM(asinh)(x))
MSL_FLOAT_1(atan, MSL_LIBM(atan)(x))
MSL_FLOAT_1(atanh, MSL_LIBM(atanh)(x))
MSL_FLOAT_1(ceil, MSL_LIBM(ceil)(x))
MSL_FLOAT_1(cos, MSL_LIBM(cos)(x))
MSL_FLOAT_1(cosh, MSL_LIBM(cosh)(x))
MSL_FLOAT_1(cospi, math_detail::cos_of_half_turns(x))
MSL_FLOAT_1(exp, MSL_LIBM(exp)(x))
MSL_FLOAT_1(exp2, MSL_LIBM(exp2)(x))
MSL_FLOAT_1(exp10, MSL_LIBM(pow)(10.0f, x))
MSL_FLOAT_1(fabs, MSL_LIBM(fabs)(x))
MSL_FLOAT_1(floor, MSL_LIBM(floor)(x))
MSL_FLOAT_1(fract, math_detail::lesser(x - MSL_LIBM(floor)(x), 0x1.fffffep-1f))
MSL_FLOAT_1(log, MSL_LIBM(log)(x))
MSL_FLOAT_1(log2, MSL_LIBM(log2)(x))
MSL_FLOAT_1(log10, MSL_LIBM(log10)(x))
MSL_FLOAT_1(rint, MSL_LIBM(rint)(x))
MSL_FLOAT_1(round, MSL_LIBM(round)(x))
MSL_FLOAT_1(rsqrt, 1.0f / MSL_LIBM(sqrt)(x))
MSL_FLOAT_1(saturate, math_detail::limited(x, 0.0f, 1.0f))
MSL_FLOAT_1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
MSL_FLOAT_1(sin, MSL_LIBM(sin)(x))
MSL_FLOAT_1(sinh, MSL_LIBM(sinh)(x))
MSL_FLOAT_1(sinpi, math_detail::sin_of_half_turns(x))
MSL_FLOAT_1(sqrt, MSL_LIBM(sqrt)(x))
MSL_FLOAT_1(tan, MSL_LIBM(tan)(x))
MSL_FLOAT_1(tanh, MSL_LIBM(tanh)(x))
MSL_FLOAT_1(tanpi, math_detail::sin_of_half_turns(x) / math_detail::cos_of_half_turns(x))
MSL_FLOAT_1(trunc, MSL_LIBM(trunc)(x))

MSL_FLOAT_2(atan2, MSL_LIBM(atan2)(x, y))
MSL_FLOAT_2(copysign, MSL_LIBM(copysign)(x, y))
MSL_FLOAT_2(divide, x / y)
MSL_FLOAT_2(fdim, MSL_LIBM(fdim)(x, y))
MSL_FLOAT_2(fmax, math_detail::greater(x, y))
MSL_FLOAT_2(fmin, math_detail::lesser(x, y))
MSL_FLOAT_2(fmod, MSL_LIBM(fmod)(x, y))
MSL_FLOAT_2(pow, MSL_LIBM(pow)(x, y))
MSL_FLOAT_2(powr, x >= 0.0f ? MSL_LIBM(pow)(x, y) : math_detail::not_a_number)
MSL_FLOAT_2(step, y < x ? 0.0f : 1.0f)

MSL_FLOAT_3(fma, MSL_LIBM(fma)(x, y, z))
MSL_FLOAT_3(fmax3, math_detail::greater(math_detail::greater(x, y), z))
MSL_FLOAT_3(fmedian3, math_detail::middle(x, y, z))
MSL_FLOAT_3(fmin3, math_detail::lesser(math_detail::lesser(x, y), z))
MSL_FLOAT_3(mix, x + (y - x) * z)
MSL_FLOAT_3(smoothstep, math_detail::hermite(x, y, z))

#undef MSL_FLOAT_1
#undef MSL_FLOAT_2
#undef MSL_FLOAT_3

template <class A, class B, class R = math_detail::float_result<A, B>>
MSL_INLINE R nextafter(A a, B b) {
    using T = math_detail::float_type<A, B>;
    return math_detail::each<R, T, T>([](T x, T y) { return math_detail::next_after(x, y); }, a, b);
}

template <class A, class K, class R = math_detail::float_result<A>,
          class = math_detail::enable_if_t<is_integral_v<msl_element_type<K>> &&
                                    (msl_vec_size<K> == msl_vec_size<A> || msl_vec_size<K> == 1)>>
MSL_INLINE R ldexp(A a, K k) {
    R result;
    if constexpr (msl_vec_size<R> == 1) {
        result = static_cast<R>(MSL_LIBM(ldexp)(static_cast<float>(a), int(k)));
    } else {
        for (int i = 0; i < msl_vec_size<R>; i++) {
            float const x = static_cast<float>(a[i]);
            result[i] = msl_element_type<R>(MSL_LIBM(ldexp)(x, math_detail::part<int, int>(k, i)));
        }
    }
    return result;
}

template <class A, class T = math_detail::float_type<A>>
MSL_INLINE math_detail::shaped<int, msl_vec_size<A>> ilogb(A a) {
    return math_detail::each<math_detail::shaped<int, msl_vec_size<A>>, T, float>(
        [](float x) { return int(MSL_LIBM(ilogb)(x)); }, a);
}

template <class A, class R = math_detail::float_result<A>>
MSL_INLINE R frexp(A a, math_detail::shaped<int, msl_vec_size<A>>& exponent) {
    if constexpr (msl_vec_size<R> == 1) {
        return static_cast<R>(MSL_LIBM(frexp)(static_cast<float>(a), &exponent));
    } else {
        R result;
        for (int i = 0; i < msl_vec_size<R>; i++) {
            result[i] = frexp(a[i], exponent[i]);
        }
        return result;
    }
}

template <class A, class R = math_detail::float_result<A>>
MSL_INLINE R modf(A a, R& whole) {
    whole = trunc(a);
    // An infinity has no fraction; the sign is the argument's.
    return math_detail::each<R, math_detail::float_type<A>, float>(
        [](float x) {
            float const rest = math_detail::is_infinite(x) ? 0.0f : x - MSL_LIBM(trunc)(x);
            return MSL_LIBM(copysign)(rest, x);
        },
        a);
}

template <class A, class R = math_detail::float_result<A>>
MSL_INLINE R sincos(A a, R& cosine) {
    cosine = cos(a);
    return sin(a);
}

// ---------------------------------------------------------------- any number

#define MSL_SAME_1(name, expression)                                          \
    template <class A, class R = math_detail::same_result<A>>                 \
    MSL_INLINE R name(A a) {                                                  \
        using T = math_detail::same_type<A>;                                  \
        return math_detail::each<R, T, T>([](T x) { return expression; }, a); \
    }
#define MSL_SAME_2(name, expression)                                                  \
    template <class A, class B, class R = math_detail::same_result<A, B>>             \
    MSL_INLINE R name(A a, B b) {                                                     \
        using T = math_detail::same_type<A, B>;                                       \
        return math_detail::each<R, T, T>([](T x, T y) { return expression; }, a, b); \
    }
#define MSL_SAME_3(name, expression)                                                          \
    template <class A, class B, class C, class R = math_detail::same_result<A, B, C>>         \
    MSL_INLINE R name(A a, B b, C c) {                                                        \
        using T = math_detail::same_type<A, B, C>;                                            \
        return math_detail::each<R, T, T>([](T x, T y, T z) { return expression; }, a, b, c); \
    }

MSL_SAME_1(abs, math_detail::absolute(x))
MSL_SAME_2(max, math_detail::greater(x, y))
MSL_SAME_2(min, math_detail::lesser(x, y))
MSL_SAME_3(clamp, math_detail::lesser(math_detail::greater(x, y), z))
MSL_SAME_3(max3, math_detail::greater(math_detail::greater(x, y), z))
MSL_SAME_3(median3, math_detail::middle(x, y, z))
MSL_SAME_3(min3, math_detail::lesser(math_detail::lesser(x, y), z))

#undef MSL_SAME_1
#undef MSL_SAME_2
#undef MSL_SAME_3

// b where the condition holds, else a.
template <class A, class B, class C, class R = math_detail::same_result<A, B>,
          class = math_detail::enable_if_t<math_detail::is_bool<C> &&
                                    (msl_vec_size<C> == msl_vec_size<R> || msl_vec_size<C> == 1)>>
MSL_INLINE R select(A a, B b, C condition) {
    using T = msl_element_type<R>;
    if constexpr (msl_vec_size<R> == 1) {
        return condition ? T(b) : T(a);
    } else {
        R result;
        for (int i = 0; i < msl_vec_size<R>; i++) {
            bool const second = math_detail::part<bool, bool>(condition, i);
            result[i] = second ? math_detail::part<T, T>(b, i) : math_detail::part<T, T>(a, i);
        }
        return result;
    }
}

// ---------------------------------------------------------------- integers

#define MSL_INTEGER_1(name, expression)                                       \
    template <class A, class R = math_detail::integer_result<A>>              \
    MSL_INLINE R name(A a) {                                                  \
        using T = math_detail::integer_type<A>;                               \
        return math_detail::each<R, T, T>([](T x) { return expression; }, a); \
    }
#define MSL_INTEGER_2(name, expression)                                               \
    template <class A, class B, class R = math_detail::integer_result<A, B>>          \
    MSL_INLINE R name(A a, B b) {                                                     \
        using T = math_detail::integer_type<A, B>;                                    \
        return math_detail::each<R, T, T>([](T x, T y) { return expression; }, a, b); \
    }
#define MSL_INTEGER_3(name, expression)                                                       \
    template <class A, class B, class C, class R = math_detail::integer_result<A, B, C>>      \
    MSL_INLINE R name(A a, B b, C c) {                                                        \
        using T = math_detail::integer_type<A, B, C>;                                         \
        return math_detail::each<R, T, T>([](T x, T y, T z) { return expression; }, a, b, c); \
    }

MSL_INTEGER_1(clz, math_detail::leading_zeros(x))
MSL_INTEGER_1(ctz, math_detail::trailing_zeros(x))
MSL_INTEGER_1(popcount, T(math_detail::ones(make_unsigned_t<T>(x))))
MSL_INTEGER_1(reverse_bits, math_detail::reversed(x))

MSL_INTEGER_2(addsat, math_detail::saturated_sum(x, y))
MSL_INTEGER_2(subsat, math_detail::saturated_difference(x, y))
MSL_INTEGER_2(hadd, T((x & y) + ((x ^ y) >> 1)))
MSL_INTEGER_2(rhadd, T((x | y) - ((x ^ y) >> 1)))
MSL_INTEGER_2(mul24, T(ulong(x) * ulong(y)))
MSL_INTEGER_2(mulhi, math_detail::high_product(x, y))
MSL_INTEGER_2(rotate, math_detail::rotated(x, y))

MSL_INTEGER_3(mad24, T(ulong(x) * ulong(y) + ulong(z)))
MSL_INTEGER_3(madhi, math_detail::added(math_detail::high_product(x, y), z))
MSL_INTEGER_3(madsat, math_detail::saturated_product_sum(x, y, z))

#undef MSL_INTEGER_1
#undef MSL_INTEGER_2
#undef MSL_INTEGER_3

template <class A, class B, class R = make_unsigned_t<math_detail::integer_result<A, B>>>
MSL_INLINE R absdiff(A a, B b) {
    using T = math_detail::integer_type<A, B>;
    return math_detail::each<R, T, T>(
        [](T x, T y) {
            return math_detail::subtracted(math_detail::greater(x, y),
                                           math_detail::lesser(x, y));
        },
        a, b);
}

template <class A, class R = math_detail::integer_result<A>>
MSL_INLINE R extract_bits(A a, uint offset, uint bits) {
    using T = math_detail::integer_type<A>;
    return math_detail::each<R, T, T>(
        [=](T x) { return math_detail::extracted(x, offset, bits); }, a);
}
template <class A, class B, class R = math_detail::integer_result<A, B>>
MSL_INLINE R insert_bits(A base, B insert, uint offset, uint bits) {
    using T = math_detail::integer_type<A, B>;
    return math_detail::each<R, T, T>(
        [=](T x, T y) { return math_detail::inserted(x, y, offset, bits); }, base, insert);
}

// ---------------------------------------------------------------- relational

#define MSL_TEST_1(name, expression)                                                \
    template <class A, class T = math_detail::float_type<A>>                        \
    MSL_INLINE math_detail::shaped<bool, msl_vec_size<A>> name(A a) {                   \
        return math_detail::each<math_detail::shaped<bool, msl_vec_size<A>>, T, float>( \
            [](float x) -> bool { return expression; }, a);                         \
    }
#define MSL_TEST_2(name, expression)                                            \
    template <class A, class B, class T = math_detail::float_type<A, B>,        \
              class R = math_detail::shaped<bool, math_detail::widest<A, B>()>> \
    MSL_INLINE R name(A a, B b) {                                               \
        return math_detail::each<R, T, float>(                                  \
            [](float x, float y) -> bool { return expression; }, a, b);         \
    }

MSL_TEST_1(isfinite, !math_detail::is_nan(x) && !math_detail::is_infinite(x))
MSL_TEST_1(isinf, math_detail::is_infinite(x))
MSL_TEST_1(isnan, math_detail::is_nan(x))
MSL_TEST_1(signbit, as_type<uint>(x) >> 31)
MSL_TEST_2(isordered, !math_detail::is_nan(x) && !math_detail::is_nan(y))
MSL_TEST_2(isunordered, math_detail::is_nan(x) || math_detail::is_nan(y))

#undef MSL_TEST_1
#undef MSL_TEST_2

// Normal in the argument's own format.
template <class A, class T = math_detail::float_type<A>>
MSL_INLINE math_detail::shaped<bool, msl_vec_size<A>> isnormal(A a) {
    return math_detail::each<math_detail::shaped<bool, msl_vec_size<A>>, T, float>(
        [](float x) {
            float const size = MSL_LIBM(fabs)(x);
            return size >= float(numeric_limits<T>::min()) && size < math_detail::infinity;
        },
        a);
}

template <class A, class = math_detail::enable_if_t<math_detail::is_bool<A>>>
MSL_INLINE bool all(A a) {
    bool result = true;
    for (int i = 0; i < msl_vec_size<A>; i++) {
        result = result && math_detail::part<bool, bool>(a, i);
    }
    return result;
}
template <class A, class = math_detail::enable_if_t<math_detail::is_bool<A>>>
MSL_INLINE bool any(A a) {
    bool result = false;
    for (int i = 0; i < msl_vec_size<A>; i++) {
        result = result || math_detail::part<bool, bool>(a, i);
    }
    return result;
}

// ---------------------------------------------------------------- geometry

template <class A, class B, class T = math_detail::vector_type<A, B>>
MSL_INLINE T dot(A a, B b) {
    return T(math_detail::dot_product(a, b));
}
template <class A, class T = math_detail::vector_type<A>>
MSL_INLINE T length_squared(A a) {
    return T(math_detail::dot_product(a, a));
}
template <class A, class T = math_detail::vector_type<A>>
MSL_INLINE T length(A a) {
    return T(MSL_LIBM(sqrt)(math_detail::dot_product(a, a)));
}
template <class A, class B, class T = math_detail::vector_type<A, B>>
MSL_INLINE T distance_squared(A a, B b) {
    return length_squared(a - b);
}
template <class A, class B, class T = math_detail::vector_type<A, B>>
MSL_INLINE T distance(A a, B b) {
    return length(a - b);
}
template <class A, class T = math_detail::vector_type<A>>
MSL_INLINE vec<T, msl_vec_size<A>> normalize(A a) {
    float const size = MSL_LIBM(sqrt)(math_detail::dot_product(a, a));
    return math_detail::each<vec<T, msl_vec_size<A>>, T, float>([=](float x) { return x / size; }, a);
}
template <class A, class B, class T = math_detail::vector_type<A, B>,
          class = math_detail::enable_if_t<msl_vec_size<A> == 3>>
MSL_INLINE vec<T, 3> cross(A a, B b) {
    vec<T, 3> result;
    for (int i = 0; i < 3; i++) {
        int const j = (i + 1) % 3;
        int const k = (i + 2) % 3;
        result[i] = T(float(a[j]) * float(b[k]) - float(a[k]) * float(b[j]));
    }
    return result;
}
template <class A, class B, class T = math_detail::vector_type<A, B>>
MSL_INLINE vec<T, msl_vec_size<A>> reflect(A incident, B normal) {
    float const twice = 2.0f * math_detail::dot_product(normal, incident);
    return math_detail::each<vec<T, msl_vec_size<A>>, T, float>(
        [=](float x, float n) { return x - twice * n; }, incident, normal);
}
template <class A, class B, class S, class T = math_detail::vector_type<A, B>,
          class = math_detail::enable_if_t<msl_vec_size<S> == 1>>
MSL_INLINE vec<T, msl_vec_size<A>> refract(A incident, B normal, S ratio) {
    float const eta = float(T(ratio));
    float const cosine = math_detail::dot_product(normal, incident);
    float const rest = 1.0f - eta * eta * (1.0f - cosine * cosine);
    float const along = rest < 0.0f ? 0.0f : eta * cosine + MSL_LIBM(sqrt)(rest);
    float const keep = rest < 0.0f ? 0.0f : eta;
    return math_detail::each<vec<T, msl_vec_size<A>>, T, float>(
        [=](float x, float n) { return keep * x - along * n; }, incident, normal);
}
template <class A, class B, class C, class T = math_detail::vector_type<A, B, C>>
MSL_INLINE vec<T, msl_vec_size<A>> faceforward(A normal, B incident, C reference) {
    bool const keep = math_detail::dot_product(reference, incident) < 0.0f;
    return math_detail::each<vec<T, msl_vec_size<A>>, T, float>(
        [=](float n) { return keep ? n : -n; }, normal);
}

// ---------------------------------------------------------------- fast and precise

// Apple's fast variants give up accuracy that callers may not rely on; here all are one.
#define MSL_VARIANTS(USE)                                                                  \
    USE(acos) USE(acosh) USE(asin) USE(asinh) USE(atan) USE(atan2) USE(atanh) USE(ceil)    \
    USE(copysign) USE(cos) USE(cosh) USE(cospi) USE(divide) USE(exp) USE(exp2) USE(exp10)  \
    USE(abs) USE(fabs) USE(fdim) USE(floor) USE(fma) USE(fmax) USE(fmax3) USE(fmedian3)    \
    USE(fmin) USE(fmin3) USE(fmod) USE(fract) USE(frexp) USE(ilogb) USE(ldexp) USE(log)    \
    USE(log2) USE(log10) USE(max) USE(max3) USE(median3) USE(min) USE(min3) USE(modf)      \
    USE(nextafter) USE(pow) USE(powr) USE(rint) USE(round) USE(rsqrt) USE(sin) USE(sincos) \
    USE(sinh) USE(sinpi) USE(sqrt) USE(tan) USE(tanh) USE(tanpi) USE(trunc) USE(clamp)     \
    USE(mix) USE(saturate) USE(sign) USE(smoothstep) USE(step) USE(dot) USE(length)        \
    USE(length_squared) USE(distance) USE(distance_squared) USE(normalize) USE(cross)      \
    USE(reflect) USE(refract) USE(faceforward) USE(isfinite) USE(isinf) USE(isnan)
#define MSL_USE(name) using metal::name;
namespace fast {
MSL_VARIANTS(MSL_USE)
}
namespace precise {
MSL_VARIANTS(MSL_USE)
}
#undef MSL_USE
#undef MSL_VARIANTS

}  // namespace metal

}  // namespace msl

#undef MSL_LIBM
