// Metal's scalar, vector and packed types, its type traits and its limits, in plain
// C++17 for g++, clang and NVRTC.  No system header is included: NVRTC has none.
//
// MSL's built-in types live in namespace msl, what <metal_stdlib> declares in msl::metal.
#pragma once

#if defined(__CUDACC_RTC__)
#define MSL_INLINE __forceinline__
#else
#define MSL_INLINE inline __attribute__((always_inline))
#endif

#if defined(MSL_TRACE)
// One vector load or store must stay one access when every access is traced.
extern "C" void msl_copy(void* to, void const* from, unsigned long bytes);
#endif

namespace msl {

// ---------------------------------------------------------------- integer types

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef decltype(sizeof(0)) size_t;
typedef decltype((char*)0 - (char*)0) ptrdiff_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ptrdiff_t intptr_t;
typedef size_t uintptr_t;

static_assert(sizeof(long) == 8, "MSL's long has 64 bits");
static_assert(char(-1) < 0, "MSL's char is signed: compile with -fsigned-char");

struct half;
struct bfloat;
template <class T, int N>
struct vec;
template <class T, int N>
struct packed_vec;

// ---------------------------------------------------------------- traits

namespace metal {

using msl::vec;

template <class T, T v>
struct integral_constant {
    static constexpr T value = v;
    using value_type = T;
    using type = integral_constant;
    constexpr operator T() const noexcept { return v; }
    constexpr T operator()() const noexcept { return v; }
};

template <bool b>
using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
    using type = T;
};
template <bool condition, class T = void>
using enable_if_t = typename enable_if<condition, T>::type;

template <bool condition, class T, class F>
struct conditional {
    using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
    using type = F;
};
template <bool condition, class T, class F>
using conditional_t = typename conditional<condition, T, F>::type;

// A transformation: `remove_x<T>::type` is T, and `result` for a T that looks like `from`.
#define MSL_TRANSFORM(name, from, result)        \
    template <class T>                           \
    struct name {                                \
        using type = T;                          \
    };                                           \
    template <class T>                           \
    struct name<from> {                          \
        using type = result;                     \
    };                                           \
    template <class T>                           \
    using name##_t = typename name<T>::type;
MSL_TRANSFORM(remove_const, T const, T)
MSL_TRANSFORM(remove_volatile, T volatile, T)
MSL_TRANSFORM(remove_pointer, T*, T)
#undef MSL_TRANSFORM

template <class T>
struct remove_cv {
    using type = remove_const_t<remove_volatile_t<T>>;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;

template <class T>
struct remove_reference {
    using type = T;
};
template <class T>
struct remove_reference<T&> {
    using type = T;
};
template <class T>
struct remove_reference<T&&> {
    using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;

template <class T>
using remove_cvref_t = remove_cv_t<remove_reference_t<T>>;

// Address spaces are gone when a kernel reaches C++.
template <class T>
struct remove_addrspace {
    using type = T;
};
template <class T>
using remove_addrspace_t = T;

template <class T>
struct add_const {
    using type = T const;
};
template <class T>
using add_const_t = T const;
template <class T>
struct add_lvalue_reference {
    using type = T&;
};
template <class T>
using add_lvalue_reference_t = T&;
template <class T>
struct add_rvalue_reference {
    using type = T&&;
};
template <class T>
using add_rvalue_reference_t = T&&;
template <class T>
struct add_pointer {
    using type = remove_reference_t<T>*;
};
template <class T>
using add_pointer_t = remove_reference_t<T>*;

template <class T>
add_rvalue_reference_t<T> declval() noexcept;

template <class T>
MSL_INLINE constexpr remove_reference_t<T>&& move(T&& value) noexcept {
    return static_cast<remove_reference_t<T>&&>(value);
}
template <class T>
MSL_INLINE constexpr T&& forward(remove_reference_t<T>& value) noexcept {
    return static_cast<T&&>(value);
}
template <class T>
MSL_INLINE constexpr T&& forward(remove_reference_t<T>&& value) noexcept {
    return static_cast<T&&>(value);
}

// A predicate is its variable template; the class of the same name derives from it.
#define MSL_PREDICATE(name, condition)                   \
    template <class T>                                   \
    inline constexpr bool name##_v = condition;          \
    template <class T>                                   \
    struct name : bool_constant<name##_v<T>> {};

template <class T, class U>
inline constexpr bool is_same_v = false;
template <class T>
inline constexpr bool is_same_v<T, T> = true;
template <class T, class U>
struct is_same : bool_constant<is_same_v<T, U>> {};

}  // namespace metal

namespace detail {

template <class T, class... Options>
inline constexpr bool is_one_of = (metal::is_same_v<T, Options> || ...);

// What kind of scalar a type is; a set of kinds is their sum.  Plain integers: operators
// on an enumeration would look at the ones below, and those ask for the kind again.
inline constexpr int not_scalar = 0;
inline constexpr int integer = 1;
inline constexpr int half_kind = 2;
inline constexpr int bfloat_kind = 4;
inline constexpr int float_kind = 8;

template <class T>
inline constexpr int kind_of =
    is_one_of<T, half>     ? half_kind
    : is_one_of<T, bfloat> ? bfloat_kind
    : is_one_of<T, float>  ? float_kind
    : is_one_of<T, bool, char, int8_t, uchar, short, ushort, int, uint, long, ulong,
                long long, unsigned long long>
        ? integer
        : not_scalar;

template <class T>
inline constexpr bool is_vec = false;
template <class T, int N>
inline constexpr bool is_vec<vec<T, N>> = true;

template <class T>
inline constexpr bool is_pointer = false;
template <class T>
inline constexpr bool is_pointer<T*> = true;

template <class T>
inline constexpr int reference_kind = 0;
template <class T>
inline constexpr int reference_kind<T&> = 1;
template <class T>
inline constexpr int reference_kind<T&&> = 2;

template <class T>
inline constexpr bool is_array = false;
template <class T>
inline constexpr bool is_array<T[]> = true;
template <class T, size_t n>
inline constexpr bool is_array<T[n]> = true;

template <class T>
inline constexpr bool is_const = false;
template <class T>
inline constexpr bool is_const<T const> = true;

template <class To>
void take(To);
template <class From, class To, class = decltype(take<To>(metal::declval<From>()))>
constexpr bool converts(int) {
    return true;
}
template <class From, class To>
constexpr bool converts(...) {
    return false;
}

template <class T, class U>
using enable_scalar = metal::enable_if_t<kind_of<T> != not_scalar, U>;

}  // namespace detail

namespace metal {

MSL_PREDICATE(is_integral, detail::kind_of<remove_cv_t<T>> == detail::integer)
MSL_PREDICATE(is_floating_point, (detail::kind_of<remove_cv_t<T>> > detail::integer))
MSL_PREDICATE(is_arithmetic, detail::kind_of<remove_cv_t<T>> != detail::not_scalar)
MSL_PREDICATE(is_vector, detail::is_vec<remove_cv_t<T>>)
MSL_PREDICATE(is_pointer, detail::is_pointer<remove_cv_t<T>>)
MSL_PREDICATE(is_reference, detail::reference_kind<T> != 0)
MSL_PREDICATE(is_lvalue_reference, detail::reference_kind<T> == 1)
MSL_PREDICATE(is_rvalue_reference, detail::reference_kind<T> == 2)
MSL_PREDICATE(is_array, detail::is_array<T>)
MSL_PREDICATE(is_const, detail::is_const<T>)
MSL_PREDICATE(is_void, (is_same_v<remove_cv_t<T>, void>))
MSL_PREDICATE(is_enum, __is_enum(T))
MSL_PREDICATE(is_union, __is_union(T))
MSL_PREDICATE(is_class, __is_class(T))
MSL_PREDICATE(is_scalar, is_arithmetic_v<T> || __is_enum(T) || is_pointer_v<T>)
MSL_PREDICATE(is_trivially_copyable, __is_trivially_copyable(T))
#undef MSL_PREDICATE

template <class T>
constexpr bool is_negative_one_below_zero() {
    if constexpr (is_integral_v<T>) {
        return remove_cv_t<T>(-1) < remove_cv_t<T>(0);
    } else {
        return is_floating_point_v<T>;
    }
}
template <class T>
inline constexpr bool is_signed_v = is_negative_one_below_zero<T>();
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
inline constexpr bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};

template <class From, class To>
inline constexpr bool is_convertible_v = detail::converts<From, To>(0);
template <class From, class To>
struct is_convertible : bool_constant<is_convertible_v<From, To>> {};

template <class Base, class Derived>
inline constexpr bool is_base_of_v = __is_base_of(Base, Derived);
template <class Base, class Derived>
struct is_base_of : bool_constant<is_base_of_v<Base, Derived>> {};

template <class T>
struct make_unsigned {
    using type = conditional_t<
        sizeof(T) == 1, uchar,
        conditional_t<sizeof(T) == 2, ushort, conditional_t<sizeof(T) == 4, uint, ulong>>>;
};
template <class T>
struct make_signed {
    using type = conditional_t<
        sizeof(T) == 1, char,
        conditional_t<sizeof(T) == 2, short, conditional_t<sizeof(T) == 4, int, long>>>;
};
template <class T, int N>
struct make_unsigned<vec<T, N>> {
    using type = vec<typename make_unsigned<T>::type, N>;
};
template <class T, int N>
struct make_signed<vec<T, N>> {
    using type = vec<typename make_signed<T>::type, N>;
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
using make_signed_t = typename make_signed<T>::type;

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
template <class T, int N>
struct shape<packed_vec<T, N>> : shape<vec<T, N>> {};

}  // namespace detail

// The type of a vector's components, and how many they are; a scalar is its own.
template <class T>
using element_type = typename detail::shape<T>::element;
template <class T>
inline constexpr int vec_size = detail::shape<T>::size;

// ---------------------------------------------------------------- half and bfloat

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
MSL_INLINE ushort half_bits_fast(float value) {
    ushort bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
MSL_INLINE float half_value_fast(ushort bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#elif defined(__F16C__)
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
#define MSL_ARITHMETIC(T, op)                                         \
    friend MSL_INLINE constexpr T operator op(T a, T b) {             \
        return T(float(a) op float(b));                               \
    }                                                                 \
    template <class S, detail::enable_integer<S> = 0>                 \
    friend MSL_INLINE constexpr T operator op(T a, S b) {             \
        return a op T(b);                                             \
    }                                                                 \
    template <class S, detail::enable_integer<S> = 0>                 \
    friend MSL_INLINE constexpr T operator op(S a, T b) {             \
        return T(a) op b;                                             \
    }                                                                 \
    template <class S, detail::enable_float<S> = 0>                   \
    friend MSL_INLINE constexpr float operator op(T a, S b) {         \
        return float(a) op b;                                         \
    }                                                                 \
    template <class S, detail::enable_float<S> = 0>                   \
    friend MSL_INLINE constexpr float operator op(S a, T b) {         \
        return a op float(b);                                         \
    }                                                                 \
    template <class S>                                                \
    friend MSL_INLINE constexpr T& operator op##=(T & a, S b) {       \
        return a = T(a op b);                                         \
    }

#define MSL_COMPARISON(T, op)                                         \
    friend MSL_INLINE constexpr bool operator op(T a, T b) {          \
        return float(a) op float(b);                                  \
    }                                                                 \
    template <class S, detail::enable_integer<S> = 0>                 \
    friend MSL_INLINE constexpr bool operator op(T a, S b) {          \
        return a op T(b);                                             \
    }                                                                 \
    template <class S, detail::enable_integer<S> = 0>                 \
    friend MSL_INLINE constexpr bool operator op(S a, T b) {          \
        return T(a) op b;                                             \
    }                                                                 \
    template <class S, detail::enable_float<S> = 0>                   \
    friend MSL_INLINE constexpr bool operator op(T a, S b) {          \
        return float(a) op b;                                         \
    }                                                                 \
    template <class S, detail::enable_float<S> = 0>                   \
    friend MSL_INLINE constexpr bool operator op(S a, T b) {          \
        return a op float(b);                                         \
    }

#define MSL_16_BIT_OPERATORS(T)                                       \
    MSL_ARITHMETIC(T, +)                                              \
    MSL_ARITHMETIC(T, -)                                              \
    MSL_ARITHMETIC(T, *)                                              \
    MSL_ARITHMETIC(T, /)                                              \
    MSL_COMPARISON(T, ==)                                             \
    MSL_COMPARISON(T, !=)                                             \
    MSL_COMPARISON(T, <)                                              \
    MSL_COMPARISON(T, <=)                                             \
    MSL_COMPARISON(T, >)                                              \
    MSL_COMPARISON(T, >=)                                             \
    MSL_INLINE constexpr T operator+() const { return *this; }        \
    MSL_INLINE constexpr T operator-() const {                        \
        return T(detail::pattern{ushort(bits ^ 0x8000)});             \
    }                                                                 \
    MSL_INLINE constexpr T& operator++() { return *this += 1; }       \
    MSL_INLINE constexpr T& operator--() { return *this -= 1; }       \
    MSL_INLINE constexpr T operator++(int) {                          \
        T const before = *this;                                       \
        ++*this;                                                      \
        return before;                                                \
    }                                                                 \
    MSL_INLINE constexpr T operator--(int) {                          \
        T const before = *this;                                       \
        --*this;                                                      \
        return before;                                                \
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
#define MSL_MIXED(op, result)                                             \
    MSL_INLINE constexpr result operator op(half a, bfloat b) {           \
        return float(a) op float(b);                                      \
    }                                                                     \
    MSL_INLINE constexpr result operator op(bfloat a, half b) {           \
        return float(a) op float(b);                                      \
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

// ---------------------------------------------------------------- vectors

namespace detail {

template <class T, int N>
struct components;
template <class T>
struct components<T, 2> {
    T x, y;
};
template <class T>
struct components<T, 3> {
    T x, y, z;
};
template <class T>
struct components<T, 4> {
    T x, y, z, w;
};

template <int... I>
struct indices {};
template <int N>
struct count_up;
template <>
struct count_up<2> {
    using type = indices<0, 1>;
};
template <>
struct count_up<3> {
    using type = indices<0, 1, 2>;
};
template <>
struct count_up<4> {
    using type = indices<0, 1, 2, 3>;
};

template <int I, class T, int N>
MSL_INLINE constexpr T& component(components<T, N>& v) {
    static_assert(I < N, "the vector has fewer components");
    if constexpr (I == 0) {
        return v.x;
    } else if constexpr (I == 1) {
        return v.y;
    } else if constexpr (I == 2) {
        return v.z;
    } else {
        return v.w;
    }
}
template <int I, class T, int N>
MSL_INLINE constexpr T const& component(components<T, N> const& v) {
    return component<I>(const_cast<components<T, N>&>(v));
}

// The component at a place that is only known at run time.  The reference to an array
// lets -fsanitize=bounds check the place against N.
template <class T, int N>
MSL_INLINE constexpr T& component_at(components<T, N>& v, ptrdiff_t i) {
    if (__builtin_is_constant_evaluated()) {
        if constexpr (N == 4) {
            if (i == 3) {
                return v.w;
            }
        }
        if constexpr (N >= 3) {
            if (i == 2) {
                return v.z;
            }
        }
        return i == 1 ? v.y : v.x;
    }
    return reinterpret_cast<T(&)[N]>(v)[i];
}
template <class T, int N>
MSL_INLINE constexpr T const& component_at(components<T, N> const& v, ptrdiff_t i) {
    return component_at(const_cast<components<T, N>&>(v), i);
}

// Number I of all the components of scalars and vectors written in a row.
template <int I, class First, class... Rest>
MSL_INLINE constexpr auto pick(First const& first, Rest const&... rest) {
    if constexpr (I >= vec_size<First>) {
        return pick<I - vec_size<First>>(rest...);
    } else if constexpr (vec_size<First> == 1) {
        return first;
    } else {
        return component<I>(first);
    }
}

// A selection of a vector's components that can be assigned to.
template <class Vector, int... I>
struct swizzled {
    using value_type = vec<element_type<Vector>, sizeof...(I)>;
    Vector& target;

    MSL_INLINE constexpr explicit swizzled(Vector& v) : target(v) {}
    MSL_INLINE constexpr operator value_type() const {
        return value_type(component<I>(target)...);
    }
    MSL_INLINE constexpr swizzled const& operator=(value_type value) const {
        int i = 0;
        ((component<I>(target) = value[i++]), ...);
        return *this;
    }
    MSL_INLINE constexpr swizzled const& operator=(swizzled const& other) const {
        return *this = value_type(other);
    }
#define MSL_COMPOUND(op)                                                        \
    MSL_INLINE constexpr swizzled const& operator op##=(value_type value) const { \
        return *this = value_type(*this) op value;                              \
    }
    MSL_COMPOUND(+)
    MSL_COMPOUND(-)
    MSL_COMPOUND(*)
    MSL_COMPOUND(/)
    MSL_COMPOUND(%)
    MSL_COMPOUND(&)
    MSL_COMPOUND(|)
    MSL_COMPOUND(^)
    MSL_COMPOUND(<<)
    MSL_COMPOUND(>>)
#undef MSL_COMPOUND
};

template <class T, int N>
MSL_INLINE constexpr components<T, N> repeat(T value) {
    if constexpr (N == 2) {
        return {value, value};
    } else if constexpr (N == 3) {
        return {value, value, value};
    } else {
        return {value, value, value, value};
    }
}
template <class T, int N, int... I, class... A>
MSL_INLINE constexpr components<T, N> gather_at(indices<I...>, A const&... a) {
    return {static_cast<T>(pick<I>(a...))...};
}
template <class T, int N, class... A>
MSL_INLINE constexpr components<T, N> gather(A const&... a) {
    return gather_at<T, N>(typename count_up<N>::type{}, a...);
}

template <class... A>
inline constexpr int total_size = (0 + ... + vec_size<A>);
template <class... A>
inline constexpr bool all_numeric =
    ((kind_of<element_type<A>> != not_scalar) && ...);

}  // namespace detail

// Members that vec and packed_vec share.
#define MSL_COMPONENT_ACCESS(self)                                                \
    using base = detail::components<T, N>;                                        \
    self() = default;                                                             \
    template <class S, class = detail::enable_scalar<S, int>>                     \
    MSL_INLINE constexpr self(S value)                                            \
        : base(detail::repeat<T, N>(static_cast<T>(value))) {}                    \
    template <class A, class B, class... More,                                    \
              class = metal::enable_if_t<                                         \
                  detail::all_numeric<A, B, More...> &&                           \
                  detail::total_size<A, B, More...> == N>>                        \
    MSL_INLINE constexpr self(A const& a, B const& b, More const&... more)        \
        : base(detail::gather<T, N>(a, b, more...)) {}                            \
    MSL_INLINE constexpr T& operator[](ptrdiff_t i) {                             \
        return detail::component_at<T, N>(*this, i);                              \
    }                                                                             \
    MSL_INLINE constexpr T const& operator[](ptrdiff_t i) const {                 \
        return detail::component_at<T, N>(*this, i);                              \
    }                                                                             \
    template <int... I>                                                           \
    MSL_INLINE constexpr auto swizzle() const {                                   \
        base const& v = *this;                                                    \
        if constexpr (sizeof...(I) == 1) {                                        \
            return (detail::component<I>(v), ...);                                \
        } else {                                                                  \
            return vec<T, sizeof...(I)>(detail::component<I>(v)...);              \
        }                                                                         \
    }                                                                             \
    template <int... I>                                                           \
    MSL_INLINE constexpr decltype(auto) swizzled() {                              \
        base& v = *this;                                                          \
        if constexpr (sizeof...(I) == 1) {                                        \
            return (detail::component<I>(v), ...);                                \
        } else {                                                                  \
            return detail::swizzled<self, I...>(*this);                           \
        }                                                                         \
    }

// Operators take vectors by value: a vector in memory is then read by one access.
#define MSL_VECTOR_OPERATOR(op)                                                 \
    friend MSL_INLINE constexpr vec operator op(vec a, vec b) {                 \
        a.x = T(a.x op b.x);                                                    \
        a.y = T(a.y op b.y);                                                    \
        if constexpr (N > 2) {                                                  \
            a.z = T(a.z op b.z);                                                \
        }                                                                       \
        if constexpr (N > 3) {                                                  \
            a.w = T(a.w op b.w);                                                \
        }                                                                       \
        return a;                                                               \
    }                                                                           \
    friend MSL_INLINE constexpr vec& operator op##=(vec & a, vec b) {           \
        a = a op b;                                                             \
        return a;                                                               \
    }

#define MSL_VECTOR_TEST(op)                                                     \
    friend MSL_INLINE constexpr vec<bool, N> operator op(vec a, vec b) {        \
        vec<bool, N> r(false);                                                  \
        r.x = a.x op b.x;                                                       \
        r.y = a.y op b.y;                                                       \
        if constexpr (N > 2) {                                                  \
            r.z = a.z op b.z;                                                   \
        }                                                                       \
        if constexpr (N > 3) {                                                  \
            r.w = a.w op b.w;                                                   \
        }                                                                       \
        return r;                                                               \
    }

#define MSL_VECTOR_UNARY(op, result)                                            \
    friend MSL_INLINE constexpr vec<result, N> operator op(vec a) {             \
        vec<result, N> r(result(op a.x));                                       \
        r.y = result(op a.y);                                                   \
        if constexpr (N > 2) {                                                  \
            r.z = result(op a.z);                                               \
        }                                                                       \
        if constexpr (N > 3) {                                                  \
            r.w = result(op a.w);                                               \
        }                                                                       \
        return r;                                                               \
    }

// Aligned as Metal aligns it: a vector of three takes the room of four.
template <class T, int N>
struct alignas((N == 2 ? 2 : 4) * sizeof(T)) vec : detail::components<T, N> {
    static_assert(2 <= N && N <= 4, "Metal has vectors of 2, 3 and 4");

    MSL_COMPONENT_ACCESS(vec)

    template <class U, class = metal::enable_if_t<!metal::is_same_v<U, T>>>
    MSL_INLINE constexpr explicit vec(vec<U, N> const& other)
        : base(detail::gather<T, N>(other)) {}
    template <class U, class = metal::enable_if_t<!metal::is_same_v<U, T>>>
    MSL_INLINE constexpr explicit vec(packed_vec<U, N> const& other)
        : base(detail::gather<T, N>(other)) {}

#if defined(MSL_TRACE)
    MSL_INLINE constexpr vec(vec const& other)
        : base(__builtin_is_constant_evaluated() ? base(other) : base{}) {
        if (!__builtin_is_constant_evaluated()) {
            msl_copy(this, &other, sizeof(base));
        }
    }
    MSL_INLINE constexpr vec& operator=(vec const& other) {
        if (__builtin_is_constant_evaluated()) {
            base::operator=(other);
        } else {
            msl_copy(this, &other, sizeof(base));
        }
        return *this;
    }
#endif

    MSL_VECTOR_OPERATOR(+)
    MSL_VECTOR_OPERATOR(-)
    MSL_VECTOR_OPERATOR(*)
    MSL_VECTOR_OPERATOR(/)
    MSL_VECTOR_OPERATOR(%)
    MSL_VECTOR_OPERATOR(&)
    MSL_VECTOR_OPERATOR(|)
    MSL_VECTOR_OPERATOR(^)
    MSL_VECTOR_OPERATOR(<<)
    MSL_VECTOR_OPERATOR(>>)
    MSL_VECTOR_TEST(==)
    MSL_VECTOR_TEST(!=)
    MSL_VECTOR_TEST(<)
    MSL_VECTOR_TEST(<=)
    MSL_VECTOR_TEST(>)
    MSL_VECTOR_TEST(>=)
    MSL_VECTOR_TEST(&&)
    MSL_VECTOR_TEST(||)
    MSL_VECTOR_UNARY(+, T)
    MSL_VECTOR_UNARY(-, T)
    MSL_VECTOR_UNARY(~, T)
    MSL_VECTOR_UNARY(!, bool)

    MSL_INLINE constexpr vec& operator++() { return *this += T(1); }
    MSL_INLINE constexpr vec& operator--() { return *this -= T(1); }
    MSL_INLINE constexpr vec operator++(int) {
        vec const before = *this;
        ++*this;
        return before;
    }
    MSL_INLINE constexpr vec operator--(int) {
        vec const before = *this;
        --*this;
        return before;
    }
};

#undef MSL_VECTOR_OPERATOR
#undef MSL_VECTOR_TEST
#undef MSL_VECTOR_UNARY

// A vector without alignment of its own, as in a buffer of tightly packed structures.
template <class T, int N>
struct packed_vec : detail::components<T, N> {
    MSL_COMPONENT_ACCESS(packed_vec)

    template <class U>
    MSL_INLINE constexpr packed_vec(vec<U, N> const& other)
        : base(detail::gather<T, N>(other)) {
        static_assert(metal::is_same_v<T, U>, "convert the vector first");
    }
    MSL_INLINE constexpr operator vec<T, N>() const {
        if constexpr (N == 2) {
            return vec<T, N>(this->x, this->y);
        } else if constexpr (N == 3) {
            return vec<T, N>(this->x, this->y, this->z);
        } else {
            return vec<T, N>(this->x, this->y, this->z, this->w);
        }
    }

#define MSL_PACKED_COMPOUND(op)                                                  \
    friend MSL_INLINE constexpr packed_vec& operator op##=(packed_vec & a, vec<T, N> b) { \
        return a = vec<T, N>(a) op b;                                            \
    }
    MSL_PACKED_COMPOUND(+)
    MSL_PACKED_COMPOUND(-)
    MSL_PACKED_COMPOUND(*)
    MSL_PACKED_COMPOUND(/)
#undef MSL_PACKED_COMPOUND
};
#undef MSL_COMPONENT_ACCESS

// Arithmetic on packed vectors is arithmetic on vectors.
#define MSL_PACKED_OPERATOR(op)                                                       \
    template <class T, int N>                                                         \
    MSL_INLINE constexpr auto operator op(packed_vec<T, N> const& a) {                \
        return op vec<T, N>(a);                                                       \
    }
MSL_PACKED_OPERATOR(+)
MSL_PACKED_OPERATOR(-)
MSL_PACKED_OPERATOR(~)
MSL_PACKED_OPERATOR(!)
#undef MSL_PACKED_OPERATOR
#define MSL_PACKED_OPERATOR(op)                                                       \
    template <class T, int N>                                                         \
    MSL_INLINE constexpr auto operator op(packed_vec<T, N> const& a,                  \
                                          packed_vec<T, N> const& b) {                \
        return vec<T, N>(a) op vec<T, N>(b);                                          \
    }                                                                                 \
    template <class T, int N, class S>                                                \
    MSL_INLINE constexpr auto operator op(packed_vec<T, N> const& a, S const& b)      \
        -> decltype(vec<T, N>(a) op b) {                                              \
        return vec<T, N>(a) op b;                                                     \
    }                                                                                 \
    template <class T, int N, class S>                                                \
    MSL_INLINE constexpr auto operator op(S const& a, packed_vec<T, N> const& b)      \
        -> decltype(a op vec<T, N>(b)) {                                              \
        return a op vec<T, N>(b);                                                     \
    }
MSL_PACKED_OPERATOR(+)
MSL_PACKED_OPERATOR(-)
MSL_PACKED_OPERATOR(*)
MSL_PACKED_OPERATOR(/)
MSL_PACKED_OPERATOR(%)
MSL_PACKED_OPERATOR(&)
MSL_PACKED_OPERATOR(|)
MSL_PACKED_OPERATOR(^)
MSL_PACKED_OPERATOR(<<)
MSL_PACKED_OPERATOR(>>)
MSL_PACKED_OPERATOR(==)
MSL_PACKED_OPERATOR(!=)
MSL_PACKED_OPERATOR(<)
MSL_PACKED_OPERATOR(<=)
MSL_PACKED_OPERATOR(>)
MSL_PACKED_OPERATOR(>=)
#undef MSL_PACKED_OPERATOR

#define MSL_VECTOR_NAMES(T)          \
    typedef vec<T, 2> T##2;          \
    typedef vec<T, 3> T##3;          \
    typedef vec<T, 4> T##4;          \
    typedef packed_vec<T, 2> packed_##T##2; \
    typedef packed_vec<T, 3> packed_##T##3; \
    typedef packed_vec<T, 4> packed_##T##4;
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

// ---------------------------------------------------------------- bit casts, arrays

template <class To, class From>
MSL_INLINE constexpr To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
#if defined(MSL_TRACE)
    if constexpr (!__is_trivially_copyable(To) || !__is_trivially_copyable(From)) {
        To to;
        __builtin_memcpy(static_cast<void*>(&to), static_cast<void const*>(&from), sizeof to);
        return to;
    } else
#endif
        return __builtin_bit_cast(To, from);
}

namespace metal {

template <class T, size_t N>
struct array {
    T elements[N];

    MSL_INLINE constexpr T& operator[](size_t i) { return elements[i]; }
    MSL_INLINE constexpr T const& operator[](size_t i) const { return elements[i]; }
    MSL_INLINE constexpr T* data() { return elements; }
    MSL_INLINE constexpr T const* data() const { return elements; }
    MSL_INLINE constexpr T* begin() { return elements; }
    MSL_INLINE constexpr T const* begin() const { return elements; }
    MSL_INLINE constexpr T* end() { return elements + N; }
    MSL_INLINE constexpr T const* end() const { return elements + N; }
    MSL_INLINE constexpr size_t size() const { return N; }
};

}  // namespace metal

// ---------------------------------------------------------------- limits

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

// Written with a leading `::`, as some headers do, metal's names are found all the same.
namespace metal = msl::metal;
