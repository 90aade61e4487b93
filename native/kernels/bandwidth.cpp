// Reads memory as fast as the processor can: what no kernel that has to read all weights can beat.
#include "vec.h"

namespace wkv::WKV_ISA {

// Adds up 8-byte words, `count` a multiple of 64 and `data` aligned to 64 bytes. Eight vectors are in flight at a time.
void sum_words(const uint64_t* data, int64_t count, uint64_t* sum) {
  typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
  constexpr int WIDTH = VECTOR_BYTES / 8, STREAMS = 8;
  Words sums[STREAMS] = {};
  for (int64_t i = 0; i < count; i += WIDTH * STREAMS)
    for (int j = 0; j < STREAMS; ++j) {
      Words words;
      std::memcpy(&words, data + i + j * WIDTH, sizeof words);
      sums[j] += words;
    }
  uint64_t total = 0;
  for (int j = 0; j < STREAMS; ++j)
    for (int lane = 0; lane < WIDTH; ++lane) total += sums[j][lane];
  *sum = total;
}

}  // namespace wkv::WKV_ISA
