// How lanes meet on an NVIDIA GPU: a simdgroup is a warp, all of whose lanes take part.
#pragma once

namespace msl {
namespace lanes {

__device__ inline unsigned lane() { return threadIdx.x % 32; }

template <class T>
inline T read(T value, unsigned source) {
    unsigned words[(sizeof(T) + 3) / 4] = {};
    __builtin_memcpy(words, &value, sizeof(T));
    for (unsigned& word : words)
        word = __shfl_sync(0xffffffffu, word, source);
    __builtin_memcpy(&value, words, sizeof(T));
    return value;
}

template <class Operation, class T, int Width>
inline T reduce(T value, Line) {
    for (int step = Width / 2; step > 0; step /= 2)
        value = Operation::apply(value, read(value, lane() ^ step));
    return value;
}

template <class T>
inline T shuffle(T value, T otherwise, unsigned source, Line) {
    T const found = read(value, source < 32 ? source : lane());
    return source < 32 ? found : otherwise;
}

inline unsigned ballot(bool vote, Line) { return __ballot_sync(0xffffffffu, vote); }

inline unsigned active(int) { return __activemask(); }

template <class Operation, class T, bool Inclusive>
inline T prefix(T value, Line) {
    T total = Operation::template identity<T>(), mine = total;
    for (unsigned i = 0; i < 32; ++i) {
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
            sum[j] = fmaf(factor, read(float(b[j]), matrix_lane(k, column)), sum[j]);
    }
    d[0] = D(sum[0]);
    d[1] = D(sum[1]);
}

inline void barrier(bool whole_group, unsigned, Line) {
    if (whole_group)
        __syncthreads();
    else
        __syncwarp();
}

// Compare-and-swap serves every operation and type of 4 bytes.
template <class T, class Update>
inline T update(T* address, Update const& change) {
    static_assert(sizeof(T) == 4, "atomics of 4 bytes only");
    unsigned* word = (unsigned*)address;
    unsigned seen = *(unsigned volatile*)word;
    for (;;) {
        T const before = __builtin_bit_cast(T, seen);
        T const after = change(before);
        unsigned const found = atomicCAS(word, seen, __builtin_bit_cast(unsigned, after));
        if (found == seen)
            return before;
        seen = found;
    }
}

}  // namespace lanes

// One block is one threadgroup, launched in one dimension; table: threads[3],
// group size[3], then the buffers. False for a thread beyond a ragged edge.
inline bool enter(unsigned long long const* table, Ids& ids) {
    unsigned index = threadIdx.x, group = 1;
    for (int d = 0; d < 3; ++d) {
        unsigned const block = d == 0 ? blockIdx.x : d == 1 ? blockIdx.y : blockIdx.z;
        ids.threads[d] = unsigned(table[d]);
        ids.dispatched_group_size[d] = unsigned(table[3 + d]);
        ids.groups[d] = (ids.threads[d] + ids.dispatched_group_size[d] - 1) /
                        ids.dispatched_group_size[d];
        ids.group_position[d] = block;
        unsigned const left = ids.threads[d] - block * ids.dispatched_group_size[d];
        ids.group_size[d] =
            left < ids.dispatched_group_size[d] ? left : ids.dispatched_group_size[d];
        ids.position_in_group[d] = index % ids.group_size[d];
        ids.thread_position[d] =
            block * ids.dispatched_group_size[d] + ids.position_in_group[d];
        index /= ids.group_size[d];
        group *= ids.group_size[d];
    }
    unsigned const launched = ids.dispatched_group_size[0] *
                              ids.dispatched_group_size[1] * ids.dispatched_group_size[2];
    ids.index_in_group = threadIdx.x;
    ids.simdgroup = threadIdx.x / 32;
    ids.lane = threadIdx.x % 32;
    ids.simdgroups = (group + 31) / 32;
    ids.dispatched_simdgroups = (launched + 31) / 32;
    return threadIdx.x < group;
}

}  // namespace msl
