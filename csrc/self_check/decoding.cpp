// Decoding's operations in one set and in another, for weights in the format of the pair and in int8.
#include <cmath>

#include "../include/processor.h"
#include "arrays.h"

namespace self_check {
namespace {

constexpr double BOUND = 1e-5;  // rows are float, whatever the format of the weights
// The hidden rows of int8 experts are rounded to 16 bits. Where one lies between two steps, the last bit of its float decides, and two sets may differ
// by a step of 1/32767 of the row's largest number.
constexpr double BOUND_OF_STEPS = 1e-4;

// A matrix in the format, or in int8 with a scale for each row.
struct Weights {
  Array numbers, scale;
  std::vector<int8_t> bytes;
  bool whole;

  Weights(Dtype dtype, bool int8, int64_t rows, int64_t columns) : whole(int8) {
    if (!int8) {
      numbers = Array::random(dtype, rows * columns, 0.3);
      return;
    }
    scale = Array::random(Dtype::float32, rows, 0.01);
    for (int64_t i = 0; i < rows * columns; i++) bytes.push_back(int8_t(int64_t(random_bits() % 255) - 127));
  }
  DecodeMatrix matrix(Dtype dtype) const {
    if (whole) return {bytes.data(), static_cast<const float*>(scale.at()), INT8};
    return {numbers.at(), nullptr, int(dtype)};
  }
};

const float* floats(const Array& a) { return static_cast<const float*>(a.at()); }

void linear(const InstructionSet& right, const InstructionSet& ours, const Format& f, bool int8, int64_t K, int64_t N, Tally& tally) {
  constexpr int64_t O = 70;
  const Weights weights(f.dtype, int8, O, K);
  const Array x = Array::random(Dtype::float32, N * K, 1), norm = Array::random(Dtype::float32, K, 1), bias = Array::random(Dtype::float32, O, 1);
  const auto results = [&](const InstructionSet& set) {
    Array y(Dtype::float32, N * O);
    set.decode_linear({weights.matrix(f.dtype), O, K, floats(bias), {1, floats(norm), nullptr, 1e-5, 0}, floats(x), static_cast<float*>(y.at()), N, false, 1});
    return y;
  };
  compare(results(right), results(ours), BOUND, std::string("decode_linear ") + ours.name + (int8 ? " int8" : "") + " K=" + std::to_string(K), tally);
}

// Gated experts with LoREs on the up-projection, two of five experts for each row.
void experts(const InstructionSet& right, const InstructionSet& ours, const Format& f, bool int8, int64_t N, Tally& tally) {
  constexpr int64_t E = 5, K = 2, D = 40, F = 50, M = 3, Q = 6;
  const Weights up(f.dtype, int8, E * F, D), gate(f.dtype, int8, E * F, D), down(f.dtype, int8, E * F, D), a(f.dtype, int8, E * M * Q, D), b(f.dtype, int8, E * M * Q, F);
  const Array router = Array::random(Dtype::float32, E * D, 1), lore_router = Array::random(Dtype::float32, E * M * D, 1);
  const Array x = Array::random(Dtype::float32, N * D, 1), norm = Array::random(Dtype::float32, D, 1);
  const auto results = [&](const InstructionSet& set) {
    Array y(Dtype::float32, N * D), weight(Dtype::float32, N * K);
    std::vector<int64_t> expert(size_t(N * K)), lore(size_t(N * K));
    DecodeExperts op{};
    op.input = {1, floats(norm), nullptr, 1e-5, 0};
    op.router = {router.at(), nullptr, int(Dtype::float32)}, op.choice = {E, K, false, true, 1, nullptr};
    op.E = E, op.D = D, op.F = F, op.M = M, op.Q = Q;
    op.lore_router = {lore_router.at(), nullptr, int(Dtype::float32)}, op.lore_choice = {M, 1, false, false, 1, nullptr};
    op.up = {up.matrix(f.dtype), {}, nullptr, a.matrix(f.dtype), b.matrix(f.dtype)};
    op.gate = {gate.matrix(f.dtype), {}, nullptr, {}, {}}, op.down = {down.matrix(f.dtype), {}, nullptr, {}, {}};
    op.activation = 4;
    op.x = floats(x), op.residual = floats(x), op.y = static_cast<float*>(y.at()), op.N = N, op.choose = op.compute = true;
    op.expert = expert.data(), op.weight = static_cast<float*>(weight.at()), op.lore = lore.data(), op.threads = 1;
    set.decode_experts(op);
    return std::vector<Array>{y, weight};
  };
  const std::vector<Array> wanted = results(right), found = results(ours);
  for (size_t i = 0; i < wanted.size(); i++)
    compare(wanted[i], found[i], int8 ? BOUND_OF_STEPS : BOUND, std::string("decode_experts ") + ours.name + (int8 ? " int8" : "") + ": result " + std::to_string(i), tally);
}

void attention(const InstructionSet& right, const InstructionSet& ours, const Format& f, int64_t length, Tally& tally) {
  constexpr int64_t H = 4, G = 2, D = 20, ROOM = 80, TURNED = 6;
  const Array fused = Array::random(Dtype::float32, (H + 2 * G) * D, 1), turns = Array::random(Dtype::float32, 2 * ROOM * TURNED, 1);
  const Array keys = Array::random(f.dtype, G * ROOM * D, 1), values = Array::random(f.dtype, G * ROOM * D, 1);
  const auto results = [&](const InstructionSet& set) {
    Array y(Dtype::float32, H * D), k = keys, v = values;
    void *const key = k.at(), *const value = v.at();
    const int64_t room = ROOM;
    DecodeAttention op{};
    op.H = H, op.K = G, op.d = D, op.cosines = floats(turns), op.sines = floats(turns) + ROOM * TURNED, op.turned = TURNED, op.window = -1;
    op.format = int(f.dtype), op.fused = floats(fused), op.y = static_cast<float*>(y.at()), op.N = 1, op.keys = &key, op.values = &value;
    op.length = &length, op.room = &room, op.threads = 1;
    set.decode_attention(op);
    return std::vector<Array>{y, k, v};
  };
  const std::vector<Array> wanted = results(right), found = results(ours);
  for (size_t i = 0; i < wanted.size(); i++)
    compare(wanted[i], found[i], f.bound, std::string("decode_attention ") + ours.name + ": result " + std::to_string(i), tally);
}

}  // namespace

void decoding(const InstructionSet& right, const InstructionSet& ours, const Format& f, Tally& tally) {
  if (f.dtype == Dtype::float64) return;
  for (const bool int8 : {false, true}) {
    for (const int64_t N : {1, 3})
      for (const int64_t columns : {7, 64, 101}) linear(right, ours, f, int8, columns, N, tally);
    for (const int64_t N : {1, 4}) experts(right, ours, f, int8, N, tally);
  }
  for (const int64_t length : {0, 61}) attention(right, ours, f, length, tally);
}

}  // namespace self_check
