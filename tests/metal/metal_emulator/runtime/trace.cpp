// What a traced kernel's accesses say: exact bounds, races, bytes and sectors.
//
// The compiler's thread sanitizer puts a call before every load and store; only the
// calls are used, with the functions here instead of the sanitizer's own library. So
// any compiler that has -fsanitize=thread serves, and a race is found by what barriers
// order (device and threadgroup memory apart), not by what happened to go wrong.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.hpp"

namespace msl {

enum Access { LOAD, STORE, ATOMIC };

constexpr uintptr_t SECTOR = 32;  // bytes that a GPU fetches at a time

// ------------------------------------------------------------------------- sectors
struct Event {
    void const* program_counter;
    uint32_t sequence;
    uint8_t lane;
    uint8_t buffer;
    uint8_t access;
    uint32_t bytes;
    uint32_t ordinal;  // how often this lane came by here in this step
    uintptr_t address;
};
struct Events {
    Event* event;
    size_t count, room;
};
static Events events[MAX_SIMDGROUPS];

template <class T>
static int compare(T a, T b) {
    return a < b ? -1 : a > b;
}

static int by_place(void const* left, void const* right) {
    Event const &a = *(Event const*)left, &b = *(Event const*)right;
    if (int c = compare(a.program_counter, b.program_counter))
        return c;
    if (int c = compare(a.lane, b.lane))
        return c;
    return compare(a.sequence, b.sequence);
}

static int by_step(void const* left, void const* right) {
    Event const &a = *(Event const*)left, &b = *(Event const*)right;
    if (int c = compare(a.program_counter, b.program_counter))
        return c;
    if (int c = compare(a.ordinal, b.ordinal))
        return c;
    if (int c = compare(a.buffer, b.buffer))
        return c;
    return compare(a.address, b.address);
}

// The lanes of a simdgroup run in lockstep on a GPU: the n-th time that each comes by
// an instruction is one step, and the step costs its distinct sectors.
void finish_step(unsigned which) {
    Events& list = events[which];
    if (!list.count)
        return;
    qsort(list.event, list.count, sizeof(Event), by_place);
    for (size_t i = 0; i < list.count; ++i) {
        Event& event = list.event[i];
        bool const again = i && event.program_counter == list.event[i - 1].program_counter &&
                           event.lane == list.event[i - 1].lane;
        event.ordinal = again ? list.event[i - 1].ordinal + 1 : 0;
    }
    qsort(list.event, list.count, sizeof(Event), by_step);
    uintptr_t seen = 0;  // the last sector counted in this step, plus one
    for (size_t i = 0; i < list.count; ++i) {
        Event const &event = list.event[i], &before = list.event[i ? i - 1 : 0];
        if (!i || event.program_counter != before.program_counter ||
            event.ordinal != before.ordinal || event.buffer != before.buffer)
            seen = 0;
        Traffic& traffic = run.request->traffic[event.buffer];
        uintptr_t const last = (event.address + event.bytes - 1) / SECTOR;
        for (uintptr_t sector = event.address / SECTOR; sector <= last; ++sector)
            if (sector >= seen) {
                traffic.load_sectors += event.access != STORE;
                traffic.store_sectors += event.access != LOAD;
                seen = sector + 1;
            }
    }
    list.count = 0;
}

static void note_traffic(unsigned buffer, uint8_t const* at, size_t bytes, Access access,
                         void const* program_counter) {
    Traffic& traffic = run.request->traffic[buffer];
    if (access != STORE) {
        ++traffic.loads;
        traffic.load_bytes += bytes;
    }
    if (access != LOAD) {
        ++traffic.stores;
        traffic.store_bytes += bytes;
    }
    Ids const& ids = run.current->ids;
    Events& list = events[ids.simdgroup];
    if (list.count == list.room) {
        list.room = list.room ? list.room * 2 : 4096;
        list.event = (Event*)realloc(list.event, list.room * sizeof(Event));
    }
    Event event = {};
    event.program_counter = program_counter;
    event.sequence = uint32_t(list.count);
    event.lane = uint8_t(ids.lane);
    event.buffer = uint8_t(buffer);
    event.access = uint8_t(access);
    event.bytes = uint32_t(bytes);
    event.address = uintptr_t(at);
    list.event[list.count++] = event;
}

// --------------------------------------------------------------------------- races
static struct {
    uint8_t* at;
    size_t bytes;
    uint8_t before[64];
    char text[512];
    void const* program_counter;
    Lane* lane;
} unsettled;

void reset_trace() {
    unsettled.at = nullptr;
    for (Events& list : events)
        list.count = 0;
}

Cell* new_shadow(size_t bytes) { return (Cell*)map_memory((bytes + 1) * sizeof(Cell)); }

void free_shadow(Cell* shadow, size_t bytes) {
    if (shadow)
        munmap(shadow, (bytes + 1) * sizeof(Cell));
}

// Whether nothing orders an earlier access before the present one.
static bool unordered(Clock const& before, Clock const& now) {
    if (!before.who || before.who == now.who || (before.atomic && now.atomic))
        return false;
    uint32_t const a = before.who - 1, b = now.who - 1;
    if (a / MAX_THREADS != b / MAX_THREADS)
        return true;
    if (before.group_epoch < now.group_epoch)
        return false;
    return a / 32 != b / 32 || before.simd_epoch >= now.simd_epoch;
}

// Two readers are kept, so that a writer meets one that is not itself: threads that
// nothing orders before the present one, and of two simdgroups where there are any.
static void remember_reader(Cell& cell, Clock const& now) {
    if (!unordered(cell.read, now))
        cell.read = now;
    else if (!unordered(cell.other_read, now))
        cell.other_read = now;
    else if ((cell.read.who - 1) / 32 == (now.who - 1) / 32)
        cell.read = now;
    else
        cell.other_read = now;
}

static void describe_race(char* text, size_t room, Region const& region, int buffer,
                          uint8_t const* at, Access access, char const* did,
                          Clock const& before) {
    char what[96];
    if (region.name)
        snprintf(what, sizeof what, "threadgroup variable '%s', byte offset %ld", region.name,
                 long(at - region.data));
    else
        snprintf(what, sizeof what, "buffer %d, byte offset %ld", buffer,
                 long(at - region.data - run.request->buffer[buffer].offset));
    uint32_t const who = before.who - 1;
    bool const same_group = who / MAX_THREADS == run.group_serial;
    snprintf(text, room, "race: %s: %s what thread %u of %s %s, and no barrier orders them",
             what, access == LOAD ? "reads" : "writes", who % MAX_THREADS,
             same_group ? "the threadgroup" : "another threadgroup", did);
}

// A write that nothing orders is harmless if it changes nothing: look once it is done.
void finish_write() {
    if (!unsettled.at)
        return;
    uint8_t* const at = unsettled.at;
    unsettled.at = nullptr;
    if (memcmp(at, unsettled.before, unsettled.bytes) == 0)
        return;
    Lane* const present = run.current;
    run.current = unsettled.lane;
    fail(RACE, unsettled.program_counter, "%s", unsettled.text);
    run.current = present;
}

static void note_order(Region& region, int buffer, uint8_t* at, size_t bytes, Access access,
                       void const* program_counter) {
    Ids const& ids = run.current->ids;
    int const kind = region.name ? 1 : 0;
    Clock now = {};
    now.who = 1 + run.group_serial * MAX_THREADS + ids.index_in_group;
    now.group_epoch = run.group_epochs[kind];
    now.simd_epoch = simdgroup[ids.simdgroup].epochs[kind];
    now.atomic = access == ATOMIC;
    for (size_t i = 0; i < bytes; ++i) {
        Cell& cell = region.shadow[at + i - region.data];
        if (access == LOAD) {
            if (unordered(cell.write, now)) {
                char text[512];
                describe_race(text, sizeof text, region, buffer, at + i, access, "wrote",
                              cell.write);
                fail(RACE, program_counter, "%s", text);
                abandon();
            }
            remember_reader(cell, now);
            continue;
        }
        Clock const* const earlier[3] = {&cell.write, &cell.read, &cell.other_read};
        for (int k = 0; k < 3; ++k)
            if (!unsettled.at && unordered(*earlier[k], now)) {
                describe_race(unsettled.text, sizeof unsettled.text, region, buffer, at + i,
                              access, k ? "read" : "wrote", *earlier[k]);
                unsettled.at = at;
                unsettled.bytes =
                    bytes < sizeof unsettled.before ? bytes : sizeof unsettled.before;
                memcpy(unsettled.before, at, unsettled.bytes);
                unsettled.program_counter = program_counter;
                unsettled.lane = run.current;
            }
        cell.write = now;
    }
}

// -------------------------------------------------------------------------- accesses
static bool inside(Region const& region, uint8_t const* at) {
    return at >= region.map && at < region.map + region.mapped;
}

static void note(void const* pointer, size_t bytes, Access access,
                 void const* program_counter) {
    if (!run.current || !run.request->traced)
        return;
    finish_write();
    if (run.request->failure)
        abandon();
    uint8_t* const at = (uint8_t*)pointer;
    if (at >= stacks && at < stacks + MAX_THREADS * STACK_BYTES)
        return;  // the thread's own variables
    Region* region = nullptr;
    int buffer = -1;
    for (unsigned i = 0; i < run.regions && !region; ++i)
        if (inside(run.region[i], at))
            region = &run.region[i];
    for (unsigned i = 0; i < run.variables && !region; ++i)
        if (run.variable[i].site && inside(run.variable[i], at))
            region = &run.variable[i];
    if (!region)
        return;  // a constant of the source, or a guard page's business
    if (at < region->data || at + bytes > region->data + region->bytes) {
        describe_fault(at, access != LOAD, program_counter);
        abandon();
    }
    if (!region->name) {
        long const offset = at - region->data;
        for (unsigned i = 0; i < run.request->buffers && buffer < 0; ++i) {
            BufferRequest const& one = run.request->buffer[i];
            if (one.region == region - run.region && offset >= long(one.offset) &&
                offset < long(one.offset + one.bytes))
                buffer = int(i);
        }
        note_traffic(unsigned(buffer), at, bytes, access, program_counter);
    }
    note_order(*region, buffer, at, bytes, access, program_counter);
}

}  // namespace msl

