#include "instruction_set.h"

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace seer::cpu {

#if defined(__x86_64__)
namespace {

// The register sets that the operating system keeps for each thread.
unsigned kept_registers() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

}  // namespace

// Asks the processor itself: what compilers offer for this needs a library that Microsoft's linker does not bring.
InstructionSet best_instruction_set() {
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6;  // state components 1 and 2; with 5, 6 and 7
  constexpr unsigned kAvx512f = 1u << 16, kAvx512dq = 1u << 17, kAvx512bw = 1u << 30, kAvx512vl = 1u << 31;
  constexpr unsigned kAvx512All = kAvx512f | kAvx512dq | kAvx512bw | kAvx512vl;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX) || !(c & bit_FMA)) {
    return InstructionSet::kBaseline;
  }
  const unsigned kept = kept_registers();
  if ((kept & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) {
    return InstructionSet::kBaseline;
  }
  return (kept & kZmm) == kZmm && (b & kAvx512All) == kAvx512All ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
}
#else
InstructionSet best_instruction_set() { return InstructionSet::kBaseline; }
#endif

namespace {
std::atomic<InstructionSet> current{best_instruction_set()};
}

InstructionSet instruction_set() { return current.load(std::memory_order_relaxed); }

void limit_instruction_set(InstructionSet limit) {
  current.store(std::min(limit, best_instruction_set()), std::memory_order_relaxed);
}

}  // namespace seer::cpu
