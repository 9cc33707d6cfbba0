// Metal's library as the lint shows it to clang: declarations, with the address spaces of
// every pointer and reference that the functions take.
#pragma once
#include "lint_types.hpp"
#pragma clang system_header

namespace msl {

namespace detail {

// What two arguments meet in: a vector, where there is one.
template <class A, class B, bool same, bool vectors>
struct meet {
    using type = decltype(A() + B());
};
template <class A, class B>
struct meet<A, B, true, false> {
    using type = A;
};
template <class A, class B>
struct meet<A, B, true, true> {
    using type = A;
};
template <class A, class B>
struct meet<A, B, false, true> {
    using type = metal::conditional_t<(msl_vec_size<A> > 1), A, B>;
};
template <class A, class B>
using both = typename meet<A, B, __is_same(A, B),
                           (msl_vec_size<A> > 1 || msl_vec_size<B> > 1)>::type;

template <class E, int N>
struct shaped {
    using type = vec<E, N>;
};
template <class E>
struct shaped<E, 1> {
    using type = E;
};
// A value of element E for each component of A.
template <class E, class A>
using like = typename shaped<E, msl_vec_size<A>>::type;

}  // namespace detail

namespace metal {

// ------------------------------------------------------------ functions of numbers

#define MSL_1(name)                                 \
    template <class A>                              \
    constexpr A name(A);                            \
    template <class A, class... More>               \
    A __metal_##name(A, More...);
#define MSL_2(name)                                 \
    template <class A, class B>                     \
    constexpr detail::both<A, B> name(A, B);        \
    template <class A, class... More>               \
    A __metal_##name(A, More...);
#define MSL_3(name)                                                    \
    template <class A, class B, class C>                               \
    constexpr detail::both<detail::both<A, B>, C> name(A, B, C);       \
    template <class A, class... More>                                  \
    A __metal_##name(A, More...);
#define MSL_TEST(name)                              \
    template <class A>                              \
    detail::like<bool, A> name(A);                  \
    template <class A, class... More>               \
    detail::like<bool, A> __metal_##name(A, More...);

#define MSL_MATH                                                                      \
    MSL_1(acos) MSL_1(acosh) MSL_1(asin) MSL_1(asinh) MSL_1(atan) MSL_1(atanh)        \
    MSL_1(ceil) MSL_1(cos) MSL_1(cosh) MSL_1(cospi) MSL_1(exp) MSL_1(exp2)            \
    MSL_1(exp10) MSL_1(fabs) MSL_1(floor) MSL_1(fract) MSL_1(log) MSL_1(log2)         \
    MSL_1(log10) MSL_1(rint) MSL_1(round) MSL_1(rsqrt) MSL_1(sign) MSL_1(sin)         \
    MSL_1(sinh) MSL_1(sinpi) MSL_1(sqrt) MSL_1(tan) MSL_1(tanh) MSL_1(tanpi)          \
    MSL_1(trunc) MSL_1(saturate) MSL_1(abs) MSL_1(normalize)                          \
    MSL_1(clz) MSL_1(ctz) MSL_1(popcount) MSL_1(reverse_bits)                         \
    MSL_2(atan2) MSL_2(copysign) MSL_2(divide) MSL_2(fdim) MSL_2(fmax) MSL_2(fmin)    \
    MSL_2(fmod) MSL_2(pow) MSL_2(powr) MSL_2(step) MSL_2(nextafter) MSL_2(max)        \
    MSL_2(min) MSL_2(addsat) MSL_2(subsat) MSL_2(hadd) MSL_2(rhadd) MSL_2(mul24)      \
    MSL_2(mulhi) MSL_2(rotate) MSL_2(absdiff) MSL_2(cross)                            \
    MSL_3(fma) MSL_3(fmax3) MSL_3(fmedian3) MSL_3(fmin3) MSL_3(max3) MSL_3(median3)   \
    MSL_3(min3) MSL_3(mix) MSL_3(smoothstep) MSL_3(clamp) MSL_3(mad24) MSL_3(madhi)   \
    MSL_3(madsat)                                                                     \
    MSL_TEST(isfinite) MSL_TEST(isinf) MSL_TEST(isnan) MSL_TEST(isnormal)             \
    MSL_TEST(signbit)
MSL_MATH
namespace fast {
MSL_MATH
template <class A>
A sincos(A, A thread&);
}  // namespace fast
namespace precise {
MSL_MATH
template <class A>
A sincos(A, A thread&);
}  // namespace precise

template <class A, class B>
detail::like<bool, A> isordered(A, B);
template <class A, class B>
detail::like<bool, A> isunordered(A, B);
template <class A, class B, class C>
constexpr detail::both<A, B> select(A, B, C);
template <class A, class K>
A ldexp(A, K);
template <class A>
detail::like<int, A> ilogb(A);
template <class A>
A frexp(A, detail::like<int, A> thread&);
template <class A>
A modf(A, A thread&);
template <class A>
A sincos(A, A thread&);
template <class A, class... More>
A __metal_ldexp(A, More...);
template <class A>
A __metal_frexp(A, int thread*, int = 0);
template <class A>
A extract_bits(A, uint, uint);
template <class A>
A insert_bits(A, A, uint, uint);
template <class A>
bool all(A);
template <class A>
bool any(A);
#define MSL_GEOMETRY_1(name) \
    template <class A>       \
    msl_element_type<A> name(A);
#define MSL_GEOMETRY_2(name) \
    template <class A>       \
    msl_element_type<A> name(A, A);
MSL_GEOMETRY_1(length)
MSL_GEOMETRY_1(length_squared)
MSL_GEOMETRY_2(dot)
MSL_GEOMETRY_2(distance)
MSL_GEOMETRY_2(distance_squared)
template <class A>
A reflect(A, A);
template <class A>
A refract(A, A, msl_element_type<A>);
template <class A>
A faceforward(A, A, A);

// ------------------------------------------------------------------- simdgroups

#define MSL_LANES(name)                  \
    template <class T>                   \
    T simd_##name(T);                    \
    template <class T>                   \
    T quad_##name(T);                    \
    template <class T, class... More>    \
    T __metal_simd_##name(T, More...);
MSL_LANES(sum)
MSL_LANES(product)
MSL_LANES(min)
MSL_LANES(max)
MSL_LANES(and)
MSL_LANES(or)
MSL_LANES(xor)
MSL_LANES(prefix_inclusive_sum)
MSL_LANES(prefix_exclusive_sum)
MSL_LANES(prefix_inclusive_product)
MSL_LANES(prefix_exclusive_product)
MSL_LANES(broadcast_first)
#undef MSL_LANES
#define MSL_LANES(name)                  \
    template <class T>                   \
    T simd_##name(T, ushort);            \
    template <class T>                   \
    T quad_##name(T, ushort);            \
    template <class T, class... More>    \
    T __metal_simd_##name(T, More...);
MSL_LANES(shuffle)
MSL_LANES(broadcast)
MSL_LANES(shuffle_xor)
MSL_LANES(shuffle_up)
MSL_LANES(shuffle_down)
MSL_LANES(shuffle_rotate_up)
MSL_LANES(shuffle_rotate_down)
#undef MSL_LANES
#define MSL_FILL(name)                             \
    template <class T>                             \
    T simd_##name(T, T, ushort, ushort = 32);      \
    template <class T>                             \
    T quad_##name(T, T, ushort, ushort = 4);       \
    template <class T>                             \
    T __metal_simd_##name(T, T, ushort, ushort);
MSL_FILL(shuffle_and_fill_up)
MSL_FILL(shuffle_and_fill_down)
#undef MSL_FILL

class simd_vote {
   public:
    typedef ulong vote_t;
    explicit simd_vote(vote_t = 0);
    explicit operator vote_t() const;
    bool all() const;
    bool any() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();
bool simd_any(bool);
bool simd_all(bool);
bool quad_any(bool);
bool quad_all(bool);
bool simd_is_first();
bool quad_is_first();

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
    simdgroup_matrix() = default;
    explicit simdgroup_matrix(T diagonal);
    vec<T, 2> thread& thread_elements();
    vec<T, 2> thread const& thread_elements() const;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);
template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(T);
#define MSL_MATRIX(space)                                                              \
    template <class T>                                                                 \
    void simdgroup_load(simdgroup_matrix<T, 8, 8> thread&, T space const*, ulong = 8,  \
                        ulong2 = 0, bool = false);                                     \
    template <class T>                                                                 \
    void simdgroup_store(simdgroup_matrix<T, 8, 8> thread const&, T space*, ulong = 8, \
                         ulong2 = 0, bool = false);
MSL_MATRIX(device)
MSL_MATRIX(threadgroup)
#undef MSL_MATRIX
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> thread&,
                                   simdgroup_matrix<A, 8, 8> thread const&,
                                   simdgroup_matrix<B, 8, 8> thread const&,
                                   simdgroup_matrix<C, 8, 8> thread const&);
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8> thread&,
                        simdgroup_matrix<A, 8, 8> thread const&,
                        simdgroup_matrix<B, 8, 8> thread const&);
