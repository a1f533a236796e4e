// `loss_terms`: both terms of every match, from the statistics of its row, and the gradients of these statistics.

#pragma once

#include "rows_chunk.h"

namespace {

struct Terms {
    float* corr;
    float* depth;
    int64_t* best;
    float* confidence;
};

// log sum exp of a row's frames; -inf if all are empty.
float log_sum_exp_of(const float* lse, int64_t frames) {
    const float peak = largest(lse, frames), reference = peak == kNone ? 0.0f : peak;
    return reference + std::log(sum_exp(lse, reference, frames));
}

// `|d - E| / (d + E + eps)`; `slope` receives its derivative by E.
float depth_term(float depth, float expected, float eps, float& slope) {
    const float total = depth + expected + eps, distance = depth - expected;
    const float sign = distance > 0.0f ? 1.0f : distance < 0.0f ? -1.0f : distance;  // NaN stays NaN
    slope = -sign / total - std::fabs(distance) / (total * total);
    return std::fabs(distance) / total;
}

// With `d` the log of the negatives' sum less the similarity of the target, the term of a match is `d`; where targets
// are ignored, `log(1 + exp(d))`: the sum over its negatives and its own target. `share` receives the derivative by
// `d`, the probability of the negatives.
float correspondence_term(float d, bool ignored, float& share) {
    share = 1.0f;
    if (!ignored) return d;
    share = 1.0f / (1.0f + std::exp(-d));
    return d > 0.0f ? d + std::log1p(std::exp(-d)) : std::log1p(std::exp(d));
}

void terms_of_row(const Statistics& st, int64_t r, const Matches& matches, const Terms& terms,
                  const Strided& corr_weight, const Strided& depth_weight, float* upstream_lse,
                  float* upstream_expected) {
    const int64_t frames = st.frames, width = st.width;
    const float* negative_lse = st.negative_lse + r * frames;
    const bool weighted = corr_weight.data != nullptr;
    const float row_lse = matches.every_frame ? log_sum_exp_of(negative_lse, frames) : 0.0f;
    float row_weight = 0.0f;  // of the negatives of this row
    for (int64_t f = 0; f < frames; ++f) {
        const int64_t cell = r * frames + f;
        float frame_weight = 0.0f, expected_slope = 0.0f;
        for (int64_t at = matches.begin(r, f); at < matches.end(r, f); ++at) {
            const int64_t match = matches.order[at];
            const float d = (matches.every_frame ? row_lse : negative_lse[f]) - matches.positive[at];
            float share, slope;
            terms.corr[match] = correspondence_term(d, matches.ignored, share);
            terms.best[match] = st.best[cell];
            terms.confidence[match] = std::exp(st.peak[cell] - st.lse[cell]);
            const float expected = width ? st.expected[cell * width] : 0.0f;
            const float depth = depth_term(matches.depth[at], expected, matches.eps, slope);
            terms.depth[match] = matches.has_depth[at] ? depth : 0.0f;
            if (!weighted) continue;
            const float weight = corr_weight[match] * share;
            frame_weight += weight;
            if (matches.pull) matches.pull[at] = -weight;
            if (matches.has_depth[at]) expected_slope += depth_weight[match] * slope;
        }
        if (!weighted) continue;
        upstream_lse[cell] = frame_weight;
        std::fill(upstream_expected + cell * width, upstream_expected + (cell + 1) * width, 0.0f);
        if (width) upstream_expected[cell * width] = expected_slope;
        row_weight += frame_weight;
    }
    if (!weighted || !matches.every_frame) return;
    if (row_lse == kNone)  // no negatives at all
        std::fill(upstream_lse + r * frames, upstream_lse + (r + 1) * frames, 0.0f);
    else
        weighted_exp(negative_lse, row_lse, row_weight, frames, upstream_lse + r * frames);
}

void loss_terms(const Statistics& statistics, const Matches& matches, Array<float> corr_out, Array<float> depth_out,
                Array<int64_t> best_out, Array<float> confidence_out,
                const std::optional<py::array_t<float>>& corr_weights,
                const std::optional<py::array_t<float>>& depth_weights, std::optional<Array<float>> upstream_lse,
                std::optional<Array<float>> upstream_expected, int threads) {
    const Terms terms{corr_out.mutable_data(), depth_out.mutable_data(), best_out.mutable_data(),
                      confidence_out.mutable_data()};
    const Strided corr_weight(corr_weights), depth_weight(depth_weights);
    float* to_lse = upstream_lse ? upstream_lse->mutable_data() : nullptr;
    float* to_expected = upstream_expected ? upstream_expected->mutable_data() : nullptr;
    py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < statistics.rows; ++r)
        terms_of_row(statistics, r, matches, terms, corr_weight, depth_weight, to_lse, to_expected);
}

}  // namespace
