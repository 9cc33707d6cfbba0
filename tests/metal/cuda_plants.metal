// Bugs that compute-sanitizer must find, each beside its clean twin: BUG is defined or
// not. A line that ends in `// FOUND: name` is one that the report on `name` has to name.
#include <metal_stdlib>
using namespace metal;

kernel void out_of_bounds_write(device const float* a, device float* out,
                                constant int& n, uint i [[thread_position_in_grid]]) {
#ifndef BUG
  if (int(i) < n)
#endif
    out[i] = a[0];  // FOUND: out_of_bounds_write
}

kernel void out_of_bounds_read(device const float* a, device float* out,
                               constant int& n, uint i [[thread_position_in_grid]]) {
#ifndef BUG
  if (int(i) + 1 >= n) return;
#endif
  out[i] = a[i + 1];  // FOUND: out_of_bounds_read
}

// The other simdgroup's values are read before they are surely there.
kernel void missing_barrier(device const float* a, device float* out,
                            uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  shared[i] = a[i];  // FOUND: missing_barrier
#ifndef BUG
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  out[i] = shared[63 - i];  // FOUND: missing_barrier
}

// They are overwritten before they surely have been read.
kernel void missing_barrier_in_loop(device const float* a, device float* out,
                                    constant int& rounds,
                                    uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  float sum = 0.0f;
  for (int round = 0; round < rounds; ++round) {
    shared[i] = a[i] + float(round);  // FOUND: missing_barrier_in_loop
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum += shared[63 - i];  // FOUND: missing_barrier_in_loop
#ifndef BUG
    threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  }
  out[i] = sum;
}

// Half of each simdgroup goes past the barrier. Without the sanitizer this may hang.
kernel void divergent_barrier(device const float* a, device float* out,
                              uint i [[thread_position_in_grid]]) {
  threadgroup float shared[64];
  shared[i] = a[i];
#ifdef BUG
  if (i % 2 == 0)
#endif
    threadgroup_barrier(mem_flags::mem_threadgroup);  // FOUND: divergent_barrier
  out[i] = shared[63 - i];
}
