// What both ways to compute attention share: rows of heads, angles, what a tile sees, the exponentials of a row of scores, and the work of the threads.
#pragma once

#include <algorithm>
#include <limits>

#include "op.h"
#include "tiles.h"

namespace NEOX_ISA {
namespace {

using namespace ::attention;

constexpr int64_t AHEAD = 8;  // rows

// Not std::fill: the linker could take the one of another instruction set.
inline void fill(float* from, float* to, float x) {
  for (; from < to; from++) *from = x;
}

// One query or key/value head of one text.
template <class T>
struct Head {
  T* data;
  int64_t row;
  T* at(int64_t position) const { return data + position * row; }
  // Rows of one head lie far apart: the processor does not see which comes next.
  void prefetch(int64_t position, int64_t dim) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(at(position) + d);
  }
};

template <class T>
Head<T> head_of(const Heads& heads, int64_t batch, int64_t head) {
  return {static_cast<T*>(heads.data) + batch * heads.batch + head * heads.head, heads.row};
}

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); `direction` -1 turns back.
inline void turn(float* row, const Angles& angles, int64_t batch, int64_t position, float direction) {
  if (angles.cosines == nullptr) return;
  const int64_t pairs = angles.pairs, start = batch * angles.batch + position * pairs;
  const float *cosines = angles.cosines + start, *sines = angles.sines + start;
  float* second = row + pairs;
  for (int64_t n = 0; n < pairs; n++) {
    const float one = row[n], two = second[n], sine = direction * sines[n];
    row[n] = one * cosines[n] - two * sine;
    second[n] = two * cosines[n] + one * sine;
  }
}

// Where a tile of queries and a tile of keys meet.
struct Tile {
  int64_t first_query, queries, first_key, keys;

  // How many of the tile's keys the queries up to `row` of the tile see.
  int64_t seen(int64_t row) const { return std::clamp<int64_t>(first_query + row - first_key + 1, 0, keys); }
  // The same for the last query of its group of rows.
  int64_t seen_by_group(int64_t row, int64_t group) const { return seen(std::min(row / group * group + group, queries) - 1); }
  // The first query that sees the key `column` of the tile.
  int64_t sees(int64_t column) const { return std::max<int64_t>(0, first_key + column - first_query); }
};

// scores -> exp(scores - base), 0 where the query does not see the key. Returns the sum.
inline float exponentials(float* scores, int64_t seen, int64_t columns, float base) {
  fill(scores + seen, scores + columns, -std::numeric_limits<float>::infinity());
  Vec<float> sum = {};
  for (int64_t c = 0; c < columns; c += WIDTH) {
    const Vec<float> e = exponential(load(scores + c) - base);
    store(scores + c, e);
    sum += e;
  }
  return sum_of(sum);
}

inline float largest(float* scores, int64_t seen) {
  const float least = -std::numeric_limits<float>::infinity();
  const int64_t columns = (seen + WIDTH - 1) / WIDTH * WIDTH;
  fill(scores + seen, scores + columns, least);
  Vec<float> most = least - Vec<float>{};
  for (int64_t c = 0; c < columns; c += WIDTH) {
    const Vec<float> s = load(scores + c);
    most = s > most ? s : most;
  }
  return largest_of(most);
}

// A key/value head is cut into pieces of queries where there are fewer heads than threads: each piece loads the keys that it needs.
inline int64_t pieces_of(const Problem& problem, int64_t tile) {
  const int64_t heads = std::max<int64_t>(1, problem.batch * problem.kv_heads), tiles = (problem.length + tile - 1) / tile;
  return heads >= problem.threads ? 1 : std::min((2 * problem.threads + heads - 1) / heads, (tiles + 1) / 2);
}

// Calls body(batch, key/value head, first query, last query, a thread's memory): whole heads, or their pieces.
template <class Own, class Body>
void for_each_piece(const Problem& problem, int64_t tile, Body body) {
  const int64_t pieces = pieces_of(problem, tile), units = problem.batch * problem.kv_heads * pieces, tiles = (problem.length + tile - 1) / tile;
#pragma omp parallel num_threads(problem.threads) if (problem.threads > 1)
  {
    Own own(problem, false);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t piece = unit % pieces, kv_head = unit / pieces % problem.kv_heads, batch = unit / pieces / problem.kv_heads;
      body(batch, kv_head, tiles * piece / pieces * tile, std::min(tiles * (piece + 1) / pieces * tile, problem.length), own);
    }
  }
}

// Calls body(batch, key/value head, a thread's memory) of a backward pass.
template <class Own, class Body>
void for_each_head(const Problem& problem, Body body) {
  const int64_t units = problem.batch * problem.kv_heads;
#pragma omp parallel num_threads(problem.threads) if (problem.threads > 1)
  {
    Own own(problem, true);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) body(unit / problem.kv_heads, unit % problem.kv_heads, own);
  }
}

}  // namespace
}  // namespace NEOX_ISA
