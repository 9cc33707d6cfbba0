// Metal's vectors: vec<T, 2..4>, their packed forms, selections of components, operators.
#pragma once

#include "half.hpp"

#if defined(MSL_TRACE)
// One vector load or store must stay one access when every access is traced.
extern "C" void msl_copy(void* to, void const* from, unsigned long bytes);
#endif

namespace msl {

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
    if constexpr (I >= msl_vec_size<First>) {
        return pick<I - msl_vec_size<First>>(rest...);
    } else if constexpr (msl_vec_size<First> == 1) {
        return first;
    } else {
        return component<I>(first);
    }
}

// A selection of a vector's components that can be assigned to.
template <class Vector, int... I>
struct swizzled {
    using value_type = vec<msl_element_type<Vector>, sizeof...(I)>;
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
#define MSL_COMPOUND(op)                                                          \
    MSL_INLINE constexpr swizzled const& operator op##=(value_type value) const { \
        return *this = value_type(*this) op value;                                \
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
inline constexpr int total_size = (0 + ... + msl_vec_size<A>);
template <class... A>
inline constexpr bool all_numeric =
    ((kind_of<msl_element_type<A>> != not_scalar) && ...);

}  // namespace detail

// Members that vec and packed_vec share.
#define MSL_COMPONENT_ACCESS(self)                                         \
    using base = detail::components<T, N>;                                 \
    self() = default;                                                      \
    template <class S, class = detail::enable_scalar<S, int>>              \
    MSL_INLINE constexpr self(S value)                                     \
        : base(detail::repeat<T, N>(static_cast<T>(value))) {}             \
    template <class A, class B, class... More,                             \
              class = metal::enable_if_t<                                  \
                  detail::all_numeric<A, B, More...> &&                    \
                  detail::total_size<A, B, More...> == N>>                 \
    MSL_INLINE constexpr self(A const& a, B const& b, More const&... more) \
        : base(detail::gather<T, N>(a, b, more...)) {}                     \
    MSL_INLINE constexpr T& operator[](ptrdiff_t i) {                      \
        return detail::component_at<T, N>(*this, i);                       \
    }                                                                      \
    MSL_INLINE constexpr T const& operator[](ptrdiff_t i) const {          \
        return detail::component_at<T, N>(*this, i);                       \
    }                                                                      \
    template <int... I>                                                    \
    MSL_INLINE constexpr auto swizzle() const {                            \
        base const& v = *this;                                             \
        if constexpr (sizeof...(I) == 1) {                                 \
            return (detail::component<I>(v), ...);                         \
        } else {                                                           \
            return vec<T, sizeof...(I)>(detail::component<I>(v)...);       \
        }                                                                  \
    }                                                                      \
    template <int... I>                                                    \
    MSL_INLINE constexpr decltype(auto) swizzled() {                       \
        base& v = *this;                                                   \
        if constexpr (sizeof...(I) == 1) {                                 \
            return (detail::component<I>(v), ...);                         \
        } else {                                                           \
            return detail::swizzled<self, I...>(*this);                    \
        }                                                                  \
    }

// Operators take vectors by value: a vector in memory is then read by one access.
#define MSL_VECTOR_OPERATOR(op)                                       \
    friend MSL_INLINE constexpr vec operator op(vec a, vec b) {       \
        a.x = T(a.x op b.x);                                          \
        a.y = T(a.y op b.y);                                          \
        if constexpr (N > 2) {                                        \
            a.z = T(a.z op b.z);                                      \
        }                                                             \
        if constexpr (N > 3) {                                        \
            a.w = T(a.w op b.w);                                      \
        }                                                             \
        return a;                                                     \
    }                                                                 \
    friend MSL_INLINE constexpr vec& operator op##=(vec & a, vec b) { \
        a = a op b;                                                   \
        return a;                                                     \
    }

#define MSL_VECTOR_TEST(op)                                              \
    friend MSL_INLINE constexpr vec<bool, N> operator op(vec a, vec b) { \
        vec<bool, N> r(false);                                           \
        r.x = a.x op b.x;                                                \
        r.y = a.y op b.y;                                                \
        if constexpr (N > 2) {                                           \
            r.z = a.z op b.z;                                            \
        }                                                                \
        if constexpr (N > 3) {                                           \
            r.w = a.w op b.w;                                            \
        }                                                                \
        return r;                                                        \
    }

#define MSL_VECTOR_UNARY(op, result)                                \
    friend MSL_INLINE constexpr vec<result, N> operator op(vec a) { \
        vec<result, N> r(result(op a.x));                           \
        r.y = result(op a.y);                                       \
        if constexpr (N > 2) {                                      \
            r.z = result(op a.z);                                   \
        }                                                           \
        if constexpr (N > 3) {                                      \
            r.w = result(op a.w);                                   \
        }                                                           \
        return r;                                                   \
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
#elif defined(__clang__)
    // clang checks alignment where a reference is bound, not in a copy of its own.
    MSL_INLINE constexpr vec(vec const& other) : base(other) {}
    MSL_INLINE constexpr vec& operator=(vec const& other) {
        base::operator=(other);
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

#define MSL_PACKED_COMPOUND(op)                                                           \
    friend MSL_INLINE constexpr packed_vec& operator op##=(packed_vec & a, vec<T, N> b) { \
        return a = vec<T, N>(a) op b;                                                     \
    }
    MSL_PACKED_COMPOUND(+)
    MSL_PACKED_COMPOUND(-)
    MSL_PACKED_COMPOUND(*)
    MSL_PACKED_COMPOUND(/)
#undef MSL_PACKED_COMPOUND
};
#undef MSL_COMPONENT_ACCESS

// Arithmetic on packed vectors is arithmetic on vectors.
#define MSL_PACKED_OPERATOR(op)                                        \
    template <class T, int N>                                          \
    MSL_INLINE constexpr auto operator op(packed_vec<T, N> const& a) { \
        return op vec<T, N>(a);                                        \
    }
MSL_PACKED_OPERATOR(+)
MSL_PACKED_OPERATOR(-)
MSL_PACKED_OPERATOR(~)
MSL_PACKED_OPERATOR(!)
#undef MSL_PACKED_OPERATOR
#define MSL_PACKED_OPERATOR(op)                                                  \
    template <class T, int N>                                                    \
    MSL_INLINE constexpr auto operator op(packed_vec<T, N> const& a,             \
                                          packed_vec<T, N> const& b) {           \
        return vec<T, N>(a) op vec<T, N>(b);                                     \
    }                                                                            \
    template <class T, int N, class S>                                           \
    MSL_INLINE constexpr auto operator op(packed_vec<T, N> const& a, S const& b) \
        -> decltype(vec<T, N>(a) op b) {                                         \
        return vec<T, N>(a) op b;                                                \
    }                                                                            \
    template <class T, int N, class S>                                           \
    MSL_INLINE constexpr auto operator op(S const& a, packed_vec<T, N> const& b) \
        -> decltype(a op vec<T, N>(b)) {                                         \
        return a op vec<T, N>(b);                                                \
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

#define MSL_VECTOR_NAMES(T)                 \
    typedef vec<T, 2> T##2;                 \
    typedef vec<T, 3> T##3;                 \
    typedef vec<T, 4> T##4;                 \
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

}  // namespace msl
