// What a translated kernel and the CPU runtime know of each other.
// No header of any library is included: kernels are compiled without one.
#pragma once

namespace msl {
namespace host {

// Where a thread stands; the names follow MSL's attributes.
struct Ids {
    unsigned thread_position[3];
    unsigned position_in_group[3];
    unsigned group_position[3];
    unsigned threads[3];
    unsigned group_size[3];             // of this group: less at a ragged edge
    unsigned dispatched_group_size[3];  // as launched
    unsigned groups[3];
    unsigned index_in_group;
    unsigned simdgroup;
    unsigned lane;
    unsigned simdgroups;
    unsigned dispatched_simdgroups;
};

// What a kernel demands of a buffer: bytes is 0 where it takes a pointer.
struct Binding {
    unsigned bytes;
    unsigned alignment;
};

struct Kernel {
    char const* name;
    void (*entry)(void* const* buffers, Ids const& ids);
    Binding const* bindings;
    unsigned buffers;
};

// What the host can be told; Python's exceptions stand in the same order.
enum Failure : int {
    NONE,
    OUT_OF_BOUNDS,
    RACE,
    DIVERGENCE,
    ALIGNMENT,
    THREADGROUP_MEMORY,
    ARITHMETIC,
    OTHER,
};

}  // namespace host
}  // namespace msl

extern "C" {
// Wait for the other lanes of the simdgroup, then let one of them combine the operands.
// combine(operands, mask of the lanes that take part, results): arrays of 32 each.
void msl_collective(void const* operand, unsigned operand_bytes, void* result,
                    unsigned result_bytes,
                    void (*combine)(void const*, unsigned, void*), int line);
// flags: 1 device memory, 2 threadgroup memory, as in MSL's mem_flags.
void msl_barrier(bool whole_group, unsigned flags, int line);
void* msl_threadgroup_memory(void const* site, char const* name, unsigned long bytes,
                             unsigned long alignment, int line);
unsigned msl_lane();
// Where in the loops and branches around its meetings the present lane is.
extern unsigned long msl_path;
// A copy that the tracer sees as one read and one write, however wide it is.
void msl_copy(void* to, void const* from, unsigned long bytes);
// Atomic accesses never race with each other, only with plain ones.
void msl_atomic(void const* address, unsigned long bytes);
void msl_fail(int failure, char const* message, int line);
}
