// Metal's types as the lint shows them to clang: native ones, so that a value can be copied
// from and to every address space, which clang allows classes in none but their own.
//
// Nothing here is ever run. What matters are types, and the address spaces of pointers and
// references; other messages than those on address spaces are for the real compilation.
#pragma once
#pragma clang system_header

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread

#include "meta.hpp"

namespace msl {

typedef _Float16 half;
typedef __bf16 bfloat;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <class T, int N>
using packed_vec = vec<T, N>;

#define MSL_VECTOR_NAMES(T)                 \
    typedef vec<T, 2> T##2, packed_##T##2;  \
    typedef vec<T, 3> T##3, packed_##T##3;  \
    typedef vec<T, 4> T##4, packed_##T##4;
MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(char)
MSL_VECTOR_NAMES(uchar)
MSL_VECTOR_NAMES(short)
MSL_VECTOR_NAMES(ushort)
MSL_VECTOR_NAMES(int)
MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(long)
MSL_VECTOR_NAMES(ulong)
MSL_VECTOR_NAMES(half)
MSL_VECTOR_NAMES(bfloat)
MSL_VECTOR_NAMES(float)
#undef MSL_VECTOR_NAMES

// ---------------------------------------------------------------- traits

namespace metal {

using msl::vec;

template <class T>
struct remove_addrspace {
    using type = T;
};
template <class T>
struct remove_addrspace<T device> {
    using type = T;
};
template <class T>
struct remove_addrspace<T constant> {
    using type = T;
};
template <class T>
struct remove_addrspace<T threadgroup> {
    using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T>
using remove_cvref_t = remove_cv_t<remove_addrspace_t<remove_reference_t<T>>>;
template <class T>
using add_const_t = T const;
template <class T>
using add_pointer_t = remove_reference_t<T>*;
template <class T>
T&& declval() noexcept;

}  // namespace metal

namespace detail {

template <class T>
struct shape {
    using element = T;
    static constexpr int size = 1;
};
template <class T, int N>
struct shape<vec<T, N>> {
    using element = T;
    static constexpr int size = N;
};
template <class T>
constexpr bool is_16_bit_float = __is_same(T, half) || __is_same(T, bfloat);
template <class T>
constexpr bool is_array = false;
template <class T>
constexpr bool is_array<T[]> = true;
template <class T, size_t n>
constexpr bool is_array<T[n]> = true;
template <class T>
constexpr bool is_pointer = false;
template <class T>
constexpr bool is_pointer<T*> = true;

}  // namespace detail

// `float4(a, b.xy, c)` and `float4(half4)`, for which clang has other spellings. Which
// value comes out is of no interest.
template <class Vector, class... Parts>
constexpr Vector msl_make(Parts...) {
    return Vector(0);
}

template <class T>
using msl_element_type = typename detail::shape<T>::element;
template <class T>
constexpr int msl_vec_size = detail::shape<T>::size;

namespace metal {

#define MSL_PREDICATE(name, condition)   \
    template <class T>                   \
    constexpr bool name##_v = condition; \
    template <class T>                   \
    struct name : bool_constant<name##_v<T>> {};
MSL_PREDICATE(is_integral, __is_integral(T))
MSL_PREDICATE(is_floating_point,
              __is_floating_point(T) || detail::is_16_bit_float<remove_cv_t<T>>)
MSL_PREDICATE(is_arithmetic, is_integral_v<T> || is_floating_point_v<T>)
MSL_PREDICATE(is_vector, (msl_vec_size<remove_cv_t<T>> > 1))
MSL_PREDICATE(is_pointer, detail::is_pointer<remove_cv_t<T>>)
MSL_PREDICATE(is_reference, __is_lvalue_reference(T) || __is_rvalue_reference(T))
MSL_PREDICATE(is_array, detail::is_array<T>)
MSL_PREDICATE(is_const, __is_const(T))
MSL_PREDICATE(is_void, __is_void(T))
MSL_PREDICATE(is_enum, __is_enum(T))
MSL_PREDICATE(is_union, __is_union(T))
MSL_PREDICATE(is_class, __is_class(T))
MSL_PREDICATE(is_scalar, is_arithmetic_v<T> || __is_enum(T) || is_pointer_v<T>)
MSL_PREDICATE(is_signed, is_floating_point_v<T> || __is_signed(T))
MSL_PREDICATE(is_unsigned, __is_unsigned(T))
MSL_PREDICATE(is_trivially_copyable, __is_trivially_copyable(T))
#undef MSL_PREDICATE

#define MSL_RELATION(name, condition)        \
    template <class T, class U>              \
    constexpr bool name##_v = condition;     \
    template <class T, class U>              \
    struct name : bool_constant<name##_v<T, U>> {};
MSL_RELATION(is_same, __is_same(T, U))
MSL_RELATION(is_convertible, __is_convertible(T, U))
MSL_RELATION(is_base_of, __is_base_of(T, U))
#undef MSL_RELATION

template <class T, bool is_signed>
struct with_sign {
    template <int size, class I8, class I16, class I32, class I64>
    using choose = conditional_t<size == 1, I8,
                                 conditional_t<size == 2, I16,
                                               conditional_t<size == 4, I32, I64>>>;
    using type = conditional_t<is_signed, choose<sizeof(T), char, short, int, long>,
                               choose<sizeof(T), uchar, ushort, uint, ulong>>;
};
template <class T, int N, bool is_signed>
struct with_sign<vec<T, N>, is_signed> {
    using type = vec<typename with_sign<T, is_signed>::type, N>;
};
template <class T>
struct make_signed : with_sign<T, true> {};
template <class T>
struct make_unsigned : with_sign<T, false> {};
template <class T>
using make_signed_t = typename make_signed<T>::type;
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;

// ---------------------------------------------------------------- limits

template <class T>
struct numeric_limits {
    static constexpr bool is_specialized = is_arithmetic_v<T>;
    static constexpr bool is_signed = is_signed_v<T>;
    static constexpr bool is_integer = is_integral_v<T>;
    static constexpr int digits =
        __is_same(T, bool) ? 1 : int(sizeof(T)) * 8 - (is_signed ? 1 : 0);
    static constexpr T max() { return T(~0ul >> (64 - digits)); }
    static constexpr T min() { return is_signed ? T(-max() - 1) : T(0); }
    static constexpr T lowest() { return min(); }
};
#define MSL_LIMITS(T, bits, largest, smallest, step)                                \
    template <>                                                                     \
    struct numeric_limits<T> {                                                      \
        static constexpr bool is_specialized = true;                                \
        static constexpr bool is_signed = true;                                     \
        static constexpr bool is_integer = false;                                   \
        static constexpr bool has_infinity = true;                                  \
        static constexpr int digits = bits;                                         \
        static constexpr T max() { return T(largest); }                             \
        static constexpr T min() { return T(smallest); }                            \
        static constexpr T lowest() { return T(-largest); }                         \
        static constexpr T epsilon() { return T(step); }                            \
        static constexpr T infinity() { return T(__builtin_inff()); }               \
        static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }            \
        static constexpr T signaling_NaN() { return T(__builtin_nanf("")); }        \
        static constexpr T denorm_min() { return T(smallest * step); }              \
    };
MSL_LIMITS(float, 24, 0x1.fffffep127f, 0x1p-126f, 0x1p-23f)
MSL_LIMITS(half, 11, 0x1.ffcp15f, 0x1p-14f, 0x1p-10f)
MSL_LIMITS(bfloat, 8, 0x1.fep127f, 0x1p-126f, 0x1p-7f)
#undef MSL_LIMITS

template <class T>
using uniform = T;
template <class T>
T make_uniform(T value);

template <class T, size_t N>
struct array {
    T elements[N];

    constexpr T& operator[](size_t i) { return elements[i]; }
    constexpr T const& operator[](size_t i) const { return elements[i]; }
    constexpr T* data() { return elements; }
    constexpr T const* data() const { return elements; }
    constexpr size_t size() const { return N; }
};

}  // namespace metal

// ---------------------------------------------------------------- conversions

template <class To, class From>
constexpr To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    return __builtin_bit_cast(To, from);
}

namespace detail {

template <class T>
constexpr int space_of = 0;
template <class T>
constexpr int space_of<T device*> = 1;
template <class T>
constexpr int space_of<T constant*> = 2;
template <class T>
constexpr int space_of<T threadgroup*> = 3;

}  // namespace detail

// A cast written `(device T*)p`, which clang allows from every address space.
template <class To, class From,
          metal::enable_if_t<!detail::is_pointer<From> ||
                                 detail::space_of<To> == detail::space_of<From>,
                             int> = 0>
constexpr To msl_cast(From from) {
    return (To)from;
}
template <class To, class From,
          metal::enable_if_t<detail::is_pointer<From> &&
                                 detail::space_of<To> != detail::space_of<From>,
                             int> = 0>
To msl_cast(From from) = delete;

}  // namespace msl

namespace metal = msl::metal;
