// Causal self-attention of bf16 with 16-bit products: the same as in cpu.cpp, but every factor of a product is rounded to bf16, as on a GPU. These are
// the turned queries and keys, the values, the gradient of the output, P and D. Sums, scores and the softmax are in float.
//
// The keys of a tile are packed in every order that a product reads them in. Rows and columns beyond the length are zeros.
#pragma once

#include <cmath>

#include "../include/product.h"
#include "../include/threads.h"
#include "heads.h"

namespace NEOX_ISA {
namespace {

constexpr int64_t BLOCK = 96;   // queries and keys of a tile: a multiple of the 12 or 16 rows of a product and of K_ALIGN
constexpr int64_t STRIP = 32;   // rows, and columns, that are left out together where nothing is seen
static_assert(BLOCK % STRIP == 0 && STRIP % Dot::K_ALIGN == 0 && STRIP % Dot::NR == 0);

// What a strip of queries sees, as a depth of a product. Tiles begin at multiples of BLOCK: a query sees at least their first key.
inline int64_t depth_of(const Tile& tile, int64_t row) { return round_up(tile.seen_by_group(row, STRIP), STRIP); }

// A thread's memory for one key/value head and one tile of queries.
struct PairBuffers {
  int64_t dim, wide;  // wide: dim as a depth, and as columns, of a product
  bf16 *key_T, *value_T, *key, *value;                               // packed, all positions
  bf16 *rows, *query, *grad_output, *weights, *grads, *turned, *panel;  // one tile
  float *scores, *grad_scores, *output, *grad_query, *spare, *grad_key, *grad_value;
  float maximum[BLOCK], total[BLOCK], delta[BLOCK], log_sum[BLOCK];

