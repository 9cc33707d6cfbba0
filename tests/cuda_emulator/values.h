// The arithmetic of shaders/cuda/values.cuh, and blocks of two dimensions.

#pragma once

#include <cfenv>

static int wide;  // threads along the first axis of a block

#undef threadIdx
#undef blockDim
#define threadIdx (Index{emulator::now->id % wide, emulator::now->id / wide, 0})
#define blockDim (Index{wide, emulator::block_size.x / wide, 1})

inline float in_mode(int mode, float a, float b, float c) {
  volatile float x = a, y = b, z = c;
  std::fesetround(mode);
  volatile float sum = std::fmaf(x, y, z);
  std::fesetround(FE_TONEAREST);
  return sum;
}

inline float sum_nearest(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float sum_down(float a, float b, float c) { return in_mode(FE_DOWNWARD, a, b, c); }
inline float sum_up(float a, float b, float c) { return in_mode(FE_UPWARD, a, b, c); }
inline double sum_double(double a, double b, double c) { return std::fma(a, b, c); }
inline float minus(float a, float b) { return a - b; }
inline float over(float a, float b) { return a / b; }
inline unsigned long long as_long(double value) {
  unsigned long long out;
  memcpy(&out, &value, 8);
  return out;
}

inline u32 shuffle_bits(u32 value, int mask) {
  emulator::Lane own = {7, {value}};
  return emulator::meet(own)[emulator::lane() ^ mask].words[0];
}
