// The loops of rows.cpp over one frame of one row.
//
// Plain C++ that the compiler vectorises, once per instruction set (`FOR_EACH_CPU`), chosen when the library is loaded.
// Reductions carry `omp simd`, which allows the reordering that vectorising needs and nothing else; infinities and
// NaNs keep their meaning.
//
// Similarities are computed in units of log 2: `y_k = x_k (scale_k factor)` has the factor `log2(e)` inside, and
// `exp(s_k)` is `2^y_k`. Splitting `y` into an integer and a rest is then exact, and costs two additions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // without fused multiply-adds and 16-bit vectors
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINED inline __attribute__((always_inline))

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();  // the log of an empty sum
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;

// Keeps the compiler from fusing a product with the sum it enters: the maximum must be one of the similarities that
// were exponentiated, to the last bit.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define ROUNDED(product) __builtin_assoc_barrier(product)
#else
#define ROUNDED(product) (product)
#endif

// 2^y for -inf <= y < 128, within 2 units in the last place; 0 below -126, NaN for NaN. Branch-free, so it vectorises.
INLINED float exp2_of(float y) {
    const float shifted = y + 12582912.0f;  // 1.5 * 2^23: the nearest integer, in the low bits
    const float r = y - (shifted - 12582912.0f);
    float p = 1.535336188319500e-4f;  // 2^r on [-1/2, 1/2]
    p = p * r + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return y < -126.0f ? 0.0f : p * scale;
}

// ---- Element types of gradients and embeddings

struct Bfloat16 {
    uint16_t bits;
};

INLINED float as_float(float x) { return x; }
INLINED float as_float(Bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
INLINED void put(float x, float* to) { *to = x; }
INLINED void put(float x, Bfloat16* to) {  // round to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// ---- One pass: every sum and the maximum, where no 2^y can leave the range of float

struct Sums {
    float all;     // sum 2^y
    float known;   // the same over tokens of known value
    float moment;  // sum 2^y value over these
    float peak;    // max y
};

FOR_EACH_CPU Sums sums_of(const float* x, const float* scale, float factor, int64_t n) {
    float all = 0.0f, peak = kNone;
#pragma omp simd reduction(+ : all) reduction(max : peak)
    for (int64_t k = 0; k < n; ++k) {
        const float y = ROUNDED(x[k] * (scale[k] * factor));
        all += exp2_of(y);
        peak = y > peak ? y : peak;
    }
    return {all, 0.0f, 0.0f, peak};
}

// The same with values: `known` is 1 or 0, and `value` is 0 where `known` is.
FOR_EACH_CPU Sums valued_sums_of(const float* x, const float* scale, float factor, const float* known,
                                 const float* value, int64_t n) {
    float all = 0.0f, among_known = 0.0f, moment = 0.0f, peak = kNone;
#pragma omp simd reduction(+ : all, among_known, moment) reduction(max : peak)
    for (int64_t k = 0; k < n; ++k) {
        const float y = ROUNDED(x[k] * (scale[k] * factor));
        const float e = exp2_of(y);
        all += e;
        among_known += e * known[k];
        moment += e * value[k];
        peak = y > peak ? y : peak;
    }
    return {all, among_known, moment, peak};
}

// The first k with y_k == peak; n if there is none.
FOR_EACH_CPU int64_t position_of(const float* x, const float* scale, float factor, float peak, int64_t n) {
    int32_t at = static_cast<int32_t>(n);
#pragma omp simd reduction(min : at)
    for (int32_t k = 0; k < static_cast<int32_t>(n); ++k) {
        const int32_t candidate = x[k] * (scale[k] * factor) == peak ? k : static_cast<int32_t>(n);
        at = candidate < at ? candidate : at;
    }
    return at;
}

// ---- Separate passes: first the maximum, then 2^(y - maximum)

// y = x (scale factor)
FOR_EACH_CPU void scale_row(const float* x, const float* scale, float factor, int64_t n, float* y) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) y[k] = x[k] * (scale[k] * factor);
}

FOR_EACH_CPU float largest(const float* y, int64_t n) {
    float peak = kNone;
#pragma omp simd reduction(max : peak)
    for (int64_t k = 0; k < n; ++k) peak = y[k] > peak ? y[k] : peak;
    return peak;
}

FOR_EACH_CPU float largest_known(const float* y, const float* known, int64_t n) {
    float peak = kNone;
#pragma omp simd reduction(max : peak)
    for (int64_t k = 0; k < n; ++k) {
        const float candidate = known[k] != 0.0f ? y[k] : kNone;
        peak = candidate > peak ? candidate : peak;
    }
    return peak;
}

