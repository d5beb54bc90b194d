// RMSNorm (Zhang and Sennrich, 2019) on a CPU: each row is read once from memory, forward and backward.
//
//   y = scale * n,  n = x * inverse;   dx = inverse * (g - n * mean(g * n)) with g = grad * scale;   dscale = sum over rows of grad * n
//
// Rows are cut into at most BLOCKS blocks, whatever the number of threads. Each block sums its part of dscale, and the parts are added in order.
#include <cmath>

#include "op.h"

#include "../include/numbers.h"
#include "../include/threads.h"

namespace NEOX_ISA {
namespace {

constexpr int64_t BLOCKS = 64, WIDTH = LANES<float>;

float lanes_sum(Vec<float> x) {
  float sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += x[i];
  return sum;
}

template <class T>
float square_sum(const T* x, int64_t dim) {
  Vec<float> sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH)
    NEOX_UNROLL for (int part = 0; part < 4; part++) {
      const Vec<float> v = load_wide(x + d + part * WIDTH);
      sums[part] += v * v;
    }
  for (; d + WIDTH <= dim; d += WIDTH) {
    const Vec<float> v = load_wide(x + d);
    sums[0] += v * v;
  }
  float rest = 0;
  for (; d < dim; d++) rest += widen(x[d]) * widen(x[d]);
  return lanes_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// n in the format of the model, as the definition rounds it before it is scaled.
inline Vec<float> rounded(const float*, Vec<float> n) { return n; }
inline Vec<float> rounded(const bf16*, Vec<float> n) {
  const Words bits = reinterpret_cast<Words>(n);
  const Vec<float> even = reinterpret_cast<Vec<float>>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  return n != n ? n : even;
}

template <class T>
void forward_row(const RmsNormForward& op, int64_t row) {
  const RmsNorm& norm = op.norm;
  const T* x = static_cast<const T*>(norm.x) + row * norm.dim;
  const T* scale = static_cast<const T*>(norm.scale) + row % norm.groups * norm.dim;
  T* y = static_cast<T*>(op.y) + row * norm.dim;
  const float inverse = 1 / std::sqrt(square_sum(x, norm.dim) / float(norm.dim) + float(op.epsilon));
  norm.inverse[row] = inverse;
  int64_t d = 0;
  for (; d + WIDTH <= norm.dim; d += WIDTH) store_narrow(y + d, load_wide(scale + d) * rounded(x, load_wide(x + d) * inverse));
  for (; d < norm.dim; d++) y[d] = convert<T>(widen(scale[d]) * widen(convert<T>(widen(x[d]) * inverse)));
}

template <class T>
void backward_row(const RmsNormBackward& op, int64_t row, float* grad_scale) {
  const RmsNorm& norm = op.norm;
  const T* x = static_cast<const T*>(norm.x) + row * norm.dim;
  const T* scale = static_cast<const T*>(norm.scale) + row % norm.groups * norm.dim;
  const T* grad = static_cast<const T*>(op.grad) + row * norm.dim;
  T* grad_x = static_cast<T*>(op.grad_x) + row * norm.dim;
  float* sums = grad_scale + row % norm.groups * norm.dim;
  const float inverse = norm.inverse[row];
  Vec<float> products = {};
  float rest = 0;
  int64_t d = 0;
  for (; d + WIDTH <= norm.dim; d += WIDTH) {
    const Vec<float> along = load_wide(grad + d) * (load_wide(x + d) * inverse);
    store(sums + d, load(sums + d) + along);
    products += along * load_wide(scale + d);
  }
  for (; d < norm.dim; d++) {
    const float along = widen(grad[d]) * (widen(x[d]) * inverse);
    sums[d] += along;
    rest += along * widen(scale[d]);
  }
  const float share = (lanes_sum(products) + rest) / float(norm.dim) * inverse;
  for (d = 0; d + WIDTH <= norm.dim; d += WIDTH)
    store_narrow(grad_x + d, inverse * (load_wide(grad + d) * load_wide(scale + d) - load_wide(x + d) * share));
  for (; d < norm.dim; d++) grad_x[d] = convert<T>(inverse * (widen(grad[d]) * widen(scale[d]) - widen(x[d]) * share));
}

template <class T>
void run_forward(const RmsNormForward& op) {
#pragma omp parallel for num_threads(op.norm.threads) schedule(static) if (op.norm.threads > 1)
  for (int64_t row = 0; row < op.norm.rows; row++) forward_row<T>(op, row);
}

template <class T>
void run_backward(const RmsNormBackward& op) {
  const RmsNorm& norm = op.norm;
  const int64_t size = norm.groups * norm.dim, per_block = norm.rows / BLOCKS + 1, blocks = (norm.rows + per_block - 1) / per_block;
  const Buffer<float> parts = allocate<float>(blocks * size);
  T* grad_scale = static_cast<T*>(op.grad_scale);
#pragma omp parallel num_threads(norm.threads) if (norm.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      float* part = parts.get() + b * size;
      clear(part, size);
      const int64_t end = (b + 1) * per_block;
      for (int64_t row = b * per_block; row < (end < norm.rows ? end : norm.rows); row++) backward_row<T>(op, row, part);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; i++) {
      float sum = 0;
      for (int64_t b = 0; b < blocks; b++) sum += parts[b * size + i];
      grad_scale[i] = convert<T>(sum);
    }
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& op) { op.norm.is_bf16 ? run_forward<bf16>(op) : run_forward<float>(op); }

void rms_norm_backward(const RmsNormBackward& op) { op.norm.is_bf16 ? run_backward<bf16>(op) : run_backward<float>(op); }

}  // namespace NEOX_ISA
