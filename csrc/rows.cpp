// The row operations of kernels/rows_torch.py for CPUs: same names, same results.
//
// A similarity chunk [R, n] is processed row by row, frame by frame. One frame of one row is a few hundred floats and
// stays in the L1 cache while it is scaled, searched for its maximum, exponentiated and summed. Threads take fixed
// blocks of rows and share nothing that is written: the result does not depend on timing. rows_loops.h has the
// vectorised loops.
//
// Exponentials are always of `s - (something >= s)`. Each frame has two softmaxes, one over all tokens and one over
// those of known value; they differ by a factor `exp(lse - known_lse)`, so one exponential serves both unless that
// factor leaves the range of float (`kFar`): then the known tokens are all negligible in the first softmax and get
// exponentials of their own.

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "arrays.h"
#include "rows_loops.h"

namespace {

constexpr float kFar = 40.0f;  // exp(40) and its inverse are well inside the range of float
constexpr float kNormFloor = 1e-12f;

// ---- RowChunk, MatchRuns, FrameStatistics and TermWeights of kernels/chunk.py, as pointers

struct Chunk {
    const float* similarity;
    int64_t rows, tokens;
    const float* row_scale;
    const float* token_scale;
    float inverse_temperature;
    const int64_t* own_token;
    bool exclude_own;
    const int64_t* frame_offsets;
    int64_t frames;
    const float* values = nullptr;
    int64_t width = 0;
    std::vector<float> known;  // 1 or 0, as numbers: they multiply

    Chunk(const Array<float>& similarity_, const Array<float>& row_scale_, const Array<float>& token_scale_,
          float temperature, const Array<int64_t>& own_token_, bool exclude_own_, const Array<int64_t>& frame_offsets_,
          const std::optional<Array<float>>& values_, const std::optional<Array<bool>>& known_)
        : similarity(similarity_.data()),
          rows(similarity_.shape(0)),
          tokens(similarity_.shape(1)),
          row_scale(row_scale_.data()),
          token_scale(token_scale_.data()),
          inverse_temperature(1.0f / temperature),
          own_token(own_token_.data()),
          exclude_own(exclude_own_),
          frame_offsets(frame_offsets_.data()),
          frames(frame_offsets_.shape(0) - 1) {
        if (values_) {
            values = values_->data();
            width = values_->shape(1);
            known.assign(tokens, 1.0f);
            if (known_)
                for (int64_t k = 0; k < tokens; ++k) known[k] = known_->data()[k] ? 1.0f : 0.0f;
        }
    }

    const float* row(int64_t r) const { return similarity + r * tokens; }
    float factor(int64_t r) const { return row_scale[r] * inverse_temperature; }
    // The place of the row's own token within [start, end), or -1.
    int64_t own_in(int64_t r, int64_t start, int64_t end) const {
        const int64_t own = own_token[r];
        return exclude_own && own >= start && own < end ? own - start : -1;
    }
};

struct MatchRuns {
    const int64_t* start = nullptr;
    int64_t longest = 0;
    const int64_t* order = nullptr;
    const int64_t* target = nullptr;
    const float* depth = nullptr;
    const bool* has_depth = nullptr;
    int64_t first_token = 0;

