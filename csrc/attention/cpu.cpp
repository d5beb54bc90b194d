// Causal self-attention on a CPU, forward and backward, tile by tile (FlashAttention-2; Dao, 2023).
//
//   P = softmax(scale * Q K^T), a query sees itself and what is before it;   O = P V
//   dV = P^T dO;   D = P * (dO V^T - rowsum(dO * O));   dQ = scale * D K;   dK = scale * D^T Q
//
// A thread takes one key/value head at a time, brings its rows (widened to float and turned by their angles) into a buffer of its own, and goes
// through the query heads that share it. Rows lie an odd number of cache lines apart, so that a column of a tile uses every set of the cache.
// No result depends on the number of threads.
#include <algorithm>
#include <cmath>

#include "../include/threads.h"
#include "heads.h"
#ifdef NEOX_DOT
#include "pairs.h"
#endif

namespace NEOX_ISA {
namespace {

constexpr int64_t QUERIES = 48, KEYS = 96;  // of a tile; multiples of ROWS and PANEL
constexpr int64_t KEY_STRIDE = odd_lines(KEYS);
static_assert(QUERIES % ROWS == 0 && KEYS % ROWS == 0 && KEYS % PANEL == 0);

// A thread's memory for one key/value head and one tile of queries. It is not cleared: a number is read only where one was written, or its product
// goes into columns that nobody reads.
struct Buffers {
  int64_t dim, stride;
  float *key_T, *value_T, *key, *value, *grad_key, *grad_value;  // all positions
  float *query, *grad_output, *grad_query, *output, *scores, *grads, *spare;  // one tile
  float maximum[QUERIES], total[QUERIES], delta[QUERIES], log_sum[QUERIES];

  Buffers(const Problem& problem, bool backward) : dim(problem.dim), stride(odd_lines(problem.dim)) {
    const int64_t tiles = (problem.length + KEYS - 1) / KEYS, rows = tiles * KEYS * stride, turned = tiles * dim * KEY_STRIDE;
    const int64_t tile = QUERIES * stride, square = QUERIES * KEY_STRIDE;
    float* next = scratch<float, 10>(backward ? 2 * turned + 3 * rows + 3 * tile + 2 * square + stride : turned + rows + 2 * tile + square + stride);
    const auto take = [&](int64_t size) { return (next += size) - size; };
    key_T = take(turned), query = take(tile), scores = take(square), spare = take(stride);
    if (backward) {
      value_T = take(turned), key = take(rows), grad_key = take(rows), grad_value = take(rows);
      grad_output = take(tile), grad_query = take(tile), grads = take(square);
    } else {
      value = take(rows), output = take(tile);
    }
  }

