// Runs a launch: threadgroups one after another, the lanes of each as fibers that take
// turns in a chosen order and meet at barriers and simdgroup operations.
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <ucontext.h>

#include "runtime.hpp"

namespace msl {

Launch run;
Lane lane[MAX_THREADS];
Simdgroup simdgroup[MAX_SIMDGROUPS];
uint8_t* stacks;

void fail(int failure, void const* program_counter, char const* format, ...) {
    Request& request = *run.request;
    if (request.failure != NONE)
        return;  // the first thing that went wrong is the one to tell
    request.failure = failure;
    request.program_counter = uint64_t(program_counter);
    va_list values;
    va_start(values, format);
    int used = vsnprintf(request.message, sizeof request.message, format, values);
    va_end(values);
    if (run.current && used >= 0 && size_t(used) < sizeof request.message) {
        Ids const& ids = run.current->ids;
        snprintf(request.message + used, sizeof request.message - size_t(used),
                 "; thread (%u, %u, %u), threadgroup (%u, %u, %u)", ids.thread_position[0],
                 ids.thread_position[1], ids.thread_position[2], ids.group_position[0],
                 ids.group_position[1], ids.group_position[2]);
    }
}

static void to_scheduler() {
    Lane& here = *run.current;
    here.path = msl_path;
    msl_switch(&here.stack_pointer, run.scheduler);
    msl_path = here.path;
}

void abandon() {
    for (;;)
        to_scheduler();
}

static void set_ready(unsigned index) {
    lane[index].state = READY;
    run.ready[index / 64] |= uint64_t(1) << index % 64;
    ++run.ready_count;
}

// --------------------------------------------------------------------- simdgroups
// Let the waiting lanes of a simdgroup meet, if they wait at the same operation.
static void meet(unsigned which) {
    Simdgroup& group = simdgroup[which];
    Lane* first = nullptr;
    for (unsigned i = 0; i < 32; ++i) {
        Lane& other = lane[which * 32 + i];
        if (!(group.waiting >> i & 1))
            continue;
        if (!first)
            first = &other;
        bool const same = first->state == other.state && first->line == other.line &&
                          first->combine == other.combine;
        if (same && first->path != other.path)
            return fail(DIVERGENCE, nullptr,
                        "lanes of simdgroup %u wait at the simdgroup operation in line %d "
                        "in different turns of a loop, or in different branches",
                        which, first->line);
        if (!same)
            return fail(DIVERGENCE, nullptr,
                        "lanes of simdgroup %u wait at different simdgroup operations "
                        "(lines %d and %d)",
                        which, first->line, other.line);
    }
    finish_step(which);
    unsigned const mask = group.waiting;
    if (first->state == AT_COLLECTIVE) {
        first->combine(group.operands, mask, group.results);
    } else {
        group.epochs[0] += first->flags & 1;
        group.epochs[1] += first->flags >> 1 & 1;
    }
    group.waiting = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1)
            set_ready(which * 32 + i);
}

static void arrive(State state, int line) {
    Lane& here = *run.current;
    here.path = msl_path;
    Simdgroup& group = simdgroup[here.ids.simdgroup];
    here.state = state;
    here.line = line;
    group.waiting |= 1u << here.ids.lane;
    if (group.waiting == group.exists)
        meet(here.ids.simdgroup);
    to_scheduler();
}

// -------------------------------------------------------------------- threadgroups
static void pass_barrier() {
    Lane const* first = nullptr;
    unsigned waiting = 0;
    for (unsigned i = 0; i < run.lanes; ++i) {
        if (lane[i].state != AT_BARRIER)
            continue;
        ++waiting;
        first = first ? first : &lane[i];
        if (lane[i].line == first->line && lane[i].path != first->path)
            return fail(DIVERGENCE, nullptr,
                        "threads of a threadgroup wait at the barrier in line %d in "
                        "different turns of a loop, or in different branches",
                        first->line);
        if (lane[i].line != first->line)
            return fail(DIVERGENCE, nullptr,
                        "threads of a threadgroup wait at different barriers (lines %d "
                        "and %d)",
                        first->line, lane[i].line);
    }
    if (waiting < run.lanes)
        return fail(DIVERGENCE, nullptr,
                    "%u of %u threads wait at the barrier in line %d, the others have "
                    "returned",
                    waiting, run.lanes, first->line);
    for (unsigned i = 0; i < 2; ++i) {
        if (!(first->flags >> i & 1))
            continue;
        ++run.group_epochs[i];
        for (Simdgroup& group : simdgroup)
            ++group.epochs[i];
    }
    for (unsigned i = 0; i < run.lanes; ++i)
        set_ready(i);
}