  PairBuffers(const Problem& problem, bool backward) : dim(problem.dim), wide(round_up(problem.dim, std::max(Dot::K_ALIGN, Dot::NR))) {
    const int64_t all = (problem.length + BLOCK - 1) / BLOCK * BLOCK * wide, tile = BLOCK * wide, square = BLOCK * BLOCK;
    bf16* next = scratch<bf16, 11>(3 * all + 4 * tile + 3 * square);
    const auto take = [&](int64_t size) { return (next += size) - size; };
    key_T = take(all), rows = take(tile), query = take(tile), weights = take(square);
    if (backward) {
      value_T = take(all), key = take(all), grad_output = take(tile), grads = take(square), turned = take(square), panel = take(tile);
    } else {
      value = take(all);
    }
    float* sums = scratch<float, 12>(2 * square + 2 * all + tile + 2 * wide);
    const auto some = [&](int64_t size) { return (sums += size) - size; };
    scores = some(square), spare = some(2 * wide);
    if (backward) {
      grad_scores = some(square), grad_key = some(all), grad_value = some(all), grad_query = some(tile);
    } else {
      output = some(tile);
    }
  }
};

// Rows of a head as factors: turned, then rounded. Zeros after the last one, and after the last dimension.
inline void load_rows(const Problem& problem, const Head<bf16>& from, int64_t batch, int64_t first, int64_t count, bool turns, bf16* to,
                      PairBuffers& own) {
  for (int64_t r = 0; r < count; r++) {
    bf16* row = to + r * own.wide;
    if (first + r + AHEAD < problem.length) from.prefetch(first + r + AHEAD, own.dim);
    if (turns) {
      copy(own.spare, from.at(first + r), own.dim);
      turn(own.spare, problem.angles, batch, first + r, 1);
      copy(row, own.spare, own.dim);
    } else {
      copy(row, from.at(first + r), own.dim);
    }
    clear(row + own.dim, own.wide - own.dim);
  }
  clear(to + count * own.wide, (BLOCK - count) * own.wide);
}

inline void load_pair_keys(const Problem& problem, int64_t batch, int64_t head, int64_t length, bool backward, PairBuffers& own) {
  const Head<bf16> keys = head_of<bf16>(problem.key, batch, head), values = head_of<bf16>(problem.value, batch, head);
  for (int64_t first = 0; first < length; first += BLOCK) {
    const int64_t count = std::min(BLOCK, length - first), at = first * own.wide;
    load_rows(problem, keys, batch, first, count, true, own.rows, own);
    Dot::pack_transposed(own.key_T + at, own.rows, own.wide, own.wide, BLOCK);
    if (backward) Dot::pack(own.key + at, own.rows, own.wide, BLOCK, own.wide);
    load_rows(problem, values, batch, first, count, false, own.rows, own);
    if (backward) Dot::pack_transposed(own.value_T + at, own.rows, own.wide, own.wide, BLOCK);
    else Dot::pack(own.value + at, own.rows, own.wide, BLOCK, own.wide);
  }
}

// out[query, key] = left[query] . right[key], where a query of the strip sees a key of the strip.
inline void products_of_rows(const Tile& tile, const bf16* left, const bf16* right_T, float* out, int64_t wide) {
  for (int64_t c = 0; c < tile.keys; c += STRIP) {
    const int64_t from = tile.sees(c) / STRIP * STRIP;
    dot_product(left + from * wide, wide, tile.queries - from, right_T + c * wide, wide, wide, STRIP, out + from * BLOCK + c, BLOCK, true);
  }
}

// out[query] += weights[query, key] rows[key]
inline void add_keys(const Tile& tile, const bf16* weights, const bf16* rows, float* out, int64_t wide) {
  for (int64_t r = 0; r < tile.queries; r += STRIP)
    dot_product(weights + r * BLOCK, BLOCK, std::min(STRIP, tile.queries - r), rows, BLOCK, depth_of(tile, r), wide, out + r * wide, wide, false);
}

// out[key] += weights[query, key] rows[query]. All of `weights` is there, with zeros where nothing is seen.
inline void add_queries(const Tile& tile, const bf16* weights, const bf16* rows, float* out, PairBuffers& own) {
  Dot::pack_turned(own.turned, weights, BLOCK, BLOCK, BLOCK);
  Dot::pack(own.panel, rows, own.wide, BLOCK, own.wide);
  for (int64_t k = 0; k < tile.keys; k += STRIP) {
    const int64_t from = tile.sees(k) / STRIP * STRIP;
    dot_product(own.turned + k * BLOCK + from, BLOCK, std::min(STRIP, tile.keys - k), own.panel + from * Dot::NR, BLOCK,
                round_up(tile.queries, STRIP) - from, own.wide, out + k * own.wide, own.wide, false);
  }
}

// The products of rounded rows become scores: not the rows, which would be rounded once more.
inline void scale_scores(float* scores, int64_t seen, float scale) {
  for (int64_t c = 0; c < round_up(seen, WIDTH); c += WIDTH) store(scores + c, load(scores + c) * scale);
}

inline void softmax_pairs_step(const Tile& tile, float scale, PairBuffers& own) {
  for (int64_t r = 0; r < tile.queries; r++) {
    float* scores = own.scores + r * BLOCK;
    const int64_t seen = tile.seen(r), columns = depth_of(tile, r);
    scale_scores(scores, seen, scale);
    const float before = own.maximum[r], now = std::max(before, largest(scores, seen));
    const float factor = std::exp(before - now);
    own.total[r] = own.total[r] * factor + exponentials(scores, seen, columns, now);
    copy(own.weights + r * BLOCK, scores, columns);
    own.maximum[r] = now;
    if (factor != 1.0f)
      for (int64_t d = 0; d < own.dim; d++) own.output[r * own.wide + d] *= factor;
  }
}

inline void forward_pairs(const Problem& problem, int64_t batch, int64_t head, int64_t first, PairBuffers& own) {
  Tile tile{first, std::min(BLOCK, problem.length - first), 0, 0};
  load_rows(problem, head_of<bf16>(problem.query, batch, head), batch, first, tile.queries, true, own.query, own);
  clear(own.output, BLOCK * own.wide);
  fill(own.maximum, own.maximum + BLOCK, -std::numeric_limits<float>::infinity());
  fill(own.total, own.total + BLOCK, 0.0f);
  for (; tile.first_key < first + tile.queries; tile.first_key += BLOCK) {
    tile.keys = std::min(BLOCK, problem.length - tile.first_key);
    const int64_t at = tile.first_key * own.wide;
    products_of_rows(tile, own.query, own.key_T + at, own.scores, own.wide);
    softmax_pairs_step(tile, problem.scale, own);
    add_keys(tile, own.weights, own.value + at, own.output, own.wide);
  }
  const Head<bf16> out = head_of<bf16>(problem.output, batch, head);
  float* log_sum = problem.log_sum + (batch * problem.heads + head) * problem.length + first;
  for (int64_t r = 0; r < tile.queries; r++) {
    scale_into(out.at(first + r), own.output + r * own.wide, own.dim, 1 / own.total[r]);
    log_sum[r] = own.maximum[r] + std::log(own.total[r]);
  }
}

// scores -> P and their gradients -> D; all columns, and all rows of the last strip.
inline void softmax_pairs_backward(const Tile& tile, float scale, PairBuffers& own) {
  for (int64_t r = 0; r < tile.queries; r++) {
    float *scores = own.scores + r * BLOCK, *grads = own.grad_scores + r * BLOCK;
    const int64_t seen = tile.seen(r);
    scale_scores(scores, seen, scale);
    exponentials(scores, seen, BLOCK, own.log_sum[r]);
    const int64_t whole = round_up(seen, WIDTH);
    for (int64_t c = 0; c < whole; c += WIDTH) store(grads + c, load(scores + c) * (load(grads + c) - own.delta[r]));
    fill(grads + seen, grads + BLOCK, 0.0f);
    copy(own.weights + r * BLOCK, scores, BLOCK);
    copy(own.grads + r * BLOCK, grads, BLOCK);
  }
  clear(own.weights + tile.queries * BLOCK, (BLOCK - tile.queries) * BLOCK);
  clear(own.grads + tile.queries * BLOCK, (BLOCK - tile.queries) * BLOCK);
}

inline void backward_pairs(const Problem& problem, const Gradients& grads, int64_t batch, int64_t head, int64_t first, PairBuffers& own) {
  Tile tile{first, std::min(BLOCK, problem.length - first), 0, 0};
  const Head<bf16> grad = head_of<bf16>(grads.output, batch, head), output = head_of<bf16>(problem.output, batch, head);
  load_rows(problem, head_of<bf16>(problem.query, batch, head), batch, first, tile.queries, true, own.query, own);
  load_rows(problem, grad, batch, first, tile.queries, false, own.grad_output, own);
  for (int64_t r = 0; r < tile.queries; r++) {
    if (first + r + AHEAD < problem.length) output.prefetch(first + r + AHEAD, own.dim);
    copy(own.spare, grad.at(first + r), own.dim);
    copy(own.spare + own.wide, output.at(first + r), own.dim);
    own.delta[r] = dot(own.spare, own.spare + own.wide, own.dim);
    own.log_sum[r] = problem.log_sum[(batch * problem.heads + head) * problem.length + first + r];
  }
  clear(own.grad_query, BLOCK * own.wide);
  for (; tile.first_key < first + tile.queries; tile.first_key += BLOCK) {
    tile.keys = std::min(BLOCK, problem.length - tile.first_key);
    const int64_t at = tile.first_key * own.wide;
    products_of_rows(tile, own.query, own.key_T + at, own.scores, own.wide);
    products_of_rows(tile, own.grad_output, own.value_T + at, own.grad_scores, own.wide);
    softmax_pairs_backward(tile, problem.scale, own);
    add_queries(tile, own.weights, own.grad_output, own.grad_value + at, own);
    add_queries(tile, own.grads, own.query, own.grad_key + at, own);
    add_keys(tile, own.grads, own.key + at, own.grad_query, own.wide);
  }
  const Head<bf16> out = head_of<bf16>(grads.query, batch, head);
  for (int64_t r = 0; r < tile.queries; r++) {
    float* row = own.grad_query + r * own.wide;
    turn(row, problem.angles, batch, first + r, -1);
    scale_into(out.at(first + r), row, own.dim, problem.scale);
  }
}

inline void backward_pairs_of_head(const Problem& problem, const Gradients& grads, int64_t batch, int64_t kv_head, PairBuffers& own) {
  load_pair_keys(problem, batch, kv_head, problem.length, true, own);
  const int64_t all = (problem.length + BLOCK - 1) / BLOCK * BLOCK * own.wide, shared = problem.heads / problem.kv_heads;
  clear(own.grad_key, all);
  clear(own.grad_value, all);
  for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
    for (int64_t first = 0; first < problem.length; first += BLOCK) backward_pairs(problem, grads, batch, head, first, own);
  const Head<bf16> keys = head_of<bf16>(grads.key, batch, kv_head), values = head_of<bf16>(grads.value, batch, kv_head);
  for (int64_t p = 0; p < problem.length; p++) {
    float* key = own.grad_key + p * own.wide;
    turn(key, problem.angles, batch, p, -1);
    scale_into(keys.at(p), key, own.dim, problem.scale);
    copy(values.at(p), own.grad_value + p * own.wide, own.dim);
  }
}

inline void run_pairs_forward(const Problem& problem) {
  for_each_piece<PairBuffers>(problem, BLOCK, [&](int64_t batch, int64_t kv_head, int64_t first, int64_t last, PairBuffers& own) {
    load_pair_keys(problem, batch, kv_head, last, false, own);
    const int64_t shared = problem.heads / problem.kv_heads;
    for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
      for (int64_t start = first; start < last; start += BLOCK) forward_pairs(problem, batch, head, start, own);
  });
}

inline void run_pairs_backward(const Problem& problem, const Gradients& grads) {
  for_each_head<PairBuffers>(
    problem, [&](int64_t batch, int64_t kv_head, PairBuffers& own) { backward_pairs_of_head(problem, grads, batch, kv_head, own); });
}

}  // namespace
}  // namespace NEOX_ISA
