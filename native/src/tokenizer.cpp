// Greedy longest match over a fixed list of byte strings: the World tokenizer's encoder, and the joining of tokens.
//
// The tokens form a trie. Its first two levels are one table over all pairs of bytes; the deeper levels are a double
// array: the child of a node by byte c stands in slot `base(node) + c` if the label there is c. No two nodes have the
// same base, so the label alone tells whose child a slot holds. A step costs one load. The table never changes after
// it was made: any number of threads may read it.
#include "api.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace wkv {
namespace {

// A trie node in 32 bits: bits 0-7 the label, bit 8 set in slots that hold no node, bit 9 set where a token ends,
// bits 10-31 the base. A leaf has base 0, and slots 0 to 255 hold no node: every step out of a leaf fails.
using Word = uint32_t;
constexpr Word kLabel = 0x1ff, kEmpty = 0x100, kTerminal = 0x200;
constexpr int kBaseShift = 10;
constexpr int64_t kMaxTokens = 65535, kMaxLength = 255, kMaxSlots = int64_t{1} << (32 - kBaseShift);

struct Table {
  std::vector<Word> pairs = std::vector<Word>(65536, 0);  // the node of each two bytes
  std::vector<uint16_t> pair_tokens = std::vector<uint16_t>(65536, 0);  // the longest token within these two bytes
  uint16_t singles[256] = {};  // the token of each byte
  std::vector<Word> slots;
  std::vector<uint16_t> tokens;  // the token that ends in each slot
  int64_t longest = 0;
};

struct Token {
  uint64_t start;  // its first eight bytes, for quick comparison
  const uint8_t* bytes;
  uint16_t length, id;
};

bool operator<(const Token& a, const Token& b) {
  if (a.start != b.start) return a.start < b.start;
  const int order = std::memcmp(a.bytes, b.bytes, std::min(a.length, b.length));
  return order != 0 ? order < 0 : a.length < b.length;
}

bool operator==(const Token& a, const Token& b) {
  return a.length == b.length && std::memcmp(a.bytes, b.bytes, a.length) == 0;
}

// Lays the sorted tokens out as a Table. Ranges [begin, end) are the tokens below one node.
class Builder {
 public:
  Builder(const std::vector<Token>& tokens, Table& table) : tokens_(tokens), table_(table) { grow(512); }

  bool build() {
    const size_t count = tokens_.size();
    for (size_t begin = 0, end; begin < count; begin = end) {
      end = same(begin, count, 0);
      if (tokens_[begin].length != 1) return false;  // every single byte must be a token, or encoding could fail
      const int first = tokens_[begin].bytes[0];
      table_.singles[first] = tokens_[begin].id;
      ++singles_;
      std::fill_n(table_.pair_tokens.begin() + first * 256, 256, tokens_[begin].id);
      for (size_t low = begin + 1, high; low < end; low = high) {
        high = same(low, end, 1);
        const int pair = first * 256 + tokens_[low].bytes[1];
        if (tokens_[low].length == 2) table_.pair_tokens[pair] = tokens_[low].id;
        table_.pairs[pair] = node(low, high, 2);
      }
    }
    table_.slots.shrink_to_fit();
    table_.tokens.shrink_to_fit();
    return singles_ == 256 && static_cast<int64_t>(table_.slots.size()) <= kMaxSlots;
  }

 private:
  // The end of the run of tokens that share the byte at `depth` with token `begin`.
  size_t same(size_t begin, size_t end, int depth) const {
    const uint8_t value = tokens_[begin].bytes[depth];
    size_t at = begin + 1;
    while (at < end && tokens_[at].bytes[depth] == value) ++at;
    return at;
  }

  // The word, without label, of the node that the tokens [begin, end) share: their first `depth` bytes.
  Word node(size_t begin, size_t end, int depth) {
    Word word = 0;
    if (tokens_[begin].length == depth) {
      word = kTerminal;
      if (++begin == end) return word;
    }
    std::vector<uint8_t> labels;
    for (size_t low = begin; low < end; low = same(low, end, depth)) labels.push_back(tokens_[low].bytes[depth]);
    const size_t base = place(labels);
    for (size_t low = begin, high; low < end; low = high) {
      high = same(low, end, depth);
      const uint8_t label = tokens_[low].bytes[depth];
      if (tokens_[low].length == depth + 1) table_.tokens[base + label] = tokens_[low].id;
      const Word child = node(low, high, depth + 1);
      table_.slots[base + label] = child | label;
    }
    return word | static_cast<Word>(base << kBaseShift);
  }

  // Finds and takes a base whose slots for all `labels` (ascending) are free.
  size_t place(const std::vector<uint8_t>& labels) {
    while (taken_[first_free_]) ++first_free_;
    // Nodes with many children would search the crowded front again and again: they start where they last found room.
    size_t& start = labels.size() > 1 ? first_roomy_ : first_free_;
    start = std::max(start, first_free_);
    for (size_t slot = start, tried = 0;; ++slot, ++tried) {
      if (slot + 512 > taken_.size()) grow(taken_.size() * 2);
      const size_t base = slot - labels[0];  // at least 1: slots begin at 256
      if (taken_[slot] || base_used_[base] || !free(base, labels)) continue;
      for (uint8_t label : labels) taken_[base + label] = 1;
      base_used_[base] = 1;
      if (tried > kPatience) start = slot;
      if (base + 256 > table_.slots.size()) resize(base + 256);
      return base;
    }
  }