// No lane can go on: whole simdgroups met already, so parts of one meet, or fail.
static void untangle() {
    run.current = nullptr;
    bool met = false;
    for (unsigned i = 0; i * 32 < run.lanes; ++i) {
        Simdgroup& group = simdgroup[i];
        if (!group.waiting)
            continue;
        int at = 0, line = 0;
        for (unsigned k = 0; k < 32; ++k) {
            if (group.waiting >> k & 1)
                line = lane[i * 32 + k].line;
            else if (group.live >> k & 1)
                at = lane[i * 32 + k].line;
        }
        if (!run.request->partial) {
            char where[48] = "have returned";
            if (at)
                snprintf(where, sizeof where, "wait at the barrier in line %d", at);
            return fail(DIVERGENCE, nullptr,
                        "only part of simdgroup %u reached the simdgroup operation in "
                        "line %d, the other lanes %s (legal for reductions; "
                        "partial_simdgroups=True lets it pass)",
                        i, line, where);
        }
        meet(i);
        met = true;
    }
    if (!met)
        pass_barrier();
}

// ------------------------------------------------------------------------ schedule
static unsigned next_random(unsigned below) {
    run.random = run.random * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned((run.random >> 33) % below);
}

static unsigned pick() {
    constexpr int words = MAX_THREADS / 64;
    int const order = run.request->order;
    if (order == FORWARD)
        for (int i = 0; i < words; ++i)
            if (run.ready[i])
                return unsigned(i * 64 + __builtin_ctzll(run.ready[i]));
    if (order == BACKWARD)
        for (int i = words - 1; i >= 0; --i)
            if (run.ready[i])
                return unsigned(i * 64 + 63 - __builtin_clzll(run.ready[i]));
    unsigned left = next_random(run.ready_count);
    for (int i = 0;; ++i) {
        unsigned const count = unsigned(__builtin_popcountll(run.ready[i]));
        if (left < count) {
            uint64_t word = run.ready[i];
            while (left--)
                word &= word - 1;
            return unsigned(i * 64 + __builtin_ctzll(word));
        }
        left -= count;
    }
}

static void lane_main() {
    for (;;) {
        msl_path = 0;
        run.request->kernel->entry(run.buffers, run.current->ids);
        Lane& here = *run.current;
        here.state = DONE;
        here.parked = true;
        --run.live;
        simdgroup[here.ids.simdgroup].live &= ~(1u << here.ids.lane);
        to_scheduler();
    }
}

static void start_lanes(unsigned const (&place)[3]) {
    Request const& request = *run.request;
    unsigned size[3], launched = 1;
    for (int d = 0; d < 3; ++d) {
        unsigned const left = request.threads[d] - place[d] * request.group_size[d];
        size[d] = left < request.group_size[d] ? left : request.group_size[d];
        launched *= request.group_size[d];
    }
    run.lanes = run.live = size[0] * size[1] * size[2];
    run.ready_count = 0;
    for (uint64_t& word : run.ready)
        word = 0;
    for (unsigned i = 0; i < MAX_SIMDGROUPS; ++i) {
        unsigned const left = i * 32 < run.lanes ? run.lanes - i * 32 : 0;
        Simdgroup& group = simdgroup[i];
        group.exists = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        group.live = group.exists;
        group.waiting = group.epochs[0] = group.epochs[1] = 0;
    }
    for (unsigned i = 0; i < run.lanes; ++i) {
        Lane& here = lane[i];
        Ids& ids = here.ids;
        unsigned const inside[3] = {i % size[0], i / size[0] % size[1],
                                    i / size[0] / size[1]};
        for (int d = 0; d < 3; ++d) {
            ids.position_in_group[d] = inside[d];
            ids.group_position[d] = place[d];
            ids.thread_position[d] = place[d] * request.group_size[d] + inside[d];
            ids.threads[d] = request.threads[d];
            ids.group_size[d] = size[d];
            ids.dispatched_group_size[d] = request.group_size[d];
            ids.groups[d] = run.groups[d];
        }
        ids.index_in_group = i;
        ids.simdgroup = i / 32;
        ids.lane = i % 32;
        ids.simdgroups = (run.lanes + 31) / 32;
        ids.dispatched_simdgroups = (launched + 31) / 32;
        if (!here.parked)
            here.stack_pointer = fresh_stack(stacks + i * STACK_BYTES, i, lane_main);
        here.parked = false;
        set_ready(i);
    }
}

