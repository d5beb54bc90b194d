// The index builders, compiled. What they compute is defined in megatron/data/builders/reference.py, and tests/data/test_builders.py compares the two.
//
// Shapes: N documents of the data file; P positions in a shuffled order of documents; R rows = samples + 1; D data sets; I samples; K samples begun.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr int64_t kLargestInt32 = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse_too_few(int64_t tokens, int64_t rows, int64_t seq_length) {
    throw std::invalid_argument(std::to_string(tokens) + " tokens are too few for " + std::to_string(rows) + " rows every " +
                                std::to_string(seq_length) + " tokens");
}

// Walks over the documents once; `begin` counts the tokens before the one at `position`.
template <typename Index>
py::array cut_into(const Array<int32_t>& sizes_N, const Array<int32_t>& order_P, int64_t seq_length, int64_t rows) {
    Array<Index> result({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(2)});
    Index* out = result.mutable_data();
    const int32_t* sizes = sizes_N.data();
    const int32_t* order = order_P.data();
    const int64_t documents = sizes_N.size(), positions = order_P.size();
    {
        py::gil_scoped_release release;
        int64_t position = 0, begin = 0, token = 0;
        for (int64_t row = 0; row < rows; ++row, token += seq_length) {
            for (;; ++position) {
                if (position == positions) refuse_too_few(begin, rows, seq_length);
                const int32_t document = order[position];
                if (document < 0 || document >= documents) throw std::out_of_range("document " + std::to_string(document) + " is not in the file");
                if (begin + sizes[document] > token) break;
                begin += sizes[document];
            }
            out[2 * row] = static_cast<Index>(position);
            out[2 * row + 1] = static_cast<Index>(token - begin);
        }
        out[0] = out[1] = 0;  // the first sample begins with the first document even when that one is empty
    }
    return std::move(result);
}

py::array cut_samples(const Array<int32_t>& sizes_N, const Array<int32_t>& order_P, int64_t seq_length, int64_t rows) {
    if (seq_length < 1 || rows < 1 || seq_length > std::numeric_limits<int64_t>::max() / rows) {
        throw std::invalid_argument(std::to_string(rows) + " rows every " + std::to_string(seq_length) + " tokens cannot be counted in 64 bits");
    }
    const bool small = std::max<int64_t>(order_P.size(), rows) < kLargestInt32;
    return small ? cut_into<int32_t>(sizes_N, order_P, seq_length, rows) : cut_into<int64_t>(sizes_N, order_P, seq_length, rows);
}

std::pair<Array<int64_t>, int64_t> pack_documents(const Array<int32_t>& sizes_P, int64_t filled, int64_t limit) {
    std::vector<int64_t> starts_K;
    {
        py::gil_scoped_release release;
        const int32_t* sizes = sizes_P.data();
        const int64_t positions = sizes_P.size();
        for (int64_t position = 0; position < positions; ++position) {
            if (filled == 0 || filled + sizes[position] > limit) {
                starts_K.push_back(position);
                filled = 0;
            }
            filled += sizes[position];
        }
    }
    return {Array<int64_t>(static_cast<py::ssize_t>(starts_K.size()), starts_K.data()), filled};
}

std::pair<Array<uint8_t>, Array<int64_t>> blend(const Array<double>& weights_D, int64_t size) {
    const int64_t sets = weights_D.size();
    if (sets < 1 || sets > 256 || size < 0) throw std::invalid_argument("1 to 256 weights and a size that is not negative are needed");
    Array<uint8_t> chosen(static_cast<py::ssize_t>(size));
    Array<int64_t> sample(static_cast<py::ssize_t>(size));
    uint8_t* chosen_I = chosen.mutable_data();
    int64_t* sample_I = sample.mutable_data();
    {
        py::gil_scoped_release release;
        const double* weights = weights_D.data();
        std::vector<int64_t> counts_D(static_cast<size_t>(sets), 0);
        for (int64_t i = 0; i < size; ++i) {
            const double drawn = static_cast<double>(std::max<int64_t>(i, 1));
            int64_t best = 0;
            double best_lag = weights[0] * drawn - static_cast<double>(counts_D[0]);
            for (int64_t d = 1; d < sets; ++d) {
                const double lag = weights[d] * drawn - static_cast<double>(counts_D[d]);
                if (lag > best_lag) best_lag = lag, best = d;
            }
            chosen_I[i] = static_cast<uint8_t>(best);
            sample_I[i] = counts_D[best]++;
        }
    }
    return {chosen, sample};
}

}  // namespace

PYBIND11_MODULE(compiled, module) {
    module.doc() = "The index builders in C++; see reference.py for what they compute.";
    module.attr("source_digest") = SOURCE_DIGEST;
    module.def("cut_samples", &cut_samples, py::arg("sizes_N"), py::arg("document_index_P"), py::arg("seq_length"), py::arg("rows"));
    module.def("pack_documents", &pack_documents, py::arg("sizes_P"), py::arg("filled"), py::arg("limit"));
    module.def("blend", &blend, py::arg("weights_D"), py::arg("size"));
}
