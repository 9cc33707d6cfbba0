// What makes or reads weights: dense weights, rows by number, and codes from weights.
// Values are those of affine_tensor/layout.py, bit for bit.
//
// Definitions: BITS; X, the type of dense weights (machine.cuh lists types). Scales and
// biases have any type but float64, groups any size: 1 << group_shift.
// Compiled with --fmad=false: sums and products that the reference rounds are rounded.

#include "values.cuh"

constexpr u32 MASK = (1u << BITS) - 1;

// ---- codes to weights -----------------------------------------------------------
//
// A thread makes 16 bytes of the dense weight, so that neighbours write what lies side by
// side, in some rows one below the other.
//
// block: (a, b) threads; grid: as many as the columns need, any number of rows

constexpr int UNIT = 16 / size_of(X);  // weights
constexpr int WIDTH = UNIT * BITS;     // bits of their codes, up to 64
constexpr int ROWS = 4;                // of a thread at a time

struct Weight {
  const u32* packed;
  i64 packed_stride;  // words from row to row
  const void* scales;
  const void* biases;
  i64 scale_stride;
  int group_shift;
};

// What lies in memory: to convert it here would be to wait for it before the next load.
struct Unit {
  u32 low, high;  // words
  u32 scale, bias;
};

template <int S> DEVICE u32 bits_at(const void* p, i64 at) {
  if constexpr (S == FLOAT32) return ((const u32*)p)[at];
  return ((const u16*)p)[at];
}

template <int S> DEVICE float value_of(u32 bits) {
  if constexpr (S == FLOAT32) return as_float(bits);
  if constexpr (S == FLOAT16) return half_to_float((u16)bits);
  return as_float(bits << 16);
}

template <int S> DEVICE Unit load_unit(const Weight& w, i64 row, int unit) {
  const int bit = unit * WIDTH;
  const u32* words = w.packed + row * w.packed_stride + (bit >> 5);
  const i64 group = row * w.scale_stride + (unit * UNIT >> w.group_shift);
  Unit made;
  made.low = words[0];
  made.high = 0;
  if constexpr (32 % WIDTH != 0) {
    if ((bit & 31) + WIDTH > 32) made.high = words[1];  // there is none behind the last
  }
  made.scale = bits_at<S>(w.scales, group);
  made.bias = bits_at<S>(w.biases, group);
  return made;
}

DEVICE float code_at(u64 codes, int i) {
  const u32 code = (u32)(codes >> (i * BITS)) & MASK;
  return as_float(code | 0x4b000000u) - 8388608.0f;
}

// The exact sum cut to float32, its last bit set where anything was cut off: rounded once
// more, to 16 bits, it is as if it had been rounded once.
DEVICE float sum_to_odd(float code, float scale, float bias) {
  const float below = sum_down(code, scale, bias);
  const float above = sum_up(code, scale, bias);
  return as_bits(below) & 1 ? below : above;
}

struct alignas(16) Dense {
  u32 words[4];
};

template <int S> DEVICE Dense dense_of(const Unit& loaded, int unit) {
  u64 codes = (u64)loaded.high << 32 | loaded.low;
  if constexpr (WIDTH % 32 != 0) codes >>= unit * WIDTH & 31;
  const float scale = value_of<S>(loaded.scale), bias = value_of<S>(loaded.bias);
  Dense made;
#pragma unroll
  for (int i = 0; i < UNIT; i++) {
    const float code = code_at(codes, i);
    if constexpr (X == FLOAT64) {
      const u64 bits = as_long(sum_double(code, scale, bias));
      made.words[2 * i] = (u32)bits;
      made.words[2 * i + 1] = (u32)(bits >> 32);
    } else if constexpr (X == FLOAT32) {
      // The reference rounds to float64 first, which scales of 16 bits do not need.
      const float value = S ? sum_nearest(code, scale, bias)
                            : (float)sum_double(code, scale, bias);
      made.words[i] = as_bits(value);
    } else if (i % 2) {
      const float before = sum_to_odd(code_at(codes, i - 1), scale, bias);
      made.words[i / 2] = two_values<X>(before, sum_to_odd(code, scale, bias));
    }
  }
  return made;
}

