// Threads come from the OpenMP runtime that torch already runs on, where there is one (wkv_use_openmp): two pools on
// the same cores would wait for each other. Elsewhere from a small pool of our own, whose threads sleep when idle.
#include "threads.h"

#include "api.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace wkv {
namespace {

// The two functions of GNU's OpenMP runtime that are needed, found by the Python side in torch's own copy of it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpQuery = int (*)();
GompParallel gomp_parallel = nullptr;
OmpQuery omp_thread_num = nullptr;
OmpQuery omp_num_threads = nullptr;

struct Job {
  Task task;
  void* context;
};

void run_in_openmp(void* data) {
  const Job* job = static_cast<const Job*>(data);
  job->task(job->context, omp_thread_num(), omp_num_threads());
}

class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: its threads may outlive static destruction
    return *pool;
  }

  void run(int threads, Task task, void* context) {
    std::unique_lock<std::mutex> only_one(users_, std::try_to_lock);
    if (!only_one.owns_lock()) {  // another Python thread is at work here: run alone rather than wait
      task(context, 0, 1);
      return;
    }
    {
      std::lock_guard<std::mutex> guard(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int number = static_cast<int>(workers_.size()) + 1;
        const uint64_t seen = job_;
        workers_.emplace_back([this, number, seen] { work(number, seen); });
      }
      task_ = task;
      context_ = context;
      threads_ = threads;
      running_ = threads - 1;
      ++job_;
    }
    wake_.notify_all();
    task(context, 0, threads);
    std::unique_lock<std::mutex> guard(mutex_);
    done_.wait(guard, [this] { return running_ == 0; });
  }

 private:
  void work(int number, uint64_t seen) {
    for (;;) {
      Task task;
      void* context;
      int threads;
      {
        std::unique_lock<std::mutex> guard(mutex_);
        wake_.wait(guard, [&] { return job_ != seen; });
        seen = job_;
        if (number >= threads_) continue;
        task = task_;
        context = context_;
        threads = threads_;
      }
      task(context, number, threads);
      std::lock_guard<std::mutex> guard(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex users_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int threads_ = 0, running_ = 0;
  uint64_t job_ = 0;
};

}  // namespace

void parallel(int threads, Task task, void* context) {
  if (threads <= 1) {
    task(context, 0, 1);
  } else if (gomp_parallel != nullptr) {
    Job job{task, context};
    gomp_parallel(run_in_openmp, &job, static_cast<unsigned>(threads), 0);
  } else {
    Pool::instance().run(threads, task, context);
  }
}

void Spinner::wait() {
  if (++turns_ < 4000) {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  } else {
    std::this_thread::yield();
  }
}

}  // namespace wkv

// Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads; three nulls go back to the own pool.
WKV_API void wkv_use_openmp(void* parallel, void* thread_num, void* num_threads) {
  wkv::omp_thread_num = reinterpret_cast<wkv::OmpQuery>(thread_num);
  wkv::omp_num_threads = reinterpret_cast<wkv::OmpQuery>(num_threads);
  wkv::gomp_parallel = reinterpret_cast<wkv::GompParallel>(parallel);
}
