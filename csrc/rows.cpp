// The row operations of kernels/rows_torch.py for CPUs: same names, same results.
//
// A similarity chunk [R, n] is processed row by row, frame by frame. One frame of one row is a few hundred floats and
// stays in the L1 cache. Threads take fixed blocks of rows and share nothing that is written: the result does not
// depend on timing. rows_loops.h has the vectorised loops, rows_norms.h what is done with embeddings, rows_fold.h
// what is done with the gradient before its products.
//
// Exactness of the statistics. Similarities are cosines over the temperature, so |s| <= 1 / tau. Up to `kBounded`,
// exp(s), its sum over billions of tokens and its product with any reasonable value stay far inside the range of float:
// one pass takes exp(s) as it is. Colder softmaxes take the maximum first and exponentiate what lies below it. In both
// cases `lse` is the maximum plus the log of a sum of at least 1, and the similarity of a match is rounded as the
// maximum is: the term of a match without competitors is exactly 0. Each frame has two softmaxes, one over all tokens
// and one over those of known value. One exponential serves both unless the known tokens lie so far below (`kFar`) that
// their exponentials are zero beside the maximum; then they get exponentials of their own.
//
// The row's own token, and its targets where these are ignored, are left out by similarities of minus infinity in place
// of theirs. The targets' exponentials are then added to the sums over all tokens. Nothing is ever subtracted from a
// sum, so a negative far below a target keeps all its digits.
//
// Exactness of the gradient. exp(s - lse) is 2^(y - h) times 2^(h - lse log2(e)), where h is the integer nearest to
// lse log2(e): the second factor is near 1, one for the whole frame, and no digit of `lse` is lost. The two softmaxes
// share exponentials as above.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "arrays.h"
#include "rows_chunk.h"
#include "rows_fold.h"
#include "rows_loops.h"
#include "rows_norms.h"
#include "rows_terms.h"

namespace {

constexpr float kFar = 40.0f;  // exp(40) = 2e17 and its inverse are well inside the range of float

// ---- frame_statistics

// Statistics of the tokens of one frame that are not left out.
struct Found {
    float lse = kNone, known_lse = kNone;
    float peak = kNone;  // in units of log 2
    int64_t best = -1;   // column in the frame
    float* expected;     // [width]

