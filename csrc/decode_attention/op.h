// Attention of single new tokens, each of a text of its own, to the texts' caches. Shapes as in megatron/kernels/decode/__init__.py.
#pragma once

#include <cstdint>

#include "../decode_linear/op.h"

struct DecodeAttention {
  int64_t H, K, d;                // query heads, key/value heads, numbers of a head
  DecodeInput query_norm, key_norm;
  bool norm_all_heads;            // over all heads together, else over each
  const float *cosines, *sines;   // [positions, turned]; null: nothing is turned
  int64_t turned;                 // pairs of numbers
  const float* slopes;            // [H]: -slope * distance is added to the scores; null: nothing is
  int64_t window;                 // positions before its own that a token sees; -1: all
  int format;                     // of the caches
  // of a call
  const float* fused;             // [N, (H + 2K) * d]
  float* y;                       // [N, H * d]
  int64_t N;
  void* const *keys;              // [N]: each [K, room, d]
  void* const *values;
  const int64_t *length, *room;   // [N]: tokens in each cache, and how many fit
  int threads;
};
