// Buffers of exactly their size: AddressSanitizer sees what is read or written a byte before
// or behind them, and where it is not compiled in, pages that must not be touched do.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

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

  Buffer() = default;
  Buffer(const Buffer&) = delete;

  // Full of random bytes; it ends with a page, or, one time in four, begins with one.
  void make(int64_t bytes, Random& random) { make(bytes, random, random.below(4)); }

  void make(int64_t bytes, Random& random, bool at_end) {
    size = bytes;
#if defined(HAS_ASAN)
    (void)at_end;
    data = (uint8_t*)malloc(bytes);
#else
    const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page) / page * page;
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

  void copy(const Buffer& other) { memcpy(data, other.data, size); }

  template <class T> T* as() const { return (T*)data; }

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
