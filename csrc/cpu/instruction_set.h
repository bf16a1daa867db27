// The instruction set that the CPU kernels use: the best that the machine has, or a lesser one that a test asked for.
#pragma once

namespace seer::cpu {

enum class InstructionSet : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

InstructionSet instruction_set();
InstructionSet best_instruction_set();

// Uses `limit` where the machine has more.
void limit_instruction_set(InstructionSet limit);

}  // namespace seer::cpu
