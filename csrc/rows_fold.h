// Folding the gradient of the similarities, X [R, n]: what is between two rows is added, so that the gradient of the rows
// is one product; see kernels/fold_kernels.py.
//
// Threads take squares of pairs of rows. Each square and its mirror image belong to one thread, and lie in its cache.

#pragma once

#include "arrays.h"
#include "rows_loops.h"

namespace {

constexpr int64_t kSquare = 64;

// x_ij and x_ji become their sum, for rows i of one square's side and j of the other; `own` is the column of each row.
template <typename E>
void add_mirrored(E* x, int64_t pitch, const int64_t* own, int64_t first_i, int64_t last_i, int64_t first_j,
                  int64_t last_j) {
    for (int64_t i = first_i; i < last_i; ++i)
        for (int64_t j = std::max(i, first_j); j < last_j; ++j) {
            E *here = x + i * pitch + own[j], *there = x + j * pitch + own[i];
            const float total = as_float(*here) + as_float(*there);
            put(total, here);
            put(total, there);
        }
}

template <typename E>
void fold_rows(E* x, int64_t rows, int64_t pitch, const int64_t* own, const int64_t* others, int64_t left, E* rest,
               int64_t rest_pitch, int threads) {
    const int64_t squares = (rows + kSquare - 1) / kSquare;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static, 1)
        for (int64_t a = 0; a < squares; ++a)
            for (int64_t b = a; b < squares; ++b)
                add_mirrored(x, pitch, own, a * kSquare, std::min(rows, (a + 1) * kSquare), b * kSquare,
                             std::min(rows, (b + 1) * kSquare));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < left; ++c) rest[r * rest_pitch + c] = x[r * pitch + others[c]];
    }
}

void fold(py::array x, const Array<int64_t>& own, const Array<int64_t>& others, py::array rest, int threads) {
    const int64_t rows = x.shape(0), left = others.size(), size = x.itemsize();
    const int64_t pitch = x.strides(0) / size, rest_pitch = rest.strides(0) / size;
    void *from = x.mutable_data(), *to = rest.mutable_data();
    const int64_t *own_column = own.data(), *other_column = others.data();
    py::gil_scoped_release release;
    if (size == 4)
        fold_rows(static_cast<float*>(from), rows, pitch, own_column, other_column, left, static_cast<float*>(to),
                  rest_pitch, threads);
    else
        fold_rows(static_cast<Bfloat16*>(from), rows, pitch, own_column, other_column, left, static_cast<Bfloat16*>(to),
                  rest_pitch, threads);
}

}  // namespace
