// Numbers to compute with, and the comparison of two results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../include/dtype.h"
#include "self_check.h"

namespace self_check {

using Counts = std::vector<int64_t>;

inline uint32_t random_bits() {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

// Numbers in one format, with bytes behind them that no operation may change.
class Array {
 public:
  Array() = default;
  Array(Dtype given, int64_t numbers) : dtype(given), n(numbers), bytes(n * width() + GUARD, 0xcd) {}
  static Array random(Dtype dtype, int64_t n, double scale) {
    Array out(dtype, n);
    for (int64_t i = 0; i < n; i++) out.put(i, scale * (double(random_bits()) / (1 << 23) - 1));
    return out;
  }
  void* at() const { return bytes.empty() ? nullptr : const_cast<unsigned char*>(bytes.data()); }
  double get(int64_t i) const {
    double wide = 0;
    float single = 0;
    if (dtype == Dtype::float64) return std::memcpy(&wide, &bytes[i * 8], 8), wide;
    uint32_t bits = 0;
    if (dtype == Dtype::bfloat16) std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes[i * 2], 2);
    else std::memcpy(&bits, &bytes[i * 4], 4);
    std::memcpy(&single, &bits, 4);
    return single;
  }
  bool guarded() const {
    for (size_t i = bytes.size() - GUARD; !bytes.empty() && i < bytes.size(); i++)
      if (bytes[i] != 0xcd) return false;
    return true;
  }
  int64_t size() const { return n; }

 private:
  static constexpr size_t GUARD = 256;
  Dtype dtype = Dtype::float32;
  int64_t n = 0;
  std::vector<unsigned char> bytes;

  int width() const { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
  void put(int64_t i, double x) {
    const float single = float(x);
    if (dtype == Dtype::float64) std::memcpy(&bytes[i * 8], &x, 8);
    else if (dtype == Dtype::float32) std::memcpy(&bytes[i * 4], &single, 4);
    else std::memcpy(&bytes[i * 2], reinterpret_cast<const char*>(&single) + 2, 2);
  }
};

// Adds the largest difference, relative to the largest number, to what is known.
void compare(const Array& right, const Array& ours, double bound, const std::string& what, Tally& tally);

}  // namespace self_check
