// Norms of embeddings and the Jacobian of the normalisation, for rows of float32 or of the bits of bfloat16.
//
// Each row is read from memory once: it stays in the cache between the sum over it and its result. The sums carry
// `omp simd`; see rows_loops.h.

#pragma once

#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "rows_loops.h"

namespace {

constexpr float kNormFloor = 1e-12f;

#define DEFINE_SUMS(E)                                                                                           \
    FOR_EACH_CPU float squared_norm(const E* e, int64_t width) {                                                 \
        float sum = 0.0f;                                                                                        \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t d = 0; d < width; ++d) {                             \
            const float x = as_float(e[d]);                                                                      \
            sum += x * x;                                                                                        \
        }                                                                                                        \
        return sum;                                                                                              \
    }                                                                                                            \
    FOR_EACH_CPU float dot_with(const E* e, const float* u, int64_t width) {                                     \
        float sum = 0.0f;                                                                                        \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t d = 0; d < width; ++d) sum += as_float(e[d]) * u[d]; \
        return sum;                                                                                              \
    }
DEFINE_SUMS(float)
DEFINE_SUMS(Bfloat16)

FOR_EACH_CPU void add_row(const float* row, int64_t width, float* u) {
    _Pragma("omp simd") for (int64_t d = 0; d < width; ++d) u[d] += row[d];
}

// out = (u - along e) factor
#define DEFINE_TANGENT(E, O)                                                                                     \
    FOR_EACH_CPU void tangent(const E* e, const float* u, float along, float factor, int64_t width, O* out) {    \
        _Pragma("omp simd") for (int64_t d = 0; d < width; ++d)                                                  \
            put((u[d] - along * as_float(e[d])) * factor, out + d);                                              \
    }
DEFINE_TANGENT(float, float)
DEFINE_TANGENT(float, Bfloat16)
DEFINE_TANGENT(Bfloat16, float)
DEFINE_TANGENT(Bfloat16, Bfloat16)

// Rows of adjacent numbers, at any distance from each other.
template <typename E>
struct DenseRows {
    char* base;
    int64_t stride;
    explicit DenseRows(const py::array& a)
        : base(static_cast<char*>(const_cast<void*>(a.data()))), stride(a.strides(0)) {}
    E* operator[](int64_t r) const { return reinterpret_cast<E*>(base + r * stride); }
};

template <typename E>
void norms_of_rows(const DenseRows<E>& embeddings, int64_t n, int64_t width, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < n; ++r) {
        const float norm = std::sqrt(squared_norm(embeddings[r], width));
        out[r] = 1.0f / (norm < kNormFloor ? kNormFloor : norm);
    }
}

// `out` may be `gradient`. With `of_unit`, the gradient is that of the normalised embeddings. `added` and `of_token` are
// those of AddedRows in kernels/chunk.py, or null: these rows are added to `gradient` in its own memory. `place` has the
// token of each row of `gradient`, or is null: they are the same.
template <typename E, typename O>
void project_rows(const DenseRows<float>& gradient, const DenseRows<E>& embeddings, const float* inverse_norm,
                  const DenseRows<O>& out, const float* added, const int64_t* of_token, const int64_t* place, int64_t n,
                  int64_t width, bool of_unit, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < n; ++r) {
        if (added && of_token[r] >= 0) add_row(added + of_token[r] * width, width, gradient[r]);
        const int64_t token = place ? place[r] : r;
        const float scale = inverse_norm[token];
        const bool clamped = scale >= 1.0f / kNormFloor;
        const float along = clamped ? 0.0f : scale * (scale * dot_with(embeddings[token], gradient[r], width));
        tangent(embeddings[token], gradient[r], along, of_unit ? scale : 1.0f, width, out[token]);
    }
}

void inverse_norms(const py::array& embeddings, Array<float> out, int threads) {
    const int64_t n = embeddings.shape(0), width = embeddings.shape(1);
    const bool wide = embeddings.itemsize() == 4;
    const DenseRows<float> floats(embeddings);
    const DenseRows<Bfloat16> halves(embeddings);
    float* to = out.mutable_data();
    py::gil_scoped_release release;
    if (wide)
        norms_of_rows(floats, n, width, to, threads);
    else
        norms_of_rows(halves, n, width, to, threads);
}

template <typename E>
void project_into(const py::array& gradient, const py::array& embeddings, const float* inverse_norm, py::array& out,
                  bool of_unit, const float* added, const int64_t* of_token, const int64_t* place, int threads) {
    const int64_t n = gradient.shape(0), width = embeddings.shape(1);
    const bool wide = out.itemsize() == 4;
    const DenseRows<float> u(gradient), floats(out);
    const DenseRows<E> e(embeddings);
    const DenseRows<Bfloat16> halves(out);
    py::gil_scoped_release release;
    if (wide)
        project_rows(u, e, inverse_norm, floats, added, of_token, place, n, width, of_unit, threads);
    else
        project_rows(u, e, inverse_norm, halves, added, of_token, place, n, width, of_unit, threads);
}

void project_gradient(const py::array& gradient, const py::array& embeddings, const Array<float>& inverse_norm,
                      py::array out, bool of_unit, const std::optional<Array<float>>& added,
                      const std::optional<Array<int64_t>>& of_token, const std::optional<Array<int64_t>>& place,
                      int threads) {
    const float* rows = added ? added->data() : nullptr;
    const int64_t *row_of = of_token ? of_token->data() : nullptr, *to = place ? place->data() : nullptr;
    if (embeddings.itemsize() == 4)
        project_into<float>(gradient, embeddings, inverse_norm.data(), out, of_unit, rows, row_of, to, threads);
    else
        project_into<Bfloat16>(gradient, embeddings, inverse_norm.data(), out, of_unit, rows, row_of, to, threads);
}

}  // namespace
