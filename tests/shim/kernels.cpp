// The CUDA kernels' source, compiled for the CPU, behind functions that ctypes can call. They return null or an error.
#include "../../csrc/cuda/contrastive.cu"

#include <string>

namespace {

template <class Call>
const char* error_of(const Call& call) {
  static std::string message;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

void configure(unsigned seed, bool barriers, bool wait_for_copies, int shared_bytes) {
  seer::shim::state = {std::mt19937(seed), barriers, wait_for_copies, shared_bytes, 0};
}

int64_t copied_bytes() { return seer::shim::state.copied_bytes; }

#define SEER_SHIM_EXPORT(T, suffix)                                                                                \
  const char* contrastive_rows_##suffix(const seer::RowBlock<T>* block) {                                          \
    return error_of([=] { seer::cuda::contrastive_rows(*block, 0, 0); });                                          \
  }                                                                                                                \
  const char* project_rows_##suffix(T* gradient, const T* x, const T* inverse_norm, int64_t rows, int64_t D) {     \
    return error_of([=] { seer::cuda::project_rows(gradient, x, inverse_norm, rows, D, 0, 0); });                  \
  }

SEER_SHIM_EXPORT(float, f32)
SEER_SHIM_EXPORT(double, f64)
}
