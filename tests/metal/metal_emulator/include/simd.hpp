// Functions in which the lanes of a simdgroup or threadgroup meet: reductions, shuffles,
// votes, 8x8 matrices, barriers, atomics; and how a kernel is given its arguments.
#pragma once
#include "runtime.hpp"

#define MSL_LINE lanes::Line line = lanes::Line(__builtin_LINE())

namespace msl {

namespace lanes {

// The two elements of an 8x8 matrix that a lane holds. Apple does not document it;
// MLX's kernels rely on this layout.
constexpr int matrix_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
constexpr int matrix_column(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
constexpr int matrix_lane(int row, int column) {
    return row / 4 * 16 + column / 4 * 8 + row % 4 * 2 + column / 2 % 2;
}

// Where a function was called; a type of its own, so that no argument slips into it.
enum class Line : int {};

}  // namespace lanes
}  // namespace msl

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "lanes_cuda.hpp"
#else
#include "lanes_cpu.hpp"
#endif

namespace msl {
namespace lanes {

struct Sum {
    template <class T> static T apply(T a, T b) { return T(a + b); }
    template <class T> static T identity() { return T(0); }
};
struct Product {
    template <class T> static T apply(T a, T b) { return T(a * b); }
    template <class T> static T identity() { return T(1); }
};
struct Minimum {
    template <class T> static T apply(T a, T b) { return metal::min(a, b); }
};
struct Maximum {
    template <class T> static T apply(T a, T b) { return metal::max(a, b); }
};
// MLX asks for the exclusive or of floats, so these work on any type's bits.
template <class T, class Operation>
inline T bitwise(T a, T b, Operation) {
    constexpr int words = (sizeof(T) + 3) / 4;
    unsigned left[words] = {}, right[words] = {};
    MSL_MEMCPY(left, &a, sizeof(T));
    MSL_MEMCPY(right, &b, sizeof(T));
    for (int i = 0; i < words; ++i)
        left[i] = Operation::bits(left[i], right[i]);
    MSL_MEMCPY(&a, left, sizeof(T));
    return a;
}
struct And {
    template <class T> static T apply(T a, T b) { return bitwise(a, b, And()); }
    static unsigned bits(unsigned a, unsigned b) { return a & b; }
};
struct Or {
    template <class T> static T apply(T a, T b) { return bitwise(a, b, Or()); }
    static unsigned bits(unsigned a, unsigned b) { return a | b; }
};
struct Xor {
    template <class T> static T apply(T a, T b) { return bitwise(a, b, Xor()); }
    static unsigned bits(unsigned a, unsigned b) { return a ^ b; }
};

// Apply a function of scalars to each component.
template <class T, class Function>
inline T componentwise(T value, Function const& function) {
    if constexpr (msl_vec_size<T> == 1) {
        return function(value);
    } else {
        for (int i = 0; i < msl_vec_size<T>; ++i)
            value[i] = function(value[i]);
        return value;
    }
}

template <class Operation, int Width, class T>
inline T reduce_all(T value, Line line) {
    return componentwise(
        value, [=](auto part) { return reduce<Operation, decltype(part), Width>(part, line); });
}

template <class Operation, bool Inclusive, class T>
inline T prefix_all(T value, Line line) {
    return componentwise(value, [=](auto part) {
        return prefix<Operation, decltype(part), Inclusive>(part, line);
    });
}

// Each lane reads its own two elements, but all 32 must take part.
inline void whole_simdgroup(Line line) {
#if !defined(__CUDACC_RTC__)
    if (active(line) != 0xffffffffu)
        msl_fail(int(host::DIVERGENCE), "a simdgroup matrix operation needs all 32 lanes", 0);
#endif
}

// A lane that does not exist: the caller keeps its `otherwise`.
constexpr unsigned NOBODY = 32;

}  // namespace lanes

namespace metal {

// ------------------------------------------------------------- reductions, prefixes
#define MSL_REDUCTION(name, Operation)                              \
    template <class T> inline T simd_##name(T value, MSL_LINE) {    \
        return lanes::reduce_all<lanes::Operation, 32>(value, line); \
    }                                                               \
    template <class T> inline T quad_##name(T value, MSL_LINE) {    \
        return lanes::reduce_all<lanes::Operation, 4>(value, line);  \
    }
MSL_REDUCTION(sum, Sum)
MSL_REDUCTION(product, Product)
MSL_REDUCTION(min, Minimum)
MSL_REDUCTION(max, Maximum)
MSL_REDUCTION(and, And)
MSL_REDUCTION(or, Or)
MSL_REDUCTION(xor, Xor)
#undef MSL_REDUCTION

#define MSL_PREFIX(name, Operation, inclusive)                          \
    template <class T> inline T simd_prefix_##name(T value, MSL_LINE) { \
        return lanes::prefix_all<lanes::Operation, inclusive>(value, line); \
    }
