// The row operations of kernels/rows_torch.py for CPUs: same names, same arguments, same numbers.
//
// Knows arrays only. A similarity chunk [R, n] is walked row by row, frame by frame; one frame of one row is a few
// hundred floats and stays in the first-level cache while it is scaled, searched for its maximum, exponentiated and
// summed. Rows are shared out among threads in fixed blocks and never meet: the result does not depend on timing.
//
// The leaf loops, and how they are vectorised: rows_loops.h.
//
// Exponentials are always of `s - (something >= s)`. Two softmaxes share each frame, one over all tokens and one over
// those of known value; they differ by a factor `exp(lse - known_lse)`, so one exponential serves both unless that
// factor leaves float range (`FAR`): then the known tokens are all negligible in the first softmax and get their own.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "rows_loops.h"

namespace py = pybind11;

namespace {

constexpr float FAR = 40.0f;
constexpr float NORM_FLOOR = 1e-12f;

template <class T> using Array = py::array_t<T, py::array::c_style>;

// ---------------------------------------------------------------------------------------------------------------
// The bundles of kernels/chunk.py, as pointers.

struct Chunk {
  const float* similarity;
  std::int64_t rows, tokens;
  const float* row_scale;
  const float* token_scale;
  float inverse_temperature;
  const std::int64_t* own_token;
  bool exclude_own;
  const std::int64_t* frame_offsets;
  std::int64_t frames;
  const float* values = nullptr;
  std::int64_t width = 0;
  std::vector<float> known;  // 1 or 0, as numbers: they multiply

  Chunk(const Array<float>& similarity_, const Array<float>& row_scale_, const Array<float>& token_scale_,
        float temperature, const Array<std::int64_t>& own_token_, bool exclude_own_,
        const Array<std::int64_t>& frame_offsets_, const std::optional<Array<float>>& values_,
        const std::optional<Array<bool>>& known_)
      : similarity(similarity_.data()), rows(similarity_.shape(0)), tokens(similarity_.shape(1)),
        row_scale(row_scale_.data()), token_scale(token_scale_.data()), inverse_temperature(1.0f / temperature),
        own_token(own_token_.data()), exclude_own(exclude_own_), frame_offsets(frame_offsets_.data()),
        frames(frame_offsets_.shape(0) - 1) {
    if (values_) {
      values = values_->data();
      width = values_->shape(1);
      known.assign(tokens, 1.0f);
      if (known_)
        for (std::int64_t k = 0; k < tokens; ++k) known[k] = known_->data()[k] ? 1.0f : 0.0f;
    }
  }

  const float* row(std::int64_t r) const { return similarity + r * tokens; }
  float factor(std::int64_t r) const { return row_scale[r] * inverse_temperature; }
  // The own token's place within [start, end), or -1.
  std::int64_t own_in(std::int64_t r, std::int64_t start, std::int64_t end) const {
    const std::int64_t own = own_token[r];
    return exclude_own && own >= start && own < end ? own - start : -1;
  }
};

struct Runs {
  const std::int64_t* start = nullptr;
  std::int64_t longest = 0;
  const std::int64_t* order = nullptr;
  const std::int64_t* target = nullptr;
  const float* depth = nullptr;
  const bool* counts = nullptr;
  std::int64_t first_token = 0;

