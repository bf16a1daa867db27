// The primitives of csrc/cuda/device.h on a CPU, to run the kernels' own source where there is no GPU.
//
// The threads of a block are fibers. They change places where warps and blocks meet, in shuffles and barriers, by a
// schedule drawn at random for each block: one warp runs as far ahead of the others as it can, another comes last, and
// the lanes of a warp arrive in any order. What a missing barrier lets happen then does happen. Shared memory starts as
// NaN. Misaligned accesses, lanes that meet in different shuffles, writes and copies past shared memory and threads that
// wait for ever are errors.
//
// Blocks start in any order. A few are on the GPU at a time and change places at random where they draw tickets or meet
// barriers; the others wait until one has ended, so a block that waits for a later one waits for ever. What a thread
// publishes stays with it until its own fence; without one it reaches memory when all blocks have ended. To a thread
// that has not fenced since, itself or before a barrier of its block, what another block has published reads as NaN.
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
#include <type_traits>
#include <unordered_map>
#include <vector>

#define SEER_KERNEL(blocks_per_multiprocessor) void
#define SEER_KERNEL_OF(most_threads) void
#define SEER_SHARED(type, name, count) type* const name = ::seer::shim::block->shared<type>(count, [] {})

namespace seer::shim {

using cuda::kMaxThreads;
using cuda::kWarp;

struct State {
  std::mt19937 random;
  bool barriers = true;         // false: barrier() does nothing, to see that the tests notice
  bool wait_for_copies = true;  // false: wait_for_copies() does nothing, likewise
  bool releases = true;         // false: fence() leaves what is published with the thread
  bool acquires = true;         // false: fence() makes nothing of other blocks visible
  bool zeros = true;            // false: queue_zeros() does nothing
  bool atomics = true;          // false: draw_ticket() reads and writes in two steps
  int missing_barrier = 0;      // which of a thread's barriers, counted from 1, does nothing
  int shared_bytes = 0;         // what a block may use
  int64_t copied_bytes = 0;     // asked of copy_async() so far
  int64_t launches = 0;
};
inline State state;

inline int draw(int count) { return int(state.random() % unsigned(count)); }

constexpr int kResident = 3;  // blocks on the GPU at a time

// The memory of a fiber's stack, kept from block to block.
constexpr size_t kStackBytes = 64 << 10;
inline char* stack(int slot, int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks(kResident * kMaxThreads);
  auto& memory = stacks[slot * kMaxThreads + thread];
  if (!memory) memory = std::make_unique<char[]>(kStackBytes);
  return memory.get();
}

// Something published.
struct Store {
  void* address;
  uint64_t bits;
  size_t bytes;

  void write() const { std::memcpy(address, &bits, bytes); }
};

// What the blocks of a launch have published.
struct Published {
  struct Place {
    uint64_t when;
    unsigned block;
  };
  std::unordered_map<const void*, Place> places;  // of all that has been fenced
  std::vector<Store> late;                        // by threads that ended without a fence
  uint64_t now = 0;                               // counts the fences
};
inline Published published;

class Block;
inline Block* block = nullptr;  // the one that runs

class Block {
 public:
  const unsigned index;
  const int slot;  // among those on the GPU
  const int teams, team_threads;

  Block(unsigned index, int slot, int teams, int team_threads, int shared_bytes, std::function<void()> body)
      : index(index),
        slot(slot),
        teams(teams),
        team_threads(team_threads),
        body_(std::move(body)),
        fibers_(teams * team_threads),
        warps_(fibers_.size() / kWarp),
        live_(int(fibers_.size())),
        leader_(draw(int(warps_.size()))),
        laggard_(draw(int(warps_.size()))) {
    dynamic_ = allocate(nullptr, shared_bytes);
    for (size_t t = 0; t < fibers_.size(); ++t) prepare(fibers_[t].context, stack(slot, int(t)));
    running_ = pick();
  }

  // Runs until the block pauses or ends; whether it has ended.
  bool run() {
    block = this;
    swapcontext(&outside_, &fibers_[running_].context);
    block = nullptr;
    if (error_) std::rethrow_exception(error_);
    if (live_ > 0) return false;
    for (const Region& region : regions_) {
      for (int i = 0; i < kGuard; ++i) {
        if (region.memory[region.bytes + i] != kFill) throw std::runtime_error("shared memory was written past its end");
      }
    }
    return true;
  }

  // Lets other blocks run, in one of `odds` cases.
  void pause(int odds) {
    if (draw(odds) == 0) swapcontext(&fibers_[running_].context, &outside_);
  }

  void publish(Store store) { fibers_[running_].stores.push_back(store); }

  // The bits at `address`, as the running thread sees them.
  uint64_t read_published(const void* address, size_t bytes) const {
    const Fiber& fiber = fibers_[running_];
    for (auto store = fiber.stores.rbegin(); store != fiber.stores.rend(); ++store) {
      if (store->address == address) return store->bits;
    }
    const auto found = published.places.find(address);
    if (found != published.places.end() && found->second.block != index && found->second.when > fiber.acquired) {
      return ~uint64_t(0);
    }
    uint64_t bits = 0;
    std::memcpy(&bits, address, bytes);
    return bits;
  }