MSL_PREFIX(inclusive_sum, Sum, true)
MSL_PREFIX(exclusive_sum, Sum, false)
MSL_PREFIX(inclusive_product, Product, true)
MSL_PREFIX(exclusive_product, Product, false)
#undef MSL_PREFIX

// ------------------------------------------------------------------------ shuffles
template <class T> inline T simd_shuffle(T value, ushort source, MSL_LINE) {
    return lanes::shuffle(value, value, source % 32u, line);
}
template <class T> inline T simd_broadcast(T value, ushort source, MSL_LINE) {
    return lanes::shuffle(value, value, source % 32u, line);
}
template <class T> inline T simd_shuffle_xor(T value, ushort mask, MSL_LINE) {
    return lanes::shuffle(value, value, (lanes::lane() ^ mask) % 32u, line);
}
// Beyond the last lane Metal leaves the value undefined; here it is the lane's own.
template <class T> inline T simd_shuffle_down(T value, ushort delta, MSL_LINE) {
    return lanes::shuffle(value, value, lanes::lane() + delta, line);
}
template <class T> inline T simd_shuffle_up(T value, ushort delta, MSL_LINE) {
    unsigned const here = lanes::lane();
    return lanes::shuffle(value, value, here < delta ? lanes::NOBODY : here - delta, line);
}
template <class T> inline T simd_shuffle_rotate_down(T value, ushort delta, MSL_LINE) {
    return lanes::shuffle(value, value, (lanes::lane() + delta) % 32u, line);
}
template <class T> inline T simd_shuffle_rotate_up(T value, ushort delta, MSL_LINE) {
    return lanes::shuffle(value, value, (lanes::lane() - delta) % 32u, line);
}
// The lanes past the end take the filling data's first lanes, in blocks of `modulo`.
template <class T>
inline T simd_shuffle_and_fill_down(T value, T fill, ushort delta, ushort modulo,
                                    MSL_LINE) {
    unsigned const here = lanes::lane(), place = here % modulo + delta;
    unsigned const block = here - here % modulo;
    T const kept = lanes::shuffle(value, value, block + place % modulo, line);
    T const filled = lanes::shuffle(fill, fill, block + place % modulo, line);
    return place < modulo ? kept : filled;
}
template <class T>
inline T simd_shuffle_and_fill_down(T value, T fill, ushort delta, MSL_LINE) {
    return simd_shuffle_and_fill_down(value, fill, delta, ushort(32), line);
}
template <class T>
inline T simd_shuffle_and_fill_up(T value, T fill, ushort delta, ushort modulo, MSL_LINE) {
    unsigned const here = lanes::lane(), inside = here % modulo;
    unsigned const from = here - inside + (inside + modulo - delta % modulo) % modulo;
    T const kept = lanes::shuffle(value, value, from, line);
    T const filled = lanes::shuffle(fill, fill, from, line);
    return inside >= delta ? kept : filled;
}
template <class T>
inline T simd_shuffle_and_fill_up(T value, T fill, ushort delta, MSL_LINE) {
    return simd_shuffle_and_fill_up(value, fill, delta, ushort(32), line);
}
template <class T> inline T quad_shuffle(T value, ushort source, MSL_LINE) {
    return lanes::shuffle(value, value, (lanes::lane() & ~3u) + source % 4, line);
}
template <class T> inline T quad_broadcast(T value, ushort source, MSL_LINE) {
    return quad_shuffle(value, source, line);
}
template <class T> inline T quad_shuffle_xor(T value, ushort mask, MSL_LINE) {
    return lanes::shuffle(value, value, lanes::lane() ^ (mask % 4u), line);
}
template <class T> inline T quad_shuffle_down(T value, ushort delta, MSL_LINE) {
    unsigned const here = lanes::lane();
    bool const inside = here % 4 + delta < 4;
    return lanes::shuffle(value, value, inside ? here + delta : lanes::NOBODY, line);
}
template <class T> inline T quad_shuffle_up(T value, ushort delta, MSL_LINE) {
    unsigned const here = lanes::lane();
    bool const inside = here % 4 >= delta;
    return lanes::shuffle(value, value, inside ? here - delta : lanes::NOBODY, line);
}

