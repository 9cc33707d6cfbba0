// What the parts of the CPU runtime share: the launch in hand, its memory and lanes.
#pragma once
#include <setjmp.h>

#include "../include/runtime.hpp"
#include "fibers.hpp"

namespace msl {

using namespace host;

constexpr unsigned MAX_THREADS = 1024;  // of a threadgroup
constexpr unsigned MAX_SIMDGROUPS = MAX_THREADS / 32;
constexpr unsigned MAX_BUFFERS = 31;
constexpr unsigned MAX_VARIABLES = 64;       // threadgroup variables of a kernel
constexpr size_t THREADGROUP_BYTES = 32768;  // what Metal grants
constexpr size_t VARIABLE_BYTES = 64 << 10;  // what a slot can hold before it says no
constexpr size_t GUARD_BYTES = size_t(64) << 30;  // unmapped on either side
constexpr size_t HOLE_BYTES = 64 << 10;      // unmapped, for a buffer that is not bound

// -------------------------------------------------------------- as Python sends it
struct RegionRequest {
    uint8_t* data;
    uint64_t bytes;
    uint64_t phase;  // the address on a GPU, modulo 64
};
struct BufferRequest {
    int64_t region;  // -1: not bound
    uint64_t offset;
    uint64_t bytes;
};
struct Traffic {
    uint64_t loads, load_bytes, load_sectors;
    uint64_t stores, store_bytes, store_sectors;
};
enum Order : int32_t { FORWARD, BACKWARD, RANDOM };

struct Request {
    Kernel const* kernel;
    uint32_t threads[3];
    uint32_t group_size[3];
    int32_t order;
    int32_t traced;   // the kernel was compiled with calls at every access
    int32_t partial;  // whether part of a simdgroup may meet
    int32_t front;    // place buffers right behind a guard page, not right before one
    double seconds;   // after which a launch is ended
    uint64_t seed;
    uint64_t regions, buffers;
    RegionRequest const* region;
    BufferRequest const* buffer;
    Traffic* traffic;
    // Filled in by the launch:
    int32_t failure;
    uint32_t threadgroup_bytes;
    uint64_t program_counter;
    char message[1024];
};

// ---------------------------------------------------------------------- in a launch
struct Clock {
    uint32_t who;  // 1 + thread within the launch; 0: nobody
    uint32_t group_epoch : 31;
    uint32_t atomic : 1;
    uint32_t simd_epoch;
};
struct Cell {
    Clock write, read, other_read;
};

// Memory that kernels may touch: a tensor's copy, or a threadgroup variable.
struct Region {
    uint8_t* data;
    size_t bytes;
    uint8_t* map;  // from the first guard page
    size_t mapped;
    char const* name;  // of a threadgroup variable, else null
    void const* site;
    Cell* shadow;  // one for each byte, when traced
};

enum State : uint8_t { READY, AT_COLLECTIVE, AT_SIMD_BARRIER, AT_BARRIER, DONE };
typedef void (*Combine)(void const*, unsigned, void*);

struct Lane {
    Ids ids;
    void* stack_pointer;
    State state;
    bool parked;  // its fiber waits for a next threadgroup
    int line;
    unsigned flags;
    unsigned long path;
    Combine combine;
};

struct Simdgroup {
    uint32_t exists, live, waiting;
    uint32_t epochs[2];
    alignas(64) uint8_t operands[32 * 64];
    alignas(64) uint8_t results[32 * 64];
};

struct Launch {
    Request* request;
    void* buffers[MAX_BUFFERS];
    Region region[MAX_BUFFERS];
    unsigned regions;
    Region variable[MAX_VARIABLES];
    unsigned variables;
    uint32_t group_serial;
    uint32_t group_epochs[2];
    uint32_t groups[3];
    unsigned lanes, live;
    uint64_t ready[MAX_THREADS / 64];
    unsigned ready_count;
    uint64_t random;
    Lane* current;
    void* scheduler;  // its stack pointer
    sigjmp_buf fault;
};

extern Launch run;
extern Lane lane[MAX_THREADS];
extern Simdgroup simdgroup[MAX_SIMDGROUPS];
extern uint8_t* stacks;

// memory.cpp
bool place_regions();
void return_regions();
bool check_slack();
void check_group_memory();
void describe_fault(uint8_t const* address, bool write, void const* program_counter);
void start_group_memory();

// trace.cpp
void reset_trace();
void finish_step(unsigned simdgroup);
void finish_write();
Cell* new_shadow(size_t bytes);
void free_shadow(Cell* shadow, size_t bytes);

// scheduler.cpp
void fail(int failure, void const* program_counter, char const* format, ...)
    __attribute__((format(printf, 3, 4)));
void abandon();  // leaves the lane for good; call after fail

}  // namespace msl
