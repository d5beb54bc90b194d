// Attention of single new tokens to their caches: the new keys and values are written first, then every head reads its cache once.
#include <omp.h>

#include <cmath>
#include <type_traits>

#include "op.h"

#include "../include/decode_input.h"
#include "../include/threads.h"

namespace NEOX_ISA {
namespace {

using few_rows::Part;
using few_rows::part_of;

// Query, key or value of a head in the fused row: (q, k, v) head by head where there are as many of each, else all queries, all keys, all values.
const float* head_of(const DecodeAttention& op, int64_t n, int which, int64_t head) {
  const float* row = op.fused + n * (op.H + 2 * op.K) * op.d;
  if (op.H == op.K) return row + (head * 3 + which) * op.d;
  return row + ((which == 0 ? 0 : which == 1 ? op.H : op.H + op.K) + head) * op.d;
}

// A query or key head, normalised and turned.
void ready_head(const DecodeAttention& op, int64_t n, int which, int64_t head, float* row, float* to) {
  const DecodeInput& norm = which == 0 ? op.query_norm : op.key_norm;
  const int64_t heads = which == 0 ? op.H : op.K;
  const float* from = head_of(op, n, which, head);
  if (norm.kind != 0 && op.norm_all_heads) {
    for (int64_t h = 0; h < heads; h++) std::memcpy(row + h * op.d, head_of(op, n, which, h), op.d * sizeof(float));
    norm_row(norm, row, heads * op.d, row);
    std::memcpy(to, row + head * op.d, op.d * sizeof(float));
  } else {
    prepare_row(norm, from, op.d, to);
  }
  if (op.cosines == nullptr) return;
  const float *cosine = op.cosines + op.length[n] * op.turned, *sine = op.sines + op.length[n] * op.turned;
  for (int64_t i = 0; i < op.turned; i++) {
    const float first = to[i], second = to[op.turned + i];
    to[i] = first * cosine[i] - second * sine[i];
    to[op.turned + i] = second * cosine[i] + first * sine[i];
  }
}

template <class W>
W* cache_of(void* const* caches, const DecodeAttention& op, int64_t n, int64_t kv, int64_t position) {
  return static_cast<W*>(caches[n]) + (kv * op.room[n] + position) * op.d;
}

template <class W>
void attend(const DecodeAttention& op, int64_t n, int64_t first_head, int64_t heads, float* row, float* memory) {
  const int64_t kv = first_head / (op.H / op.K), last = op.length[n];
  const int64_t first = op.window >= 0 && last > op.window ? last - op.window : 0, seen = last - first + 1;
  float *query = memory, *result = query + heads * op.d, *one = result + heads * op.d, *scores = one + op.d;
  const float scale = 1 / std::sqrt(float(op.d));
  for (int64_t h = 0; h < heads; h++) {
    ready_head(op, n, 0, first_head + h, row, one);
    for (int64_t i = 0; i < op.d; i++) one[i] *= scale;
    few_rows::arrange<W>(query + h * op.d, one, op.d);
  }
  few_rows::dots_of(cache_of<W>(op.keys, op, n, kv, first), seen, query, heads, op.d, op.d, scores, heads);
  std::memset(result, 0, heads * op.d * sizeof(float));
  for (int64_t h = 0; h < heads; h++) {
    const float slope = op.slopes == nullptr ? 0 : op.slopes[first_head + h];
    float largest = -INFINITY;
    for (int64_t p = 0; p < seen; p++) {
      float& score = scores[p * heads + h];
      score -= slope * float(seen - 1 - p);
      largest = score > largest ? score : largest;
    }
    for (int64_t p = 0; p < seen; p++) scores[p * heads + h] -= largest;
  }
  const int64_t all_scores = seen * heads;
  for (int64_t i = 0; i < all_scores; i += LANES<float>) put(scores + i, exp_(take(scores + i, all_scores - i)), all_scores - i);
  for (int64_t h = 0; h < heads; h++) {
    float sum = 0;
    for (int64_t p = 0; p < seen; p++) sum += scores[p * heads + h];
    for (int64_t p = 0; p < seen; p++) scores[p * heads + h] /= sum;
  }
  few_rows::add_rows_of(cache_of<W>(op.values, op, n, kv, first), seen, op.d, scores, heads, result, heads, op.d);
  for (int64_t h = 0; h < heads; h++) few_rows::restore<W>(op.y + (n * op.H + first_head + h) * op.d, result + h * op.d, op.d);
}

template <class W>
void run(const DecodeAttention& op) {
  const int64_t group = op.H / op.K, heads = op.N * op.K >= op.threads ? group : 1;
  int64_t longest = 0;
  for (int64_t n = 0; n < op.N; n++) longest = op.length[n] + 1 > longest ? op.length[n] + 1 : longest;
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
  {
    float* row = scratch<float, 75>(op.H * op.d + 2 * heads * op.d + op.d + longest * heads);
    float* memory = row + op.H * op.d;
    const Part caches = part_of(op.N * op.K, 1, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t task = caches.first; task < caches.end; task++) {
      const int64_t n = task / op.K, kv = task % op.K;
      ready_head(op, n, 1, kv, row, memory);
      copy(cache_of<W>(op.keys, op, n, kv, op.length[n]), static_cast<const float*>(memory), op.d);
      copy(cache_of<W>(op.values, op, n, kv, op.length[n]), head_of(op, n, 2, kv), op.d);
    }
#pragma omp barrier
    const Part tasks = part_of(op.N * op.H / heads, 1, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t task = tasks.first; task < tasks.end; task++) attend<W>(op, task * heads / op.H, task * heads % op.H, heads, row, memory);
  }
}

}  // namespace

void decode_attention(const DecodeAttention& op) { Dtype(op.format) == Dtype::bfloat16 ? run<bf16>(op) : run<float>(op); }

}  // namespace NEOX_ISA