  bool free(size_t base, const std::vector<uint8_t>& labels) const {
    return std::all_of(labels.begin(), labels.end(), [&](uint8_t label) { return !taken_[base + label]; });
  }

  void grow(size_t size) {
    taken_.resize(size, 0);
    base_used_.resize(size, 0);
    if (table_.slots.empty()) resize(256);
  }

  void resize(size_t size) {
    table_.slots.resize(size, kEmpty);
    table_.tokens.resize(size, 0);
  }

  static constexpr size_t kPatience = 512;
  const std::vector<Token>& tokens_;
  Table& table_;
  std::vector<uint8_t> taken_, base_used_;
  size_t first_free_ = 256, first_roomy_ = 256;  // the slots below are for leaves
  int singles_ = 0;
};

// Reads and checks the list of tokens. False where it cannot be used.
bool read_tokens(const uint8_t* bytes, const uint32_t* offsets, int64_t count, std::vector<Token>& tokens) {
  if (count < 256 || count > kMaxTokens || offsets[0] != 0) return false;
  tokens.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = static_cast<int64_t>(offsets[i + 1]) - offsets[i];
    if (length < 1 || length > kMaxLength) return false;
    const uint8_t* token = bytes + offsets[i];
    uint64_t start = 0;
    for (int64_t at = 0; at < 8; ++at) start = start << 8 | (at < length ? token[at] : 0);
    tokens.push_back({start, token, static_cast<uint16_t>(length), static_cast<uint16_t>(i + 1)});
  }
  std::sort(tokens.begin(), tokens.end());
  return std::adjacent_find(tokens.begin(), tokens.end()) == tokens.end();
}

// The length of the longest token that begins at `from`, and its id. At least two bytes must stand there; `end` is
// looked at only if `checked`: without, all bytes up to the longest token's length must be readable.
template <bool checked>
inline int64_t match(const Table& table, const uint8_t* from, const uint8_t* end, uint16_t& id) {
  const int pair = from[0] * 256 + from[1];
  const Word* slots = table.slots.data();
  Word word = table.pairs[pair];
  const uint8_t* at = from + 2;
  const uint8_t* matched = from + 1 + ((word & kTerminal) != 0);
  size_t found = 0;
  while (!checked || at < end) {
    const size_t slot = (word >> kBaseShift) + *at;
    word = slots[slot];
    if ((word & kLabel) != *at) break;
    ++at;
    if (word & kTerminal) {
      found = slot;
      matched = at;
    }
  }
  id = found ? table.tokens[found] : table.pair_tokens[pair];
  return matched - from;
}

}  // namespace
}  // namespace wkv

// A table of `count` tokens: token i is bytes[offsets[i] .. offsets[i + 1]) and has id i + 1. Nothing of the arguments
// is kept. Null where memory is short or the list is unusable: fewer than all 256 single bytes, more than 65,535
// tokens, one of no or more than 255 bytes, two alike.
WKV_API void* wkv_world_create(const uint8_t* bytes, const uint32_t* offsets, int64_t count) try {
  std::vector<wkv::Token> tokens;
  if (!wkv::read_tokens(bytes, offsets, count, tokens)) return nullptr;
  auto table = std::make_unique<wkv::Table>();
  for (const wkv::Token& token : tokens) table->longest = std::max<int64_t>(table->longest, token.length);
  return wkv::Builder(tokens, *table).build() ? table.release() : nullptr;
} catch (const std::bad_alloc&) {
  return nullptr;
}

WKV_API void wkv_world_free(void* table) { delete static_cast<wkv::Table*>(table); }

// The bytes of memory that a table takes.
WKV_API int64_t wkv_world_memory(const void* handle) {
  const auto& table = *static_cast<const wkv::Table*>(handle);
  const size_t words = table.pairs.capacity() + table.slots.capacity();
  const size_t ids = table.pair_tokens.capacity() + table.tokens.capacity();
  return static_cast<int64_t>(sizeof(table) + words * sizeof(wkv::Word) + ids * sizeof(uint16_t));
}

// Encodes the tokens that begin in data[*position .. stop), each matched against data up to `size`; the last may reach
// beyond `stop`. Writes their ids (at most stop - *position), moves *position to where the next token begins, and
// returns how many there are. Because greedy matching remembers nothing but the position, a text may be encoded in any
// number of such calls.
WKV_API int64_t wkv_world_encode(const void* handle, const uint8_t* data, int64_t size, int64_t stop, int64_t* position,
                                 uint16_t* ids) {
  const auto& table = *static_cast<const wkv::Table*>(handle);
  const uint8_t* end = data + size;
  int64_t at = *position, count = 0;
  const int64_t safe = std::min(stop, size - table.longest);
  while (at < safe) at += wkv::match<false>(table, data + at, end, ids[count++]);
  const int64_t last = std::min(stop, size - 1);
  while (at < last) at += wkv::match<true>(table, data + at, end, ids[count++]);
  if (at < stop && at == size - 1) ids[count++] = table.singles[data[at++]];
  *position = at;
  return count;
}

// Joins the bytes of `count` tokens: token i is bytes[offsets[i] .. offsets[i + 1]). Writes to `out` unless it is null,
// and returns how many bytes there are.
WKV_API int64_t wkv_world_decode(const uint8_t* bytes, const uint32_t* offsets, const uint16_t* ids, int64_t count,
                                 uint8_t* out) {
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t begin = offsets[ids[i]], length = offsets[ids[i] + 1] - begin;
    if (out != nullptr) std::memcpy(out + size, bytes + begin, length);
    size += length;
  }
  return size;
}