  bool any(std::int64_t r, std::int64_t f) const { return begin(r, f) < end(r, f); }
  std::int64_t begin(std::int64_t r, std::int64_t f) const { return start[r * longest + f]; }
  std::int64_t end(std::int64_t r, std::int64_t f) const { return start[r * longest + f + 1]; }
};

struct Statistics {
  float* lse;
  float* known_lse;
  float* expected;
  std::int64_t* best;
  float* peak;
};

struct Strided {  // [1, M], perhaps expanded
  const char* data = nullptr;
  std::int64_t stride = 0;
  explicit Strided(const std::optional<py::array_t<float>>& a) {
    if (a) data = reinterpret_cast<const char*>(a->data()), stride = a->strides(0);
  }
  float operator[](std::int64_t m) const { return *reinterpret_cast<const float*>(data + m * stride); }
};

// ---------------------------------------------------------------------------------------------------------------
// frame_statistics

void statistics_of_frame(const Chunk& c, std::int64_t r, std::int64_t f, bool with_values, float* s, Statistics out) {
  const std::int64_t start = c.frame_offsets[f], end = c.frame_offsets[f + 1], n = end - start;
  const std::int64_t cell = r * c.frames + f;
  out.lse[cell] = out.known_lse[cell] = out.peak[cell] = NONE;
  out.best[cell] = -1;
  for (std::int64_t v = 0; v < c.width; ++v) out.expected[cell * c.width + v] = 0.0f;
  const std::int64_t own = c.own_in(r, start, end);
  if (n == 0 || (n == 1 && own >= 0)) return;

  scale_row(c.row(r) + start, c.token_scale + start, c.factor(r), n, s);
  if (own >= 0) s[own] = NONE;
  const float m = largest(s, n);
  const std::int64_t at = first_equal(s, m, n);
  out.peak[cell] = m;
  out.best[cell] = at < n ? start + at : -1;
  const float* known = c.known.data() + start;
  const float known_m = with_values ? largest_known(s, known, n) : NONE;
  if (known_m > NONE && m - known_m >= FAR) {  // its own exponentials, before `s` is overwritten
    std::vector<float> among(s, s + n);
    for (std::int64_t k = 0; k < n; ++k) among[k] = known[k] != 0.0f ? among[k] : NONE;
    const float sum = exponentiate(among.data(), known_m, n);
    out.known_lse[cell] = known_m + std::log(sum);
    for (std::int64_t v = 0; v < c.width; ++v)
      out.expected[cell * c.width + v] = dot3(among.data(), known, c.values + start * c.width + v, n, c.width) / sum;
  }
  out.lse[cell] = m + std::log(exponentiate(s, m, n));
  if (known_m > NONE && !(m - known_m >= FAR)) {
    const float sum = dot(s, known, n);
    out.known_lse[cell] = m + std::log(sum);
    for (std::int64_t v = 0; v < c.width; ++v)
      out.expected[cell * c.width + v] = dot3(s, known, c.values + start * c.width + v, n, c.width) / sum;
  }
}

void blank(const Chunk& c, std::int64_t cell, Statistics out) {
  out.lse[cell] = out.known_lse[cell] = out.peak[cell] = NONE;
  out.best[cell] = -1;
  for (std::int64_t v = 0; v < c.width; ++v) out.expected[cell * c.width + v] = 0.0f;
}

std::int64_t longest_frame(const Chunk& c) {
  std::int64_t longest = 0;
  for (std::int64_t f = 0; f < c.frames; ++f) longest = std::max(longest, c.frame_offsets[f + 1] - c.frame_offsets[f]);
  return longest;
}

void frame_statistics(const Chunk& c, const std::optional<Array<std::int64_t>>& run_start, std::int64_t longest,
                      bool every_frame, Array<float> lse, Array<float> known_lse, Array<float> expected,
                      Array<std::int64_t> best, Array<float> peak, int threads) {
  Runs runs;
  if (run_start) runs.start = run_start->data(), runs.longest = longest;
  const Statistics out{lse.mutable_data(), known_lse.mutable_data(), expected.mutable_data(), best.mutable_data(),
                       peak.mutable_data()};
  py::gil_scoped_release release;
  const std::int64_t widest = longest_frame(c);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(widest);
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < c.rows; ++r)
      for (std::int64_t f = 0; f < c.frames; ++f) {
        const bool matched = !runs.start || runs.any(r, f);
        if (matched || every_frame)
          statistics_of_frame(c, r, f, matched && c.values, scratch.data(), out);
        else
          blank(c, r * c.frames + f, out);
      }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// match_terms

struct Terms {
  float* corr;
  float* depth;
  std::int64_t* best;
  float* confidence;
};

// log sum exp of a row's frames; -inf if all are empty.
float whole_lse(const float* lse, std::int64_t frames) {
  const float m = largest(lse, frames);
  if (!(m > NONE)) return m;
  return m + std::log(sum_exp(lse, m, frames));
}

void terms_of_row(const Chunk& c, std::int64_t r, const Runs& runs, Statistics st, Terms terms, bool scaled,
                  const Strided& corr_scale, const Strided& depth_scale, bool sequence_negatives, float eps,
                  float* up_lse, float* up_expected) {
  const float* lse = st.lse + r * c.frames;
  const float whole = sequence_negatives ? whole_lse(lse, c.frames) : 0.0f;
  float pulled = 0.0f;  // the weight of all correspondence terms of this row
  for (std::int64_t f = 0; f < c.frames; ++f) {
    const std::int64_t cell = r * c.frames + f;
    float here = 0.0f, slope = 0.0f;
    for (std::int64_t at = runs.begin(r, f); at < runs.end(r, f); ++at) {
      const std::int64_t match = runs.order[at], column = runs.target[at] - runs.first_token;
      const float positive = c.row(r)[column] * (c.token_scale[column] * c.factor(r));
      terms.corr[match] = (sequence_negatives ? whole : lse[f]) - positive;
      terms.best[match] = st.best[cell] + runs.first_token;
      terms.confidence[match] = exp_of_nonpositive(st.peak[cell] - lse[f]);
      const float depth = runs.depth[at], expected = c.width ? st.expected[cell * c.width] : 0.0f;
      const float total = depth + expected + eps, distance = depth - expected;
      terms.depth[match] = runs.counts[at] ? std::fabs(distance) / total : 0.0f;
      if (!scaled) continue;
      here += corr_scale[match];
      if (runs.counts[at]) {
        const float sign = distance > 0.0f ? 1.0f : distance < 0.0f ? -1.0f : distance;  // NaN stays NaN
        slope += depth_scale[match] * (-sign / total - std::fabs(distance) / (total * total));
      }
    }
    if (!scaled) continue;
    up_lse[cell] = here;
    if (c.width) up_expected[cell * c.width] = slope;
    pulled += here;
  }
  if (scaled && sequence_negatives) weighted_exp(lse, whole, pulled, c.frames, up_lse + r * c.frames);
}

void match_terms(const Chunk& c, Array<float> lse, Array<float> known_lse, Array<float> expected,
                 Array<std::int64_t> best, Array<float> peak, const Array<std::int64_t>& run_start,
                 std::int64_t longest, const Array<std::int64_t>& order, const Array<std::int64_t>& target,
                 const Array<float>& depth, const Array<bool>& counts, std::int64_t first_token, Array<float> corr_out,
                 Array<float> depth_out, Array<std::int64_t> best_out, Array<float> confidence_out,
                 const std::optional<py::array_t<float>>& corr_scale,
                 const std::optional<py::array_t<float>>& depth_scale, bool sequence_negatives, float eps,
                 std::optional<Array<float>> up_lse, std::optional<Array<float>> up_expected, int threads) {
  const Runs runs{run_start.data(), longest, order.data(), target.data(), depth.data(), counts.data(), first_token};
  const Statistics statistics{lse.mutable_data(), known_lse.mutable_data(), expected.mutable_data(),
                              best.mutable_data(), peak.mutable_data()};
  const Terms terms{corr_out.mutable_data(), depth_out.mutable_data(), best_out.mutable_data(),
                    confidence_out.mutable_data()};
  const Strided corr_weight(corr_scale), depth_weight(depth_scale);
  float* pull_lse = up_lse ? up_lse->mutable_data() : nullptr;
  float* pull_expected = up_expected ? up_expected->mutable_data() : nullptr;
  py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t r = 0; r < c.rows; ++r)
    terms_of_row(c, r, runs, statistics, terms, corr_weight.data != nullptr, corr_weight, depth_weight,
                 sequence_negatives, eps, pull_lse, pull_expected);
}

