// Kernels that on_cuda.py runs on the CPU emulator and on an NVIDIA GPU, to compare all
// bits. They use only what IEEE 754 or integers define exactly: no exp, log or sin.
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

// ------------------------------------------------------------- positions and arguments
kernel void positions(device uint* out, uint3 at [[thread_position_in_grid]],
                      uint3 group [[threadgroup_position_in_grid]],
                      ushort3 inside [[thread_position_in_threadgroup]],
                      uint3 threads [[threads_per_grid]],
                      uint3 size [[threads_per_threadgroup]],
                      uint3 full [[dispatch_threads_per_threadgroup]],
                      uint3 groups [[threadgroups_per_grid]],
                      uint index [[thread_index_in_threadgroup]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]],
                      uint quadgroup [[quadgroup_index_in_threadgroup]]) {
  device uint* row = out + 12 * (at.x + threads.x * (at.y + threads.y * at.z));
  row[0] = group.x + 100 * group.y + 10000 * group.z;
  row[1] = inside.x + 100u * inside.y + 10000u * inside.z;
  row[2] = size.x + 100 * size.y + 10000 * size.z;
  row[3] = full.x + 100 * full.y + 10000 * full.z;
  row[4] = groups.x + 100 * groups.y + 10000 * groups.z;
  row[5] = index;
  row[6] = simdgroup;
  row[7] = lane;
  row[8] = simdgroups;
  row[9] = quadgroup;
  row[10] = at.z;
  row[11] = 7;
}

struct Shape {
  int rows, columns;
};
kernel void arguments(device float* out, constant long& whole, constant float& real,
                      constant Shape& shape, constant short* shorts,
                      constant half& small, constant bfloat& brain, constant uchar& byte,
                      uint i [[thread_position_in_grid]]) {
  float const values[] = {float(whole),     real,         float(shape.rows),
                          float(shorts[0]), float(small), float(brain),
                          float(byte),      float(shape.columns * shorts[1])};
  if (i < 8) out[i] = values[i];
}

constant constexpr float TABLE[4] = {0.5f, -2.0f, 3.25f, 1e-3f};
template <typename T, int N>
kernel void scaled(device const T* x, device T* out, uint i [[thread_position_in_grid]]) {
  T sum = T(0);
  for (int k = 0; k < N; ++k) sum += T(TABLE[(i + k) % 4]) * x[i];
  out[i] = sum;
}
template [[host_name("scaled<half, 3>")]] [[kernel]]
decltype(scaled<half, 3>) scaled<half, 3>;
template [[host_name("scaled<float, 4>")]] [[kernel]]
decltype(scaled<float, 4>) scaled<float, 4>;

// ------------------------------------------------------------------ threadgroup memory
kernel void transposed(device const float* x, device float* out, constant int2& size,
                       uint2 at [[thread_position_in_grid]],
                       uint2 group [[threadgroup_position_in_grid]],
                       uint2 inside [[thread_position_in_threadgroup]]) {
  threadgroup float tile[16][17];
  int const rows = size.y, columns = size.x;
  if (int(at.x) < columns && int(at.y) < rows)
    tile[inside.y][inside.x] = x[int(at.y) * columns + int(at.x)];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int const column = int(group.y * 16 + inside.x), row = int(group.x * 16 + inside.y);
  if (column < rows && row < columns) out[row * rows + column] = tile[inside.x][inside.y];
}

kernel void tree(device const float* x, device float* out,
                 uint i [[thread_position_in_threadgroup]],
                 uint group [[threadgroup_position_in_grid]],
                 uint at [[thread_position_in_grid]],
                 uint n [[threads_per_threadgroup]]) {
  threadgroup float sums[1024];
  sums[i] = x[at];
  for (uint width = n; width > 1; width = (width + 1) / 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float const other = i + (width + 1) / 2 < width ? sums[i + (width + 1) / 2] : 0.0f;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i < width / 2) sums[i] += other;
  }
  if (i == 0) out[group] = sums[0];
}

