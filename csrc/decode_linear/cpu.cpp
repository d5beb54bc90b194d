// A linear layer for a few rows: every thread prepares all rows for itself and multiplies them with its rows of the matrix, which is read once.
#include <omp.h>

#include "op.h"

#include "../include/decode_input.h"
#include "../include/threads.h"

namespace NEOX_ISA {
namespace {

constexpr int64_t GRAIN = 16, AT_ONCE = 64;

template <class W>
void run(const DecodeLinear& op) {
#pragma omp parallel num_threads(op.threads) if (op.threads > 1)
  {
    const few_rows::Part part = few_rows::part_of(op.O, GRAIN, omp_get_thread_num(), omp_get_num_threads());
    const int64_t width = few_rows::row_width<W>(op.K);
    float* memory = scratch<float, 70>(op.N * width + op.K + AT_ONCE * op.N);
    float *x = memory, *row = memory + op.N * width, *sums = row + op.K;
    for (int64_t n = 0; n < op.N && part.first < part.end; n++) {
      prepare_row(op.input, op.x + n * input_width(op.input, op.K), op.K, row);
      few_rows::arrange<W>(x + n * width, row, op.K);
    }
    for (int64_t o = part.first; o < part.end; o += AT_ONCE) {
      const int64_t here = part.end - o < AT_ONCE ? part.end - o : AT_ONCE;
      few_rows::dots_of(row_of<W>(op.matrix, o, op.K), here, x, op.N, width, op.K, sums, op.N);
      for (int64_t n = 0; n < op.N; n++) {
        float* y = op.y + n * op.O + o;
        for (int64_t i = 0; i < here; i++) {
          float sum = sums[i * op.N + n];
          if (op.matrix.scale != nullptr) sum *= op.matrix.scale[o + i];
          if (op.bias != nullptr) sum += op.bias[o + i];
          y[i] = op.add ? y[i] + sum : sum;
        }
      }
    }
  }
}

}  // namespace

void decode_linear(const DecodeLinear& op) {
  with_format(op.matrix.format, [&](auto* format) { run<std::remove_const_t<std::remove_pointer_t<decltype(format)>>>(op); });
}

}  // namespace NEOX_ISA