    void add(float s, float y, int64_t column, bool known, const float* values, int64_t width) {
        if (y > peak || (y == peak && column < best)) peak = y, best = column;
        lse = log_add(lse, s);
        if (!known) return;
        const float before = known_lse;
        known_lse = log_add(before, s);
        if (known_lse == kNone) return;
        const float share = std::exp(before - known_lse), own_share = std::exp(s - known_lse);
        for (int64_t v = 0; v < width; ++v) expected[v] = share * expected[v] + own_share * values[v];
    }
    static float log_add(float a, float b) {
        const float low = a < b ? a : b, high = a < b ? b : a;
        return high == kNone ? low : high + std::log1p(std::exp(low - high));  // either may be NaN
    }
};

// The place of the maximum if there is one: all tokens may be left out, or NaN.
float or_zero(float peak) { return peak == kNone ? 0.0f : peak; }

// The natural logarithms of `2^y` and of `sum 2^y`; the same where the sum is 1.
float natural(float y) { return float(y * kLn2); }
float log_of(float y, float sum) { return float(y * kLn2 + std::log(sum)); }

// One pass: exp(s) itself. `values` are at most one number per token.
void bounded_statistics(const Chunk& c, int64_t r, int64_t start, int64_t n, bool with_values, Found& found) {
    const float *x = c.row(r) + start, *scale = c.token_scale + start;
    const Sums sums = with_values ? valued_sums_of(x, scale, c.log2_factor(r), &c.known[start], &c.values[start], n)
                                  : sums_of(x, scale, c.log2_factor(r), n);
    const float reference = or_zero(sums.peak), unit = exp2_of(-reference);
    found.peak = sums.peak;
    found.lse = log_of(reference, sums.all * unit);
    if (!with_values || sums.known == 0.0f) return;
    found.known_lse = log_of(reference, sums.known * unit);
    found.expected[0] = sums.moment / sums.known;
}

// The maximum first; `y` and `among` are scratch.
void exact_statistics(const Chunk& c, int64_t r, int64_t start, int64_t n, bool with_values, float* y, float* among,
                      Found& found) {
    scale_row(c.row(r) + start, c.token_scale + start, c.log2_factor(r), n, y);
    const float* known = c.known + start;
    const float peak = largest(y, n), known_peak = with_values ? largest_known(y, known, n) : peak;
    const bool far = (peak - known_peak) * kLn2 >= kFar;
    const float reference = or_zero(peak), known_reference = far ? or_zero(known_peak) : reference;
    float known_sum = 0.0f;
    if (far) known_sum = exponentiate_known(y, known, known_reference, n, among);  // before `y` is overwritten
    found.peak = peak;
    found.lse = log_of(reference, exponentiate(y, reference, n));
    if (!with_values) return;
    if (!far) known_sum = dot(y, known, n, 1);
    if (known_sum == 0.0f) return;
    found.known_lse = log_of(known_reference, known_sum);
    for (int64_t v = 0; v < c.width; ++v)
        found.expected[v] = dot(far ? among : y, &c.values[start * c.width + v], n, c.width) / known_sum;
}

struct Scratch {
    std::vector<float> first, second;  // numbers of a frame
    std::vector<float> left_out;       // similarities of the ignored targets of a frame
    explicit Scratch(int64_t widest) : first(widest), second(widest) {}
};

// One frame of one row; `matches` are given if any of the row's is in this frame.
void statistics_of_frame(const Chunk& c, int64_t r, int64_t f, const Matches* matches, bool with_values,
                         Scratch& scratch, Found& found, float& negative_lse) {
    const int64_t start = c.frame_offsets[f], n = c.frame_offsets[f + 1] - start, first_token = c.first_token + start;
    if (n == 0) return;
    float* x = c.row(r) + start;
    const float *scale = c.token_scale + start, factor = c.log2_factor(r);
    const int64_t own = c.own_in(r, start, start + n);
    if (own >= 0) x[own] = kNone;
    scratch.left_out.clear();
    if (matches)
        matches->for_each_target(r, f, first_token, n, [&](int64_t column, int64_t first, int64_t last) {
            const float y = x[column] * (scale[column] * factor);
            std::fill(matches->positive + first, matches->positive + last, natural(y));
            if (!matches->ignored) return;
            scratch.left_out.push_back(x[column]);
            x[column] = kNone;
        });
    if (c.bounded() && (!with_values || c.width == 1))
        bounded_statistics(c, r, start, n, with_values, found);
    else
        exact_statistics(c, r, start, n, with_values, scratch.first.data(), scratch.second.data(), found);
    if (found.peak > kNone) {
        const int64_t at = position_of(x, scale, factor, found.peak, n);
        found.best = at < n ? at : -1;
    }
    negative_lse = found.lse;
    if (scratch.left_out.empty()) return;
    const float* next = scratch.left_out.data();
    matches->for_each_target(r, f, first_token, n, [&](int64_t column, int64_t first, int64_t) {
        x[column] = *next++;
        const bool known = with_values && c.known[start + column] != 0.0f;
        found.add(matches->positive[first], x[column] * (scale[column] * factor), column, known,
                  c.values + (start + column) * c.width, c.width);
    });
}

void frame_statistics(const Chunk& c, const Matches* matches, const Statistics& out, int threads) {
    py::gil_scoped_release release;
    const int64_t widest = c.longest_frame();
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(widest);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < c.rows; ++r)
            for (int64_t f = 0; f < c.frames; ++f) {
                const int64_t cell = r * c.frames + f;
                const bool matched = !matches || matches->any(r, f);
                Found found;
                float negative_lse = kNone;
                found.expected = out.expected + cell * c.width;
                std::fill(found.expected, found.expected + c.width, 0.0f);
                if (matched || matches->every_frame)
                    statistics_of_frame(c, r, f, matched ? matches : nullptr, matched && c.width > 0, scratch, found,
                                        negative_lse);
                out.lse[cell] = found.lse;
                out.known_lse[cell] = found.known_lse;
                out.peak[cell] = natural(found.peak);
                out.best[cell] = found.best < 0 ? -1 : c.first_token + c.frame_offsets[f] + found.best;
                out.negative_lse[cell] = negative_lse;
            }
    }
}