// ---------------------------------------------------------------------------------------------------------------
// similarity_gradient

// dL/dx over one frame of one row, as floats in `g`.
void gradient_of_frame(const Chunk& c, std::int64_t r, std::int64_t f, const Statistics& st, const float* up_lse,
                       const float* up_expected, float* pull, float* g) {
  const std::int64_t start = c.frame_offsets[f], end = c.frame_offsets[f + 1], n = end - start;
  const std::int64_t cell = r * c.frames + f;
  const float a = up_lse[cell], *b = up_expected + cell * c.width;
  float offset = 0.0f;
  bool pulls = false;
  for (std::int64_t v = 0; v < c.width; ++v) {
    pulls = pulls || b[v] != 0.0f;
    offset += b[v] * st.expected[cell * c.width + v];
  }
  const float lse = st.lse[cell], known_lse = st.known_lse[cell], factor = c.factor(r);
  const float* x = c.row(r) + start;
  const float* scale = c.token_scale + start;
  pulls = pulls && known_lse != NONE;
  if ((a == 0.0f && !pulls) || lse == NONE) {
    std::fill(g, g + n, 0.0f);
    return;
  }
  if (!pulls) {
    softmax_gradient(x, scale, factor, lse, a, n, g);
  } else {
    const float* known = c.known.data() + start;
    pull_of_values(c.values + start * c.width, b, offset, n, c.width, pull);
    if (lse - known_lse < FAR) {
      valued_gradient(x, scale, factor, lse, a, std::exp(lse - known_lse), known, pull, n, g);
    } else {
      softmax_gradient(x, scale, factor, lse, a, n, g);
      add_known_gradient(x, scale, factor, known_lse, known, pull, n, g);
    }
  }
  const std::int64_t own = c.own_in(r, start, end);
  if (own >= 0) g[own] = 0.0f;
}

