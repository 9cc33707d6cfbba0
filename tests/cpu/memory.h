// Buffers of exactly their size: a byte before or behind them is seen, if it is read or
// written, by AddressSanitizer where it is compiled in, else by the memory management.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "numbers.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAS_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define HAS_ASAN 1
#endif

struct Buffer {
  uint8_t* data = nullptr;
  int64_t size = 0;

  // Beginning or ending with a page; other pages beside it must not be touched.
  void make(int64_t bytes, Random& random) {
    size = bytes;
    const bool at_end = random.below(4);
#if defined(HAS_ASAN)
    (void)at_end;
    data = (uint8_t*)malloc(bytes);
#else
    const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    map_ = (uint8_t*)mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED || mprotect(map_ + page, inside, PROT_READ | PROT_WRITE)) abort();
    data = map_ + page + (at_end ? inside - bytes : 0);
#endif
    fill(random);
  }

  void fill(Random& random) {
    for (int64_t i = 0; i < size; i++) data[i] = (uint8_t)random.next();
  }

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#if defined(HAS_ASAN)
    free(data);
#else
    if (map_) munmap(map_, mapped_);
#endif
  }

 private:
  uint8_t* map_ = nullptr;
  int64_t mapped_ = 0;
};