// --------------------------------------------------------------------------- votes
class simd_vote {
   public:
    typedef ulong vote_t;
    explicit simd_vote(vote_t votes = 0) : votes_(votes) {}
    explicit operator vote_t() const { return votes_; }
    bool all() const { return votes_ == 0xffffffffu; }
    bool any() const { return votes_ != 0; }

   private:
    vote_t votes_;
};
inline simd_vote simd_ballot(bool vote, MSL_LINE) {
    return simd_vote(lanes::ballot(vote, line));
}
inline simd_vote simd_active_threads_mask(MSL_LINE) {
    return simd_vote(lanes::active(line));
}
inline bool simd_any(bool vote, MSL_LINE) { return lanes::ballot(vote, line) != 0; }
inline bool simd_all(bool vote, MSL_LINE) { return lanes::ballot(!vote, line) == 0; }
inline bool simd_is_first(MSL_LINE) {
    unsigned const mask = lanes::active(line);
    return (mask & ((1u << lanes::lane()) - 1)) == 0;
}
template <class T> inline T simd_broadcast_first(T value, MSL_LINE) {
    unsigned const mask = lanes::active(line);
    unsigned first = 0;
    while (first < 31 && !(mask >> first & 1))
        ++first;
    return lanes::shuffle(value, value, first, line);
}

// ------------------------------------------------------------------- 8x8 matrices
template <class T, int Columns, int Rows>
struct simdgroup_matrix {
    static_assert(Columns == 8 && Rows == 8, "Metal has 8x8 matrices only");
    simdgroup_matrix() = default;
    // A diagonal matrix, as in Metal; make_filled_simdgroup_matrix fills.
    explicit simdgroup_matrix(T diagonal) {
        int const row = lanes::matrix_row(lanes::lane()), column = lanes::matrix_column(lanes::lane());
        elements[0] = row == column ? diagonal : T(0);
        elements[1] = row == column + 1 ? diagonal : T(0);
    }
    vec<T, 2>& thread_elements() { return elements; }
    vec<T, 2> const& thread_elements() const { return elements; }

    vec<T, 2> elements;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T, Columns, Rows> matrix;
    matrix.elements[0] = matrix.elements[1] = value;
    return matrix;
}
template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(T value) {
    return simdgroup_matrix<T, Columns, Rows>(value);
}

// origin is (column, row); with transpose the matrix in memory is read the other way.
template <class T, class Pointer>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, Pointer source,
                           ulong elements_per_row = 8, ulong2 origin = ulong2(0, 0),
                           bool transpose = false, MSL_LINE) {
    lanes::whole_simdgroup(line);
    int const row = lanes::matrix_row(lanes::lane()), column = lanes::matrix_column(lanes::lane());
    for (int j = 0; j < 2; ++j) {
        ulong const y = origin.y + ulong(transpose ? column + j : row);
        ulong const x = origin.x + ulong(transpose ? row : column + j);
        d.elements[j] = T(source[y * elements_per_row + x]);
    }
}
template <class T, class Pointer>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> const& a, Pointer target,
                            ulong elements_per_row = 8, ulong2 origin = ulong2(0, 0),
                            bool transpose = false, MSL_LINE) {
    lanes::whole_simdgroup(line);
    int const row = lanes::matrix_row(lanes::lane()), column = lanes::matrix_column(lanes::lane());
    for (int j = 0; j < 2; ++j) {
        ulong const y = origin.y + ulong(transpose ? column + j : row);
        ulong const x = origin.x + ulong(transpose ? row : column + j);
        target[y * elements_per_row + x] = a.elements[j];
    }
}
// d = a * b + c, in float, the products added in the order of k.
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          simdgroup_matrix<A, 8, 8> const& a,
                                          simdgroup_matrix<B, 8, 8> const& b,
                                          simdgroup_matrix<C, 8, 8> const& c, MSL_LINE) {
    A const left[2] = {a.elements[0], a.elements[1]};
    B const right[2] = {b.elements[0], b.elements[1]};
    C const sum[2] = {c.elements[0], c.elements[1]};
    D result[2];
    lanes::multiply_accumulate(result, left, right, sum, line);
    d.elements[0] = result[0];
    d.elements[1] = result[1];
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d,
                               simdgroup_matrix<A, 8, 8> const& a,
                               simdgroup_matrix<B, 8, 8> const& b, MSL_LINE) {
    simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)),
                                  line);
}
template <class T>
inline simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> const& a,
                                           simdgroup_matrix<T, 8, 8> const& b) {
    simdgroup_matrix<T, 8, 8> d;
    simdgroup_multiply(d, a, b);
    return d;
}