// y = 2^(y - peak); returns the sum.
FOR_EACH_CPU float exponentiate(float* y, float peak, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) {
        const float e = exp2_of(y[k] - peak);
        y[k] = e;
        sum += e;
    }
    return sum;
}

// e = known 2^(y - peak); returns the sum. Only unknown tokens may have y > peak.
FOR_EACH_CPU float exponentiate_known(const float* y, const float* known, float peak, int64_t n, float* e) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) {
        const float distance = y[k] - peak;
        const float value = known[k] * exp2_of(distance > 0.0f ? 0.0f : distance);
        e[k] = value;
        sum += value;
    }
    return sum;
}

// sum a_k b_(k stride)
FOR_EACH_CPU float dot(const float* a, const float* b, int64_t n, int64_t stride) {
    float sum = 0.0f;
    if (stride == 1) {
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k * stride];
    }
    return sum;
}

// sum exp(a_k - m), for few numbers a
FOR_EACH_CPU float sum_exp(const float* a, float m, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += exp2_of((a[k] - m) * kLog2E);
    return sum;
}

// out = weight exp(a_k - m)
FOR_EACH_CPU void weighted_exp(const float* a, float m, float weight, int64_t n, float* out) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = weight * exp2_of((a[k] - m) * kLog2E);
}

// ---- dL/dx of one frame, each with f = scale factor

// What a frame's gradient is made of: g = (a 2^(y - lse) + known b (v - expected) 2^(y - known_lse)) f
struct Slopes {
    float a, lse;
    float b, known_lse, expected;
};

// Only the first part.
template <typename E>
INLINED void softmax_gradient_in(const float* x, const float* scale, float factor, Slopes at, int64_t n, E* g) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        const float f = scale[k] * factor;
        put(at.a * exp2_of(x[k] * f - at.lse) * f, g + k);
    }
}

// Both parts with one exponential: `b` has the factor 2^(lse - known_lse).
template <typename E>
INLINED void valued_gradient_in(const float* x, const float* scale, float factor, Slopes at, const float* known,
                                const float* value, int64_t n, E* g) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        const float f = scale[k] * factor;
        const float slope = at.a + known[k] * (at.b * (value[k] - at.expected));
        put(slope * exp2_of(x[k] * f - at.lse) * f, g + k);
    }
}

// Both parts with exponentials of their own, where that factor would leave the range of float. Only tokens that do not
// belong to a sum may have `y` above its logarithm.
template <typename E>
INLINED void distant_gradient_in(const float* x, const float* scale, float factor, Slopes at, const float* known,
                                 const float* value, int64_t n, E* g) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        const float f = scale[k] * factor, distance = x[k] * f - at.known_lse;
        const float among_known = known[k] * (at.b * (value[k] - at.expected));
        const float slope = at.a * exp2_of(x[k] * f - at.lse);
        put((slope + among_known * exp2_of(distance > 1.0f ? 1.0f : distance)) * f, g + k);
    }
}

#define DEFINE_GRADIENTS(E)                                                                                        \
    FOR_EACH_CPU void softmax_gradient(const float* x, const float* scale, float factor, Slopes at, int64_t n,     \
                                       E* g) {                                                                     \
        softmax_gradient_in(x, scale, factor, at, n, g);                                                           \
    }                                                                                                              \
    FOR_EACH_CPU void valued_gradient(const float* x, const float* scale, float factor, Slopes at,                 \
                                      const float* known, const float* value, int64_t n, E* g) {                   \
        valued_gradient_in(x, scale, factor, at, known, value, n, g);                                              \
    }                                                                                                              \
    FOR_EACH_CPU void distant_gradient(const float* x, const float* scale, float factor, Slopes at,                \
                                       const float* known, const float* value, int64_t n, E* g) {                  \
        distant_gradient_in(x, scale, factor, at, known, value, n, g);                                             \
    }
DEFINE_GRADIENTS(float)
DEFINE_GRADIENTS(Bfloat16)

// deviation_k = sum_v b_v (values_kv - expected_v)
FOR_EACH_CPU void deviation_of_values(const float* values, const float* b, const float* expected, int64_t n,
                                      int64_t width, float* deviation) {
    for (int64_t k = 0; k < n; ++k) {
        float sum = 0.0f;
        for (int64_t v = 0; v < width; ++v) sum += b[v] * (values[k * width + v] - expected[v]);
        deviation[k] = sum;
    }
}

}  // namespace