  void fence() {
    Fiber& fiber = fibers_[running_];
    ++published.now;
    if (state.releases) {
      for (const Store& store : fiber.stores) {
        store.write();
        published.places[store.address] = {published.now, index};
      }
      fiber.stores.clear();
    }
    if (state.acquires) fiber.acquired = published.now;
  }

  int thread() const { return running_; }

  // Whether any thread came with `flag`.
  bool barrier(bool flag) {
    pause(64);
    if (!state.barriers || ++fibers_[running_].barriers == state.missing_barrier) return flag;
    ++at_barrier_;
    coming_ |= flag;
    wait(Waiting::kBarrier);
    return came_;
  }

  int lane() const { return running_ % kWarp; }

  // Gives `value`, and takes what the lane `from` gives. Lanes that meet must do so with the same `mask`.
  uint64_t shuffle(uint64_t value, int from, int mask, size_t bytes) {
    Warp& warp = warps_[running_ / kWarp];
    const int lane = this->lane();
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
    return warp.taken[from];
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
    std::vector<Store> stores;  // published, and not fenced yet
    int barriers = 0;           // seen so far
    uint64_t acquired = 0;      // what other blocks fenced until then is visible
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
      auto& stores = fibers_[running_].stores;
      published.late.insert(published.late.end(), stores.begin(), stores.end());
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
    came_ = coming_;
    coming_ = false;
    uint64_t acquired = 0;
    for (const Fiber& fiber : fibers_) acquired = std::max(acquired, fiber.acquired);
    for (size_t t = 0; t < fibers_.size(); ++t) {
      if (fibers_[t].waiting != Waiting::kBarrier) continue;
      fibers_[t].waiting = Waiting::kNothing;
      fibers_[t].acquired = acquired;
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
  bool coming_ = false, came_ = false;  // flags of the threads at the barrier, and of those at the last one
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

inline void barrier() { shim::block->barrier(false); }
inline bool barrier_any(bool flag) { return shim::block->barrier(flag); }

template <class T>
inline T shuffle(T value, int from, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shim::block->shuffle(bits, from, mask, sizeof(T));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
inline T shuffle_xor(T value, int mask) {
  return shuffle(value, shim::block->lane() ^ mask, mask);
}

template <class T>
inline T shuffle_from(T value, int from) {
  return shuffle(value, from, 0);
}

inline int recomputed(int value) { return value; }

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

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline float widen(Half value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof(half));
  return float(half);
}

template <class F, class T>
inline F narrowed(T value) {
  if constexpr (std::is_same_v<F, Bfloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to the nearest, ties to even
  } else if constexpr (std::is_same_v<F, Half>) {
    const _Float16 half = _Float16(value);
    Half narrow;
    std::memcpy(&narrow, &half, sizeof(half));
    return narrow;
  } else {
    return value;
  }
}

template <class T>
inline void publish(T* address, T value) {
  shim::check_aligned<T>(address);
  shim::Store store{address, 0, sizeof(T)};
  std::memcpy(&store.bits, &value, sizeof(T));
  shim::block->publish(store);
}

template <class T>
inline T read_published(const T* address) {
  shim::check_aligned<T>(address);
  const uint64_t bits = shim::block->read_published(address, sizeof(T));
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void fence() { shim::block->fence(); }

inline int draw_ticket(int* ticket) {
  shim::block->pause(2);
  const int drawn = *ticket;
  if (!shim::state.atomics) shim::block->pause(1);
  *ticket = drawn + 1;
  shim::block->pause(2);
  return drawn;
}

inline void queue_zeros(const char*, Place, void* memory, int64_t bytes) {
  if (shim::state.zeros) std::memset(memory, 0, size_t(bytes));
}

inline int shared_memory_of_half_a_multiprocessor(const char*, Place) { return shim::state.shared_bytes; }

inline int most_shared_memory(const char*, Place) { return shim::state.shared_bytes; }
inline int multiprocessors(const char*, Place) { return shim::kResident - 1; }

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), Place, int64_t blocks, int teams, int threads, int shared_bytes,
            const Arguments&... arguments) {
  if (blocks <= 0 || teams <= 0 || threads <= 0 || threads % kWarp || teams * threads > kMaxThreads) {
    throw std::runtime_error("impossible launch: " + std::to_string(blocks) + " blocks of " + std::to_string(teams) +
                             " x " + std::to_string(threads) + " threads");
  }
  ++shim::state.launches;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), shim::state.random);
  shim::published = {};
  std::unique_ptr<shim::Block> resident[shim::kResident];
  for (size_t next = 0, ended = 0; ended < order.size();) {
    const int slot = shim::draw(shim::kResident);
    if (!resident[slot]) {
      if (next == order.size()) continue;
      resident[slot] = std::make_unique<shim::Block>(order[next++], slot, teams, threads, shared_bytes,
                                                     [&] { kernel(arguments...); });
    }
    if (resident[slot]->run()) {
      resident[slot].reset();
      ++ended;
    }
  }
  for (const shim::Store& store : shim::published.late) store.write();
}

}  // namespace seer::cuda