static void run_group(unsigned const (&place)[3]) {
    run.group_epochs[0] = run.group_epochs[1] = 0;
    start_group_memory();
    start_lanes(place);
    while (run.live && !run.request->failure) {
        if (!run.ready_count) {
            untangle();
            continue;
        }
        unsigned const index = pick();
        run.ready[index / 64] &= ~(uint64_t(1) << index % 64);
        --run.ready_count;
        run.current = &lane[index];
        msl_switch(&run.scheduler, lane[index].stack_pointer);
        finish_write();
        run.current = nullptr;
    }
    for (unsigned i = 0; i * 32 < run.lanes; ++i)
        finish_step(i);
    if (!run.request->failure)
        check_group_memory();
    ++run.group_serial;
}

static uint64_t common_divisor(uint64_t a, uint64_t b) {
    while (b) {
        uint64_t const rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static void run_groups() {
    Request const& request = *run.request;
    uint64_t total = 1;
    for (int d = 0; d < 3; ++d) {
        run.groups[d] = (request.threads[d] + request.group_size[d] - 1) /
                        request.group_size[d];
        total *= run.groups[d];
    }
    // Multiplying by a number without a common divisor visits every group once.
    uint64_t factor = 1 + request.seed * 2654435761u % total;
    while (common_divisor(factor, total) != 1)
        ++factor;
    for (uint64_t i = 0; i < total && !request.failure; ++i) {
        uint64_t index = i;
        if (request.order == BACKWARD)
            index = total - 1 - i;
        if (request.order == RANDOM)
            index = (i * factor + request.seed % total) % total;
        unsigned const place[3] = {unsigned(index % run.groups[0]),
                                   unsigned(index / run.groups[0] % run.groups[1]),
                                   unsigned(index / run.groups[0] / run.groups[1])};
        run_group(place);
    }
}

// -------------------------------------------------------------------------- faults
static void read_context(void* context, bool& write, void const*& program_counter) {
    ucontext_t const* c = (ucontext_t const*)context;
#if defined(__linux__) && defined(__x86_64__)
    write = c->uc_mcontext.gregs[REG_ERR] & 2;
    program_counter = (void const*)c->uc_mcontext.gregs[REG_RIP];
#elif defined(__linux__)
    write = false;
    program_counter = (void const*)c->uc_mcontext.pc;
#elif defined(__aarch64__)
    write = c->uc_mcontext->__es.__esr >> 6 & 1;
    program_counter = (void const*)c->uc_mcontext->__ss.__pc;
#else
    write = c->uc_mcontext->__es.__err & 2;
    program_counter = (void const*)c->uc_mcontext->__ss.__rip;
#endif
}

static pthread_t launching;

static bool in_kernel(void const* program_counter) {
    Dl_info here, kernel;
    return run.current && dladdr(program_counter, &here) &&
           dladdr((void const*)run.request->kernel->entry, &kernel) &&
           here.dli_fbase == kernel.dli_fbase;
}

static void on_signal(int signal, siginfo_t* info, void* context) {
    if (!pthread_equal(pthread_self(), launching)) {
        // A timer may interrupt any thread, but only this one can stop the kernel.
        pthread_kill(launching, signal);
        return;
    }
    bool write = false;
    void const* program_counter = nullptr;
    read_context(context, write, program_counter);
    if (signal == SIGVTALRM && !in_kernel(program_counter))
        return;  // not in the middle of the runtime or a library; the timer comes again
    if (signal == SIGVTALRM)
        fail(OTHER, program_counter, "the launch took more than %g seconds",
             run.request->seconds);
    else if (signal == SIGILL || signal == SIGTRAP)
        // clang ends a kernel so where it sees an index beyond an array.
        fail(OUT_OF_BOUNDS, program_counter, "an array's index is out of bounds");
    else
        describe_fault((uint8_t const*)info->si_addr, write, program_counter);
    siglongjmp(run.fault, 1);
}

// Stacks, each with a guard page at its bottom.
static bool make_stacks() {
    if (stacks)
        return true;
    stacks = map_memory(MAX_THREADS * STACK_BYTES);
    for (unsigned i = 0; stacks && i < MAX_THREADS; ++i)
        mprotect(stacks + i * STACK_BYTES, page_bytes(), PROT_NONE);
    return stacks;
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGVTALRM};
constexpr int COUNT = sizeof SIGNALS / sizeof *SIGNALS;

// Processor time, looked at twice a second once the limit is reached.
static void set_timer(double seconds) {
    itimerval timer = {};
    timer.it_value.tv_sec = time_t(seconds);
    timer.it_value.tv_usec = suseconds_t((seconds - double(time_t(seconds))) * 1e6);
    timer.it_interval.tv_usec = seconds > 0 ? 500000 : 0;
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

static void run_guarded() {
    static uint8_t* const handler_stack = map_memory(1 << 16);
    stack_t alternative = {}, old_stack = {};
    alternative.ss_sp = handler_stack;
    alternative.ss_size = 1 << 16;
    struct sigaction action = {}, old[COUNT] = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    launching = pthread_self();
    sigaltstack(&alternative, &old_stack);
    for (int i = 0; i < COUNT; ++i)
        sigaction(SIGNALS[i], &action, &old[i]);
    set_timer(run.request->seconds);
    if (sigsetjmp(run.fault, 1) == 0)
        run_groups();
    set_timer(0);
    for (int i = 0; i < COUNT; ++i)
        sigaction(SIGNALS[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
}

}  // namespace msl

using namespace msl;

extern "C" {

unsigned long msl_path;

unsigned msl_lane() { return run.current->ids.lane; }

void msl_fail(int failure, char const* message, int) {
    fail(failure, nullptr, "%s", message);
}

void msl_collective(void const* operand, unsigned operand_bytes, void* result,
                    unsigned result_bytes,
                    void (*combine)(void const*, unsigned, void*), int line) {
    Lane& here = *run.current;
    Simdgroup& group = simdgroup[here.ids.simdgroup];
    memcpy(group.operands + here.ids.lane * operand_bytes, operand, operand_bytes);
    here.combine = combine;
    arrive(AT_COLLECTIVE, line);
    memcpy(result, group.results + here.ids.lane * result_bytes, result_bytes);
}

void msl_barrier(bool whole_group, unsigned flags, int line) {
    Lane& here = *run.current;
    here.flags = flags;
    here.combine = nullptr;
    if (!whole_group)
        return arrive(AT_SIMD_BARRIER, line);
    here.state = AT_BARRIER;
    here.line = line;
    to_scheduler();
}

// Run one launch; its request says afterwards whether and how it failed.
void msl_launch(Request* request) {
    run.request = request;
    run.current = nullptr;
    run.group_serial = 0;
    run.random = request->seed * 2654435761u + 12345;
    request->failure = NONE;
    reset_trace();
    if (!make_stacks())
        return fail(OTHER, nullptr, "no memory for the threads' stacks");
    if (place_regions()) {
        run_guarded();
        run.current = nullptr;
        if (!request->failure)
            check_slack();
        return_regions();
    }
    if (request->failure)
        for (Lane& one : lane)
            one.parked = false;  // some stopped in the middle of the kernel
}

}  // extern "C"