    bool any(int64_t r, int64_t f) const { return begin(r, f) < end(r, f); }
    int64_t begin(int64_t r, int64_t f) const { return start[r * longest + f]; }
    int64_t end(int64_t r, int64_t f) const { return start[r * longest + f + 1]; }
};

struct Statistics {
    float* lse;
    float* known_lse;
    float* expected;
    int64_t* best;
    float* peak;
};

// Numbers [1, M], perhaps expanded: any stride.
struct Strided {
    const char* data = nullptr;
    int64_t stride = 0;
    explicit Strided(const std::optional<py::array_t<float>>& a) {
        if (!a) return;
        data = reinterpret_cast<const char*>(a->data());
        stride = a->strides(0);
    }
    float operator[](int64_t m) const { return *reinterpret_cast<const float*>(data + m * stride); }
};

// ---- frame_statistics

void statistics_of_frame(const Chunk& c, int64_t r, int64_t f, bool with_values, float* s, Statistics out) {
    const int64_t start = c.frame_offsets[f], end = c.frame_offsets[f + 1], n = end - start;
    const int64_t cell = r * c.frames + f;
    out.lse[cell] = out.known_lse[cell] = out.peak[cell] = kNone;
    out.best[cell] = -1;
    for (int64_t v = 0; v < c.width; ++v) out.expected[cell * c.width + v] = 0.0f;
    const int64_t own = c.own_in(r, start, end);
    if (n == 0 || (n == 1 && own >= 0)) return;

    scale_row(c.row(r) + start, c.token_scale + start, c.factor(r), n, s);
    if (own >= 0) s[own] = kNone;
    const float m = largest(s, n);
    const int64_t at = first_equal(s, m, n);
    out.peak[cell] = m;
    out.best[cell] = at < n ? start + at : -1;
    const float* known = c.known.data() + start;
    const float known_m = with_values ? largest_known(s, known, n) : kNone;
    if (known_m > kNone && m - known_m >= kFar) {  // exponentials of their own, before `s` is overwritten
        std::vector<float> among(s, s + n);
        for (int64_t k = 0; k < n; ++k) among[k] = known[k] != 0.0f ? among[k] : kNone;
        const float sum = exponentiate(among.data(), known_m, n);
        out.known_lse[cell] = known_m + std::log(sum);
        for (int64_t v = 0; v < c.width; ++v)
            out.expected[cell * c.width + v] =
                dot3(among.data(), known, c.values + start * c.width + v, n, c.width) / sum;
    }
    out.lse[cell] = m + std::log(exponentiate(s, m, n));
    if (known_m > kNone && !(m - known_m >= kFar)) {
        const float sum = dot(s, known, n);
        out.known_lse[cell] = m + std::log(sum);
        for (int64_t v = 0; v < c.width; ++v)
            out.expected[cell * c.width + v] = dot3(s, known, c.values + start * c.width + v, n, c.width) / sum;
    }
}

void blank(const Chunk& c, int64_t cell, Statistics out) {
    out.lse[cell] = out.known_lse[cell] = out.peak[cell] = kNone;
    out.best[cell] = -1;
    for (int64_t v = 0; v < c.width; ++v) out.expected[cell * c.width + v] = 0.0f;
}

int64_t longest_frame(const Chunk& c) {
    int64_t longest = 0;
    for (int64_t f = 0; f < c.frames; ++f) longest = std::max(longest, c.frame_offsets[f + 1] - c.frame_offsets[f]);
    return longest;
}

void frame_statistics(const Chunk& c, const std::optional<Array<int64_t>>& run_start, int64_t longest, bool every_frame,
                      Array<float> lse, Array<float> known_lse, Array<float> expected, Array<int64_t> best,
                      Array<float> peak, int threads) {
    MatchRuns runs;
    if (run_start) {
        runs.start = run_start->data();
        runs.longest = longest;
    }
    const Statistics out{lse.mutable_data(), known_lse.mutable_data(), expected.mutable_data(), best.mutable_data(),
                         peak.mutable_data()};
    py::gil_scoped_release release;
    const int64_t widest = longest_frame(c);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scratch(widest);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < c.rows; ++r)
            for (int64_t f = 0; f < c.frames; ++f) {
                const bool matched = !runs.start || runs.any(r, f);
                if (matched || every_frame)
                    statistics_of_frame(c, r, f, matched && c.values, scratch.data(), out);
                else
                    blank(c, r * c.frames + f, out);
            }
    }
}

// ---- loss_terms

struct Terms {
    float* corr;
    float* depth;
    int64_t* best;
    float* confidence;
};

// log sum exp of a row's frames; -inf if all are empty.
float log_sum_exp_of(const float* lse, int64_t frames) {
    const float m = largest(lse, frames);
    if (!(m > kNone)) return m;
    return m + std::log(sum_exp(lse, m, frames));
}

