// Adam (Kingma and Ba, 2015; decoupled weight decay: Loshchilov and Hutter, 2019) over all tensors, and the norm of all gradients, in one pass each.
//
// Tensors are cut into blocks of a fixed size. Sums of blocks are added in the order of the blocks, so the norm does not depend on the number of
// threads. Squares are summed in double: they cannot overflow there.
#include <cmath>

#include "op.h"

#include "../include/numbers.h"
#include "../include/threads.h"

namespace NEOX_ISA {
namespace {

using namespace ::adam;

constexpr int64_t BLOCK = 16384;
constexpr int64_t WIDTH = LANES<float>;

struct Block {
  int64_t tensor, begin, count;
};

int64_t blocks_of(const Gradients& gradients) {
  int64_t total = 0;
  for (int64_t t = 0; t < gradients.count; t++) total += (gradients.sizes[t] + BLOCK - 1) / BLOCK;
  return total;
}

Buffer<Block> cut(const Gradients& gradients, int64_t total) {
  Buffer<Block> blocks = allocate<Block>(total);
  for (int64_t t = 0, b = 0; t < gradients.count; t++)
    for (int64_t begin = 0; begin < gradients.sizes[t]; begin += BLOCK) {
      const int64_t left = gradients.sizes[t] - begin;
      blocks[b++] = {t, begin, left < BLOCK ? left : BLOCK};
    }
  return blocks;
}

template <class T>
T* place(int64_t address, int64_t begin) {
  return reinterpret_cast<T*>(address) + begin;
}

// Four sums of whole vectors, so that additions do not wait for each other; then what is left, one number at a time.
template <class T>
double square_sum(const T* x, int64_t count) {
  constexpr int64_t STEP = LANES<double>;
  typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  Vec<double> sums[4] = {};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= count; i += 2 * WIDTH)
    NEOX_UNROLL for (int part = 0; part < 2; part++) {
      const Vec<float> v = load_wide(x + i + part * WIDTH);
      Half halves[2];
      std::memcpy(halves, &v, sizeof v);
      NEOX_UNROLL for (int h = 0; h < 2; h++) {
        const Vec<double> wide = __builtin_convertvector(halves[h], Vec<double>);
        sums[2 * part + h] += wide * wide;
      }
    }
  double total = 0;
  for (; i < count; i++) total += double(widen(x[i])) * double(widen(x[i]));
  const Vec<double> all_sums = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int64_t lane = 0; lane < STEP; lane++) total += all_sums[lane];
  return total;
}

// The settings of one tensor as the vectors need them.
struct Factors {
  float scale, keep, decay, beta1, beta2, rest1, rest2, correction, epsilon, rate;

  Factors(const Settings& s, double step)
      : scale(float(1 / s.divisor)),
        keep(float(s.decoupled ? 1 - s.rate * s.weight_decay : 1)),
        decay(float(s.decoupled ? 0 : s.weight_decay)),
        beta1(float(s.beta1)),
        beta2(float(s.beta2)),
        rest1(float(1 - s.beta1)),
        rest2(float(1 - s.beta2)),
        correction(float(1 / std::sqrt(1 - std::pow(s.beta2, step)))),
        epsilon(float(s.epsilon)),
        rate(float(s.rate / (1 - std::pow(s.beta1, step)))) {}
};

inline Vec<float> root(Vec<float> x) {
  Vec<float> y;
  NEOX_UNROLL for (int i = 0; i < WIDTH; i++) y[i] = std::sqrt(x[i]);
  return y;
}
inline float root(float x) { return std::sqrt(x); }

template <class X>
inline void step(const Factors& f, X gradient, X& weight, X& average, X& square) {
  weight *= f.keep;
  const X g = gradient * f.scale + f.decay * weight;
  average += f.rest1 * (g - average);
  square = f.beta2 * square + f.rest2 * g * g;
  weight -= f.rate * average / (root(square) * f.correction + f.epsilon);
}

template <class T>
void update_block(const Update& op, const Block& block) {
  const Factors f(op.settings, op.steps[block.tensor]);
  const T* gradients = place<const T>(op.gradients.addresses[block.tensor], block.begin);
  float* weights = place<float>(op.weights[block.tensor], block.begin);
  float* averages = place<float>(op.averages[block.tensor], block.begin);
  float* squares = place<float>(op.squares[block.tensor], block.begin);
  bf16* rounded = op.rounded[block.tensor] ? place<bf16>(op.rounded[block.tensor], block.begin) : nullptr;
  int64_t i = 0;
  for (; i + WIDTH <= block.count; i += WIDTH) {
    Vec<float> w = load(weights + i), a = load(averages + i), s = load(squares + i);
    step(f, load_wide(gradients + i), w, a, s);
    store(weights + i, w);
    store(averages + i, a);
    store(squares + i, s);
    if (rounded) store_narrow(rounded + i, w);
  }
  for (; i < block.count; i++) {
    step(f, widen(gradients[i]), weights[i], averages[i], squares[i]);
    if (rounded) rounded[i] = narrow(weights[i]);
  }
}

}  // namespace

double gradient_norm(const Gradients& gradients, int threads) {
  const int64_t total = blocks_of(gradients);
  const Buffer<Block> blocks = cut(gradients, total);
  const Buffer<double> sums = allocate<double>(total);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < total; b++) {
    const auto [tensor, begin, count] = blocks[b];
    const int64_t address = gradients.addresses[tensor];
    sums[b] =
        gradients.is_bf16[tensor] ? square_sum(place<const bf16>(address, begin), count) : square_sum(place<const float>(address, begin), count);
  }
  double sum = 0;
  for (int64_t b = 0; b < total; b++) sum += sums[b];
  return std::sqrt(sum);
}

void adam_update(const Update& op, int threads) {
  const int64_t total = blocks_of(op.gradients);
  const Buffer<Block> blocks = cut(op.gradients, total);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t b = 0; b < total; b++) {
    op.gradients.is_bf16[blocks[b].tensor] ? update_block<bf16>(op, blocks[b]) : update_block<float>(op, blocks[b]);
  }
}

}  // namespace NEOX_ISA
