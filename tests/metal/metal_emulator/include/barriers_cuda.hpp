// Barriers as macros, so that they stand in the line of the kernel that asks for them:
// compute-sanitizer names the line of a barrier, not that of a call to it.
#pragma once

namespace msl {
namespace metal {

// For calls that spell out the namespace.
using ::__syncthreads;
using ::__syncwarp;

}  // namespace metal
}  // namespace msl

#define threadgroup_barrier(...) __syncthreads()
#define simdgroup_barrier(...) __syncwarp(msl::lanes::members())
