// The traits of Metal's types, and what counts as a scalar.
#pragma once
#include "meta.hpp"

#if defined(__CUDACC_RTC__)
#define MSL_INLINE __forceinline__
#define MSL_MEMCPY ::memcpy
#else
#define MSL_INLINE inline __attribute__((always_inline))
#define MSL_MEMCPY __builtin_memcpy
#endif

namespace msl {

struct half;
struct bfloat;
template <class T, int N>
struct vec;
template <class T, int N>
struct packed_vec;

// ---------------------------------------------------------------- traits

namespace metal {

using msl::vec;

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

// Apple's own name for std::disjunction and its kin, which MLX's kernels use.
template <class... B>
struct _disjunction : bool_constant<(B::value || ...)> {};
template <class... B>
struct _conjunction : bool_constant<(B::value && ...)> {};
template <class B>
struct _negation : bool_constant<!B::value> {};

// A predicate is its variable template; the class of the same name derives from it.
#define MSL_PREDICATE(name, condition)          \
    template <class T>                          \
    inline constexpr bool name##_v = condition; \
    template <class T>                          \
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
using msl_element_type = typename detail::shape<T>::element;
template <class T>
inline constexpr int msl_vec_size = detail::shape<T>::size;

}  // namespace msl
