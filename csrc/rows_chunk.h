// RowChunk, ChunkMatches and FrameStatistics of kernels/chunk.py for one layer, as pointers into their arrays.

#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "arrays.h"
#include "rows_loops.h"

namespace {

constexpr float kBounded = 40.0f;  // similarities up to this need no maximum, see rows.cpp

struct Chunk {
    std::vector<py::object> borrowed;  // keeps the memory alive
    float* similarity;
    int64_t rows, tokens;
    const float* row_scale;
    const float* token_scale;
    float inverse_temperature;
    const int64_t* row_token;
    bool exclude_own;
    int64_t frames, first_token;
    std::vector<int64_t> frame_offsets;  // columns of this chunk
    int64_t width = 0;              // of the values; 0: there are none
    const float* known = nullptr;   // 1 or 0
    const float* values = nullptr;  // [n, width], 0 where unknown

    Chunk(Array<float> similarity_, const Array<float>& row_scale_, const Array<float>& token_scale_, float temperature,
          const Array<int64_t>& row_token_, bool exclude_own_, int64_t first_token_,
          const Array<int64_t>& frame_offsets_, int64_t first_column, const std::optional<Array<float>>& values_,
          const std::optional<Array<float>>& known_)
        : borrowed{similarity_, row_scale_, token_scale_, row_token_},
          similarity(similarity_.mutable_data()),
          rows(similarity_.shape(0)),
          tokens(similarity_.shape(1)),
          row_scale(row_scale_.data()),
          token_scale(token_scale_.data()),
          inverse_temperature(1.0f / temperature),
          row_token(row_token_.data()),
          exclude_own(exclude_own_),
          frames(frame_offsets_.shape(0) - 1),
          first_token(first_token_),
          frame_offsets(frame_offsets_.data(), frame_offsets_.data() + frames + 1) {
        for (int64_t& offset : frame_offsets) offset = std::clamp<int64_t>(offset - first_column, 0, tokens);
        if (!values_) return;
        expect(known_.has_value(), "values are given without known");
        borrowed.insert(borrowed.end(), {*values_, *known_});
        width = values_->shape(1);
        known = known_->data();
        values = values_->data();
    }

    float* row(int64_t r) const { return similarity + r * tokens; }
    float factor(int64_t r) const { return row_scale[r] * inverse_temperature; }
    float log2_factor(int64_t r) const { return factor(r) * kLog2E; }
    bool bounded() const { return inverse_temperature <= kBounded; }
    // The place of the row's own token within [start, end), or -1.
    int64_t own_in(int64_t r, int64_t start, int64_t end) const {
        const int64_t own = row_token[r] - first_token;
        return exclude_own && own >= start && own < end ? own - start : -1;
    }
    int64_t longest_frame() const {
        int64_t longest = 0;
        for (int64_t f = 0; f < frames; ++f) longest = std::max(longest, frame_offsets[f + 1] - frame_offsets[f]);
        return longest;
    }
};

struct Matches {
    std::vector<py::object> borrowed;
    const int64_t* start;
    int64_t longest;
    const int64_t* order;
    const int64_t* target;
    const float* depth;
    const bool* has_depth;
    float* positive;
    float* pull = nullptr;
    bool every_frame, ignored;  // negatives in every frame; other targets are none of them
    float eps;

    Matches(const Array<int64_t>& start_, int64_t longest_, const Array<int64_t>& order_, const Array<int64_t>& target_,
            const Array<float>& depth_, const Array<bool>& has_depth_, Array<float> positive_,
            std::optional<Array<float>> pull_, bool every_frame_, bool ignored_, float eps_)
        : borrowed{start_, order_, target_, depth_, has_depth_, positive_},
          start(start_.data()),
          longest(longest_),
          order(order_.data()),
          target(target_.data()),
          depth(depth_.data()),
          has_depth(has_depth_.data()),
          positive(positive_.mutable_data()),
          every_frame(every_frame_),
          ignored(ignored_),
          eps(eps_) {
        if (!pull_) return;
        borrowed.push_back(*pull_);
        pull = pull_->mutable_data();
    }

    bool any(int64_t r, int64_t f) const { return begin(r, f) < end(r, f); }
    int64_t begin(int64_t r, int64_t f) const { return start[r * longest + f]; }
    int64_t end(int64_t r, int64_t f) const { return start[r * longest + f + 1]; }

    // Calls `visit(column in the frame, first, last)` for each different target among the tokens from `first_token` to
    // `first_token + n`; its matches have the sorted positions from `first` to `last`.
    template <typename Visit>
    void for_each_target(int64_t r, int64_t f, int64_t first_token, int64_t n, Visit visit) const {
        for (int64_t at = begin(r, f), next; at < end(r, f); at = next) {
            next = at + 1;
            while (next < end(r, f) && target[next] == target[at]) ++next;
            const int64_t column = target[at] - first_token;
            if (column >= 0 && column < n) visit(column, at, next);
        }
    }
};

struct Statistics {
    std::vector<py::object> borrowed;
    int64_t rows, frames, width;
    float* lse;
    float* known_lse;
    float* expected;
    int64_t* best;
    float* peak;
    float* negative_lse;  // `lse` itself where targets are not ignored

    Statistics(Array<float> lse_, Array<float> known_lse_, Array<float> expected_, Array<int64_t> best_,
               Array<float> peak_, Array<float> negative_lse_)
        : borrowed{lse_, known_lse_, expected_, best_, peak_, negative_lse_},
          rows(expected_.shape(0)),
          frames(expected_.shape(1)),
          width(expected_.shape(2)),
          lse(lse_.mutable_data()),
          known_lse(known_lse_.mutable_data()),
          expected(expected_.mutable_data()),
          best(best_.mutable_data()),
          peak(peak_.mutable_data()),
          negative_lse(negative_lse_.mutable_data()) {}
};

// Numbers [M], perhaps expanded: any stride.
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

}  // namespace
