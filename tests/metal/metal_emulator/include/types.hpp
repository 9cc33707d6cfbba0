// Metal's scalar, vector and packed types, its type traits and its limits, in plain
// C++17 for g++, clang and NVRTC.  No system header is included: NVRTC has none.
//
// MSL's built-in types live in namespace msl, what <metal_stdlib> declares in msl::metal.
#pragma once

#include "traits.hpp"
#include "half.hpp"
#include "vectors.hpp"
#include "limits.hpp"

namespace msl {

template <class To, class From>
MSL_INLINE constexpr To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
#if defined(MSL_TRACE) || defined(__clang__)
    if constexpr (!__is_trivially_copyable(To) || !__is_trivially_copyable(From)) {
        To to;
        __builtin_memcpy(static_cast<void*>(&to), static_cast<void const*>(&from), sizeof to);
        return to;
    } else
#endif
        return __builtin_bit_cast(To, from);
}

namespace metal {

// A value that is the same for all threads; that it is one is not checked.
template <class T>
using uniform = T;
template <class T>
MSL_INLINE constexpr T make_uniform(T value) {
    return value;
}

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

}  // namespace msl

// Written with a leading `::`, as some headers do, metal's names are found all the same.
namespace metal = msl::metal;