void terms_of_row(const Chunk& c, int64_t r, const MatchRuns& runs, Statistics st, Terms terms,
                  const Strided& corr_weight, const Strided& depth_weight, bool sequence_negatives, float eps,
                  float* upstream_lse, float* upstream_expected) {
    const float* lse = st.lse + r * c.frames;
    const bool weighted = corr_weight.data != nullptr;
    const float sequence_lse = sequence_negatives ? log_sum_exp_of(lse, c.frames) : 0.0f;
    float row_weight = 0.0f;  // of all correspondence terms of this row
    for (int64_t f = 0; f < c.frames; ++f) {
        const int64_t cell = r * c.frames + f;
        float frame_weight = 0.0f, depth_slope = 0.0f;
        for (int64_t at = runs.begin(r, f); at < runs.end(r, f); ++at) {
            const int64_t match = runs.order[at], column = runs.target[at] - runs.first_token;
            const float positive = c.row(r)[column] * (c.token_scale[column] * c.factor(r));
            terms.corr[match] = (sequence_negatives ? sequence_lse : lse[f]) - positive;
            terms.best[match] = st.best[cell] + runs.first_token;
            terms.confidence[match] = exp_of_nonpositive(st.peak[cell] - lse[f]);
            const float depth = runs.depth[at], expected = c.width ? st.expected[cell * c.width] : 0.0f;
            const float total = depth + expected + eps, distance = depth - expected;
            terms.depth[match] = runs.has_depth[at] ? std::fabs(distance) / total : 0.0f;
            if (!weighted) continue;
            frame_weight += corr_weight[match];
            if (runs.has_depth[at]) {
                const float sign = distance > 0.0f ? 1.0f : distance < 0.0f ? -1.0f : distance;  // NaN stays NaN
                depth_slope += depth_weight[match] * (-sign / total - std::fabs(distance) / (total * total));
            }
        }
        if (!weighted) continue;
        upstream_lse[cell] = frame_weight;
        if (c.width) upstream_expected[cell * c.width] = depth_slope;
        row_weight += frame_weight;
    }
    if (weighted && sequence_negatives) weighted_exp(lse, sequence_lse, row_weight, c.frames, upstream_lse + r * c.frames);
}

void loss_terms(const Chunk& c, Array<float> lse, Array<float> known_lse, Array<float> expected, Array<int64_t> best,
                Array<float> peak, const Array<int64_t>& run_start, int64_t longest, const Array<int64_t>& order,
                const Array<int64_t>& target, const Array<float>& depth, const Array<bool>& has_depth, int64_t first_token,
                Array<float> corr_out, Array<float> depth_out, Array<int64_t> best_out, Array<float> confidence_out,
                const std::optional<py::array_t<float>>& corr_weights,
                const std::optional<py::array_t<float>>& depth_weights, bool sequence_negatives, float eps,
                std::optional<Array<float>> upstream_lse, std::optional<Array<float>> upstream_expected, int threads) {
    const MatchRuns runs{run_start.data(), longest,       order.data(), target.data(),
                         depth.data(),     has_depth.data(), first_token};
    const Statistics statistics{lse.mutable_data(), known_lse.mutable_data(), expected.mutable_data(),
                                best.mutable_data(), peak.mutable_data()};
    const Terms terms{corr_out.mutable_data(), depth_out.mutable_data(), best_out.mutable_data(),
                      confidence_out.mutable_data()};
    const Strided corr_weight(corr_weights), depth_weight(depth_weights);
    float* to_lse = upstream_lse ? upstream_lse->mutable_data() : nullptr;
    float* to_expected = upstream_expected ? upstream_expected->mutable_data() : nullptr;
    py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < c.rows; ++r)
        terms_of_row(c, r, runs, statistics, terms, corr_weight, depth_weight, sequence_negatives, eps, to_lse,
                     to_expected);
}

// ---- similarity_gradient

