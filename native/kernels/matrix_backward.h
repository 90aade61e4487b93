// The backward walk that WKV-5, 6 and 7 share. A segment's states are computed again from the one kept at its start,
// for a tile of LANES value rows at a time: rows never meet, so a tile's states and their gradients stay in the cache.
// Rows lie along memory here, [value row][key]; what the tiles add to the gradients of tokens is summed in order.
#pragma once
#include "matrix_state.h"

namespace wkv::WKV_ISA {

template <class T>
struct Tile {
  static constexpr int64_t ROWS = LANES<T>;
  int64_t first;   // its first value row; rows beyond N are zero
  int64_t stride;  // keys, padded
  T* states;       // [SEGMENT + 1][ROWS][stride]: before and after each token of the segment
  T* zeros;        // [ROWS][stride]
  T* dS;           // [ROWS][stride]: gradient of the state behind the current token

  T* before(int64_t token) const { return states + token * ROWS * stride; }
  T* after(int64_t token) const { return before(token + 1); }
  // What the token meets: zeros where the state was reset.
  const T* met(const Segment<T>& x, int64_t token) const { return x.reset[token] ? zeros : before(token); }
  void cut(const Segment<T>& x, int64_t token) const {
    if (x.reset[token]) std::memset(dS, 0, ROWS * stride * sizeof(T));
  }
};

// Adds `value` to a row.
template <class T>
WKV_INLINE void add(T* row, Vec<T> value) {
  store(row, load(row) + value);
}

// Writes the gradients of a segment whose first token is `first`; zeros for tokens that do not exist.
template <class T>
void write_gradients(const MatrixCall& call, int64_t batch, int64_t head, int64_t first, const Segment<T>& x,
                     const Segment<T>& d, const T* zeros) {
  for (int name = 0; name < ROW_COUNT; ++name) {
    if (d.rows[name] == nullptr || (name == ROW_LOG_W && call.constant_decay)) continue;
    for (int64_t i = 0; i < x.count; ++i)
      write_row(d.row(static_cast<Name>(name), i), x.offset[i], call.size, call.gradients[name]);
    clear_missing(call, batch, head, first, 0, call.size, zeros, call.gradients[name]);
  }
}

// Runs one head. Operator::redo(x, tile) computes the states of a tile, Operator::undo(x, tile, d) walks back over the
// tokens and adds to their gradients d, Operator::finish(x, d) adds to them what concerns all rows, and Operator::end()
// writes what is summed over the tokens.
template <class T, class Operator>
void backward(const MatrixCall& call, int64_t index, void* memory) {
  const int64_t batch = index / call.heads, head = index % call.heads, size = call.size, stride = padded(size);
  constexpr int64_t ROWS = Tile<T>::ROWS;
  Scratch<T> scratch(memory, size);
  Operator op(call, index, scratch);
  Segment<T> x = make_segment(call, head, scratch, Operator::names), d;
  d.stride = stride;
  for (Name name : Operator::names)
    if (name != ROW_DY) d.rows[name] = scratch.take(SEGMENT);
  T *dS = scratch.take(stride), *zeros = scratch.take(ROWS), *states = scratch.take((SEGMENT + 1) * ROWS);
  load_rows(at<T>(call.state, index, size), size, 0, size, dS, stride);
  for (int64_t number = (call.time - 1) / SEGMENT; number >= 0; --number) {
    read_segment(call, batch, head, number * SEGMENT, x);
    for (T* rows : d.rows)
      if (rows != nullptr) std::memset(rows, 0, SEGMENT * stride * sizeof(T));
    const T* start = at<T>(call.starts, number * call.batch * call.heads + index, size);
    for (int64_t first = 0; first < size; first += ROWS) {
      const Tile<T> tile{first, stride, states, zeros, dS + first * stride};
      load_rows(start, size, first, size - first < ROWS ? size - first : ROWS, tile.before(0), ROWS);
      op.redo(x, tile);
      op.undo(x, tile, d);
    }
    op.finish(x, d);
    write_gradients(call, batch, head, number * SEGMENT, x, d, zeros);
  }
  op.end();
  T* result = static_cast<T*>(call.result) + index * size * size;
  for (int64_t m = 0; m < size; ++m) std::memcpy(result + m * size, dS + m * stride, size * sizeof(T));
}

}  // namespace wkv::WKV_ISA
