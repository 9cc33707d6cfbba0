// Integer types, and the traits that do not ask which type it is: for kernels that run, and
// for those that the lint shows to clang.
#pragma once

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

// ---------------------------------------------------------------- traits

namespace metal {

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
#define MSL_TRANSFORM(name, from, result) \
    template <class T>                    \
    struct name {                         \
        using type = T;                   \
    };                                    \
    template <class T>                    \
    struct name<from> {                   \
        using type = result;              \
    };                                    \
    template <class T>                    \
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

}  // namespace metal

}  // namespace msl