template <typename T>
kernel void product(device const T* a, device const T* b, device T* out,
                    constant int3& size, uint2 at [[thread_position_in_grid]],
                    uint2 inside [[thread_position_in_threadgroup]]) {
  threadgroup T left[8][8], right[8][8];
  int const m = size.x, n = size.y, k = size.z, row = int(at.y), column = int(at.x);
  float sum = 0.0f;
  for (int start = 0; start < k; start += 8) {
    int const x = start + int(inside.x), y = start + int(inside.y);
    left[inside.y][inside.x] = row < m && x < k ? a[row * k + x] : T(0);
    right[inside.y][inside.x] = y < k && column < n ? b[y * n + column] : T(0);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = 0; j < 8; ++j)
      sum += float(left[inside.y][j]) * float(right[j][inside.x]);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (row < m && column < n) out[row * n + column] = T(sum);
}
template [[host_name("product_float")]] [[kernel]] decltype(product<float>) product<float>;
template [[host_name("product_half")]] [[kernel]] decltype(product<half>) product<half>;
template [[host_name("product_bfloat")]] [[kernel]] decltype(product<bfloat>) product<bfloat>;

// Simdgroups hand partial sums over through threadgroup memory.
kernel void group_sum(device const float* x, device float* out,
                      uint at [[thread_position_in_grid]],
                      uint group [[threadgroup_position_in_grid]],
                      uint simdgroup [[simdgroup_index_in_threadgroup]],
                      uint simdgroups [[simdgroups_per_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float parts[32];
  float sum = simd_sum(x[at]);
  if (lane == 0) parts[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sum = simd_sum(lane < simdgroups ? parts[lane] : 0.0f);
  if (simdgroup == 0 && lane == 0) out[group] = sum;
}

// --------------------------------------------------------------------------- simdgroups
template <typename T>
kernel void reductions(device const T* x, device T* out, uint n [[threads_per_grid]],
                       uint i [[thread_position_in_grid]]) {
  T const v = x[i];
  out[i] = simd_sum(v);
  out[n + i] = simd_max(v);
  out[2 * n + i] = simd_min(v);
  out[3 * n + i] = quad_sum(v);
  out[4 * n + i] = quad_max(v);
  out[5 * n + i] = simd_prefix_inclusive_sum(v);
  out[6 * n + i] = simd_prefix_exclusive_sum(v);
  out[7 * n + i] = simd_product(T(1) + v / T(64));
  out[8 * n + i] = simd_prefix_inclusive_product(T(1) + v / T(64));
}
#define REDUCTIONS(T)                                             \
  template [[host_name("reductions_" #T)]] [[kernel]] decltype( \
      reductions<T>) reductions<T>;
REDUCTIONS(float)
REDUCTIONS(half)
REDUCTIONS(bfloat)
REDUCTIONS(int)

kernel void bits(device const uint* x, device uint* out, uint n [[threads_per_grid]],
                 uint i [[thread_position_in_grid]]) {
  uint const v = x[i];
  out[i] = simd_and(v | 0x0f0f0000u);
  out[n + i] = simd_or(v & 0xf0u);
  out[2 * n + i] = simd_xor(v);
  out[3 * n + i] = uint(simd_vote::vote_t(simd_ballot(v & 1)));
  out[4 * n + i] = simd_any((v & 7) == 0) + 2 * simd_all(v != 0) + 4 * simd_is_first();
  out[5 * n + i] = uint(simd_vote::vote_t(simd_active_threads_mask()));
  out[6 * n + i] = quad_xor(v) + quad_and(v);
}

template <typename T>
kernel void shuffles(device const T* x, device T* out, uint n [[threads_per_grid]],
                     uint i [[thread_position_in_grid]],
                     ushort lane [[thread_index_in_simdgroup]]) {
  T const v = x[i], other = x[n - 1 - i];
  out[i] = simd_shuffle(v, ushort(lane * 7 + 3));
  out[n + i] = simd_shuffle_xor(v, 5);
  out[2 * n + i] = simd_shuffle_down(v, 3);
  out[3 * n + i] = simd_shuffle_up(v, 9);
  out[4 * n + i] = simd_shuffle_rotate_down(v, 11);
  out[5 * n + i] = simd_shuffle_rotate_up(v, 2);
  out[6 * n + i] = simd_shuffle_and_fill_down(v, other, 4);
  out[7 * n + i] = simd_shuffle_and_fill_up(v, other, 6, 8);
  out[8 * n + i] = simd_broadcast(v, 17);
  out[9 * n + i] = simd_broadcast_first(v);
  out[10 * n + i] = quad_shuffle(v, ushort((lane + 1) % 4));
  out[11 * n + i] = quad_shuffle_xor(v, 2) + quad_broadcast(v, 3);
  out[12 * n + i] = quad_shuffle_up(v, 1) + quad_shuffle_down(v, 2);
}
#define SHUFFLES(T)                                             \
  template [[host_name("shuffles_" #T)]] [[kernel]] decltype( \
      shuffles<T>) shuffles<T>;
SHUFFLES(float)
SHUFFLES(half)
SHUFFLES(uchar)
SHUFFLES(long)
SHUFFLES(float3)

// c = a * b + c for 8x8 blocks, a transposed in memory.
template <typename T, typename A>
kernel void matrices(device const T* a, device const T* b, device A* c,
                     constant int& blocks, uint2 group [[threadgroup_position_in_grid]],
                     uint lane [[thread_index_in_simdgroup]]) {
  threadgroup T staged[64];
  ulong const width = 8 * blocks;
  simdgroup_matrix<A, 8, 8> sum = make_filled_simdgroup_matrix<A, 8, 8>(A(0.5f));
  for (int k = 0; k < blocks; ++k) {
    simdgroup_matrix<T, 8, 8> left, right;
    simdgroup_load(left, a, width, ulong2(8 * group.y, 8 * k), true);
    for (int j = 0; j < 2; ++j) {
      uint const at = 2 * lane + j;
      staged[at] = b[(8 * k + at / 8) * width + 8 * group.x + at % 8];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_load(right, staged, 8);
    simdgroup_multiply_accumulate(sum, left, right, sum);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  simdgroup_store(sum, c, width, ulong2(8 * group.x, 8 * group.y));
}
template [[host_name("matrices_float")]] [[kernel]]
decltype(matrices<float, float>) matrices<float, float>;
template [[host_name("matrices_half")]] [[kernel]]
decltype(matrices<half, half>) matrices<half, half>;
template [[host_name("matrices_bfloat")]] [[kernel]]
decltype(matrices<bfloat, float>) matrices<bfloat, float>;

// ---------------------------------------------------------------------------- arithmetic
// A NaN's bits are not defined, so a NaN is written as 0.
template <typename T> T number(T x) { return isnan(x) ? T(0) : x; }

template <typename T>
kernel void arithmetic(device const T* a, device const T* b, device T* out,
                       device float* wide, uint n [[threads_per_grid]],
                       uint i [[thread_position_in_grid]]) {
  T const x = a[i], y = b[i];
  out[i] = number(x + y);
  out[n + i] = number(x - y);
  out[2 * n + i] = number(x * y);
  out[3 * n + i] = number(x / y);
  out[4 * n + i] = number(x * y + x);
  out[5 * n + i] = number(fma(x, y, x));
  out[6 * n + i] = number(sqrt(x));
  out[7 * n + i] = number(rsqrt(x));
  out[8 * n + i] = number(rint(x));
  out[9 * n + i] = number(round(x) + trunc(y));
  out[10 * n + i] = number(floor(x) - ceil(y));
  out[11 * n + i] = number(fmod(x, y));
  out[12 * n + i] = number(ldexp(x, int(i % 31) - 15));
  out[13 * n + i] = number(nextafter(x, y));
  out[14 * n + i] = number(copysign(x, y));
  out[15 * n + i] = number(clamp(x, T(-2), T(3)) + fract(y));
  out[16 * n + i] = number(mix(x, y, T(0.25f)));
  out[17 * n + i] = number(max(x, y) - min(x, y));
  out[18 * n + i] = T((x < y) + 2 * (x == y) + 4 * (x >= T(1)));
  int exponent = 0;
  float const part = frexp(float(x), exponent);
  bool const finite = isfinite(float(x));
  wide[i] = finite ? part * 4096.0f + float(exponent) : 0.0f;
  wide[n + i] = number(float(x));
  wide[2 * n + i] = number(float(x) / 3.0f);
}
#define ARITHMETIC(T)                                             \
  template [[host_name("arithmetic_" #T)]] [[kernel]] decltype( \
      arithmetic<T>) arithmetic<T>;
ARITHMETIC(float)
ARITHMETIC(half)
ARITHMETIC(bfloat)

kernel void conversions(device const float* x, device half* halves, device bfloat* brains,
                        device int* whole, uint i [[thread_position_in_grid]]) {
  float const v = number(x[i]);
  halves[i] = half(v);
  brains[i] = bfloat(v);
  whole[i] = int(clamp(v, -1e9f, 1e9f)) ^ int(uint(clamp(fabs(v), 0.0f, 4e9f)));
}

template <typename T>
kernel void integers(device const T* a, device const T* b, device T* out,
                     uint n [[threads_per_grid]], uint i [[thread_position_in_grid]]) {
  T const x = a[i], y = b[i];
  out[i] = mulhi(x, y);
  out[n + i] = addsat(x, y);
  out[2 * n + i] = subsat(x, y);
  out[3 * n + i] = hadd(x, y);
  out[4 * n + i] = rotate(x, y);
  out[5 * n + i] = popcount(x) + clz(y);
  out[6 * n + i] = reverse_bits(x);
  out[7 * n + i] = extract_bits(x, 3, 4);
  out[8 * n + i] = insert_bits(x, y, 3, 4);
  out[9 * n + i] = y == 0 || y == T(-1) ? T(0) : T(x / y + x % y);
  out[10 * n + i] = madsat(x, y, x);
  out[11 * n + i] = T(absdiff(x, y)) ^ ctz(x);
}
#define INTEGERS(T)                                             \
  template [[host_name("integers_" #T)]] [[kernel]] decltype( \
      integers<T>) integers<T>;
INTEGERS(char)
INTEGERS(ushort)
INTEGERS(int)
INTEGERS(uint)
INTEGERS(long)

kernel void vectors(device const packed_float3* a, device const float4* b,
                    device float4* out, uint n [[threads_per_grid]],
                    uint i [[thread_position_in_grid]]) {
  float3 const x = a[i];
  float4 y = b[i];
  y.xz = y.wy * 2.0f;
  y.yw += x.zx;
  out[i] = y;
  out[n + i] = float4(cross(x, y.xyz), dot(x, y.zyx));
  out[2 * n + i] = float4(normalize(x), length(y));
  out[3 * n + i] = select(y, float4(x, 1.0f), y > 0.25f);
  out[4 * n + i] = float4(reflect(x, y.xyz), any(x < 0.0f) + 2 * all(y > -1.0f));
  out[5 * n + i] = as_type<float4>(as_type<uint4>(y) ^ uint4(1, 2, 3, 4));
  out[6 * n + i] = float4(half4(y) * half4(2.5h) + half4(x.x)) / y[i % 4];
}

// ------------------------------------------------------------------------------- atomics
kernel void atomics(device const uint* x, device atomic_uint* counts,
                    device atomic_int* range, device atomic_float* sum,
                    device atomic_uint* flags, uint i [[thread_position_in_grid]],
                    uint inside [[thread_position_in_threadgroup]]) {
  threadgroup atomic_uint local[4];
  if (inside < 4) atomic_store_explicit(&local[inside], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint const v = x[i];
  atomic_fetch_add_explicit(&local[v % 4], 1u, memory_order_relaxed);
  atomic_fetch_max_explicit(range, int(v >> 1), memory_order_relaxed);
  atomic_fetch_min_explicit(range + 1, -int(v >> 1), memory_order_relaxed);
  // Whole numbers, so that their sum is exact in any order.
  atomic_fetch_add_explicit(sum, float(v % 8), memory_order_relaxed);
  atomic_fetch_xor_explicit(flags, v, memory_order_relaxed);
  atomic_fetch_or_explicit(flags + 1, 1u << (v % 32), memory_order_relaxed);
  atomic_fetch_and_explicit(flags + 2, ~(1u << (v % 32)), memory_order_relaxed);
  uint seen = atomic_load_explicit(flags + 3, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(flags + 3, &seen, seen * 5 + 1,
                                                memory_order_relaxed,
                                                memory_order_relaxed)) {
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (inside < 4) {
    uint const total = atomic_load_explicit(&local[inside], memory_order_relaxed);
    atomic_fetch_add_explicit(counts + inside, total, memory_order_relaxed);
  }
}

// ------------------------------------------------------------------------ packed weights
// A row of 4-bit weights a simdgroup, four rows a threadgroup.
kernel void gemv(device const uint* packed, device const half* scales,
                 device const float* x, device float* y, constant int2& size,
                 uint group [[threadgroup_position_in_grid]],
                 uint simdgroup [[simdgroup_index_in_threadgroup]],
                 uint lane [[thread_index_in_simdgroup]]) {
  int const rows = size.x, words = size.y, row = int(4 * group + simdgroup);
  float sum = 0.0f;
  for (int k = int(lane); k < words && row < rows; k += 32) {
    uint const word = packed[row * words + k];
    float part = 0.0f;
    for (int j = 0; j < 8; ++j)
      part += (float(word >> (4 * j) & 15u) - 8.0f) * x[8 * k + j];
    sum += part * float(scales[row * ((words + 7) / 8) + k / 8]);
  }
  sum = simd_sum(sum);
  if (lane == 0 && row < rows) y[row] = sum;
}
