// The read bandwidth of this machine: the time to read a buffer bounds the time to read as many bytes of weights.
#include "api.h"
#include "dispatch.h"
#include "threads.h"

#include <algorithm>

WKV_DISPATCH(sum_words, (const uint64_t* data, int64_t count, uint64_t* sum), (data, count, sum))

// Reads `bytes` (a multiple of 512, aligned to 64) on `threads` threads, each a contiguous part. Returns the sum of the
// 8-byte words modulo 2^64, which proves that all were read.
WKV_API int64_t wkv_read_memory(const void* data, int64_t bytes, int64_t threads) {
  std::atomic<uint64_t> total{0};
  const int64_t pieces = bytes / 512;
  wkv::parallel(static_cast<int>(threads), [&](int thread, int count) {
    const int64_t begin = pieces * thread / count * 64, end = pieces * (thread + 1) / count * 64;
    uint64_t sum = 0;
    wkv::sum_words(static_cast<const uint64_t*>(data) + begin, end - begin, &sum);
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return static_cast<int64_t>(total.load());
}
