// What a warp does together: exchange, ldmatrix, mma; and cp.async. The layouts are those of the PTX manual, chapter "Warp-level matrix
// instructions" (fragments of mma.m16n8k16 with 16-bit numbers, ldmatrix with .m8n8.b16).
#include <algorithm>
#include <cstring>

#include "../include/cuda_numbers.cuh"
#include "runtime.hpp"

namespace emulation {

void exchange(const char* operation, uint64_t value, uint64_t (&all)[32]) {
    warp_operation(operation, &value, all, [](Thread* lanes) {
        uint64_t values[32];
        for (int i = 0; i < 32; ++i) values[i] = *static_cast<const uint64_t*>(lanes[i].in);
        for (int i = 0; i < 32; ++i) std::memcpy(lanes[i].out, values, sizeof values);
    });
}

namespace {
struct LoadMatrices {
    const void* row;
    int count;
    bool transposed;
};

struct Factors {
    const uint32_t *a, *b;
    Number number;
};

/// Matrix j has its eight rows at the addresses of the lanes 8j to 8j+7. A lane gets the numbers 2(lane%4) and the next of row lane/4.
void load(Thread* lanes) {
    auto given = [&](int i) { return static_cast<const LoadMatrices*>(lanes[i].in); };
    for (int matrix = 0; matrix < given(0)->count; ++matrix) {
        uint16_t numbers[8][8];
        for (int row = 0; row < 8; ++row) std::memcpy(numbers[row], given(matrix * 8 + row)->row, 16);
        for (int i = 0; i < 32; ++i) {
            int row = i / 4, column = i % 4 * 2;
            uint32_t low = given(0)->transposed ? numbers[column][row] : numbers[row][column];
            uint32_t high = given(0)->transposed ? numbers[column + 1][row] : numbers[row][column + 1];
            static_cast<uint32_t*>(lanes[i].out)[matrix] = low | high << 16;
        }
    }
}

float number(const Factors& factors, uint32_t pair, int which) {
    auto bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
    return factors.number == Number::bfloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

void multiply(Thread* lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 32; ++i) {
        auto& factors = *static_cast<const Factors*>(lanes[i].in);
        auto* sums = static_cast<const float*>(lanes[i].out);
        int group = i / 4, inner = i % 4 * 2;
        for (int half = 0; half < 2; ++half) {
            for (int reg = 0; reg < 4; ++reg) a[group + reg % 2 * 8][inner + reg / 2 * 8 + half] = number(factors, factors.a[reg], half);
            for (int reg = 0; reg < 2; ++reg) b[inner + reg * 8 + half][group] = number(factors, factors.b[reg], half);
            for (int row = 0; row < 2; ++row) d[group + row * 8][inner + half] = sums[row * 2 + half];
        }
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int i = 0; i < 32; ++i) {
        auto* sums = static_cast<float*>(lanes[i].out);
        for (int reg = 0; reg < 4; ++reg) sums[reg] = d[i / 4 + reg / 2 * 8][i % 4 * 2 + reg % 2];
    }
}

Shadow* shared_shadow(const void* address, size_t bytes) {
    for (auto& shadow : shared_shadows)
        if (shadow.contains(address, bytes)) return &shadow;
    return nullptr;
}
}  // namespace

void load_matrices(int count, bool transposed, const void* row, uint32_t* registers) {
    if (lane() < static_cast<unsigned>(count) * 8) {
        access(row, 16, Kind::read, false);
        if (shared_shadow(row, 16) == nullptr) give_up("ldmatrix: " + describe(now()) + " gives an address outside of shared memory");
    }
    LoadMatrices given{row, count, transposed};
    warp_operation("ldmatrix", &given, registers, load);
}

void multiply_accumulate(Number number, float* d, const uint32_t* a, const uint32_t* b) {
    Factors factors{a, b, number};
    warp_operation("mma", &factors, d, multiply);
}

void copy_async(void* shared, const void* global, int bytes_there) {
    auto to = static_cast<char*>(shared);
    Shadow* shadow = shared_shadow(shared, 16);
    if (shadow == nullptr) give_up("cp.async: " + describe(now()) + " writes outside of shared memory");
    if (bytes_there < 0 || bytes_there > 16 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
        give_up("cp.async: " + describe(now()) + " copies " + std::to_string(bytes_there) + " bytes from an address that is no multiple of 16, or too many");
    if (bytes_there > 0) access(global, static_cast<size_t>(bytes_there), Kind::read, false);
    access(shared, 16, Kind::write, false);
    PendingCopy copy{to, 16, {}};
    std::memcpy(copy.data, global, static_cast<size_t>(bytes_there));
    std::memset(to, 0xff, 16);
    shadow->set_arriving(to, 16, true);
    auto& groups = launch_now.current->groups;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back(copy);
}

void commit_async() {
    auto& groups = launch_now.current->groups;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}

void wait_async(int groups_left) {
    auto& groups = launch_now.current->groups;
    while (static_cast<int>(groups.size()) - 1 > groups_left) {
        for (auto& copy : groups.front()) {
            shared_shadow(copy.to, 16)->set_arriving(copy.to, 16, false);
            access(copy.to, 16, Kind::write, false);
            std::memcpy(copy.to, copy.data, 16);
        }
        groups.pop_front();
    }
}

}  // namespace emulation
