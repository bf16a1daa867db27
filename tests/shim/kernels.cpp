// The CUDA kernels' source, compiled for the CPU, behind functions that ctypes can call. They return null or an error.
#include "../../csrc/cuda/contrastive.cu"
#include "../../csrc/cuda/fused.cu"
#include "../../csrc/cuda/sinkhorn.cu"

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

void configure(unsigned seed, const bool* works, int missing_barrier, int shared_bytes) {
  seer::shim::State& state = seer::shim::state = {};
  state.random.seed(seed);
  state.barriers = works[0];
  state.wait_for_copies = works[1];
  state.releases = works[2];
  state.acquires = works[3];
  state.zeros = works[4];
  state.atomics = works[5];
  state.missing_barrier = missing_barrier;
  state.shared_bytes = shared_bytes;
}

int64_t copied_bytes() { return seer::shim::state.copied_bytes; }
int64_t launches() { return seer::shim::state.launches; }

const char* fused_scratch(int64_t P, int64_t N, int64_t M, int64_t D, bool self_contrast, int64_t* result) {
  return error_of([=] { *result = seer::cuda::fused_scratch(P, N, M, D, self_contrast); });
}

#define SEER_SHIM_EXPORT(T, suffix)                                                                                \
  const char* contrastive_rows_##suffix(const seer::RowBlock<T>* block) {                                          \
    return error_of([=] { seer::cuda::contrastive_rows(*block, 0, 0); });                                          \
  }                                                                                                                \
  const char* project_rows_##suffix(T* gradient, const T* x, const T* inverse_norm, int64_t rows, int64_t D) {     \
    return error_of([=] { seer::cuda::project_rows(gradient, x, inverse_norm, rows, D, 0, 0); });                  \
  }                                                                                                                \
  const char* fused_loss_##suffix(const seer::FusedLoss<T>* loss) {                                                \
    return error_of([=] { seer::cuda::fused_loss(*loss, 0, 0); });                                                 \
  }                                                                                                                \
  const char* fused_gradients_##suffix(const seer::FusedGradients<T>* gradients) {                                 \
    return error_of([=] { seer::cuda::fused_gradients(*gradients, 0, 0); });                                       \
  }                                                                                                                \
  const char* sinkhorn_scratch_##suffix(const seer::Transport<T>* transport, bool gradient, int64_t* result) {     \
    return error_of([=] { *result = seer::cuda::sinkhorn_scratch(*transport, gradient, 0); });                     \
  }                                                                                                                \
  const char* sinkhorn_solve_##suffix(const seer::Transport<T>* transport, const seer::Stopping* stopping,         \
                                      const seer::Potentials<T>* results, std::uintptr_t scratch) {                \
    return error_of([=] { seer::cuda::sinkhorn_solve(*transport, *stopping, *results, scratch, 0, 0); });          \
  }                                                                                                                \
  const char* sinkhorn_gradient_##suffix(const seer::Transport<T>* transport, const seer::Potentials<T>* at,       \
                                         const seer::TransportGradient<T>* gradient, std::uintptr_t scratch) {     \
    return error_of([=] { seer::cuda::sinkhorn_gradient(*transport, *at, *gradient, scratch, 0, 0); });            \
  }

SEER_SHIM_EXPORT(float, f32)
SEER_SHIM_EXPORT(double, f64)
}
