// Work on the threads that torch uses, by the OpenMP runtime that torch has loaded.
//
// A second runtime would have threads of its own, which spin while the first ones work. So
// nothing is linked: the host hands over the entry point of the runtime that is there.
#pragma once

#include <cstdint>

typedef void (*Body)(void*);
typedef void (*Gomp)(Body, void*, unsigned, unsigned);
typedef void (*KmpFork)(void*, int, void (*)(int*, int*, void*), ...);
typedef void (*KmpPush)(void*, int, int);
typedef int (*KmpSelf)(void*);

static Gomp gomp = nullptr;
static KmpFork kmp_fork = nullptr;
static KmpPush kmp_push = nullptr;
static KmpSelf kmp_self = nullptr;

// LLVM's description of a place in a source; only its address and flags are looked at.
struct Place { int32_t reserved, flags, more, size; const char* source; };
static Place place = {0, 2, 0, 22, ";unknown;unknown;0;0;;"};

extern "C" void affine_runtime(void* of_gnu, void* fork, void* push, void* self) {
  gomp = (Gomp)of_gnu;
  kmp_fork = (KmpFork)fork;
  kmp_push = (KmpPush)push;
  kmp_self = (KmpSelf)self;
}

struct Task { Body body; void* data; };
static void kmp_body(int*, int*, void* task) { ((Task*)task)->body(((Task*)task)->data); }

// Run body(data) on `threads` threads at once, this one among them.
static void parallel(Body body, void* data, int threads) {
  if (threads > 1 && gomp) {
    gomp(body, data, (unsigned)threads, 0);
  } else if (threads > 1 && kmp_fork) {
    Task task = {body, data};
    kmp_push(&place, kmp_self(&place), threads);
    kmp_fork(&place, 1, kmp_body, &task);
  } else {
    body(data);
  }
}
