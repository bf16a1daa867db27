#include "instruction_set.h"

#include <algorithm>
#include <atomic>

namespace seer::cpu {

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

namespace {
std::atomic<InstructionSet> current{best_instruction_set()};
}

InstructionSet instruction_set() { return current.load(std::memory_order_relaxed); }

void limit_instruction_set(InstructionSet limit) {
  current.store(std::min(limit, best_instruction_set()), std::memory_order_relaxed);
}

}  // namespace seer::cpu
