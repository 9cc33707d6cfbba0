// What the drivers share: packed weights and what they stand for, inputs, and threads.
#pragma once

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

#include <initializer_list>

#include "memory.h"

#if defined(NO_CXX_LIBRARY)
// All that the kernels want of one: what thread_local buffers give back at a thread's end.
extern "C" int __cxa_thread_atexit(void (*)(void*), void*, void*) { return 0; }
#endif

constexpr int THREADS = 3;

// A matrix's rows lie `stride` apart; behind the last one there is nothing.
static int64_t span(int64_t rows, int64_t stride, int64_t length) {
  return rows ? (rows - 1) * stride + length : 0;
}

// K for which rows are whole words, no less than `k`.
static int at_least(int k) {
  int step = GROUP;
  while (step * BITS % 32) step += GROUP;
  return (k + step - 1) / step * step;
}

// So many bytes of packed words are not there: whether anybody sees that they are read.
static int missing_bytes = 0;

// [experts * n, k], random; rows are `apart` elements further apart than they are long.
struct Weights {
  int rows, k, type, word_stride, stride;
  Buffer words, scales, biases;

  Weights(int rows, int k, int type, int apart, Random& random)
      : rows(rows), k(k), type(type), word_stride(k * BITS / 32 + apart), stride(k / GROUP + apart) {
    const int64_t bytes = span(rows, word_stride, k * BITS / 32) * 4 - missing_bytes;
    words.make(bytes, random, missing_bytes || random.below(4));
    scales.make(span(rows, stride, k / GROUP) * bytes_of(type), random);
    biases.make(span(rows, stride, k / GROUP) * bytes_of(type), random);
    for (int n = 0; n < rows; n++)
      for (int g = 0; g < k / GROUP; g++) {
        set_number(scales.data, (int64_t)n * stride + g, type, random.normal() / (1 << BITS));
        set_number(biases.data, (int64_t)n * stride + g, type, random.normal());
      }
  }

  int code(int n, int column) const {
    const uint8_t* row = words.data + (int64_t)n * word_stride * 4;
    int code = 0;
    for (int b = 0; b < BITS; b++) {
      const int bit = column * BITS + b;
      code |= (row[bit / 8] >> (bit % 8) & 1) << b;
    }
    return code;
  }

  double value(int n, int column) const {
    const int64_t at = (int64_t)n * stride + column / GROUP;
    return code(n, column) * number(scales.data, at, type) + number(biases.data, at, type);
  }

  double* dense() const {
    double* all = (double*)malloc(sizeof(double) * rows * k);
    for (int n = 0; n < rows; n++)
      for (int g = 0; g < k / GROUP; g++) {
        const double scale = number(scales.data, (int64_t)n * stride + g, type);
        const double bias = number(biases.data, (int64_t)n * stride + g, type);
        for (int i = g * GROUP; i < (g + 1) * GROUP; i++)
          all[(int64_t)n * k + i] = code(n, i) * scale + bias;
      }
    return all;
  }
};

static void fill_normal(Buffer& buffer, int rows, int stride, int length, int type, Random& random) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < length; j++)
      set_number(buffer.data, (int64_t)i * stride + j, type, random.normal());
}

static void shuffle(int32_t* order, int count, Random& random) {
  for (int i = 0; i < count; i++) order[i] = i;
  for (int i = count - 1; i > 0; i--) {
    const int j = random.below(i + 1), other = order[j];
    order[j] = order[i];
    order[i] = other;
  }
}

// Relative L2 against float64: at most 1.5 times one rounding, 1e-6 for float32. Where there
// are too few results for that to mean much, they count as large as the terms of their sums.
struct Error {
  double error = 0, rounding = 0, size = 0, terms = 0;
  int count = 0;

  void add(double seen, double right, double squares_of_terms, int type) {
    const double once = rounded(right, type) - right;
    error += (seen - right) * (seen - right);
    rounding += once * once;
    size += right * right;
    terms += squares_of_terms > right * right ? squares_of_terms : right * right;
    count++;
  }

  double allowed(int type) const {
    const double unit = type == 0 ? 1e-6 : type == 1 ? 1.5 * 0x1p-11 : 1.5 * 0x1p-8;
    if (count < 64) return unit * sqrt(terms);
    return type == 0 ? unit * sqrt(size) : 1.5 * sqrt(rounding);
  }

  bool passes(int type) const { return sqrt(error) <= allowed(type); }
};

// ---- threads --------------------------------------------------------------------

// What libgomp and LLVM's OpenMP do, in a way that ThreadSanitizer understands.
static void* run_body(void* task) {
  ((Task*)task)->body(((Task*)task)->data);
  return nullptr;
}

static void run_on_threads(Body body, void* data, unsigned threads, unsigned) {
  Task task = {body, data};
  pthread_t others[THREADS];
  for (unsigned i = 1; i < threads; i++) pthread_create(&others[i], nullptr, run_body, &task);
  body(data);
  for (unsigned i = 1; i < threads; i++) pthread_join(others[i], nullptr);
}

static thread_local int kmp_threads = 1;
static void push_threads(void*, int, int threads) { kmp_threads = threads; }
static int own_number(void*) { return 7; }
typedef void (*Micro)(int*, int*, void*);
static void run_micro(void* data) {
  Task& task = *(Task*)data;
  int number = 0, in_team = 0;
  ((Micro)task.body)(&number, &in_team, task.data);
}

static void start_team(void*, int, Micro micro, ...) {
  va_list rest;
  va_start(rest, micro);
  Task task = {(Body)micro, va_arg(rest, void*)};
  va_end(rest);
  run_on_threads(run_micro, &task, (unsigned)kmp_threads, 0);
}

static void use_runtime(bool of_llvm) {
  if (of_llvm) affine_runtime(nullptr, (void*)start_team, (void*)push_threads, (void*)own_number);
  else affine_runtime((void*)run_on_threads, nullptr, nullptr, nullptr);
}

// Runs work(seed) on both runtimes; with "threads", two callers at once.
static int run_all(int (*work)(bool full, uint64_t seed), int count, char** arguments) {
  struct Caller {
    int (*work)(bool, uint64_t);
    bool full;
    uint64_t seed;
    int failed;
    static void* run(void* data) {
      Caller& own = *(Caller*)data;
      own.failed = own.work(own.full, own.seed);
      return nullptr;
    }
  };
  bool full = false, threads = false;
  for (int i = 1; i < count; i++) {
    full |= !strcmp(arguments[i], "full");
    threads |= !strcmp(arguments[i], "threads");
  }
  int failed = 0;
  for (int of_llvm = 0; of_llvm < 2; of_llvm++) {
    use_runtime(of_llvm);
    Caller callers[2] = {{work, full, 2u * of_llvm + 1, 0}, {work, full, 2u * of_llvm + 2, 0}};
    pthread_t other;
    if (threads) pthread_create(&other, nullptr, Caller::run, &callers[1]);
    Caller::run(&callers[0]);
    if (threads) pthread_join(other, nullptr);
    failed += callers[0].failed + callers[1].failed;
  }
  return failed;
}
