// The instructions of shaders/cuda/machine.cuh, as PTX describes them.

#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

// ---- bits -----------------------------------------------------------------------

inline u32 opaque(u32 value) { return value; }
inline u32 and_or(u32 a, u32 mask, u32 magic) { return (a & mask) | magic; }

inline u32 select_bytes(u32 a, u32 b, u32 selector) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 which = selector >> 4 * i & 15;
    if (which & 8) emulator::fail("select_bytes: sign replication");
    out |= (u32)(both >> 8 * which & 0xff) << 8 * i;
  }
  return out;
}

inline u32 funnel(u32 low, u32 high, u32 shift) {
  return (u32)(((unsigned long long)high << 32 | low) >> (shift & 31));
}

inline float as_float(u32 bits) {
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline u32 as_bits(float value) {
  u32 out;
  memcpy(&out, &value, 4);
  return out;
}

inline int to_int(float value) {
  if (!(std::fabs(value) < 2147483648.0f)) return value > 0 ? 0x7fffffff : 0;
  return (int)std::nearbyint(value);
}

inline float to_float(int value) { return (float)value; }
inline float fused(float a, float b, float c) { return std::fmaf(a, b, c); }

// ---- 16-bit floats --------------------------------------------------------------

inline float half_to_float(u16 bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float out;
  if (exponent == 31) out = mantissa ? NAN : INFINITY;
  else if (exponent == 0) out = std::ldexp((float)mantissa, -24);
  else out = std::ldexp((float)(mantissa | 1024), exponent - 25);
  return bits & 0x8000 ? -out : out;
}

// To the nearest, ties to even, of `mantissa` stored bits and the smallest exponent.
inline double rounded(double value, int mantissa, int smallest) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int last = (exponent - 1 < smallest ? smallest : exponent - 1) - mantissa;
  return std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
}

inline u16 double_to_half(double value) {
  const u16 sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  value = std::fabs(rounded(value, 10, -14));
  if (value > 65504) return sign | 0x7c00;
  if (value < std::ldexp(1.0, -14)) return sign | (u16)std::ldexp(value, 24);
  int exponent;
  const double part = std::frexp(value, &exponent);  // 0.5 to 1
  return sign | (u16)((exponent + 14) << 10) | (u16)(std::ldexp(part, 11) - 1024);
}

inline u16 double_to_bfloat(double value) {
  if (std::isnan(value)) return 0x7fff;
  return (u16)(as_bits((float)rounded(value, 7, -126)) >> 16);
}

inline u16 float_to_half(float value) { return double_to_half(value); }
inline u16 float_to_bfloat(float value) { return double_to_bfloat(value); }
inline float bfloat_to_float(u16 bits) { return as_float((u32)bits << 16); }

inline u32 two_halves(float low, float high) {
  return float_to_half(low) | (u32)float_to_half(high) << 16;
}

inline u32 two_bfloats(float low, float high) {
  return float_to_bfloat(low) | (u32)float_to_bfloat(high) << 16;
}

inline u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 out = 0;
  for (int i = 0; i < 32; i += 16)
    out |= (u32)double_to_half((double)half_to_float(a >> i) * half_to_float(b >> i) +
                               half_to_float(c >> i)) << i;
  return out;
}

inline u32 fma_bfloats(u32 a, u32 b, u32 c) {
  u32 out = 0;
  for (int i = 0; i < 32; i += 16)
    out |= (u32)double_to_bfloat((double)bfloat_to_float(a >> i) * bfloat_to_float(b >> i) +
                                 bfloat_to_float(c >> i)) << i;
  return out;
}

// ---- lanes ----------------------------------------------------------------------

inline float shuffle_xor(float value, int mask) {
  emulator::Lane own = {1, {as_bits(value)}};
  return as_float(emulator::meet(own)[emulator::lane() ^ mask].words[0]);
}

inline u32 warp_max(u32 value) {
  emulator::Lane own = {2, {value}};
  const emulator::Lane* lanes = emulator::meet(own);
  u32 out = 0;
  for (int i = 0; i < 32; ++i) out = lanes[i].words[0] > out ? lanes[i].words[0] : out;
  return out;
}

inline u32 shuffle_from(u32 value, int from) {
  emulator::Lane own = {6, {value}};
  return emulator::meet(own)[from & 31].words[0];
}

