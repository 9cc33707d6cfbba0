// The names that Apple's own headers call underneath. They are documented nowhere, but
// MLX's kernels overload metal's functions for bfloat by calling them.
#pragma once

namespace msl {

// The last argument of the mathematical ones; here every function is the precise one.
constexpr int __METAL_MAYBE_FAST_MATH__ = 0;
constexpr int __METAL_FAST_MATH__ = 1;
constexpr int __METAL_PRECISE_MATH__ = 2;

#define MSL_MATH_1(name)                                      \
    template <class T> inline T __metal_##name(T x, int) {    \
        return metal::name(x);                                \
    }
#define MSL_MATH_2(name)                                      \
    template <class T> inline T __metal_##name(T x, T y, int) { \
        return metal::name(x, y);                             \
    }
#define MSL_MATH_3(name)                                      \
    template <class T> inline T __metal_##name(T x, T y, T z, int) { \
        return metal::name(x, y, z);                          \
    }
MSL_MATH_1(acos)
MSL_MATH_1(acosh)
MSL_MATH_1(asin)
MSL_MATH_1(asinh)
MSL_MATH_1(atan)
MSL_MATH_1(atanh)
MSL_MATH_1(ceil)
MSL_MATH_1(cos)
MSL_MATH_1(cosh)
MSL_MATH_1(cospi)
MSL_MATH_1(exp)
MSL_MATH_1(exp10)
MSL_MATH_1(exp2)
MSL_MATH_1(fabs)
MSL_MATH_1(floor)
MSL_MATH_1(fract)
MSL_MATH_1(log)
MSL_MATH_1(log10)
MSL_MATH_1(log2)
MSL_MATH_1(rint)
MSL_MATH_1(round)
MSL_MATH_1(rsqrt)
MSL_MATH_1(sin)
MSL_MATH_1(sinh)
MSL_MATH_1(sinpi)
MSL_MATH_1(sqrt)
MSL_MATH_1(tan)
MSL_MATH_1(tanh)
MSL_MATH_1(tanpi)
MSL_MATH_1(trunc)
MSL_MATH_2(atan2)
MSL_MATH_2(divide)
MSL_MATH_2(fmax)
MSL_MATH_2(fmin)
MSL_MATH_2(fmod)
MSL_MATH_2(nextafter)
MSL_MATH_2(pow)
MSL_MATH_2(powr)
MSL_MATH_3(fma)
MSL_MATH_3(fmax3)
MSL_MATH_3(fmedian3)
MSL_MATH_3(fmin3)
#undef MSL_MATH_1
#undef MSL_MATH_2
#undef MSL_MATH_3
template <class T> inline T __metal_nextafter(T x, T y) { return metal::nextafter(x, y); }
template <class T> inline T __metal_fma(T x, T y, T z) { return metal::fma(x, y, z); }
template <class T, class E> inline T __metal_ldexp(T x, E exponent, int) {
    return metal::ldexp(x, exponent);
}
template <class T, class E> inline T __metal_frexp(T x, E* exponent) {
    return metal::frexp(x, *exponent);
}
template <class T, class E> inline T __metal_frexp(T x, E* exponent, int) {
    return metal::frexp(x, *exponent);
}
template <class T, class E> inline T __metal_ldexp(T x, E exponent) {
    return metal::ldexp(x, exponent);
}

#define MSL_LINE lanes::Line line = lanes::Line(__builtin_LINE())
#define MSL_SIMD(name)                                                     \
    template <class T> inline T __metal_simd_##name(T value, MSL_LINE) {   \
        return metal::simd_##name(value, line);                            \
    }
#define MSL_SIMD_FROM(name)                                                \
    template <class T> inline T __metal_simd_##name(T value, ushort which, MSL_LINE) { \
        return metal::simd_##name(value, which, line);                     \
    }
MSL_SIMD(max)
MSL_SIMD(min)
MSL_SIMD(product)
MSL_SIMD(sum)
MSL_SIMD(and)
MSL_SIMD(or)
MSL_SIMD(xor)
MSL_SIMD(prefix_exclusive_product)
MSL_SIMD(prefix_exclusive_sum)
MSL_SIMD(prefix_inclusive_product)
MSL_SIMD(prefix_inclusive_sum)
MSL_SIMD_FROM(broadcast)
MSL_SIMD_FROM(shuffle)
MSL_SIMD_FROM(shuffle_down)
MSL_SIMD_FROM(shuffle_rotate_down)
MSL_SIMD_FROM(shuffle_rotate_up)
MSL_SIMD_FROM(shuffle_up)
MSL_SIMD_FROM(shuffle_xor)
template <class T>
inline T __metal_simd_shuffle_and_fill_down(T value, T fill, ushort delta, ushort modulo,
                                            MSL_LINE) {
    return metal::simd_shuffle_and_fill_down(value, fill, delta, modulo, line);
}
template <class T>
inline T __metal_simd_shuffle_and_fill_up(T value, T fill, ushort delta, ushort modulo,
                                          MSL_LINE) {
    return metal::simd_shuffle_and_fill_up(value, fill, delta, modulo, line);
}
#undef MSL_SIMD
#undef MSL_SIMD_FROM
#undef MSL_LINE

template <class T> inline T __metal_get_simdgroup_size(T) { return T(32); }
template <class T> inline T __metal_get_thread_index_in_simdgroup(T) {
    return T(lanes::lane());
}

}  // namespace msl