// ---- similarity_gradient

// exp(-lse) = 2^-whole factor
struct InversePower {
    float whole, factor;
    explicit InversePower(float lse)
        : whole(std::nearbyint(lse * kLog2E)), factor(std::exp(float(whole * kLn2 - lse))) {}
};

// The gradients of one cell's statistics, and the softmaxes that they apply to.
struct CellGradient {
    float a, lse;        // a = 0 where lse is that of an empty sum
    const float* b;      // [width]
    float known_lse;
    const float* expected;
    int64_t width;
    bool valued = false;  // some expected value has a gradient

    CellGradient(const Statistics& st, const float* upstream_lse, const float* upstream_expected, int64_t cell,
                 int64_t width_)
        : a(st.negative_lse[cell] == kNone ? 0.0f : upstream_lse[cell]),
          lse(st.negative_lse[cell]),
          b(upstream_expected + cell * width_),
          known_lse(st.known_lse[cell]),
          expected(st.expected + cell * width_),
          width(width_) {
        for (int64_t v = 0; v < width; ++v) valued = valued || (b[v] != 0.0f && known_lse != kNone);
    }

    bool is_zero() const { return a == 0.0f && !valued; }
    // dL/ds of a token of similarity `s`; `negative`: it belongs to the sum of `lse`.
    float of_token(float s, bool negative, bool known, const float* values) const {
        float slope = negative && a != 0.0f ? a * std::exp(s - lse) : 0.0f;
        if (!valued || !known) return slope;
        float deviation = 0.0f;
        for (int64_t v = 0; v < width; ++v) deviation += b[v] * (values[v] - expected[v]);
        return slope + deviation * std::exp(s - known_lse);
    }
};

// dL/dx of one frame of one row, except where the own token and ignored targets are.
template <typename E>
void gradient_of_negatives(const Chunk& c, const CellGradient& cell, int64_t r, int64_t start, int64_t n,
                           float* deviation, E* g) {
    const float *x = c.row(r) + start, *scale = c.token_scale + start, factor = c.log2_factor(r);
    if (cell.is_zero()) {
        std::memset(g, 0, n * sizeof(E));
        return;
    }
    const InversePower power(cell.lse == kNone ? 0.0f : cell.lse);
    const float unit = float(kLn2);  // loops take `f` in units of log 2
    Slopes at{cell.a * power.factor * unit, power.whole, 0.0f, 0.0f, 0.0f};
    if (!cell.valued) return softmax_gradient(x, scale, factor, at, n, g);
    const float *known = &c.known[start], *value = &c.values[start * c.width];
    at.b = cell.b[0];
    at.expected = cell.expected[0];
    if (c.width > 1) {
        deviation_of_values(value, cell.b, cell.expected, n, c.width, deviation);
        value = deviation;
        at.b = 1.0f;
        at.expected = 0.0f;
    }
    if (std::fabs(cell.lse - cell.known_lse) < kFar) {
        at.b *= std::exp(cell.lse - cell.known_lse) * power.factor * unit;
        return valued_gradient(x, scale, factor, at, known, value, n, g);
    }
    const InversePower known_power(cell.known_lse);
    at.b *= known_power.factor * unit;
    at.known_lse = known_power.whole;
    if (cell.a == 0.0f) at.lse = -kNone;
    distant_gradient(x, scale, factor, at, known, value, n, g);
}

template <typename E>
void gradient_of_frame(const Chunk& c, const CellGradient& cell, int64_t r, int64_t f, const Matches* matches,
                       float* deviation, E* g) {
    const int64_t start = c.frame_offsets[f], n = c.frame_offsets[f + 1] - start;
    if (n == 0) return;
    gradient_of_negatives(c, cell, r, start, n, deviation, g);
    const int64_t own = c.own_in(r, start, start + n);
    if (own >= 0) put(0.0f, g + own);
    if (!matches || !(matches->ignored || matches->pull)) return;
    matches->for_each_target(r, f, c.first_token + start, n, [&](int64_t column, int64_t first, int64_t last) {
        const int64_t token = start + column;
        const bool known = cell.valued && c.known[token] != 0.0f;
        float slope = cell.of_token(matches->positive[first], !matches->ignored, known, &c.values[token * c.width]);
        for (int64_t at = first; at < last && matches->pull; ++at) slope += matches->pull[at];
        put(slope * (c.token_scale[token] * c.factor(r)), g + column);
    });
}