// dL/dx over one frame of one row, as floats in `g`. `deviation` is scratch: sum_v b_v (v_kv - E_v) of each token.
void gradient_of_frame(const Chunk& c, int64_t r, int64_t f, const Statistics& st, const float* upstream_lse,
                       const float* upstream_expected, float* deviation, float* g) {
    const int64_t start = c.frame_offsets[f], end = c.frame_offsets[f + 1], n = end - start;
    const int64_t cell = r * c.frames + f;
    const float a = upstream_lse[cell], *b = upstream_expected + cell * c.width;
    float offset = 0.0f;
    bool valued = false;  // some expected value has a gradient
    for (int64_t v = 0; v < c.width; ++v) {
        valued = valued || b[v] != 0.0f;
        offset += b[v] * st.expected[cell * c.width + v];
    }
    const float lse = st.lse[cell], known_lse = st.known_lse[cell], factor = c.factor(r);
    const float* x = c.row(r) + start;
    const float* scale = c.token_scale + start;
    valued = valued && known_lse != kNone;
    if ((a == 0.0f && !valued) || lse == kNone) {
        std::fill(g, g + n, 0.0f);
        return;
    }
    if (!valued) {
        softmax_gradient(x, scale, factor, lse, a, n, g);
    } else {
        const float* known = c.known.data() + start;
        deviation_of_values(c.values + start * c.width, b, offset, n, c.width, deviation);
        if (lse - known_lse < kFar) {
            valued_gradient(x, scale, factor, lse, a, std::exp(lse - known_lse), known, deviation, n, g);
        } else {
            softmax_gradient(x, scale, factor, lse, a, n, g);
            add_known_gradient(x, scale, factor, known_lse, known, deviation, n, g);
        }
    }
    const int64_t own = c.own_in(r, start, end);
    if (own >= 0) g[own] = 0.0f;
}

template <typename E>
void gradient_rows(const Chunk& c, const Statistics& st, const float* upstream_lse, const float* upstream_expected,
                   const MatchRuns& runs, const Strided& corr_weight, E* out, int threads) {
    const int64_t widest = longest_frame(c);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> deviation(widest), g(widest);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < c.rows; ++r)
            for (int64_t f = 0; f < c.frames; ++f) {
                const int64_t start = c.frame_offsets[f], n = c.frame_offsets[f + 1] - start;
                gradient_of_frame(c, r, f, st, upstream_lse, upstream_expected, deviation.data(), g.data());
                if (runs.start && corr_weight.data)
                    for (int64_t at = runs.begin(r, f); at < runs.end(r, f); ++at) {
                        const int64_t column = runs.target[at] - runs.first_token;
                        g[column - start] -= corr_weight[runs.order[at]] * c.token_scale[column] * c.factor(r);
                    }
                store_row(g.data(), n, out + r * c.tokens + start);
            }
    }
}

void similarity_gradient(const Chunk& c, Array<float> lse, Array<float> known_lse, Array<float> expected,
                         const Array<float>& upstream_lse, const Array<float>& upstream_expected,
                         const std::optional<Array<int64_t>>& run_start, int64_t longest,
                         const std::optional<Array<int64_t>>& order, const std::optional<Array<int64_t>>& target,
                         int64_t first_token, const std::optional<py::array_t<float>>& corr_weights, py::array out,
                         int threads) {
    MatchRuns runs;
    if (run_start) {
        runs = MatchRuns{run_start->data(), longest, order->data(), target->data(), nullptr, nullptr, first_token};
    }
    const Statistics statistics{lse.mutable_data(), known_lse.mutable_data(), expected.mutable_data(), nullptr,
                                nullptr};
    const Strided corr_weight(corr_weights);
    const float *a = upstream_lse.data(), *b = upstream_expected.data();
    void* to = out.mutable_data();
    const bool wide = out.itemsize() == 4;
    py::gil_scoped_release release;
    if (wide)
        gradient_rows(c, statistics, a, b, runs, corr_weight, static_cast<float*>(to), threads);
    else
        gradient_rows(c, statistics, a, b, runs, corr_weight, static_cast<Bfloat16*>(to), threads);
}

// ---- inverse_norms, project_gradient: embeddings [n, D] with contiguous rows, float32 or the bits of bfloat16

