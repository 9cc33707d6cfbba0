// How lanes meet on a CPU: each is a fiber, and the last to arrive does the work.
#pragma once

namespace msl {

// Marks that the translation puts where lanes may part; at a meeting they must agree.
struct msl_arm_mark {
    unsigned long const before;
    explicit msl_arm_mark(unsigned which) : before(msl_path) {
        msl_path = (before ^ which) * 0x9e3779b97f4a7c15ul;
    }
    ~msl_arm_mark() { msl_path = before; }
};
struct msl_loop_mark {
    unsigned long const before;
    unsigned long turns;
    explicit msl_loop_mark(unsigned which)
        : before(msl_path), turns((unsigned long)which << 32) {}
    void turn() { msl_path = (before ^ ++turns) * 0x9e3779b97f4a7c15ul; }
    ~msl_loop_mark() { msl_path = before; }
};

namespace lanes {

inline unsigned lane() { return msl_lane(); }

template <class Result, class Operand>
inline Result meet(Operand const& operand, void (*combine)(void const*, unsigned, void*),
                   Line line) {
    static_assert(sizeof(Operand) <= 64 && sizeof(Result) <= 64, "an operand is too wide");
    Result result;
    msl_collective(&operand, sizeof(Operand), &result, sizeof(Result), combine,
                   int(line));
    return result;
}

// Sums in the order of an xor butterfly, which is that of the CUDA back end too.
template <class Operation, class T, int Width>
void combine_butterfly(void const* operands, unsigned mask, void* results) {
    T* values = (T*)results;
    for (int i = 0; i < 32; ++i)
        values[i] = ((T const*)operands)[i];
    for (int step = Width / 2; step > 0; step /= 2) {
        T before[32];
        unsigned const active = mask;
        for (int i = 0; i < 32; ++i)
            before[i] = values[i];
        for (int i = 0; i < 32; ++i) {
            int const other = i ^ step;
            bool const mine = active >> i & 1, theirs = active >> other & 1;
            if (mine && theirs)
                values[i] = Operation::apply(before[i], before[other]);
            else if (theirs)
                values[i] = before[other];
            if (theirs)
                mask |= 1u << i;
        }
    }
}

template <class Operation, class T, int Width>
inline T reduce(T value, Line line) {
    return meet<T>(value, combine_butterfly<Operation, T, Width>, line);
}

template <class T>
struct Sent {
    T value;
    T otherwise;
    unsigned source;  // 32 and above: there is no such lane, take `otherwise`
};

template <class T>
void combine_shuffle(void const* operands, unsigned mask, void* results) {
    Sent<T> const* sent = (Sent<T> const*)operands;
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1))
            continue;
        unsigned const source = sent[i].source;
        if (source < 32 && !(mask >> source & 1))
            msl_fail(host::DIVERGENCE, "a shuffle reads from a lane that does not take part", 0);
        ((T*)results)[i] = source < 32 ? sent[source].value : sent[i].otherwise;
    }
}

template <class T>
inline T shuffle(T value, T otherwise, unsigned source, Line line) {
    return meet<T>(Sent<T>{value, otherwise, source}, combine_shuffle<T>, line);
}

inline void combine_ballot(void const* operands, unsigned mask, void* results) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
        if ((mask >> i & 1) && ((bool const*)operands)[i])
            votes |= 1u << i;
    for (int i = 0; i < 32; ++i)
        ((unsigned*)results)[i] = votes;
}

inline unsigned ballot(bool vote, Line line) {
    return meet<unsigned>(vote, combine_ballot, line);
}

inline void combine_active(void const*, unsigned mask, void* results) {
    for (int i = 0; i < 32; ++i)
        ((unsigned*)results)[i] = mask;
}

inline unsigned active(Line line) { return meet<unsigned>(false, combine_active, line); }

template <class Operation, class T, bool Inclusive>
void combine_prefix(void const* operands, unsigned mask, void* results) {
    T total = Operation::template identity<T>();
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1))
            continue;
        T const next = Operation::apply(total, ((T const*)operands)[i]);
        ((T*)results)[i] = Inclusive ? next : total;
        total = next;
    }
}

template <class Operation, class T, bool Inclusive>
inline T prefix(T value, Line line) {
    return meet<T>(value, combine_prefix<Operation, T, Inclusive>, line);
}

template <class A, class B, class C>
struct Factors {
    A a[2];
    B b[2];
    C c[2];
};

template <class D, class A, class B, class C>
void combine_matrices(void const* operands, unsigned mask, void* results) {
    if (mask != 0xffffffffu)
        return msl_fail(host::DIVERGENCE, "a simdgroup matrix operation needs all 32 lanes", 0);
    Factors<A, B, C> const* factors = (Factors<A, B, C> const*)operands;
    float a[8][8], b[8][8], c[8][8];
    for (int i = 0; i < 32; ++i) {
        int const row = matrix_row(i), column = matrix_column(i);
        for (int j = 0; j < 2; ++j) {
            a[row][column + j] = float(factors[i].a[j]);
            b[row][column + j] = float(factors[i].b[j]);
            c[row][column + j] = float(factors[i].c[j]);
        }
    }
    for (int row = 0; row < 8; ++row)
        for (int k = 0; k < 8; ++k)
            for (int column = 0; column < 8; ++column)
                c[row][column] = __builtin_fmaf(a[row][k], b[k][column], c[row][column]);
    struct Pair { D element[2]; };
    for (int i = 0; i < 32; ++i)
        for (int j = 0; j < 2; ++j)
            ((Pair*)results)[i].element[j] = D(c[matrix_row(i)][matrix_column(i) + j]);
}

template <class D, class A, class B, class C>
inline void multiply_accumulate(D (&d)[2], A const (&a)[2], B const (&b)[2],
                                C const (&c)[2], Line line) {
    struct Pair { D element[2]; };
    Factors<A, B, C> factors = {{a[0], a[1]}, {b[0], b[1]}, {c[0], c[1]}};
    Pair const pair = meet<Pair>(factors, combine_matrices<D, A, B, C>, line);
    d[0] = pair.element[0];
    d[1] = pair.element[1];
}

inline void barrier(bool whole_group, unsigned flags, Line line) {
    msl_barrier(whole_group, flags, int(line));
}

// Fibers take turns, so a plain update is an atomic one; the tracer is told.
template <class T, class Update>
__attribute__((noinline, no_sanitize("thread"))) T update(T* address, Update const& change) {
    msl_atomic(address, sizeof(T));
    T const before = *address;
    *address = change(before);
    return before;
}

}  // namespace lanes

// ------------------------------------------------------- from the host to a kernel
namespace host {

template <class T>
struct BindingOf;
template <class T>
struct BindingOf<T*> {
    static constexpr Binding value = {0, alignof(T)};
};
template <>
struct BindingOf<void*> {
    static constexpr Binding value = {0, 1};
};
template <>
struct BindingOf<void const*> {
    static constexpr Binding value = {0, 1};
};
template <class T>
struct BindingOf<T&> {
    static constexpr Binding value = {sizeof(T), alignof(T)};
};
template <class T>
constexpr Binding binding_of() {
    return BindingOf<T>::value;
}

}  // namespace host
}  // namespace msl
