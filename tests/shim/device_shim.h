// The primitives of csrc/cuda/device.h on a CPU, to run the kernels' own source where there is no GPU.
//
// The threads of a block are fibers. They change places where warps and blocks meet, in shuffles and barriers, by a
// schedule drawn at random for each block: one warp runs as far ahead of the others as it can, another comes last, and
// the lanes of a warp arrive in any order. What a missing barrier lets happen then does happen. Shared memory starts as
// NaN. Misaligned accesses, lanes that meet in different shuffles, writes and copies past shared memory and threads that
// wait for ever are errors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define SEER_KERNEL(blocks_per_multiprocessor) void
#define SEER_SHARED(type, name, count) type* const name = ::seer::shim::block->shared<type>(count, [] {})

namespace seer::shim {

using cuda::kMaxThreads;
using cuda::kWarp;

struct State {
  std::mt19937 random;
  bool barriers = true;         // false: barrier() does nothing, to see that the tests notice
  bool wait_for_copies = true;  // false: wait_for_copies() does nothing, likewise
  int shared_bytes = 0;         // what a block may use
  int64_t copied_bytes = 0;     // asked of copy_async() so far
};
inline State state;

inline int draw(int count) { return int(state.random() % unsigned(count)); }

// The memory of a fiber's stack, kept from block to block.
constexpr size_t kStackBytes = 64 << 10;
inline char* stack(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks(kMaxThreads);
  if (!stacks[thread]) stacks[thread] = std::make_unique<char[]>(kStackBytes);
  return stacks[thread].get();
}

class Block;
inline Block* block = nullptr;  // the one that runs

class Block {
 public:
  const unsigned index;
  const int teams, team_threads;

  Block(unsigned index, int teams, int team_threads, int shared_bytes, std::function<void()> body)
      : index(index),
        teams(teams),
        team_threads(team_threads),
        body_(std::move(body)),
        fibers_(teams * team_threads),
        warps_(fibers_.size() / kWarp),
        live_(int(fibers_.size())),
        leader_(draw(int(warps_.size()))),
        laggard_(draw(int(warps_.size()))) {
    dynamic_ = allocate(nullptr, shared_bytes);
  }

  void run() {
    block = this;
    for (size_t t = 0; t < fibers_.size(); ++t) prepare(fibers_[t].context, stack(int(t)));
    running_ = pick();
    swapcontext(&outside_, &fibers_[running_].context);
    block = nullptr;
    if (error_) std::rethrow_exception(error_);
    for (const Region& region : regions_) {
      for (int i = 0; i < kGuard; ++i) {
        if (region.memory[region.bytes + i] != kFill) throw std::runtime_error("shared memory was written past its end");
      }
    }
  }

  int thread() const { return running_; }

  void barrier() {
    if (!state.barriers) return;
    ++at_barrier_;
    wait(Waiting::kBarrier);
  }

  // Trades `value` with the lane whose index differs in the bits of `mask`.
  uint64_t shuffle(uint64_t value, int mask, size_t bytes) {
    Warp& warp = warps_[running_ / kWarp];
    const int lane = running_ % kWarp;
    if (warp.arrived > 0 && (warp.mask != mask || warp.bytes != bytes)) {
      throw std::runtime_error("lanes of a warp meet in different shuffles");
    }
    warp.mask = mask;
    warp.bytes = bytes;
    warp.given[lane] = value;
    if (++warp.arrived == kWarp) {
      std::copy(warp.given, warp.given + kWarp, warp.taken);
      warp.arrived = 0;
      for (int l = 0; l < kWarp; ++l) fibers_[running_ - lane + l].waiting = Waiting::kNothing;
      warp.ready = ~0u;
      leave();
    } else {
      wait(Waiting::kShuffle);
    }
    return warp.taken[lane ^ mask];
  }

  void copy_later(void* to, const void* from, size_t bytes) {
    const auto* begin = static_cast<unsigned char*>(to);
    const bool inside = std::any_of(regions_.begin(), regions_.end(), [&](const Region& region) {
      return begin >= region.memory.get() && begin + bytes <= region.memory.get() + region.bytes;
    });
    if (!inside) throw std::runtime_error("copy to outside of shared memory");
    fibers_[running_].copies.push_back({to, from, bytes});
    state.copied_bytes += int64_t(bytes);
  }

  void copy_now() {
    if (!state.wait_for_copies) return;
    for (const Copy& copy : fibers_[running_].copies) std::memcpy(copy.to, copy.from, copy.bytes);
    fibers_[running_].copies.clear();
  }

  // Shared memory of the declaration that `Tag`, a type of its own, stands for.
  template <class T, class Tag>
  T* shared(int count, const Tag&) {
    static const char tag = 0;
    for (const Region& region : regions_) {
      if (region.tag == &tag) return reinterpret_cast<T*>(region.memory.get());
    }
    return reinterpret_cast<T*>(allocate(&tag, sizeof(T) * count));
  }

  void* dynamic_shared() const { return dynamic_; }

 private:
  static constexpr int kGuard = 64;
  static constexpr unsigned char kFill = 0xff;  // all bits set are NaN

  enum class Waiting { kNothing, kBarrier, kShuffle, kEnded };
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  struct Fiber {
    ucontext_t context;
    Waiting waiting = Waiting::kNothing;
    std::vector<Copy> copies;
  };
  struct Warp {
    uint32_t ready = ~0u;  // lanes that can run
    int arrived = 0;       // lanes in the shuffle that is under way
    int mask = 0;
    size_t bytes = 0;
    uint64_t given[kWarp], taken[kWarp];
  };
  struct Region {
    const void* tag;
    size_t bytes;
    std::unique_ptr<unsigned char[]> memory;
  };