// Columns go where the permutation says; what is no column goes nowhere.
DEVICE void scatter(char* row, const Dense& dense, const int* targets, int columns) {
#pragma unroll
  for (int i = 0; i < UNIT; i++) {
    const int target = targets[i];
    if ((u32)target >= (u32)columns) continue;
    if constexpr (X == FLOAT64) {
      ((u64*)row)[target] = (u64)dense.words[2 * i + 1] << 32 | dense.words[2 * i];
    } else if constexpr (X == FLOAT32) {
      ((u32*)row)[target] = dense.words[i];
    } else {
      ((u16*)row)[target] = (u16)(dense.words[i / 2] >> (i % 2 * 16));
    }
  }
}

// A permutation, if any, for each `permuted_rows` rows.
struct Target {
  void* y;
  const int* permutation;
  i64 permuted_rows;
  i64 rows;
  int columns;
};

template <int S> DEVICE void dequantize(const Weight& w, const Target& to, int unit) {
  const i64 row_bytes = (i64)to.columns * size_of(X);
  const i64 last = to.rows - 1, step = (i64)gridDim.y * blockDim.y * ROWS;
  i64 first = (i64)blockIdx.y * blockDim.y * ROWS + threadIdx.y;
  for (; first <= last; first += step) {
    Unit units[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const i64 row = first + i * (int)blockDim.y;
      units[i] = load_unit<S>(w, row < last ? row : last, unit);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const i64 row = first + i * (int)blockDim.y;
      if (row > last) break;
      const Dense dense = dense_of<S>(units[i], unit);
      char* y = (char*)to.y + row * row_bytes;
      if (to.permutation == nullptr) {
        ((Dense*)y)[unit] = dense;
      } else {
        const int* own = to.permutation + row / to.permuted_rows * to.columns;
        scatter(y, dense, own + unit * UNIT, to.columns);
      }
    }
  }
}

KERNEL __launch_bounds__(256)
    affine_dequantize(const u32* __restrict__ packed, i64 packed_stride,
                      const void* __restrict__ scales, const void* __restrict__ biases,
                      i64 scale_stride, int scale_type, int group_shift,
                      const int* __restrict__ permutation, i64 permuted_rows,
                      void* __restrict__ y, i64 rows, int columns) {
  const Weight w = {packed, packed_stride, scales, biases, scale_stride, group_shift};
  const Target to = {y, permutation, permuted_rows, rows, columns};
  const int unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= columns / UNIT) return;
  if (scale_type == 0) dequantize<0>(w, to, unit);
  if (scale_type == 1) dequantize<1>(w, to, unit);
  if (scale_type == 2) dequantize<2>(w, to, unit);
}

DEVICE Dense dense_at(const Weight& w, i64 row, int unit, int scale_type) {
  if (scale_type == 0) return dense_of<0>(load_unit<0>(w, row, unit), unit);
  if (scale_type == 1) return dense_of<1>(load_unit<1>(w, row, unit), unit);
  return dense_of<2>(load_unit<2>(w, row, unit), unit);
}

// Row i of y is row ids[i] of the weight, or NaN where there is no such row.
KERNEL __launch_bounds__(256)
    affine_embedding(const void* __restrict__ ids, int ids_are_64_bits, i64 weight_rows,
                     const u32* __restrict__ packed, i64 packed_stride,
                     const void* __restrict__ scales, const void* __restrict__ biases,
                     i64 scale_stride, int scale_type, int group_shift,
                     void* __restrict__ y, i64 rows, int columns) {
  const Weight w = {packed, packed_stride, scales, biases, scale_stride, group_shift};
  const int unit = blockIdx.x * blockDim.x + threadIdx.x;
  if (unit >= columns / UNIT) return;
  const i64 row_bytes = (i64)columns * size_of(X);
  for (i64 row = (i64)blockIdx.y * blockDim.y + threadIdx.y; row < rows;
       row += (i64)gridDim.y * blockDim.y) {
    const i64 id = ids_are_64_bits ? ((const i64*)ids)[row] : ((const int*)ids)[row];
    Dense dense = {{0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu}};
    if ((u64)id < (u64)weight_rows) dense = dense_at(w, id, unit, scale_type);
    ((Dense*)((char*)y + row * row_bytes))[unit] = dense;
  }
}

// ---- weights to codes -----------------------------------------------------------
//
// As `mx.quantize` makes them on a CPU: in float32, with the true minimum and maximum,
// exact divisions, and halves rounded to even. The weight is one stream of groups,
// whatever its shape. A thread takes 8 neighbours, whose codes are BITS bytes.

