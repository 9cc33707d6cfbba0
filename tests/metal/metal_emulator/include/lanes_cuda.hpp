// How lanes meet on an NVIDIA GPU: a simdgroup is a warp, all of whose lanes take part.
// Where only some of them do, as Metal allows, the warp waits for ever.
#pragma once

namespace msl {
// Marks for the CPU's meetings; compute-sanitizer looks for divergence in its own way.
struct msl_arm_mark {
    explicit msl_arm_mark(unsigned) {}
};
struct msl_loop_mark {
    explicit msl_loop_mark(unsigned) {}
    void turn() {}
};

namespace lanes {

inline unsigned lane() { return threadIdx.x % 32; }

// The lanes that the simdgroup has: fewer than 32 at a threadgroup's ragged end.
inline unsigned members() {
    unsigned const left = blockDim.x - (threadIdx.x - lane());
    return left < 32 ? (1u << left) - 1 : 0xffffffffu;
}
inline bool is_member(unsigned lane) { return members() >> lane & 1; }

template <class T>
inline T read(T value, unsigned source) {
    unsigned words[(sizeof(T) + 3) / 4] = {};
    MSL_MEMCPY(words, &value, sizeof(T));
    for (unsigned& word : words)
        word = __shfl_sync(members(), word, source);
    MSL_MEMCPY(&value, words, sizeof(T));
    return value;
}

template <class Operation, class T, int Width>
inline T reduce(T value, Line) {
    for (int step = Width / 2; step > 0; step /= 2) {
        unsigned partner = lane() ^ step;
        // Lanes that differ in the bits of earlier steps hold the same value by now, so
        // the one that is surely there, if any is, stands for a lane that does not exist.
        if (!is_member(partner))
            partner &= ~unsigned(Width - 2 * step);
        T const other = read(value, is_member(partner) ? partner : lane());
        if (is_member(partner))
            value = Operation::apply(value, other);
    }
    return value;
}

template <class T>
inline T shuffle(T value, T otherwise, unsigned source, Line) {
    T const found = read(value, source < 32 ? source : lane());
    return source < 32 ? found : otherwise;
}

inline unsigned ballot(bool vote, Line) { return __ballot_sync(members(), vote); }

inline unsigned active(Line) { return members(); }

template <class Operation, class T, bool Inclusive>
inline T prefix(T value, Line) {
    T total = Operation::template identity<T>(), mine = total;
    for (unsigned i = 0; i < 32 && is_member(i); ++i) {
        T const next = Operation::apply(total, read(value, i));
        if (i == lane())
            mine = Inclusive ? next : total;
        total = next;
    }
    return mine;
}

// Each lane computes its own two elements, in the order of k, as the CPU does.
template <class D, class A, class B, class C>
inline void multiply_accumulate(D (&d)[2], A const (&a)[2], B const (&b)[2],
                                C const (&c)[2], Line) {
    int const row = matrix_row(lane()), column = matrix_column(lane());
    float sum[2] = {float(c[0]), float(c[1])};
    for (int k = 0; k < 8; ++k) {
        float const left = read(float(a[0]), matrix_lane(row, k));
        float const right = read(float(a[1]), matrix_lane(row, k));
        float const factor = k % 2 ? right : left;
        for (int j = 0; j < 2; ++j)
            sum[j] = ::fmaf(factor, read(float(b[j]), matrix_lane(k, column)), sum[j]);
    }
    d[0] = D(sum[0]);
    d[1] = D(sum[1]);
}

inline void barrier(bool whole_group, unsigned, Line) {
    if (whole_group)
        __syncthreads();
    else
        __syncwarp(members());
}

// Compare-and-swap serves every operation and type. The first one only reads: a plain
// read beside atomic writes would be a race.
template <class Word, class T, class Update>
inline T update_as(T* address, Update const& change) {
    Word* word = (Word*)address;
    Word seen = atomicCAS(word, Word(0), Word(0));
    for (;;) {
        T const before = __builtin_bit_cast(T, seen);
        T const after = change(before);
        Word const found = atomicCAS(word, seen, __builtin_bit_cast(Word, after));
        if (found == seen)
            return before;
        seen = found;
    }
}
template <class T, class Update>
inline T update(T* address, Update const& change) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics of 4 and 8 bytes only");
    if constexpr (sizeof(T) == 8)
        return update_as<unsigned long long>(address, change);
    else
        return update_as<unsigned>(address, change);
}

}  // namespace lanes

namespace host {

// What a kernel is launched with; cuda.py has the same structure. A threadgroup is a
// block of one dimension and of just its threads, and the blocks of a launch are the
// `count` threadgroups from `first` on, all of one size: ragged edges are launches of
// their own.
struct Launch {
    unsigned threads[3];
    unsigned group_size[3];
    unsigned first[3];
    unsigned count[3];
    void* buffers[31];
};

inline Ids enter(Launch const& launch) {
    Ids ids;
    unsigned index = threadIdx.x, block = blockIdx.x, dispatched = 1;
    for (int d = 0; d < 3; ++d) {
        unsigned const group = launch.first[d] + block % launch.count[d];
        unsigned const begin = group * launch.group_size[d];
        unsigned const left = launch.threads[d] - begin;
        unsigned const size = left < launch.group_size[d] ? left : launch.group_size[d];
        ids.threads[d] = launch.threads[d];
        ids.dispatched_group_size[d] = launch.group_size[d];
        ids.groups[d] = (launch.threads[d] - 1) / launch.group_size[d] + 1;
        ids.group_position[d] = group;
        ids.group_size[d] = size;
        ids.position_in_group[d] = index % size;
        ids.thread_position[d] = begin + ids.position_in_group[d];
        block /= launch.count[d];
        index /= size;
        dispatched *= launch.group_size[d];
    }
    ids.index_in_group = threadIdx.x;
    ids.simdgroup = threadIdx.x / 32;
    ids.lane = threadIdx.x % 32;
    ids.simdgroups = (blockDim.x + 31) / 32;
    ids.dispatched_simdgroups = (dispatched + 31) / 32;
    return ids;
}

}  // namespace host
}  // namespace msl
