// Compiles the header named by SEER_KERNELS once for each instruction set, each in a namespace of its own. The caller
// includes its standard headers first, so that no inline function of theirs is compiled for an instruction set that
// the machine may lack. No include guard: one family of kernels, one inclusion.

#include "instruction_set.h"

namespace seer::cpu {

namespace baseline {
constexpr int kVectorBytes = 16;
#include "simd.h"

#include SEER_KERNELS
}  // namespace baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kVectorBytes = 32;
#include "simd.h"

#include SEER_KERNELS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")
#endif
namespace avx512 {
constexpr int kVectorBytes = 64;
#include "simd.h"

#include SEER_KERNELS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define SEER_DISPATCH(call)                  \
  switch (instruction_set()) {               \
    case InstructionSet::kAvx512:            \
      return avx512::call;                   \
    case InstructionSet::kAvx2:              \
      return avx2::call;                     \
    default:                                 \
      return baseline::call;                 \
  }
#else
#define SEER_DISPATCH(call) return baseline::call
#endif

}  // namespace seer::cpu