  void* allocate(const void* tag, size_t bytes) {
    regions_.push_back({tag, bytes, std::make_unique<unsigned char[]>(bytes + kGuard)});
    std::memset(regions_.back().memory.get(), kFill, bytes + kGuard);
    return regions_.back().memory.get();
  }

  void prepare(ucontext_t& context, char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, [] { block->live_through(); }, 0);
  }

  void live_through() {
    try {
      body_();
      --live_;
      suspend(Waiting::kEnded);
      if (live_ > 0) running_ = pick();
    } catch (...) {
      error_ = std::current_exception();
    }
    setcontext(live_ > 0 && !error_ ? &fibers_[running_].context : &outside_);
  }

  void suspend(Waiting what) {
    fibers_[running_].waiting = what;
    warps_[running_ / kWarp].ready &= ~(1u << running_ % kWarp);
    pass_barrier();
  }

  // Lets another thread run, or this one if it is its turn.
  void leave() {
    const int leaving = running_;
    running_ = pick();
    if (running_ != leaving) swapcontext(&fibers_[leaving].context, &fibers_[running_].context);
  }

  void wait(Waiting what) {
    suspend(what);
    leave();
  }

  // Threads that have ended count as arrived, as on a GPU.
  void pass_barrier() {
    if (at_barrier_ == 0 || at_barrier_ < live_) return;
    at_barrier_ = 0;
    for (size_t t = 0; t < fibers_.size(); ++t) {
      if (fibers_[t].waiting != Waiting::kBarrier) continue;
      fibers_[t].waiting = Waiting::kNothing;
      warps_[t / kWarp].ready |= 1u << t % kWarp;
    }
  }

  int pick() {
    constexpr int kPatience = 16;  // of so many draws, one looks past the leader
    int warp = leader_;
    if (!warps_[warp].ready || draw(kPatience) == 0) {
      std::vector<int> ready;
      for (int w = 0; w < int(warps_.size()); ++w) {
        if (warps_[w].ready && w != laggard_) ready.push_back(w);
      }
      warp = ready.empty() ? laggard_ : ready[draw(int(ready.size()))];
    }
    if (!warps_[warp].ready) {
      int at_shuffle = 0;
      for (const Fiber& fiber : fibers_) at_shuffle += fiber.waiting == Waiting::kShuffle;
      throw std::runtime_error("threads wait for ever: " + std::to_string(at_barrier_) + " at a barrier, " +
                               std::to_string(at_shuffle) + " in a shuffle, of " + std::to_string(live_) + " left");
    }
    int lane = draw(kWarp);
    while (!(warps_[warp].ready >> lane & 1u)) lane = (lane + 1) % kWarp;
    return warp * kWarp + lane;
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Region> regions_;
  void* dynamic_ = nullptr;
  ucontext_t outside_;  // whoever called run()
  std::exception_ptr error_;
  int running_ = 0, live_, at_barrier_ = 0;
  const int leader_, laggard_;
};

template <class Pack>
inline void check_aligned(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(Pack)) throw std::runtime_error("misaligned access");
}

}  // namespace seer::shim

namespace seer::cuda {

inline unsigned block_index() { return shim::block->index; }
inline int team_count() { return shim::block->teams; }
inline int team_index() { return shim::block->thread() / shim::block->team_threads; }
inline int team_threads() { return shim::block->team_threads; }
inline int team_thread() { return shim::block->thread() % shim::block->team_threads; }

inline void barrier() { shim::block->barrier(); }

template <class T>
inline T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shim::block->shuffle(bits, mask, sizeof(T));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(shim::block->dynamic_shared());
}

template <class T, int kWidth>
inline void load(const T* array, int index, T (&pack)[kWidth]) {
  const T* from = array + int64_t(index) * kWidth;
  shim::check_aligned<T[kWidth]>(from);
  std::memcpy(pack, from, sizeof(pack));
}

template <class T, int kWidth>
inline void load_constant(const T* array, int index, T (&pack)[kWidth]) {
  load(array, index, pack);
}

template <class T, int kWidth>
inline void store(T* array, int index, const T (&pack)[kWidth]) {
  T* to = array + int64_t(index) * kWidth;
  shim::check_aligned<T[kWidth]>(to);
  std::memcpy(to, pack, sizeof(pack));
}

template <int kWidth, class T>
inline void copy_async(T* shared, const T* array, int index) {
  const int64_t offset = int64_t(index) * kWidth;
  shim::check_aligned<T[kWidth]>(shared + offset);
  shim::check_aligned<T[kWidth]>(array + offset);
  shim::block->copy_later(shared + offset, array + offset, sizeof(T) * kWidth);
}

inline void wait_for_copies() { shim::block->copy_now(); }

inline int shared_memory_of_half_a_multiprocessor(const char*, Place) { return shim::state.shared_bytes; }

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), Place, int64_t blocks, int teams, int threads, int shared_bytes,
            const Arguments&... arguments) {
  if (blocks <= 0 || teams <= 0 || threads <= 0 || threads % kWarp || teams * threads > kMaxThreads) {
    throw std::runtime_error("impossible launch: " + std::to_string(blocks) + " blocks of " + std::to_string(teams) +
                             " x " + std::to_string(threads) + " threads");
  }
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), shim::state.random);
  for (const unsigned index : order) {
    shim::Block(index, teams, threads, shared_bytes, [&] { kernel(arguments...); }).run();
  }
}

}  // namespace seer::cuda