template <class E>
void gradient_rows(const Chunk& c, const Statistics& st, const float* up_lse, const float* up_expected,
                   const Runs& runs, const Strided& corr_scale, E* out, int threads) {
  const std::int64_t widest = longest_frame(c);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> pull(widest), g(widest);
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < c.rows; ++r)
      for (std::int64_t f = 0; f < c.frames; ++f) {
        const std::int64_t start = c.frame_offsets[f], n = c.frame_offsets[f + 1] - start;
        gradient_of_frame(c, r, f, st, up_lse, up_expected, pull.data(), g.data());
        if (runs.start && corr_scale.data)
          for (std::int64_t at = runs.begin(r, f); at < runs.end(r, f); ++at) {
            const std::int64_t column = runs.target[at] - runs.first_token;
            g[column - start] -= corr_scale[runs.order[at]] * c.token_scale[column] * c.factor(r);
          }
        store_row(g.data(), n, out + r * c.tokens + start);
      }
  }
}

void similarity_gradient(const Chunk& c, Array<float> lse, Array<float> known_lse, Array<float> expected,
                         const Array<float>& up_lse, const Array<float>& up_expected,
                         const std::optional<Array<std::int64_t>>& run_start, std::int64_t longest,
                         const std::optional<Array<std::int64_t>>& order,
                         const std::optional<Array<std::int64_t>>& target, std::int64_t first_token,
                         const std::optional<py::array_t<float>>& corr_scale, py::array out, int threads) {
  Runs runs;
  if (run_start) {
    runs = Runs{run_start->data(), longest, order->data(), target->data(), nullptr, nullptr, first_token};
  }
  const Statistics statistics{lse.mutable_data(), known_lse.mutable_data(), expected.mutable_data(), nullptr, nullptr};
  const Strided corr_weight(corr_scale);
  const float *pull_lse = up_lse.data(), *pull_expected = up_expected.data();
  void* to = out.mutable_data();
  const bool wide = out.itemsize() == 4;
  py::gil_scoped_release release;
  if (wide)
    gradient_rows(c, statistics, pull_lse, pull_expected, runs, corr_weight, static_cast<float*>(to), threads);
  else
    gradient_rows(c, statistics, pull_lse, pull_expected, runs, corr_weight, static_cast<Bfloat16*>(to), threads);
}

