// CUDA kernels on a CPU: each thread of a block is a fiber, lanes of a warp meet where they
// must. Stands in for the instructions of shaders/cuda/machine.cuh.
//
// What it finds: wrong indices (of lanes, matrix fragments, shared and global memory: buffers
// end where unmapped memory begins, shared memory starts as NaN), barriers that some threads
// do not reach, copies that are read before they were waited for, and, since threads can be
// run in several orders, missing barriers.

#pragma once

#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <functional>
#include <vector>

#define AFFINE_EMULATOR
#define DEVICE inline
#define KERNEL extern "C" void
#define DYNAMIC_SHARED(name) u32* name = (u32*)emulator::now->block->shared.data()
#define __launch_bounds__(...)
#define __grid_constant__

struct Index { int x, y, z; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

struct Copy { unsigned to; const void* from; int size, valid; };

struct Lane {  // what a lane brings to where its warp meets
  int kind;
  uint32_t words[16];
};

struct Warp {
  int arrived = 0, alive = 32;
  unsigned turn = 0;
  Lane lanes[2][32];
};

struct Barrier { int arrived = 0; unsigned turn = 0; };

struct Block {
  Index index;
  std::vector<uint32_t> shared;
  std::vector<Warp> warps;
  Barrier barriers[16];
  int alive;
  struct Cluster* cluster;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  int alive;
};

struct Thread {
  ucontext_t context;
  Block* block;
  int id;
  bool done = false;
  std::vector<std::vector<Copy>> copies;  // groups of copies, the last one still open
};

inline Thread* now;
inline ucontext_t scheduler;
inline bool late;            // copies happen when they are waited for, not at once
inline long progress;        // counts what happens: if nothing does, threads wait forever
inline Index grid, block_size;
inline const char* fault;
inline sigjmp_buf escape;
inline void (*body)(void*);
inline void* body_arguments;

[[noreturn]] inline void fail(const char* what) {
  fault = what;
  siglongjmp(escape, 1);
}

inline void yield() { swapcontext(&now->context, &scheduler); }

inline Warp& warp() { return now->block->warps[now->id / 32]; }
inline int lane() { return now->id % 32; }

// All lanes bring something; returns what they brought.
inline const Lane* meet(const Lane& own) {
  Warp& w = warp();
  const unsigned turn = w.turn;
  Lane* lanes = w.lanes[turn & 1];
  lanes[lane()] = own;
  ++progress;
  if (++w.arrived == w.alive) {
    if (w.alive != 32) fail("lanes of a warp have left before others meet");
    for (int i = 1; i < 32; ++i)
      if (lanes[i].kind != lanes[0].kind) fail("lanes meet in different instructions");
    w.arrived = 0;
    ++w.turn;
  } else {
    while (w.turn == turn) yield();
  }
  return lanes;
}

inline void wait_at(Barrier& b, const int& expected) {
  const unsigned turn = b.turn;
  ++progress;
  if (++b.arrived == expected) {
    b.arrived = 0;
    ++b.turn;
  } else {
    while (b.turn == turn) yield();
  }
}

constexpr size_t SLACK = 1024;  // words behind shared memory, which nobody may write

inline void perform(const Copy& c) {
  char* to = (char*)now->block->shared.data() + c.to;
  if (c.to % c.size) fail("a copy to a misaligned shared address");
  if ((uintptr_t)c.from % c.size) fail("a copy from a misaligned address");
  if (c.valid < 0 || c.valid > c.size) fail("a copy of more bytes than it has");
  if (c.to + c.size > (now->block->shared.size() - SLACK) * 4) fail("a copy beyond shared memory");
  memset(to, 0, c.size);
  memcpy(to, c.from, c.valid);
}

inline void start() {
  body(body_arguments);
  now->done = true;
  ++progress;
  for (auto& group : now->copies)
    if (!group.empty()) fail("a thread ends before its copies");
  --now->block->alive;
  --now->block->cluster->alive;
  Warp& w = warp();
  if (--w.alive && w.arrived == w.alive) fail("lanes wait for one that has left");
  yield();
}

inline void on_fault(int, siginfo_t* info, void*) {
  static char text[200];
  snprintf(text, sizeof text, "thread %d of block (%d, %d, %d) touches %p, in no buffer",
           now ? now->id : -1, now ? now->block->index.x : 0, now ? now->block->index.y : 0,
           now ? now->block->index.z : 0, info->si_addr);
  fault = text;
  siglongjmp(escape, 1);
}

constexpr size_t STACK = 64 << 10;

// Runs the threads of one cluster to their end. order: 0 forward, 1 backward, else random.
inline void run_cluster(Cluster& cluster, int threads, unsigned order, char* stacks) {
  std::vector<Thread> all(cluster.blocks.size() * threads);
  for (size_t i = 0; i < all.size(); ++i) {
    Thread& t = all[i];
    t.block = &cluster.blocks[i / threads];
    t.id = (int)(i % threads);
    t.copies.resize(1);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = stacks + i * STACK;
    t.context.uc_stack.ss_size = STACK;
    t.context.uc_link = &scheduler;
    makecontext(&t.context, (void (*)())start, 0);
  }
  std::vector<Thread*> left;
  for (auto& t : all) left.push_back(&t);
  unsigned seed = order;
  while (!left.empty()) {
    const long before = progress;
    const size_t count = left.size();
    const size_t shift = order > 1 ? (seed = seed * 1664525u + 1013904223u) >> 8 : 0;
    for (size_t i = 0; i < count; ++i) {
      const size_t place = order == 1 ? count - 1 - i : (i * (order > 1 ? 7 : 1) + shift) % count;
      now = left[place];
      if (!now->done) swapcontext(&scheduler, &now->context);
    }
    if (order > 1)  // 7 may divide their number
      for (Thread* t : left) {
        now = t;
        if (!now->done) swapcontext(&scheduler, &now->context);
      }
    std::vector<Thread*> still;
    for (Thread* t : left)
      if (!t->done) still.push_back(t);
    left.swap(still);
    if (progress == before && !left.empty()) fail("threads wait for each other forever");
  }
}

struct Launch {
  Index grid;
  int threads, shared, cluster;  // bytes of shared memory; blocks of a cluster, along y
  unsigned order;
  bool late;
};

// null, or what went wrong.
inline const char* run(const Launch& how, void (*function)(void*), void* arguments) {
  static std::vector<char> alternative(1 << 16);
  stack_t own = {};
  own.ss_sp = alternative.data(), own.ss_size = alternative.size();
  sigaltstack(&own, nullptr);
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  grid = how.grid, block_size = {how.threads, 1, 1};
  late = how.late, body = function, body_arguments = arguments, fault = nullptr;
  const size_t bytes = STACK * how.threads * how.cluster;
  char* stacks = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!sigsetjmp(escape, 1)) {
    for (int z = 0; z < grid.z; ++z)
      for (int y = 0; y < grid.y; y += how.cluster)
        for (int x = 0; x < grid.x; ++x) {
          Cluster cluster;
          cluster.alive = how.threads * how.cluster;
          cluster.blocks.resize(how.cluster);
          for (int i = 0; i < how.cluster; ++i) {
            Block& b = cluster.blocks[i];
            b.index = {x, y + i, z};
            b.shared.assign((how.shared + 3) / 4 + SLACK, 0xffffffffu);
            b.warps.resize(how.threads / 32);
            b.alive = how.threads, b.cluster = &cluster;
          }
          run_cluster(cluster, how.threads, how.order, stacks);
          for (const Block& b : cluster.blocks)
            for (size_t i = b.shared.size() - SLACK; i < b.shared.size(); ++i)
              if (b.shared[i] != 0xffffffffu) fail("a write beyond shared memory");
        }
  }
  now = nullptr;
  munmap(stacks, bytes);
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  return fault;
}

// A copy of a buffer that ends (but for what alignment leaves) where a page begins that
// nobody may touch.
struct Guarded {
  char* base = nullptr;
  size_t mapped = 0, bytes = 0;
  char* data = nullptr;
  void* original;

  Guarded(void* from, size_t count, size_t alignment) : bytes(count), original(from) {
    if (!from) return;
    const size_t page = 4096, room = (count + alignment + page) / page * page;
    mapped = room + 2 * page;
    base = (char*)mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(base + page, room, PROT_READ | PROT_WRITE);
    data = base + page + (room - count) / alignment * alignment;
    memset(base + page, 0xff, room);
    memcpy(data, from, count);
  }
  void give_back() { if (data) memcpy(original, data, bytes); }
  ~Guarded() { if (base) munmap(base, mapped); }
};

}  // namespace emulator

#define threadIdx (Index{emulator::now->id, 0, 0})
#define blockIdx (emulator::now->block->index)
#define gridDim (emulator::grid)
#define blockDim (emulator::block_size)

#include "instructions.h"