// ------------------------------------------------------------------------ barriers
enum class mem_flags : uint {
    mem_none = 0,
    mem_device = 1,
    mem_threadgroup = 2,
    mem_texture = 4,
    mem_threadgroup_imageblock = 8,
    mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
    return mem_flags(uint(a) | uint(b));
}
inline void threadgroup_barrier(mem_flags flags, MSL_LINE) {
    lanes::barrier(true, uint(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, MSL_LINE) {
    lanes::barrier(false, uint(flags), line);
}

// ------------------------------------------------------------------------- atomics
enum memory_order { memory_order_relaxed };
enum thread_scope {
    thread_scope_thread,
    thread_scope_simdgroup,
    thread_scope_threadgroup,
    thread_scope_device,
    thread_scope_system,
};

template <class T>
struct atomic {
    T msl_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;

namespace detail {
template <class T, class Update>
inline T update(atomic<T> volatile* object, Update const& change) {
    return lanes::update(const_cast<T*>(&object->msl_value), change);
}
}  // namespace detail

template <class T>
inline T atomic_load_explicit(atomic<T> const volatile* object, memory_order) {
    return detail::update(const_cast<atomic<T> volatile*>(object), [](T v) { return v; });
}
template <class T, class U>
inline void atomic_store_explicit(atomic<T> volatile* object, U value, memory_order) {
    detail::update(object, [=](T) { return T(value); });
}
template <class T, class U>
inline T atomic_exchange_explicit(atomic<T> volatile* object, U value, memory_order) {
    return detail::update(object, [=](T) { return T(value); });
}
template <class T, class U>
inline bool atomic_compare_exchange_weak_explicit(atomic<T> volatile* object, T* expected,
                                                  U desired, memory_order, memory_order) {
    T const wanted = *expected;
    *expected = detail::update(object, [=](T v) { return v == wanted ? T(desired) : v; });
    return *expected == wanted;
}
#define MSL_ATOMIC(name, expression)                                                  \
    template <class T, class U>                                                       \
    inline T atomic_fetch_##name##_explicit(atomic<T> volatile* object, U operand,    \
                                            memory_order) {                           \
        T const value = T(operand);                                                   \
        return detail::update(object, [=](T before) { return T(expression); });       \
    }
MSL_ATOMIC(add, before + value)
MSL_ATOMIC(sub, before - value)
MSL_ATOMIC(min, before < value ? before : value)
MSL_ATOMIC(max, before < value ? value : before)
MSL_ATOMIC(and, before & value)
MSL_ATOMIC(or, before | value)
MSL_ATOMIC(xor, before ^ value)
#undef MSL_ATOMIC

inline void atomic_thread_fence(mem_flags, memory_order = memory_order_relaxed,
                                thread_scope = thread_scope_device) {}

}  // namespace metal

// ------------------------------------------------------- from the host to a kernel
namespace host {

template <class F, int Place>
struct ParameterAt;
template <class R, class First, class... Rest, int Place>
struct ParameterAt<R (*)(First, Rest...), Place> : ParameterAt<R (*)(Rest...), Place - 1> {};
template <class R, class First, class... Rest>
struct ParameterAt<R (*)(First, Rest...), 0> {
    typedef First type;
};
template <class F, int Place>
using ParameterOf = typename ParameterAt<F, Place>::type;

template <class T>
struct Bind;
template <class T>
struct Bind<T*> {
    static T* from(void* buffer) { return (T*)buffer; }
};
template <class T>
struct Bind<T&> {
    static T& from(void* buffer) { return *(T*)buffer; }
};
template <class T>
inline T bind(void* buffer) {
    return Bind<T>::from(buffer);
}

// A position is asked for as a scalar or as a vector of any integer type.
template <class T>
inline T position(unsigned const (&place)[3]) {
    if constexpr (msl_vec_size<T> == 1) {
        return T(place[0]);
    } else {
        T out;
        for (int i = 0; i < msl_vec_size<T>; ++i)
            out[i] = msl_element_type<T>(place[i]);
        return out;
    }
}

}  // namespace host
}  // namespace msl
#undef MSL_LINE