inline void sync_warp() { emulator::meet({3, {}}); }
inline void sync_block() {
  emulator::Block& b = *emulator::now->block;
  emulator::wait_at(b.barriers[0], b.alive);
}

// ---- matrices -------------------------------------------------------------------

namespace emulator {

// Lanes bring a (4 words), b (2) and c (4); each takes its part of c + a b. A word of a or b
// holds EACH numbers.
template <int EACH, typename Sum>
inline void multiply(int kind, Sum* c, const u32* a, const u32* b,
                     const std::function<double(u32, int)>& of_a,
                     const std::function<double(u32, int)>& of_b) {
  Lane own = {kind, {a[0], a[1], a[2], a[3], b[0], b[1]}};
  memcpy(own.words + 6, c, 16);
  const Lane* lanes = meet(own);
  const int g = lane() >> 2, t = lane() & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = g, column = 2 * t + (i & 1), lower = i >> 1;
    double sum = 0;
    for (int k = 0; k < 4; ++k)  // the lane of a quad that holds these places along K
      for (int part = 0; part < 2; ++part)
        for (int e = 0; e < EACH; ++e)
          sum += of_a(lanes[row * 4 + k].words[2 * part + lower], e) *
                 of_b(lanes[column * 4 + k].words[4 + part], e);
    c[i] = (Sum)(c[i] + sum);
  }
}

}  // namespace emulator

inline void multiply_bytes(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulator::multiply<4>(4, c, a, b, [](u32 w, int i) { return (double)(w >> 8 * i & 255); },
                        [](u32 w, int i) { return (double)(signed char)(w >> 8 * i); });
}

inline void multiply_halves(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  const auto get = [](u32 w, int i) { return (double)half_to_float((u16)(w >> 16 * i)); };
  emulator::multiply<2>(5, c, a, b, get, get);
}

inline void multiply_bfloats(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  const auto get = [](u32 w, int i) { return (double)bfloat_to_float((u16)(w >> 16 * i)); };
  emulator::multiply<2>(5, c, a, b, get, get);
}

// ---- memory ---------------------------------------------------------------------

namespace emulator {
inline void aligned(const void* address, size_t bytes) {
  if ((uintptr_t)address % bytes) fail("a misaligned load");
}
}  // namespace emulator

template <int OFFSET, bool ONCE>
inline void load_four(const u32* from, u32* to) {
  emulator::aligned(from + OFFSET, 16);
  memcpy(to, from + OFFSET, 16);
}

template <int OFFSET>
inline void load_two(const u32* from, u32* to) {
  emulator::aligned(from + OFFSET, 8);
  memcpy(to, from + OFFSET, 8);
}

template <int OFFSET>
inline void load_one(const u32* from, u32* to) {
  emulator::aligned(from + OFFSET, 4);
  *to = from[OFFSET];
}

template <typename T>
inline const T* now(const T* pointer) { return pointer; }

inline void prefetch(const void* from) { (void)*(volatile const char*)from; }

inline u32 shared_address(const void* pointer) {
  return (u32)((const char*)pointer - (const char*)emulator::now->block->shared.data());
}

inline void copy(u32 to, const void* from, int size, int valid) {
  const emulator::Copy c = {to, from, size, valid};
  if (emulator::late) emulator::now->copies.back().push_back(c);
  else emulator::perform(c);
}
inline void copy_16(u32 to, const void* from, int valid) { copy(to, from, 16, valid); }
inline void copy_4(u32 to, const void* from, int valid) { copy(to, from, 4, valid); }
inline void commit_copies() { emulator::now->copies.emplace_back(); }

template <int LEFT>
inline void wait_copies() {
  auto& groups = emulator::now->copies;
  while ((int)groups.size() - 1 > LEFT) {
    for (const auto& c : groups.front()) emulator::perform(c);
    groups.erase(groups.begin());
  }
}

// ---- what Hopper added ----------------------------------------------------------

inline void wait_for_kernel_before() {}
inline void let_next_kernel_start() {}
inline void sync_cluster() {
  emulator::Cluster& c = *emulator::now->block->cluster;
  emulator::wait_at(c.barrier, c.alive);
}
inline float load_from_block(u32 address, int block) {
  return as_float(emulator::now->block->cluster->blocks[block].shared[address / 4]);
}
