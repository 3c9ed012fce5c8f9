// The threads behind parallel_for, made for processors that are shared with others.
//
// A call is cut into more pieces than there are threads, large ones first, and whoever is free takes the next one,
// the caller included. A thread that the system has put aside holds up nothing but the piece it had begun; one that never
// came is not waited for at all. Nobody spins for long: a waiting caller soon sleeps, which leaves its processor
// to the very thread it waits for, and idle threads sleep when the next call does not follow soon.
//
// A piece is taken by adding one to `ticket_`, which holds the pieces taken beside the number there are: a taken
// piece that exists keeps its call open until it is reported in `left_`, so what describes the call stands still.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace {

using Clock = std::chrono::steady_clock;
using Body = std::function<void(int64_t, int64_t)>;

constexpr auto IDLE_SPIN = std::chrono::microseconds(100);  // a helper, for the next call of the same pass
constexpr auto WAIT_SPIN = std::chrono::microseconds(100);  // a caller, for pieces that others have begun

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// The system's number of the calling thread; 0 where it has none.
int64_t thread_number() {
#if defined(__linux__)
  return syscall(SYS_gettid);
#else
  return 0;
#endif
}

// Until ready(value of word): awake for a while, then asleep.
template <class Ready>
void await(const std::atomic<uint32_t>& word, Clock::duration awake, Ready ready) {
  const auto until = Clock::now() + awake;
  do {
    for (int i = 0; i < 32; i++) {
      if (ready(word.load(std::memory_order_acquire))) return;
      relax();
    }
  } while (Clock::now() < until);
  for (uint32_t seen; !ready(seen = word.load(std::memory_order_acquire));) word.wait(seen, std::memory_order_acquire);
}

thread_local bool inside = false;  // a piece runs on this thread: calls within it are serial

class Pool {
 public:
  // One call at a time; a caller that finds the pool busy works alone.
  void run(int64_t n, int64_t grain, int threads, const Body& body) {
    const std::unique_lock<std::mutex> turn(busy_, std::try_to_lock);
    if (!turn) return body(0, n);
    for (; helpers_ < threads - 1; helpers_++) std::thread([this] { help(); }).detach();
    const auto begin = Clock::now();
    body_ = &body;
    const uint32_t pieces = cut(n, grain, threads);
    error_ = nullptr;
    left_.store(pieces, std::memory_order_relaxed);
    ticket_.store(static_cast<uint64_t>(pieces) << 32, std::memory_order_release);
    bell_.fetch_add(1, std::memory_order_release);
    bell_.notify_all();
    take_pieces();
    const auto done = Clock::now();
    await(left_, WAIT_SPIN, [](uint32_t left) { return left == 0; });
    const auto end = Clock::now();
    calls_.fetch_add(1, std::memory_order_relaxed);
    working_.fetch_add((end - begin).count(), std::memory_order_relaxed);
    waiting_.fetch_add((end - done).count(), std::memory_order_relaxed);
    if (error_) std::rethrow_exception(error_);
  }

  PoolTimes times() const { return {calls_, working_, waiting_}; }

  std::vector<int64_t> helpers() {
    const std::lock_guard<std::mutex> lock(names_lock_);
    return names_;
  }

 private:
  void help() {
    {
      const std::lock_guard<std::mutex> lock(names_lock_);
      names_.push_back(thread_number());
    }
    for (;;) {
      const uint32_t heard = bell_.load(std::memory_order_acquire);
      take_pieces();
      await(bell_, IDLE_SPIN, [heard](uint32_t bell) { return bell != heard; });
    }
  }

  // One piece a thread, together half of what is left; then of the rest likewise. Threads that keep pace end
  // together, and the last pieces are small. Returns how many.
  uint32_t cut(int64_t n, int64_t grain, int threads) {
    bounds_.assign(1, 0);
    while (bounds_.back() < n) {
      const int64_t size = std::max(grain, (n - bounds_.back() + 2 * threads - 1) / (2 * threads));
      for (int t = 0; t < threads && bounds_.back() < n; t++) bounds_.push_back(std::min(n, bounds_.back() + size));
    }
    return static_cast<uint32_t>(bounds_.size() - 1);
  }

  void take_pieces() {
    inside = true;
    for (;;) {
      const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
      const int64_t piece = ticket & 0xffffffffu, pieces = ticket >> 32;
      if (piece >= pieces) break;
      try {
        (*body_)(bounds_[piece], bounds_[piece + 1]);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_lock_);
        error_ = std::current_exception();
      }
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
    }
    inside = false;
  }

  std::mutex busy_, error_lock_, names_lock_;
  std::vector<int64_t> names_;  // of the helpers
  int helpers_ = 0;  // made so far; they live as long as the process
  const Body* body_ = nullptr;
  std::vector<int64_t> bounds_;  // of the open call's pieces
  std::exception_ptr error_;
  alignas(64) std::atomic<uint64_t> ticket_{0};  // pieces of the open call << 32 | pieces taken, or more
  alignas(64) std::atomic<uint32_t> bell_{0};    // calls made
  alignas(64) std::atomic<uint32_t> left_{0};    // pieces not yet reported
  alignas(64) std::atomic<int64_t> calls_{0};
  std::atomic<int64_t> working_{0}, waiting_{0};
};

// Never destroyed: its threads outlive whatever runs at exit.
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const int threads = n <= grain || inside ? 1 : thread_count();
  if (threads == 1)
    body(0, n);
  else
    pool().run(n, grain, threads, body);
}

PoolTimes pool_times() { return pool().times(); }
std::vector<int64_t> pool_threads() { return pool().helpers(); }