using namespace msl;

// The call itself, not the instruction that it returns to.
#define HERE ((char const*)__builtin_return_address(0) - 1)

extern "C" {

void msl_copy(void* to, void const* from, unsigned long bytes) {
    note(from, bytes, LOAD, HERE);
    note(to, bytes, STORE, HERE);
    memcpy(to, from, bytes);
}

void msl_atomic(void const* address, unsigned long bytes) {
    note(address, bytes, ATOMIC, HERE);
}

#define MSL_SIZE(n)                                                                   \
    void __tsan_read##n(void* p) { note(p, n, LOAD, HERE); }                          \
    void __tsan_write##n(void* p) { note(p, n, STORE, HERE); }                        \
    void __tsan_volatile_read##n(void* p) { note(p, n, LOAD, HERE); }                 \
    void __tsan_volatile_write##n(void* p) { note(p, n, STORE, HERE); }               \
    void __tsan_unaligned_read##n(void* p) { note(p, n, LOAD, HERE); }                \
    void __tsan_unaligned_write##n(void* p) { note(p, n, STORE, HERE); }              \
    void __tsan_read_write##n(void* p) { note(p, n, LOAD, HERE), note(p, n, STORE, HERE); } \
    void __tsan_unaligned_read_write##n(void* p) {                                    \
        note(p, n, LOAD, HERE), note(p, n, STORE, HERE);                              \
    }
MSL_SIZE(1)
MSL_SIZE(2)
MSL_SIZE(4)
MSL_SIZE(8)
MSL_SIZE(16)

void __tsan_read_range(void* p, unsigned long bytes) { note(p, bytes, LOAD, HERE); }
void __tsan_write_range(void* p, unsigned long bytes) { note(p, bytes, STORE, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void* __tsan_memcpy(void* to, void const* from, unsigned long bytes) {
    msl_copy(to, from, bytes);
    return to;
}
void* __tsan_memmove(void* to, void const* from, unsigned long bytes) {
    note(from, bytes, LOAD, HERE);
    note(to, bytes, STORE, HERE);
    return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
    note(to, bytes, STORE, HERE);
    return memset(to, value, bytes);
}

}  // extern "C"