#if X != FLOAT64

constexpr int EIGHT = 8;

struct Range {
  float low, high;
};

DEVICE bool is_finite(float value) {
  return (as_bits(value) & 0x7f800000u) != 0x7f800000u;
}

// Of the group. A weight that is not finite makes the largest infinite, and with it the
// scale, where the host sees it.
DEVICE Range range_of(const float* values, int lanes) {
  Range range = {as_float(0x7f800000u), as_float(0xff800000u)};
#pragma unroll
  for (int i = 0; i < EIGHT; i++) {
    const bool finite = is_finite(values[i]);
    range.low = fminf(range.low, finite ? values[i] : 0.0f);
    range.high = fmaxf(range.high, finite ? values[i] : as_float(0x7f800000u));
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    range.low = fminf(range.low, shuffle_xor(range.low, step));
    range.high = fmaxf(range.high, shuffle_xor(range.high, step));
  }
  return range;
}

// `low` with the sign of the first weight that equals it: zeros have two.
DEVICE float first_of(const float* values, float low, int lane, int lanes) {
  u32 first = ~0u;  // twice its place, and its sign
#pragma unroll
  for (int i = 0; i < EIGHT; i++) {
    if (values[i] == low) {
      const u32 place = (lane * EIGHT + i) * 2 + (as_bits(values[i]) >> 31);
      first = first < place ? first : place;
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    const u32 other = shuffle_bits(first, step);
    first = first < other ? first : other;
  }
  return first & 1 ? -fabsf(low) : fabsf(low);
}

struct Affine {
  float scale, bias;
};

DEVICE Affine scale_and_bias(const float* values, int lane, int lanes) {
  const Range range = range_of(values, lanes);
  const float span = over(minus(range.high, range.low), (float)MASK);
  float scale = fmaxf(span, 1e-7f);
  if constexpr (BITS == FLOAT16) return {scale, first_of(values, range.low, lane, lanes)};
  // The end further from zero is met exactly, and zero too, if it is within reach.
  const bool from_low = fabsf(range.low) > fabsf(range.high);
  scale = from_low ? scale : -scale;
  const float edge = from_low ? range.low : range.high;
  const float steps = rintf(over(edge, scale));
  if (steps == 0.0f) return {scale, 0.0f};
  return {over(edge, steps), edge};
}

DEVICE u32 code_of(float value, const Affine& affine) {
  const float code = rintf(over(minus(value, affine.bias), affine.scale));
  return code > 0.0f ? (u32)fminf(code, (float)MASK) : 0u;  // NaN: 0
}

DEVICE void put_codes(u8* target, u64 codes) {
  if constexpr (BITS == 8) {
    *(u64*)target = codes;
  } else if constexpr (BITS == 4) {
    *(u32*)target = (u32)codes;
  } else if constexpr (BITS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 2; i++) ((u16*)target)[i] = (u16)(codes >> (16 * i));
  } else {
#pragma unroll
    for (int i = 0; i < BITS; i++) target[i] = (u8)(codes >> (8 * i));
  }
}

KERNEL __launch_bounds__(256)
    affine_quantize(const void* __restrict__ w, u8* __restrict__ packed,
                    void* __restrict__ scales, void* __restrict__ biases, i64 groups,
                    int group_shift) {
  const int lanes = (1 << group_shift) / EIGHT;
  const i64 eight = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const i64 group = eight * EIGHT >> group_shift;
  const bool exists = group < groups;  // if not, it only helps others of its warp
  float values[EIGHT];
#pragma unroll
  for (int i = 0; i < EIGHT; i++) {
    values[i] = exists ? value_of<X>(bits_at<X>(w, eight * EIGHT + i)) : 0.0f;
  }
  const int lane = (int)(eight & (lanes - 1));
  const Affine affine = scale_and_bias(values, lane, lanes);
  if (!exists) return;
  u64 codes = 0;
#pragma unroll
  for (int i = 0; i < EIGHT; i++) {
    codes |= (u64)code_of(values[i], affine) << (i * BITS);
  }
  put_codes(packed + eight * BITS, codes);
  if (lane == 0) {
    ((Stored<X>::type*)scales)[group] = narrow<X>(affine.scale);
    ((Stored<X>::type*)biases)[group] = narrow<X>(affine.bias);
  }
}

#endif