template <typename E>
void gradient_rows(const Chunk& c, const Statistics& st, const float* upstream_lse, const float* upstream_expected,
                   const Matches* matches, E* out, int threads) {
    const int64_t widest = c.longest_frame();
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> deviation(c.width > 1 ? widest : 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < c.rows; ++r)
            for (int64_t f = 0; f < c.frames; ++f) {
                const CellGradient cell(st, upstream_lse, upstream_expected, r * c.frames + f, c.width);
                gradient_of_frame(c, cell, r, f, matches, deviation.data(), out + r * c.tokens + c.frame_offsets[f]);
            }
    }
}

void similarity_gradient(const Chunk& c, const Statistics& statistics, const Array<float>& upstream_lse,
                         const Array<float>& upstream_expected, const Matches* matches, py::array out, int threads) {
    const float *a = upstream_lse.data(), *b = upstream_expected.data();
    void* to = out.mutable_data();
    const bool wide = out.itemsize() == 4;
    py::gil_scoped_release release;
    if (wide)
        gradient_rows(c, statistics, a, b, matches, static_cast<float*>(to), threads);
    else
        gradient_rows(c, statistics, a, b, matches, static_cast<Bfloat16*>(to), threads);
}

}  // namespace

PYBIND11_MODULE(_rows, module) {
    module.doc() =
        "Row operations over a chunk of similarities; gasp_fast.kernels.rows_torch defines what they compute.";
    const auto array = [](const char* name) { return py::arg(name).noconvert(); };  // a copy of an output would be lost
    py::class_<Chunk>(module, "Chunk")
        .def(py::init<Array<float>, const Array<float>&, const Array<float>&, float, const Array<int64_t>&, bool,
                      int64_t, const Array<int64_t>&, int64_t, const std::optional<Array<float>>&,
                      const std::optional<Array<float>>&>(),
             array("similarity"), array("row_scale"), array("token_scale"), py::arg("temperature"), array("row_token"),
             py::arg("exclude_own"), py::arg("first_token"), array("frame_offsets"), py::arg("first_column"),
             array("values"), array("known"));
    py::class_<Matches>(module, "Matches")
        .def(py::init<const Array<int64_t>&, int64_t, const Array<int64_t>&, const Array<int64_t>&, const Array<float>&,
                      const Array<bool>&, Array<float>, std::optional<Array<float>>, bool, bool, float>(),
             array("start"), py::arg("longest"), array("order"), array("target"), array("depth"), array("has_depth"),
             array("positive"), array("pull"), py::arg("every_frame"), py::arg("ignored"), py::arg("eps"));
    py::class_<Statistics>(module, "Statistics")
        .def(py::init<Array<float>, Array<float>, Array<float>, Array<int64_t>, Array<float>, Array<float>>(),
             array("lse"), array("known_lse"), array("expected"), array("best"), array("peak"), array("negative_lse"));
    module.def("frame_statistics", &frame_statistics, py::arg("chunk"), py::arg("matches").none(true),
               py::arg("statistics"), py::arg("threads"));
    module.def("loss_terms", &loss_terms, py::arg("statistics"), py::arg("matches"), array("corr"), array("depth"),
               array("best"), array("confidence"), array("corr_weights"), array("depth_weights"),
               array("upstream_lse"), array("upstream_expected"), py::arg("threads"));
    module.def("similarity_gradient", &similarity_gradient, py::arg("chunk"), py::arg("statistics"),
               array("upstream_lse"), array("upstream_expected"), py::arg("matches").none(true), array("out"),
               py::arg("threads"));
    module.def("inverse_norms", &inverse_norms, array("embeddings"), array("out"), py::arg("threads"));
    module.def("project_gradient", &project_gradient, array("gradient"), array("embeddings"), array("inverse_norm"),
               array("out"), py::arg("of_unit"), array("added"), array("of_token"), array("place"),
               py::arg("threads"));
    module.def("fold", &fold, array("x"), array("own"), array("others"), array("rest"), py::arg("threads"));
}