// ---------------------------------------------------------------------------------------------------------------
// inverse_norms, project_gradient: embeddings [n, D] with contiguous rows, float32 or the bits of bfloat16

template <class E> const E* row_of(const py::array& a, std::int64_t r) {
  return reinterpret_cast<const E*>(static_cast<const char*>(a.data()) + r * a.strides(0));
}

void inverse_norms(const py::array& embeddings, Array<float> out, int threads) {
  const std::int64_t n = embeddings.shape(0), width = embeddings.shape(1);
  const bool wide = embeddings.itemsize() == 4;
  float* to = out.mutable_data();
  const char* base = static_cast<const char*>(embeddings.data());
  const std::int64_t stride = embeddings.strides(0);
  py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t r = 0; r < n; ++r) {
    const char* row = base + r * stride;
    const float square = wide ? squared_norm(reinterpret_cast<const float*>(row), width)
                              : squared_norm(reinterpret_cast<const Bfloat16*>(row), width);
    const float norm = std::sqrt(square);
    to[r] = 1.0f / (norm < NORM_FLOOR ? NORM_FLOOR : norm);
  }
}

void project_gradient(const py::array& gradient, const py::array& embeddings, const Array<float>& inverse_norm,
                      py::array out, int threads) {
  const std::int64_t n = embeddings.shape(0), width = embeddings.shape(1);
  const bool wide = embeddings.itemsize() == 4;
  const float* scale = inverse_norm.data();
  const char *u_base = static_cast<const char*>(gradient.data()), *e_base = static_cast<const char*>(embeddings.data());
  char* out_base = static_cast<char*>(out.mutable_data());
  const std::int64_t u_stride = gradient.strides(0), e_stride = embeddings.strides(0), out_stride = out.strides(0);
  py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t r = 0; r < n; ++r) {
    const float* u = reinterpret_cast<const float*>(u_base + r * u_stride);
    const float square = scale[r] >= 1.0f / NORM_FLOOR ? 0.0f : scale[r] * scale[r];
    if (wide) {
      const float* e = reinterpret_cast<const float*>(e_base + r * e_stride);
      subtract_multiple(e, u, square * dot_with(e, u, width), width, reinterpret_cast<float*>(out_base + r * out_stride));
    } else {
      const Bfloat16* e = reinterpret_cast<const Bfloat16*>(e_base + r * e_stride);
      subtract_multiple(e, u, square * dot_with(e, u, width), width,
                        reinterpret_cast<Bfloat16*>(out_base + r * out_stride));
    }
  }
}

}  // namespace

PYBIND11_MODULE(_rows, m) {
  m.doc() = "Row operations over a chunk of similarities; see gasp_fast.kernels.rows_torch for what they compute.";
  py::class_<Chunk>(m, "Chunk")
      .def(py::init<const Array<float>&, const Array<float>&, const Array<float>&, float, const Array<std::int64_t>&,
                    bool, const Array<std::int64_t>&, const std::optional<Array<float>>&,
                    const std::optional<Array<bool>>&>(),
           py::arg("similarity").noconvert(), py::arg("row_scale").noconvert(), py::arg("token_scale").noconvert(),
           py::arg("temperature"), py::arg("own_token").noconvert(), py::arg("exclude_own"),
           py::arg("frame_offsets").noconvert(), py::arg("values").noconvert(), py::arg("known").noconvert(),
           // The arrays are borrowed: they must outlive the chunk.
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 6>(),
           py::keep_alive<1, 8>(), py::keep_alive<1, 9>());
  m.def("frame_statistics", &frame_statistics);
  m.def("match_terms", &match_terms);
  m.def("similarity_gradient", &similarity_gradient);
  m.def("inverse_norms", &inverse_norms);
  m.def("project_gradient", &project_gradient);
}