  const float* keys_T(int64_t first) const { return key_T + first / KEYS * dim * KEY_STRIDE; }
  const float* values_T(int64_t first) const { return value_T + first / KEYS * dim * KEY_STRIDE; }
};

void transpose_into(float* tiles, const float* row, int64_t position, int64_t dim) {
  float* column = tiles + position / KEYS * dim * KEY_STRIDE + position % KEYS;
  for (int64_t d = 0; d < dim; d++) column[d * KEY_STRIDE] = row[d];
}

template <class T>
void load_keys(const Problem& problem, int64_t batch, int64_t head, int64_t length, bool backward, Buffers& own) {
  const Head<T> keys = head_of<T>(problem.key, batch, head), values = head_of<T>(problem.value, batch, head);
  for (int64_t p = 0; p < length; p++) {
    keys.prefetch(p + AHEAD, own.dim);
    values.prefetch(p + AHEAD, own.dim);
    float* key = backward ? own.key + p * own.stride : own.spare;
    copy(key, keys.at(p), own.dim);
    turn(key, problem.angles, batch, p, 1);
    transpose_into(own.key_T, key, p, own.dim);
    float* value = backward ? own.spare : own.value + p * own.stride;
    copy(value, values.at(p), own.dim);
    if (backward) transpose_into(own.value_T, value, p, own.dim);
  }
}

template <class T>
void load_queries(const Problem& problem, int64_t batch, const Head<T>& from, const Tile& tile, Buffers& own) {
  for (int64_t r = 0; r < tile.queries; r++) {
    float* row = own.query + r * own.stride;
    from.prefetch(tile.first_query + r + AHEAD, own.dim);
    copy(row, from.at(tile.first_query + r), own.dim);
    turn(row, problem.angles, batch, tile.first_query + r, 1);
    for (int64_t d = 0; d < own.dim; d++) row[d] *= problem.scale;
  }
}

// out[r, c] = left[r, :] . right_T[:, c], for the keys that a group of queries sees.
void visible_products(const Tile& tile, const float* left, const float* right_T, float* out, const Buffers& own) {
  for (int64_t c = 0; c < tile.keys; c += PANEL)
    for (int64_t r = 0; r < tile.queries; r += ROWS)
      if (c < tile.seen_by_group(r, ROWS))
        multiply<2, false>({left + r * own.stride, own.stride}, right_T + c, KEY_STRIDE, out + r * KEY_STRIDE + c, KEY_STRIDE, own.dim, false);
}

// out[r, :] += weights[r, :] rows: the sum over the keys that a query sees.
void add_over_keys(const Tile& tile, const float* weights, const float* rows, float* out, const Buffers& own) {
  for_each_panel(own.dim, [&](int64_t c, auto vectors) {
    for (int64_t r = 0; r < tile.queries; r += ROWS)
      multiply<vectors(), false>(
        {weights + r * KEY_STRIDE, KEY_STRIDE}, rows + c, own.stride, out + r * own.stride + c, own.stride, tile.seen_by_group(r, ROWS), true);
  });
}

// out[k, :] += weights[:, k]^T rows: the sum over the queries that see a key.
void add_over_queries(const Tile& tile, const float* weights, const float* rows, float* out, const Buffers& own) {
  for_each_panel(own.dim, [&](int64_t c, auto vectors) {
    for (int64_t k = 0; k < tile.keys; k += ROWS) {
      const int64_t from = tile.sees(k);
      if (from < tile.queries)
        multiply<vectors(), true>({weights + from * KEY_STRIDE + k, KEY_STRIDE}, rows + from * own.stride + c, own.stride,
                      out + k * own.stride + c, own.stride, tile.queries - from, true);
    }
  });
}

// How many columns of a row later products read: beyond what the row sees itself, what its group sees, and a whole group of keys.
int64_t columns_read(const Tile& tile, int64_t row) {
  const int64_t group = (tile.seen(row) + ROWS - 1) / ROWS * ROWS;
  const int64_t most = std::min(std::max(tile.seen_by_group(row, ROWS), group), KEYS);
  return (most + WIDTH - 1) / WIDTH * WIDTH;
}

// One tile of keys joins the softmax of each query: what was summed before is brought to the new maximum.
void softmax_step(const Tile& tile, Buffers& own) {
  for (int64_t r = 0; r < tile.queries; r++) {
    float* scores = own.scores + r * KEY_STRIDE;
    const int64_t seen = tile.seen(r), columns = columns_read(tile, r);
    if (seen == 0) {
      fill(scores, scores + columns, 0.0f);
      continue;
    }
    const float before = own.maximum[r], now = std::max(before, largest(scores, seen));
    const float factor = std::exp(before - now);
    own.total[r] = own.total[r] * factor + exponentials(scores, seen, columns, now);
    own.maximum[r] = now;
    if (factor != 1.0f)
      for (int64_t d = 0; d < own.dim; d++) own.output[r * own.stride + d] *= factor;
  }
}

template <class T>
void forward_tile(const Problem& problem, int64_t batch, int64_t head, int64_t first, Buffers& own) {
  Tile tile{first, std::min(QUERIES, problem.length - first), 0, 0};
  load_queries<T>(problem, batch, head_of<T>(problem.query, batch, head), tile, own);
  clear(own.output, QUERIES * own.stride);
  fill(own.maximum, own.maximum + QUERIES, -std::numeric_limits<float>::infinity());
  fill(own.total, own.total + QUERIES, 0.0f);
  for (; tile.first_key < first + tile.queries; tile.first_key += KEYS) {
    tile.keys = std::min(KEYS, problem.length - tile.first_key);
    visible_products(tile, own.query, own.keys_T(tile.first_key), own.scores, own);
    softmax_step(tile, own);
    add_over_keys(tile, own.scores, own.value + tile.first_key * own.stride, own.output, own);
  }
  const Head<T> out = head_of<T>(problem.output, batch, head);
  float* log_sum = problem.log_sum + (batch * problem.heads + head) * problem.length + first;
  for (int64_t r = 0; r < tile.queries; r++) {
    scale_into(out.at(first + r), own.output + r * own.stride, own.dim, 1 / own.total[r]);
    log_sum[r] = own.maximum[r] + std::log(own.total[r]);
  }
}

template <class T>
void load_gradients(const Problem& problem, const Gradients& grads, int64_t batch, int64_t head, const Tile& tile, Buffers& own) {
  const Head<T> grad = head_of<T>(grads.output, batch, head), out = head_of<T>(problem.output, batch, head);
  const float* log_sum = problem.log_sum + (batch * problem.heads + head) * problem.length + tile.first_query;
  for (int64_t r = 0; r < tile.queries; r++) {
    float* row = own.grad_output + r * own.stride;
    grad.prefetch(tile.first_query + r + AHEAD, own.dim);
    out.prefetch(tile.first_query + r + AHEAD, own.dim);
    copy(row, grad.at(tile.first_query + r), own.dim);
    copy(own.spare, out.at(tile.first_query + r), own.dim);
    own.delta[r] = dot(row, own.spare, own.dim);
    own.log_sum[r] = log_sum[r];
  }
}

// scores -> P and grads -> D, a row at a time.
void softmax_backward(const Tile& tile, Buffers& own) {
  for (int64_t r = 0; r < tile.queries; r++) {
    float *scores = own.scores + r * KEY_STRIDE, *grads = own.grads + r * KEY_STRIDE;
    const int64_t seen = tile.seen(r), columns = columns_read(tile, r);
    exponentials(scores, seen, columns, own.log_sum[r]);
    for (int64_t c = 0; c < columns; c += WIDTH) store(grads + c, load(scores + c) * (load(grads + c) - own.delta[r]));
    fill(grads + seen, grads + columns, 0.0f);
  }
}

template <class T>
void backward_tile(const Problem& problem, const Gradients& grads, int64_t batch, int64_t head, int64_t first, Buffers& own) {
  Tile tile{first, std::min(QUERIES, problem.length - first), 0, 0};
  load_queries<T>(problem, batch, head_of<T>(problem.query, batch, head), tile, own);
  load_gradients<T>(problem, grads, batch, head, tile, own);
  clear(own.grad_query, QUERIES * own.stride);
  for (; tile.first_key < first + tile.queries; tile.first_key += KEYS) {
    tile.keys = std::min(KEYS, problem.length - tile.first_key);
    const int64_t place = tile.first_key * own.stride;
    visible_products(tile, own.query, own.keys_T(tile.first_key), own.scores, own);
    visible_products(tile, own.grad_output, own.values_T(tile.first_key), own.grads, own);
    softmax_backward(tile, own);
    add_over_queries(tile, own.scores, own.grad_output, own.grad_value + place, own);
    add_over_queries(tile, own.grads, own.query, own.grad_key + place, own);
    add_over_keys(tile, own.grads, own.key + place, own.grad_query, own);
  }
  const Head<T> out = head_of<T>(grads.query, batch, head);
  for (int64_t r = 0; r < tile.queries; r++) {
    float* row = own.grad_query + r * own.stride;
    turn(row, problem.angles, batch, first + r, -1);
    scale_into(out.at(first + r), row, own.dim, problem.scale);
  }
}

template <class T>
void backward_head(const Problem& problem, const Gradients& grads, int64_t batch, int64_t kv_head, Buffers& own) {
  load_keys<T>(problem, batch, kv_head, problem.length, true, own);
  const int64_t rows = (problem.length + KEYS - 1) / KEYS * KEYS * own.stride;
  clear(own.grad_key, rows);
  clear(own.grad_value, rows);
  const int64_t shared = problem.heads / problem.kv_heads;
  for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
    for (int64_t first = 0; first < problem.length; first += QUERIES) backward_tile<T>(problem, grads, batch, head, first, own);
  const Head<T> keys = head_of<T>(grads.key, batch, kv_head), values = head_of<T>(grads.value, batch, kv_head);
  for (int64_t p = 0; p < problem.length; p++) {
    float* key = own.grad_key + p * own.stride;
    turn(key, problem.angles, batch, p, -1);
    scale_into(keys.at(p), key, own.dim, 1);
    scale_into(values.at(p), own.grad_value + p * own.stride, own.dim, 1);
  }
}

template <class T>
void run_forward(const Problem& problem) {
  for_each_piece<Buffers>(problem, QUERIES, [&](int64_t batch, int64_t kv_head, int64_t first, int64_t last, Buffers& own) {
    load_keys<T>(problem, batch, kv_head, last, false, own);
    const int64_t shared = problem.heads / problem.kv_heads;
    for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head)
      for (int64_t start = first; start < last; start += QUERIES) forward_tile<T>(problem, batch, head, start, own);
  });
}

template <class T>
void run_backward(const Problem& problem, const Gradients& grads) {
  for_each_head<Buffers>(problem, [&](int64_t batch, int64_t kv_head, Buffers& own) { backward_head<T>(problem, grads, batch, kv_head, own); });
}

}  // namespace

#ifdef NEOX_DOT  // bf16 alone: the other formats are those of the set before
void attention_forward(const Problem& problem) { run_pairs_forward(problem); }

void attention_backward(const Problem& problem, const Gradients& grads) { run_pairs_backward(problem, grads); }
#else
void attention_forward(const Problem& problem) { problem.is_bf16 ? run_forward<bf16>(problem) : run_forward<float>(problem); }

void attention_backward(const Problem& problem, const Gradients& grads) {
  problem.is_bf16 ? run_backward<bf16>(problem, grads) : run_backward<float>(problem, grads);
}
#endif

}  // namespace NEOX_ISA