void inverse_norms(const py::array& embeddings, Array<float> out, int threads) {
    const int64_t n = embeddings.shape(0), width = embeddings.shape(1);
    const bool wide = embeddings.itemsize() == 4;
    float* to = out.mutable_data();
    const char* base = static_cast<const char*>(embeddings.data());
    const int64_t stride = embeddings.strides(0);
    py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < n; ++r) {
        const char* row = base + r * stride;
        const float square = wide ? squared_norm(reinterpret_cast<const float*>(row), width)
                                  : squared_norm(reinterpret_cast<const Bfloat16*>(row), width);
        const float norm = std::sqrt(square);
        to[r] = 1.0f / (norm < kNormFloor ? kNormFloor : norm);
    }
}

void project_gradient(const py::array& gradient, const py::array& embeddings, const Array<float>& inverse_norm,
                      py::array out, int threads) {
    const int64_t n = embeddings.shape(0), width = embeddings.shape(1);
    const bool wide = embeddings.itemsize() == 4;
    const float* scale = inverse_norm.data();
    const char *u_base = static_cast<const char*>(gradient.data()),
               *e_base = static_cast<const char*>(embeddings.data());
    char* out_base = static_cast<char*>(out.mutable_data());
    const int64_t u_stride = gradient.strides(0), e_stride = embeddings.strides(0), out_stride = out.strides(0);
    py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < n; ++r) {
        const float* u = reinterpret_cast<const float*>(u_base + r * u_stride);
        const float square = scale[r] >= 1.0f / kNormFloor ? 0.0f : scale[r] * scale[r];
        if (wide) {
            const float* e = reinterpret_cast<const float*>(e_base + r * e_stride);
            subtract_multiple(e, u, square * dot_with(e, u, width), width,
                              reinterpret_cast<float*>(out_base + r * out_stride));
        } else {
            const Bfloat16* e = reinterpret_cast<const Bfloat16*>(e_base + r * e_stride);
            subtract_multiple(e, u, square * dot_with(e, u, width), width,
                              reinterpret_cast<Bfloat16*>(out_base + r * out_stride));
        }
    }
}

}  // namespace

PYBIND11_MODULE(_rows, module) {
    module.doc() =
        "Row operations over a chunk of similarities; gasp_fast.kernels.rows_torch defines what they compute.";
    const auto array = [](const char* name) { return py::arg(name).noconvert(); };  // a copy of an output would be lost
    py::class_<Chunk>(module, "Chunk")
        .def(py::init<const Array<float>&, const Array<float>&, const Array<float>&, float, const Array<int64_t>&, bool,
                      const Array<int64_t>&, const std::optional<Array<float>>&, const std::optional<Array<bool>>&>(),
             array("similarity"), array("row_scale"), array("token_scale"), py::arg("temperature"), array("own_token"),
             py::arg("exclude_own"), array("frame_offsets"), array("values"), array("known"),
             // The arrays are borrowed: they must outlive the chunk.
             py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 6>(),
             py::keep_alive<1, 8>(), py::keep_alive<1, 9>());
    module.def("frame_statistics", &frame_statistics, py::arg("chunk"), array("run_start"), py::arg("longest"),
               py::arg("every_frame"), array("lse"), array("known_lse"), array("expected"), array("best"),
               array("peak"), py::arg("threads"));
    module.def("loss_terms", &loss_terms, py::arg("chunk"), array("lse"), array("known_lse"), array("expected"),
               array("best"), array("peak"), array("run_start"), py::arg("longest"), array("order"), array("target"),
               array("depth"), array("has_depth"), py::arg("first_token"), array("corr"), array("depth_term"),
               array("best_token"), array("confidence"), array("corr_weights"), array("depth_weights"),
               py::arg("sequence_negatives"), py::arg("eps"), array("upstream_lse"), array("upstream_expected"),
               py::arg("threads"));
    module.def("similarity_gradient", &similarity_gradient, py::arg("chunk"), array("lse"), array("known_lse"),
               array("expected"), array("upstream_lse"), array("upstream_expected"), array("run_start"),
               py::arg("longest"), array("order"), array("target"), py::arg("first_token"), array("corr_weights"),
               array("out"), py::arg("threads"));
    module.def("inverse_norms", &inverse_norms, array("embeddings"), array("out"), py::arg("threads"));
    module.def("project_gradient", &project_gradient, array("gradient"), array("embeddings"), array("inverse_norm"),
               array("out"), py::arg("threads"));
}
