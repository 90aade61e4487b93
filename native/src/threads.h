// Running a task on several threads. See threads.cpp for who provides them.
#pragma once
#include <atomic>
#include <cstdint>

namespace wkv {

// Called once on each of `threads` threads, at the same time, with its number.
using Task = void (*)(void* context, int thread, int threads);

// Runs `task` on up to `threads` threads and returns when all have finished. The task is told how many there are.
void parallel(int threads, Task task, void* context);

template <class F>
void parallel(int threads, F&& function) {
  parallel(
      threads, [](void* f, int thread, int count) { (*static_cast<F*>(f))(thread, count); }, &function);
}

// Hands out 0 .. items - 1 one by one (or `step` at a time) to the threads that ask: whoever is free takes the next.
template <class F>
void parallel_for(int threads, int64_t items, F&& function, int64_t step = 1) {
  if (items <= 0) return;
  const int64_t shares = (items + step - 1) / step;
  if (shares < threads) threads = static_cast<int>(shares);
  if (threads <= 1) {
    for (int64_t i = 0; i < items; ++i) function(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int, int) {
    for (;;) {
      const int64_t begin = next.fetch_add(step, std::memory_order_relaxed);
      if (begin >= items) return;
      const int64_t end = begin + step < items ? begin + step : items;
      for (int64_t i = begin; i < end; ++i) function(i);
    }
  });
}

// A short wait inside a spin loop; after a while it gives the processor away, so that more threads than cores still run.
class Spinner {
 public:
  void wait();

 private:
  int turns_ = 0;
};

// All threads of a task meet here. One object per task; `threads` is the count the task was told.
class Barrier {
 public:
  void meet(int threads) {
    if (threads == 1) return;
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    Spinner spinner;
    while (round_.load(std::memory_order_acquire) == round) spinner.wait();
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace wkv
