// Memory of a launch: tensors between guard pages, threadgroup variables in guarded
// slots that are poisoned for each threadgroup, and what an access out of them was.
#include <stdio.h>
#include <string.h>

#include "runtime.hpp"

namespace msl {

constexpr uint8_t POISON = 0xff;  // a NaN in every float type

static uint8_t* hole() {
    static uint8_t* const found = (uint8_t*)mmap(
        nullptr, HOLE_BYTES * MAX_BUFFERS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return found;
}

// Map `body` bytes in the middle of much unmapped memory: no index of 32 bits, into elements
// of up to 16 bytes, leads to memory of somebody else.
static bool guard(Region& region, size_t body) {
    region.mapped = body + 2 * GUARD_BYTES;
    void* found = mmap(nullptr, region.mapped, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED)
        return false;
    region.map = (uint8_t*)found;
    return mprotect(region.map + GUARD_BYTES, body, PROT_READ | PROT_WRITE) == 0;
}

// Copy each tensor so that it ends right before (or begins right behind) a guard page,
// as far as its alignment lets it. What is left over is poisoned, and checked later.
bool place_regions() {
    Request& request = *run.request;
    // A traced kernel's accesses are all looked at, so alignment to 64 costs nothing.
    size_t const alignment = request.traced ? 64 : 16;
    for (run.regions = 0; run.regions < request.regions; ++run.regions) {
        RegionRequest const& wanted = request.region[run.regions];
        Region& region = run.region[run.regions];
        region = {};
        size_t const body = whole_pages(wanted.bytes + alignment);
        if (!guard(region, body)) {
            fail(OTHER, nullptr, "no memory for a copy of %zu bytes", size_t(wanted.bytes));
            return false;
        }
        uint8_t* const begin = region.map + GUARD_BYTES;
        size_t const phase = wanted.phase % alignment;
        size_t const last = body - wanted.bytes;
        size_t const place =
            request.front ? phase : last - (last + alignment - phase) % alignment;
        memset(begin, POISON, body);
        region.data = begin + place;
        region.bytes = wanted.bytes;
        memcpy(region.data, wanted.data, wanted.bytes);
        if (request.traced)
            region.shadow = new_shadow(region.bytes);
    }
    for (unsigned i = 0; i < MAX_BUFFERS; ++i) {
        run.buffers[i] = hole() + i * HOLE_BYTES;
        if (i < request.buffers && request.buffer[i].region >= 0)
            run.buffers[i] =
                run.region[request.buffer[i].region].data + request.buffer[i].offset;
    }
    return true;
}

void return_regions() {
    for (unsigned i = 0; i < run.regions; ++i) {
        Region& region = run.region[i];
        // A tensor that is only read may lie in memory that cannot be written.
        if (memcmp(run.request->region[i].data, region.data, region.bytes) != 0)
            memcpy(run.request->region[i].data, region.data, region.bytes);
        munmap(region.map, region.mapped);
        free_shadow(region.shadow, region.bytes);
        region = {};
    }
    run.regions = 0;
}

static int buffer_at(unsigned region, size_t offset) {
    for (unsigned i = 0; i < run.request->buffers; ++i) {
        BufferRequest const& buffer = run.request->buffer[i];
        if (buffer.region != region)
            continue;
        if (offset >= buffer.offset && offset < buffer.offset + buffer.bytes)
            return int(i);
    }
    for (unsigned i = 0; i < run.request->buffers; ++i)
        if (run.request->buffer[i].region == region)
            return int(i);
    return -1;
}

// Where the poison around a region is not intact, else null.
static uint8_t const* spoilt(Region const& region, size_t body) {
    uint8_t const* const end = region.map + region.mapped - GUARD_BYTES;
    for (uint8_t const* at = end - body; at < end; ++at) {
        if (at == region.data)
            at += region.bytes;
        if (at < end && *at != POISON)
            return at;
    }
    return nullptr;
}

// A write beyond a tensor that did not reach the guard page.
bool check_slack() {
    for (unsigned i = 0; i < run.regions; ++i) {
        Region const& region = run.region[i];
        uint8_t const* const at = spoilt(region, region.mapped - 2 * GUARD_BYTES);
        if (!at)
            continue;
        fail(OUT_OF_BOUNDS, nullptr,
             "out-of-bounds write: buffer %d, byte offset %ld of %zu "
             "(found after the launch; tracing tells the thread)",
             buffer_at(i, 0), long(at - region.data), region.bytes);
        return false;
    }
    return true;
}

// The same for the variables of the threadgroup that ends.
void check_group_memory() {
    for (unsigned i = 0; i < run.variables; ++i) {
        Region const& region = run.variable[i];
        uint8_t const* const at =
            region.site ? spoilt(region, whole_pages(region.bytes)) : nullptr;
        if (at)
            fail(OUT_OF_BOUNDS, nullptr,
                 "out-of-bounds write: threadgroup variable '%s', byte offset %ld of %zu "
                 "(found after the threadgroup; tracing tells the thread)",
                 region.name, long(at - region.data), region.bytes);
    }
}

static void describe_variable(Region const& region, uint8_t const* address, bool write,
                              void const* program_counter) {
    fail(OUT_OF_BOUNDS, program_counter,
         "out-of-bounds %s: threadgroup variable '%s', byte offset %ld of %zu",
         write ? "write" : "read", region.name, long(address - region.data), region.bytes);
}

void describe_fault(uint8_t const* address, bool write, void const* program_counter) {
    char const* const what = write ? "write" : "read";
    for (unsigned i = 0; i < run.regions; ++i) {
        Region const& region = run.region[i];
        if (address >= region.map && address < region.map + region.mapped) {
            long const offset = address - region.data;
            int const buffer = buffer_at(i, offset < 0 ? 0 : size_t(offset));
            long const start = long(run.request->buffer[buffer].offset);
            return fail(OUT_OF_BOUNDS, program_counter,
                        "out-of-bounds %s: buffer %d, byte offset %ld of %zu", what, buffer,
                        offset - start, size_t(run.request->buffer[buffer].bytes));
        }
    }
    for (unsigned i = 0; i < run.variables; ++i) {
        Region const& region = run.variable[i];
        if (address >= region.map && address < region.map + region.mapped)
            return describe_variable(region, address, write, program_counter);
    }
    if (address >= hole() && address < hole() + HOLE_BYTES * MAX_BUFFERS)
        return fail(OUT_OF_BOUNDS, program_counter, "%s of buffer %ld, which was not passed",
                    what, long(address - hole()) / long(HOLE_BYTES));
    if (address >= stacks && address < stacks + MAX_THREADS * STACK_BYTES)
        return fail(OTHER, program_counter,
                    "a thread's stack of %zu bytes overflowed (recursion, or a large array)",
                    STACK_BYTES);
    fail(OUT_OF_BOUNDS, program_counter,
         "out-of-bounds %s at an address that belongs to no buffer", what);
}

// Threadgroup memory of a group starts undefined, whatever the last group left.
void start_group_memory() {
    for (unsigned i = 0; i < run.variables; ++i)
        run.variable[i].site = nullptr;
}

// A variable's slot keeps its place; only as many pages as it needs are there.
static bool fill(Region& region, size_t bytes) {
    if (!region.map && !guard(region, whole_pages(VARIABLE_BYTES)))
        return false;
    uint8_t* const begin = region.map + GUARD_BYTES;
    size_t const body = region.mapped - 2 * GUARD_BYTES;
    size_t const used = whole_pages(bytes);
    if (used != whole_pages(region.bytes)) {
        mprotect(begin, body - used, PROT_NONE);
        mprotect(begin + body - used, used, PROT_READ | PROT_WRITE);
    }
    memset(begin + body - used, POISON, used);
    region.data = begin + (body - bytes) / 16 * 16;
    region.bytes = bytes;
    return true;
}

}  // namespace msl

using namespace msl;

extern "C" void* msl_threadgroup_memory(void const* site, char const* name,
                                        unsigned long bytes, unsigned long alignment,
                                        int line) {
    size_t total = bytes;
    Region* unused = nullptr;
    for (unsigned i = 0; i < run.variables; ++i) {
        if (run.variable[i].site == site)
            return run.variable[i].data;
        if (!run.variable[i].site)
            unused = unused ? unused : &run.variable[i];
        else
            total += run.variable[i].bytes;
    }
    if (total > THREADGROUP_BYTES) {
        fail(THREADGROUP_MEMORY, nullptr,
             "threadgroup memory: '%s' (line %d) brings it to %zu bytes, Metal allows %zu",
             name, line, total, THREADGROUP_BYTES);
        abandon();
    }
    if (!unused && run.variables < MAX_VARIABLES)
        unused = &run.variable[run.variables++];
    if (alignment > 16) {
        fail(ALIGNMENT, nullptr, "the threadgroup variable '%s' (line %d) asks for an "
             "alignment of %lu bytes; here it can have 16", name, line, alignment);
        abandon();
    }
    if (!unused || !fill(*unused, bytes)) {
        fail(OTHER, nullptr, "no room for the threadgroup variable '%s' (line %d)", name,
             line);
        abandon();
    }
    unused->site = site;
    unused->name = name;
    if (run.request->traced) {
        free_shadow(unused->shadow, VARIABLE_BYTES);
        unused->shadow = new_shadow(VARIABLE_BYTES);
    }
    if (total > run.request->threadgroup_bytes)
        run.request->threadgroup_bytes = uint32_t(total);
    return unused->data;
}