template <class T>
simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> thread const&,
                                    simdgroup_matrix<T, 8, 8> thread const&);

// ------------------------------------------------------------ barriers, atomics

enum class mem_flags : uint {
    mem_none = 0,
    mem_device = 1,
    mem_threadgroup = 2,
    mem_texture = 4,
    mem_threadgroup_imageblock = 8,
    mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

enum memory_order { memory_order_relaxed };
enum thread_scope {
    thread_scope_thread,
    thread_scope_simdgroup,
    thread_scope_threadgroup,
    thread_scope_device,
    thread_scope_system,
};
void atomic_thread_fence(mem_flags, memory_order = memory_order_relaxed,
                         thread_scope = thread_scope_device);

template <class T>
struct atomic {
    T msl_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

#define MSL_UPDATE(space, name)   \
    template <class T, class U>   \
    T atomic_##name##_explicit(atomic<T> space volatile*, U, memory_order);
#define MSL_ATOMICS(space)                                                               \
    template <class T>                                                                   \
    T atomic_load_explicit(atomic<T> space const volatile*, memory_order);               \
    template <class T, class U>                                                          \
    void atomic_store_explicit(atomic<T> space volatile*, U, memory_order);              \
    template <class T, class U>                                                          \
    bool atomic_compare_exchange_weak_explicit(atomic<T> space volatile*, T thread*, U,  \
                                               memory_order, memory_order);              \
    MSL_UPDATE(space, exchange) MSL_UPDATE(space, fetch_add) MSL_UPDATE(space, fetch_sub) \
    MSL_UPDATE(space, fetch_min) MSL_UPDATE(space, fetch_max)                            \
    MSL_UPDATE(space, fetch_and) MSL_UPDATE(space, fetch_or) MSL_UPDATE(space, fetch_xor)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
#undef MSL_ATOMICS
#undef MSL_UPDATE

}  // namespace metal

// The names that Apple's own headers call underneath; MLX's kernels use them.
constexpr int __METAL_MAYBE_FAST_MATH__ = 0;
constexpr int __METAL_FAST_MATH__ = 1;
constexpr int __METAL_PRECISE_MATH__ = 2;
template <class T>
T __metal_get_simdgroup_size(T);
template <class T>
T __metal_get_thread_index_in_simdgroup(T);

}  // namespace msl
